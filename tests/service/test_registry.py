"""Models that are stored, found again by name, and trusted no further than their checksum."""

import dataclasses
import errno
import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from pipelines.plan import View
from service import bundle, models, registry, tracking
from service.bundle import Card
from service.config import ModelConfig, TrackingConfig
from service.errors import CheckpointError, ConfigError, LorotError, StorageError

MODEL = ModelConfig(name="resnet_small", width=8)
CARD = Card(
    model=MODEL.model_dump(mode="json"),
    classes=("cat", "dog", "eel"),
    view=dataclasses.asdict(View(size=32)),
    data="demo",
    data_digest="d" * 64,
    pretext="lorot_e",
    pretext_options={"grid": 2},
    num_pretext=16,
    objective="multi_task",
    metrics={"val/top1": 0.5},
    chosen_by="val/top1",
)


def network(seed: int = 0) -> models.Classifier:
    torch.manual_seed(seed)
    return models.build(MODEL, 3, 16).eval()


def written(folder: Path, card: Card = CARD, seed: int = 0) -> Path:
    registry.write_bundle(folder, network(seed).state_dict(), card)
    return folder


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


# --- the bundle


def test_a_model_comes_back_with_the_same_weights_and_gives_the_same_logits(tmp_path: Path) -> None:
    model, images = network(), torch.rand(2, 3, 32, 32)
    card = registry.write_bundle(tmp_path / "model", model.state_dict(), CARD)
    again, read, resolved = registry.load(str(tmp_path / "model"))
    assert not again.training
    assert read == card
    assert View(**read.view) == View(size=32)
    assert resolved.folder == tmp_path / "model"
    with torch.no_grad():
        torch.testing.assert_close(again(images), model(images), rtol=0, atol=0)
    # What other programs see.
    tensors = safetensors.torch.load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(tensors[key], value) for key, value in model.state_dict().items())
    text = json.loads((tmp_path / "model" / "model.json").read_text())
    assert text["classes"] == ["cat", "dog", "eel"]
    assert text["weights_sha256"] == hashlib.sha256((tmp_path / "model" / "model.safetensors").read_bytes()).hexdigest()


def test_a_loaded_model_can_be_trained_on(tmp_path: Path) -> None:
    model, _, _ = registry.load(str(written(tmp_path / "model")))
    model.train()(torch.rand(4, 3, 32, 32)).logits.sum().backward()
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    assert model.fc.weight.grad is not None


def test_weights_that_are_channels_last_or_views_of_one_buffer_are_written_as_they_read(tmp_path: Path) -> None:
    model = network()
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    model.to(memory_format=torch.channels_last)
    state = dict(model.state_dict())
    flat = torch.cat([state["fc.weight"].flatten(), state["fc.bias"]])
    count = state["fc.weight"].numel()
    state["fc.weight"], state["fc.bias"] = flat[:count].view(3, -1), flat[count:]
    registry.write_bundle(tmp_path / "model", state, CARD)
    tensors = safetensors.torch.load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(tensors[key], value) for key, value in expected.items())


