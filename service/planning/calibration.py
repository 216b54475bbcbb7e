"""`lorot plan --measure`: how fast a worker of this machine is, and the link between two. Imports no torch."""

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from service import check, config, machine
from service.errors import JobError
from service.jobs import torchrun
from service.planning.assembly import Measured
from service.planning.prediction import LINK_SHARE
from service.profile import command

_FLOAT = 4
_LINK_TIMEOUT_S = 300


def measure(
    path: Path | str,
    overrides: Sequence[str],
    workers: int,
    *,
    steps: int | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> Measured:
    """Profile one worker that has the share of the cores it would have among `workers`, and the link between two.

    Args:
        steps: optimizer steps of each part; default: as `lorot profile`.

    Raises:
        LorotError: as training would.
    """
    job = config.load(path, list(overrides))
    threads = max(1, machine.cores() // workers)
    # One worker alone has a step of its micro-batches only: what the others would do is not its work.
    share = max(job.micro_batch, job.global_batch // workers // job.micro_batch * job.micro_batch)
    alone = [*overrides, f"global_batch={share}", f"data.num_threads={job.data.num_threads or threads}"]
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = before or str(threads)
    try:
        found = command.run(path, alone, workers=1, steps=steps, say=say)
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
    on_cpu = found.setting.device == "cpu"
    part = found.both if on_cpu else found.loader
    link = 0.0
    if workers > 1 and (on_cpu or machine.gpus() > 1):
        say("measuring the link between two workers")
        link = _link(job)
    # The loader of a GPU worker is no part of the step's rate; on a CPU both share the cores.
    rate = found.both.images_per_s if on_cpu else found.step.images_per_s
    return Measured(found.setting.device, rate, part.core_s_per_image, found.setting.cores, link)


def _link(job: config.JobConfig) -> float:
    """Bytes/s at which two workers average as many bytes as the network has gradients, as a peak for `prediction`."""
    network = check.network(job.model, 10, check.num_pretext_labels(job))
    size = _FLOAT * sum(parameter.numel() for parameter in network.parameters())
    with tempfile.TemporaryDirectory(prefix="lorot-plan-") as place:
        result = Path(place) / "link.json"
        line = torchrun.command(str(size), [str(result)], workers=2, module="service.planning.link")
        done = subprocess.run(
            line,
            env={**torchrun.environment(2), "DS_ACCELERATOR": ""},
            capture_output=True,
            text=True,
            timeout=_LINK_TIMEOUT_S,
        )
        if done.returncode or not result.exists():
            raise JobError(f"the link between two workers could not be measured:\n{done.stderr[-2000:]}")
        return float(json.loads(result.read_text())["bytes_per_s"]) / LINK_SHARE
