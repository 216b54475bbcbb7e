import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipelines import cls_loc, datasets, listing
from pipelines.datasets import folder
from pipelines.errors import DataError

ANNOTATION = """<annotation><folder>val</folder><filename>x</filename>
<size><width>{width}</width><height>{height}</height><depth>3</depth></size>
{objects}</annotation>"""
OBJECT = """<object><name>{name}</name><pose>Unspecified</pose>
<bndbox><xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax></bndbox></object>"""


def save(path: Path, width: int = 8, height: int = 6, kind: str = "JPEG", shade: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (shade, 20, 30)).save(path, kind)


def annotate(path: Path, name: str, boxes: list[tuple[int, int, int, int]], width: int = 8, height: int = 6) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    objects = "".join(OBJECT.format(*box, name=name) for box in boxes)
    path.write_text(ANNOTATION.format(width=width, height=height, objects=objects))


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    root = tmp_path / "pets"
    save(root / "train/dog/b.jpg", 10, 20)
    save(root / "train/dog/deep/a.JPEG", 30, 40)
    save(root / "train/cat/z.png", 50, 60, "PNG")
    save(root / "train/bird/1.jpeg", 70, 80)
    (root / "train/cat/notes.txt").write_text("no image")
    save(root / "val/dog/v.jpg")
    return root


def test_labels_paths_and_sizes_are_those_of_the_files(pets: Path) -> None:
    found = datasets.load("folder", pets, "train")
    assert found.classes == found.class_ids == ("bird", "cat", "dog")
    paths = [Path(found.describe(sample)).relative_to(pets / "train") for sample in range(len(found))]
    assert [str(path) for path in paths] == ["bird/1.jpeg", "cat/z.png", "dog/b.jpg", "dog/deep/a.JPEG"]
    assert [found.classes[label] for label in found.labels] == [path.parts[0] for path in paths]
    assert list(zip(found.widths, found.heights, strict=True)) == [(70, 80), (50, 60), (10, 20), (30, 40)]
    assert found.read(1) == (pets / "train/cat/z.png").read_bytes()
    assert not found.has_boxes


def test_all_splits_count_the_classes_of_train(pets: Path) -> None:
    found = datasets.load("folder", pets, "val")
    assert found.classes == ("bird", "cat", "dog")
    assert found.labels.tolist() == [2]


def test_a_class_that_train_does_not_have_is_an_error(pets: Path) -> None:
    save(pets / "val/dgo/v.jpg")
    with pytest.raises(DataError, match=r"val/dgo: no such class in .*train"):
        datasets.load("folder", pets, "val")


def test_an_empty_class_folder_is_named(pets: Path) -> None:
    (pets / "train/fox").mkdir()
    (pets / "train/fox/readme.txt").write_text("soon")
    with pytest.raises(DataError, match=r"train/fox: a class folder without an image \(\.jpg"):
        datasets.load("folder", pets, "train")