def test_a_full_disk_is_a_storage_error_and_the_model_that_was_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = written(tmp_path / "model")
    before = (folder / "model.json").read_bytes()
    real = bundle._write

    def write(path: Path, content: bytes) -> None:
        real(path, content[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(bundle, "_write", write)
    with pytest.raises(StorageError, match="No space left") as caught:
        written(folder, seed=1)
    assert caught.value.exit_code == 7
    assert (folder / "model.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    registry.load(str(folder))


def test_writing_again_replaces_the_model_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    written(tmp_path / "model")
    written(tmp_path / "model", seed=1)
    model, _, _ = registry.load(str(tmp_path / "model"))
    assert torch.equal(model.fc.weight, network(1).fc.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_metrics_that_are_not_finite_are_left_out_so_that_the_card_is_plain_json(tmp_path: Path) -> None:
    card = dataclasses.replace(CARD, metrics={"val/top1": 0.5, "val/class_loss": float("nan")})
    assert registry.write_bundle(tmp_path / "model", network().state_dict(), card).metrics == {"val/top1": 0.5}
    assert "NaN" not in (tmp_path / "model" / "model.json").read_text()


@pytest.mark.parametrize("damage", ["bit", "truncated", "missing", "empty"])
def test_damaged_weights_are_found_out(tmp_path: Path, damage: str) -> None:
    path = written(tmp_path / "model") / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    changed = {"bit": bytes(content), "truncated": bytes(content[:-7]), "empty": b""}
    path.unlink() if damage == "missing" else path.write_bytes(changed[damage])
    with pytest.raises(CheckpointError, match=r"model\.safetensors") as caught:
        registry.load(str(tmp_path / "model"))
    assert caught.value.exit_code == 5


def edited(folder: Path, **changes: Any) -> Path:
    card = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({**card, **changes}))
    return folder


def test_another_number_of_classes_than_the_weights_have_is_said_so(tmp_path: Path) -> None:
    folder = edited(written(tmp_path / "model"), classes=["cat", "dog", "eel", "fox"])
    with pytest.raises(CheckpointError, match=r"the weights are for 3 classes .*, the model has 4") as caught:
        registry.load(str(folder))
    assert caught.value.exit_code == 5


def test_weights_of_another_network_are_refused_with_the_layers_that_differ(tmp_path: Path) -> None:
    folder = edited(written(tmp_path / "model"), model={**CARD.model, "width": 16})
    with pytest.raises(CheckpointError, match=r"conv1.weight: \(4, 3, 3, 3\) .*, the network has \(8, 3, 3, 3\)"):
        registry.load(str(folder))
    folder = edited(written(tmp_path / "model"), model={**CARD.model, "name": "resnet50"})
    with pytest.raises(CheckpointError, match="missing: "):
        registry.load(str(folder))


def test_a_card_with_absurd_sizes_costs_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, devices = models.build, set()

    def build(*arguments: Any) -> models.Classifier:
        module = real(*arguments)
        devices.update(tensor.device.type for tensor in module.state_dict().values())
        return module

    monkeypatch.setattr(models, "build", build)
    registry.load(str(written(tmp_path / "model")))
    assert devices == {"meta"}
    folder = edited(written(tmp_path / "model"), model={**CARD.model, "width": 50_000_000}, num_pretext=1_000_000)
    with pytest.raises(CheckpointError):
        registry.load(str(folder))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"classes": "cat"}, "classes"),
        ({"classes": []}, "classes"),
        ({"classes": [1, 2, 3]}, "classes.0"),
        ({"classes": ["x" * 2000, "b", "c"]}, "classes.0"),
        ({"num_pretext": -1}, "num_pretext"),
        ({"num_pretext": 10**12}, "num_pretext"),
        ({"num_pretext": "16"}, "num_pretext"),
        ({"model": {"name": "../../evil"}}, "name"),
        ({"model": {**CARD.model, "module": "os"}}, "module"),
        ({"model": ["resnet18"]}, "model"),
        ({"view": {**CARD.view, "size": 10**9}}, "size"),
        ({"view": {**CARD.view, "size": "32"}}, "size"),
        ({"view": {**CARD.view, "std": [0, 1, 1]}}, "std"),
        ({"view": {**CARD.view, "mean": [0, 1]}}, "mean"),
        ({"view": {**CARD.view, "root": "/"}}, "view.root: missing or unknown"),
        ({"view": {**CARD.view, "crop": "../x"}}, "crop"),
        ({"view": {**CARD.view, "eval_crop": 0}}, "eval_crop"),
        ({"view": {"size": 32}}, "missing or unknown"),
        ({"run_id": "../../x"}, "run_id"),
        ({"weights_sha256": "../model"}, "weights_sha256"),
        ({"weights": "../../etc/passwd"}, "weights"),
        ({"metrics": {"val/top1": "0.9"}}, "metrics"),
        ({"format": 2}, "format"),
    ],
)
def test_a_card_with_a_wrong_value_is_refused_by_its_name(
    tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    folder = edited(written(tmp_path / "model"), **changes)
    with pytest.raises(CheckpointError, match=complaint):
        registry.load(str(folder))


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff\xfe", b'{"a":' + b"[" * 200_000, b" " * (17 << 20)])
def test_what_is_no_card_at_all_is_refused(tmp_path: Path, text: bytes) -> None:
    (written(tmp_path / "model") / "model.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"model\.json"):
        registry.load(str(tmp_path / "model"))


def test_a_card_that_would_not_be_read_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="run_id"):
        written(tmp_path / "model", dataclasses.replace(CARD, run_id="a/b"))
    assert not (tmp_path / "model").exists()


def test_a_card_does_not_make_its_reader_fetch_other_weights(tmp_path: Path) -> None:
    folder = edited(written(tmp_path / "model"), model={**CARD.model, "init_from": "/somewhere/else"})
    assert registry.load(str(folder))[1].model["init_from"] is None


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("exploded"),))


def test_a_pickle_in_the_place_of_the_weights_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = pickle.dumps(Bomb())
    folder = edited(written(tmp_path / "model"), weights_sha256=hashlib.sha256(content).hexdigest())
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        registry.load(str(folder))
    assert not Path("exploded").exists()


def test_a_model_is_found_by_its_folder_or_either_file(tmp_path: Path) -> None:
    folder = written(tmp_path / "model", dataclasses.replace(CARD, run_id="abc"))
    for uri in (folder, folder / "model.json", folder / "model.safetensors"):
        assert registry.resolve(str(uri)) == registry.Resolved(folder, str(uri), run_id="abc")
    (tmp_path / "weights.pth").write_bytes(b"")
    for uri in ("nowhere", "weights.pth", "."):
        with pytest.raises(CheckpointError, match=r"model\.json"):
            registry.resolve(str(tmp_path / uri))


# --- the registry


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
