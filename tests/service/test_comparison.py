"""Who is compared, what is used again, what is measured, and what the table says of it."""

import csv
import dataclasses
import io
import json
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console
from small_model import written

from service import registry
from service.comparison import charts, course, entrants, files, job, table, terminal
from service.comparison.course import Entry, Outcome, StopError, Wish
from service.comparison.entrants import Entrant, Field, Group
from service.comparison.measurement import Images, Missing, Place, Result
from service.errors import CheckpointError, ConfigError, DataError, JobError
from service.lineage import Earlier
from service.resolution import Resolved
from tests.service.compared_models import card, methods, trained

IMAGES = Images("demo", "val", "d" * 64, 100)


# Groups


def test_models_of_one_method_are_a_group_and_the_one_without_a_pretext_task_comes_first(
    place: str, tmp_path: Path
) -> None:
    models = methods(tmp_path)
    found = entrants.gather([*models[2:], *models[:2]])
    assert [group.name for group in found.groups] == ["Baseline", "LoRot-E"]
    assert [[one.seed for one in group.entrants] for group in found.groups] == [[0, 1], [0, 1]]
    assert [one.title for one in found.groups[0].entrants] == ["none 1", "none 2"]
    assert found.notices == ()


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"pretext_options": {"grid": 4}}, ["LoRot-E", "LoRot-E, grid 4"]),
        ({"data_digest": "e" * 64}, ["LoRot-E, data dddddddd", "LoRot-E, data eeeeeeee"]),
        ({"pretext_options": {"grid": 2}}, ["LoRot-E"]),
    ],
)
def test_groups_are_told_apart_by_what_their_cards_say(
    place: str, tmp_path: Path, change: dict[str, object], names: list[str]
) -> None:
    first = trained(tmp_path, card("lorot_e"), 0, weights=0)
    second = trained(tmp_path, card("lorot_e", **change), 1, weights=1)
    found = entrants.gather([first, second])
    assert [group.name.replace("lorot_e (multi_task), grid 4", "LoRot-E, grid 4") for group in found.groups] == names


def test_stated_groups_are_kept_as_they_are_stated(place: str, tmp_path: Path) -> None:
    models = methods(tmp_path)
    found = entrants.gather(models[:1], {"mine": models[1:3]})
    assert {group.name: (len(group.entrants), group.is_stated) for group in found.groups} == {
        "Baseline": (1, False),
        "mine": (2, True),
    }
    # Its members are of two methods, and that is told.
    assert "mine: its models differ in pretext, pretext_options, objective" in found.notices
    with pytest.raises(ConfigError, match="make a group of this name"):
        entrants.gather(models[:1], {"Baseline": models[1:3]})
    assert entrants.parse_group("a b=models:/x/1, models:/x/2") == ("a b", ("models:/x/1", "models:/x/2"))
    for wrong in ("models:/x/1", "=models:/x/1", "a="):
        with pytest.raises(ConfigError, match="write NAME="):
            entrants.parse_group(wrong)


def test_weights_count_once_and_in_one_group(place: str, tmp_path: Path) -> None:
    models = methods(tmp_path)
    found = entrants.gather([models[0], "models:/none/1", models[2]])
    assert len(found.groups[0].entrants) == 1
    assert "same weights, and count once" in found.notices[0]
    with pytest.raises(ConfigError, match="same weights, and in two groups"):
        entrants.gather([models[0]], {"mine": ["models:/none/1"]})


def test_all_that_cannot_be_found_is_told_at_once_and_which_there_are(place: str, tmp_path: Path) -> None:
    (model,) = methods(tmp_path, seeds=(0,))[:1]
    with pytest.raises(CheckpointError) as told:
        entrants.gather([model, "models:/none@bset", "models:/absent/1"])
    assert "aliases: best, latest; versions: 1" in str(told.value)
    assert "registered: lorot_e, none" in str(told.value)
    with pytest.raises(ConfigError, match="nothing to compare"):
        entrants.gather([])


