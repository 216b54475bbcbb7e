"""`lorot check` of a detector's configuration, against hand-worked cases and real networks."""

from pathlib import Path

import pytest
import torch
from rich.console import Console
from small_model import written
from small_scenes import RETINANET, drawn, job

from service import check, cli, config, machine
from service.check import detector
from service.config import DetectionConfig
from service.errors import ConfigError
from service.models import build, detectors

SOLO = {"fpn_channels": 16, "head_channels": 16, "head_convs": 1, "mask_channels": 16, "kernel_channels": 16}


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: 0)


def shown(found: check.Findings) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    check.show(found, console)
    return console.export_text()


def test_a_detectors_run_is_counted_as_by_hand(tmp_path: Path) -> None:
    drawn(tmp_path / "scenes", train=12, val=6)
    own = job(
        tmp_path,
        written(tmp_path / "model"),
        duration="3 epochs",
        evaluate_every="2 steps",
        checkpoint={"every": "3 steps"},
        schedule={"name": "cosine", "warmup": "1 steps"},
    )
    found = check.examine(own, workers=2)
    train, val = found.splits
    # Of the scenes drawn here, those without an object are not trained on.
    assert (train.samples <= 12, val.samples) == (True, 6)
    steps = -(-3 * train.samples // 4)
    assert found.plan is not None
    assert (found.plan.total_steps, found.plan.evaluations, found.plan.checkpoints) == (
        steps,
        -(-steps // 2),
        -(-steps // 3),
    )
    assert (found.workers, found.accumulation, found.classes, found.missing) == (2, 1, 3, ())
    text = shown(found)
    assert "4 = 2 workers x micro-batch 2 x accumulation 1" in text
    assert "resnet_small, trained on demo" in text
    assert "short side 64 pixels, long side at most 96" in text
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("kind", "options"), [("retinanet", RETINANET), ("solov2", SOLO)])
def test_parameters_and_activations_are_those_of_the_real_network(kind: str, options: dict[str, object]) -> None:
    trunk = config.ModelConfig(name="resnet_small", width=8)
    values = {"job": "detect" if kind == "retinanet" else "segment", "micro_batch": 1, "global_batch": 1}
    own = config.resolve_any(
        values
        | {
            "model": {"name": kind, "options": options, "backbone": "any"},
            "data": {"short_sides": [64], "long_side": 96},
            "precision": "fp32",
            "duration": "4 steps",
        }
    )
    assert isinstance(own, DetectionConfig)
    shadow, real = detector.network(own, trunk, 3), detectors.build(kind, build(trunk, 3, 0), 3, **options)
    assert [(name, part.shape, part.requires_grad) for name, part in shadow.named_parameters()] == [
        (name, part.shape, part.requires_grad) for name, part in real.named_parameters()
    ]
    kept = {part.untyped_storage().data_ptr() for part in real.parameters()}
    held: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in kept:
            held[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = detector._outputs(real.train(), torch.zeros(1, 3, 64, 96))
    real_bytes = sum(storage.nbytes() for storage in held.values())
    assert outputs is not None
    assert detector.estimate_memory(own, shadow, 1)["activations"] == pytest.approx(real_bytes, rel=0.05)


def test_what_is_frozen_needs_neither_gradients_nor_optimizer_states(tmp_path: Path) -> None:
    drawn(tmp_path / "scenes", train=4, val=2)
    model = written(tmp_path / "model")
    few, all_ = (
        check.examine(
            job(tmp_path, model, model={"backbone": str(model), "options": RETINANET | {"trainable_layers": layers}})
        )
        for layers in (0, 3)
    )
    assert few.parameters == all_.parameters
    assert few.trained_parameters < all_.trained_parameters < all_.parameters
    assert few.memory["gradients"] == 4 * few.trained_parameters
    assert all_.checkpoint_bytes == 4 * (all_.parameters + all_.trained_parameters)


def test_a_model_and_data_that_are_not_there_are_told_and_the_rest_is_still_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    path = str(config.config_file.shipped("downstream/coco-retinanet.yaml"))
    with pytest.raises(SystemExit) as ended:
        cli.main(["check", path, "model.backbone=models:/absent@best", "data.root=nowhere"])
    assert ended.value.code == 3
    told = capsys.readouterr().out
    # torchvision's retinanet_resnet50_fpn with COCO's 80 classes and 9 anchors: its 91 classes make 34.0 million.
    assert "retinanet, 80 classes (assumed)" in told
    assert "models:/absent@best, taken for a resnet50" in told
    assert "nothing was registered yet" in told
    assert "nowhere" in told


def test_a_run_that_is_too_short_for_its_schedule_is_refused_as_training_would(tmp_path: Path) -> None:
    drawn(tmp_path / "scenes", train=4, val=2)
    with pytest.raises(ConfigError, match=r"schedule\.warmup: '9 steps' ends at step 9 of 4"):
        check.examine(job(tmp_path, written(tmp_path / "model"), schedule={"name": "cosine", "warmup": "9 steps"}))


@pytest.mark.parametrize("command", ["plan", "profile"])
def test_what_knows_classifiers_only_says_what_works_instead(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = str(config.config_file.shipped("downstream/coco-retinanet.yaml"))
    with pytest.raises(SystemExit) as ended:
        cli.main([command, path, "model.backbone=models:/any@best"])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "for classifiers only; `lorot check` counts its steps" in told
    assert "`lorot detect ... duration='20 steps'` shows its images/s" in told
