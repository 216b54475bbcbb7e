"""A prepared set is opened quickly, read by other programs, and its damage is found."""

import copy
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import webdataset

from pipelines import cache, datasets, prepared_set, pretext, remote
from pipelines.errors import DataError, UnreachableError
from pipelines.files import LocalFiles
from pipelines.manifest import Manifest
from pipelines.plan import View
from pipelines.prepare import prepare
from pipelines.reading import Reader, Source
from pipelines.resizing import Recipe
from pipelines.verification import Findings, verify_files, verify_prepared
from tests.pipelines.conftest import draw, write_files


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 samples in several shards."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "source").mkdir()
    source = write_files(folder / "source", [draw(number, 50, 60 + number) for number in range(30)])
    prepare(source, folder / "set", recipe=Recipe(size=40), shard_bytes=30_000)
    return folder / "set"


@pytest.fixture
def own(made: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(made, tmp_path / "set"))


def verify(root: Path, **options: bool) -> Findings:
    return verify_prepared(root, "train", prepared_set.read(LocalFiles(root), str(root))["train"], **options)


def flip_bit(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_the_webdataset_library_reads_every_sample(made: Path) -> None:
    opened = datasets.load("prepared", made, "train")
    shards = [str(made / shard) for shard in opened.heading.shards]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [sample["jpg"] for sample in samples] == [opened.read(number) for number in range(30)]
    assert [int(sample["cls"]) for sample in samples] == opened.labels.tolist()
    assert [int(sample["__key__"]) for sample in samples] == list(range(30))


@pytest.mark.parametrize("indexed", [True, False])
def test_dalis_reader_reads_every_sample_with_our_index_and_without(made: Path, indexed: bool) -> None:
    from nvidia.dali import fn, pipeline_def

    opened = datasets.load("prepared", made, "train")
    shards = [made / shard for shard in opened.heading.shards]
    index = {"index_paths": [str(shard.with_suffix(".idx")) for shard in shards]} if indexed else {}

    @pipeline_def(batch_size=30, num_threads=1, device_id=None)
    def read() -> tuple[object, ...]:
        paths = [str(shard) for shard in shards]
        return tuple(
            fn.readers.webdataset(paths=paths, ext=["jpg", "cls"], missing_component_behavior="error", **index)
        )

    pipeline = read()
    pipeline.build()
    images, labels = pipeline.run()
    assert [images.at(number).tobytes() for number in range(30)] == [opened.read(number) for number in range(30)]
    assert [int(labels.at(number).tobytes()) for number in range(30)] == opened.labels.tolist()


def test_opening_reads_no_shard(own: Path) -> None:
    for shard in own.glob("*.tar"):
        size = shard.stat().st_size
        with shard.open("wb") as stream:
            stream.truncate(size)
    assert len(datasets.load("prepared", own, "train")) == 30


def test_another_process_gets_paths_and_reads_the_same(made: Path) -> None:
    opened = datasets.load("prepared", made, "train")
    assert copy.deepcopy(opened).read(29) == opened.read(29)


@pytest.mark.parametrize("lost", [True, False])
def test_a_shard_lost_after_the_opening_is_no_bad_image_and_nothing_is_left_out_for_it(own: Path, lost: bool) -> None:
    opened = datasets.load("prepared", own, "train")
    shard = own / "train-000001.tar"
    if lost:
        shard.unlink()
    else:
        shard.write_bytes(b"")
    reader = Reader(Source(opened, View(size=32), pretext.load("none"), seed=0, on_bad_image="skip"), None)
    sample = opened.members_of(1)[0]
    with pytest.raises(UnreachableError, match=r"train-000001\.tar: .* no sample is left out for it"):
        reader.fetch(sample)
    # The others' are there as before.
    assert reader.fetch(0) is not None


def test_a_missing_or_truncated_shard_is_named_with_what_would_work(own: Path) -> None:
    shard = own / "train-000001.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(
        DataError, match=r"train-000001\.tar: truncated.*copy it here again, or run `lorot data prepare`"
    ):
        datasets.load("prepared", own, "train")
    shard.unlink()
    with pytest.raises(DataError, match=r"train-000001\.tar: missing"):
        datasets.load("prepared", own, "train")
    shard.write_bytes(content)
    (own / "train.arrow").unlink()
    with pytest.raises(DataError, match=r"train\.arrow: missing"):
        datasets.load("prepared", own, "train")