def test_a_detector_and_damaged_weights_are_refused(place: str, tmp_path: Path) -> None:
    (tmp_path / "detector").mkdir()
    (tmp_path / "detector" / "detector.json").write_text("{}")
    with pytest.raises(CheckpointError, match="a detector; classifiers are compared"):
        entrants.gather([str(tmp_path / "detector")])
    whole = written(tmp_path / "whole", seed=7)
    weights = whole / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="damaged or incomplete"):
        entrants.gather([str(whole)])


def test_models_of_other_classes_are_refused_but_imagenets_ids_may_stand_for_names(place: str, tmp_path: Path) -> None:
    first = trained(tmp_path, card(), 0, weights=0)
    other = trained(tmp_path, card(classes=("cat", "dog", "owl")), 1, weights=1)
    with pytest.raises(ConfigError, match="not the same \\('eel' and 'owl'\\); compare models of the same classes"):
        entrants.gather([first, other])
    ids = trained(tmp_path, card(classes=("n00000001", "n00000002", "n00000003")), 2, weights=2)
    assert len(entrants.gather([first, ids]).entrants) == 2


def test_what_makes_a_comparison_less_than_it_looks_is_told(place: str, tmp_path: Path) -> None:
    models = [
        trained(tmp_path, card(), 0, weights=0),
        trained(tmp_path, card(), 0, weights=1, duration="8 epochs"),
        trained(tmp_path, card(), None, weights=2, output="elsewhere"),
        trained(tmp_path, card("lorot_e", data_digest="e" * 64), 0, weights=3, **{"optimizer.lr": "0.3"}),
    ]
    told = "\n".join(entrants.gather(models).notices)
    assert "trained differently: duration is 4 epochs, 8 epochs" in told
    assert "not all runs say what their seed was" in told
    assert "2 models were trained with seed 0; they are not paired" in told
    assert "differ in more than their method: optimizer.lr is not said, 0.3" in told
    assert "not all models were trained on the same images" in told
    assert "output" not in told


# The table


def entrant(name: str, seed: int | None, pretext: str = "none", **values: object) -> Entrant:
    own = card(pretext, weights_sha256=f"{name}-{seed}", **values)
    return Entrant(
        f"models:/{name}", Resolved(Path(name), f"models:/{name}/{seed}", name, seed, f"run-{name}-{seed}"), own, seed
    )


def field(seeds: tuple[int, ...] = (0, 1, 2)) -> Field:
    base = tuple(entrant("base", seed, metrics={"val/top1": 0.5 + 0.1 * seed}) for seed in seeds)
    ours = tuple(entrant("ours", seed, "lorot_e", metrics={"val/top1": 0.6 + 0.1 * seed}) for seed in seeds)
    return Field((Group("Baseline", base), Group("LoRot-E", ours)), ())


def result(
    one: Entrant, job: str, variant: str, unlike: tuple[str, ...] = ("another network",), **metrics: float
) -> Result:
    run_id = f"{job}-{one.title}-{variant}".replace(" ", "-")
    named = {
        key.replace("__", "/").replace("_at_", "@").replace("@05", "@0.5"): value for key, value in metrics.items()
    }
    return Result(Place(job, one, variant), run_id, named, IMAGES, unlike, False, datetime(2026, 1, 2, tzinfo=UTC))


def row(found: table.Comparison, kind: str, group: str) -> table.Row:
    (block,) = [block for block in found.blocks if block.kind == kind]
    return next(row for row in block.rows if row.group == group)


