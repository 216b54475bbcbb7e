"""Local attempts: started once whatever is killed, stopped with all that descends from them, told by their end."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from service.jobs import memory, memory_group, orders, process_family, runner
from service.jobs.backends import Order, Status
from service.jobs.backends.local import backend as local
from service.jobs.job import Job
from service.jobs.spec import JobSpec
from tests.integration.processes import await_, family, lives
from tests.service.job_specs import settings

pytestmark = pytest.mark.integration

ID = "0123456789abcdef" * 2
NAME = f"lorot-{ID[:12]}-1"
# Notes each start, and has a child of its own session, as torchrun is to `lorot train`.
FAMILY = """
import os, signal, subprocess, sys, time
with open("starts", "a") as file: file.write("x")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
if "deaf" in sys.argv: signal.signal(signal.SIGTERM, signal.SIG_IGN)
elif "heed" in sys.argv: signal.signal(signal.SIGTERM, lambda *_: (child.kill(), sys.exit(75)))
print("up", child.pid, flush=True)
if "short" in sys.argv: sys.exit(3)
time.sleep(600)
"""

ASLEEP = (sys.executable, "-c", "import time; time.sleep(600)")
# Leaves one that ends when it is asked, and one that does not, each in a session of its own.
LEAVING = """
import subprocess, sys, time
heed = "lambda *_: (print('asked', flush=True), sys.exit())"
heeding = f"signal.signal(signal.SIGTERM, {heed}); print('heeding', flush=True)"
deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True)"
for line in (heeding, deaf):
    line = f"import signal, sys, time; {line}; time.sleep(600)"
    subprocess.Popen([sys.executable, "-c", line], start_new_session=True)
time.sleep(600)
"""

# Some children that take so many MiB each, and say their numbers.
GREEDY = """
import subprocess, sys, time
count, size = sys.argv[1:3]
stays = "" if "ends" in sys.argv else "time.sleep(600)"
line = f"import time; held = bytearray(b'x') * ({size} << 20); {stays}"
children = [subprocess.Popen([sys.executable, "-c", line]) for _ in range(int(count))]
for child in children: print(child.pid, flush=True)
for child in children: child.wait()
"""
# Some children that all read the same MiB.
SHARED = """
import mmap, os, sys
count, size = map(int, sys.argv[1:3])
shared = mmap.mmap(-1, size << 20)
shared.write(b"x" * (size << 20))
there, told = os.pipe()
for _ in range(count):
    if not os.fork():
        sum(shared[at] for at in range(0, size << 20, 4096))
        os.write(told, b".")
        sys.stdin.read()
        os._exit(0)
while count: count -= len(os.read(there, count))
print("all have read it", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> local.Local:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "token").write_text("hush-hush\n")
    return again(tmp_path)


def again(tmp_path: Path) -> local.Local:
    """The backend of a service that was started anew."""
    return local.Local(settings(tmp_path, secrets=tmp_path / "secrets"))


def order(tmp_path: Path, *command: str, **fields: object) -> Order:
    job = Job(ID, "1", JobSpec(**{"grace_s": 1, **fields}), "starting")  # type: ignore[arg-type]
    return Order(NAME, job, orders.folder_of(settings(tmp_path), ID), command, {"NOTE": "noted"})


