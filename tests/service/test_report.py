"""The report: whole, self-contained, escaped, and patient with what is missing."""

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from service import curves, figures, report
from service.downstream import overlays
from service.downstream.scores import CAM_THRESHOLDS, CENTRE_SHARES, IOU_THRESHOLDS, Tally
from service.downstream.wsol import Example, Result
from service.errors import DataError, StorageError
from tests.service.html_page import Page

HOSTILE = "<script>alert('x')</script>&\"'"


def run_folder(root: Path, name: str = "quickstart", classes: tuple[str, ...] = ("house", "tree")) -> Path:
    folder = root / "run"
    folder.mkdir()
    config = {
        "name": name,
        "data": {"name": "demo"},
        "model": {"name": "resnet_small"},
        "pretext": {"name": "lorot_e", "options": {"grid": 2}},
        "objective": {"name": "multi_task"},
        "tracking": {"uri": "http://someone:secret@tracker:5000"},
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    records = [
        {"step": 10, "time_s": 1.0, "train/loss": 2.5, "train/pretext_accuracy": 0.1, "train/images_per_s": 400},
        {"step": 20, "time_s": 2.0, "train/loss": 1.5, "train/pretext_accuracy": 0.2, "train/images_per_s": 500},
        {"step": 20, "time_s": 2.1, "val/top1": 0.75},
    ]
    lines = [json.dumps(record) for record in records]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 30, "train/lo']))
    summary = {
        "metrics": {"val/top1": 0.8125},
        "wall_s": 275.4,
        "cpu_core_s": 512.0,
        "peak_memory_bytes": 1.5e9,
        "images": 12000,
        "model_name": "lorot-demo",
        "model_version": 3,
        "run_id": "abc123",
        "versions": {"torch": "2.14.1"},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "confusion.json").write_text(json.dumps({"classes": classes, "matrix": [[90, 10], [5, 95]]}))
    Image.new("RGB", (20, 10), (200, 30, 30)).save(folder / "samples.png")
    return folder


def localized(root: Path, label: str = "house") -> Result:
    tally = Tally()
    cam_iou = np.tile(np.where(CAM_THRESHOLDS < 0.42, 0.65, 0.2), (4, 1))
    yes = np.ones(4, bool)
    tally.add(np.array([True, True, True, False]), yes, yes, cam_iou, np.full((4, len(CENTRE_SHARES)), 0.45))
    (root / "examples").mkdir(parents=True)
    Image.new("RGB", (32, 32), (30, 90, 200)).save(root / "examples" / "1.png")
    example = Example(1, label, "tree", 0.625, ((4.0, 4.0, 20.0, 20.0),), (6.0, 6.0, 26.0, 26.0), "examples/1.png")
    result = Result(
        model="lorot-demo",
        version=3,
        run_id="abc123",
        model_uri="models:/lorot-demo/3",
        data="demo",
        split="val",
        digest="0" * 64,
        axis="cam",
        view_size=32,
        scores=tally.scores(),
        wall_s=1.5,
        inference_s=1.0,
        boxes_s=0.1,
        examples=(example,),
        folder=root,
    )
    (root / "wsol.json").write_text(json.dumps(result.to_dict()))
    return result


def test_the_page_shows_what_the_run_left_behind(tmp_path: Path) -> None:
    folder, found = run_folder(tmp_path), localized(tmp_path / "wsol")
    text = report.write(folder, tmp_path / "out" / "report.html", wsol=found.folder).read_text()
    shown = " ".join(" ".join(Page(text).texts).split())
    assert "81.2%" in shown  # the summary's final value, not the last one recorded
    assert "4 min 35 s" in shown
    assert "512 core-seconds" in shown
    assert "1.5 GB" in shown
    assert "lorot-demo, version 3" in shown
    assert "100.0%" in shown  # GT-known
    assert "+100.0 points" in shown  # against a centre box of IoU 0.45 everywhere
    assert "75.00" in shown  # top-1 localization
    assert "house, answered tree" in shown
    assert "10 of 100" in shown  # houses taken for trees
    for title in ("Loss", "Pretext accuracy", "chance", "What the network sees", "What to type next"):
        assert title in shown
    assert "lorot wsol --model models:/lorot-demo@latest --axis iou" in shown
    assert "secret" not in text


def test_the_page_asks_the_network_for_nothing_and_describes_every_picture(tmp_path: Path) -> None:
    folder, found = run_folder(tmp_path), localized(tmp_path / "wsol")
    text = report.write(folder, tmp_path / "report.html", wsol=found.folder).read_text()
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:image/png;base64,") or name not in attributes
        if tag == "img":
            assert attributes["alt"]
        if tag == "svg":
            assert attributes["aria-label"]
    assert "url(" not in text
    assert "@import" not in text
    assert {"img", "svg", "image", "table"} <= {tag for tag, _ in page.tags}


def test_text_from_data_is_escaped(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, name=HOSTILE, classes=(HOSTILE, "tree"))
    found = localized(tmp_path / "wsol", label=HOSTILE)
    text = report.write(folder, tmp_path / "report.html", wsol=found.folder).read_text()
    assert "<script" not in text
    page = Page(text)
    assert HOSTILE in " ".join(page.texts)
    assert any(HOSTILE in (attributes.get("aria-label") or "") for _, attributes in page.tags)


def add_to_summary(folder: Path, **more: object) -> None:
    path = folder / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def test_updates_left_out_are_listed_with_what_was_not_finite_and_the_samples(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    known = [
        {"step": 7, "kind": "loss", "samples": [40, 3], "num_samples": 2},
        {"step": 9, "kind": "gradient", "samples": [5, 6], "num_samples": 1500},
    ]
    # Step 2 was left out by a version that did not write down why.
    add_to_summary(folder, skipped_steps=[2, 7, 9], nonfinite_steps=known)
    (table,) = [
        rows
        for rows in Page(report.write(folder, tmp_path / "report.html").read_text()).tables()
        if rows[0] == ["step", "not finite", "samples"]
    ]
    assert table[1:] == [
        ["2", "not known", "not known"],
        ["7", "loss", "40, 3"],
        ["9", "gradient", "5, 6 and 1,498 more"],
    ]


def test_an_older_summary_names_the_steps_alone(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    add_to_summary(folder, skipped_steps=[2, 7])
    text = report.write(folder, tmp_path / "report.html").read_text()
    assert "2: steps 2, 7" in " ".join(Page(text).texts)
    assert "Updates left out</h2>" not in text


def test_the_error_that_ended_a_run_is_told_as_it_stands(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    message = f"the loss is not finite at step 3, in micro-batches of samples 20, 21\n  {HOSTILE} caf\udce9"
    content = {"type": "NonFiniteLossError", "message": message, "exit_code": 4}
    (folder / "error.json").write_text(json.dumps(content))
    (folder / "summary.json").unlink()
    text = report.write(folder, tmp_path / "report.html").read_text()
    assert "<script" not in text
    page = Page(text)
    assert "Why the last attempt ended" in page.texts
    assert "Exit code 4: non-finite loss." in page.texts
    assert message.replace("\udce9", "?") in page.texts


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"message": 3}', '{"exit_code": 4}'])
def test_a_damaged_word_of_an_error_costs_no_report(tmp_path: Path, content: str) -> None:
    folder = run_folder(tmp_path)
    (folder / "error.json").write_text(content)
    assert "Why the last attempt ended" not in report.write(folder, tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    "missing", ["config.yaml", "metrics.jsonl", "summary.json", "confusion.json", "samples.png", "all"]
)
def test_what_is_missing_is_left_out(tmp_path: Path, missing: str) -> None:
    folder = run_folder(tmp_path)
    for path in list(folder.iterdir()):
        if missing in (path.name, "all"):
            path.unlink()
    text = report.write(folder, tmp_path / "report.html").read_text()
    gone = {
        "samples.png": "What the network sees",
        "confusion.json": "What it mixes up",
        "metrics.jsonl": "Training</h2>",
    }
    for name, heading in gone.items():
        assert (heading in text) == (missing not in (name, "all"))
    assert "Where it looks" not in text


def test_a_run_without_a_pretext_task_has_no_chance_line(tmp_path: Path) -> None:
    history = [{"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": math.nan}, {"step": 3, "train/loss": 0.5}]
    ((title, chart),) = curves.of_run(history)
    assert title == "Loss"
    assert "chance" not in chart
    assert "nan" not in chart


def test_many_classes_are_shown_by_their_worst_pairs(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    classes = [f"class {number}" for number in range(30)]
    matrix = np.eye(30, dtype=int) * 50
    matrix[3, 7] = 20
    (folder / "confusion.json").write_text(json.dumps({"classes": classes, "matrix": matrix.tolist()}))
    text = report.write(folder, tmp_path / "report.html").read_text()
    shown = " ".join(" ".join(Page(text).texts).split())
    assert "class 3 class 7 20 of 70" in shown
    assert "Confusion matrix" not in text


def test_wrong_folders_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such run folder"):
        report.write(tmp_path / "nothing", tmp_path / "report.html")
    folder = run_folder(tmp_path)
    with pytest.raises(DataError, match=r"wsol\.json: no localization results"):
        report.write(folder, tmp_path / "report.html", wsol=tmp_path)
    (folder / "summary.json").write_text("{")
    with pytest.raises(DataError, match=r"summary\.json: cannot be read"):
        report.write(folder, tmp_path / "report.html")
    (folder / "summary.json").unlink()
    with pytest.raises(StorageError, match="cannot write the report"):
        report.write(folder, folder / "config.yaml" / "report.html")


def test_a_curve_runs_from_corner_to_corner() -> None:
    chart = figures.line_chart("y", [figures.Series("one", [(0, 0.0), (5, 0.25), (10, 1.0)])], "x")
    (curve,) = [one for one in ElementTree.fromstring(chart).iter("polyline") if one.get("points")]
    points = [tuple(map(float, point.split(","))) for point in (curve.get("points") or "").split()]
    (left, bottom), (middle, quarter), (right, top) = points
    assert middle == pytest.approx((left + right) / 2)
    assert bottom - quarter == pytest.approx((bottom - top) / 4, abs=0.1)
    assert left < right
    assert top < bottom


def test_a_long_curve_is_thinned_and_keeps_its_end() -> None:
    points = [(step, math.sin(step / 100)) for step in range(10_001)]
    chart = figures.line_chart("y", [figures.Series("one", points)], "x")
    (drawn,) = re.findall(r'points="([^"]*)"', chart)
    assert 100 < len(drawn.split()) <= 302
    assert f"one ends at {figures.short(points[-1][1])}" in chart


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 8))
def test_ticks_are_round_and_span_what_is_shown(low: float, spread: float, about: int) -> None:
    high = low + spread
    if not high > low + abs(low) * 1e-6:
        return
    found = figures.ticks(low, high, about)
    step = found[1] - found[0]
    assert found[0] <= low + step * 1e-6
    assert found[-1] >= high - step * 1e-6
    assert 2 <= len(found) <= about + 2
    assert found == sorted(found)


def test_a_confusion_matrix_holds_every_count_at_its_place() -> None:
    chart = figures.confusion_matrix(("a", "b", "c"), [[5, 0, 1], [0, 7, 0], [2, 0, 6]])
    assert "Confusion matrix: 18 of 21 right" in chart
    assert "c taken for a: 2 of 8" in chart
    numbers = [one.text for one in ElementTree.fromstring(chart).iter("text") if "count" in (one.get("class") or "")]
    assert numbers == ["5", "1", "7", "2", "6"]


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.04, "0.0 s"), (59.9, "59.9 s"), (59.97, "1 min 0 s"), (275.4, "4 min 35 s"), (7260, "2 h 1 min")],
)
def test_durations_read_naturally(seconds: float, expected: str) -> None:
    assert report.duration(seconds) == expected