def test_a_row_is_the_mean_over_models_of_the_mean_over_their_seeds() -> None:
    known = field()
    values = {(model, seed): 0.1 * model + 0.01 * seed for model in range(3) for seed in (0, 1)}
    results = [
        result(known.groups[0].entrants[model], "detect", str(seed), AP=value)
        for (model, seed), value in values.items()
    ]
    found = table.build(known, ["detect"], Outcome(results, []))
    own = row(found, "detect", "Baseline")
    assert (own.over, own.num_runs) == ("models", 6)
    cell = own.cells[0]
    assert [one.value for one in cell.values] == pytest.approx([0.005, 0.105, 0.205])
    assert cell.spread is not None
    # Not the deviation of six values: two of one model are not independent.
    assert (cell.spread.mean, cell.spread.deviation, cell.spread.count) == pytest.approx((0.105, 0.1, 3))
    assert cell.values[1].run_ids == ("detect-base-1-0", "detect-base-1-1")


def test_of_a_single_model_the_spread_is_that_of_its_seeds() -> None:
    known = field(seeds=(5,))
    results = [
        result(group.entrants[0], "detect", str(seed), AP=0.1 * (number + 1) + 0.01 * seed)
        for number, group in enumerate(known.groups)
        for seed in (0, 1)
    ]
    found = table.build(known, ["detect"], Outcome(results, []))
    own = row(found, "detect", "LoRot-E")
    assert own.over == "seeds"
    pair = own.cells[0].paired
    assert pair is not None
    assert pair.seeds == (0, 1)
    assert pair.mean == pytest.approx(0.1)


def test_pairs_are_of_equal_seeds_and_equal_training_images_only() -> None:
    found = table.build(field(), [], Outcome([], []))
    pair = row(found, "classify", "LoRot-E").cells[0].paired
    assert pair is not None
    assert (pair.seeds, pair.num_above) == ((0, 1, 2), 3)
    assert pair.mean == pytest.approx(0.1)
    assert row(found, "classify", "Baseline").cells[0].paired is None
    known = field()
    twice = (*known.groups[1].entrants[:2], dataclasses.replace(known.groups[1].entrants[2], seed=1))
    found = table.build(Field((known.groups[0], Group("LoRot-E", twice)), ()), [], Outcome([], []))
    # Seed 1 is there twice: only one pair is left, which says nothing of a spread.
    assert row(found, "classify", "LoRot-E").cells[0].paired is None
    other = tuple(
        dataclasses.replace(one, card=dataclasses.replace(one.card, data_digest="e" * 64))
        for one in known.groups[1].entrants
    )
    found = table.build(Field((known.groups[0], Group("LoRot-E", other)), ()), [], Outcome([], []))
    blocks = [block for block in found.blocks if block.kind == "classify"]
    assert [[row.group for row in block.rows] for block in blocks] == [["Baseline"], ["LoRot-E"]]
    assert all(cell.paired is None for block in blocks for row in block.rows for cell in row.cells)


def test_results_on_other_images_have_a_block_of_their_own() -> None:
    known = field(seeds=(0,))
    first, second = (group.entrants[0] for group in known.groups)
    others = dataclasses.replace(
        result(second, "wsol", "paper", max_box_acc=0.9), images=Images("demo", "val", "e" * 64, 100)
    )
    found = table.build(known, ["wsol"], Outcome([result(first, "wsol", "paper", max_box_acc=0.1), others], []))
    blocks = [block for block in found.blocks if block.kind == "wsol"]
    assert [[row.group for row in block.rows] for block in blocks] == [["Baseline"], ["LoRot-E"]]
    assert blocks[0].images != blocks[1].images


def test_a_missing_entry_is_counted_where_it_is_missing() -> None:
    known = field()
    own = known.groups[1].entrants
    missing = Missing(Place("detect", own[0], "0"), "no room", 7)
    found = table.build(known, ["detect"], Outcome([result(own[1], "detect", "0", AP=0.5)], [missing]))
    line = row(found, "detect", "LoRot-E")
    assert (line.num_runs, line.num_missing, len(line.cells[0].values)) == (1, 1, 1)
    assert [row.group for block in found.blocks if block.kind == "detect" for row in block.rows] == ["LoRot-E"]
    with pytest.raises(ConfigError, match="there are 'Baseline', 'LoRot-E'"):
        table.build(known, [], Outcome([], []), baseline="none")
    assert table.build(known, [], Outcome([], []), baseline="LoRot-E").baseline == "LoRot-E"


