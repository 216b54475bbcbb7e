"""Two workers of which the main one is busy for longer than the others wait in a collective operation."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from service import splits
from service.run_folder import RunFolder
from tests.integration import small_job
from tests.integration.processes import await_
from tests.service import small_model, small_scenes

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
# Both fetching the model and scoring take longer than `timeout_s`, and than the watchdog has patience for a step: at
# most 1.3 times that. A slow machine has to be done with connecting and ordinary collective operations within it.
PROGRAM = """
import json, sys, time
from pathlib import Path
import torch
from service import resolution, splits
from service.downstream.coco_scores import Scorer
from service.run_folder import RunFolder
from service.training import detection, distributed
from service.training.watchdog import Watchdog
from tests.service import small_scenes

root, timeout_s, busy_s = Path(sys.argv[1]), 30.0, 42.0

def slowly(action):
    def slow(*arguments):
        time.sleep(busy_s)
        return action(*arguments)
    return slow

resolution.resolve, Scorer.compute = slowly(resolution.resolve), slowly(Scorer.compute)
world = distributed.connect("cpu", timeout_s)
config = small_scenes.job(root, root / "model")
folder = RunFolder(config.folder)
folder.make()
with Watchdog(folder, world, timeout_s) as dog:
    task = detection.open_task(config, folder, world, *splits.load(config))
    torch.manual_seed(0)
    network = task.build().eval()
    with task.open_eval() as loader:
        batches = dog.through(iter(loader), "waiting", "evaluating")
        found = task.evaluate(network, batches, lambda: False, dog.together)
print(json.dumps(found), flush=True)
distributed.leave()
"""


# Its main worker looks at the data for as long as it takes: until it is told to go on.
INDEXING = """
import sys, time
from pathlib import Path
from service import splits
from service.training import worker

load = splits.load

def wait(job):
    while not Path("go").exists():
        time.sleep(0.1)
    return load(job)

splits.load = wait
sys.exit(worker.main(sys.argv[1:]))
"""


# The first batch of the worker that is named first comes only when it is told to go on; the other one waits for it.
OPENING = """
import os, sys, time
from pathlib import Path
from service.training import worker
from service.training.watchdog import Watchdog

through = Watchdog.through

def wait(dog, batches, waiting, working):
    def late():
        while os.environ["RANK"] == sys.argv[1] and not Path("go").exists():
            time.sleep(0.1)
        yield from batches
    return through(dog, late(), waiting, working)

Watchdog.through = wait
sys.exit(worker.main(sys.argv[2:]))
"""


def started(place: Path, *line: str) -> list[subprocess.Popen[str]]:
    """Two workers without a torchrun, which would end the one when the other has ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    here |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/service'}"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", *line],
            cwd=place,
            env=os.environ | here | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def test_a_worker_that_freezes_while_the_main_one_indexes_the_data_is_named_by_it(tmp_path: Path) -> None:
    small_job.prepare(tmp_path)
    folder = RunFolder(tmp_path / "runs" / "frozen")
    main, other = started(tmp_path, INDEXING, "job.yaml", "name=frozen", "timeout_s=30")
    try:
        sign = folder.path / "workers" / "rank1.json"

        def waits() -> bool:
            return (sign.exists() and "however_long" in sign.read_text()) or main.poll() is not None

        await_(waits, "the other one waits", 100)
        other.send_signal(signal.SIGSTOP)
        await_(lambda: main.poll() is not None, "the main one ends", 100)
        told = folder.read("error.json")
        assert (main.returncode, told["exit_code"]) == (8, 8), main.communicate()
        assert told["message"].startswith("worker 0, after step 0: worker 1 stopped answering within timeout_s=30")
        assert "worker 1: step 0, starting for " in told["message"]
        assert "however_long" in told["message"]
    finally:
        for worker in (main, other):
            worker.kill()
            worker.communicate()


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_worker_that_freezes_as_it_waits_for_the_first_batch_is_named_long_before_the_ten_minutes_of_an_opening(
    frozen: int, tmp_path: Path
) -> None:
    """Where the workers meet stands still with the main one."""
    small_job.prepare(tmp_path)
    folder = RunFolder(tmp_path / "runs" / "frozen")
    lives = 1 - frozen
    both = started(tmp_path, OPENING, str(lives), "job.yaml", "name=frozen", "timeout_s=40")
    try:
        signs = [folder.path / "workers" / f"rank{rank}.json" for rank in range(2)]

        def wait() -> bool:
            told = [sign.read_text() if sign.exists() else "" for sign in signs]
            is_opening = all("waiting for a batch, the first" in text for text in told)
            return (is_opening and "however_long" in told[frozen]) or both[lives].poll() is not None

        await_(wait, "both wait for the first batch", 150)
        both[frozen].send_signal(signal.SIGSTOP)
        frozen_at = time.monotonic()
        # All of it on a slow machine is less than the ten minutes that the first batch may take.
        await_(lambda: both[lives].poll() is not None, "the other one ends", 100)
        print(f"noticed {time.monotonic() - frozen_at:.1f} s after the freeze with timeout_s=40")
        told = folder.read("error.json")
        assert (both[lives].returncode, told["exit_code"]) == (8, 8), both[lives].communicate()
        assert told["message"].startswith(
            f"worker {lives}, after step 0: worker {frozen} stopped answering within timeout_s=40"
        )
        for rank in range(2):
            said = rf"^  worker {rank}: step 0, waiting for a batch, the first for \d+ s, at \S+:\d+ "
            assert re.search(said, told["message"], re.MULTILINE)
        assert "in late" in folder.log(lives).read_text()
    finally:
        for worker in both:
            worker.kill()
            worker.communicate()


def test_a_model_that_comes_slowly_and_scores_that_take_long_do_not_end_a_job(tmp_path: Path) -> None:
    small_scenes.drawn(tmp_path / "scenes")
    small_model.written(tmp_path / "model")
    # Made by now, so that the workers come at nearly the same time.
    splits.load(small_scenes.job(tmp_path, tmp_path / "model"))
    workers = started(ROOT, PROGRAM, str(tmp_path))
    ended = [worker.communicate(timeout=600) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], ended
    first, second = (json.loads(said.splitlines()[-1]) for said, _ in ended)
    assert first == second
    assert first["AP"] >= 0
