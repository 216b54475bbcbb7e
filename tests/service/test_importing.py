"""Weights that others have trained: taken with the names they are published with, and nothing else of the file."""

import copy
import functools
import hashlib
import io
import json
import os
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from rich.console import Console
from torch import nn
from travelling import CLASSES, images, settle, written

from pipelines import pretext
from pipelines.plan import View
from service import bundle, cli, models, registry, tracking
from service.config import ModelConfig
from service.downstream import wsol
from service.errors import CheckpointError, ConfigError, TrackingError
from service.export import job as exporting
from service.importing import checkpoint_file, imagenet, job, recognition
from service.importing.job import Wish

NAMES = ",".join(CLASSES)
SMALL = View(size=64)
# Making these takes seconds.
LARGE = [pytest.param(name, marks=pytest.mark.integration) for name in ("resnet34", "resnet50", "resnet101")]


@functools.cache
def _made(name: str, num_classes: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return settle(getattr(torchvision.models, name)(weights=None, num_classes=num_classes))


def theirs(name: str = "resnet18", num_classes: int = 5, seed: int = 0) -> nn.Module:
    """A network of torchvision's, with weights as if it had been trained."""
    return copy.deepcopy(_made(name, num_classes, seed))


def small(num_classes: int = 5, seed: int = 0) -> dict[str, torch.Tensor]:
    """The state of our smallest network, where it does not matter whose it is."""
    torch.manual_seed(seed)
    model = models.build(ModelConfig(name="resnet_small", width=16), num_classes, 0)
    return dict(settle(model).state_dict())


def saved(content: Any, path: Path, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def published(network: nn.Module, num_pretext: int) -> tuple[dict[str, Any], nn.Linear]:
    """What LoRot's training program leaves: DataParallel's names, the second head, the optimizer, the best error."""
    torch.manual_seed(3)
    network.fc2 = head = nn.Linear(network.fc.in_features, num_pretext)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    network.fc2(network.fc.weight).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    state = OrderedDict((f"module.{key}", value) for key, value in network.state_dict().items())
    del network.fc2
    content = {"epoch": 300, "arch": "resnet50", "state_dict": state, "best_err1": torch.tensor(22.29)}
    return {**content, "best_err5": 6.4, "optimizer": optimizer.state_dict()}, head


def taken(path: Path, **wish: Any) -> Any:
    """The network that would be registered, in eval mode, and its card."""
    wished = Wish(**{"classes": NAMES, "view": SMALL, **wish})
    card, weights, notes = job.prepare(checkpoint_file.read(path, wished.entry), path, wished)
    return bundle.build(card, weights, "test"), card, notes


@torch.inference_mode()
def outputs(network: Any) -> Any:
    return network.eval()(images())


@pytest.mark.parametrize("name", ["resnet18", *LARGE])
@pytest.mark.parametrize("house", ["torchvision", "timm"])
def test_weights_of_torchvision_and_timm_are_recognised_and_give_their_logits(
    tmp_path: Path, name: str, house: str
) -> None:
    if house == "torchvision":
        network = theirs(name)
        path = saved(network.state_dict(), tmp_path / "weights.pth")
    else:
        torch.manual_seed(0)
        network = settle(timm.create_model(name, pretrained=False, num_classes=5))
        path = tmp_path / "model.safetensors"
        safetensors.torch.save_file(network.state_dict(), path)
    model, card, notes = taken(path)
    assert (card.model["name"], card.num_classes, card.num_pretext, card.pretext) == (name, 5, 0, "none")
    assert notes == ()
    assert (outputs(model).logits - outputs(network)).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("num_pretext", "wished", "task"),
    [(16, None, "lorot_e"), (4, None, "lorot_i"), (4, "rotation", "rotation")],
)
def test_a_published_checkpoint_gives_the_logits_of_both_its_heads(
    tmp_path: Path, num_pretext: int, wished: str | None, task: str
) -> None:
    network = theirs("resnet18")
    content, head = published(network, num_pretext)
    model, card, notes = taken(saved(content, tmp_path / "model_best.pth.tar"), pretext=wished)
    assert (card.pretext, card.num_pretext, card.pretext_options) == (task, num_pretext, {})
    assert pretext.load(card.pretext).num_labels == num_pretext
    found = outputs(model)
    assert (found.logits - outputs(network)).abs().max() <= 1e-5
    pooled: list[torch.Tensor] = []
    network.avgpool.register_forward_hook(lambda module, inputs, output: pooled.append(output.flatten(1)))
    outputs(network)
    with torch.inference_mode():
        assert (found.pretext_logits - head(pooled[0])).abs().max() <= 1e-5
    assert any("'module.'" in note for note in notes)
    assert any("not used: epoch, arch, best_err1, best_err5, optimizer" in note for note in notes)
    assert any("--pretext rotation says otherwise" in note for note in notes) is (num_pretext == 4 and wished is None)


def test_a_pretext_head_can_be_left_out(tmp_path: Path) -> None:
    network = theirs()
    content, _ = published(network, 16)
    model, card, notes = taken(saved(content, tmp_path / "a.pth.tar"), pretext="none")
    assert (card.pretext, card.num_pretext, model.pretext_fc) == ("none", 0, None)
    assert "the pretext head is left out" in notes
    assert (outputs(model).logits - outputs(network)).abs().max() <= 1e-5


def test_older_files_without_counters_in_the_old_format_or_in_halves_are_taken(tmp_path: Path) -> None:
    network = theirs()
    state = {key: value for key, value in network.state_dict().items() if "num_batches" not in key}
    path = saved(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    model, _, notes = taken(path)
    assert any("20 counters of batches" in note for note in notes)
    assert (outputs(model).logits - outputs(network)).abs().max() <= 1e-5

    half = {key: value.half() if value.is_floating_point() else value for key, value in network.state_dict().items()}
    model, _, notes = taken(saved(half, tmp_path / "half.pth"))
    assert "torch.float16 weights become float32" in notes
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32, torch.int64}
    assert (outputs(model).logits - outputs(network)).abs().max() <= 0.05


@pytest.mark.parametrize(
    ("name", "to"), [("cifar_resnet18", "safetensors"), ("resnet_small", "pytorch"), ("resnet_small", "safetensors")]
)
def test_what_was_exported_comes_back(tmp_path: Path, name: str, to: str) -> None:
    network, card = written(tmp_path / "model", name, size=32)
    done = exporting.run(str(tmp_path / "model"), to, tmp_path / f"net{exporting.formats.FORMATS[to].suffix}")
    model, again, _ = taken(done.path)
    assert again.model | {"width": 16} == card.model
    assert (again.pretext, again.num_pretext) == ("lorot_e", 16)
    assert again.model["name"] != "resnet_small" or again.model["width"] == 16
    for key, value in network.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)