def test_cam_pictures_draw_true_boxes_green_and_the_found_box_red(tmp_path: Path) -> None:
    photo = np.full((32, 32, 3), 128, np.uint8)
    picture = overlays.Picture(
        photo, np.zeros((32, 32)), np.array([[4.0, 4, 20, 20]]), np.array([8, 8, 30, 30]), "a house\nIoU 0.31"
    )
    path = overlays.write_grid([picture] * 5, tmp_path / "cam.png")
    pixels = np.asarray(Image.open(path).convert("RGB"))
    for colour in (overlays.TRUE_COLOUR, overlays.FOUND_COLOUR):
        y, x = np.nonzero((pixels[:236, :236] == colour).all(axis=2))
        assert len(y) > 100
        box = (4, 4, 20, 20) if colour == overlays.TRUE_COLOUR else (8, 8, 30, 30)
        corners = np.array([x.min(), y.min(), x.max(), y.max()]) - 12
        np.testing.assert_allclose(corners, np.array(box) * 7, atol=3)


def test_a_cold_map_leaves_the_photograph_dull_and_a_hot_one_colours_it() -> None:
    photo = np.full((4, 4, 3), 100, np.uint8)
    assert (overlays.overlay(photo, np.zeros((4, 4))) == 100).all()
    hot = overlays.overlay(photo, np.ones((4, 4)))
    assert (hot[..., 0] > 180).all()