def program(text: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-c", text, *arguments)


def attempt(tmp_path: Path) -> Path:
    return tmp_path / "jobs" / ID / "attempts" / "1"


def log(tmp_path: Path) -> str:
    path = attempt(tmp_path) / "log-node0.txt"
    return path.read_text() if path.exists() else ""


def await_end(backend: local.Local) -> None:
    await_(lambda: backend.status(NAME, {}).phase in ("ended", "gone"), "the attempt's end", 60)


def await_up(tmp_path: Path) -> int:
    """Wait for the family; the grandchild's number."""
    await_(lambda: "up" in log(tmp_path), "the command's first word", 60, lambda: log(tmp_path))
    return int(log(tmp_path).split()[1])


def test_an_attempt_runs_once_however_often_it_is_started_and_its_end_is_known_to_anybody(
    backend: local.Local, tmp_path: Path
) -> None:
    line = program("import os; open('starts', 'a').write('x'); print('hello', os.environ['NOTE'])")
    for _ in range(3):
        backend.start(order(tmp_path, *line))
    await_end(backend)
    assert backend.start(order(tmp_path, *line)) == {"folder": str(attempt(tmp_path))}
    subprocess.run([sys.executable, "-m", "service.jobs.runner", str(attempt(tmp_path))], check=True, env=here())
    other = again(tmp_path)
    other.start(order(tmp_path, *line))
    status = other.status(NAME, {})
    assert (status.phase, status.exit_code, status.out_of_memory) == ("ended", 0, False)
    assert status.ended_s >= status.started_s > 0
    assert (tmp_path / "starts").read_text() == "x"
    assert b"".join(other.logs(NAME, {})) == b"hello noted\n"
    assert other.reconcile() == {}


def here() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(runner.__file__).parents[2])}


def test_runners_that_come_at_once_start_one_command(tmp_path: Path, backend: local.Local) -> None:
    attempt(tmp_path).mkdir(parents=True)
    line = program("import time; open('starts', 'a').write('x'); time.sleep(0.5)")
    told = {"command": line, "environment": {}, "grace_s": 1}
    (attempt(tmp_path) / "order.json").write_text(json.dumps(told))
    runners = [
        subprocess.Popen([sys.executable, "-m", "service.jobs.runner", str(attempt(tmp_path))], env=here())
        for _ in range(4)
    ]
    assert [one.wait(60) for one in runners] == [0] * 4
    assert (tmp_path / "starts").read_text() == "x"


def test_stopping_ends_all_that_descends_from_the_command_after_the_grace(backend: local.Local, tmp_path: Path) -> None:
    backend.start(order(tmp_path, *program(FAMILY, "deaf")))
    grandchild = await_up(tmp_path)
    backend.cancel(NAME, {}, 1.0)
    backend.cancel(NAME, {}, 1.0)
    await_end(backend)
    status = backend.status(NAME, {})
    assert (status.exit_code, status.out_of_memory) == (-9, False)
    assert "grace" in status.reason
    assert not psutil.pid_exists(grandchild)


def test_a_command_that_heeds_the_signal_ends_by_its_own_code(backend: local.Local, tmp_path: Path) -> None:
    backend.start(order(tmp_path, *program(FAMILY, "heed")))
    await_up(tmp_path)
    # Before the runner that it was started by is known to be there: another service's backend.
    again(tmp_path).cancel(NAME, {}, 30.0)
    await_end(backend)
    assert backend.status(NAME, {}).exit_code == 75


def test_what_a_command_leaves_behind_ends_with_it(backend: local.Local, tmp_path: Path) -> None:
    backend.start(order(tmp_path, *program(FAMILY, "short")))
    grandchild = await_up(tmp_path)
    await_end(backend)
    assert backend.status(NAME, {}).exit_code == 3
    assert not psutil.pid_exists(grandchild)


def test_a_command_killed_by_somebody_else_is_not_taken_for_out_of_memory(backend: local.Local, tmp_path: Path) -> None:
    backend.start(order(tmp_path, *program(FAMILY), resources={"memory": "8GB"}))
    await_up(tmp_path)
    os.kill(runner.read(attempt(tmp_path) / "begun.json")["command"]["pid"], signal.SIGKILL)
    await_end(backend)
    status = backend.status(NAME, {})
    assert (status.exit_code, status.out_of_memory) == (-9, False)
    assert status.reason.startswith("killed by signal 9, by somebody else")


