"""A writer that is killed, or finds the disk full, at every single moment: the old checkpoint or the new one, whole."""

import json
import signal
import subprocess
import sys
from typing import Any

import pytest

Round = dict[str, Any]
# By scenario: what a run can go on from, as (step, which one of that step).
OLD = {"first": None, "next": [2, 0], "again": [3, 0]}
NEW = [3, 1]


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory) -> list[Round]:
    folder = tmp_path_factory.mktemp("kill")
    line = [sys.executable, "-m", "tests.service.checkpoint_program", str(folder)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: list[Round] = json.loads(done.stdout)
    return found


def test_every_kind_of_change_to_the_disk_was_a_moment_to_die(rounds: list[Round]) -> None:
    for scenario in OLD:
        calls = [one["call"] for one in rounds if one["scenario"] == scenario and one["how"] == "before"]
        # Three files of tensors and the index: each is made, written in several pieces and flushed.
        assert {"open", "write", "fsync", "mkdir", "rename"} <= set(calls)
        assert calls.count("open") == 4
        assert calls.count("fsync") >= 6
    assert {"unlink", "rmdir"} <= {one["call"] for one in rounds if one["scenario"] == "next"}
    assert all(one["code"] == -signal.SIGKILL for one in rounds if one["how"] != "full")


def test_what_is_there_afterwards_is_the_old_one_or_the_new_one_whole(rounds: list[Round]) -> None:
    # Whole: the program has compared every tensor.
    for scenario, old in OLD.items():
        own = [one for one in rounds if one["scenario"] == scenario]
        assert all(one["found"] in (old, NEW) for one in own)
        killed = [one["found"] for one in own if one["how"] == "before"]
        assert killed[0] == old
        assert killed[-1] == NEW
        # In the order of the moments it changes once.
        assert killed == sorted(killed, key=lambda found: found == NEW)


def test_nothing_old_goes_before_the_new_one_is_there(rounds: list[Round]) -> None:
    for one in rounds:
        if one["scenario"] == "next" and one["found"] != NEW:
            assert {"step-00000001", "step-00000002"} <= set(one["there"]), one


def test_the_next_save_works_and_clears_up_what_was_left(rounds: list[Round]) -> None:
    assert all(one["next"] == [4, 2] for one in rounds)
    assert all(one["left"] == ["step-00000004"] for one in rounds)


def test_a_full_disk_is_a_storage_error_unless_only_something_old_could_not_be_deleted(rounds: list[Round]) -> None:
    for one in rounds:
        if one["how"] == "full":
            assert one["code"] in (0, 7), one
            assert one["code"] == 7 or one["found"] == NEW, one
            # The half-written one has gone again: its room is needed.
            assert not any(name.endswith(".writing") for name in one["there"]), one


def test_all_is_flushed_before_it_gets_its_name_and_the_name_before_anything_goes(rounds: list[Round]) -> None:
    calls = [one["call"] for one in rounds if one["scenario"] == "next" and one["how"] == "before"]
    named = calls.index("rename")
    opened = [number for number, call in enumerate(calls) if call == "open"]
    for start, end in zip(opened, [*opened[1:], named], strict=True):
        written = max(number for number in range(start, end) if calls[number] == "write")
        assert "fsync" in calls[written:end], "each file"
    assert calls[named - 2 : named] == ["fsync", "fsync"], "the index, and the folder's entries"
    assert calls[named + 1] == "fsync", "the name"
    assert "unlink" not in calls[: named + 2]
