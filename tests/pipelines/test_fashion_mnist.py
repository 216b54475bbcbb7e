import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torchvision

from pipelines import datasets
from pipelines.datasets import fashion_mnist
from pipelines.errors import DataError


def write_idx(path: Path, content: np.ndarray) -> None:
    """An IDX file of bytes; gzipped if its name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(">HBB", 0, 8, content.ndim) + struct.pack(f">{content.ndim}I", *content.shape)
    whole = header + content.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(whole) if path.suffix == ".gz" else whole)


def write_all(folder: Path, ending: str = "") -> None:
    for prefix, count in (("train", 30), ("t10k", 12)):
        random = np.random.default_rng(count)
        write_idx(folder / f"{prefix}-images-idx3-ubyte{ending}", random.integers(0, 256, (count, 28, 28)))
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{ending}", random.integers(0, 10, count))


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "debian")


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_images_labels_and_split_sizes_are_torchvisions(split: str, tmp_path: Path) -> None:
    write_all(tmp_path / "FashionMNIST/raw")
    found = datasets.load("fashion_mnist", tmp_path, split)
    truth = torchvision.datasets.FashionMNIST(str(tmp_path), train=split == "train")
    assert len(found) == len(truth) == (30 if split == "train" else 12)
    assert found.labels.tolist() == truth.targets.tolist()
    for sample in range(len(found)):
        pixels = found.read(sample)
        assert pixels.shape == (28, 28, 3)
        assert (pixels == truth.data[sample].numpy()[:, :, None]).all()


@pytest.mark.parametrize(("place", "ending"), [("FashionMNIST/raw", ".gz"), ("", ""), ("", ".gz"), ("debian", ".gz")])
def test_the_files_are_found_wherever_they_may_lie(place: str, ending: str, tmp_path: Path) -> None:
    write_all(tmp_path / "reference/FashionMNIST/raw")
    write_all(tmp_path / place, ending)
    expected = datasets.load("fashion_mnist", tmp_path / "reference", "test").digest
    root = tmp_path / "new" if place == "debian" else tmp_path
    assert datasets.load("fashion_mnist", root, "test").digest == expected
    assert (root / ".lorot").is_dir()


def test_box_and_mask_are_where_the_photograph_is_above_ten(tmp_path: Path) -> None:
    images = np.zeros((3, 28, 28), np.uint8)
    images[0, 5:20, 8] = 11
    images[0, 2, 2] = 10
    images[1, 0, 27] = 255
    write_idx(tmp_path / "t10k-images-idx3-ubyte", images)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.array([0, 1, 2]))
    found = datasets.load("fashion_mnist", tmp_path, "test")
    assert [found.boxes(sample).tolist() for sample in range(3)] == [[[8, 5, 9, 20]], [[27, 0, 28, 1]], []]
    for sample in range(3):
        mask = found.mask(sample)
        assert mask is not None
        assert (mask == (images[sample] >= 11)).all()


def test_missing_files_are_an_error_that_tells_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"apt-get install dataset-fashion-mnist, or .*FashionMNIST\("):
        datasets.load("fashion_mnist", tmp_path, "train")
    with pytest.raises(DataError, match="no split 'dev'"):
        datasets.load("fashion_mnist", tmp_path, "dev")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    write_all(tmp_path)
    target = tmp_path / "t10k-images-idx3-ubyte"
    whole = target.read_bytes()
    for content in (whole[:-1], b"", b"\0\0\x0d\x03" + whole[4:], b"\0\0\x08\xff" + whole[4:]):
        target.write_bytes(content)
        with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte.*no whole IDX"):
            datasets.load("fashion_mnist", tmp_path, "test")
    target.unlink()
    target.with_name(f"{target.name}.gz").write_bytes(gzip.compress(whole)[:-20])
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte.gz: cannot be read"):
        datasets.load("fashion_mnist", tmp_path, "test")


def test_images_and_labels_must_belong_together(tmp_path: Path) -> None:
    write_all(tmp_path)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.zeros(5))
    with pytest.raises(DataError, match="do not belong together"):
        datasets.load("fashion_mnist", tmp_path, "test")
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.full(12, 10))
    with pytest.raises(DataError, match="a label is 10"):
        datasets.load("fashion_mnist", tmp_path, "test")
