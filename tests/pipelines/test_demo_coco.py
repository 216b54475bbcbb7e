"""Drawn scenes in COCO's format: what is seen of each object is what its mask says, and the same files every time."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from killing import after_each_kill
from PIL import Image
from pycocotools.coco import COCO

from pipelines import datasets
from pipelines.drawing import coco_export, composition, objects
from pipelines.drawing.coco_export import Scenes, export
from pipelines.errors import DataError

FEW = Scenes(train_count=24, val_count=5, size=64, classes=5, most=5)


@pytest.fixture(scope="module")
def drawn() -> list[composition.Composition]:
    return [composition.draw(6, 6, 96, numbers) for numbers in composition.numbers(1, "train", np.arange(60))]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    export(folder, FEW)
    return folder


def files_of(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and ".lorot" not in path.parts
    }


def test_pictures_have_several_objects_of_all_sizes_and_classes_and_some_have_none(
    drawn: list[composition.Composition],
) -> None:
    counts = np.array([len(scene.labels) for scene in drawn])
    assert 2 <= counts.mean() <= 5
    assert counts.max() >= 5
    assert 1 <= (counts == 0).sum() <= 10
    assert set(np.concatenate([scene.labels for scene in drawn]).tolist()) == set(range(6))
    shares = np.concatenate([scene.masks.mean(axis=(1, 2)) for scene in drawn if len(scene.labels)])
    assert shares.min() < 0.015
    assert shares.max() > 0.1
    shapes = {scene.pixels.shape[:2] for scene in drawn}
    assert len(shapes) > 10
    assert all(max(shape) == 96 and min(shape) >= 0.6 * 96 for shape in shapes)


def test_masks_are_what_is_seen_of_each_object(drawn: list[composition.Composition]) -> None:
    for scene in drawn:
        assert scene.masks.shape == (len(scene.labels), *scene.pixels.shape[:2])
        # No pixel shows two objects.
        assert scene.masks.sum(axis=0, dtype=int).max(initial=0) <= 1
        assert all(mask.sum() >= 4 for mask in scene.masks)


def test_an_object_hides_what_lies_behind_it_and_only_that() -> None:
    # The same numbers with fewer objects: what comes later is painted over what is there.
    hidden = 0
    for numbers in composition.numbers(2, "train", np.arange(40)):
        whole = composition.draw(6, 8, 96, numbers)
        if len(whole.labels) < 2:
            continue
        first = composition.draw(6, 1, 96, numbers)
        assert first.labels[0] == whole.labels[0]
        assert (whole.masks[0] & ~first.masks[0]).sum() == 0
        lost = first.masks[0].sum() - whole.masks[0].sum()
        assert whole.masks[0].sum() >= composition.LEAST_SEEN * first.masks[0].sum()
        hidden += int(lost > 0)
        same = (whole.pixels == first.pixels).all(axis=2)
        others = whole.masks[1:].any(axis=0)
        # What is still seen of the first object looks as it did; a rim of the others is blended in.
        assert same[whole.masks[0]].mean() > 0.8
        assert same[others].mean() < 0.2
    assert hidden >= 8


def test_the_same_options_give_the_same_files_and_more_of_them_continue_fewer(root: Path, tmp_path: Path) -> None:
    export(tmp_path / "again", FEW)
    assert files_of(tmp_path / "again") == files_of(root)
    export(tmp_path / "more", Scenes(**{**FEW.__dict__, "train_count": 30}))
    more = files_of(tmp_path / "more")
    pictures = {name: found for name, found in files_of(root).items() if name.endswith(".jpg")}
    assert pictures.items() <= more.items()
    export(tmp_path / "other", Scenes(**{**FEW.__dict__, "seed": 1}))
    assert not set(files_of(tmp_path / "other").values()) & set(pictures.values())


def test_pycocotools_and_this_project_read_the_same_from_it(root: Path) -> None:
    known = COCO(root / "annotations/instances_train2017.json")
    opened = datasets.load("coco", root, "train")
    assert opened.instances is not None
    assert opened.classes == tuple(objects.OBJECTS)[:5]
    assert opened.class_ids == ("1", "2", "3", "5", "6")
    assert opened.heading.remarks == {}
    assert len(opened) == len(known.imgs) == 24
    for row, image in enumerate(opened.instances.image_ids.tolist()):
        about = known.loadAnns(known.getAnnIds(imgIds=[image]))
        own = opened.instances.of(row)
        assert own.bboxes.tolist() == [one["bbox"] for one in about]
        for one in about:
            mask = known.annToMask(one)
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            box = [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]]
            assert one["bbox"] == box
            assert one["area"] == mask.sum()
            with Image.open(root / "train2017" / known.imgs[image]["file_name"]) as picture:
                assert picture.size[::-1] == mask.shape


def test_what_is_there_is_not_drawn_again_and_what_is_missing_is(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files_of(root)
    with monkeypatch.context() as patched:
        patched.setattr(composition, "draw", lambda *_: pytest.fail("drawn again"))
        export(root, FEW)
    (root / "val2017/000000000002.jpg").write_bytes(b"")
    (root / "annotations/instances_train2017.json").unlink()
    export(root, FEW)
    assert files_of(root) == before


def test_other_scenes_take_their_place_but_nothing_else_is_ever_removed(tmp_path: Path) -> None:
    export(tmp_path / "own", FEW)
    export(tmp_path / "own", Scenes(train_count=3, val_count=2, size=64))
    assert len(list((tmp_path / "own/train2017").iterdir())) == 3
    (tmp_path / "coco/train2017").mkdir(parents=True)
    (tmp_path / "coco/train2017/000000000009.jpg").write_bytes(b"precious")
    with pytest.raises(DataError, match="no demo scenes; choose an empty folder"):
        export(tmp_path / "coco", FEW)
    assert (tmp_path / "coco/train2017/000000000009.jpg").read_bytes() == b"precious"


def test_interrupted_drawing_leaves_no_annotations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = composition.draw

    def fail(*given):
        if len(list((tmp_path / "train2017").iterdir())) == 10:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(composition, "draw", fail)
    with pytest.raises(KeyboardInterrupt):
        export(tmp_path, FEW)
    assert not (tmp_path / "annotations/instances_train2017.json").exists()
    monkeypatch.setattr(composition, "draw", real)
    export(tmp_path, FEW)
    assert len(json.loads((tmp_path / "annotations/instances_train2017.json").read_text())["images"]) == 24


@pytest.mark.parametrize(
    ("option", "value"),
    [("train_count", 0), ("size", 20), ("classes", 13), ("most", 9), ("seed", -1), ("most", True), ("size", 64.0)],
)
def test_an_option_out_of_range_is_refused(option: str, value: object) -> None:
    with pytest.raises(DataError, match=f"option {option}: "):
        coco_export.Scenes(**{option: value})


@pytest.mark.parametrize("power", [False, True], ids=["killed", "power cut"])
def test_what_a_killed_drawing_has_left_is_drawn_anew(tmp_path: Path, power: bool) -> None:
    few = Scenes(train_count=1, val_count=1, size=64, classes=2, most=2)
    other = dataclasses.replace(few, seed=1)
    # Another set takes the place of the first, so that what is left of that is not taken for its own.
    export(tmp_path / "whole", other)
    for number, before in enumerate((None, few)):
        places = after_each_kill(
            tmp_path / str(number),
            lambda place, before=before: before and export(place, before),  # type: ignore[misc]
            lambda place: export(place, other),
            power=power,
        )
        for place in places:
            export(place, other)
            assert files_of(place).items() >= files_of(tmp_path / "whole").items()


def test_annotations_that_a_power_cut_has_emptied_are_written_again(tmp_path: Path) -> None:
    few = Scenes(train_count=1, val_count=1, size=64, classes=2, most=2)
    export(tmp_path, few)
    before = files_of(tmp_path)
    for path in (tmp_path / "annotations").iterdir():
        path.write_bytes(b"")
        export(tmp_path, few)
        assert files_of(tmp_path) == before
