"""The samples that workers were given: every line of a later attempt is whole, whatever the one before left behind."""

import json
from pathlib import Path

import pytest
import torch

from pipelines.batch import Batch
from service.training import sample_log
from service.training.distributed import World
from tests.integration.sample_logs import by_step


def batch(*ids: int) -> Batch:
    nothing = torch.zeros(len(ids))
    return Batch(nothing, nothing, nothing, nothing, nothing, torch.tensor(ids), nothing)


@pytest.mark.parametrize("left", ["", '{"attempt": "0", "step": 3, "i', '{"attempt": "0", "step": 3, "ids": [[9]]}\n'])
def test_each_step_has_a_line_of_its_own_after_a_line_that_was_cut_short(tmp_path: Path, left: str) -> None:
    path = tmp_path / "samples-rank0.jsonl"
    path.write_text(left)
    world = World(0, 1, 0, 1, torch.device("cpu"))
    batches = [batch(1, 2), batch(3, 4), batch(5, 6), batch(7, 8)]
    assert len(list(sample_log.logged(iter(batches), tmp_path, world, first_step=3, accumulation=2))) == 4
    lines = path.read_text().splitlines()[-2:]
    assert [json.loads(line)["ids"] for line in lines] == [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]
    assert [json.loads(line)["step"] for line in lines] == [4, 5]


def test_what_two_workers_were_given_is_of_one_attempt_and_the_next_one_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def from_main(text: str, _device: torch.device) -> str:
        told.extend([text] if text else [])
        return told[-1]

    monkeypatch.setattr(sample_log.distributed, "from_main", from_main)
    for first_step, given in ((0, ([1, 2], [3, 4], [5, 6], [7, 8])), (1, ([9, 10], [11, 12]))):
        for rank in (0, 1):
            world = World(rank, 2, rank, 2, torch.device("cpu"))
            own = [batch(*ids) for ids in given[rank::2]]
            assert len(list(sample_log.logged(iter(own), tmp_path, world, first_step, accumulation=1))) == len(own)
    assert by_step(tmp_path) == {1: [(1, 2), (3, 4)], 2: [(9, 10), (11, 12)]}
