"""DALI as its documentation has it: its own reader, its own random numbers, stock operators."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.benchmarks.data.loaders import MEAN, STD, Job, Row

FOREIGN = False
ROWS = (
    Row("dali", "DALI, its own reader and stock operators"),
    Row("dali_256", "DALI, the same, short side 256", "files256", stored="256"),
)


def batches(row: Row, folder: Path, job: Job) -> Iterator[Any]:
    import torch
    from nvidia.dali import Pipeline, fn, types

    pipeline = Pipeline(
        batch_size=job.batch,
        num_threads=job.cores,
        device_id=None,
        seed=job.seed,
        prefetch_queue_depth=2,
        exec_dynamic=True,
    )
    with pipeline:
        # The reader shuffles what its buffer holds, and the files are sorted by class.
        files, _ = fn.readers.file(
            file_root=str(folder / "train"), random_shuffle=True, initial_fill=2048, seed=job.seed
        )
        images = fn.decoders.image_random_crop(files, random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3])
        images = fn.resize(images, size=[job.size, job.size], interp_type=types.INTERP_LINEAR, antialias=True)
        images = fn.crop_mirror_normalize(
            images,
            dtype=types.FLOAT,
            output_layout="HWC",
            mirror=fn.random.coin_flip(probability=0.5),
            mean=[255 * mean for mean in MEAN],
            std=[255 * std for std in STD],
        )
        pipeline.set_outputs(images)
    pipeline.build()
    while True:
        (output,) = pipeline.run()
        yield torch.from_dlpack(output.as_tensor()).permute(0, 3, 1, 2)
