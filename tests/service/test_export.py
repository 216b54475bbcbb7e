"""Exported models: what the tools make of the files, without any of the program that wrote them."""

import dataclasses
import errno
import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from travelling import CLASSES, images, settle, written

from service import cli, models, registry, tracking
from service.config import TrackingConfig
from service.errors import CheckpointError, ConfigError, StorageError
from service.export import formats, job

# Making, writing and converting these takes ten seconds each.
LARGE = [pytest.param(name, marks=pytest.mark.integration) for name in ("resnet34", "resnet50", "resnet101")]
CONVERTED = [pytest.param(name, marks=pytest.mark.integration) for name in ("resnet18", "cifar_resnet18")]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, models.Classifier]:
    folder = tmp_path_factory.mktemp("small") / "model"
    return folder, written(folder, "resnet_small")[0]


def exported(model: Path, to: str, folder: Path, **options: Any) -> job.Exported:
    return job.run(str(model), to, folder / f"{to}{formats.named(to).suffix}", **options)


def logits(network: Any) -> torch.Tensor:
    with torch.inference_mode():
        found = network.eval()(images())
    return found if isinstance(found, torch.Tensor) else found.logits


@pytest.mark.parametrize("name", ["resnet18", *LARGE])
def test_an_imagenet_resnet_gives_the_same_logits_in_torchvision_timm_and_plain_pytorch(
    tmp_path: Path, name: str
) -> None:
    network, _ = written(tmp_path / "model", name)
    expected = logits(network)
    done = {to: exported(tmp_path / "model", to, tmp_path) for to in ("torchvision", "timm", "pytorch", "safetensors")}

    theirs = getattr(torchvision.models, name)(weights=None, num_classes=5)
    theirs.load_state_dict(torch.load(done["torchvision"].path, weights_only=True))
    assert (logits(theirs) - expected).abs().max() <= 1e-5
    theirs = timm.create_model(name, num_classes=5, checkpoint_path=str(done["timm"].path))
    assert (logits(theirs) - expected).abs().max() <= 1e-5

    whole = set(network.state_dict())
    without = {key for key in whole if not key.startswith("pretext_fc.")}
    assert len(whole) - len(without) == 2
    assert set(torch.load(done["torchvision"].path, weights_only=True)) == without
    assert set(safetensors.torch.load_file(done["timm"].path)) == without
    for tensors in (
        safetensors.torch.load_file(done["safetensors"].path),
        torch.load(done["pytorch"].path, weights_only=True),
    ):
        assert set(tensors) == whole
        assert all(torch.equal(tensors[key], value) for key, value in network.state_dict().items())
    assert {to: bool(one.left_out) for to, one in done.items()} == {
        "torchvision": True,
        "timm": True,
        "pytorch": False,
        "safetensors": False,
    }
    assert all(one.difference <= 1e-5 for one in done.values())


@pytest.mark.parametrize("name", ["resnet_small", *CONVERTED, *LARGE])
def test_onnx_gives_the_same_logits_for_any_number_of_images(tmp_path: Path, name: str) -> None:
    network, _ = written(tmp_path / "model", name, size=32)
    done = exported(tmp_path / "model", "onnx", tmp_path)
    session = onnxruntime.InferenceSession(str(done.path), providers=["CPUExecutionProvider"])
    for count in (1, 3, 7):
        with torch.inference_mode():
            expected = network(images(count, size=32, seed=5)).logits
        (found,) = session.run(None, {"images": images(count, size=32, seed=5).numpy()})
        assert found.shape == (count, 5)
        assert (torch.from_numpy(found) - expected).abs().max() <= 1e-4
    # One file: no weights beside it that could be forgotten.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "onnx.onnx", "onnx.onnx.json"]


