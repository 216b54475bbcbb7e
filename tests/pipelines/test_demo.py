import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines import datasets, listing, masks, progress
from pipelines.datasets import demo
from pipelines.drawing import files, objects, scene
from pipelines.errors import DataError

SMALL = {"train_count": 24, "val_count": 12, "size": 32, "classes": 12}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.*g"))}


def test_images_labels_boxes_and_masks_belong_together(tmp_path: Path) -> None:
    found = datasets.load("demo", tmp_path, "train", **SMALL)
    assert found.classes == tuple(objects.OBJECTS)
    assert len(found) == 24
    assert found.labels.tolist() == [sample % 12 for sample in range(24)]
    drawn = scene.numbers(0, "train", np.arange(24))
    for sample in range(24):
        truth = scene.draw(found.classes[found.labels[sample]], 32, drawn[sample])
        with Image.open(io.BytesIO(found.read(sample))) as image:
            pixels = np.asarray(image)
        assert pixels.shape == (found.heights[sample], found.widths[sample], 3) == (32, 32, 3)
        assert np.abs(pixels.astype(int) - truth.pixels).mean() < 20
        mask = found.mask(sample)
        assert mask is not None
        assert (mask == truth.mask).all()
        rows, columns = np.nonzero(truth.mask)
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert found.boxes(sample).tolist() == [box]


def test_ten_classes_and_seven_thousand_images_are_the_default() -> None:
    assert datasets.options("demo") == {"train_count": 6000, "val_count": 1000, "size": 96, "seed": 0, "classes": 10}
    assert len(objects.OBJECTS) >= 10


def test_the_same_options_give_the_same_files_and_digest_anywhere(tmp_path: Path) -> None:
    one = datasets.load("demo", tmp_path / "one", "val", **SMALL)
    two = datasets.load("demo", tmp_path / "two", "val", **SMALL)
    assert one.digest == two.digest
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_other_options_never_mix_with_what_is_there(tmp_path: Path) -> None:
    base = datasets.load("demo", tmp_path, "train", **SMALL)
    before = contents(tmp_path)
    for other in ({"seed": 1}, {"size": 40}, {"classes": 5}):
        found = datasets.load("demo", tmp_path, "train", **SMALL | other)
        assert found.digest != base.digest
    assert contents(tmp_path).items() > before.items()
    assert datasets.load("demo", tmp_path, "train", **SMALL).digest == base.digest


def test_a_larger_number_continues_a_smaller_one(tmp_path: Path) -> None:
    few = datasets.load("demo", tmp_path, "train", **SMALL)
    before = contents(tmp_path)
    many = datasets.load("demo", tmp_path, "train", **SMALL | {"train_count": 40})
    assert len(many) == 40
    assert contents(tmp_path).items() > before.items()
    again = datasets.load("demo", tmp_path, "train", **SMALL)
    assert (len(again), again.digest) == (24, few.digest)


def test_several_processes_draw_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = datasets.load("demo", tmp_path / "one", "train", **SMALL)
    monkeypatch.setattr(files, "_WORTH_PROCESSES", 1)
    seen: list[int] = []
    files.draw_all(files.Job(str(tmp_path / "two"), "train", 24, 32, 12, 0), seen.append)
    assert sum(seen) == 24
    inner = Path(one.describe(0)).parents[2]
    assert contents(tmp_path / "two") == contents(inner)


def test_a_small_container_on_a_large_machine_draws_in_few_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[object] = []

    class Counted(subprocess.Popen[str]):
        def __init__(self, *args: Any, **options: Any) -> None:
            started.append(args)
            super().__init__(*args, **options)

    monkeypatch.setattr(files, "_WORTH_PROCESSES", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(128)))
    monkeypatch.setattr(subprocess, "Popen", Counted)
    seen: list[int] = []
    files.draw_all(files.Job(str(tmp_path), "train", 24, 32, 12, 0), seen.append)
    assert (len(started), sum(seen)) == (8, 24)


