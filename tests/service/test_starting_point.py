"""What a resumed run has to agree with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from service import config, models
from service.config import JobConfig, ModelConfig
from service.errors import CheckpointError
from service.models.heads import Classifier
from service.run_folder import RunFolder
from service.training import checkpoint, starting_point
from service.training.distributed import World
from service.training.ema import Ema
from service.training.lengths import Lengths
from tests.service import small_model

WORLD = World(0, 1, 0, 1, torch.device("cpu"))
AUGMENT = "[{name: rand_augment, options: {magnitude: 7}}]"


@dataclass
class Opened:
    """What the facts say of a split."""

    digest: str
    classes: tuple[str, ...] = ("cat", "dog")


def facts(place: Path, *overrides: str) -> dict[str, Any]:
    (place / "job.yaml").write_text("data: {name: folder, root: data, size: 32}\nduration: 50 steps\n")
    job: JobConfig = config.load(place / "job.yaml", list(overrides))
    splits: Any = Opened("a"), Opened("b")
    return starting_point.facts_of(job, Lengths.of(job, 1000), *splits)


def resume(place: Path, written: dict[str, Any], now: dict[str, Any]) -> checkpoint.Checkpoint | None:
    folder = RunFolder(place / "run")
    model: Any = torch.nn.Linear(2, 2)
    checkpoint.save(folder.checkpoints, 7, {"weights": model.state_dict()}, facts=written)
    return starting_point.newest(folder, now, model, WORLD)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ("micro_batch=32", "micro_batch: 64 then, 32 now"),
        ("data.order=blocks", "data.order: 'global' then, 'blocks' now"),
        ("data.repeats=2", "data.repeats: 1 then, 2 now"),
        ("data.train_limit=1000", "data.train_limit: None then, 1000 now"),
        ("data.sizes=[{size: 16, until: 20 steps}]", "data.sizes: \\[\\] then, .*16.*20, 32"),
        (f"data.augment={AUGMENT}", "data.augment: .*rand_augment"),
        ("pretext.name=lorot_e", "pretext: .*lorot_e"),
    ],
)
def test_what_changes_the_order_or_the_draws_is_refused_by_name(tmp_path: Path, changed: str, named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        resume(
            tmp_path,
            facts(tmp_path, "objective.name=multi_task", "pretext.name=lorot_i"),
            facts(tmp_path, "objective.name=multi_task", "pretext.name=lorot_i", changed),
        )


def test_the_block_counts_in_block_order_only(tmp_path: Path) -> None:
    assert resume(tmp_path, facts(tmp_path), facts(tmp_path, "data.block=7")) is not None
    with pytest.raises(CheckpointError, match=r"data\.block: 1024 then, 7 now"):
        resume(tmp_path, facts(tmp_path, "data.order=blocks"), facts(tmp_path, "data.order=blocks", "data.block=7"))


def test_the_same_job_goes_on_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = (f"data.augment={AUGMENT}", "data.sizes=[{size: 16, until: 20 steps}]", "data.repeats=2")
    found = resume(tmp_path, facts(tmp_path, *given), facts(tmp_path, *given))
    assert found is not None
    assert found.step == 7
    assert caplog.messages == []


def test_a_fact_that_an_older_version_did_not_write_down_is_named_and_not_compared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older = {name: value for name, value in facts(tmp_path).items() if name not in ("data.repeats", "data.augment")}
    assert resume(tmp_path, older, facts(tmp_path, "data.repeats=2")) is not None
    assert caplog.messages[-1].endswith("not known of this checkpoint, taken to be as now: data.augment, data.repeats")
    with pytest.raises(CheckpointError, match="seed: 0 then, 1 now"):
        resume(tmp_path, older, facts(tmp_path, "seed=1"))


# Starting from another model's weights.


def network(width: int = 8, classes: int = 3, pretext: int = 0, seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    return models.build(ModelConfig(name="resnet_small", width=width), classes, pretext)


def run_with_checkpoints(folder: Path, *, average: bool) -> tuple[Classifier, Classifier]:
    """A run that got to step 8: its newest weights, and their average."""
    weights, averaged = network(seed=1), network(seed=2)
    for step, own, mean in ((4, network(seed=3), network(seed=4)), (8, weights, averaged)):
        parts = {"weights": own.state_dict(), "optimizer": {}}
        if average:
            parts["ema"] = dict(Ema(mean, 0.9).state_dict())
        checkpoint.save(RunFolder(folder).checkpoints, step, parts, facts={})
    return weights, averaged


def same(one: Classifier, other: Classifier) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("below", [".", "checkpoints", "checkpoints/step-00000008"])
@pytest.mark.parametrize("average", [True, False])
def test_weights_come_from_a_runs_folder_its_checkpoints_or_one_of_them(
    tmp_path: Path, below: str, average: bool
) -> None:
    weights, averaged = run_with_checkpoints(tmp_path, average=average)
    model = network(seed=9)
    starting_point.start_from(model, str(tmp_path / below), None)
    assert same(model, averaged if average else weights)


def test_the_newest_sound_one_of_a_run_is_taken_and_a_damaged_one_that_is_named_is_refused(tmp_path: Path) -> None:
    run_with_checkpoints(tmp_path, average=False)
    damaged = tmp_path / "checkpoints" / "step-00000008"
    (damaged / "weights.safetensors").write_bytes(b"")
    model = network(seed=9)
    starting_point.start_from(model, str(tmp_path), None)
    assert same(model, network(seed=3))
    with pytest.raises(CheckpointError, match="truncated"):
        starting_point.start_from(model, str(damaged), None)
    for step in (4, 8):
        (tmp_path / "checkpoints" / f"step-0000000{step}" / "checkpoint.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no sound checkpoint"):
        starting_point.start_from(model, str(tmp_path), None)


def test_what_does_not_fit_stays_as_it_was_drawn_and_is_named(tmp_path: Path) -> None:
    run_with_checkpoints(tmp_path, average=False)
    model, before = network(classes=7, pretext=4, seed=9), network(classes=7, pretext=4, seed=9)
    told = starting_point.start_from(model, str(tmp_path), None)
    heads = {name: value for name, value in model.state_dict().items() if "fc." in name}
    assert all(torch.equal(value, before.state_dict()[name]) for name, value in heads.items())
    trunk = network(seed=1).state_dict()
    assert all(torch.equal(value, trunk[name]) for name, value in model.state_dict().items() if name not in heads)
    assert told.startswith(f"{len(trunk) - 2} of {len(model.state_dict())} tensors from {tmp_path}")
    assert "drawn anew: fc.bias, fc.weight, pretext_fc.bias, pretext_fc.weight" in told
    assert "not taken over: fc.bias, fc.weight" in told


def test_another_network_is_refused_by_its_layers(tmp_path: Path) -> None:
    run_with_checkpoints(tmp_path, average=False)
    model = network(width=16, seed=9)
    with pytest.raises(CheckpointError, match="it is another model's"):
        starting_point.start_from(model, str(tmp_path), None)
    assert same(model, network(width=16, seed=9))


def test_a_folder_with_nothing_in_it_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no model here"):
        starting_point.start_from(network(), str(tmp_path), None)


def test_a_bundle_is_still_a_model(tmp_path: Path) -> None:
    small_model.written(tmp_path / "model", seed=5)
    model = network(classes=3, pretext=16, seed=9)
    starting_point.start_from(model, str(tmp_path / "model"), None)
    assert same(model, small_model.network(seed=5))


def test_an_older_or_foreign_checkpoint_is_refused_with_what_differs(tmp_path: Path) -> None:
    place = tmp_path / "run" / "checkpoints" / "step-00000007"
    place.mkdir(parents=True)
    (place / "mp_rank_00_model_states.pt").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=r"no checkpoint of this program.*it holds mp_rank_00_model_states\.pt"):
        starting_point.choose(RunFolder(tmp_path / "run"), WORLD)
    (place / "checkpoint.json").write_text('{"format": 0, "step": 7}')
    with pytest.raises(CheckpointError, match=r"format 0; this version reads format 1\n--restart begins anew"):
        starting_point.choose(RunFolder(tmp_path / "run"), WORLD)


def test_a_run_without_a_checkpoint_has_none_to_go_on_from(tmp_path: Path) -> None:
    assert starting_point.choose(RunFolder(tmp_path / "run"), WORLD) is None
