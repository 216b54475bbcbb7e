"""Jobs on a real Docker engine: how they run, end, are stopped, lost, found again and cleared away."""

import contextlib
import json
import os
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from service.errors import BackendError, ConfigError
from service.jobs.backends import Order, Status
from service.jobs.backends.docker import containers
from service.jobs.backends.docker.backend import DockerBackend
from service.jobs.job import Job
from service.jobs.places import APART_BYTES, Place, Placed, PlaceLostError
from service.jobs.settings import ServiceSettings
from service.jobs.spec import JobSpec
from tests.integration import engine as engines
from tests.integration import image_registry
from tests.integration.engine import Engine
from tests.integration.processes import await_

pytestmark = pytest.mark.integration

USER = (1234, 2345)


@pytest.fixture(scope="module")
def engine(engine: Engine) -> Iterator[Engine]:
    yield engine
    assert engine.jobs() == [], "a test has left containers"


@pytest.fixture
def settings(engine: Engine, tmp_path: Path) -> ServiceSettings:
    return engines.settings(engine, tmp_path, user=f"{USER[0]}:{USER[1]}")


@pytest.fixture
def backend(settings: ServiceSettings) -> Iterator[DockerBackend]:
    backend = DockerBackend(settings)
    yield backend
    for name, job in backend.reconcile().items():
        if (settings.results / job).exists():
            backend.remove(name, {})
    backend.close()


def order(settings: ServiceSettings, *command: str, **spec: Any) -> Order:
    """Of a plain container."""
    chosen = {"kind": "container", "backend": "docker", "command": command, "grace_s": 20, **spec}
    run = secrets.token_hex(16)
    job = Job(run, "1", JobSpec.model_validate(chosen), "starting")
    return Order(f"lorot-{run[:12]}-1", job, settings.results / run, command)


def python(program: str) -> tuple[str, ...]:
    return ("python3", "-u", "-c", program)


def awaited(backend: DockerBackend, order: Order, seconds: float = 60) -> Status:
    """How an attempt has ended."""
    await_(
        lambda: backend.status(order.name, {}).phase in ("ended", "gone"),
        f"{order.command} ends",
        seconds,
        lambda: f"{backend.status(order.name, {})}\n{said(backend, order)}",
    )
    return backend.status(order.name, {})


def said(backend: DockerBackend, order: Order, **options: Any) -> str:
    return b"".join(backend.logs(order.name, {}, **options)).decode()


def await_words(backend: DockerBackend, order: Order, words: str) -> None:
    await_(lambda: words in said(backend, order), f"it says {words}", 60, lambda: said(backend, order))


def ids(engine: Engine, order: Order) -> list[str]:
    chosen = {"label": f"{containers.ATTEMPT}={order.name}"}
    return [one["Id"] for one in engine.client.api.containers(all=True, filters=chosen)]


def test_a_containers_outputs_and_log_outlive_it_and_nothing_else_does(
    engine: Engine, backend: DockerBackend, settings: ServiceSettings
) -> None:
    line = "echo begun; mkdir /results/deep; echo 42 > /results/deep/answer; echo complaint >&2; echo last"
    job = order(settings, "sh", "-c", line)
    handle = backend.start(job)
    end = awaited(backend, job)
    assert (end.exit_code, end.reason, end.out_of_memory) == (0, "", False)
    assert end.started_s <= end.ended_s
    assert end.image_digest == engine.client.api.inspect_image(engines.WORKER)["Id"]
    assert (job.folder / "outputs/deep/answer").read_text() == "42\n"
    assert (job.folder / "outputs/deep/answer").stat().st_uid == USER[0]
    lines = said(backend, job).splitlines()
    assert sorted(lines) == ["begun", "complaint", "last"]
    assert said(backend, job, tail=1).splitlines() == lines[-1:]

    backend.remove(job.name, handle)
    assert ids(engine, job) == []
    assert job.name not in backend.reconcile()
    kept = job.folder / "attempts/1/log-node0.txt"
    assert kept.read_text().splitlines() == lines
    assert said(backend, job).splitlines() == lines
    assert said(backend, job, tail=2).splitlines() == lines[-2:]
    assert backend.status(job.name, handle) == end
    backend.remove(job.name, handle)


def test_an_end_that_was_seen_is_known_after_somebody_else_has_cleared_away(
    engine: Engine, backend: DockerBackend, settings: ServiceSettings
) -> None:
    job = order(settings, "sh", "-c", "echo words; exit 4")
    backend.start(job)
    end = awaited(backend, job)
    for container in ids(engine, job):
        engine.client.api.remove_container(container)
    assert backend.status(job.name, {}) == end
    assert said(backend, job) == "words\n"