def test_an_average_is_taken_only_when_it_is_asked_for(tmp_path: Path) -> None:
    now, average = small(seed=0), small(seed=1)
    path = saved({"state_dict": now, "state_dict_ema": average}, tmp_path / "a.pth")
    assert torch.equal(taken(path)[0].fc.weight, now["fc.weight"])
    assert torch.equal(taken(path, entry="state_dict_ema")[0].fc.weight, average["fc.weight"])
    with pytest.raises(CheckpointError, match="has no entry 'ema'; there are state_dict, state_dict_ema"):
        taken(path, entry="ema")


def test_an_imported_model_is_registered_with_where_it_is_from_and_localizes(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    network = theirs(num_classes=10)
    content, _ = published(network, 16)
    path = saved(content, tmp_path / "lorot_e.pth.tar")
    drawn = ["train_count=12", "val_count=10", "size=64"]
    arguments = ["import", str(path), *drawn, "--name", "published", "--data", "demo", "--root", "drawn"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--size", "64", "--crop", "whole", "--origin", "a colleague's disk"])
    assert not ended.value.code, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "registered as models:/published/1, which is models:/published@latest" in said
    assert "next: lorot wsol --model models:/published/1\n" in said

    model, card, resolved = registry.load("models:/published@latest")
    assert (outputs(model).logits - outputs(network)).abs().max() <= 1e-5
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    expected = {"file": "lorot_e.pth.tar", "sha256": digest, "from": "a colleague's disk", "entry": "state_dict"}
    assert card.origin == expected | {"bytes": str(path.stat().st_size)}
    api = tracking.client()
    for tags in (api.get_run(resolved.run_id).data.tags, api.get_model_version("published", "1").tags):
        assert {key: tags[f"origin.{key}"] for key in expected} == expected
    assert api.get_run(resolved.run_id).info.status == "FINISHED"
    assert [row.objective for row in registry.list_models()] == ["imported"]

    result = wsol.run("models:/published@latest", loader="torch", progress=False, output=tmp_path / "wsol")
    assert result.scores.num_images == 10
    (row,) = registry.list_models()
    assert "wsol.gt_known@0.5" in row.downstream


def test_importing_again_makes_another_version_and_best_stays_with_nobody(place: str, tmp_path: Path) -> None:
    path = saved(small(), tmp_path / "a.pth")
    wish = Wish(classes=NAMES, view=SMALL)
    assert [job.run(path, "twice", wish).version for _ in range(2)] == [1, 2]
    assert [row.aliases for row in registry.list_models()] == [("latest",), ()]
    assert list(tmp_path.glob("runs")) == []


def test_without_a_server_nothing_is_registered(tmp_path: Path) -> None:
    path = saved(small(), tmp_path / "a.pth")
    with pytest.raises(TrackingError, match="does not answer"):
        job.run(path, "m", Wish(classes=NAMES, view=SMALL), tracking_uri="http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="a model's name has letters"):
        job.run(path, "a/b", Wish(classes=NAMES, view=SMALL))


def test_imagenets_classes_are_the_default_of_a_thousand_outputs(tmp_path: Path) -> None:
    assert list(imagenet.CLASSES) == timm.data.ImageNetInfo("imagenet-1k").label_names()
    path = saved(small(num_classes=1000), tmp_path / "a.pth")
    _, card, _ = taken(path, classes=None)
    assert card.classes == imagenet.CLASSES
    assert View(**taken(path, classes=None, view=Wish().view)[1].view) == View(size=224)


@pytest.mark.parametrize("text", ["ant\nbee\ncat\ndog\neel\n", json.dumps(CLASSES), "ant\r\nbee\r\ncat\r\ndog\r\neel"])
def test_classes_come_from_a_file_of_lines_or_of_json(tmp_path: Path, text: str) -> None:
    path = saved(small(), tmp_path / "a.pth")
    (tmp_path / "names").write_text(text)
    assert taken(path, classes=str(tmp_path / "names"))[1].classes == CLASSES


@pytest.mark.parametrize(
    ("wish", "complaint"),
    [
        ({"classes": None}, "has 5 outputs, and nothing says what they mean; name them with --classes FILE"),
        ({"classes": "imagenet"}, "has 5 outputs, and ImageNet 1000 classes"),
        ({"classes": "a,b,c"}, "has 5 outputs, and --classes 3 classes"),
        ({"classes": "a,b,c,d,a"}, "a stand there more than once"),
        ({"classes": "a,b,,d,e"}, "class 2 has no name"),
        ({"classes": "absent.txt"}, "no such file of names"),
        ({"classes": "broken.json"}, "no JSON list"),
        ({"classes": "numbers.json"}, "a list of texts is wanted"),
        ({"network": "resnet152"}, "no such network; there are resnet18, resnet34"),
        ({"pretext": "lorot_e"}, "lorot_e has 16 labels, the file's pretext head 0 outputs; --pretext none would"),
        ({"classes": None, "data": "demo"}, "say where it lies with --root"),
        ({"data": "demo", "root": Path("x")}, "the data set has classes of its own"),
    ],
)
def test_what_does_not_go_with_the_file_is_refused_with_what_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wish: dict[str, Any], complaint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.json").write_text("[1,")
    Path("numbers.json").write_text("[1, 2, 3, 4, 5]")
    path = saved(small(), tmp_path / "a.pth")
    with pytest.raises(ConfigError, match=complaint) as caught:
        taken(path, **wish)
    assert caught.value.exit_code == 2


def test_a_pretext_head_tells_its_task_by_its_outputs() -> None:
    assert recognition.pretext_of(36, None, "f") == ("lorot_e", {"grid": 3})
    assert recognition.pretext_of(0, None, "f") == ("none", {})
    with pytest.raises(ConfigError, match="a pretext head of 7 outputs is of no task known here; --pretext none"):
        recognition.pretext_of(7, None, "f")
    with pytest.raises(ConfigError, match=r"--pretext rotation has 4 labels, .* 16 outputs; --pretext lorot_e would"):
        recognition.pretext_of(16, "rotation", "f")


class Explosive:
    """Unpickled as it wants to be, it makes a folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("exploded",))


def _compressed(path: Path) -> None:
    plain = saved({"fc.weight": torch.zeros(1_000_000)}, path.with_suffix(".plain"))
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))


def _changed(change: Any) -> Any:
    def write(path: Path) -> None:
        state = small()
        change(state)
        saved(state, path)

    return write


def _script(path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(path))


def _half_of(path: Path) -> None:
    saved(small(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _safe_but_cut(path: Path) -> None:
    content = safetensors.torch.save({"fc.weight": torch.zeros(5, 4)})
    path.write_bytes(content[:-10])


FAULTS: list[tuple[str, Any, str]] = [
    ("empty", lambda path: path.write_bytes(b""), "neither PyTorch's format nor safetensors"),
    ("a text", lambda path: path.write_text("weights, honestly"), "neither PyTorch's format nor safetensors"),
    ("a folder", lambda path: path.mkdir(), "is a folder"),
    ("absent", lambda path: None, "cannot be read"),
    ("half a file", _half_of, "damaged"),
    ("half a safetensors file", _safe_but_cut, "not a whole safetensors file"),
    ("code", lambda path: saved({"state_dict": Explosive()}, path), r"would run (posix|os)\.mkdir"),
    (
        "code, old format",
        lambda path: saved({"a": Explosive()}, path, _use_new_zipfile_serialization=False),
        r"would run (posix|os)\.mkdir",
    ),
    (
        "a whole network",
        lambda path: saved(nn.Linear(2, 2), path),
        r"wants more than tensors: unpickling it would run torch\.nn\.modules\.linear\.Linear",
    ),
    ("TorchScript", _script, "is a TorchScript program, not weights"),
    ("zip bomb", _compressed, "torch.save does not write such files"),
    ("a list", lambda path: saved([torch.zeros(2)], path), "holds a list, not a mapping"),
    ("a tensor", lambda path: saved(torch.zeros(2), path), "holds a Tensor, not a mapping"),
    ("no tensors", lambda path: saved({"epoch": 3}, path), "holds no tensors: epoch"),
    (
        "an average alone",
        lambda path: saved({"epoch": 3, "model_ema": {"a": torch.zeros(1)}}, path),
        "--entry model_ema would choose the average",
    ),
    (
        "a view of nothing",
        lambda path: saved({"fc.weight": torch.zeros(1).expand(10**6, 10**6)}, path),
        "its tensors would take 4,000,000,000,000",
    ),
    ("no classifier", _changed(lambda state: state.pop("fc.weight")), "no classifier: fc.weight"),
    ("a flat classifier", _changed(lambda state: state.update({"fc.weight": torch.zeros(9)})), "no classifier"),
    ("a missing layer", _changed(lambda state: state.pop("layer3.0.conv2.weight")), "missing: layer3.0.conv2.weight"),
    (
        "an extra layer",
        _changed(lambda state: state.update({"se.weight": torch.zeros(3)})),
        "resnet_small: the weights do not fit the network:\n  not part of the network: se.weight",
    ),
    (
        "another width",
        _changed(lambda state: state.update({"layer1.0.conv1.weight": torch.zeros(32, 8, 3, 3)})),
        r"layer1.0.conv1.weight: \(32, 8, 3, 3\) torch.float32, the network has \(16, 8, 3, 3\)",
    ),
    (
        "integers",
        _changed(lambda state: state.update({"fc.bias": torch.zeros(5, dtype=torch.int8)})),
        r"fc.bias: \(5,\) torch.int64, the network has \(5,\) torch.float32",
    ),
    (
        "NaN",
        _changed(lambda state: state["layer2.0.bn1.running_var"].fill_(float("nan"))),
        "layer2.0.bn1.running_var has values that are not finite",
    ),
    (
        "overflow",
        _changed(lambda state: state["conv1.weight"].fill_(3e38)),
        "an image of noise are not finite",
    ),
]


@pytest.mark.parametrize(("write", "complaint"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS])
def test_a_file_that_is_no_weights_of_a_network_known_here_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any, complaint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(path := tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=complaint) as caught:
        taken(path)
    assert caught.value.exit_code == 5
    assert str(path) in str(caught.value)
    assert not Path("exploded").exists()


def test_a_wish_for_another_network_names_the_layers_that_differ(tmp_path: Path) -> None:
    path = saved(theirs("resnet18").state_dict(), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"as resnet50: .*(\n.*)*missing: layer1.0.conv3.weight") as caught:
        taken(path, network="resnet50")
    assert "networks that would work: resnet18" in str(caught.value)


def test_a_network_that_is_not_known_is_compared_with_the_nearest(tmp_path: Path) -> None:
    network = timm.create_model("resnet26", pretrained=False, num_classes=5)
    with pytest.raises(CheckpointError, match=r"taken for the nearest, resnet\w+: the weights do not fit"):
        taken(saved(network.state_dict(), tmp_path / "a.pth"))


def test_a_file_above_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_file, "LARGEST_BYTES", 1000)
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail("it was read"))
    (tmp_path / "a.pth").touch()
    os.truncate(tmp_path / "a.pth", 1001)
    with pytest.raises(CheckpointError, match="1,001 bytes are no weights"):
        checkpoint_file.read(tmp_path / "a.pth")


def test_numpy_numbers_beside_the_weights_are_refused_by_their_name(tmp_path: Path) -> None:
    stream = io.BytesIO()
    torch.save({"state_dict": small(), "best": np.float64(0.5)}, stream)
    (tmp_path / "a.pth").write_bytes(stream.getvalue())
    with pytest.raises(CheckpointError, match=r"numpy\S*scalar.*torch.save\(checkpoint\['state_dict'\], FILE\)"):
        taken(tmp_path / "a.pth")


def test_the_command_says_what_it_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOROT_DEBUG", "")
    for arguments, code, complaint in (
        (["import", "absent.pth", "--name", "m"], 5, "absent.pth: cannot be read"),
        (["import", "a.pth", "--name", "m", "--mean", "1,2"], 2, "three numbers within 0 and 1"),
        (["import", "a.pth", "--name", "m", "--std", "0,1,1"], 2, "three numbers within 0 and 1"),
        (["import", "a.pth", "--name", "m", "--crop", "half"], 2, "crop 'half' does not exist"),
        (["import", "a.pth"], 2, "--name"),
        (["export", "--model", "m", "--to", "onnx", "--output", "a.pt"], 2, "onnx files end in .onnx"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        said = capsys.readouterr()
        assert (ended.value.code, complaint in said.err) == (code, True), said.err
        assert "Traceback" not in said.err


def test_what_was_done_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    content, _ = published(theirs(), 4)
    _, card, notes = taken(saved(content, tmp_path / "a.pth.tar"))
    job.show(job.Imported("m", 3, "run", card, notes), Console(width=200))
    said = capsys.readouterr().out
    assert "resnet18, 5 classes (ant, bee, ..., eel), pretext lorot_i, 4 outputs" in said
    assert "note: fc2.* is the pretext head, pretext_fc.*" in said
    assert "next: lorot wsol --model models:/m/3 --data folder --root FOLDER --split val\n" in said