def test_missing_data_says_what_is_there_and_what_would_work(pets: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no split 'test'; folders there: train, val.*test/CLASS"):
        datasets.load("folder", pets, "test")
    with pytest.raises(DataError, match=r"no such folder; .*CLASS"):
        datasets.load("folder", tmp_path / "absent", "train")
    (tmp_path / "bare/train").mkdir(parents=True)
    with pytest.raises(DataError, match="neither class folders nor images"):
        datasets.load("folder", tmp_path / "bare", "train")


def test_an_unreadable_image_stays_with_size_zero_for_the_loader_to_decide(pets: Path) -> None:
    (pets / "train/dog/b.jpg").write_bytes(b"\xff\xd8garbage")
    (pets / "train/cat/empty.jpg").write_bytes(b"")
    found = datasets.load("folder", pets, "train")
    sizes = {Path(found.describe(sample)).name: int(found.heights[sample]) for sample in range(len(found))}
    assert sizes == {"1.jpeg": 80, "empty.jpg": 0, "z.png": 60, "b.jpg": 0, "a.JPEG": 40}


def test_a_png_that_is_called_jpeg_is_measured_as_what_it_is(pets: Path) -> None:
    save(pets / "train/dog/c.JPEG", 5, 7, "PNG")
    found = datasets.load("folder", pets, "train")
    assert (int(found.widths[3]), int(found.heights[3])) == (5, 7)


def test_a_header_behind_a_long_profile_is_measured(pets: Path) -> None:
    Image.new("RGB", (9, 7)).save(pets / "train/dog/p.jpg", icc_profile=bytes(100_000))
    found = datasets.load("folder", pets, "train")
    assert (int(found.widths[-1]), int(found.heights[-1])) == (9, 7)
    assert found.describe(len(found) - 1).endswith("p.jpg")


def test_the_manifest_is_kept_and_headers_are_read_once(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = datasets.load("folder", pets, "train")
    monkeypatch.setattr(listing, "read_headers", lambda *_: pytest.fail("read again"))
    again = datasets.load("folder", pets, "train")
    assert again.digest == first.digest
    assert again.path == first.path


def test_a_manifest_made_by_another_way_of_reading_is_made_anew(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = datasets.load("folder", pets, "train").heading.fingerprint
    monkeypatch.setattr(folder, "_READING", folder._READING + 1)
    assert datasets.load("folder", pets, "train").heading.fingerprint != before


@pytest.mark.parametrize("change", ["add", "remove", "rename", "rewrite", "touch"])
def test_any_change_of_the_files_makes_the_manifest_anew(pets: Path, change: str) -> None:
    before = datasets.load("folder", pets, "train")
    old = before.heading.fingerprint
    target = pets / "train/dog/b.jpg"
    about = target.stat()
    if change == "add":
        save(pets / "train/dog/c.jpg")
    elif change == "remove":
        target.unlink()
    elif change == "rename":
        target.rename(pets / "train/cat/b.jpg")
    elif change == "rewrite":
        save(target, 11, 21)
        os.utime(target, ns=(about.st_atime_ns, about.st_mtime_ns + 1))
    else:
        os.utime(target, ns=(about.st_atime_ns, about.st_mtime_ns + 1))
    after = datasets.load("folder", pets, "train")
    assert after.heading.fingerprint != old
    assert (after.digest == before.digest) == (change == "touch")
    if change == "rewrite":
        assert 21 in after.heights


def test_the_digest_depends_on_the_content_and_not_on_the_place_or_time(pets: Path, tmp_path: Path) -> None:
    shutil.copytree(pets, tmp_path / "copy", ignore=shutil.ignore_patterns(".lorot"))
    original = datasets.load("folder", pets, "train").digest
    assert datasets.load("folder", tmp_path / "copy", "train").digest == original
    # Of one size, height and width: only the bytes differ.
    content = bytearray((tmp_path / "copy/train/dog/b.jpg").read_bytes())
    content[200] ^= 1
    (tmp_path / "copy/train/dog/b.jpg").write_bytes(content)
    assert datasets.load("folder", tmp_path / "copy", "train").digest != original


@pytest.mark.parametrize("base", ["ILSVRC/", ""])
def test_imagenets_own_layout_gives_labels_names_and_boxes(base: str, tmp_path: Path) -> None:
    data, notes = tmp_path / f"{base}Data/CLS-LOC", tmp_path / f"{base}Annotations/CLS-LOC"
    save(data / "train/n02012849/n02012849_1.JPEG")
    save(data / "train/n03126707/n03126707_1.JPEG")
    save(data / "train/n03126707/n03126707_2.JPEG")
    annotate(notes / "train/n03126707/n03126707_1.xml", "n03126707", [(1, 2, 5, 6), (0, 0, 3, 3)])
    save(data / "val/ILSVRC2012_val_00000001.JPEG")
    save(data / "val/ILSVRC2012_val_00000002.JPEG", 16, 12)
    annotate(notes / "val/ILSVRC2012_val_00000001.xml", "n03126707", [(0, 0, 8, 6)])
    annotate(notes / "val/ILSVRC2012_val_00000002.xml", "n02012849", [(1, 2, 3, 4)])
    mapping = "n01440764 tench, Tinca tinca\nn02012849 crane\nn03126707 crane, derrick\n"
    (tmp_path / "LOC_synset_mapping.txt").write_text(mapping)

    train = datasets.load("folder", tmp_path, "train")
    assert train.class_ids == ("n02012849", "n03126707")
    assert train.classes == ("crane (n02012849)", "crane (n03126707)")
    assert train.labels.tolist() == [0, 1, 1]
    assert [train.boxes(sample).tolist() for sample in range(3)] == [[], [[1, 2, 5, 6], [0, 0, 3, 3]], []]
    val = datasets.load("folder", tmp_path, "val")
    assert val.labels.tolist() == [1, 0]
    # The second image is twice the size of the one that was annotated.
    assert [val.boxes(sample).tolist() for sample in range(2)] == [[[0, 0, 8, 6]], [[2, 4, 6, 8]]]


def test_boxes_are_found_for_validation_images_sorted_into_class_folders(tmp_path: Path) -> None:
    save(tmp_path / "train/n1/n1_1.JPEG")
    save(tmp_path / "val/n1/ILSVRC2012_val_00000001.JPEG")
    annotate(tmp_path / "Annotations/CLS-LOC/val/ILSVRC2012_val_00000001.xml", "n1", [(1, 1, 4, 4)])
    assert datasets.load("folder", tmp_path, "val").boxes(0).tolist() == [[1, 1, 4, 4]]
    annotate(tmp_path / "elsewhere/ILSVRC2012_val_00000001.xml", "n1", [(2, 2, 4, 4)])
    for given in ("elsewhere", "elsewhere/", "./elsewhere"):
        assert datasets.load("folder", tmp_path, "val", annotations=given).boxes(0).tolist() == [[2, 2, 4, 4]]
    with pytest.raises(DataError, match="no such folder of annotations"):
        datasets.load("folder", tmp_path, "val", annotations="nowhere")


def test_annotations_of_equal_names_in_different_classes_stay_apart(tmp_path: Path) -> None:
    for name, corner in (("a", 1), ("b", 2)):
        save(tmp_path / f"train/{name}/001.jpg")
        annotate(tmp_path / f"Annotations/CLS-LOC/train/{name}/001.xml", name, [(corner, 0, 5, 5)])
    found = datasets.load("folder", tmp_path, "train")
    assert [found.boxes(sample)[0, 0] for sample in range(2)] == [1, 2]


def test_an_image_never_has_the_boxes_of_another_one_of_its_name(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        save(tmp_path / f"val/{name}/1.jpg")
    notes = tmp_path / "Annotations/CLS-LOC/val"
    annotate(notes / "cat/1.xml", "cat", [(1, 0, 5, 5)])
    found = datasets.load("folder", tmp_path, "val")
    assert [found.boxes(sample).tolist() for sample in range(2)] == [[[1, 0, 5, 5]], []]
    # Not even where its own image is away, and the stem is the dog's alone.
    (tmp_path / "val/cat/1.jpg").rename(tmp_path / "val/cat/2.jpg")
    annotate(notes / "cat/2.xml", "cat", [(2, 0, 5, 5)])
    found = datasets.load("folder", tmp_path, "val")
    assert [found.boxes(sample).tolist() for sample in range(2)] == [[[2, 0, 5, 5]], []]
    # A file that does not say which of two.
    save(tmp_path / "val/cat/1.jpg")
    annotate(notes / "1.xml", "dog", [(3, 0, 5, 5)])
    with pytest.raises(
        DataError, match=r"CLS-LOC/val: '1' may be about val/cat/1\.jpg or val/dog/1\.jpg; .*CLASS/STEM"
    ):
        datasets.load("folder", tmp_path, "val")


def test_two_annotations_or_two_images_of_one_name_are_an_error(tmp_path: Path) -> None:
    save(tmp_path / "val/cat/1.jpg")
    save(tmp_path / "val/cat/1.png", kind="PNG")
    annotate(tmp_path / "notes/cat/1.xml", "cat", [(1, 0, 5, 5)])
    with pytest.raises(DataError, match=r"'cat/1' may be about val/cat/1\.jpg or val/cat/1\.png"):
        datasets.load("folder", tmp_path, "val", annotations="notes")
    (tmp_path / "val/cat/1.png").unlink()
    annotate(tmp_path / "notes/more/cat/1.xml", "cat", [(1, 0, 5, 5)])
    with pytest.raises(DataError, match=r"notes/more/cat/1\.xml: .*notes/cat/1\.xml is about the same image"):
        datasets.load("folder", tmp_path, "val", annotations="notes")


def test_annotations_that_are_about_none_of_the_images_are_an_error(tmp_path: Path) -> None:
    save(tmp_path / "val/cat/1.jpg")
    annotate(tmp_path / "Annotations/CLS-LOC/val/dog/1.xml", "dog", [(1, 0, 5, 5)])
    with pytest.raises(
        DataError, match=r"CLS-LOC/val: is about none of the 1 images in val, as val/cat/1\.jpg; remove"
    ):
        datasets.load("folder", tmp_path, "val")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: holds no XML file; leave the option out"):
        datasets.load("folder", tmp_path, "val", annotations="empty")


@pytest.mark.parametrize("split", ["", ".", "..", "../pets", "/"])
def test_a_split_without_a_name_of_its_own_is_refused(split: str, pets: Path) -> None:
    with pytest.raises(DataError, match=r"no split .*; folders there: train, val"):
        datasets.load("folder", pets, split)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("annotated", ["as stored", "as stored, at half the size", "without a size", "as shown"])
def test_boxes_lie_on_the_image_as_it_is_shown(orientation: int, annotated: str, tmp_path: Path) -> None:
    pixels = np.zeros((24, 40, 3), np.uint8)
    pixels[4:10, 6:30] = 255
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / "train/n1/n1_1.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(pixels).save(path, exif=exif)
    with Image.open(path) as image:
        rows, columns = np.asarray(ImageOps.exif_transpose(image)).any(axis=2).nonzero()
    want = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    box, size = (6, 4, 30, 10), {"width": 40, "height": 24}
    if annotated == "as shown":
        if orientation < 5:
            # Nothing tells it from the other ways.
            return
        box, size = tuple(int(corner) for corner in want), {"width": 24, "height": 40}
    elif annotated == "as stored, at half the size":
        box, size = (3, 2, 15, 5), {"width": 20, "height": 12}
    elif annotated == "without a size":
        size = {"width": 0, "height": 0}
    annotate(tmp_path / "Annotations/CLS-LOC/train/n1/n1_1.xml", "n1", [box], **size)
    found = datasets.load("folder", tmp_path, "train")
    assert found.boxes(0).tolist() == [want]
    assert (found.widths[0], found.heights[0]) == ((24, 40) if orientation >= 5 else (40, 24))


@pytest.mark.parametrize("name", ["a.webp", "a.BMP", "a.gif", "a.TIF", "a.tiff", "a.ppm", "a.PNG", "a.JPEG"])
def test_every_usual_ending_is_taken_whatever_it_holds(name: str, pets: Path) -> None:
    save(pets / "train/bird" / name, 12, 9, "GIF")
    found = datasets.load("folder", pets, "train")
    where = [Path(found.describe(sample)).name for sample in range(len(found))].index(name)
    assert (found.widths[where], found.heights[where]) == (12, 9)


def test_a_flat_folder_without_annotations_says_what_would_work(tmp_path: Path) -> None:
    save(tmp_path / "val/x.jpg")
    with pytest.raises(DataError, match=r"x\.jpg: lies in no class folder.*sort"):
        datasets.load("folder", tmp_path, "val")


def test_an_annotation_with_entities_is_refused_unexpanded() -> None:
    bomb = b'<!DOCTYPE a [<!ENTITY x "n1"><!ENTITY y SYSTEM "file:///etc/passwd">]><a><object><name>&x;</name></object></a>'
    with pytest.raises(ValueError, match="document type"):
        cls_loc.parse(bomb)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"<a><b></a>", "no XML"),
        (b"<a><object><bndbox><xmin>1</xmin></bndbox></object></a>", "lacks its ymin"),
        (b"<a><object><bndbox><xmin>one</xmin></bndbox></object></a>", "one"),
        (b"<a>" + b" " * (1 << 20) + b"</a>", "bytes"),
        (b"<a><size><width>-8</width><height>6</height></size></a>", "-8 pixels wide and 6 high"),
        (b"<a><size><width>8</width><height>-6</height></size></a>", "8 pixels wide and -6 high"),
    ],
)
def test_a_bad_annotation_is_an_error_that_names_the_file(content: bytes, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "x.xml").write_bytes(content)
    with pytest.raises(DataError, match=rf"x\.xml.*{complaint}"):
        cls_loc.read(tmp_path / "x.xml")


def test_boxes_are_clipped_to_the_image_and_empty_ones_left_out() -> None:
    note = cls_loc.Annotation(("a",) * 3, np.array([[-2, 1, 20, 5], [3, 3, 3, 4], [9, 0, 12, 6]], np.float32), 6, 8)
    assert cls_loc.fit(note, 6, 8).tolist() == [[0, 1, 8, 5]]


def test_links_are_followed_once_and_hidden_files_left_out(pets: Path) -> None:
    (pets / "train/dog/loop").symlink_to(pets / "train/dog")
    save(pets / "train/dog/.hidden.jpg")
    save(pets / "elsewhere/e.jpg")
    (pets / "train/fox").symlink_to(pets / "elsewhere")
    found = datasets.load("folder", pets, "train")
    names = sorted(Path(found.describe(sample)).name for sample in range(len(found)))
    assert names == ["1.jpeg", "a.JPEG", "b.jpg", "e.jpg", "z.png"]


def test_any_text_may_be_a_name_but_bytes_that_are_no_text_are_refused(pets: Path) -> None:
    save(pets / "train/dog/ä 犬.jpg")
    found = datasets.load("folder", pets, "train")
    assert any(found.describe(sample).endswith("ä 犬.jpg") for sample in range(len(found)))
    shutil.copy(pets / "train/dog/b.jpg", os.fsencode(pets) + b"/train/dog/\xff.jpg")
    with pytest.raises(DataError, match="not UTF-8; rename"):
        datasets.load("folder", pets, "train")


def test_unknown_data_sets_and_options_are_errors_with_the_nearest_name(pets: Path) -> None:
    with pytest.raises(DataError, match=r"did you mean 'folder'.*cifar10"):
        datasets.load("foldr", pets, "train")
    with pytest.raises(DataError, match=r"no option 'anotations'; did you mean 'annotations'"):
        datasets.load("folder", pets, "train", anotations="x")


def test_every_data_set_offers_load_and_says_where_its_files_come_from() -> None:
    assert set(datasets.available()) == {"cifar10", "cifar100", "coco", "demo", "fashion_mnist", "folder", "prepared"}
    for name in datasets.available():
        assert isinstance(datasets.options(name), dict)
