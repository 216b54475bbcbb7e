"""What preparation writes: the right pixels, boxes and masks, in shards that are whole or absent."""

import dataclasses
import errno
import hashlib
import io
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image, ImageOps

from pipelines import datasets, manifest, masks, pieces, prepared_set, shard_record, verification
from pipelines.errors import DataError, FullDiskError, LorotError
from pipelines.files import LocalFiles
from pipelines.manifest import Heading, Manifest, Rows
from pipelines.prepare import Report, prepare
from pipelines.resizing import Recipe, prepare_boxes, prepare_file, prepare_mask
from pipelines.verification import verify_files, verify_prepared
from tests.pipelines.conftest import draw, write_pixels

SMALL = Recipe(size=32)
PIL_VERSION = re.escape(PIL.__version__)


def jpeg(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95, **options)
    return file.getvalue()


def decoded(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)


@pytest.fixture
def source(tmp_path: Path) -> Manifest:
    """40 images with boxes, and a mask for every second one."""
    root = tmp_path / "source"
    root.mkdir()
    sizes = [(40 + 3 * number, 90 - number) for number in range(40)]
    for number, (height, width) in enumerate(sizes):
        draw(number, height, width).save(root / f"{number:04d}.jpg", quality=90)
        (root / f"{number:04d}.png").write_bytes(masks.encode(np.arange(height)[:, None] < np.full(width, height // 2)))
    heights, widths = np.array(sizes).T
    rows = Rows(
        labels=np.arange(40) % 3,
        heights=heights,
        widths=widths,
        paths=[f"{number:04d}.jpg" for number in range(40)],
        box_counts=np.arange(40) % 3,
        boxes=np.array([[1, 2, 31, 42]] * sum(number % 3 for number in range(40)), np.float32),
        mask_paths=[f"{number:04d}.png" if number % 2 else "" for number in range(40)],
    )
    classes = ("a", "b", "c")
    heading = Heading("drawn", "train", classes, classes, "d" * 64, "f" * 64)
    manifest.write(root / "m.arrow", heading, rows)
    return Manifest.open(root / "m.arrow", root)


def shard_hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.tar"))}


def run(source: Manifest, folder: Path, **options: object) -> Report:
    return prepare(source, folder, **{"recipe": SMALL, "shard_bytes": 30_000, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("resize", "size", "before", "after"),
    [
        ("short", 256, (375, 500), (256, 341)),
        ("short", 256, (500, 375), (341, 256)),
        ("long", 256, (375, 500), (192, 256)),
        ("short", 256, (256, 4000), (256, 4000)),
        ("short", 256, (200, 900), (200, 900)),
        ("long", 10, (1, 1000), (1, 10)),
        ("none", 1, (375, 500), (375, 500)),
    ],
)
def test_sizes_keep_the_ratio_and_nothing_is_enlarged(
    resize: str, size: int, before: tuple[int, int], after: tuple[int, int]
) -> None:
    assert Recipe(resize, size).fitted(*before) == after


def test_bad_options_say_what_there_is() -> None:
    for options, said in (
        ({"resize": "both"}, "short, long"),
        ({"format": "webp"}, "jpeg"),
        ({"quality": 0}, "1 to 100"),
        ({"size": 0}, "pixels"),
    ):
        with pytest.raises(LorotError, match=said):
            Recipe(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pixels_are_those_of_pillows_antialiased_filter(mode: str) -> None:
    image = draw(1, 150, 201).convert(mode)
    made = prepare_file(jpeg(image), 150, 201, Recipe(size=64, format="png"))
    expected = Image.open(io.BytesIO(jpeg(image))).resize((86, 64), Image.Resampling.BILINEAR)
    assert (made.ending, made.height, made.width) == ("png", 64, 86)
    assert Image.open(io.BytesIO(made.content)).mode == mode
    assert abs(decoded(made.content) - np.asarray(expected.convert("RGB"))).max() <= 1


def test_a_large_image_that_is_shrunk_while_it_is_decoded_looks_as_one_that_is_not() -> None:
    image = Image.fromarray(np.asarray(draw(2, 60, 80).resize((1600, 1200), Image.Resampling.BICUBIC)))
    content = jpeg(image)
    made = decoded(prepare_file(content, 1200, 1600, Recipe(size=64, format="png")).content)
    expected = np.asarray(Image.open(io.BytesIO(content)).resize((85, 64), Image.Resampling.BILINEAR)).astype(int)
    error = np.sqrt(((made - expected) ** 2).mean())
    assert error < 1.5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_come_out_upright_and_without_exif(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = jpeg(draw(3, 90, 140), exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    made = prepare_file(content, upright.height, upright.width, Recipe(size=50))
    shown = Image.open(io.BytesIO(made.content))
    assert shown.size == (made.width, made.height)
    assert min(shown.size) == 50
    assert (shown.width > shown.height) == (orientation < 5)
    if orientation > 1:
        assert shown.getexif().get(0x0112, 1) == 1
    expected = np.asarray(upright.resize(shown.size, Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(decoded(made.content) - expected).mean() < 5


def test_a_jpeg_with_nothing_to_do_keeps_its_bytes_and_a_png_too_unless_jpeg_is_asked_for() -> None:
    image = draw(4, 60, 50)
    content = jpeg(image)
    assert prepare_file(content, 60, 50, Recipe(size=50)).content is content
    assert prepare_file(content, 60, 50, Recipe(resize="none")).content is content
    file = io.BytesIO()
    image.save(file, "PNG")
    assert prepare_file(file.getvalue(), 60, 50, Recipe()).content == file.getvalue()
    changed = prepare_file(file.getvalue(), 60, 50, Recipe(format="jpeg"))
    assert changed.ending == "jpg"
    assert Image.open(io.BytesIO(changed.content)).format == "JPEG"


def test_rare_kinds_become_plain_rgb() -> None:
    content = jpeg(draw(5, 40, 60).convert("CMYK"))
    made = prepare_file(content, 40, 60, Recipe(format="png"))
    assert Image.open(io.BytesIO(made.content)).mode == "RGB"
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)
    assert (decoded(made.content) == expected).all()


def test_masks_take_the_nearest_pixel_and_boxes_the_real_ratio() -> None:
    mask = np.zeros((6, 4), bool)
    mask[2:4, 1] = True
    assert (prepare_mask(mask, 6, 4) == mask).all()
    # Every second row and column, counted from the centres 1, 3, 5.
    assert prepare_mask(mask, 3, 2).tolist() == mask[1::2, 1::2].tolist()
    assert (prepare_mask(mask, 12, 8) == mask.repeat(2, 0).repeat(2, 1)).all()
    boxes = np.array([[0, 0, 500, 375], [10, 20, 30, 50]], np.float32)
    scaled = prepare_boxes(boxes, (375, 500), (256, 341))
    assert scaled[0].tolist() == [0, 0, 341, 256]
    assert scaled[1] == pytest.approx([10 * 0.682, 20 * 256 / 375, 30 * 0.682, 50 * 256 / 375])


def test_a_prepared_set_holds_every_sample_with_its_label_boxes_and_mask(source: Manifest, tmp_path: Path) -> None:
    report = run(source, tmp_path / "set", recipe=Recipe(size=32, format="png"))
    opened = datasets.load("prepared", tmp_path / "set", "train")
    assert len(opened) == report.split.samples == 40
    assert report.made == len(report.split.shards) > 2
    assert all(shard.bytes <= 30_000 for shard in report.split.shards)
    assert opened.labels.tolist() == source.labels.tolist()
    assert opened.classes == source.classes
    assert opened.digest != source.digest
    for sample in range(40):
        data = opened.read(sample)
        assert isinstance(data, bytes)
        shown = Image.open(io.BytesIO(data))
        assert (shown.height, shown.width) == (opened.heights[sample], opened.widths[sample])
        assert min(shown.size) == 32
        expected = np.asarray(Image.open(source.describe(sample)).resize(shown.size, Image.Resampling.BILINEAR)).astype(
            int
        )
        assert np.abs(decoded(data) - expected).max() <= 1
        by = np.array([shown.width / source.widths[sample], shown.height / source.heights[sample]] * 2)
        assert opened.boxes(sample) == pytest.approx(source.boxes(sample) * by)
        mask, before = opened.mask(sample), source.mask(sample)
        assert (mask is None) == (before is None)
        if mask is not None and before is not None:
            nearest = Image.fromarray(before.astype(np.uint8)).resize(shown.size, Image.Resampling.NEAREST)
            assert (mask == np.asarray(nearest).astype(bool)).all()


def test_the_bytes_do_not_depend_on_the_number_of_processes(
    source: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(source, tmp_path / "one")
    monkeypatch.setattr(pieces, "_WORTH_PROCESSES", 4)
    run(source, tmp_path / "two", workers=2)
    for name in ("train.arrow", "train-000000.idx"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert shard_hashes(tmp_path / "one") == shard_hashes(tmp_path / "two")


def test_the_digest_is_that_of_the_content_and_not_of_its_cutting(source: Manifest, tmp_path: Path) -> None:
    digests = [
        run(source, tmp_path / name, **options).split.digest
        for name, options in (
            ("a", {}),
            ("b", {"shard_bytes": 90_000}),
            ("c", {"recipe": dataclasses.replace(SMALL, quality=91)}),
        )
    ]
    assert digests[0] == digests[1] != digests[2]


def test_a_second_run_makes_nothing_and_a_lost_or_short_shard_is_made_again_alone(
    source: Manifest, tmp_path: Path
) -> None:
    folder = tmp_path / "set"
    run(source, folder)
    hashes = shard_hashes(folder)
    assert run(source, folder).prepared == 0
    (folder / "train-000001.tar").unlink()
    short = folder / "train-000003.tar"
    short.write_bytes(short.read_bytes()[:-10240])
    with pytest.raises(DataError, match=r"train-000001\.tar: missing.*lorot data prepare"):
        datasets.load("prepared", folder, "train")
    report = run(source, folder)
    assert report.made == 2
    assert 0 < report.prepared < 40
    assert shard_hashes(folder) == hashes
    datasets.load("prepared", folder, "train")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"digest": "e" * 64, "fingerprint": "e" * 64}, "the source has changed"),
        ({"fingerprint": "e" * 64}, "copied or written again"),
        ({"name": "other"}, "data set 'drawn'"),
    ],
)
def test_a_source_that_changed_is_refused_until_restart_is_asked_for(
    source: Manifest, tmp_path: Path, change: dict[str, str], said: str
) -> None:
    run(source, tmp_path / "set")
    before = shard_hashes(tmp_path / "set")
    source.heading = dataclasses.replace(source.heading, **change)
    with pytest.raises(DataError, match=f"{said}.*--restart"):
        run(source, tmp_path / "set")
    assert shard_hashes(tmp_path / "set") == before
    assert run(source, tmp_path / "set", restart=True).prepared == 40


def test_other_options_are_refused_by_name_and_leave_no_old_shard_after_a_restart(
    source: Manifest, tmp_path: Path
) -> None:
    folder = tmp_path / "set"
    run(source, folder)
    with pytest.raises(DataError, match="size 32 and not 16"):
        run(source, folder, recipe=Recipe(size=16))
    many = len(shard_hashes(folder))
    run(source, folder, recipe=Recipe(size=16), restart=True)
    assert len(shard_hashes(folder)) < many
    assert len(datasets.load("prepared", folder, "train")) == 40


def test_shards_that_nobody_knows_are_not_overwritten(source: Manifest, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train-000000.tar").write_bytes(b"somebody's")
    with pytest.raises(DataError, match=r"train-000000\.tar is there"):
        run(source, tmp_path / "set")
    assert (tmp_path / "set/train-000000.tar").read_bytes() == b"somebody's"


def test_splits_share_a_set(source: Manifest, tmp_path: Path) -> None:
    run(source, tmp_path / "set")
    source.heading = dataclasses.replace(source.heading, split="val")
    run(source, tmp_path / "set")
    assert set(prepared_set.read(LocalFiles(tmp_path / "set"), "set")) == {"train", "val"}
    with pytest.raises(DataError, match="no split 'test'; there are train, val"):
        datasets.load("prepared", tmp_path / "set", "test")


def test_an_unreadable_image_stops_or_is_left_out_and_listed(source: Manifest, tmp_path: Path) -> None:
    path = Path(source.describe(7))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"0007\.jpg: .*truncated.*--on-bad-image skip"):
        run(source, tmp_path / "set")
    report = run(source, tmp_path / "other", on_bad_image="skip")
    assert [where for where, _ in report.split.skipped] == ["0007.jpg"]
    opened = datasets.load("prepared", tmp_path / "other", "train")
    assert opened.labels.tolist() == [number % 3 for number in range(40) if number != 7]
    assert opened.source_path(7) == "0008.jpg"


def test_a_set_without_a_readable_image_is_an_error(source: Manifest, tmp_path: Path) -> None:
    for path in Path(str(source.root)).glob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="no image of split 'train' can be read"):
        run(source, tmp_path / "set", on_bad_image="skip")


def test_rows_of_pixels_become_exact_pngs(tmp_path: Path) -> None:
    images = np.stack([np.asarray(draw(number, 32, 32)) for number in range(6)])
    rows = write_pixels(tmp_path, images)
    run(rows, tmp_path / "set")
    opened = datasets.load("prepared", tmp_path / "set", "train")
    for sample in range(6):
        data = opened.read(sample)
        assert isinstance(data, bytes)
        assert (decoded(data) == images[sample]).all()


def test_a_full_disk_keeps_finished_shards_and_says_how_much_is_missing(
    source: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "set"
    run(source, tmp_path / "whole")
    real = shard_record.Tar.append
    tars: list[shard_record.Tar] = []

    def append(self: shard_record.Tar, entries: bytes | memoryview) -> None:
        if self not in tars:
            tars.append(self)
        # The third one may still be finished meanwhile.
        if self not in tars[:3]:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, entries)

    monkeypatch.setattr(shard_record.Tar, "append", append)
    with pytest.raises(
        FullDiskError, match=r"the disk is full.*3 shards \(.* kB\) are finished, about .* kB more"
    ) as caught:
        run(source, folder)
    assert caught.value.exit_code == 7
    assert [path.name for path in sorted(folder.glob("*.tar"))] == [f"train-{number:06d}.tar" for number in range(3)]
    assert not list(folder.rglob("*partial*"))
    with pytest.raises(DataError, match="unfinished; run `lorot data prepare`"):
        datasets.load("prepared", folder, "train")
    monkeypatch.setattr(shard_record.Tar, "append", real)
    report = run(source, folder)
    assert report.made == len(report.split.shards) - 3
    assert shard_hashes(folder) == shard_hashes(tmp_path / "whole")


def test_a_damaged_record_costs_its_shards_and_nothing_else(source: Manifest, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    run(source, folder)
    hashes = shard_hashes(folder)
    (folder / ".prepare/train/000001.npz").write_bytes(b"garbage")
    assert run(source, folder).made == len(hashes) - 1
    assert shard_hashes(folder) == hashes


def test_two_cannot_prepare_one_split_at_once(source: Manifest, tmp_path: Path) -> None:
    from pipelines.preparation_state import Place

    place = Place(tmp_path / "set", "train")
    place.records.mkdir(parents=True)
    with place.held(), pytest.raises(DataError, match="another process"):
        run(source, tmp_path / "set")


def test_the_sets_own_file_says_what_was_done(source: Manifest, tmp_path: Path) -> None:
    run(source, tmp_path / "set")
    about = json.loads((tmp_path / "set/set.json").read_text())["splits"]["train"]
    assert about["options"]["size"] == 32
    assert about["source"]["digest"] == "d" * 64
    assert about["classes"] == ["a", "b", "c"]
    for file in [about["manifest"], *about["shards"]]:
        content = (tmp_path / "set" / file["path"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file["bytes"], file["sha256"])


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("where", ["set", "set/inside", "."])
def test_a_prepared_set_is_never_prepared_onto_itself(
    source: Manifest, tmp_path: Path, where: str, restart: bool
) -> None:
    run(source, tmp_path / "set")
    before = shard_hashes(tmp_path / "set")
    (tmp_path / "link").symlink_to(tmp_path)
    own = datasets.load("prepared", tmp_path / "set", "train")
    with pytest.raises(DataError, match="choose another folder"):
        run(own, tmp_path / "link" / where, restart=restart)
    assert shard_hashes(tmp_path / "set") == before
    assert not (tmp_path / ".prepare").exists()
    assert run(own, tmp_path / "other", recipe=Recipe(size=16)).prepared == 40


def test_nothing_is_prepared_into_the_folder_of_its_source(source: Manifest) -> None:
    with pytest.raises(DataError, match="choose another folder"):
        run(source, Path(source.root), restart=True)
    assert not (Path(source.root) / ".prepare").exists()


# A process in which sample 7 is the end of the decoder.
CRASHING = """
import os, signal, sys
from pipelines import pieces

real = pieces._make

def make(manifest, recipe, sample):
    if sample == 7:
        os.kill(os.getpid(), signal.SIGSEGV)
    return real(manifest, recipe, sample)

pieces._make = make
pieces.main(sys.argv[1])
"""


def test_an_image_that_a_decoder_dies_of_is_named_or_left_out(
    source: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "_WORTH_PROCESSES", 4)
    monkeypatch.setattr(pieces, "_PIECE", 2)
    monkeypatch.setattr(pieces, "_COMMAND", (pieces.sys.executable, "-c", CRASHING))
    with pytest.raises(DataError, match=r"0007\.jpg: .*died: killed by SIGSEGV.*--on-bad-image skip"):
        run(source, tmp_path / "set", workers=1, recipe=Recipe("none"))
    report = run(source, tmp_path / "other", workers=1, recipe=Recipe("none"), on_bad_image="skip")
    assert [where for where, _ in report.split.skipped] == ["0007.jpg"]
    assert report.split.samples == 39


def test_a_process_that_cannot_start_is_no_samples_fault(
    source: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "_WORTH_PROCESSES", 4)
    monkeypatch.setattr(pieces, "_COMMAND", (pieces.sys.executable, "-c", "raise SystemExit('no such library')"))
    with pytest.raises(DataError, match="can be started: no such library"):
        run(source, tmp_path / "set", workers=1, on_bad_image="skip")


def test_modules_in_the_working_directory_are_not_run(
    source: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    for name in ("json.py", "pipelines.py", "numpy.py"):
        (tmp_path / "here" / name).write_text("raise SystemExit('somebody else\\'s')")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(pieces, "_WORTH_PROCESSES", 4)
    assert run(source, tmp_path / "set", workers=1).prepared == 40


def test_unreadable_images_at_the_end_are_left_out_after_a_shard_that_is_too_large(
    source: Manifest, tmp_path: Path
) -> None:
    for number in (38, 39):
        Path(source.describe(number)).write_bytes(b"")
    # Every sample is larger than a shard may be, and gets one of its own.
    report = run(source, tmp_path / "set", shard_bytes=1, on_bad_image="skip")
    assert len(report.split.shards) == report.split.samples == 38
    assert len(report.split.skipped) == 2


def test_a_lost_or_damaged_index_is_found_and_mended_without_the_images(source: Manifest, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    about = run(source, folder).split
    indices = [folder / f"train-{number:06d}.idx" for number in (1, 2)]
    before = [path.read_bytes() for path in indices]
    assert verify_prepared(folder, "train", about).damage == ()
    indices[0].unlink()
    indices[1].write_bytes(before[1].replace(b" 512 ", b" 513 ", 1))
    found = verify_prepared(folder, "train", about).damage
    assert [damage.where for damage in found] == [str(path) for path in indices]
    assert "not the index of its shard" in found[1].what
    assert run(source, folder).prepared == 0
    assert [path.read_bytes() for path in indices] == before
    assert verify_prepared(folder, "train", about).damage == ()


def test_shards_beyond_the_last_one_are_removed(source: Manifest, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    names = [shard.path for shard in run(source, folder).split.shards]
    for name in ("train-000090.tar", "train-000090.idx", ".prepare/train/000090.npz", "val-000090.tar", "train-9.tar"):
        (folder / name).write_bytes(b"")
    assert run(source, folder).prepared == 0
    assert [path.name for path in sorted(folder.glob("train-??????.*"))] == sorted(
        [*names, *(name.replace(".tar", ".idx") for name in names)]
    )
    assert not (folder / ".prepare/train/000090.npz").exists()
    assert (folder / "val-000090.tar").exists()
    assert (folder / "train-9.tar").exists()


def test_files_are_handed_to_the_threads_that_verify_them_in_hundreds(
    source: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed: list[object] = []

    class Counting(ThreadPoolExecutor):
        def submit(self, function, /, *arguments, **options):  # type: ignore[no-untyped-def]
            handed.append(arguments)
            return super().submit(function, *arguments, **options)

    monkeypatch.setattr(verification, "ThreadPoolExecutor", Counting)
    monkeypatch.setattr(verification, "_SAMPLES_AT_ONCE", 16, raising=False)
    Path(source.describe(21)).write_bytes(b"")
    found = verify_files(source, threads=2)
    assert [damage.where for damage in found.damage] == [source.describe(21)]
    assert found.samples == 40
    assert found.bytes == sum(Path(source.describe(number)).stat().st_size for number in range(40))
    assert len(handed) == 3


def test_an_error_of_making_images_is_not_taken_for_one_of_the_disk_that_is_written_to(
    source: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "elsewhere")

    monkeypatch.setattr(pieces, "make", fail)
    with pytest.raises(DataError, match=r"elsewhere: images cannot be prepared \(No space") as caught:
        run(source, tmp_path / "set")
    assert not isinstance(caught.value, FullDiskError)


def test_another_encoder_does_not_go_on_with_what_the_first_one_made(
    source: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = run(source, tmp_path / "set").split
    assert about.made_with["pillow"] == PIL.__version__
    monkeypatch.setattr(PIL, "__version__", "0.1")
    with pytest.raises(DataError, match=rf"pillow {PIL_VERSION} and not 0\.1, .*install that again.*--restart"):
        run(source, tmp_path / "set")
    assert run(source, tmp_path / "set", restart=True).split.made_with["pillow"] == "0.1"