def test_a_container_is_an_ordinary_user_that_writes_only_to_its_results(
    backend: DockerBackend, settings: ServiceSettings, tmp_path: Path
) -> None:
    (tmp_path / "data/photograph").write_text("light")
    os.chmod(tmp_path / "data", 0o777)
    program = f"""
import json, os, socket
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
found = {{"ids": [os.getuid(), os.getgid(), os.getgroups()], "rights": status["CapEff"] + status["CapBnd"],
    "no_new": status["NoNewPrivs"], "reads": open("{tmp_path}/data/photograph").read(), "written": []}}
places = ["/x", "/usr/bin/x", "/etc/passwd", "/sys/kernel/x", "/proc/sys/kernel/hostname", "/dev/mem", "/job/x",
    "{tmp_path}/data/x", "{tmp_path}/x", "{engines.ROOT}/x", "/results/x", "/tmp/x", "/dev/shm/x"]
for place in places:
    try:
        open(place, "w").close()
        found["written"].append(place)
    except OSError:
        pass
found["seen"] = [place for place in ("{tmp_path}/state", "/run/docker.sock", "/var/run/docker.sock",
    "{settings.backends.docker.url}".removeprefix("unix://")) if os.path.exists(place)]
found["processes"] = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())[:3]
found["shm"] = os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize
found["most_processes"] = [open(place).read().strip() for place in
    ("/sys/fs/cgroup/pids.max", "/sys/fs/cgroup/pids/pids.max") if os.path.exists(place)]
kept = lambda *names: " ".join(open("/sys/fs/cgroup/" + name).read().strip() for name in names)
new = os.path.exists("/sys/fs/cgroup/cpu.max")
found["cpus"] = kept("cpu.max") if new else kept("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")
found["memory"] = kept("memory.max") if new else kept("memory/memory.limit_in_bytes")
print(json.dumps(found))
"""
    job = order(settings, *python(program), resources={"shm": "96MiB", "cpus": 1.25, "memory": "256MiB"})
    backend.start(job)
    assert awaited(backend, job).exit_code == 0, said(backend, job)
    found = json.loads(said(backend, job))
    assert found["ids"] == [USER[0], USER[1], []] or found["ids"] == [USER[0], USER[1], [USER[1]]]
    assert set(found["rights"]) == {"0"}
    assert found["no_new"] == "1"
    assert found["reads"] == "light"
    assert found["written"] == ["/results/x", "/tmp/x", "/dev/shm/x"]
    assert found["seen"] == []
    assert found["processes"][0] == 1
    assert len(found["processes"]) < 3
    assert found["shm"] == 96 * 2**20
    assert found["most_processes"] == ["4096"]
    # What the kernel holds it to.
    quota, period = map(int, found["cpus"].split())
    assert quota / period == 1.25
    assert int(found["memory"]) == 256 * 2**20


def test_ends_are_told_apart(backend: DockerBackend, settings: ServiceSettings) -> None:
    """A failure, a kill for memory, a missing program, a polite stop, and a kill after the grace."""
    stubborn = (
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('ready')\nwhile True: time.sleep(1)"
    )
    polite = (
        "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\nprint('ready')\n"
        "while True: time.sleep(1)"
    )
    greedy = "print('ready')\nheld = bytearray(400 << 20)\nprint(len(held))"
    jobs = {
        "fails": order(settings, "sh", "-c", "exit 3"),
        "greedy": order(settings, *python(greedy), resources={"memory": "64MiB"}),
        "missing": order(settings, "no-such-program"),
        "polite": order(settings, *python(polite)),
        "stubborn": order(settings, *python(stubborn)),
        "asked": order(settings, *python(stubborn)),
    }
    for job in jobs.values():
        backend.start(job)
    for name in ("polite", "stubborn", "asked"):
        await_words(backend, jobs[name], "ready")
    backend.cancel(jobs["polite"].name, {}, 60)
    backend.cancel(jobs["stubborn"].name, {}, 4)
    # Asking again changes nothing.
    backend.cancel(jobs["stubborn"].name, {}, 600)
    # It is asked, and not waited for. Of one with a long grace: no busy machine lets that pass.
    asked = jobs.pop("asked").name
    for _ in range(2):
        backend.cancel(asked, {}, 600)
        assert backend.status(asked, {}).phase == "running"
    backend.remove(asked, {})
    ends = {name: awaited(backend, job) for name, job in jobs.items()}
    assert {name: (end.exit_code, end.out_of_memory) for name, end in ends.items()} == {
        "fails": (3, False),
        "greedy": (137, True),
        "missing": (127, False),
        "polite": (75, False),
        "stubborn": (137, False),
    }
    assert "limit of 64 MiB" in ends["greedy"].reason
    assert "no such program" in ends["missing"].reason
    assert "did not stop within its grace" in ends["stubborn"].reason
    assert [ends["fails"].reason, ends["polite"].reason] == ["", ""]
    assert all(not end.preempted for end in ends.values())


