"""What was found out about a model: recorded below its run, and found again by weights, data and settings."""

import dataclasses
from pathlib import Path
from typing import Any

from small_model import CARD, written

from service import bundle, lineage, registry, tracking
from service.config import TrackingConfig
from service.resolution import Resolved


def trained(folder: Path, seed: int = 0) -> tuple[Resolved, str]:
    """A bundle that some run has left, and its weights' checksum."""
    place = written(folder / f"model-{seed}", dataclasses.replace(CARD, run_id="abc"), seed)
    return registry.resolve(str(place)), bundle.read_card(place).weights_sha256


def measured(resolved: Resolved, folder: Path, value: float, **values: Any) -> str:
    given = {"params": {"axis": "cam"}, "tags": {"data_digest": "d1"}} | values
    run_id, notice = registry.log_downstream(
        resolved, "wsol", {"gt_known@0.5": value}, tracking_config=TrackingConfig(), folder=folder, **given
    )
    assert notice == ""
    return run_id


def test_a_result_is_found_by_weights_data_and_settings_and_only_by_all_of_them(place: str, tmp_path: Path) -> None:
    resolved, weights = trained(tmp_path)
    other, other_weights = trained(tmp_path, seed=1)
    config_digest = lineage.provenance.digest({"axis": "cam"})

    def find(weights_sha256: str = weights, **values: str) -> list[lineage.Earlier]:
        known = {"data_digest": "d1", "config_digest": config_digest} | values
        return registry.find_downstream(known.pop("job", "wsol"), weights_sha256, **known)

    assert find() == []
    first = measured(resolved, tmp_path / "first", 0.25)
    measured(resolved, tmp_path / "other-data", 0.3, tags={"data_digest": "d2"})
    measured(resolved, tmp_path / "other-settings", 0.4, params={"axis": "iou"})
    measured(other, tmp_path / "other-model", 0.5)
    (found,) = find()
    assert (found.run_id, found.metrics, found.params) == (first, {"gt_known@0.5": 0.25}, {"axis": "cam"})
    assert found.tags["model.uri"] == resolved.uri
    assert find(other_weights)[0].metrics == {"gt_known@0.5": 0.5}
    for nothing in (find("0" * 64), find(job="detect"), find(data_digest="d3"), find(config_digest="c")):
        assert nothing == []
    again = measured(resolved, tmp_path / "again", 0.75)
    assert [one.run_id for one in find()] == [again, first]


def test_a_run_that_did_not_end_well_is_no_result(place: str, tmp_path: Path) -> None:
    resolved, weights = trained(tmp_path)
    tags = lineage.run_tags(resolved, "detect", config_digest="c") | {lineage.DATA: "d1"}
    for status in ("FAILED", "KILLED"):
        config = TrackingConfig(system_metrics=False)
        run = tracking.open_run(config, name=status, folder=tmp_path / status, tags=tags)
        run.log_metrics({"detect/AP": 0.5}, step=0)
        run.finish(status)
    assert registry.find_downstream("detect", weights, data_digest="d1", config_digest="c") == []


def test_where_nothing_was_recorded_nothing_is_found_and_no_database_is_made(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/absent.db"
    assert registry.find_downstream("wsol", "w", data_digest="d", config_digest="c", tracking_uri=uri) == []
    assert list(tmp_path.iterdir()) == []


def test_a_version_says_of_what_its_numbers_are_and_keeps_none_of_an_earlier_run(place: str, tmp_path: Path) -> None:
    recording = TrackingConfig(system_metrics=False)
    first = tracking.open_run(recording, name="small", folder=tmp_path / "run")
    first.finish()
    written(tmp_path / "run" / "model")
    registry.register(tmp_path / "run" / "model", name="small", run_id=first.run_id, metric="val/top1")
    resolved = registry.resolve("models:/small/1")

    def tagged(name: str, metrics: dict[str, float], **about: Any) -> dict[str, str]:
        run = tracking.open_run(recording, name=name, folder=tmp_path / name)
        lineage.tag_version(run, resolved, "detect", metrics, ("AP", "APs"), **about)
        assert run.finish() == ""
        tags = tracking.client().get_model_version("small", "1").tags
        assert tags["downstream.detect.run_id"] == run.run_id
        return {key: tags[f"downstream.detect.{key}"] for key in ("AP", "APs", "data_digest", "config_digest", "seed")}

    values = {"AP": "0.5", "APs": "0.25", "data_digest": "d1", "config_digest": "c1", "seed": "3"}
    about = {"data_digest": "d1", "config_digest": "c1", "seed": 3}
    assert tagged("one", {"AP": 0.5, "APs": 0.25, "AR1": 0.1}, **about) == values
    assert registry.list_models()[0].downstream == {"detect.AP": 0.5, "detect.APs": 0.25}
    # Scenes without small objects, by a run that says nothing of itself.
    nothing = {"AP": "0.75", "APs": "", "data_digest": "", "config_digest": "", "seed": ""}
    assert tagged("two", {"AP": 0.75}) == nothing
    assert registry.list_models()[0].downstream == {"detect.AP": 0.75}


def test_what_is_learnt_from_and_measured_on_are_not_taken_for_each_other() -> None:
    assert lineage.split_digest("a", "b") != lineage.split_digest("b", "a")
