"""What a job's loaders are opened with: the samples, how they become the network's input, this worker's threads."""

from typing import Any

from pipelines import loading, pretext
from pipelines.manifest import Manifest
from pipelines.pretext import PretextTask
from service import config, machine, splits
from service.config import JobConfig
from service.training import distributed, objectives
from service.training.distributed import World
from service.training.lengths import sizes


def open_splits(job: JobConfig, world: World) -> tuple[Manifest, Manifest]:
    """The training and the evaluation split: one worker of each machine looks at the files, unless `lorot train` has.

    Raises:
        DataError: as `datasets.load`, or the data have changed since the job began.
    """
    found = splits.announced_here() or ""
    if world.local_rank == 0 and not found:
        found = splits.announcement(splits.load(job))
    return splits.map_announced(job, distributed.from_local_main(found, world))


def loader_options(job: JobConfig, world: World) -> dict[str, Any]:
    """What `loading.open_train` and `loading.open_eval` both take of a worker."""
    return {
        "rank": world.rank,
        "world_size": world.size,
        "device": world.device,
        "num_threads": num_threads(job, world.local_size),
        "prefetch": job.data.prefetch,
        "read_threads": job.data.read_threads,
        "readahead_mb": job.data.readahead_mb,
        "read_timeout_s": job.data.read_timeout_s,
    }


def num_threads(job: JobConfig, local_size: int) -> int:
    """Threads that decode for one of `local_size` workers on this machine."""
    return job.data.num_threads or max(1, machine.cores() // local_size)


def train_source(job: JobConfig, train_set: Manifest, task: PretextTask) -> loading.Source:
    """What is trained on."""
    return loading.Source(
        train_set,
        config.view(job.data),
        task,
        job.seed,
        render_pretext=objectives.renders_pretext(job.objective.name),
        limit=job.data.train_limit,
        on_bad_image=job.data.on_bad_image,
        repeats=job.data.repeats,
        order=job.data.order,
        block=job.data.block,
        sizes=sizes(job, min(len(train_set), job.data.train_limit or len(train_set))),
    )


def eval_source(job: JobConfig, eval_set: Manifest) -> loading.Source:
    """What is evaluated on."""
    return loading.Source(
        eval_set, config.view(job.data), pretext.load("none"), job.seed, on_bad_image=job.data.on_bad_image
    )
