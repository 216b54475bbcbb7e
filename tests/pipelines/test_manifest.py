import copy
import dataclasses
import io
import os
import threading
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipelines import cache, manifest, masks
from pipelines.errors import DataError
from pipelines.manifest import Heading, Manifest, Rows

HEADING = Heading("some", "train", ("cat", "dog"), ("n1", "n2"), "d" * 64, "f" * 64)


def rows(paths: list[str]) -> Rows:
    count = len(paths)
    return Rows(np.arange(count) % 2, np.full(count, 3), np.full(count, 4), paths)


@pytest.fixture
def three(tmp_path: Path) -> Manifest:
    for name in "abc":
        (tmp_path / name).write_bytes(name.encode() * 5)
    boxes = np.array([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]], np.float32)
    own = dataclasses.replace(
        rows(["a", "b", "c"]), box_counts=np.array([0, 2, 1]), boxes=boxes, mask_paths=["", "m.png", ""]
    )
    manifest.write(tmp_path / "m.arrow", HEADING, own)
    return Manifest.open(tmp_path / "m.arrow", tmp_path)


def test_what_is_written_is_read_back(three: Manifest, tmp_path: Path) -> None:
    assert (three.name, three.split, three.classes, three.class_ids) == ("some", "train", ("cat", "dog"), ("n1", "n2"))
    assert (three.digest, three.encoded, three.has_boxes, len(three)) == ("d" * 64, True, True, 3)
    assert three.labels.tolist() == [0, 1, 0]
    assert three.heights.tolist() == [3] * 3
    assert three.widths.tolist() == [4] * 3
    assert three.read(1) == b"bbbbb"
    assert three.location(1) == ("b", 0, None)
    assert three.describe(2) == str(tmp_path / "c")
    assert [three.boxes(sample).tolist() for sample in range(3)] == [[], [[0, 1, 2, 3], [4, 5, 6, 7]], [[8, 9, 10, 11]]]
    assert three.boxes(0).shape == (0, 4)


def test_columns_are_views_of_the_file_and_cannot_be_changed(three: Manifest) -> None:
    for column in (three.labels, three.heights, three.widths, three.boxes(1)):
        assert not column.flags.owndata
        assert not column.flags.writeable
        assert column.dtype in (np.int64, np.float32)


def test_another_process_gets_the_path_not_the_rows(tmp_path: Path) -> None:
    manifest.write(tmp_path / "m.arrow", HEADING, rows([f"file{index}" for index in range(10_000)]))
    opened = Manifest.open(tmp_path / "m.arrow", tmp_path)
    assert len(ForkingPickler.dumps(opened)) < 1000
    assert copy.deepcopy(opened).describe(9_999) == opened.describe(9_999)


def test_array_rows_come_as_three_channels_with_masks_by_threshold(tmp_path: Path) -> None:
    grey = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    np.save(tmp_path / "grey.npy", grey)
    heading = dataclasses.replace(HEADING, array="grey.npy", mask_threshold=13)
    manifest.write(tmp_path / "m.arrow", heading, Rows(np.array([0, 1]), np.full(2, 3), np.full(2, 4)))
    opened = Manifest.open(tmp_path / "m.arrow", tmp_path)
    assert not opened.encoded
    pixels = opened.read(1)
    assert isinstance(pixels, np.ndarray)
    assert pixels.shape == (3, 4, 3)
    assert all((pixels[:, :, channel] == grey[1]).all() for channel in range(3))
    mask = opened.mask(1)
    assert mask is not None
    assert mask.tolist() == (grey[1] > 13).tolist()
    assert "row 1" in opened.describe(1)
    np.save(tmp_path / "grey.npy", grey[:1])
    with pytest.raises(DataError, match="2 samples"):
        Manifest.open(tmp_path / "m.arrow", tmp_path)


@pytest.fixture
def sharded(tmp_path: Path) -> Manifest:
    """Three samples in two shards, the second one with a mask behind it."""
    mask = masks.encode(np.eye(3, 4, dtype=bool))
    (tmp_path / "x-0.tar").write_bytes(b"..aaa.bbbb" + mask)
    (tmp_path / "x-1.tar").write_bytes(b"ccccc")
    heading = dataclasses.replace(HEADING, shards=("x-0.tar", "x-1.tar"))
    places = {
        "shards": np.array([0, 0, 1]),
        "offsets": np.array([2, 6, 0]),
        "sizes": np.array([3, 4, 5]),
        "mask_offsets": np.array([0, 10, 0]),
        "mask_sizes": np.array([0, len(mask), 0]),
    }
    manifest.write(tmp_path / "m.arrow", heading, dataclasses.replace(rows(["a", "b", "c"]), **places))
    return Manifest.open(tmp_path / "m.arrow", tmp_path)


