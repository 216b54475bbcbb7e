"""A job under plain torchrun, without `lorot train`: what torchrun restarts goes on."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.integration import small_job
from tests.integration.processes import await_, family, workers
from tests.integration.sample_logs import around, newest_checkpoint

pytestmark = pytest.mark.integration


def disturbed(root: Path, name: str) -> tuple[str, int, int]:
    """Run the job to its end, and kill a worker meanwhile; what it said, when that was, what was saved by then."""
    folder = root / "runs" / name
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    line += ["--max-restarts", "1"]
    line += ["-m", "service.training.worker", str(root / "job.yaml"), f"name={name}", "--resume"]
    # As a user starts it: torchrun shares one store among all restarts unless it is told otherwise.
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"}
    environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    log = root / f"{name}.txt"
    with log.open("w") as said:
        job = subprocess.Popen(line, env=environment, stdout=said, stderr=said)
    try:
        await_(lambda: job.poll() is not None or newest_checkpoint(folder) >= 4, "a checkpoint", 200, log.read_text)
        struck_ns, saved = time.time_ns(), newest_checkpoint(folder)
        found = workers(job.pid)
        if 1 in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                found[1].send_signal(signal.SIGKILL)
        assert job.wait(timeout=600) == 0, log.read_text()
    finally:
        for process in family(job.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        job.wait()
    return log.read_text(), struck_ns, saved


def test_a_worker_lost_under_plain_torchrun_comes_back_and_the_job_ends(tmp_path: Path) -> None:
    root = small_job.prepare(tmp_path)
    # The job may end before a worker is killed, where this process has to wait for its turn.
    for number in range(5):
        name = f"disturbed-{number}"
        said, struck_ns, saved = disturbed(root, name)
        if "exitcode: -9" in said:
            break
    assert "exitcode: -9" in said, "no worker was lost: the test shows nothing"
    last, first = around(root / "runs" / name, struck_ns)
    assert saved < first <= last + 1
    # What the other worker said of the loss is not the word on a job that has ended well.
    assert "this worker ends here" in (root / "runs" / name / "log-rank0.txt").read_text()
    assert not (root / "runs" / name / "error.json").exists()
    small_job.finish(root, "whole")
    small_job.same(root, name, "whole", said)
