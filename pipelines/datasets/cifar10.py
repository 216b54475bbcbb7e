"""CIFAR-10: 60,000 photographs of 32 x 32 pixels in ten classes.

Torchvision's files: the folder `cifar-10-batches-py` in the root, or `cifar-10-python.tar.gz` as it is, from
https://www.cs.toronto.edu/~kriz/cifar.html (Krizhevsky, "Learning multiple layers of features from tiny images", 2009).
They are read without unpickling and converted once into an array in `.lorot`.
"""

from pathlib import Path

from pipelines import cifar_batches
from pipelines.manifest import Manifest

RELEASE = cifar_batches.Release(
    name="cifar10",
    torchvision="CIFAR10",
    folder="cifar-10-batches-py",
    archive="cifar-10-python.tar.gz",
    meta="batches.meta",
    label_key="labels",
    names_key="label_names",
    num_classes=10,
    splits={
        "train": tuple(f"data_batch_{number}" for number in range(1, 6)),
        "val": ("test_batch",),
        "test": ("test_batch",),
    },
)


def load(root: Path, split: str) -> Manifest:
    """The manifest of "train" (50,000) or "test" (10,000; "val" is the same); raises DataError as `datasets.load`."""
    return cifar_batches.load(RELEASE, root, split)
