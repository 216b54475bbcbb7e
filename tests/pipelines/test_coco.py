"""Data sets in COCO's format: what is read, what is mended or left out, and what is refused."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as official
from pycocotools.coco import COCO

from pipelines import coco_file, datasets, listing, prepare, run_lengths
from pipelines.errors import DataError
from pipelines.manifest import Manifest
from tests.pipelines.coco_files import annotation, content_of, rewrite, write

SIZES = [(40, 60), (50, 30), (33, 44), (64, 64)]


def circle(height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return (rows - height // 2) ** 2 + (columns - width // 2) ** 2 < (min(height, width) // 3) ** 2


def plain_runs(mask: np.ndarray) -> dict[str, Any]:
    flat = mask.reshape(-1, order="F")
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flat]).astype(int)))
    return {"size": list(mask.shape), "counts": np.diff([0, *edges.tolist(), flat.size]).tolist()}


def compressed(mask: np.ndarray) -> dict[str, Any]:
    runs = official.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": runs["counts"].decode()}


def usual() -> dict[str, Any]:
    """Image 10 has three objects, segmented in all ways, 20 none, 30 a crowd, 40 one that reaches over the edge."""
    return content_of(
        SIZES,
        [
            annotation(1, 10, 90, [5, 6, 20.5, 10.25]),
            annotation(2, 30, 7, [0, 0, 44, 33], iscrowd=1, segmentation=plain_runs(circle(33, 44))),
            annotation(3, 10, 2, [20, 5, 30, 30], segmentation=compressed(circle(40, 60)), area=77.5),
            annotation(4, 40, 7, [-8, 50, 30, 30]),
            annotation(5, 10, 2, [1, 1, 8, 8], segmentation=[[1, 1, 9, 1, 9, 9], [30, 30, 35, 30, 35, 35, 30, 35]]),
        ],
    )


@pytest.fixture
def opened(tmp_path: Path) -> Manifest:
    write(tmp_path, usual())
    return datasets.load("coco", tmp_path, "train")


def test_images_with_objects_come_first_and_all_others_after_them(opened: Manifest) -> None:
    assert opened.instances is not None
    assert opened.instances.image_ids.tolist() == [10, 30, 40, 20]
    assert opened.heading.num_trainable == 3
    assert [opened.source_path(row) for row in range(4)] == [f"train2017/{n:04d}.jpg" for n in (0, 2, 3, 1)]
    assert list(zip(opened.heights, opened.widths, strict=True)) == [SIZES[n] for n in (0, 2, 3, 1)]
    assert len(opened.instances.of(3)) == 0


def test_classes_are_counted_by_category_id_and_gaps_are_closed(opened: Manifest) -> None:
    assert opened.classes == ("boat", "cup", "lamp")
    assert opened.class_ids == ("2", "7", "90")
    assert opened.instances is not None
    assert opened.instances.of(0).labels.tolist() == [2, 0, 0]
    assert [opened.instances.of(row).labels.tolist() for row in (1, 2)] == [[1], [1]]


def test_boxes_are_corners_inside_the_image_and_the_annotated_ones_are_kept(opened: Manifest) -> None:
    assert opened.instances is not None
    own = opened.instances.of(0)
    assert own.boxes.tolist() == [[5, 6, 25.5, 16.25], [20, 5, 50, 35], [1, 1, 9, 9]]
    assert own.areas.tolist() == [20.5 * 10.25, 77.5, 64]
    over = opened.instances.of(2)
    assert over.boxes.tolist() == [[0, 50, 22, 64]]
    assert over.bboxes.tolist() == [[-8, 50, 30, 30]]
    assert opened.boxes(2).tolist() == over.boxes.tolist()
    assert opened.heading.remarks == {"boxes that reach over the edge, clipped": 1}


def test_crowds_are_told_from_single_objects(opened: Manifest) -> None:
    assert opened.instances is not None
    assert [opened.instances.of(row).crowd.tolist() for row in range(4)] == [[False] * 3, [True], [False], []]


def test_every_kind_of_segmentation_is_the_mask_that_pycocotools_draws(tmp_path: Path) -> None:
    path = write(tmp_path, usual())
    opened = datasets.load("coco", tmp_path, "train")
    assert opened.instances is not None
    known = COCO(path)
    for row, image in enumerate(opened.instances.image_ids.tolist()):
        own = opened.instances.of(row)
        size = int(opened.heights[row]), int(opened.widths[row])
        masks = run_lengths.decode(own.segmentations, *size)
        theirs = [known.annToMask(about) for about in known.loadAnns(known.getAnnIds(imgIds=[image]))]
        assert len(masks) == len(theirs)
        assert all((mask == other).all() for mask, other in zip(masks, theirs, strict=True))
        assert masks.shape[1:] == size


def test_boxes_without_an_area_stay_empty_and_are_counted(tmp_path: Path) -> None:
    content = content_of(
        SIZES[:2],
        [
            annotation(1, 10, 2, [5, 5, 0, 9]),
            annotation(2, 10, 2, [5, 5, 9, -3]),
            annotation(3, 10, 2, [70, 5, 9, 9]),
            annotation(4, 10, 2, [59.9999, 5, 9, 9]),
            annotation(5, 20, 2, [2, 2, 9, 1]),
        ],
    )
    write(tmp_path, content)
    opened = datasets.load("coco", tmp_path, "train")
    assert opened.instances is not None
    assert [opened.instances.of(row).visible.tolist() for row in range(2)] == [[False] * 4, [True]]
    own = opened.instances.of(0)
    assert (own.boxes[:, :2] == own.boxes[:, 2:]).all()
    # As annotated, for the score.
    assert own.bboxes.tolist() == [[5, 5, 0, 9], [5, 5, 9, -3], [70, 5, 9, 9], [59.9999, 5, 9, 9]]
    assert own.areas.tolist() == [0, -27, 81, 81]
    assert opened.heading.remarks == {
        "boxes without an area in the image, not trained on": 4,
    }
    # One pixel high: torchvision's references train on no image that has nothing larger.
    assert opened.heading.num_trainable == 0


def test_an_object_without_a_segmentation_keeps_its_box(tmp_path: Path) -> None:
    content = content_of(SIZES[:1], [annotation(1, 10, 2, [5, 5, 9, 9]), annotation(2, 10, 2, [1, 1, 9, 9])])
    for empty in (None, [], [[0, 0, 5, 5]]):
        content["annotations"][0]["segmentation"] = empty
        write(tmp_path, content)
        opened = datasets.load("coco", tmp_path, "train")
        assert opened.instances is not None
        assert [bool(runs) for runs in opened.instances.of(0).segmentations] == [False, True]
        assert opened.heading.remarks == {"boxes without a segmentation": 1}
    del content["annotations"][0]["segmentation"], content["annotations"][1]["segmentation"]
    write(tmp_path, content)
    opened = datasets.load("coco", tmp_path, "train")
    assert opened.instances is not None
    assert not opened.instances.has_segmentations


def test_the_order_of_the_lists_in_the_file_does_not_matter(tmp_path: Path) -> None:
    content = usual()
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    write(tmp_path / "first", content)
    turned = dict(reversed(content.items())) | {"images": content["images"][::-1]}
    write(tmp_path / "second", content)
    rewrite(tmp_path / "second", turned)
    digests = {datasets.load("coco", tmp_path / name, "train").digest for name in ("first", "second")}
    assert len(digests) == 1
    content["annotations"][0]["bbox"][0] += 1
    rewrite(tmp_path / "second", content)
    assert datasets.load("coco", tmp_path / "second", "train").digest not in digests


def test_any_layout_can_be_named(tmp_path: Path) -> None:
    write(tmp_path, usual())
    (tmp_path / "labels").mkdir()
    (tmp_path / "annotations/instances_train2017.json").rename(tmp_path / "labels/mine.json")
    (tmp_path / "train2017").rename(tmp_path / "pictures")
    opened = datasets.load("coco", tmp_path, "anything", annotations="labels/mine.json", images="pictures")
    assert opened.split == "anything"
    assert isinstance(opened.read(0), bytes)
    content = usual()
    for image in content["images"]:
        image["file_name"] = f"pictures/{image['file_name']}"
    (tmp_path / "labels/other.json").write_text(json.dumps(content))
    other = datasets.load("coco", tmp_path, "anything", annotations="labels/other.json", images="")
    assert other.read(0) == opened.read(0)


def test_one_pair_of_options_finds_all_splits(tmp_path: Path) -> None:
    more = usual()
    more["annotations"].pop()
    for split, content in (("train", usual()), ("val", more)):
        write(tmp_path, content, split)
        (tmp_path / f"annotations/instances_{split}2017.json").rename(tmp_path / f"{split}.json")
    layout = {"annotations": "{split}.json", "images": "{split}2017"}
    opened = {split: datasets.load("coco", tmp_path, split, **layout) for split in ("train", "val")}
    assert [len(own.instances or ()) for own in opened.values()] == [5, 4]
    assert opened["train"].digest != opened["val"].digest
    assert opened["val"].source_path(0) == "val2017/0000.jpg"
    # The same files by their names are the same manifest.
    assert datasets.load("coco", tmp_path, "val", annotations="val.json", images="val2017").path == opened["val"].path
    with pytest.raises(DataError, match=r"test\.json: no such file; .*=labels/\{split\}\.json.*becomes 'test'"):
        datasets.load("coco", tmp_path, "test", **layout)
    with pytest.raises(DataError, match=r"option images: '\.\./x2017' leaves"):
        datasets.load("coco", tmp_path, "../x", annotations="train.json", images="{split}2017")
    # What YAML makes of {split} alone.
    with pytest.raises(DataError, match=r"option images: \{'split': None\} is no text; .*in quotes"):
        datasets.load("coco", tmp_path, "val", annotations="val.json", images={"split": None})


def test_what_was_read_once_is_mapped_and_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, usual())
    first = datasets.load("coco", tmp_path, "train")
    with monkeypatch.context() as patched:
        patched.setattr(listing, "read_headers", lambda *_: pytest.fail("read again"))
        patched.setattr(coco_file, "read", lambda *_: pytest.fail("read again"))
        again = datasets.load("coco", tmp_path, "train")
    assert again.digest == first.digest
    assert again.instances is not None
    # Views of the mapped file, in this process or in another that opens it by its path.
    for column in (again.instances.image_ids, again.instances.of(0).boxes, again.instances.of(0).bboxes):
        assert not column.flags["OWNDATA"]
        assert not column.flags["WRITEABLE"]
    content = usual()
    content["annotations"].pop()
    rewrite(tmp_path, content)
    assert len(datasets.load("coco", tmp_path, "train").instances or ()) == 4


def test_another_process_gets_the_objects_by_the_manifests_path(opened: Manifest) -> None:
    code = (
        "import sys; from pipelines.manifest import Manifest\n"
        f"m = Manifest.open({str(opened.path)!r}, {str(opened.root)!r})\n"
        "print(m.instances.of(0).labels.tolist(), m.heading.num_trainable, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    assert done.stdout.strip() == "[2, 0, 0] 3 False"


def test_images_that_are_missing_are_left_to_on_bad_image_but_not_if_all_are(tmp_path: Path) -> None:
    write(tmp_path, usual())
    (tmp_path / "train2017/0002.jpg").unlink()
    opened = datasets.load("coco", tmp_path, "train")
    assert opened.heights.tolist() == [40, 0, 64, 50]
    for path in (tmp_path / "train2017").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="as none of the 4 images can"):
        datasets.load("coco", tmp_path, "train")


def test_an_image_of_another_size_than_it_was_annotated_at_is_refused(tmp_path: Path) -> None:
    write(tmp_path, usual())
    Image.new("RGB", (61, 40)).save(tmp_path / "train2017/0000.jpg")
    with pytest.raises(DataError, match=r"0000\.jpg: 61 x 40 pixels .* drawn on 60 x 40; 1 of 4 images"):
        datasets.load("coco", tmp_path, "train")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(tmp_path / "train2017/0000.jpg", exif=exif)
    with pytest.raises(DataError, match="its EXIF turns it, orientation 6"):
        datasets.load("coco", tmp_path, "train")


def changed(**values: Any) -> dict[str, Any]:
    """The usual file with values of its first annotation changed; `...` takes one out."""
    content = usual()
    first = content["annotations"][0]
    for key, value in values.items():
        first[key] = value
        if value is ...:
            del first[key]
    return content


def with_list(key: str, change: Any) -> dict[str, Any]:
    content = usual()
    change(content[key])
    return content


SEGMENTS = {"size": [40, 60]}
BAD: list[tuple[Any, str]] = [
    ("[1, 2]", "it is no JSON object"),
    ("", "it is no JSON object"),
    ('{"images": [', "it is no JSON"),
    ('{"images": [1 2]}', "is no object"),
    (json.dumps(usual()) + "x", "more behind its end"),
    (json.dumps(usual())[:-200], "it is no JSON"),
    ('{"info": ' + "[" * 100_000, "brackets within brackets"),
    ('{"images": [], "images": []}', "'images' is there twice"),
    ({"images": [], "annotations": []}, "it has no 'categories'"),
    (usual() | {"categories": []}, "categor"),
    ({"images": [], "annotations": [], "categories": usual()["categories"]}, "'images' is empty"),
    (usual() | {"annotations": {}}, "'annotations' is no list"),
    (with_list("annotations", lambda own: own.append(3)), r"annotations\[5\]: 3 is no object"),
    (with_list("images", lambda own: own[0].pop("id")), r"images\[0\]: it has no 'id'"),
    (with_list("images", lambda own: own[0].update(id="10")), "id '10' is no whole number"),
    (with_list("images", lambda own: own[0].update(id=True)), "id True is no whole number"),
    (with_list("images", lambda own: own[0].update(id=20)), "image id 20 .* is there twice"),
    (with_list("images", lambda own: own[0].update(height=0)), "height 0 is no whole number above 0"),
    (with_list("images", lambda own: own[0].update(width=10**9)), "more than 178,956,970"),
    (with_list("images", lambda own: own[0].update(file_name="../secret.jpg")), "leaves the folder of the images"),
    (with_list("images", lambda own: own[0].update(file_name="/etc/passwd")), "leaves the folder of the images"),
    (with_list("images", lambda own: own[0].update(file_name="0001.jpg")), "is there twice"),
    (with_list("images", lambda own: own[0].update(file_name="\ud800.jpg")), "half a character"),
    (with_list("categories", lambda own: own[0].update(id=2)), "category id 2 is there twice"),
    (with_list("categories", lambda own: own[0].update(name=3)), "name 3 is no text"),
    (with_list("categories", lambda own: own[0].update(name="n" * 961)), "has 961 characters; write at most 960"),
    (changed(image_id=11), "image_id 11 is none of the 4 images"),
    (changed(category_id=3), "category_id 3 is none of the 3 categories"),
    (changed(id=2), "annotation id 2 is there twice"),
    (changed(bbox=...), "bbox None is no list of four numbers"),
    (changed(bbox=[1, 2, 3]), "is no list of four numbers"),
    (changed(bbox=[1, 2, "3", 4]), "bbox holds '3', which is no usable number"),
    (changed(bbox=[1, 2, True, 4]), "bbox holds True"),
    (json.dumps(changed(bbox=[1, 2, float("nan"), 4])), "NaN is no number of JSON's"),
    (json.dumps(changed(bbox=[1, 2, 3, 4])).replace("[1, 2, 3, 4]", "[1, 2, 1e999, 4]"), "no usable number"),
    (json.dumps(changed(bbox=[1, 2, 3, 4])).replace("[1, 2, 3, 4]", f"[1, 2, {'9' * 400}, 4]"), "no usable number"),
    (json.dumps(changed(bbox=[1, 2, 3, 4])).replace("[1, 2, 3, 4]", f"[1, 2, {'9' * 5000}, 4]"), "it is no JSON"),
    (changed(iscrowd=2), "iscrowd 2 is neither 0 nor 1"),
    (changed(area=-1), "area -1.0 is below 0"),
    (changed(segmentation=3), "segmentation has no size"),
    (changed(segmentation=[1, 2, 3, 4, 5, 6]), "but not of polygons"),
    (changed(segmentation=[[1, 2, 3, 4, 5, "6"]]), "which are not all numbers"),
    (changed(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "they come in pairs"),
    (changed(segmentation=[[0, 0, 10**9, 0, 10**9, 10**9]]), "outlines"),
    (changed(segmentation=[[0, 0, 10**400, 0, 9, 9]]), "beyond all numbers"),
    (json.dumps(changed(segmentation=[[0, 0, 77, 0, 9, 9]])).replace("77", "1e999"), "outlines"),
    (changed(segmentation={"size": [60, 40], "counts": [2400]}), r"no size \[40, 60\]"),
    (changed(segmentation=SEGMENTS), "has no counts"),
    (changed(segmentation=SEGMENTS | {"counts": [2399]}), "add up to 2399"),
    (changed(segmentation=SEGMENTS | {"counts": [-1, 2401]}), "whole numbers from 0 on"),
    (changed(segmentation=SEGMENTS | {"counts": "oooo"}), "end too early"),
    (changed(segmentation=SEGMENTS | {"counts": "\u00e9"}), "what does not belong there"),
]


@pytest.mark.parametrize(("content", "complaint"), BAD, ids=range(len(BAD)))
def test_what_is_wrong_in_a_file_is_said_and_where(tmp_path: Path, content: Any, complaint: str) -> None:
    write(tmp_path, copy.deepcopy(usual()))
    path = rewrite(tmp_path, content)
    with pytest.raises(DataError, match=complaint) as caught:
        datasets.load("coco", tmp_path, "train")
    assert str(path) in str(caught.value)


def test_a_file_that_is_too_large_is_not_even_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, usual())
    monkeypatch.setattr(coco_file, "MOST_BYTES", 100)
    monkeypatch.setattr(Path, "read_text", lambda *_: pytest.fail("read"))
    with pytest.raises(DataError, match="more than the 100 that are read"):
        coco_file.read(path)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, usual())
    path.write_bytes(b'{"images": "\xff"}')
    with pytest.raises(DataError, match="is not UTF-8"):
        datasets.load("coco", tmp_path, "train")


def test_what_is_not_there_is_named_with_what_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"instances_train2017\.json: no such file; annotations there: none\. wanted"):
        datasets.load("coco", tmp_path, "train")
    write(tmp_path, usual())
    with pytest.raises(DataError, match=r"annotations there: annotations/instances_train2017\.json"):
        datasets.load("coco", tmp_path, "val")
    (tmp_path / "train2017").rename(tmp_path / "else")
    with pytest.raises(DataError, match="train2017: no such folder of images"):
        datasets.load("coco", tmp_path, "train")
    with pytest.raises(DataError, match=r"option images: '\.\./else' leaves"):
        datasets.load("coco", tmp_path, "train", images="../else")
    with pytest.raises(DataError, match="no such folder"):
        datasets.load("coco", tmp_path / "nowhere", "train")


def test_equal_names_of_classes_are_told_apart_by_their_ids(tmp_path: Path) -> None:
    content = usual()
    content["categories"][0]["name"] = "boat"
    write(tmp_path, content)
    assert datasets.load("coco", tmp_path, "train").classes == ("boat (2)", "boat (7)", "lamp")


def test_the_longest_names_fit_a_models_card_with_their_ids(tmp_path: Path) -> None:
    content = content_of(SIZES[:1], [])
    content["categories"] = [{"id": number, "name": "n" * 960} for number in (-(2**62), 2**62 - 1)]
    write(tmp_path, content)
    # As service.bundle.Text has it.
    assert max(map(len, datasets.load("coco", tmp_path, "train").classes)) < 1000


def test_an_image_with_nothing_but_objects_outside_of_it_is_nothing_to_learn_from(tmp_path: Path) -> None:
    boxes = [[70.0, 5.0, 9.0, 9.0], [2.0, 2.0, 9.0, 9.0], [-90.0, 0.0, 80.0, 20.0]]
    images = [10, 20, 20]
    write(tmp_path, content_of(SIZES[:2], [annotation(n + 1, images[n], (2, 7, 90)[n], boxes[n]) for n in range(3)]))
    opened = datasets.load("coco", tmp_path, "train")
    assert opened.instances is not None
    assert opened.heading.num_trainable == 1
    assert opened.instances.image_ids.tolist() == [20, 10]
    # The largest that is seen.
    assert opened.labels.tolist() == [1, 0]


def test_preparing_such_a_set_is_refused_for_the_objects_would_be_lost(opened: Manifest, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no room for what coco says of single objects"):
        prepare.prepare(opened, tmp_path / "prepared")
    assert not (tmp_path / "prepared").exists()