def test_another_process_finds_what_runs_and_stops_it_by_name_alone(
    engine: Engine, backend: DockerBackend, settings: ServiceSettings
) -> None:
    job = order(settings, *python("import time\nfor n in range(10000): print('tick', n); time.sleep(0.05)"))
    backend.start(job)
    await_words(backend, job, "tick 3")
    backend.close()

    other = DockerBackend(settings)
    assert other.reconcile()[job.name] == job.job.id
    assert other.status(job.name, {}).phase == "running"
    heard, enough = b"", threading.Event()
    for piece in other.logs(job.name, {}, follow=lambda: not enough.is_set()):
        heard += piece
        if heard.count(b"\n") > 20:
            enough.set()
    lines = heard.decode().splitlines()
    assert lines[:20] == [f"tick {n}" for n in range(20)]
    # Whole lines of the end, and on from there.
    enough.clear()
    after = next(piece for piece in other.logs(job.name, {}, tail=1, follow=lambda: True) if piece)
    assert int(after.split()[1]) >= 20
    other.cancel(job.name, {}, 20)
    assert awaited(other, job).exit_code == 128 + 15
    other.remove(job.name, {})
    assert ids(engine, job) == []
    other.close()


def test_another_process_goes_on_with_a_tail_from_any_place_in_it_byte_for_byte(
    backend: DockerBackend, settings: ServiceSettings
) -> None:
    program = """import sys, time
for n in range(1500):
    print("line", n, "=" * (40_000 if n % 100 == 7 else 100))
    if n % 5 == 0:
        print("beside", n, file=sys.stderr)
print("no end", end="", flush=True)
time.sleep(600)"""
    job = order(settings, *python(program))
    backend.start(job)
    # Two pipes, of which either may be the later one.
    await_words(backend, job, "line 1499")
    await_words(backend, job, "beside 1495")
    whole = said(backend, job).encode()
    heard, places = b"", []
    for piece in backend.logs(job.name, {}, tail=1200, follow=lambda: True):
        if isinstance(piece, Placed):
            places.append((len(heard), piece.place))
        heard += piece
        if whole.endswith(heard) and heard.count(b"\n") > 1000:
            break
    assert len(places) > len(heard) / (2 * APART_BYTES) > 2

    other = DockerBackend(settings)
    for offset, place in places:
        again = b""
        for piece in other.logs(job.name, {}, since=place, follow=lambda: True):
            again += piece
            if len(again) >= len(heard) - offset:
                break
        assert again == heard[offset:]
    offset, place = places[-1]
    rest = other.logs(job.name, {}, since=place, follow=lambda: True)
    assert heard[offset:].startswith(first := next(piece for piece in rest if piece))
    other.cancel(job.name, {}, 0)
    assert first + b"".join(rest) == heard[offset:] + b"no end"
    awaited(other, job)
    known = Place.parse(place)
    for lost in (str(replace(known, check=0)), str(replace(known, source=0)), "0123abcd"):
        with pytest.raises(PlaceLostError):
            next(other.logs(job.name, {}, since=lost, follow=lambda: True))
    other.remove(job.name, {})
    with pytest.raises(PlaceLostError, match="the container is gone"):
        next(other.logs(job.name, {}, since=place, follow=lambda: True))
    other.close()


def test_a_follower_of_a_silent_job_gets_its_chance_to_leave(backend: DockerBackend, settings: ServiceSettings) -> None:
    job = order(settings, "sleep", "600")
    backend.start(job)
    looks = iter([True, True, True, False])
    assert set(backend.logs(job.name, {}, follow=lambda: next(looks, False))) <= {b""}
    backend.remove(job.name, {})


