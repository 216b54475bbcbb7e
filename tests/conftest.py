"""For all tests: what the program that started them has left behind, and which of them begin first."""

import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# Under nohup SIGHUP is ignored, and so it would be by every process that a test starts.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# How long one example takes says more about the machine's other work than about the code.
settings.register_profile("lorot", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("lorot")

# The files that take minutes, the longest first: begun last, one of them would keep one process busy, the other idle.
_LONGEST = ("test_training", "test_engine", "test_meeting", "test_box_stream", "test_entrance", "test_watchdog")


@pytest.fixture(autouse=True)
def _no_signal_stays_blocked() -> Iterator[None]:
    """Every process that a later test starts would be deaf to it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    yield
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before, "this test leaves signals blocked"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    turns = {name: turn for turn, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: turns.get(item.path.stem, len(turns)))
