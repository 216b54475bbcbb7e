"""The soak's own judges: what would be lost is found."""

import json
import re

import numpy as np
import pytest

from tests.soak import checks
from tests.soak.checks import Point

TOTAL, BATCH = 10, 4


def stream(num_steps: int) -> list[list[int]]:
    """Epochs of shuffled samples, cut into batches."""
    order = np.concatenate([np.random.default_rng(epoch).permutation(TOTAL) for epoch in range(num_steps)])
    return order[: num_steps * BATCH].reshape(num_steps, BATCH).tolist()


def test_whole_epochs_that_end_within_steps_are_no_loss():
    for num_steps in (1, 5, 7, 23):
        assert checks.samples(stream(num_steps), TOTAL, BATCH) == []


@pytest.mark.parametrize("step", [0, 6, 12])
def test_a_sample_that_is_seen_instead_of_another_is_found(step):
    order = stream(23)
    order[step][0] = next(sample for sample in range(TOTAL) if sample not in order[step])
    assert "samples had been seen" in checks.samples(order, TOTAL, BATCH)[0]


def test_a_step_that_was_left_out_or_made_twice_or_is_not_whole_is_found():
    assert checks.samples(stream(23)[:5] + stream(23)[6:], TOTAL, BATCH)
    assert checks.samples(stream(23)[:6] + stream(23)[5:], TOTAL, BATCH)
    assert "step 3 had 3 samples" in checks.samples([*stream(2), [0, 1, 2]], TOTAL, BATCH)
    assert checks.samples([], TOTAL, BATCH) == ["no samples were written down"]


LINES = [{"step": step, "time_s": 1.0, "train/loss": 1 / step} for step in (50, 100, 120)]
HISTORY = [Point(step, 1 / step) for step in (50, 100, 120)]


def test_a_record_that_is_all_there_is_no_loss():
    assert checks.record([("train/loss", HISTORY)], LINES) == []
    assert checks.steps(LINES, 120, 50) == []


@pytest.mark.parametrize(
    ("history", "complaint"),
    [
        ([], r"lost steps \[50, 100, 120\]"),
        ([HISTORY[0], HISTORY[2]], r"lost steps \[100\]"),
        ([*HISTORY, HISTORY[2]], r"repeated steps \[120\]"),
        ([HISTORY[1], HISTORY[0], HISTORY[2]], "train/loss"),
        ([*HISTORY, Point(170, 1.0)], r"unknown steps \[170\]"),
        ([*HISTORY[:2], Point(120, 1.0)], "other values"),
    ],
)
def test_a_point_that_is_lost_repeated_out_of_order_or_changed_on_the_server_is_found(history, complaint):
    (found,) = checks.record([("train/loss", history)] if history else [], LINES)
    assert re.search(complaint, found)


def test_of_what_the_clock_said_only_the_steps_have_to_agree():
    lines = [{"step": 50, "train/images_per_s": 7.0, "train/step_time_p50_s": 1.0}]
    both = [("train/images_per_s", [Point(50, 9.0)]), ("train/step_time_p50_s", [Point(50, 2.0)])]
    assert checks.record(both, lines) == []
    assert len(checks.record(both[:1], lines)) == 1


def test_figures_that_were_never_written_are_found():
    assert "[100]" in checks.steps([LINES[0], LINES[2]], 120, 50)[0]
    assert "[120]" in checks.steps(LINES[:2], 120, 50)[0]
    assert checks.steps([*LINES, LINES[2]], 120, 50)


def test_images_that_are_named_wrongly_or_not_at_all_as_left_out_are_found(tmp_path):
    assert checks.left_out(tmp_path, []) == []
    assert checks.left_out(tmp_path, ["7.jpg"]) == ["left out of evaluations: [], not ['7.jpg']"]
    named = {"train": [], "eval": ["/data/val/7.jpg: cannot be decoded"]}
    (tmp_path / "left_out.json").write_text(json.dumps(named))
    assert checks.left_out(tmp_path, ["7.jpg"]) == []
    assert checks.left_out(tmp_path, []) == ["left out of evaluations: ['7.jpg'], not []"]
    (tmp_path / "left_out.json").write_text(json.dumps(named | {"train": ["/data/train/3.jpg: empty"]}))
    assert "training were left out" in checks.left_out(tmp_path, ["7.jpg"])[0]


def test_a_launcher_that_ended_by_what_it_does_not_know_or_by_nobodys_signal_is_found():
    assert checks.ends({0: 1, -9: 8, -15: 1, 2: 3, 3: 13, 4: 2, 7: 11, 8: 5, 75: 11}) == []
    assert checks.ends({-11: 1, 0: 1, 1: 2}) == [
        "launchers ended with exit code -11, 1 times",
        "launchers ended with exit code 1, 2 times",
    ]


LOSSES = [{"step": 60, "samples": [3, 1]}, {"step": 90, "samples": [7, 2]}, {"step": 60, "samples": [5, 8]}]
SUMMARY = {
    "skipped_steps": [60, 90],
    "nonfinite_steps": [
        {"step": 60, "kind": "loss", "samples": [5, 8], "num_samples": 2},
        {"step": 90, "kind": "loss", "samples": [7, 2], "num_samples": 2},
    ],
}
COUNTS = [{"step": step, "train/skipped_steps": count} for step, count in ((50, 0), (100, 2), (120, 2))]


def test_steps_that_are_left_out_for_what_they_last_came_to_are_no_loss():
    assert checks.not_finite(SUMMARY, COUNTS, LOSSES) == []
    # Under another policy, and none left out by then, it is not counted.
    assert checks.not_finite(SUMMARY, COUNTS[1:], LOSSES) == []
    assert checks.not_finite({"skipped_steps": [], "nonfinite_steps": []}, [], []) == []


@pytest.mark.parametrize(
    ("summary", "counts", "losses", "complaint"),
    [
        (SUMMARY, COUNTS, LOSSES[1:2], r"steps \[60, 90\] left out, not of \[90\]"),
        (SUMMARY, COUNTS, [*LOSSES, {"step": 110, "samples": [4]}], r"not of \[60, 90, 110\]"),
        (SUMMARY, COUNTS, LOSSES[:2], r"'step': 60.*\[5, 8\]"),
        (SUMMARY, [{"step": 100, "train/skipped_steps": 1}], LOSSES, r"\[\(100, 1\)\]"),
        (SUMMARY | {"nonfinite_steps": SUMMARY["nonfinite_steps"][:1]}, COUNTS, LOSSES, "names only 1 of 2"),
    ],
)
def test_an_update_that_was_left_out_or_not_or_told_otherwise_is_found(summary, counts, losses, complaint):
    assert any(re.search(complaint, found) for found in checks.not_finite(summary, counts, losses))


def test_an_image_has_the_name_of_the_file_that_it_was_made_from():
    assert checks.image_name("/data/val/7.jpg") == "7.jpg"
    assert checks.image_name("/data/val-000000.tar, byte 512 (made from v1/val/car/7.jpg)") == "7.jpg"
