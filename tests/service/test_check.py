"""`lorot check`: steps, batches, learning rates, memory and storage, against hand-worked cases and real tensors."""

from collections import namedtuple
from pathlib import Path

import pytest
import torch
from rich.console import Console

from service import check, config, machine, models
from service.config import ModelConfig
from service.errors import ConfigError
from service.training import optimizers

ROOT = Path(__file__).parents[2]
DEMO = {"name": "demo", "root": "nowhere", "size": 32, "options": {"train_count": 1000, "val_count": 100}}
SMALL = {"data": DEMO, "model": {"name": "resnet_small", "width": 16}, "device": "cpu", "global_batch": 128}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "gpus", lambda: 0)


def shown(found: check.Findings) -> str:
    console = Console(width=150, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    check.show(found, console)
    return console.export_text()


def test_a_run_is_counted_as_by_hand() -> None:
    job = config.resolve(
        SMALL
        | {"duration": "3 epochs", "evaluate_every": "1 epochs", "micro_batch": 32, "checkpoint": {"every": "10 steps"}}
    )
    found = check.examine(job, workers=2)
    # 3 epochs of 1000 in batches of 128 are 23.4 steps; evaluations after 8, 16 and 24 steps; saves after 10, 20, 24.
    assert (found.workers, found.accumulation) == (2, 2)
    assert found.plan is not None
    assert (found.plan.total_steps, found.plan.evaluations, found.plan.checkpoints) == (24, 3, 3)
    assert found.missing == ()
    text = shown(found)
    assert "128 = 2 workers x micro-batch 32 x accumulation 2" in text
    assert "24 (3 epochs; 7.8 an epoch of 1,000)" in text
    assert "3, every 10 steps, and 1 minute after the last one; the last 2 and the best stay" in text


@pytest.mark.parametrize(
    ("saves", "told"),
    [
        ({"every": "10 steps", "every_minutes": None}, "8, every 10 steps; the last 2 and the best stay"),
        ({"every": None, "every_minutes": 2.5}, "2.5 minutes after the last one; the last 2 and the best stay"),
        ({"every": None, "every_minutes": None}, ""),
    ],
)
def test_checkpoints_are_told_by_steps_and_by_the_clock(saves: dict[str, object], told: str) -> None:
    found = check.examine(config.resolve(SMALL | {"duration": "80 steps", "checkpoint": saves}), workers=1)
    lines = [line.split(maxsplit=1)[1].strip() for line in shown(found).splitlines() if line.startswith("checkpoints")]
    assert lines == ([told] if told else [])


def test_nothing_is_drawn_written_or_started(tmp_path: Path) -> None:
    check.examine(config.resolve(SMALL))
    assert list(tmp_path.iterdir()) == []


def test_a_limit_shortens_the_epoch() -> None:
    job = config.resolve(SMALL | {"duration": "2 epochs", "data": DEMO | {"train_limit": 256}})
    plan = check.examine(job).plan
    assert plan is not None
    assert (plan.samples_per_epoch, plan.total_steps) == (256, 4)


def test_missing_data_is_named_and_the_rest_is_still_told() -> None:
    job = config.resolve({"data": {"name": "folder", "root": "no/such/place"}, "model": {"name": "resnet18"}})
    found = check.examine(job)
    assert found.plan is None
    assert any("no/such/place" in reason for reason in found.missing)
    assert "1000 classes (assumed), 11,689,512 parameters" in shown(found)


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="which 3 workers cannot share evenly"):
        check.examine(config.resolve(SMALL | {"micro_batch": 64}), workers=3)


@pytest.mark.parametrize(
    ("objective", "task", "labels"),
    [
        ("supervised", "none", 0),
        ("multi_task", "lorot_e", 16),
        ("augmentation", "rotation", 0),
        ("parallel_task", "rotation", 4),
    ],
)
def test_the_pretext_head_is_there_only_for_a_pretext_loss(objective: str, task: str, labels: int) -> None:
    job = config.resolve(SMALL | {"objective": {"name": objective}, "pretext": {"name": task}})
    assert check.num_pretext_labels(job) == labels
    found = check.examine(job)
    # One weight per channel of the last maps, and a bias, for each label.
    assert found.pretext_parameters == labels * (16 * 4 + 1)


@pytest.mark.parametrize("name", ["resnet18", "cifar_resnet18", "resnet_small"])
def test_parameters_are_those_of_the_real_network(name: str) -> None:
    wanted = ModelConfig(name=name)
    counted = sum(parameter.numel() for parameter in check.network(wanted, 10, 4).parameters())
    assert counted == sum(parameter.numel() for parameter in models.build(wanted, 10, 4).parameters())