def test_what_is_no_prepared_set_says_how_to_make_one(tmp_path: Path, own: Path) -> None:
    with pytest.raises(DataError, match=r"no prepared set.*make one with `lorot data prepare SRC DST`"):
        datasets.load("prepared", tmp_path / "nothing", "train")
    (own / "set.json").write_text("{")
    with pytest.raises(DataError, match=r"set\.json: damaged"):
        datasets.load("prepared", own, "train")
    (own / "set.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(DataError, match="another version"):
        datasets.load("prepared", own, "train")


def test_another_sets_manifest_is_not_taken_for_this_ones(own: Path) -> None:
    about = json.loads((own / "set.json").read_text())
    about["splits"]["train"]["digest"] = "0" * 64
    (own / "set.json").write_text(json.dumps(about))
    with pytest.raises(DataError, match=r"not the manifest that set\.json speaks of"):
        datasets.load("prepared", own, "train")


def test_a_set_below_a_url_is_read_without_a_copy_of_its_own(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    opened = datasets.load("prepared", f"file://{made}", "train")
    local = datasets.load("prepared", made, "train")
    assert [opened.read(sample) for sample in (0, 29)] == [local.read(sample) for sample in (0, 29)]
    assert opened.path.is_relative_to(cache.user_folder("sets"))
    assert opened.digest == local.digest
    assert copy.deepcopy(opened).read(3) == local.read(3)


def replace_manifest(root: Path, batch: pa.RecordBatch) -> None:
    """Put another manifest into the set, with all that `set.json` says of its file."""
    with pa.ipc.new_file(str(root / "train.arrow"), batch.schema) as writer:
        writer.write_batch(batch)
    content = (root / "train.arrow").read_bytes()
    about = json.loads((root / "set.json").read_text())
    own = {"path": "train.arrow", "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    about["splits"]["train"]["manifest"] = own
    (root / "set.json").write_text(json.dumps(about))


def read_manifest(root: Path) -> pa.RecordBatch:
    with pa.ipc.open_file(str(root / "train.arrow")) as reader:
        return reader.get_batch(0)


def with_column(batch: pa.RecordBatch, name: str, column: pa.Array) -> pa.RecordBatch:
    columns = {field.name: batch.column(field.name) for field in batch.schema} | {name: column}
    return pa.RecordBatch.from_pydict(columns).replace_schema_metadata(batch.schema.metadata)


def with_value(batch: pa.RecordBatch, name: str, value: int | None) -> pa.RecordBatch:
    """The batch with another value in row 7."""
    values = batch.column(name).to_pylist()
    values[7] = value
    return with_column(batch, name, pa.array(values, batch.column(name).type))


def with_masks(batch: pa.RecordBatch, offset: int, size: int) -> pa.RecordBatch:
    offsets, sizes = np.zeros(30, np.int64), np.zeros(30, np.int64)
    offsets[7], sizes[7] = offset, size
    return with_column(with_column(batch, "mask_offset", pa.array(offsets)), "mask_size", pa.array(sizes))


def with_broken_names(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Names of which one ends long before it begins, as no writer makes them."""
    offsets = np.arange(31, dtype=np.int64)
    offsets[7] = -(10**9)
    buffers = [None, pa.py_buffer(offsets.tobytes()), pa.py_buffer(b"x" * 30)]
    return with_column(batch, "path", pa.Array.from_buffers(pa.large_string(), 30, buffers))


def with_array(batch: pa.RecordBatch) -> pa.RecordBatch:
    about = json.loads(batch.schema.metadata[b"lorot.manifest"]) | {"array": "../../secret.npy"}
    return batch.replace_schema_metadata({b"lorot.manifest": json.dumps(about).encode()})


UNSOUND: dict[str, tuple[Callable[[pa.RecordBatch], pa.RecordBatch], str]] = {
    "label below 0": (lambda batch: with_value(batch, "label", -1), "row 7 has a label"),
    "label too large": (lambda batch: with_value(batch, "label", 10), "row 7 has a label"),
    "height": (lambda batch: with_value(batch, "height", -3), "row 7 has a height"),
    "shard below 0": (lambda batch: with_value(batch, "shard", -1), "row 7 has a shard"),
    "shard too large": (lambda batch: with_value(batch, "shard", 99), "row 7 has a shard"),
    "shards in disorder": (lambda batch: with_value(batch, "shard", 2), "row 8 has a shard before"),
    "offset below 0": (lambda batch: with_value(batch, "offset", -1), "row 7 has a place"),
    "offset too large": (lambda batch: with_value(batch, "offset", 2**63 - 1), "row 7 has a place"),
    "size 0": (lambda batch: with_value(batch, "size", 0), "row 7 has a place"),
    "size below 0": (lambda batch: with_value(batch, "size", -(2**63)), "row 7 has a place"),
    "size too large": (lambda batch: with_value(batch, "size", 30_001), "row 7 has a place"),
    "size far too large": (lambda batch: with_value(batch, "size", 2**63 - 1), "row 7 has a place"),
    "mask too large": (lambda batch: with_masks(batch, 5, 2**62), "row 7 has a mask"),
    "mask below 0": (lambda batch: with_masks(batch, -5, 5), "row 7 has a mask"),
    "gap": (lambda batch: with_value(batch, "label", None), "gaps"),
    "other kind": (lambda batch: with_column(batch, "size", pa.array(["1"] * 30)), "columns"),
    "missing column": (lambda batch: batch.drop_columns(["size"]), "columns"),
    "no offsets of masks": (lambda batch: with_masks(batch, 0, 0).drop_columns(["mask_offset"]), "columns"),
    "names": (with_broken_names, "damaged manifest"),
    "array": (with_array, "lie in an array"),
}


@pytest.mark.parametrize("at_once", [4, 1 << 16])
@pytest.mark.parametrize("how", UNSOUND)
def test_a_manifest_that_points_elsewhere_is_refused_when_it_is_opened(
    own: Path, how: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.datasets.prepared._ROWS", at_once)
    change, told = UNSOUND[how]
    replace_manifest(own, change(read_manifest(own)))
    with pytest.raises(DataError, match=rf"train\.arrow.*{told}.*copy it here again"):
        datasets.load("prepared", own, "train")


def test_boxes_and_masks_within_their_shards_are_fine(own: Path) -> None:
    boxes = pa.array([[[0, 1, 2, 3]]] * 30, pa.large_list(pa.list_(pa.float32(), 4)))
    replace_manifest(own, with_column(with_masks(read_manifest(own), 100, 50), "boxes", boxes))
    opened = datasets.load("prepared", own, "train")
    assert opened.mask_location(7) == (opened.location(7)[0], 100, 50)
    assert opened.boxes(7).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("key", "value"), [("path", "../train-000000.tar"), ("path", ".x.lock"), ("bytes", -1), ("sha256", "../x")]
)
def test_a_set_whose_files_are_none_is_refused(own: Path, key: str, value: object) -> None:
    about = json.loads((own / "set.json").read_text())
    about["splits"]["train"]["shards"][0][key] = value
    (own / "set.json").write_text(json.dumps(about))
    with pytest.raises(DataError, match=r"set\.json: damaged.*no (name of a )?file|are no file"):
        datasets.load("prepared", own, "train")


@pytest.fixture
def fetching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that remote files are kept in."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    remote.use_cache(tmp_path / "kept")
    yield tmp_path / "kept"
    remote.use_cache(None)


def test_a_set_that_changes_below_its_url_is_never_mixed_with_its_copies(
    own: Path, tmp_path: Path, fetching: Path
) -> None:
    before = datasets.load("prepared", f"file://{own}", "train")
    first = before.read(0)
    (tmp_path / "source").mkdir()
    source = write_files(tmp_path / "source", [draw(100 + number, 50, 60 + number) for number in range(30)])
    shutil.rmtree(own)
    prepare(source, own, recipe=Recipe(size=40), shard_bytes=30_000)
    now, there = datasets.load("prepared", f"file://{own}", "train"), datasets.load("prepared", own, "train")
    assert now.digest == there.digest != before.digest
    assert [now.read(sample) for sample in range(30)] == [there.read(sample) for sample in range(30)]
    # Who began before goes on with what it has, and gets nothing new under an old name.
    again = copy.deepcopy(before)
    assert again.read(0) == first != now.read(0)
    with pytest.raises(UnreachableError, match=r"train-\d+\.tar: not the file that the set was opened with"):
        again.read(29)


def test_a_shard_that_came_damaged_is_not_used(own: Path, fetching: Path) -> None:
    opened = datasets.load("prepared", f"file://{own}", "train")
    flip_bit(own / opened.heading.shards[0], 2000)
    with pytest.raises(UnreachableError, match=r"another sha256.*upload it again"):
        opened.read(0)
    assert list(fetching.rglob("*.tar")) == []
    flip_bit(own / opened.heading.shards[0], 2000)
    assert opened.read(0) == datasets.load("prepared", own, "train").read(0)


def test_a_damaged_copy_of_the_manifest_is_fetched_again(own: Path, fetching: Path) -> None:
    opened = datasets.load("prepared", f"file://{own}", "train")
    flip_bit(opened.path, 2000)
    assert datasets.load("prepared", f"file://{own}", "train").path == opened.path
    assert opened.path.read_bytes() == (own / "train.arrow").read_bytes()


def test_a_set_larger_than_the_cache_is_warned_of_when_it_is_opened(
    own: Path, fetching: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        datasets.load("prepared", f"file://{own}", "train")
        assert caplog.text == ""
        total = sum(shard.stat().st_size for shard in own.glob("*.tar"))
        remote.use_cache(fetching, total - 1)
        datasets.load("prepared", f"file://{own}", "train")
    (said,) = caplog.messages
    assert f"{total / 1e9:.3g} GB" in said
    assert "set data.cache_gb above" in said
    assert "data.order=blocks" in said


def test_a_whole_set_has_no_damage(made: Path) -> None:
    found = verify(made, decode=True)
    assert (found.samples, found.damage) == (30, ())


def test_a_flipped_bit_is_found_and_its_sample_named(own: Path) -> None:
    opened = datasets.load("prepared", own, "train")
    path, offset, size = opened.location(17)
    assert size is not None
    flip_bit(own / path, offset + size // 2)
    found = verify(own).damage
    assert [damage.where for damage in found] == [str(own / path), opened.describe(17)]


def test_damage_beside_the_images_is_told_apart(own: Path) -> None:
    path, offset, _ = datasets.load("prepared", own, "train").location(0)
    flip_bit(own / path, offset - 512)
    assert "its images are whole" in verify(own).damage[1].what


def test_truncated_missing_and_exchanged_files_are_found(own: Path) -> None:
    opened = datasets.load("prepared", own, "train")
    last = opened.heading.shards[-1]
    (own / last).write_bytes((own / last).read_bytes()[:3000])
    (own / opened.heading.shards[0]).unlink()
    flip_bit(own / "train.arrow", 2000)
    found = verify(own).damage
    told = {damage.where: damage.what for damage in found}
    assert "checksum" in told[str(own / "train.arrow")]
    assert "cannot be read" in told[str(own / opened.heading.shards[0])]
    assert "3,000 bytes and not" in told[str(own / last)]
    lost = [damage for damage in found if "beyond the end" in damage.what]
    assert len(lost) >= len(opened.members_of(len(opened.heading.shards) - 1)) - 2


def test_damaged_files_of_another_data_set_are_found(files: Manifest, tmp_path: Path) -> None:
    assert verify_files(files).damage == ()
    root = Path(shutil.copytree(str(files.root), tmp_path / "files"))
    opened = Manifest.open(root / "index.arrow", root)
    whole = (root / "0003.jpg").read_bytes()
    (root / "0003.jpg").write_bytes(whole[: len(whole) // 2])
    draw(0, 33, 44).save(root / "0005.jpg")
    (root / "0008.jpg").unlink()
    found = {Path(where).name: what for where, what in verify_files(opened).damage}
    assert set(found) == {"0003.jpg", "0005.jpg", "0008.jpg"}
    assert "truncated" in found["0003.jpg"]
    assert "44 x 33" in found["0005.jpg"]


def test_decoding_finds_what_the_structure_does_not_show(tmp_path: Path) -> None:
    opened = write_files(tmp_path, [draw(0, 64, 64)])
    path = tmp_path / "0000.jpg"
    draw(0, 64, 64).save(path, "PNG")
    flip_bit(path, path.stat().st_size // 2)
    assert verify_files(opened).damage == ()
    assert "cannot be decoded" in verify_files(opened, decode=True).damage[0].what


def test_samples_of_one_shard_stand_together(made: Path) -> None:
    opened = datasets.load("prepared", made, "train")
    ranges = [opened.members_of(number) for number in range(len(opened.heading.shards))]
    assert np.concatenate([np.array(own) for own in ranges]).tolist() == list(range(30))
    assert all(
        opened.location(sample)[0] == opened.heading.shards[at] for at, own in enumerate(ranges) for sample in own
    )