def test_the_same_order_twice_starts_one_thing_once(
    engine: Engine, backend: DockerBackend, settings: ServiceSettings
) -> None:
    job = order(settings, "sh", "-c", "echo once >> /results/count")
    # An earlier service was killed between making and starting it.
    containers.prepare(job, settings.backends.docker)
    body = containers.container(job, settings, 0)
    made = engine.client.api.create_container_from_config(body, f"{job.name}-n0")["Id"]
    assert backend.status(job.name, {}).phase == "waiting"
    assert backend.start(job) == backend.start(job)
    assert awaited(backend, job).exit_code == 0
    backend.start(job)
    assert awaited(backend, job).exit_code == 0
    assert ids(engine, job) == [made]
    assert (job.folder / "outputs/count").read_text() == "once\n"


def test_what_the_engine_refuses_is_an_error_of_the_job_and_leaves_nothing(
    engine: Engine, backend: DockerBackend, settings: ServiceSettings
) -> None:
    for spec, complaint in (({"cpus": 4096}, "CPUs"), ({"memory": "1MB"}, "memory limit")):
        job = order(settings, "true", resources=spec)
        with pytest.raises(ConfigError, match=complaint):
            backend.start(job)
        assert ids(engine, job) == []
        assert backend.status(job.name, {}).phase == "gone"
    # Of this one the engine has made the container when it finds that it has no GPUs.
    job = replace(order(settings, "true", resources={"gpus": 1}), gpus=(0,))
    with pytest.raises(ConfigError, match="container toolkit"):
        backend.start(job)
    assert ids(engine, job) == []


def test_a_container_of_somebody_elses_is_not_touched(
    engine: Engine, backend: DockerBackend, settings: ServiceSettings
) -> None:
    job = order(settings, "true")
    foreign = engine.client.api.create_container(engines.WORKER, ["true"], name=f"{job.name}-n0")["Id"]
    try:
        with pytest.raises(BackendError, match="is not the service's"):
            backend.start(job)
        backend.remove(job.name, {})
        assert engine.client.api.inspect_container(foreign)["Id"] == foreign
    finally:
        engine.client.api.remove_container(foreign)


@pytest.fixture
def registry() -> Iterator[tuple[str, str]]:
    """Its address, and the digest of its image."""
    with image_registry.serving() as found:
        yield found


def test_an_image_is_fetched_while_the_job_waits(
    engine: Engine, backend: DockerBackend, settings: ServiceSettings, registry: tuple[str, str]
) -> None:
    where, digest = registry
    job = order(settings, "nothing", image=f"{where}/good:1")
    try:
        backend.start(job)
        end = awaited(backend, job)
        # Nothing is in it.
        assert (end.exit_code, end.image_digest) == (127, digest)
    finally:
        backend.remove(job.name, {})
        engine.client.api.remove_image(f"{where}/good:1", force=True)


def test_an_image_that_is_nowhere_ends_the_job_and_a_dead_registry_lets_it_be_tried_again(
    backend: DockerBackend, settings: ServiceSettings, registry: tuple[str, str]
) -> None:
    for image, code, complaint in (
        (f"{registry[0]}/missing:1", 2, "nowhere that it looks"),
        ("127.0.0.1:9/lorot:1", 9, "connection refused"),
    ):
        job = order(settings, "true", image=image)
        backend.start(job)
        end = awaited(backend, job)
        assert (end.phase, end.exit_code) == ("ended", code), end.reason
        assert image in end.reason
        assert complaint in end.reason
        assert backend.status(job.name, {}) == end


def test_several_nodes_reach_each_other_and_one_that_fails_ends_the_others(
    engine: Engine, backend: DockerBackend, settings: ServiceSettings
) -> None:
    program = """
import os, socket, sys, time
node = int(os.environ["LOROT_NODE"])
if node == 0:
    with socket.create_server(("0.0.0.0", 4000)) as server:
        peer, _ = server.accept()
        print("heard", peer.recv(5).decode(), os.environ["LOROT_NODES"])
        # Only then may the other one end: this one ends with it.
        peer.sendall(b"!")
    time.sleep(600)
for _ in range(600):
    try:
        with socket.create_connection((os.environ["FIRST"], 4000), timeout=60) as way:
            way.sendall(b"hello")
            way.recv(1)
        break
    except OSError:
        time.sleep(0.1)
sys.exit(5)
"""
    job = order(settings, *python(program), nodes="2")
    job = replace(job, environment={"FIRST": f"{job.name}-n0"})
    backend.start(job)
    assert len(ids(engine, job)) == 2
    end = awaited(backend, job)
    assert said(backend, job, node=0).split() == ["heard", "hello", "2"]
    assert end.exit_code == 5
    assert end.nodes[1] == "node 1: ended with exit code 5"
    assert end.nodes[0] == "node 0: ended with exit code 143"
    networks = engine.client.api.networks(names=[job.name])
    assert [network["Labels"] for network in networks] == [{"lorot.job": job.job.id, "lorot.attempt": job.name}]
    backend.remove(job.name, {})
    assert ids(engine, job) == []
    assert engine.client.api.networks(names=[job.name]) == []


