"""What counts as the same result: the same weights, images and settings, and nothing else. And the command's words."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from small_scenes import RETINANET, drawn

from pipelines import datasets
from service import lineage, tracking
from service.comparison import course, detecting, entrants, job, localizing, wishes
from service.comparison.course import Wish
from service.comparison.detecting import Detector
from service.comparison.entrants import Entrant
from service.comparison.localizing import Localization, Settings
from service.errors import ConfigError, DataError
from tests.service.compared_models import QUIET, card, trained

DEMO = {"train_count": 6, "val_count": 6, "size": 48, "classes": 3}
SHORT = ("duration=4 steps", "schedule.warmup=1 steps", "schedule.milestones=[3 steps]")
SMALL = ("data.short_sides=[64]", "data.long_side=96", "device=cpu", "micro_batch=2", "global_batch=4")
DETECT = (*SMALL, *SHORT, f"model.options={json.dumps(RETINANET)}")


@pytest.fixture
def model(place: str, tmp_path: Path) -> Entrant:
    """A model that was trained on drawn objects of these very classes, and evaluated on the others."""
    return registered(tmp_path, 0)


def registered(folder: Path, weights: int) -> Entrant:
    classes = tuple(datasets.load("demo", folder / "demo", "val", **DEMO).classes)
    own = card(data="demo", data_options=DEMO, root=str(folder / "demo"), split="val", classes=classes)
    (found,) = entrants.gather([trained(folder, own, 3, weights=weights)]).entrants
    return found


def localization(model: Entrant, protocol: str = "paper", **values: Any) -> Localization:
    return localizing.prepare(model, protocol, Settings(**values), None, "lorot")


def recorded(known: Localization, folder: Path) -> str:
    run_id, notice = lineage.log_downstream(
        known.place.entrant.resolved,
        "wsol",
        {"max_box_acc": 0.5, "images_per_s": 3.0},
        tracking_config=QUIET,
        folder=folder,
        params=known.about,
        tags={lineage.DATA: known.images.digest},
    )
    assert notice == ""
    return run_id


def test_a_localization_is_used_again_for_the_same_weights_images_and_protocol(model: Entrant, tmp_path: Path) -> None:
    known = localization(model)
    assert (known.images.count, known.place.variant) == (6, "paper")
    assert known.find() is None
    assert known.expected_s() is None
    run_id = recorded(known, tmp_path / "wsol")
    found = known.find()
    assert found is not None
    assert (found.run_id, found.metrics["max_box_acc"]) == (run_id, 0.5)
    assert found.began_ms is not None
    assert found.ended_ms is not None
    assert 0 < found.began_ms <= found.ended_ms
    # Neither how many at a time nor by which loader.
    assert localization(model, batch_size=3, loader="torch").find() is not None
    for other in (
        localization(model, "official"),
        localization(model, limit=4),
        localization(model, component="contours"),
        localization(model, options=DEMO | {"seed": 1}),
        localization(model, split="train"),
        localization(registered(tmp_path, 1)),
    ):
        assert other.find() is None
    # Six images at three a second, as recorded.
    assert localization(model, "official").expected_s() == pytest.approx(2.0)
    assert "trained on demo of 3 classes, not on ImageNet" in known.unlike_published
    assert "measured on demo, not on ImageNet" in known.unlike_published


def test_images_without_boxes_or_of_other_classes_cannot_be_localized(model: Entrant) -> None:
    with pytest.raises(DataError, match="has 4 classes, models:/small/1 knows 3"):
        localization(model, options=DEMO | {"classes": 4})


def detector(model: Entrant, root: Path, *overrides: str, seed: int | None = 0) -> Detector:
    settings = detecting.Settings(root=str(root), overrides=(*DETECT, *overrides))
    return detecting.prepare("detect", model, seed, settings, None)


def finished(known: Detector, folder: Path) -> str:
    done = known.transfer.job
    tags = lineage.run_tags(known.transfer.resolved, "detect", config_digest=done.digest)
    run = tracking.open_run(QUIET, name=done.name, folder=folder, tags=tags | {lineage.DATA: known.images.digest})
    run.log_params(done.model_dump(mode="json"))
    run.log_metrics({"detect/AP": 0.5}, step=0)
    assert run.finish() == ""
    return run.run_id


def test_a_detector_is_used_again_for_the_same_weights_data_seed_and_settings(model: Entrant, tmp_path: Path) -> None:
    scenes = drawn(tmp_path / "scenes", train=4, val=3)
    known = detector(model, scenes)
    assert (known.place.variant, known.num_steps, known.images.count) == ("0", 4, 3)
    assert known.find() is None
    run_id = finished(known, tmp_path / "detect")
    found = known.find()
    assert found is not None
    assert (found.run_id, found.metrics) == (run_id, {"AP": 0.5})
    # Where and how it runs makes no other result.
    for same in (detector(model, scenes, "workers=2"), detector(model, scenes, "output=elsewhere")):
        assert same.find() is not None
    for other in (
        detector(model, scenes, seed=1),
        detector(model, scenes, "optimizer.lr=0.02"),
        detector(model, scenes, "micro_batch=1"),
        detector(model, drawn(tmp_path / "others", train=5, val=3)),
        detector(model, drawn(tmp_path / "more", train=4, val=4)),
        detector(registered(tmp_path, 1), scenes),
    ):
        assert other.find() is None
        assert other.transfer.job.name != known.transfer.job.name
    # Of the same length on the same data, whatever else.
    assert detector(model, scenes, "optimizer.lr=0.02", seed=5).expected_s() is not None
    assert detector(model, scenes, "duration=5 steps").expected_s() is None
    # The launcher and its workers read the same job, with its own name.
    from service import config

    assert config.load_any(known.transfer.path, list(known.transfer.overrides)) == known.transfer.job
    assert known.transfer.job.name.startswith("detect-small-1-seed0-")


def test_an_interrupted_run_is_gone_on_with_and_a_finished_folder_elsewhere_is_not_taken(
    model: Entrant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = detector(model, drawn(tmp_path / "scenes", train=4, val=3))
    seen: list[bool] = []

    def run(_: Any, *, resume: bool, say: Any) -> dict[str, Any]:
        seen.append(resume)
        return {"record_id": "r", "scores": {"AP": 0.5}}

    monkeypatch.setattr(detecting.transfer, "run", run)
    assert known.run(print) == ("r", {"AP": 0.5})
    (known.transfer.job.folder / "checkpoints" / "step-00000002").mkdir(parents=True)
    known.run(print)
    assert seen == [False, True]


@pytest.mark.parametrize("override", ["name=mine", "job=segment", "model.backbone=models:/small/1", "seed=3"])
def test_what_the_comparison_says_itself_cannot_be_overridden(model: Entrant, tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="says that itself, for each model and seed"):
        detector(model, tmp_path, override)


def test_all_entries_are_looked_at_before_anything_runs_and_a_dry_run_writes_nothing(
    model: Entrant, tmp_path: Path
) -> None:
    wish = Wish(
        jobs=("wsol", "detect"),
        seeds=(0, 1),
        root={"detect": str(tmp_path / "nowhere")},
        overrides={"detect": DETECT, "wsol": ("limit=4",)},
    )
    known = entrants.gather([model.asked])
    found = course.prepare(known, wish)
    assert [(one.place.job, one.place.variant) for one in found] == [
        ("wsol", "paper"),
        ("wsol", "official"),
        ("detect", "0"),
        ("detect", "1"),
    ]
    assert [one.problem is None for one in found] == [True, True, False, False]
    assert found[2].problem is not None
    assert "nowhere" in found[2].problem.reason
    assert found[2].problem.exit_code == 3
    there = sorted(tmp_path.iterdir())
    console = Console(width=200, record=True, file=io.StringIO())
    assert job.run([model.asked], wish, output=tmp_path / "out", dry_run=True, console=console) == 0
    assert "0 of 4 results are there, 2 to be measured" in console.export_text()
    assert sorted(tmp_path.iterdir()) == there
    with pytest.raises(ConfigError, match="short_side: unknown key"):
        course.prepare(known, dataclasses.replace(wish, overrides={"detect": ("data.short_side=3",)}))
    longer = (*DETECT, f"data.root={drawn(tmp_path / 'scenes', train=4, val=3)}", "schedule.warmup=9 steps")
    with pytest.raises(ConfigError, match=r"schedule.warmup: '9 steps' ends at step 9 of 4"):
        course.prepare(known, dataclasses.replace(wish, root={}, overrides={"detect": longer}))
    with pytest.raises(ConfigError, match="there are paper, official"):
        course.prepare(known, dataclasses.replace(wish, overrides={"wsol": ("protocols=[printed]",)}))
    with pytest.raises(ConfigError, match="its keys are data, root"):
        course.prepare(known, dataclasses.replace(wish, overrides={"wsol": ("protocol=paper",)}))


def test_words_with_a_key_are_overrides_and_the_others_are_models() -> None:
    words = ["models:/a@best", "seed.x=1", "models:/b/2", "wsol.limit=4", "runs:/abc", "folder/of=odd name"]
    models, overrides = wishes.apart(words)
    assert models == ("models:/a@best", "models:/b/2", "runs:/abc", "folder/of=odd name")
    assert overrides == ("seed.x=1", "wsol.limit=4")


def test_what_is_said_of_no_job_is_for_the_detectors_or_for_localization_if_that_is_all() -> None:
    found = wishes.wish(
        "segment, wsol,detect",
        seeds="0,3",
        configs=["detect=a.yaml"],
        data=["coco"],
        root=["/scenes", "wsol=/photos"],
        overrides=["duration=4 steps", "segment.seed=3", "wsol.limit=4"],
    )
    assert (found.jobs, found.seeds) == (("wsol", "detect", "segment"), (0, 3))
    assert found.configs == {"detect": Path("a.yaml")}
    assert found.data == {"detect": "coco", "segment": "coco"}
    assert found.root == {"detect": "/scenes", "segment": "/scenes", "wsol": "/photos"}
    assert found.overrides == {
        "detect": ("duration=4 steps",),
        "segment": ("duration=4 steps", "seed=3"),
        "wsol": ("limit=4",),
    }
    alone = wishes.wish("wsol", root=["/photos"], overrides=["limit=4"])
    assert (alone.root, alone.overrides, alone.seeds) == ({"wsol": "/photos"}, {"wsol": ("limit=4",)}, None)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"jobs": "wsol,detct"}, "did you mean 'detect'"),
        ({"jobs": " , "}, "name some of wsol, detect, segment"),
        ({"jobs": "wsol", "configs": ["a.yaml"]}, "write JOB=FILE"),
        ({"jobs": "wsol", "root": ["detect=/scenes"]}, "--jobs has no detect; it has wsol"),
        ({"jobs": "wsol", "overrides": ["detect.seed=3"]}, "--jobs has no detect"),
        ({"jobs": "detect", "root": ["/a", "detect=/b"]}, "given twice for detect: /a and /b"),
        ({"jobs": "detect", "seeds": "0,-1"}, "write whole numbers"),
        ({"jobs": "detect", "seeds": "1,1"}, "there twice"),
    ],
)
def test_words_that_cannot_be_are_told_what_would_work(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        wishes.wish(given.pop("jobs"), **given)
