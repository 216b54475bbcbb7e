"""The loader alone, the step alone, both together: by the training loop itself, on whatever batches it is given."""

import itertools
import time
from collections.abc import Iterator, Mapping

import psutil
import torch

from pipelines import loading
from pipelines.batch import Batch
from service.config import JobConfig
from service.profile.findings import Phase
from service.training import distributed, loop
from service.training.ema import Ema
from service.training.engine import Engine
from service.training.lengths import Lengths
from service.training.meters import Meters
from service.training.watch import Watch

_WARM_UP = 2
_NEVER = 2**31
# A phase's time without `--steps`, and how many steps it is at least and at most.
_PHASE_S = 20.0
_STEPS = (3, 200)
# Batches kept on the device for the step alone.
_KEPT = 4


class SilentKeeper:
    """Keeps nothing but the last training metrics: what is measured is not a run."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}

    def step(self, step: int) -> None: ...

    def record(self, metrics: Mapping[str, float], step: int) -> None:
        self.metrics.update(metrics)

    def save_is_due(self) -> bool:
        return False

    def write_failed(self) -> bool:
        return False

    def finish_writing(self) -> None: ...

    def is_best(self, metrics: Mapping[str, float]) -> bool:
        return False

    def save(self, step: int, metrics: Mapping[str, float], *, wait: bool = False) -> None: ...

    def last_saved(self) -> str:
        return "nothing"


class Training:
    """A job's step, to be run a number of times on given batches."""

    def __init__(self, job: JobConfig, engine: Engine, ema: Ema | None, meters: Meters, samples: int) -> None:
        self.engine = engine
        self._job, self._ema, self._meters, self._samples = job, ema, meters, samples

    def run(self, batches: Iterator[Batch], steps: int) -> Phase:
        """`steps` optimizer steps of the training loop."""
        keeper = SilentKeeper()
        lengths = Lengths(self._samples, total=steps, record=_NEVER, evaluate=_NEVER, save=0)
        began, cpu_s = self._start()
        watch = Watch(self._job, self.engine, keeper)
        loop.train(self._job, lengths, self.engine, self._ema, batches, self._meters, dict, keeper, watch)
        # The loop's last act reads a value from the device, so nothing is left running there.
        phase = _over_workers(steps * self._images, time.perf_counter() - began, _cpu_s() - cpu_s, self.engine)
        return Phase(phase.images, phase.seconds, phase.cpu_s, keeper.metrics["train/data_wait_share"] * phase.seconds)

    def num_steps(self, batches: Iterator[Batch]) -> int:
        """Warm up, and say how many steps fit into a phase; all workers say the same."""
        self.run(batches, _WARM_UP)
        return max(_STEPS[0], min(_STEPS[1], int(_PHASE_S / self.run(batches, 1).seconds)))

    def load(self, loader: loading.Loader, batches: Iterator[Batch], steps: int | None) -> tuple[Phase, list[Batch]]:
        """Take the loader's batches and do nothing with them: for as many steps, or as long as a phase is.

        Args:
            batches: the loader's, as they are watched.

        Returns:
            What was measured, and a few of the batches.
        """
        kept = list(itertools.islice(batches, max(_KEPT, self.engine.accumulation)))
        began, cpu_s = self._start()
        waited, taken = loader.read_wait_s, 0
        wanted = steps * self.engine.accumulation if steps else _STEPS[1] * self.engine.accumulation
        while taken < wanted and (steps or taken < 2 or time.perf_counter() - began < _PHASE_S / 2):
            next(batches)
            taken += 1
        _synchronise(self.engine.world.device)
        images = taken * len(kept[0].labels)
        waited = loader.read_wait_s - waited
        return _over_workers(images, time.perf_counter() - began, _cpu_s() - cpu_s, self.engine, waited), kept

    @property
    def _images(self) -> int:
        return self._job.global_batch // self.engine.world.size

    def _start(self) -> tuple[float, float]:
        _synchronise(self.engine.world.device)
        distributed.barrier()
        return time.perf_counter(), _cpu_s()


def _over_workers(images: int, seconds: float, cpu_s: float, engine: Engine, waited_s: float = 0.0) -> Phase:
    """This worker's numbers and the others' together."""
    own = torch.tensor([images, seconds, cpu_s, waited_s], dtype=torch.float64, device=engine.world.device)
    total = distributed.all_sum(own).tolist()
    size = engine.world.size
    return Phase(int(total[0]), total[1] / size, total[2], total[3] / size)


def _cpu_s() -> float:
    times = psutil.Process().cpu_times()
    return float(times.user + times.system)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
