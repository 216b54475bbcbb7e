"""A prepared set is opened quickly, read by other programs, and its damage is found."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import webdataset

from pipelines import cache, datasets, prepared_set
from pipelines.errors import DataError
from pipelines.files import LocalFiles
from pipelines.manifest import Manifest
from pipelines.prepare import prepare
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