def test_samples_and_masks_in_shards_are_read_by_their_places(sharded: Manifest, tmp_path: Path) -> None:
    assert sharded.encoded
    assert [sharded.read(sample) for sample in (2, 0, 1)] == [b"ccccc", b"aaa", b"bbbb"]
    assert [sharded.location(sample) for sample in range(3)] == [
        ("x-0.tar", 2, 3),
        ("x-0.tar", 6, 4),
        ("x-1.tar", 0, 5),
    ]
    assert sharded.describe(1) == f"{tmp_path}/x-0.tar, byte 6 (made from b)"
    assert sharded.has_masks
    assert sharded.mask(0) is None
    found = sharded.mask(1)
    assert found is not None
    assert (found == np.eye(3, 4, dtype=bool)).all()


def test_a_shard_that_ends_too_early_is_named(sharded: Manifest, tmp_path: Path) -> None:
    (tmp_path / "x-1.tar").write_bytes(b"ccc")
    with pytest.raises(DataError, match=r"x-1\.tar"):
        sharded.read(2)


def test_another_process_reads_the_same_shards(sharded: Manifest) -> None:
    assert copy.deepcopy(sharded).read(1) == b"bbbb"


def test_samples_in_a_shard_that_does_not_exist_or_without_a_size_are_refused(tmp_path: Path) -> None:
    own = dataclasses.replace(rows(["a"]), shards=np.array([1]), offsets=np.array([0]), sizes=np.array([1]))
    heading = dataclasses.replace(HEADING, shards=("x-0.tar",))
    with pytest.raises(ValueError, match="shards 1 to 1 of 1"):
        manifest.write(tmp_path / "m", heading, own)
    with pytest.raises(ValueError, match="needs files, shards"):
        manifest.write(tmp_path / "m", heading, dataclasses.replace(own, shards=np.array([0]), sizes=None))


def test_rows_of_an_array_have_no_place_in_files(tmp_path: Path) -> None:
    np.save(tmp_path / "grey.npy", np.zeros((1, 3, 4), np.uint8))
    heading = dataclasses.replace(HEADING, array="grey.npy")
    manifest.write(tmp_path / "m.arrow", heading, Rows(np.zeros(1, int), np.full(1, 3), np.full(1, 4)))
    with pytest.raises(ValueError, match="array grey"):
        Manifest.open(tmp_path / "m.arrow", tmp_path).location(0)


