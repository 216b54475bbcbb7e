"""What a run left out is counted once, over its parts, and named with the reason."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from pipelines import datasets
from pipelines.manifest import Manifest
from service.run_folder import RunFolder
from service.training.distributed import World
from service.training.left_out import LeftOut

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture
def splits(tmp_path: Path) -> dict[str, Manifest]:
    for split in ("train", "val"):
        place = tmp_path / "set" / split / "cat"
        place.mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (8, 8)).save(place / f"{number}.png")
    opened = {split: datasets.load("folder", tmp_path / "set", split) for split in ("train", "val")}
    return {"train": opened["train"], "eval": opened["val"]}


def test_several_loaders_of_a_split_count_together_as_they_go_on(splits: dict[str, Manifest], tmp_path: Path) -> None:
    found = LeftOut(splits, ALONE)
    live: dict[int, str] = {}
    found.follow("train", live)
    found.follow("train", {1: "b: cut"})
    found.follow("eval", {})
    live[3] = "d: empty"
    assert found.state() == {"train": [1, 3], "eval": []}
    folder = RunFolder(tmp_path)
    assert found.write(folder) == {"train": 2, "eval": 0}
    assert folder.read("left_out.json") == {"train": ["b: cut", "d: empty"], "eval": []}


def test_a_resumed_run_names_what_its_earlier_part_met(splits: dict[str, Manifest], tmp_path: Path) -> None:
    found = LeftOut(splits, ALONE)
    found.load_state({"train": [2], "eval": [0]})
    found.follow("train", {2: "c: cut", 1: "b: cut"})
    folder = RunFolder(tmp_path)
    assert found.write(folder) == {"train": 2, "eval": 1}
    # Its reason was told in the earlier part's log; where it lies is known.
    told = {"train": ["b: cut", "c: cut"], "eval": [f"{tmp_path}/set/val/cat/0.png"]}
    assert folder.read("left_out.json") == told


def test_a_run_that_left_nothing_out_writes_no_list(splits: dict[str, Manifest], tmp_path: Path) -> None:
    found = LeftOut(splits, ALONE)
    found.load_state({})
    assert found.write(RunFolder(tmp_path)) == {"train": 0, "eval": 0}
    assert not (tmp_path / "left_out.json").exists()
