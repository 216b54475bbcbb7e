"""CIFAR's files are assembled here instruction by instruction, as Python 2 wrote them; torchvision is the oracle."""

import io
import os
import pickletools
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torchvision

from pipelines import cifar_batches, datasets
from pipelines.datasets import cifar10, cifar100
from pipelines.errors import DataError


def text(content: bytes) -> bytes:
    """SHORT_BINSTRING or BINSTRING: Python 2's str."""
    if len(content) < 256:
        return b"U" + bytes([len(content)]) + content
    return b"T" + struct.pack("<i", len(content)) + content


def number(value: int) -> bytes:
    return b"K" + bytes([value]) if value < 256 else b"M" + struct.pack("<H", value)


def array(pixels: np.ndarray) -> bytes:
    """What numpy's __reduce__ gives for a (N, 3072) uint8 array."""
    rows, columns = pixels.shape
    dtype = (
        b"cnumpy\ndtype\n("
        + text(b"u1")
        + b"K\x00K\x01tR(K\x03"
        + text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    start = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + text(b"b") + b"tR"
    state = b"(K\x01(" + number(rows) + number(columns) + b"t" + dtype + b"\x89" + text(pixels.tobytes()) + b"tb"
    return start + state


def pickled(entries: dict[str, bytes]) -> bytes:
    return b"\x80\x02}(" + b"".join(text(key.encode()) + value for key, value in entries.items()) + b"u."


def listed(items: list[bytes]) -> bytes:
    return b"](" + b"".join(items) + b"e"


def planes(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


def write_cifar10(root: Path, per_batch: int = 7) -> None:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = [b"airplane", b"automobile", b"bird", b"cat", b"deer", b"dog", b"frog", b"horse", b"ship", b"truck"]
    for index, name in enumerate(
        ["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"]
    ):
        labels = [number((index + 3 * item) % 10) for item in range(per_batch)]
        entries = {
            "batch_label": text(b"training batch 1 of 5"),
            "labels": listed(labels),
            "data": array(planes(index, per_batch)),
            "filenames": listed([text(b"leptodactylus_s_000004.png")] * per_batch),
        }
        (folder / name).write_bytes(pickled(entries))
    meta = {
        "num_cases_per_batch": b"M\x10\x27",
        "label_names": listed([text(name) for name in names]),
        "num_vis": b"M\x00\x0c",
    }
    (folder / "batches.meta").write_bytes(pickled(meta))


def write_cifar100(root: Path, count: int = 30) -> None:
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for index, name in enumerate(["train", "test"]):
        entries = {
            "filenames": listed([text(b"bos_taurus_s_000507.png")] * count),
            "batch_label": text(b"training batch 1 of 1"),
            "fine_labels": listed([number((7 * item + index) % 100) for item in range(count)]),
            "coarse_labels": listed([number(item % 20) for item in range(count)]),
            "data": array(planes(10 + index, count)),
        }
        (folder / name).write_bytes(pickled(entries))
    names = {
        "fine_label_names": listed([text(f"fine {index}".encode()) for index in range(100)]),
        "coarse_label_names": listed([text(f"coarse {index}".encode()) for index in range(20)]),
    }
    (folder / "meta").write_bytes(pickled(names))


WRITERS = {"cifar10": write_cifar10, "cifar100": write_cifar100}
RELEASES = {"cifar10": cifar10.RELEASE, "cifar100": cifar100.RELEASE}


def torchvision_set(
    name: str, root: Path, train: bool, monkeypatch: pytest.MonkeyPatch
) -> torchvision.datasets.CIFAR10:
    """Torchvision's reader, told not to compare the checksums of the published files."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    return kind(str(root), train=train)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_pixels_labels_and_names_are_torchvisions(
    name: str, split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    WRITERS[name](tmp_path)
    found = datasets.load(name, tmp_path, split)
    truth = torchvision_set(name, tmp_path, split == "train", monkeypatch)
    assert len(found) == len(truth)
    assert found.classes == tuple(truth.classes)
    assert found.labels.tolist() == truth.targets
    assert not found.encoded
    assert all((found.read(sample) == truth.data[sample]).all() for sample in range(len(found)))
    assert set(found.heights) == set(found.widths) == {32}


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_archive_serves_as_well_as_the_folder(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / "folder")
    (tmp_path / "archive").mkdir()
    release = RELEASES[name]
    with tarfile.open(tmp_path / "archive" / release.archive, "w:gz") as archive:
        archive.add(tmp_path / "folder" / release.folder, release.folder)
    one, other = (datasets.load(name, tmp_path / place, "train") for place in ("folder", "archive"))
    assert one.digest == other.digest
    assert (one.read(3) == other.read(3)).all()
    assert not (tmp_path / "archive" / release.folder).exists()


def test_the_pixels_are_converted_once_and_anew_when_the_files_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar10(tmp_path)
    first = datasets.load("cifar10", tmp_path, "train")
    with monkeypatch.context() as patch:
        patch.setattr(pickletools, "genops", lambda *_: pytest.fail("read again"))
        assert datasets.load("cifar10", tmp_path, "train").digest == first.digest
    target = tmp_path / "cifar-10-batches-py/data_batch_2"
    content = target.read_bytes()
    target.write_bytes(content.replace(planes(1, 7).tobytes(), planes(99, 7).tobytes()))
    os.utime(target, ns=(0, target.stat().st_mtime_ns + 1))
    second = datasets.load("cifar10", tmp_path, "train")
    assert second.digest != first.digest
    assert (second.read(7) == planes(99, 7)[0].reshape(3, 32, 32).transpose(1, 2, 0)).all()
    assert len(list((tmp_path / ".lorot").glob("*.npy"))) == 1


def test_nothing_in_the_files_is_ever_called(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    trap = tmp_path / "sprung"
    target = tmp_path / "cifar-10-batches-py/data_batch_1"
    content = target.read_bytes()
    call = b"cos\nmkdir\n(" + text(str(trap).encode()) + b"tR0"
    target.write_bytes(content[:2] + call + content[2:])
    assert len(datasets.load("cifar10", tmp_path, "train")) == 35
    assert not trap.exists()


def test_newer_pickles_are_read_too() -> None:
    content = b"\x80\x04}(\x8c\x06labels](K\x01K\x02e\x8c\x04dataC\x03abcu."
    assert cifar_batches.literals(content, frozenset({"labels", "data"})) == {"labels": [1, 2], "data": [b"abc"]}


def test_missing_files_are_an_error_that_tells_how_to_fetch_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz; fetch .*CIFAR10\('.*', download=True\)"):
        datasets.load("cifar10", tmp_path, "train")
    with pytest.raises(DataError, match="no split 'dev'; it has train, val, test"):
        datasets.load("cifar100", tmp_path, "dev")


@pytest.mark.parametrize("cut", [5, 100, -1, -5000])
def test_a_damaged_batch_is_named(cut: int, tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    target = tmp_path / "cifar-10-batches-py/data_batch_4"
    target.write_bytes(target.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"data_batch_4.*(fetch it again)"):
        datasets.load("cifar10", tmp_path, "train")


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    write_cifar10(tmp_path / "folder")
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        archive.add(tmp_path / "folder/cifar-10-batches-py", "cifar-10-batches-py")
    target = tmp_path / "cifar-10-python.tar.gz"
    for content in (stream.getvalue()[:20_000], b"no archive"):
        target.write_bytes(content)
        with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz.*fetch it again"):
            datasets.load("cifar10", tmp_path, "train")


def test_labels_beyond_the_classes_are_an_error(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    target = tmp_path / "cifar-10-batches-py/test_batch"
    target.write_bytes(pickled({"labels": listed([number(10)]), "data": array(planes(0, 1))}))
    with pytest.raises(DataError, match="labels 10 to 10, where cifar10 has 10 classes"):
        datasets.load("cifar10", tmp_path, "test")