def test_interrupted_drawing_goes_on_where_it_stopped(tmp_path: Path) -> None:
    first = datasets.load("demo", tmp_path, "train", **SMALL)
    before = contents(tmp_path)
    kept, gone, emptied, maskless = (Path(first.describe(sample)) for sample in (0, 5, 6, 7))
    about = kept.stat()
    gone.unlink()
    emptied.write_bytes(b"")
    root = kept.parents[2]
    (root / "masks" / maskless.relative_to(root)).with_suffix(".png").unlink()
    again = datasets.load("demo", tmp_path, "train", **SMALL)
    assert contents(tmp_path) == before
    assert again.digest == first.digest
    assert kept.stat().st_mtime_ns == about.st_mtime_ns


def test_nothing_is_drawn_or_read_again_when_all_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.load("demo", tmp_path, "train", **SMALL)
    monkeypatch.setattr(files, "draw_all", lambda *_: pytest.fail("drawn again"))
    monkeypatch.setattr(listing, "read_headers", lambda *_: pytest.fail("read again"))
    datasets.load("demo", tmp_path, "train", **SMALL)


def test_the_images_are_class_folders_too(tmp_path: Path) -> None:
    drawn = datasets.load("demo", tmp_path, "val", **SMALL)
    folder = Path(drawn.describe(0)).parents[2]
    (folder / "train").symlink_to(folder / "val")
    found = datasets.load("folder", folder, "val")
    assert sorted(found.classes) == sorted(drawn.classes)
    assert len(found) == len(drawn)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"classes": 99}, "option classes: 99 is not a whole number from 2 to 12"),
        ({"size": 8}, "option size: 8"),
        ({"train_count": 3}, "option train_count: 3 is not a whole number from 10"),
        ({"seed": -1}, "option seed"),
        ({"seed": "x"}, "option seed: 'x'"),
        ({"train_cuont": 5}, "did you mean 'train_count'"),
    ],
)
def test_options_out_of_range_are_errors_that_say_what_would_work(
    options: dict[str, object], complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=complaint):
        datasets.load("demo", tmp_path, "train", **options)
    assert not list(tmp_path.iterdir())


def test_an_unknown_split_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no split 'test'; it has train, val"):
        datasets.load("demo", tmp_path, "test")


@pytest.mark.parametrize("processes", [False, True])
def test_a_folder_that_cannot_be_written_is_an_error(
    processes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if processes:
        monkeypatch.setattr(files, "_WORTH_PROCESSES", 1)
    (tmp_path / "place").write_text("a file where the folder should be")
    job = files.Job(str(tmp_path / "place"), "train", 24, 32, 12, 0)
    with pytest.raises(DataError, match="place: cannot draw the demo images here"):
        files.draw_all(job, lambda _: None)


def test_a_damaged_mask_is_named(tmp_path: Path) -> None:
    found = datasets.load("demo", tmp_path, "val", **SMALL)
    image = Path(found.describe(2))
    mask = (image.parents[2] / "masks" / image.relative_to(image.parents[2])).with_suffix(".png")
    for content, complaint in (
        (b"broken", "not a readable mask"),
        (masks.encode(np.zeros((32, 32), bool)), "an empty mask"),
    ):
        mask.write_bytes(content)
        with pytest.raises(DataError, match=rf"{mask.name}: {complaint}.*drawn again"):
            datasets.load("demo", tmp_path, "val", **SMALL)


def test_the_folder_is_named_after_the_version_of_the_drawing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = datasets.load("demo", tmp_path, "val", **SMALL).describe(0)
    monkeypatch.setattr(demo, "VERSION", demo.VERSION + 1)
    assert datasets.load("demo", tmp_path, "val", **SMALL).describe(0) != one


def test_drawing_needs_no_torch() -> None:
    code = (
        "import json, sys; import pipelines.datasets.demo, pipelines.drawing.files, pipelines.datasets.folder; "
        "import pipelines.datasets.cifar10, pipelines.datasets.fashion_mnist; print(json.dumps('torch' in sys.modules))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) is False


def test_progress_is_silent_unless_on_a_terminal(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with progress.bar(10, "drawing", "images") as done:
        done(10)
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress.bar(10, "drawing", "images") as done:
        done(4)
        done(6)
    shown = capfd.readouterr().err
    assert "drawing" in shown
    assert "10/10" in shown
    assert "images/s" in shown
