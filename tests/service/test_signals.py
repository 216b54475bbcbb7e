"""A process that hears signals, asked to stop in every phase of its life. Real signals, a real process each."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@contextmanager
def process(program: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process that runs `program` with `signals` listening, and has said "ready" by itself."""
    text = "import os, signal, sys, time\nfrom service.training.signals import Signals, Stopped\n"
    line = [sys.executable, "-c", text + textwrap.dedent(program)]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHELASTIC", "LOROT"))}
    child = subprocess.Popen(
        line, cwd=ROOT, env=inherited | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        yield child
    finally:
        child.kill()
        child.wait()
        for stream in (child.stdout, child.stderr):
            if stream is not None:
                stream.close()


def ended(child: subprocess.Popen[str], timeout_s: float = 30.0) -> tuple[str, str]:
    """What a process had still to say. Popen.communicate would lose what readline has read ahead of its line."""
    child.wait(timeout=timeout_s)
    assert child.stdout is not None
    assert child.stderr is not None
    return child.stdout.read(), child.stderr.read()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGHUP, 75)]
)
def test_before_there_is_anything_to_save_a_signal_ends_the_process_at_once(number: signal.Signals, code: int) -> None:
    program = """
        signals = Signals()
        signals.listen()
        try:
            try:
                print("ready", flush=True)
                time.sleep(60)
            except Exception:
                print("a library swallowed it")
        except Stopped as stopped:
            print(stopped)
            sys.exit(stopped.exit_code)
    """
    with process(program) as child:
        child.send_signal(number)
        said, _ = ended(child)
    assert child.returncode == code
    assert said.startswith(f"stopped by {number.name} before the first step")


def test_once_deferred_signals_are_noted_and_however_many_change_nothing(tmp_path: Path) -> None:
    program = """
        signals = Signals()
        signals.listen()
        signals.defer()
        print("ready", flush=True)
        while not signals.number:
            time.sleep(0.01)
        print("saving", flush=True)
        saved = 0
        while not os.path.exists(os.environ["SAVED"]):
            saved += 1
        print(f"saved {signals.number}", flush=True)
        sys.exit(75)
    """
    with process(program, SAVED=str(tmp_path / "saved")) as child:
        child.send_signal(signal.SIGUSR1)
        assert child.stdout is not None
        assert child.stdout.readline() == "saving\n"
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGINT):
            child.send_signal(number)
            time.sleep(0.05)
        (tmp_path / "saved").touch()
        said, complaint = ended(child)
    assert (child.returncode, said) == (75, f"saved {int(signal.SIGUSR1)}\n")
    assert "Traceback" not in complaint


def test_a_signal_that_came_before_deferring_is_not_forgotten() -> None:
    program = """
        signals = Signals()
        signals.listen()
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        except Stopped:
            pass  # as native code does that calls back into Python
        print("ready", flush=True)
        try:
            signals.defer()
        except Stopped as stopped:
            sys.exit(stopped.exit_code)
    """
    with process(program) as child:
        ended(child)
    assert child.returncode == 75


def test_when_the_grace_period_runs_out_in_native_code_the_process_says_so_and_ends() -> None:
    program = """
        import threading
        signals = Signals()
        signals.listen()
        signals.limit(1.0, lambda why, code: print(f"{why}: {code}", flush=True))
        signals.defer()
        # As a collective operation that waits for a lost worker: only Python's main thread runs its handlers.
        lock = threading.Lock()
        lock.acquire()
        print("ready", flush=True)
        while True:
            lock.acquire(timeout=3600)
    """
    with process(program) as child:
        began = time.monotonic()
        child.send_signal(signal.SIGTERM)
        said, _ = ended(child)
        took_s = time.monotonic() - began
    assert child.returncode == 75
    assert said == "1 s after SIGTERM the step, or the saving after it, had not ended: 75\n"
    assert took_s > 0.9


def test_a_worker_whose_launcher_is_gone_stops_as_if_it_had_been_asked_to() -> None:
    launcher = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    program = """
        signals = Signals()
        signals.listen()
        signals.defer()
        assert signals.number == 0
        print("ready", flush=True)
        while not signals.number:
            time.sleep(0.01)
        print(signals.number)
    """
    try:
        with process(program, LOROT_LAUNCHED=str(launcher.pid)) as child:
            launcher.kill()
            launcher.wait()
            said, _ = ended(child)
    finally:
        launcher.kill()
        launcher.wait()
    assert said == f"{int(signal.SIGTERM)}\n"


def test_a_worker_whose_torchrun_is_gone_stops_too() -> None:
    program = """
        import subprocess
        inner = "\\n".join((
            "import time",
            "from service.training.signals import Signals",
            "signals = Signals()",
            "signals.listen()",
            "signals.defer()",
            "print('ready', flush=True)",
            "until = time.monotonic() + 120",
            "while not signals.number and time.monotonic() < until:",
            "    time.sleep(0.01)",
            "print(signals.number, flush=True)",
        ))
        subprocess.Popen([sys.executable, "-c", inner])
        time.sleep(60)
    """
    with process(program, TORCHELASTIC_RUN_ID="7") as agent:
        agent.kill()
        agent.wait()
        assert agent.stdout is not None
        assert agent.stdout.readline() == f"{int(signal.SIGTERM)}\n"


def test_a_closed_terminal_is_not_heard_under_nohup() -> None:
    program = """
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it
        signals = Signals()
        signals.listen()
        signals.defer()
        print("ready", flush=True)
        os.kill(os.getpid(), signal.SIGHUP)
        before = signals.number
        os.kill(os.getpid(), signal.SIGUSR1)
        print(before, signals.number)
    """
    with process(program) as child:
        said, _ = ended(child)
    assert said == f"0 {int(signal.SIGUSR1)}\n"


AGENT = """
    import subprocess
    told = []
    signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    inner = "\\n".join((
        "import time",
        "from service.training.signals import Signals",
        "signals = Signals()",
        "signals.listen()",
        "signals.defer()",
        "print('up', flush=True)",
        "time.sleep(3600)",
    ))
    workers = []
    for rank in range(3):
        line = [sys.executable, "-c", inner]
        own = os.environ | {"LOCAL_RANK": str(rank)}
        workers.append(subprocess.Popen(line, env=own, stdout=subprocess.PIPE, text=True))
    for worker in workers:
        assert worker.stdout.readline() == "up\\n"
    print("ready", flush=True)
    until = time.monotonic() + 60
    while not told and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(2.0)  # in which the others would have told it too
    for worker in workers:
        worker.kill()
    print(told)
"""


def test_the_torchrun_of_a_dead_launcher_is_told_once_to_end_even_while_its_workers_hang() -> None:
    launcher = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    try:
        with process(AGENT, TORCHELASTIC_RUN_ID="7", LOROT_LAUNCHED=str(launcher.pid)) as agent:
            launcher.kill()
            launcher.wait()
            said, complaint = ended(agent, 100)
    finally:
        launcher.kill()
        launcher.wait()
    assert said == f"[{int(signal.SIGTERM)}]\n", complaint


def test_listening_costs_no_heavy_import() -> None:
    program = (
        "import sys, service.training.signals; print([m for m in ('torch', 'numpy', 'pydantic') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
