"""`lorot data demo-coco`, as a person runs it."""

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from pipelines import datasets
from service import cli
from service.errors import ConfigError


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["data", "demo-coco", *arguments])


def test_the_command_draws_both_splits_and_says_what_they_hold(tmp_path: Path) -> None:
    done = run(str(tmp_path / "scenes"), "train_count=8", "val_count=3", "size=48", "classes=3")
    assert done.exit_code == 0, done.output
    train, val = (datasets.load("coco", tmp_path / "scenes", split) for split in ("train", "val"))
    assert (len(train), len(val), len(train.classes)) == (8, 3, 3)
    assert train.instances is not None
    assert f"{len(train.instances)}, with masks; {train.heading.num_trainable} images to learn from" in done.output
    assert "coco val" in done.output
    stats = CliRunner().invoke(cli.app, ["data", "stats", str(tmp_path / "scenes"), "--name", "coco", "--split", "val"])
    counts = np.bincount(val.instances.labels, minlength=3) if val.instances is not None else np.zeros(3)
    assert f"3: {counts.min()} objects in the smallest" in stats.output
    assert "masks     yes" in stats.output


def test_an_unknown_option_is_refused_with_the_nearest_one(tmp_path: Path) -> None:
    done = run(str(tmp_path / "scenes"), "train_cuont=8")
    assert isinstance(done.exception, ConfigError)
    assert "no option 'train_cuont'; did you mean 'train_count'?" in str(done.exception)
    assert not (tmp_path / "scenes").exists()


@pytest.mark.parametrize("option", ["size=3", "most=many"])
def test_a_value_that_cannot_be_is_refused(tmp_path: Path, option: str) -> None:
    done = run(str(tmp_path / "scenes"), option)
    assert done.exit_code != 0
    assert "is not a whole number from" in str(done.exception)
