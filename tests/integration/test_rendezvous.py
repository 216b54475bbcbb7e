"""The place where machines meet: it outlives everybody who comes there."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from machines import ROOT

pytestmark = pytest.mark.integration
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
GUEST = """
import os, signal, sys
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", int(sys.argv[1]), is_master=False)
print(store.add("guests", 1), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def serve(*arguments: str) -> subprocess.Popen[str]:
    """Start it with SIGINT ignored, as a script's background processes have it."""
    line = [sys.executable, "-m", "service.cli", "rendezvous", "--host", "127.0.0.1", *arguments]
    return subprocess.Popen(
        line,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )


@pytest.fixture
def server() -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = serve("--port", "0")
    assert process.stdout is not None
    ready = re.match(r"rendezvous ready at 127\.0\.0\.1:(\d+)\n", process.stdout.readline())
    assert ready
    yield process, ready[1]
    process.kill()
    process.communicate()


def test_the_rendezvous_keeps_what_guests_left_that_were_killed_and_ends_when_it_alone_is_asked_to(
    server: tuple[subprocess.Popen[str], str],
) -> None:
    process, port = server
    # Ctrl-C in the terminal of the script that started it.
    process.send_signal(signal.SIGINT)
    for number in range(1, 4):
        guest = subprocess.run(
            [sys.executable, "-c", GUEST, port], env=ENVIRONMENT, capture_output=True, text=True, timeout=120
        )
        assert (guest.returncode, guest.stdout) == (-signal.SIGKILL, f"{number}\n")
    assert process.poll() is None
    assert process.stdout is not None
    assert f"--rdzv 127.0.0.1:{port}\n" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 0


def test_a_port_that_is_taken_is_told_in_one_line(server: tuple[subprocess.Popen[str], str]) -> None:
    _, port = server
    second = serve("--port", port)
    _, complaints = second.communicate(timeout=120)
    assert second.returncode == 2
    assert f"error: no rendezvous at 127.0.0.1:{port}" in complaints
    assert "is the port taken" in complaints
    assert "Traceback" not in complaints
