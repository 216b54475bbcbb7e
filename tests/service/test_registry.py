"""Registered models: found again by name, with their lineage."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from small_model import CARD, network, written

from service import registry, tracking
from service.config import TrackingConfig
from service.errors import CheckpointError, ConfigError, LorotError


def trained(tmp_path: Path, seed: int = 0, **metrics: float) -> tuple[Path, str]:
    """A bundle and the run it comes from."""
    config = TrackingConfig(system_metrics=False)
    run = tracking.open_run(config, name=f"job-{seed}", folder=tmp_path / f"run-{seed}")
    run.finish()
    card = dataclasses.replace(CARD, run_id=run.run_id, run_name=f"job-{seed}", metrics=metrics or {"val/top1": 0.5})
    return written(tmp_path / f"run-{seed}" / "model", card, seed), run.run_id


def registered(tmp_path: Path, seed: int, mode: Any = "max", **metrics: float) -> int:
    folder, run_id = trained(tmp_path, seed, **metrics)
    return registry.register(folder, name="lorot-demo", run_id=run_id, metric="val/top1", mode=mode)


def best() -> int | None:
    (holder,) = [row.version for row in registry.list_models() if "best" in row.aliases] or [None]
    return holder


def test_a_model_is_found_by_its_folder_or_either_file(tmp_path: Path) -> None:
    folder = written(tmp_path / "model", dataclasses.replace(CARD, run_id="abc"))
    for uri in (folder, folder / "model.json", folder / "model.safetensors"):
        assert registry.resolve(str(uri)) == registry.Resolved(folder, str(uri), run_id="abc")
    (tmp_path / "weights.pth").write_bytes(b"")
    for uri in ("nowhere", "weights.pth", "."):
        with pytest.raises(CheckpointError, match=r"model\.json"):
            registry.resolve(str(tmp_path / uri))


def test_latest_moves_always_and_best_only_to_a_better_model(place: str, tmp_path: Path) -> None:
    seen = []
    for seed, top1 in enumerate((0.5, 0.4, 0.7, 0.7, float("nan"))):
        version = registered(tmp_path, seed, **{"val/top1": top1})
        newest = registry.resolve("models:/lorot-demo@latest").version
        assert newest == version
        seen.append((version, best()))
    assert seen == [(1, 1), (2, 1), (3, 3), (4, 3), (5, 3)]


def test_best_can_mean_smallest(place: str, tmp_path: Path) -> None:
    assert [
        (registered(tmp_path, seed, "min", **{"val/top1": loss}), best()) for seed, loss in enumerate((2, 3, 1))
    ] == [
        (1, 1),
        (2, 1),
        (3, 3),
    ]


def test_a_first_model_without_the_metric_is_registered_but_not_best(place: str, tmp_path: Path) -> None:
    assert registered(tmp_path, 0, **{"val/top5": 0.9}) == 1
    assert best() is None
    assert registered(tmp_path, 1, **{"val/top1": 0.1}) == 2
    assert best() == 2


@pytest.mark.parametrize(
    ("value", "held", "mode", "expected"),
    [
        (0.2, 0.1, "max", True),
        (0.1, 0.1, "max", False),
        (0.1, 0.2, "min", True),
        (0.2, 0.1, "min", False),
        (0.1, None, "max", True),
        (float("nan"), None, "max", False),
        (float("inf"), 0.1, "max", False),
        (None, 0.1, "max", False),
        (0.1, float("nan"), "min", True),
    ],
)
def test_better_is_what_the_mode_says_and_never_nan(value: Any, held: Any, mode: str, expected: bool) -> None:
    assert registry.better(value, held, mode) is expected


def test_registering_the_same_model_again_finds_the_version_that_is_there(place: str, tmp_path: Path) -> None:
    folder, run_id = trained(tmp_path)
    for _ in range(2):
        assert registry.register(folder, name="lorot-demo", run_id=run_id, metric="val/top1") == 1
    assert len(registry.list_models()) == 1


def test_a_registered_model_loads_by_alias_version_and_run(place: str, tmp_path: Path) -> None:
    folder, run_id = trained(tmp_path)
    registry.register(folder, name="lorot-demo", run_id=run_id, metric="val/top1")
    expected = network().fc.weight
    for uri in ("models:/lorot-demo@latest", "models:/lorot-demo@best", "models:/lorot-demo/1"):
        model, card, resolved = registry.load(uri)
        assert torch.equal(model.fc.weight, expected)
        assert (resolved.uri, resolved.name, resolved.version) == ("models:/lorot-demo/1", "lorot-demo", 1)
        assert resolved.run_id == card.run_id == run_id
    for uri in (f"runs:/{run_id}", f"runs:/{run_id}/model", f"runs:/{run_id}/model/"):
        model, _, resolved = registry.load(uri)
        assert torch.equal(model.fc.weight, expected)
        assert (resolved.version, resolved.run_id) == (None, run_id)
    # Artifacts on this machine are used where they are.
    assert resolved.folder == tmp_path / "mlruns" / "artifacts" / run_id / "artifacts" / "model"
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("uri", "complaint"),
    [
        ("models:/nothing@best", "registered: lorot-demo"),
        ("models:/lorot-demo@bset", "aliases: best, latest; versions: 1"),
        ("models:/lorot-demo/7", "aliases: best, latest; versions: 1"),
        ("models:/lorot-demo", "write models:/NAME@ALIAS"),
        ("models:/lorot-demo/latest", "write models:/NAME@ALIAS"),
        ("models:/lorot-demo/../../x@best", "write models:/NAME@ALIAS"),
        ("runs:/" + "0" * 32, "no run 0000"),
        ("runs:/{run}/other", "holds no model.json"),
        ("runs:/{run}/../../../../other", "write runs:/RUN_ID"),
        ("runs:/../x", "write runs:/RUN_ID"),
    ],
)
def test_a_wrong_address_is_told_what_exists(place: str, tmp_path: Path, uri: str, complaint: str) -> None:
    folder, run_id = trained(tmp_path)
    registry.register(folder, name="lorot-demo", run_id=run_id, metric="val/top1")
    with pytest.raises(CheckpointError, match=complaint) as caught:
        registry.resolve(uri.replace("{run}", run_id))
    assert caught.value.exit_code == 5


def test_a_model_damaged_in_the_artifact_store_is_found_out(place: str, tmp_path: Path) -> None:
    folder, run_id = trained(tmp_path)
    registry.register(folder, name="lorot-demo", run_id=run_id, metric="val/top1")
    stored = registry.resolve("models:/lorot-demo@latest").folder / "model.safetensors"
    stored.write_bytes(stored.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="damaged or incomplete"):
        registry.load("models:/lorot-demo@latest")


def test_a_name_that_mlflow_does_not_take_is_refused_before_anything_is_sent(place: str, tmp_path: Path) -> None:
    folder, run_id = trained(tmp_path)
    for name in ("a/b", "a:b", "a@b", "", "..", "it's"):
        with pytest.raises(ConfigError, match=r"registry\.name"):
            registry.register(folder, name=name, run_id=run_id, metric="val/top1")


def test_where_nothing_was_recorded_there_are_no_models_and_no_database_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert registry.list_models() == []
    with pytest.raises(LorotError, match="nothing was registered yet"):
        registry.resolve("models:/lorot-demo@latest")
    assert list(tmp_path.iterdir()) == []


def test_the_list_shows_lineage_and_what_was_found_out_later(place: str, tmp_path: Path) -> None:
    version = registered(tmp_path, 0, **{"val/top1": 0.75, "val/class_loss": 1.5})
    registered(tmp_path, 1, **{"val/top1": 0.25})
    _, card, resolved = registry.load("models:/lorot-demo@best")
    (tmp_path / "wsol").mkdir()
    (tmp_path / "wsol" / "scores.json").write_text("{}")
    run_id, notice = registry.log_downstream(
        resolved,
        "wsol",
        {"gt_known@0.5": 0.625, "top1_loc@0.5": 0.5, "wsol/max_box_acc": 0.7},
        tracking_config=TrackingConfig(),
        folder=tmp_path / "wsol",
        params={"axis": "cam"},
        tags={"data.digest": "abc"},
        artifacts=[tmp_path / "wsol" / "scores.json"],
        headline=["gt_known@0.5", "max_box_acc"],
    )
    assert notice == ""

    newer, older = registry.list_models()
    assert (newer.version, newer.aliases, newer.downstream) == (2, ("latest",), {})
    assert (older.version, older.aliases) == (version, ("best",))
    assert older.metrics == {"val/top1": 0.75, "val/class_loss": 1.5}
    assert (older.data, older.data_digest, older.pretext, older.objective) == (
        "demo",
        "d" * 64,
        "lorot_e",
        "multi_task",
    )
    assert (older.run_name, older.run_id) == ("job-0", card.run_id)
    assert older.downstream == {"wsol.gt_known@0.5": 0.625, "wsol.max_box_acc": 0.7}

    found = tracking.client().get_run(run_id)
    assert found.data.tags["model.uri"] == f"models:/lorot-demo/{version}"
    assert found.data.tags["mlflow.parentRunId"] == card.run_id
    assert found.data.tags["data.digest"] == "abc"
    assert found.data.params == {"axis": "cam"}
    assert found.data.metrics == {"wsol/gt_known:0.5": 0.625, "wsol/top1_loc:0.5": 0.5, "wsol/max_box_acc": 0.7}
    assert [item.path for item in tracking.client().list_artifacts(run_id)] == ["scores.json"]
    tags = tracking.client().get_model_version("lorot-demo", version).tags
    assert tags["downstream.wsol.run_id"] == run_id