@pytest.mark.parametrize("name", ["cifar_resnet18", "resnet_small"])
def test_a_network_that_a_tool_does_not_have_is_refused_with_the_formats_that_work(tmp_path: Path, name: str) -> None:
    written(tmp_path / "model", name, size=32)
    for to in ("torchvision", "timm"):
        complaint = f"{to} has no network {name}; --to onnx, safetensors, pytorch would work"
        with pytest.raises(ConfigError, match=complaint):
            exported(tmp_path / "model", to, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_json_beside_the_weights_says_what_goes_in_what_comes_out_and_where_they_are_from(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    _, card = written(tmp_path / "bundle", "resnet18")
    run = tracking.open_run(TrackingConfig(system_metrics=False), name="job", folder=tmp_path / "run")
    run.finish()
    registry.register(tmp_path / "bundle", name="demo", run_id=run.run_id, metric="val/top1")
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", "--model", "models:/demo@best", "--to", "torchvision", "--output", "out/net.pth"])
    assert not ended.value.code
    said = capsys.readouterr().out
    assert "models:/demo/1 -> out/net.pth" in said
    assert "largest difference of a logit 0" in said
    assert f"torchvision {torchvision.__version__.partition('+')[0]}" in said
    assert "left out: the pretext head, for which torchvision has no place; safetensors and pytorch keep it" in said

    facts = json.loads(Path("out/net.pth.json").read_text())
    content = Path("out/net.pth").read_bytes()
    assert (facts["sha256"], facts["bytes"]) == (hashlib.sha256(content).hexdigest(), len(content))
    assert facts["classes"] == list(CLASSES)
    assert facts["input"]["shape"] == ["N", 3, 64, 64]
    assert facts["preprocessing"]["mean"] == [0.485, 0.456, 0.406]
    assert facts["preprocessing"]["steps"][1:3] == [
        "cut the centred square whose side is 0.875 of the short side",
        "resize to 64 x 64, bilinear, antialiased",
    ]
    assert facts["pretext"]["left_out"] == ["pretext_fc.weight", "pretext_fc.bias"]
    assert facts["check"]["largest_difference"] <= 1e-5
    lineage = facts["lineage"]
    assert (lineage["model"], lineage["name"], lineage["version"]) == ("models:/demo/1", "demo", 1)
    assert (lineage["data"], lineage["data_digest"]) == ("demo", "d" * 64)
    assert lineage["weights_sha256"] == card.weights_sha256
    assert lineage["metrics"] == {"val/top1": 0.5}
    # The line that is said to load the file does.
    monkeypatch.chdir("out")
    network = torchvision.models.resnet18(num_classes=5)
    assert facts["load"].startswith("torchvision.models.resnet18(num_classes=5).load_state_dict(")
    network.load_state_dict(torch.load(facts["file"], weights_only=True))


def test_nothing_is_overwritten_unless_it_is_asked_for(small: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = small
    other, _ = written(tmp_path / "other", "resnet_small", seed=1)
    first = exported(folder, "pytorch", tmp_path)
    before = first.path.read_bytes()
    with pytest.raises(ConfigError, match=r"pytorch\.pt and .*pytorch\.pt\.json exist; choose another, or add --over"):
        exported(tmp_path / "other", "pytorch", tmp_path)
    first.path.unlink()
    with pytest.raises(ConfigError, match=r"pytorch\.pt\.json exist"):
        exported(tmp_path / "other", "pytorch", tmp_path)
    first.path.write_bytes(before)
    exported(tmp_path / "other", "pytorch", tmp_path, overwrite=True)
    assert torch.equal(torch.load(first.path, weights_only=True)["fc.weight"], other.fc.weight)
    assert json.loads(first.facts.read_text())["sha256"] != hashlib.sha256(before).hexdigest()


def test_a_file_that_appears_while_the_model_is_checked_is_not_overwritten(
    small: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = job.compare

    def compare(*arguments: Any) -> float:
        (tmp_path / "pytorch.pt").write_text("mine")
        return real(*arguments)

    monkeypatch.setattr(job, "compare", compare)
    with pytest.raises(ConfigError, match="exist"):
        exported(small[0], "pytorch", tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("pytorch.pt", "mine")]


def _shifted(model: models.Classifier, card: Any) -> bytes:
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    tensors["fc.bias"] += 1e-3
    return bytes(safetensors.torch.save(tensors))


def _broken(model: models.Classifier, card: Any) -> bytes:
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    tensors["fc.bias"] *= float("nan")
    return bytes(safetensors.torch.save(tensors))


@pytest.mark.parametrize(
    ("encode", "complaint"),
    [
        (_shifted, r"gives other logits than the model, up to 0\.001 off where 1e-05 is accepted"),
        (_broken, "gives other logits than the model, up to nan"),
        (lambda model, card: b"nonsense", "does not load what was written for it"),
    ],
)
def test_a_file_that_the_tool_reads_differently_is_not_left_behind(
    small: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encode: Any, complaint: str
) -> None:
    monkeypatch.setitem(
        formats.FORMATS, "safetensors", dataclasses.replace(formats.FORMATS["safetensors"], encode=encode)
    )
    with pytest.raises(CheckpointError, match=complaint):
        exported(small[0], "safetensors", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_is_refused_with_what_would_work(
    small: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = str(small[0]), tmp_path / "net.bin"
    with pytest.raises(ConfigError, match="no such format; there are torchvision, timm, onnx, safetensors, pytorch"):
        job.run(folder, "keras", out)
    with pytest.raises(ConfigError, match=r"onnx files end in \.onnx; .*net\.onnx would work"):
        job.run(folder, "onnx", out)
    (tmp_path / "net.onnx").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        job.run(folder, "onnx", tmp_path / "net.onnx")
    with pytest.raises(CheckpointError, match="no such model"):
        job.run(str(tmp_path / "nowhere"), "pytorch", tmp_path / "net.pt")
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name.startswith("onnx") else real(name, *rest)
    )
    with pytest.raises(ConfigError, match="`pip install onnx onnxscript onnxruntime` gets it"):
        job.run(folder, "onnx", tmp_path / "other.onnx")


def test_a_full_disk_is_a_storage_error_and_leaves_nothing(
    small: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(path: Path, content: bytes) -> None:
        path.write_bytes(content[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(job, "_write", write)
    with pytest.raises(StorageError, match="No space left"):
        exported(small[0], "pytorch", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_comparison_is_of_usual_logits_and_notices_a_difference_of_a_thousandth(small: tuple[Path, Any]) -> None:
    found = logits(settle(small[1]))
    assert 0.1 < found.abs().max() < 20