def test_the_thresholds_of_the_charts_are_in_the_grid() -> None:
    assert {0.3, 0.5, 0.7} <= set(IOU_THRESHOLDS.tolist())


def dashes(chart: str) -> dict[str, list[str | None]]:
    """Of each kind of line that is a curve, or stands for one in the legend, its dashes, in order; None: solid."""
    lines = list(ElementTree.fromstring(chart).iter())
    return {
        kind: [one.get("stroke-dasharray") for one in lines if one.tag == kind and "curve" in one.get("class", "")]
        for kind in ("polyline", "line")
    }


def test_curves_are_told_apart_by_their_dashes_too_and_one_alone_is_solid() -> None:
    series = [figures.Series(f"run {number}", [(0, 0.0), (1, number)]) for number in range(6)]
    assert dashes(figures.line_chart("y", series[:1], "x")) == {"polyline": [None], "line": [None]}
    found = dashes(figures.line_chart("y", series, "x"))
    assert len(set(found["polyline"])) == 6
    assert found["polyline"][0] is None
    assert found["line"] == found["polyline"]
    # A reference is one line more, and not like the curve that it is for.
    chance = figures.Series("chance", [(0, 0.25), (1, 0.25)], is_reference=True)
    reference = figures.line_chart("y", [series[0], chance], "x")
    assert len(set(dashes(reference)["polyline"])) == 2
    assert len(re.findall("<circle", reference)) == 1


def test_a_curve_that_keeps_its_colour_keeps_its_dashes_and_looks_like_its_swatch() -> None:
    series = [figures.Series(f"run {number}", [(0, 0.0), (1, 1.0)], colour=number) for number in (1, 4)]
    found = dashes(figures.line_chart("y", series, "x"))["polyline"]
    assert found == [dashes(figures.swatch(number))["line"][0] for number in (1, 4)]
    assert 'class="key s4"' in figures.swatch(4)
