"""What a resumed run has to agree with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from service import config
from service.config import JobConfig
from service.errors import CheckpointError
from service.run_folder import RunFolder
from service.training import checkpoint, starting_point
from service.training.distributed import World
from service.training.lengths import Lengths

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


def test_the_same_job_goes_on(tmp_path: Path) -> None:
    given = (f"data.augment={AUGMENT}", "data.sizes=[{size: 16, until: 20 steps}]", "data.repeats=2")
    found = resume(tmp_path, facts(tmp_path, *given), facts(tmp_path, *given))
    assert found is not None
    assert found.step == 7


def test_a_fact_that_an_older_version_did_not_write_down_is_not_compared(tmp_path: Path) -> None:
    older = {name: value for name, value in facts(tmp_path).items() if not name.startswith("data.")}
    assert resume(tmp_path, older, facts(tmp_path, "data.repeats=2")) is not None
    with pytest.raises(CheckpointError, match="seed: 0 then, 1 now"):
        resume(tmp_path, older, facts(tmp_path, "seed=1"))