def test_a_job_survives_the_engines_crash_if_that_keeps_containers_alive(
    engine: Engine, backend: DockerBackend, settings: ServiceSettings
) -> None:
    engines.skip_unless_own(engine)
    program = (
        "import os, time\nprint('begun')\nwhile not os.path.exists('/results/over'): time.sleep(0.1)\nprint('over')"
    )
    job = order(settings, *python(program))
    backend.start(job)
    await_words(backend, job, "begun")
    engine.kill()
    with pytest.raises(BackendError, match="does not answer"):
        backend.status(job.name, {})
    engine.start()
    assert backend.status(job.name, {}).phase == "running"
    (job.folder / "outputs/over").touch()
    assert awaited(backend, job).exit_code == 0
    assert said(backend, job).splitlines() == ["begun", "over"]


def test_what_a_killed_service_had_not_started_yet_is_started_unless_the_engine_went_down_too(
    engine: Engine, backend: DockerBackend, settings: ServiceSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines.skip_unless_own(engine)

    def killed(container: str) -> None:
        raise KeyboardInterrupt

    jobs = [order(settings, "echo", "words") for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(backend._engine.api, "start", killed)
        for job in jobs:
            with pytest.raises(KeyboardInterrupt):
                backend.start(job)
    DockerBackend(settings).start(jobs[0])
    assert awaited(backend, jobs[0]).exit_code == 0
    engine.kill()
    engine.start()
    with pytest.raises(BackendError, match="went down as it started this container"):
        DockerBackend(settings).start(jobs[1])
    assert backend.status(jobs[1].name, {}).phase == "waiting"
    for job in jobs:
        backend.remove(job.name, {})


def test_a_container_runs_once_at_most_though_the_engine_crashes_as_it_starts_it(
    engine: Engine, backend: DockerBackend, settings: ServiceSettings
) -> None:
    engines.skip_unless_own(engine)
    line = "echo begin >> /results/ledger; sleep 4; echo end >> /results/ledger"
    began = time.monotonic()
    job = order(settings, "sh", "-c", line)
    backend.start(job)
    early_s, late_s = 0.0, time.monotonic() - began
    backend.remove(job.name, {})

    def is_started(job: Order) -> bool:
        with contextlib.suppress(BackendError):
            backend.start(job)
            return True
        return False

    told = []
    # Nearer and nearer to where the container runs and the engine does not know it yet.
    for _ in range(8):
        moment_s = (early_s + late_s) / 2
        job = order(settings, "sh", "-c", line)
        ledger = job.folder / "outputs/ledger"
        starting = threading.Thread(target=is_started, args=(job,))
        starting.start()
        time.sleep(moment_s)
        engine.kill()
        starting.join()
        engine.start()
        if ledger.exists():
            late_s, patience_s = moment_s, 6.0
        else:
            early_s, patience_s = moment_s, 1.0
        deadline = time.monotonic() + patience_s
        while not (started := is_started(job)) and time.monotonic() < deadline:
            time.sleep(0.2)
        told.append((round(moment_s, 3), started, backend.status(job.name, {}).phase))
        if started:
            assert awaited(backend, job).exit_code == 0, told
            # Nor is it when somebody asks who has not heard of its end.
            backend.start(job)
            time.sleep(0.5)
            assert ledger.read_text().split() == ["begin", "end"], told
        elif ledger.exists():
            # It ran and ended, and the engine has never heard of it.
            assert ledger.read_text().split() == ["begin", "end"], told
        backend.remove(job.name, {})
    print(told)


def test_a_job_that_the_engine_takes_along_is_stopped_as_by_a_cancel_and_not_started_again(
    engine: Engine, backend: DockerBackend, settings: ServiceSettings
) -> None:
    engines.skip_unless_own(engine)
    with engines.without_live_restore(engine):
        program = "import time\nprint('begun')\nwhile True: time.sleep(1)"
        job = order(settings, *python(program))
        backend.start(job)
        await_words(backend, job, "begun")
        engine.kill()
        engine.start()
        end = awaited(backend, job)
        assert end.exit_code in (128 + 15, 128 + 9, 255)
        assert not end.out_of_memory
        assert said(backend, job).splitlines() == ["begun"]
        backend.remove(job.name, {})
