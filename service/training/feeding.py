"""What a job's loaders are opened with: the samples, how they become the network's input, this worker's threads."""

import hashlib
from typing import Any

import torch

from pipelines import loading, pretext
from pipelines.manifest import Manifest
from pipelines.pretext import PretextTask
from service import config, machine, splits
from service.config import JobConfig, TrainingConfig
from service.errors import DataError
from service.training import distributed, objectives
from service.training.distributed import World
from service.training.lengths import sizes


def open_splits(job: TrainingConfig, world: World) -> tuple[Manifest, Manifest]:
    """The training and the evaluation split: one worker of each machine looks at the files, unless `lorot train` has.

    Raises:
        DataError: as `datasets.load`, or the data have changed since the job began, or machines hold different data.
    """
    found = splits.announced_here() or ""
    # A first look at a huge data set takes longer than a collective operation waits.
    with distributed.however_long(world, "the data set to be indexed"):
        if world.local_rank == 0 and not found:
            found = splits.announcement(splits.load(job))
    opened = splits.map_announced(job, distributed.from_local_main(found, world))
    _check_agreement(job, opened, world)
    return opened


def _check_agreement(job: TrainingConfig, opened: tuple[Manifest, Manifest], world: World) -> None:
    """Raises DataError on all workers if one of them has opened another split than the main worker has."""
    digests = b"".join(hashlib.sha256(manifest.digest.encode()).digest() for manifest in opened)
    own = torch.frombuffer(bytearray(digests), dtype=torch.uint8).reshape(len(opened), -1).to(world.device)
    gathered = distributed.gather(own)
    differs = (gathered != gathered[0]).any(dim=2).cpu().numpy()
    problems = [
        f"split {split!r} of ranks {', '.join(map(str, ranks))}"
        for split, column in zip((job.data.train_split, job.data.eval_split), differs.T, strict=True)
        if (ranks := column.nonzero()[0].tolist())
    ]
    if problems:
        raise DataError(
            f"{job.data.root}: the machines do not hold the same data: {' and '.join(problems)} is not that of rank 0; "
            "copy it anew to the machines of these ranks, or let data.root be a folder that all machines share"
        )


def loader_options(job: TrainingConfig, world: World) -> dict[str, Any]:
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


def num_threads(job: TrainingConfig, local_size: int) -> int:
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
