"""What other people's jobs may do to one's terminal: colour it."""

import itertools
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.commands import jobs
from service.commands.terminal_text import harmless

CLIPBOARD, TITLE, CLEAR = b"\x1b]52;c;cm0gLXJmIH4=\x07", b"\x1b]0;title\x1b\\", b"\x1b[2J\x1b[H"
QUESTION, DEVICE = b"\x1b[6n\x1b[>c", b"\x1bP$q q\x1b\\"
PROGRESS = "\r 50%|█████     | \x1b[32m5/10\x1b[0m\x1b[K".encode()


def shown(*pieces: bytes) -> bytes:
    return b"".join(harmless(pieces))


@pytest.mark.parametrize("order", [CLIPBOARD, TITLE, CLEAR, QUESTION, DEVICE, b"\x1bc", b"\x07", b"\xc2\x9b2J"])
def test_a_job_gives_no_orders_to_a_terminal(order: bytes) -> None:
    said = shown(b"step 1\n" + order + b"step 2\n")
    assert said.startswith(b"step 1\n")
    assert said.endswith(b"step 2\n")
    assert not set(said) & {0x1B, 0x07, 0x9B}


def test_colours_and_the_bars_of_progress_stay_as_they_are() -> None:
    assert shown(PROGRESS) == PROGRESS
    assert shown(b"10%\x08\x08\x0820%") == b"10%\x08\x08\x0820%"
    assert shown(b"a\tb\r\n\xff") == b"a\tb\r\n\xef\xbf\xbd"


def test_an_order_that_nobody_ends_hides_nothing_after_its_line() -> None:
    assert shown(b"\x1b]0;never ended\nloss 2.3\n") == b"\nloss 2.3\n"
    assert shown(b"\x1b]0;" + b"x" * 10_000, b"\nloss\n").endswith(b"\nloss\n")


@given(st.binary(max_size=60), st.lists(st.integers(0, 60), max_size=4))
def test_nothing_gets_by_wherever_it_is_cut(noise: bytes, cuts: list[int]) -> None:
    text = noise[:30] + CLIPBOARD + CLEAR + PROGRESS + noise[30:] + b"\x1b[5"
    places = [0, *sorted(cuts), len(text)]
    said = shown(*(text[start:end] for start, end in itertools.pairwise(places)))
    rest = said.replace(b"\x1b[32m", b"").replace(b"\x1b[0m", b"").replace(b"\x1b[K", b"")
    assert b"\x1b]" not in rest
    assert b"\x1b[2J" not in rest
    assert b"\x07" not in rest


@pytest.mark.parametrize("is_terminal", [True, False])
def test_logs_are_made_harmless_for_terminals_and_left_alone_for_files(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    class Desk:
        def logs(self, *_: Any, **__: Any) -> Iterator[bytes]:
            yield b"step 1" + TITLE + b"\n"

        def __enter__(self) -> "Desk":
            return self

        def __exit__(self, *_: object) -> None:
            """Nothing is open."""

    monkeypatch.setattr(jobs, "service", lambda *_: Desk())
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    jobs.logs("abcdef")
    assert capsysbinary.readouterr().out == (b"step 1\n" if is_terminal else b"step 1" + TITLE + b"\n")