def test_masks_are_read_from_their_files_and_may_be_missing(three: Manifest, tmp_path: Path) -> None:
    truth = np.eye(7, dtype=bool)
    (tmp_path / "m.png").write_bytes(masks.encode(truth))
    assert three.mask(0) is None
    found = three.mask(1)
    assert found is not None
    assert (found == truth).all()
    (tmp_path / "m.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"m\.png"):
        three.mask(1)


@pytest.mark.parametrize("path", ["../secret", "a/../../secret", "/etc/hostname"])
def test_a_path_that_leaves_the_root_is_refused(path: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret").write_text("secret")
    manifest.write(root / "m.arrow", HEADING, rows([path]))
    with pytest.raises(DataError, match="leaves the data folder"):
        Manifest.open(root / "m.arrow", root).read(0)


def test_a_missing_file_is_named(three: Manifest, tmp_path: Path) -> None:
    (tmp_path / "b").unlink()
    with pytest.raises(DataError, match=str(tmp_path / "b")):
        three.read(1)


def test_damaged_manifests_are_errors_that_name_the_file(three: Manifest, tmp_path: Path) -> None:
    whole = (tmp_path / "m.arrow").read_bytes()
    (tmp_path / "other.arrow").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"other\.arrow.*delete it"):
        Manifest.open(tmp_path / "other.arrow", tmp_path)
    (tmp_path / "other.arrow").write_bytes(whole.replace(b'"format": 2', b'"format": 9'))
    with pytest.raises(DataError, match=r"other\.arrow.*another version"):
        Manifest.open(tmp_path / "other.arrow", tmp_path)
    with pytest.raises(DataError, match="no such manifest"):
        Manifest.open(tmp_path / "absent.arrow", tmp_path)


def test_of_a_prepared_set_a_damaged_manifest_is_not_to_be_deleted(three: Manifest, tmp_path: Path) -> None:
    (tmp_path / "set.json").write_text("{}")
    whole = (tmp_path / "m.arrow").read_bytes()
    for damaged in (whole[:-20], whole.replace(b'"format": 2', b'"format": 9')):
        (tmp_path / "m.arrow").write_bytes(damaged)
        with pytest.raises(DataError, match=r"m\.arrow.*copy it here again, or run `lorot data prepare`") as caught:
            Manifest.open(tmp_path / "m.arrow", tmp_path)
        assert "delete" not in str(caught.value)


def test_columns_of_different_lengths_and_labels_without_a_class_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one length"):
        manifest.write(tmp_path / "m", HEADING, dataclasses.replace(rows(["a", "b"]), heights=np.array([1])))
    with pytest.raises(ValueError, match="2 classes"):
        manifest.write(tmp_path / "m", HEADING, dataclasses.replace(rows(["a", "b"]), labels=np.array([0, 2])))
    assert not list(tmp_path.iterdir())


def test_many_that_need_a_manifest_at_once_build_it_once(tmp_path: Path) -> None:
    built = []

    def build(_: Path) -> tuple[Heading, Rows]:
        built.append(1)
        return HEADING, rows(["a"])

    def need() -> None:
        manifest.cached(tmp_path, "some", "train", "key", HEADING.fingerprint, build)

    threads = [threading.Thread(target=need) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1


def test_another_fingerprint_or_a_damaged_file_builds_again(tmp_path: Path) -> None:
    def get(fingerprint: str) -> tuple[Path, bool]:
        built = []

        def build(_: Path) -> tuple[Heading, Rows]:
            built.append(1)
            return dataclasses.replace(HEADING, fingerprint=fingerprint), rows(["a"])

        path = manifest.cached(tmp_path, "some", "train", "key", fingerprint, build).path
        return path, bool(built)

    path, fresh = get("one")
    assert fresh
    assert get("one") == (path, False)
    assert get("two") == (path, True)
    assert get("two") == (path, False)
    path.write_bytes(b"damaged")
    assert get("two") == (path, True)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(RuntimeError), cache.replacing(tmp_path / "file") as partial:  # noqa: PT012
        partial.write_text("half")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_a_data_folder_that_cannot_be_written_gets_a_cache_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        # A file in its place: the superuser, who runs many tests, may write to read-only folders.
        (tmp_path / name / ".lorot").write_text("")
    one, two = (cache.folder(tmp_path / name) for name in ("one", "two"))
    assert one.parent == two.parent == tmp_path / "user" / "lorot"
    assert one != two


def test_the_index_beside_data_that_cannot_be_written_is_used_while_it_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get(fingerprint: str) -> Path:
        def build(_: Path) -> tuple[Heading, Rows]:
            return dataclasses.replace(HEADING, fingerprint=fingerprint), rows(["a"])

        return manifest.cached(tmp_path, "some", "train", "key", fingerprint, build).path

    beside = get("one")
    assert beside.parent == cache.beside(tmp_path)
    # The superuser, who runs many tests, may write to read-only folders.
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != cache.beside(tmp_path) and access(path, mode))
    for attempt in range(2):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"of attempt {attempt}"))
        assert get("one") == beside
    assert get("two").is_relative_to(tmp_path / "of attempt 1"), "the data have changed since"


@given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_encoded_masks_are_pngs_that_pillow_reads(height: int, width: int, seed: int) -> None:
    truth = np.random.default_rng(seed).random((height, width)) < 0.5
    content = masks.encode(truth)
    with Image.open(io.BytesIO(content)) as image:
        image.verify()
    with Image.open(io.BytesIO(content)) as image:
        assert (np.asarray(image) == truth).all()
    assert (masks.decode(content) == truth).all()


def test_a_mask_larger_than_one_stored_block_is_whole() -> None:
    truth = np.random.default_rng(0).random((1200, 900)) < 0.5
    assert (masks.decode(masks.encode(truth)) == truth).all()


def test_enclosing_boxes_are_half_open() -> None:
    some = np.zeros((3, 5, 6), bool)
    some[0, 2, 3] = True
    some[1, 1:4, 0:6] = True
    boxes, found = masks.enclosing_boxes(some)
    assert boxes[:2].tolist() == [[3, 2, 4, 3], [0, 1, 6, 4]]
    assert found.tolist() == [True, True, False]
