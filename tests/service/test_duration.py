"""Durations: what people may write, and how many optimizer steps it is."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.duration import Duration


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("90 epochs", 90, "epochs"),
        ("1 epoch", 1, "epochs"),
        ("0.5epochs", Fraction(1, 2), "epochs"),
        ("5000 steps", 5000, "steps"),
        ("1.2e6 samples", 1_200_000, "samples"),
        ("1. samples", 1, "samples"),
        ("1e-3 epochs", Fraction(1, 1000), "epochs"),
        ("5 %", 5, "%"),
        ("2.5 percent", Fraction(5, 2), "%"),
        (" 3 EPOCHS ", 3, "epochs"),
    ],
)
def test_people_write_durations_in_many_ways(text: str, amount: Fraction, unit: str) -> None:
    assert Duration.parse(text) == Duration(Fraction(amount), unit)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "90",
        "epochs",
        "-1 steps",
        "3 minutes",
        "1 % epochs",
        "1,5 epochs",
        "nan steps",
        "1e999999999 steps",
        "٣ steps",
    ],
)
def test_what_is_no_duration_is_refused_with_the_forms_that_work(text: str) -> None:
    with pytest.raises(ValueError, match="90 epochs, 5000 steps, 1e6 samples or 5 %"):
        Duration.parse(text)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("7 steps", 7),
        ("1 epochs", 8),  # 1000 samples in batches of 128: the eighth is partly of the next epoch
        ("2 epochs", 16),  # 15.625
        ("129 samples", 2),
        ("128 samples", 1),
        ("5 %", 11),  # of 201 steps: 10.05
    ],
)
def test_steps_are_rounded_up_so_that_every_sample_is_covered(text: str, steps: int) -> None:
    assert Duration.parse(text).steps(samples_per_epoch=1000, global_batch=128, total_steps=201) == steps


def test_a_decimal_is_exact_where_binary_floats_would_add_a_step() -> None:
    # 0.07 * 100 is 7.000000000000001 in floats, which would round up to 8.
    assert Duration.parse("0.07 epochs").steps(samples_per_epoch=100, global_batch=1) == 7


def test_a_share_needs_to_know_of_what() -> None:
    with pytest.raises(ValueError, match="share of a run of unknown length"):
        Duration.parse("5 %").steps(samples_per_epoch=1000, global_batch=128)


@given(st.integers(0, 10**12), st.sampled_from(["steps", "epochs", "samples", "%"]))
def test_what_is_printed_reads_back(amount: int, unit: str) -> None:
    duration = Duration(Fraction(amount), unit)
    assert Duration.parse(str(duration)) == duration


@given(st.decimals(0, 10**6, places=6), st.integers(1, 10**7), st.integers(1, 10**5))
def test_a_fraction_of_an_epoch_reads_back_after_printing(amount: object, samples: int, batch: int) -> None:
    duration = Duration.parse(f"{amount} epochs")
    again = Duration.parse(str(duration))
    sizes = {"samples_per_epoch": samples, "global_batch": batch}
    assert again == duration
    assert again.steps(**sizes) * batch >= duration.amount * samples > (again.steps(**sizes) - 1) * batch