def test_activations_counted_without_data_are_those_that_autograd_really_keeps() -> None:
    wanted = ModelConfig(name="resnet_small", width=16)
    model = models.build(wanted, 10, 4).train()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    images = torch.zeros(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = model(images)
    real = sum(storage.nbytes() for storage in kept.values()) / 4
    assert outputs.logits.shape == (4, 10)
    assert check.activation_bytes(check.network(wanted, 10, 4), 32) == pytest.approx(real, rel=0.02)


def test_memory_follows_zero_the_optimizer_the_average_and_the_objective() -> None:
    def memory(workers: int = 4, **changes: object) -> dict[str, int]:
        job = config.resolve(SMALL | {"micro_batch": 32} | changes)
        return check.estimate_memory(job, check.network(job.model, 10, check.num_pretext_labels(job)), workers)

    plain = memory()
    assert plain["optimizer"] == plain["weights"] == plain["gradients"]
    assert memory(optimizer={"name": "adamw"})["optimizer"] == 2 * plain["optimizer"]
    assert memory(ema={})["moving average"] == plain["weights"]
    assert memory(workers=1)["gradient exchange"] == 0
    assert memory(zero_stage=1)["optimizer"] == plain["optimizer"] // 4
    assert memory(zero_stage=1)["gradients"] == plain["gradients"]
    assert memory(zero_stage=2)["gradients"] == plain["gradients"] // 4
    assert memory(zero_stage=3)["weights"] == 2 * (plain["weights"] // 4)
    rotated = {"objective": {"name": "parallel_task"}, "pretext": {"name": "rotation"}}
    assert memory(**rotated)["activations"] == 4 * plain["activations"]
    rotated["objective"] = {"name": "parallel_task", "turns": "one"}
    assert memory(**rotated)["activations"] == 2 * plain["activations"]


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb"])
def test_optimizers_keep_as_many_states_as_the_estimate_says(name: str) -> None:
    layer = torch.nn.Linear(30, 10)
    wanted = config.OptimizerConfig(name=name)
    optimizer = optimizers.build(wanted, optimizers.parameter_groups(layer, 1e-4))
    layer(torch.ones(2, 30)).sum().backward()
    optimizer.step()
    state = optimizer.state[layer.weight]
    assert (
        sum(value.numel() for value in state.values() if torch.is_tensor(value) and value.numel() > 1)
        == 300 * (check.findings.STATES[name])
    )


def test_what_would_run_badly_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_bytes", lambda: 10**9)
    monkeypatch.setattr(machine, "cores", lambda: 2)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(check.findings.shutil, "disk_usage", lambda path: usage(10, 10, 5))
    job = config.resolve(SMALL | {"micro_batch": 16, "precision": "bf16"})
    warnings = " / ".join(check.examine(job, workers=4).warnings)
    for part in ("of memory", "share 2 CPU cores", "bf16 convolutions on a CPU", "the disk of runs"):
        assert part in warnings


@pytest.mark.parametrize(
    ("values", "bars"), [((0.0, 0.5, 1.0), "▁▅█"), ((), ""), ((0.0, 0.0), "▁▁"), ((2.0, 1.0, 0.1), "█▅▁")]
)
def test_a_sparkline_reaches_from_nothing_to_the_top(values: tuple[float, ...], bars: str) -> None:
    assert check.sparkline(values) == bars


# All but the job service's own settings, which are no job's.
SHIPPED = sorted(
    str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml") if path.name != "service.yaml"
)


@pytest.mark.parametrize("path", [path for path in SHIPPED if not path.startswith("configs/downstream/")])
def test_every_configuration_that_ships_is_valid_and_opens_with_its_command(path: str) -> None:
    text = (ROOT / path).read_text()
    assert path in "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    job = config.load(ROOT / path)
    assert job.name == Path(path).stem


@pytest.mark.parametrize("path", [path for path in SHIPPED if path.startswith("configs/downstream/")])
def test_every_configuration_of_a_detector_is_valid_on_any_classifier_and_opens_with_its_command(path: str) -> None:
    job = config.load_any(ROOT / path, ["model.backbone=models:/any@best"])
    opening = (ROOT / path).read_text().splitlines()[0]
    assert opening.startswith(f"# lorot {job.job} --model models:/")


@pytest.mark.parametrize("family", ["imagenet", "cifar10", "fashion_mnist"])
def test_variants_differ_from_their_baseline_in_two_lines(family: str) -> None:
    base = config.load(ROOT / f"configs/train/{family}-{'none' if family == 'fashion_mnist' else 'baseline'}.yaml")
    variants = sorted((ROOT / "configs/train").glob(f"{family}-*_*.yaml"))
    assert len(variants) == (3 if family == "fashion_mnist" else 5)
    for path in variants:
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        assert [line.split(":")[0] for line in lines] == ["extends", "objective", "pretext"]
        changed = config.load(path).model_dump(exclude={"name", "objective", "pretext"})
        assert changed == base.model_dump(exclude={"name", "objective", "pretext"})


def test_the_input_is_shown_with_its_sizes_repeats_and_augmentations() -> None:
    data = DEMO | {
        "sizes": [{"size": 48, "until": "1 epochs"}],
        "eval_size": 40,
        "repeats": 3,
        "augment": [{"name": "rand_augment", "options": {"magnitude": 3}}, {"name": "random_erasing"}],
    }
    found = check.examine(config.resolve(SMALL | {"data": data}))
    text = shown(found)
    assert "48 until 1 epochs, then 32 pixels a side; evaluation at 40; each image 3 times in a row" in text
    assert "rand_augment (magnitude 3), then random_erasing" in text
    # The largest size of all is what has to fit.
    at_48 = check.examine(config.resolve(SMALL | {"data": DEMO | {"size": 48}}))
    assert found.memory["activations"] == at_48.memory["activations"]
    assert found.memory["batches"] == at_48.memory["batches"]


def test_sizes_in_the_wrong_order_are_refused_where_the_data_tell_how_long_an_epoch_is() -> None:
    sizes = [{"size": 48, "until": "2 epochs"}, {"size": 40, "until": "10 steps"}]
    with pytest.raises(ConfigError, match=r"size 40 until 10 steps \(step 10\) ends before size 48 .*\(step 16\)"):
        check.examine(config.resolve(SMALL | {"data": DEMO | {"sizes": sizes}}))
