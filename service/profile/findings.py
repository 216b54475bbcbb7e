"""From what was measured to what limits a job, and what would change it. Plain arithmetic; imports no torch."""

import math
from dataclasses import dataclass

from service import data_wait

# What the main worker leaves in the run folder.
RESULT = "profile.json"
# Together they may fall this far below the slower one alone before the cores they share are called the limit.
_SHARED_LOSS = 0.10
# From this share of the loader's time on, waiting for files is what it does.
_READING_SHARE = 0.20
_HEADROOM = 1.1


@dataclass(frozen=True)
class Phase:
    """What one part did, over all workers.

    Attributes:
        images: so many.
        seconds: wall time, the mean over the workers.
        cpu_s: user and system time of all workers' threads.
        wait_s: of `seconds`, how long a step waited for its batches, or the loader for its files.
    """

    images: int
    seconds: float
    cpu_s: float
    wait_s: float = 0.0

    @property
    def images_per_s(self) -> float:
        return self.images / self.seconds

    @property
    def wait_share(self) -> float:
        """Share of the time spent waiting, 0 to 1."""
        return self.wait_s / self.seconds

    @property
    def core_s_per_image(self) -> float:
        return self.cpu_s / self.images


@dataclass(frozen=True)
class Setting:
    """What was measured, and on what.

    Attributes:
        device: "cpu" or "cuda".
        cores: CPU cores of the machine.
        workers: processes.
        num_threads: decoding threads of a worker.
        prefetch: batches a worker keeps ready.
        accumulation: micro-batches a step.
        precision, compiled: of the network.
        loader: "dali" or "torch".
        encoded: samples are image files.
        source_pixels: of a sample on average; 0 if that is not known.
        size: side of the network's input that was measured, pixels: the largest of the job's.
    """

    device: str
    cores: int
    workers: int
    num_threads: int
    prefetch: int
    accumulation: int
    precision: str
    compiled: bool
    loader: str
    encoded: bool
    source_pixels: float
    size: int


@dataclass(frozen=True)
class Findings:
    """What was measured: the loader alone, the step alone on batches that lie on the device, and both together."""

    setting: Setting
    loader: Phase
    step: Phase
    both: Phase

    @property
    def bottleneck(self) -> str:
        """ "storage", "loader", "cores" (both want the same ones), "bursts" or "step"."""
        slower = min(self.loader.images_per_s, self.step.images_per_s)
        if self.loader.images_per_s < self.step.images_per_s:
            return "storage" if self.loader.wait_share >= _READING_SHARE else "loader"
        if self.setting.device == "cpu" and self.both.images_per_s < (1 - _SHARED_LOSS) * slower:
            return "cores"
        return "bursts" if self.both.wait_share > data_wait.NOTABLE else "step"

    @property
    def cores_wanted(self) -> float:
        """Cores that loading keeps busy when it is as fast as the step alone."""
        return self.step.images_per_s * self.loader.core_s_per_image

    @property
    def best_shared(self) -> float:
        """Images/s at which loading and a step on the CPU keep all cores busy: no order of work does more."""
        return self.setting.cores / (self.loader.core_s_per_image + self.step.core_s_per_image)

    def balance(self) -> str:
        """How many cores, threads or workers would let neither wait for the other."""
        setting, wanted = self.setting, self.cores_wanted
        if setting.device == "cpu":
            both = self.loader.core_s_per_image + self.step.core_s_per_image
            loading = setting.cores * self.loader.core_s_per_image / both
            return (
                f"of {setting.cores} cores, {loading:.1f} for loading and {setting.cores - loading:.1f} for the step "
                f"would be {self.best_shared:,.0f} images/s at best; it is {self.both.images_per_s:,.0f}"
            )
        threads = max(1, math.ceil(_HEADROOM * wanted / setting.workers))
        text = (
            f"to keep up with the step, loading needs {wanted:.1f} cores: data.num_threads={threads} in each of "
            f"{setting.workers} workers"
        )
        if _HEADROOM * wanted <= setting.cores:
            return text
        served = math.floor(setting.workers * setting.cores / (_HEADROOM * wanted))
        return f"{text}; this machine's {setting.cores} cores are enough for {served} such workers"

    def advice(self) -> list[str]:
        """What to change, the most promising first."""
        return [text for applies, text in self._advice() if applies]

    def _advice(self) -> list[tuple[bool, str]]:
        limit, setting = self.bottleneck, self.setting
        loads = limit in ("loader", "cores")
        large = setting.encoded and setting.source_pixels > 2 * (setting.size * 8 / 7) ** 2
        busy = self.both.cpu_s / self.both.seconds
        spare = setting.cores // setting.workers
        threads = loads and setting.device == "cuda" and setting.num_threads < spare
        return [
            (loads and setting.loader != "dali", "data.loader=dali: the torch loader is the reference, and slow"),
            (
                limit == "storage",
                "the files come too slowly: more data.read_threads and data.readahead_mb, data.order=blocks on a disk "
                "or network that reads in sequence well, or `lorot data prepare` onto a local disk",
            ),
            (
                loads and large,
                f"`lorot data prepare` once: images of {setting.source_pixels / 1e6:.2f} megapixels are decoded for an "
                f"input of {setting.size} pixels, and a short side of {round(setting.size * 8 / 7)} is enough for it",
            ),
            (threads, f"data.num_threads={spare}: {setting.num_threads} are at work, a worker's share is {spare}"),
            (
                loads and setting.device == "cuda" and not threads,
                "more CPU cores for each GPU, or the data prepared smaller, or decoding on the GPU",
            ),
            (limit == "bursts", f"data.prefetch={2 * setting.prefetch}: on average the loader is fast enough"),
            (
                limit in ("step", "cores") and setting.device == "cuda" and setting.precision == "fp32",
                "precision=bf16 (or fp16): the step computes in fp32",
            ),
            (
                setting.device == "cpu" and busy < 0.75 * setting.cores,
                f"OMP_NUM_THREADS={max(1, setting.cores // setting.workers)} or more workers: of {setting.cores} cores "
                f"{busy:.1f} are at work",
            ),
            (limit == "step" and not setting.compiled, "compile=true: the network runs operator by operator"),
            (
                limit == "step" and setting.accumulation > 1,
                f"a larger micro_batch, if memory allows: a step adds up {setting.accumulation} of them",
            ),
            (
                limit in ("step", "cores"),
                "more workers on more machines: the loader is no hindrance"
                if limit == "step"
                else "more cores or a GPU: loading and the step want the same cores",
            ),
        ]

    def verdict(self) -> str:
        """The bottleneck in one sentence."""
        return {
            "storage": "The loader is the bottleneck, and what it waits for is the files.",
            "loader": "The loader is the bottleneck: alone it is slower than the step.",
            "cores": "Loading and the step are each fast enough alone; together they share the cores.",
            "bursts": "The loader is fast enough on average, but its batches come in bursts.",
            "step": "The step is the bottleneck; the data is there in time.",
        }[self.bottleneck]
