"""A model as files: what is written comes back, and nothing else is believed."""

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
from small_model import CARD, network, written

from pipelines import augment
from pipelines.plan import View
from service import bundle, models, registry
from service.errors import CheckpointError, StorageError


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
    folder = written(tmp_path / "model")
    real, devices = models.build, set()

    def build(*arguments: Any) -> models.Classifier:
        module = real(*arguments)
        devices.update(tensor.device.type for tensor in module.state_dict().values())
        return module

    monkeypatch.setattr(models, "build", build)
    registry.load(str(folder))
    assert devices == {"meta"}
    edited(folder, model={**CARD.model, "width": 50_000_000}, num_pretext=1_000_000)
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
        ({"view": {**CARD.view, "root": "/"}}, r"view\.root: Extra inputs are not permitted"),
        ({"view": {**CARD.view, "crop": "../x"}}, "crop"),
        ({"view": {**CARD.view, "eval_crop": 0}}, "eval_crop"),
        ({"view": {"size": 32}}, r"view\.crop: Field required"),
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


def test_a_card_keeps_the_view_of_the_evaluation_and_reads_back_what_training_did(tmp_path: Path) -> None:
    view = View(size=32, eval_size=48, augment=(augment.load("rand_augment"),))
    training = {"size": 32, "sizes": [{"size": 24, "until": "1 epochs"}], "augment": [{"name": "rand_augment"}]}
    card = dataclasses.replace(CARD, view=bundle.evaluation_view(view), training_view=training)
    bundle.write_bundle(tmp_path / "model", network().state_dict(), card)
    read = bundle.read_card(tmp_path / "model")
    assert View(**read.view) == View(size=48)
    assert read.training_view == training