# Printed numbers


class Cells(HTMLParser):
    """The text of every table cell of a page with the classes of the cell and of the cards around it, and all tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[tuple[str, str, bool]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(f"{tag} {dict(attrs).get('class') or ''}")

    def handle_endtag(self, tag: str) -> None:
        while self.open and not self.open.pop().startswith(f"{tag} "):
            pass

    def handle_data(self, data: str) -> None:
        if data.strip() and self.open and self.open[-1].startswith("td"):
            apart = any("apart" in one for one in self.open)
            self.cells.append((data.strip(), self.open[-1], apart))


def detections(unlike: tuple[str, ...]) -> table.Comparison:
    known = field()
    results = [
        result(one, "detect", "0", unlike, AP=0.25 + 0.01 * one.seed)  # type: ignore[operator]
        for one in known.entrants
    ]
    return table.build(known, ["detect"], Outcome(results, []))


def test_a_printed_number_of_the_same_setting_has_a_column_of_its_own() -> None:
    found = detections(())
    assert [row(found, "detect", name).cells[0].published for name in ("Baseline", "LoRot-E")] == [33.8, 35.2]
    # AP at single thresholds is printed nowhere.
    assert row(found, "detect", "LoRot-E").cells[1].published is None
    (block,) = [block for block in found.blocks if block.kind == "detect"]
    assert (block.apart, block.source) == (None, "LoRot paper, ECCV 2022, table 10")
    cells = Cells(files.page.render(found, [])).cells
    (printed,) = [(kind, apart) for text, kind, apart in cells if text == "35.2"]
    assert printed == ("td printed", False)
    assert not any("printed" in kind for text, kind, _ in cells if "±" in text)


def test_a_printed_number_of_another_setting_stands_apart_and_never_beside_ours() -> None:
    found = detections(("the network is resnet_small, not ResNet-50",))
    for line in (row(found, "detect", name) for name in ("Baseline", "LoRot-E")):
        assert [cell.published for cell in line.cells] == [None, None, None]
    (block,) = [block for block in found.blocks if block.kind == "detect"]
    assert block.source == ""
    assert block.apart is not None
    assert block.apart.rows == {"Baseline": {"AP": 33.8}, "LoRot-E": {"AP": 35.2}}
    assert block.apart.reasons == ("the network is resnet_small, not ResNet-50",)
    cells = Cells(files.page.render(found, list(charts.draw(found)))).cells
    assert [(kind, apart) for text, kind, apart in cells if text == "35.2"] == [("td ", True)]
    assert not any("printed" in kind for _, kind, _ in cells)
    assert not any("reference" in chart for _, _, _, chart in charts.draw(found))
    lines = list(csv.DictReader(io.StringIO(files.as_csv(found))))
    ours = [line for line in lines if line["mean"]]
    theirs = [line for line in lines if line["published_on_other_data_percent"]]
    assert {line["published_percent"] for line in lines} == {""}
    assert not any(line["published_on_other_data_percent"] for line in ours)
    assert not any(line["mean"] for line in theirs)
    console = Console(width=200, record=True, file=io.StringIO())
    terminal.show(found, console)
    (told,) = [line for line in console.export_text().splitlines() if "35.2" in line]
    assert told.startswith("published, on other data")


def test_one_model_of_another_setting_keeps_the_printed_number_away_from_its_whole_group() -> None:
    known = field()
    results = [
        result(one, "detect", "0", ("trained on 3 classes",) if one.title == "ours 2" else (), AP=0.25)
        for one in known.entrants
    ]
    found = table.build(known, ["detect"], Outcome(results, []))
    assert row(found, "detect", "LoRot-E").cells[0].published is None
    assert row(found, "detect", "Baseline").cells[0].published == 33.8
    (block,) = [block for block in found.blocks if block.kind == "detect"]
    assert block.apart is not None
    assert list(block.apart.rows) == ["LoRot-E"]


# Files


def test_the_same_results_give_the_same_files_whoever_measured_them(tmp_path: Path) -> None:
    found = detections(())
    again = dataclasses.replace(
        found,
        outcome=Outcome([dataclasses.replace(one, is_reused=True, ended=None) for one in found.outcome.results], []),
    )
    for name, one in (("first", found), ("second", again)):
        files.write(one, tmp_path / name)
    read = [(tmp_path / name / files.CSV).read_text() for name in ("first", "second")]
    assert read[0] == read[1]
    first, second = (json.loads((tmp_path / name / files.JSON).read_text()) for name in ("first", "second"))
    assert first["table"] == second["table"]
    assert {one["reused"] for one in first["results"]} == {False}
    assert {one["reused"] for one in second["results"]} == {True}
    figures = sorted(path.name for path in (tmp_path / "first" / files.FIGURES).iterdir())
    assert figures == ["classify.svg", "detect.svg"]
    # What belonged to an earlier table is not taken for a part of this one.
    files.write(table.build(field(), [], Outcome([], [])), tmp_path / "first")
    assert [path.name for path in (tmp_path / "first" / files.FIGURES).iterdir()] == ["classify.svg"]


def test_the_page_is_whole_by_itself_and_escapes_names() -> None:
    hostile = "<script>alert('x')</script>&\"'"
    known = field()
    renamed = Field((known.groups[0], dataclasses.replace(known.groups[1], name=hostile)), (hostile,))
    one = known.groups[1].entrants[0]
    outcome = Outcome(
        [result(one, "detect", "0", (hostile,), AP=0.5)], [Missing(Place("wsol", one, "paper"), hostile, 3)]
    )
    found = table.build(renamed, ["detect", "wsol"], outcome)
    text = files.page.render(found, list(charts.draw(found)))
    page = Cells(text)
    assert "script" not in {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not {"src", "href", "srcset"} & attributes.keys()
    assert not re.search(r"url\(|@import", text)
    assert [attributes["colspan"] for tag, attributes in page.tags if tag == "th" and "colspan" in attributes] == []


def test_figures_draw_every_group_and_stand_alone(tmp_path: Path) -> None:
    import xml.etree.ElementTree as ElementTree

    found = detections(())
    files.write(found, tmp_path)
    chart = ElementTree.parse(tmp_path / files.FIGURES / "detect.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    assert chart.tag == f"{space}svg"
    assert len(list(chart.iter(f"{space}circle"))) == 6
    # The printed numbers are of the same setting here.
    assert len(list(chart.iter(f"{space}polygon"))) == 2
    across = [float(dot.get("cx") or "nan") for dot in chart.iter(f"{space}circle")]
    assert across == sorted(across[:3]) * 2
    marks = [text.text for text in chart.iter(f"{space}text")]
    assert {"Baseline", "LoRot-E"} <= set(marks)


# Measuring


@dataclasses.dataclass
class Given:
    """A measurement whose answer is known beforehand."""

    place: Place
    answer: Callable[[], Mapping[str, float]]
    images: Images = IMAGES
    unlike_published: tuple[str, ...] = ("another network",)
    work: str = "nothing"
    asked: int = 0

    def find(self) -> Earlier | None:
        return None

    def expected_s(self) -> float | None:
        return 60.0

    def run(self, say: Callable[[str], object]) -> tuple[str, Mapping[str, float]]:
        self.asked += 1
        return "measured", self.answer()


def failing(error: BaseException) -> Callable[[], Mapping[str, float]]:
    def fail() -> Mapping[str, float]:
        raise error

    return fail


def entries(*answers: Callable[[], Mapping[str, float]]) -> list[Entry]:
    known = field(seeds=tuple(range(len(answers)))).groups[0].entrants
    given = [Given(Place("detect", one, "0"), answer) for one, answer in zip(known, answers, strict=True)]
    return [Entry(one.place, one) for one in given]


def test_one_failure_leaves_the_others_alone_and_is_told() -> None:
    there = entries(lambda: {"AP": 0.5}, failing(DataError("torn.jpg: damaged")), lambda: {"AP": 0.7})
    said: list[str] = []
    saved: list[tuple[int, int]] = []
    outcome = course.run(there, said.append, lambda one: saved.append((len(one.results), len(one.missing))))
    assert [one.metrics["AP"] for one in outcome.results] == [0.5, 0.7]
    assert [(one.reason, one.exit_code) for one in outcome.missing] == [("torn.jpg: damaged", 3)]
    assert (outcome.exit_code, outcome.stopped) == (3, 0)
    # What was measured is on disk before the next begins.
    assert saved == [(1, 2), (1, 2), (2, 1)]
    assert said[0] == "[1 of 3] detection with base 0, seed 0: nothing; about 3 min left"
    assert "failed: detection with base 1, seed 0: torn.jpg: damaged" in said


def test_a_fault_of_the_program_is_noted_as_such() -> None:
    outcome = course.run(entries(failing(ZeroDivisionError("oh"))), print, print)
    assert [(one.reason, one.exit_code) for one in outcome.missing] == [("unexpected ZeroDivisionError: oh", 1)]


@pytest.mark.parametrize(
    ("stop", "code"),
    [(StopError(15), 75), (KeyboardInterrupt(), 130), (JobError("stopped", 75), 75), (JobError("stopped", 130), 130)],
)
def test_a_signal_ends_it_all_and_nothing_more_is_begun(stop: BaseException, code: int) -> None:
    there = entries(lambda: {"AP": 0.5}, failing(stop), lambda: {"AP": 0.7})
    outcome = course.run(there, print, print)
    assert [one.metrics["AP"] for one in outcome.results] == [0.5]
    assert (outcome.exit_code, outcome.stopped, len(outcome.missing)) == (code, code, 2)
    last = there[2].measurement
    assert isinstance(last, Given)
    assert last.asked == 0


def test_what_is_there_is_not_measured_and_what_cannot_be_is_missing() -> None:
    there, impossible, new = entries(failing(AssertionError()), failing(AssertionError()), lambda: {"AP": 0.7})
    there = dataclasses.replace(there, earlier=Earlier("old", {"AP": 0.5}, {}, {}, 0, 1000))
    impossible = dataclasses.replace(
        impossible, measurement=None, problem=Missing(impossible.place, "no such folder", 3)
    )
    outcome = course.run([there, impossible, new], print, print)
    assert [(one.run_id, one.is_reused) for one in outcome.results] == [("old", True), ("measured", False)]
    assert outcome.results[0].ended == datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC)
    assert [one.reason for one in outcome.missing] == ["no such folder"]
    console = Console(width=200, record=True, file=io.StringIO())
    terminal.show_plan([there, impossible, new], console)
    told = console.export_text()
    assert "1 of 3 results are there, 1 to be measured, about 1 min" in told
    assert "run old, 1970-01-01 00:00 UTC" in told
    assert "no such folder" in told


def test_the_classification_alone_needs_no_job(place: str, tmp_path: Path) -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    known = entrants.gather(methods(tmp_path))
    found = job.save(known, Wish(jobs=()), tmp_path / "out", Outcome([], []), None)
    terminal.show(found, console)
    assert "LoRot-E against Baseline, top-1: +10.00" in console.export_text()
    (line, *_) = [line for line in csv.DictReader((tmp_path / "out" / files.CSV).open()) if line["group"] == "LoRot-E"]
    rows = registry.list_models()
    expected = [one.metrics["val/top1"] for one in rows if one.name == "lorot_e"]
    assert float(line["mean"]) == pytest.approx(sum(expected) / 2)
    assert set(line["run_ids"].split()) == {one.run_id for one in rows if one.name == "lorot_e"}