def test_a_job_whose_processes_take_more_together_than_they_may_is_killed_and_told_so(
    backend: local.Local, tmp_path: Path
) -> None:
    # None of them alone is too large.
    backend.start(order(tmp_path, *program(GREEDY, "3", "80"), resources={"memory": "200MB"}, grace_s=600))
    await_end(backend)
    status = backend.status(NAME, {})
    assert (status.exit_code, status.out_of_memory) == (-9, True)
    found = re.fullmatch(
        r"used (\d+\.\d) MB of 200\.0 MB allowed, and was killed \(resources\.memory\); .+", status.reason
    )
    assert found, status.reason
    # 3 x 80 MiB and the interpreters, as far as they had come when it was looked at.
    assert 200 < float(found[1]) < 400
    assert not [pid for pid in map(int, log(tmp_path).split()) if psutil.pid_exists(pid)]


def test_a_job_within_its_memory_is_left_alone(backend: local.Local, tmp_path: Path) -> None:
    backend.start(order(tmp_path, *program(GREEDY, "2", "40", "ends"), resources={"memory": "400MB"}))
    await_end(backend)
    assert (backend.status(NAME, {}).exit_code, backend.status(NAME, {}).reason) == (0, "")


def test_what_processes_share_is_counted_once(tmp_path: Path) -> None:
    shared = program(SHARED, "4", "100")
    with subprocess.Popen(shared, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdin is not None
        assert parent.stdout.readline() == "all have read it\n"
        everybody = family(parent.pid)
        resident = sum(one.memory_info().rss for one in everybody)
        found = memory.used(everybody)
        parent.stdin.close()
    # The kernel's own word for each page: divided by those who have mapped it.
    assert len(everybody) == 5
    assert resident > 500 * 2**20
    assert 100 * 2**20 < found < 220 * 2**20


def test_a_kill_by_the_kernel_for_memory_is_told_from_others(tmp_path: Path) -> None:
    """In a group of processes with 60 MB, in which the runner is as well, as in a container."""
    group = limited(60 * 2**20)
    attempt(tmp_path).mkdir(parents=True)
    line = program("import os, sys; print(os.getpid(), flush=True); held = bytearray(500 << 20); print('not killed')")
    (attempt(tmp_path) / "order.json").write_text(json.dumps({"command": line, "environment": {}, "grace_s": 1}))
    enter = ["sh", "-c", 'echo $$ > "$1" && shift && exec "$@"', "sh", str(group / "cgroup.procs")]
    try:
        runs = [sys.executable, "-m", "service.jobs.runner", str(attempt(tmp_path))]
        subprocess.run([*enter, *runs], env=here(), check=True, timeout=60)
    finally:
        group.rmdir()
    ended = runner.read(attempt(tmp_path) / "exit.json")
    assert "not killed" not in log(tmp_path)
    assert (ended["exit_code"], ended["out_of_memory"], ended.get("reason")) == (-9, True, None)


def limited(most_bytes: int) -> Path:
    """A group of processes that the kernel limits, of either version; skips where this machine lets us make none."""
    name = f"lorot-test-{os.getpid()}"
    if found := memory_group.below(Path("/sys/fs/cgroup"), name, most_bytes):
        # Only what is too large, not the runner too.
        (found.path / "memory.oom.group").write_text("0")
        return found.path
    older = Path("/sys/fs/cgroup/memory") / name
    try:
        older.mkdir()
        (older / "memory.limit_in_bytes").write_text(str(most_bytes))
    except OSError as error:
        pytest.skip(f"no limited group of processes can be made here ({error.strerror}): that takes root, and cgroups")
    return older


def test_a_killed_runner_leaves_an_attempt_that_runs_can_be_stopped_and_is_never_started_again(
    backend: local.Local, tmp_path: Path
) -> None:
    made = order(tmp_path, *program(FAMILY))
    backend.start(made)
    await_up(tmp_path)
    its_runner = psutil.Process(runner.read(attempt(tmp_path) / "begun.json")["runner"]["pid"])
    its_runner.kill()
    # One that is not dead yet is left to stop its command itself.
    await_(lambda: not lives(its_runner), "the runner is dead", 60)
    other = again(tmp_path)
    assert other.status(NAME, {}).phase == "running"
    assert other.reconcile() == {NAME: ID}
    other.cancel(NAME, {}, 1.0)
    await_end(other)
    assert other.status(NAME, {}).phase == "gone"
    assert process_family.marked("NOTE", "noted") == [], "nothing is left of it"
    other.start(made)
    assert other.status(NAME, {}).phase == "gone"
    assert (tmp_path / "starts").read_text() == "x"


def test_what_a_killed_runner_leaves_is_asked_to_end_and_killed_after_the_grace(
    backend: local.Local, tmp_path: Path
) -> None:
    backend.start(order(tmp_path, *program(LEAVING), grace_s=3))
    await_(lambda: {"deaf", "heeding"} <= set(log(tmp_path).split()), "both are there", 60, lambda: log(tmp_path))
    begun = runner.read(attempt(tmp_path) / "begun.json")
    for one in ("runner", "command"):
        os.kill(begun[one]["pid"], signal.SIGKILL)
    seen: list[Status] = []

    def is_alone() -> bool:
        seen.append(backend.status(NAME, {}))
        return seen[-1].nodes != ("node 0: running",)

    # Whose attempt has a longer number is a stranger.
    with subprocess.Popen(ASLEEP, env={runner.NAME_VARIABLE: f"{NAME}0"}) as stranger:
        try:
            await_(is_alone, "both are gone", 60)
            assert seen[-1].phase == "running"
            await_(lambda: "asked" in log(tmp_path), "they are asked", 60)
            assert process_family.marked(runner.NAME_VARIABLE, NAME), "the deaf one has its grace"
            await_(lambda: backend.status(NAME, {}).phase == "gone", "the deaf one is killed", 60)
            assert process_family.marked(runner.NAME_VARIABLE, NAME) == []
            assert stranger.poll() is None
        finally:
            stranger.kill()


def test_secrets_are_in_the_command_s_environment_and_in_no_file(backend: local.Local, tmp_path: Path) -> None:
    line = program("import os; print(len(os.environ['HF_TOKEN']), 'LOROT_RUNNER_LOCK' in os.environ)")
    backend.start(order(tmp_path, *line, secrets={"HF_TOKEN": "token"}))
    await_end(backend)
    assert log(tmp_path) == f"{len('hush-hush')} False\n"
    assert not [path for path in (tmp_path / "jobs").rglob("*") if path.is_file() and b"hush" in path.read_bytes()]


def test_each_job_sees_its_own_gpus_and_has_as_many_threads_as_cores(
    backend: local.Local, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    line = program("import os; print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['OMP_NUM_THREADS'])")
    job = Job(ID, "1", JobSpec(resources={"gpus": 2, "cpus": 6}), "starting")  # type: ignore[arg-type]
    backend.start(Order(NAME, job, orders.folder_of(settings(tmp_path), ID), line, gpus=(0, 2)))
    await_end(backend)
    assert log(tmp_path) == "4,6 3\n"


def test_a_program_that_is_not_there_is_told(backend: local.Local, tmp_path: Path) -> None:
    backend.start(order(tmp_path, "/no/such/program"))
    await_end(backend)
    status = backend.status(NAME, {})
    assert (status.exit_code, "cannot be started" in status.reason) == (127, True)


def test_a_log_is_followed_to_its_end_byte_by_byte(backend: local.Local, tmp_path: Path) -> None:
    text = (
        "import os, time\nprint('line 0', flush=True)\nwhile not os.path.exists('seen'): time.sleep(0.05)\n"
        "for n in range(1, 5): print('line', n, flush=True)"
    )
    backend.start(order(tmp_path, *program(text)))
    pieces = []
    for piece in backend.logs(NAME, {}, follow=lambda: True):
        pieces.append(piece)
        if piece:
            # The rest is written only after this one was read.
            (tmp_path / "seen").touch()
    assert b"".join(pieces) == b"".join(f"line {n}\n".encode() for n in range(5))
    assert b"".join(backend.logs(NAME, {}, tail=2)) == b"line 3\nline 4\n"
    assert b"".join(backend.logs(NAME, {}, tail=0)) == b""
    assert len([piece for piece in pieces if piece]) > 1
