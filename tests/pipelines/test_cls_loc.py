"""The challenge's table of boxes, read as the XML files of the same images are."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import cls_loc, datasets
from pipelines.errors import DataError

XML = """<annotation><size><width>40</width><height>30</height></size>{}</annotation>"""
OBJECT = (
    """<object><name>n02</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"""
)
# As the challenge's files have them: a space at the end, and rows in no order.
TABLE = """ImageId,PredictionString
ILSVRC2012_val_00000002,n01 1 2 11 12 
ILSVRC2012_val_00000001,n02 5 6 25 16 n02 0 0 4 4 
"""  # noqa: W291


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    data = tmp_path / "ILSVRC/Data/CLS-LOC"
    for path in ("train/n01/n01_1", "train/n02/n02_1", *(f"val/ILSVRC2012_val_0000000{index}" for index in (1, 2))):
        (data / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (90, 20, 30)).save(data / f"{path}.JPEG")
    return tmp_path


def test_the_table_gives_what_the_xml_files_of_the_same_boxes_give(imagenet: Path) -> None:
    (imagenet / "LOC_val_solution.csv").write_text(TABLE)
    by_table = datasets.load("folder", imagenet, "val")
    notes = imagenet / "ILSVRC/Annotations/CLS-LOC/val"
    notes.mkdir(parents=True)
    for index, boxes in ((1, [(5, 6, 25, 16), (0, 0, 4, 4)]), (2, [(1, 2, 11, 12)])):
        objects = "".join(OBJECT.format(*box) for box in boxes).replace("n02", ("n02", "n01")[index - 1])
        (notes / f"ILSVRC2012_val_0000000{index}.xml").write_text(XML.format(objects))
    by_files = datasets.load("folder", imagenet, "val")
    assert by_table.labels.tolist() == by_files.labels.tolist() == [1, 0]
    for sample in range(2):
        assert by_table.boxes(sample).tolist() == by_files.boxes(sample).tolist()
    assert by_table.boxes(0).tolist() == [[5, 6, 25, 16], [0, 0, 4, 4]]
    assert by_table.digest == by_files.digest


def test_a_table_of_another_place_is_taken_by_its_name(imagenet: Path) -> None:
    (imagenet / "boxes").mkdir()
    (imagenet / "boxes/mine.csv").write_text(TABLE)
    found = datasets.load("folder", imagenet, "val", annotations="boxes/mine.csv")
    assert found.boxes(1).tolist() == [[1, 2, 11, 12]]
    with pytest.raises(DataError, match=r"other\.csv: no such folder of annotations, and no table"):
        datasets.load("folder", imagenet, "val", annotations="boxes/other.csv")


def test_a_changed_table_makes_the_manifest_anew(imagenet: Path) -> None:
    (imagenet / "LOC_val_solution.csv").write_text(TABLE)
    assert datasets.load("folder", imagenet, "val").boxes(1).tolist() == [[1, 2, 11, 12]]
    (imagenet / "LOC_val_solution.csv").write_text(TABLE.replace("n01 1 2", "n01 3 2"))
    assert datasets.load("folder", imagenet, "val").boxes(1).tolist() == [[3, 2, 11, 12]]


def test_an_image_that_the_table_leaves_out_has_no_box(imagenet: Path) -> None:
    (imagenet / "LOC_train_solution.csv").write_text("ImageId,PredictionString\nn02_1,n02 1 1 9 9\n")
    found = datasets.load("folder", imagenet, "train")
    assert [found.boxes(sample).tolist() for sample in range(2)] == [[], [[1, 1, 9, 9]]]


def test_a_row_of_the_table_that_may_be_about_several_images_is_an_error_until_it_says_which(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (40, 30)).save(tmp_path / f"val/{name}/1.jpg")
    table = tmp_path / "LOC_val_solution.csv"
    table.write_text("ImageId,PredictionString\n1,n01 1 2 11 12\n")
    with pytest.raises(DataError, match=r"csv: '1' may be about val/cat/1\.jpg or val/dog/1\.jpg; .*as CLASS/STEM"):
        datasets.load("folder", tmp_path, "val")
    table.write_text("ImageId,PredictionString\ndog/1,n01 1 2 11 12\n")
    found = datasets.load("folder", tmp_path, "val")
    assert [found.boxes(sample).tolist() for sample in range(2)] == [[], [[1, 2, 11, 12]]]


def test_an_empty_folder_of_annotations_does_not_hide_the_table(imagenet: Path) -> None:
    (imagenet / "ILSVRC/Annotations/CLS-LOC/val").mkdir(parents=True)
    (imagenet / "LOC_val_solution.csv").write_text(TABLE)
    assert datasets.load("folder", imagenet, "val").boxes(1).tolist() == [[1, 2, 11, 12]]


@pytest.mark.parametrize("rows", ["", "ILSVRC2012_test_00000001,n01 1 2 11 12\n"])
def test_a_table_that_is_about_none_of_the_images_is_an_error(imagenet: Path, rows: str) -> None:
    (imagenet / "LOC_train_solution.csv").write_text(f"ImageId,PredictionString\n{rows}")
    with pytest.raises(DataError, match=r"LOC_train_solution\.csv: is about none of the 2 images"):
        datasets.load("folder", imagenet, "train")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "first line"),
        (b"a,b\nx,n1 1 2 3 4\n", "first line"),
        (b"ImageId,PredictionString\nx,n1 1 2 3\n", "line 2: wants"),
        (b"ImageId,PredictionString\nx,n1 1 2 3 4\nx,n1 1 2 3 4\n", "line 3: x stands in it twice"),
        (b"ImageId,PredictionString\nx,n1 1 2 3 wide\n", "line 2: could not convert"),
        (b"ImageId,PredictionString\nx,n1 1 2 3 nan\n", "line 2: a corner that is not finite"),
        (b"ImageId,PredictionString\nx,a,b 1 2 3 4\n", "line 2: .* a synset that is none"),
        (b"ImageId,PredictionString\nx\n", "line 2: wants"),
        (b"\xff\xfe\x00", "no text"),
    ],
)
def test_a_damaged_table_is_an_error_that_names_the_line(content: bytes, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(DataError, match=rf"t\.csv: no table of CLS-LOC boxes, .*{complaint}"):
        cls_loc.read_solution(tmp_path / "t.csv")


def test_empty_lines_and_windows_line_ends_do_no_harm() -> None:
    found = cls_loc.parse_solution(b"\xef\xbb\xbfImageId,PredictionString\r\nx,n1 1 2.5 3 4\r\n\r\n")
    assert list(found) == ["x"]
    assert found["x"].names == ("n1",)
    np.testing.assert_array_equal(found["x"].boxes, np.array([[1, 2.5, 3, 4]], np.float32))


def test_a_table_too_large_to_be_one_is_not_read_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cls_loc, "_MAX_TABLE_BYTES", 10)
    with pytest.raises(ValueError, match="it has 11 bytes"):
        cls_loc.parse_solution(bytes(11))
