"""CIFAR-100: 60,000 photographs of 32 x 32 pixels in a hundred classes (the fine labels).

Torchvision's files: the folder `cifar-100-python` in the root, or `cifar-100-python.tar.gz` as it is, from
https://www.cs.toronto.edu/~kriz/cifar.html (Krizhevsky, "Learning multiple layers of features from tiny images", 2009).
They are read without unpickling and converted once into an array in `.lorot`.
"""

from pathlib import Path

from pipelines import cifar_batches
from pipelines.manifest import Manifest

RELEASE = cifar_batches.Release(
    name="cifar100",
    torchvision="CIFAR100",
    folder="cifar-100-python",
    archive="cifar-100-python.tar.gz",
    meta="meta",
    label_key="fine_labels",
    names_key="fine_label_names",
    num_classes=100,
    splits={"train": ("train",), "val": ("test",), "test": ("test",)},
)


def load(root: Path, split: str) -> Manifest:
    """The manifest of "train" (50,000) or "test" (10,000; "val" is the same); raises DataError as `datasets.load`."""
    return cifar_batches.load(RELEASE, root, split)
