"""FFCV: one memory-mapped file, decoding and augmentation compiled by Numba, on threads."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.benchmarks.data.loaders import MEAN, STD, Job, Row, files

FOREIGN = True
_FILE = "train.beton"
# Mode of its writer, which share of the images is JPEG in the "proportion" mode, and the JPEG quality.
_FORMS = {
    "ffcv_jpeg": {"write_mode": "jpg", "jpeg_quality": 85},
    "ffcv_half": {"write_mode": "proportion", "compress_probability": 0.5, "jpeg_quality": 85},
    "ffcv_jpeg256": {"write_mode": "jpg", "jpeg_quality": 90},
    "ffcv_raw256": {"write_mode": "raw"},
}
ROWS = (
    Row("ffcv_jpeg", "FFCV, jpeg, full size", "ffcv_jpeg"),
    Row("ffcv_half", "FFCV, half raw, full size", "ffcv_half"),
    Row("ffcv_jpeg256", "FFCV, jpeg, short side 256", "ffcv_jpeg256", source="files256", stored="256"),
    Row("ffcv_raw256", "FFCV, raw, short side 256", "ffcv_raw256", source="files256", stored="256"),
)


def batches(row: Row, folder: Path, job: Job) -> Iterator[Any]:
    import numpy as np
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, ToTensor, ToTorchImage

    mean, std = 255 * np.array(MEAN), 255 * np.array(STD)
    path = str(folder / _FILE)
    settings: dict[str, Any] = {"batch_size": job.batch, "num_workers": job.cores, "os_cache": True}
    settings |= {"drop_last": True, "seed": job.seed}

    def pipelines() -> dict[str, Any]:
        # Its loader takes the decoder out of the list that it is given: each needs a list of its own.
        image = [
            RandomResizedCropRGBImageDecoder((job.size, job.size)),
            RandomHorizontalFlip(),
            NormalizeImage(mean, std, np.float32),
            ToTensor(),
            ToTorchImage(convert_back_int16=False),
        ]
        return {"image": image, "label": None}

    count = len(Loader(path, order=OrderOption.SEQUENTIAL, pipelines=pipelines(), **settings).indices)
    # Many epochs in one: its threads end and start with each.
    indices = np.tile(np.arange(count), 50)
    while True:
        loader = Loader(path, order=OrderOption.RANDOM, indices=indices, pipelines=pipelines(), **settings)
        for (images,) in loader:
            yield images


def write(form: str, source: Path, target: Path) -> None:
    """One file of its own; `source` has the images at the size they are to be stored at."""
    import numpy as np
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter
    from PIL import Image

    images = files(source)
    classes = sorted(path.name for path in (source / "train").iterdir())

    class Images:
        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, index: int) -> tuple[Any, int]:
            with Image.open(images[index]) as image:
                return np.array(image.convert("RGB")), classes.index(images[index].parent.name)

    fields = {"image": RGBImageField(**_FORMS[form]), "label": IntField()}
    DatasetWriter(str(target / _FILE), fields, num_workers=1).from_indexed_dataset(Images())
