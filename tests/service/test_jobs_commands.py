"""`lorot submit`, `jobs`, `logs`, `cancel`, `retry`, `resume`, `token`: to a service over HTTP, and without one."""

import contextlib
import dataclasses
import json
import re
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from rich.console import Console

from service import help
from service.api import shapes
from service.client import Client
from service.commands import job_tables, jobs, submitting
from service.errors import BackendError, ConfigError, JobError, LorotError, StateError, UnknownJobError
from service.jobs import orders
from service.jobs.job import Attempt, Job
from service.jobs.settings import ServiceSettings
from service.jobs.spec import JobSpec
from tests.service.api_shelf import Served, served, spec
from tests.service.listening import listening

app = typer.Typer()
jobs.add_to(app)


def call(*arguments: str) -> int:
    """The exit code of `lorot ARGUMENTS`, run in this process."""
    try:
        app(list(arguments))
    except SystemExit as ended:
        return int(ended.code or 0)
    except LorotError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


@pytest.fixture(autouse=True)
def _plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("LOROT_SERVER", "LOROT_TOKEN", "LOROT_SETTINGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture
def here(place: str, tmp_path: Path) -> Iterator[Served]:
    with served(tmp_path, place) as service:
        yield service


@pytest.fixture
def url(here: Served, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with listening(here.app) as address:
        monkeypatch.setenv("LOROT_SERVER", address)
        yield address


@contextlib.contextmanager
def moving(here: Served, code: int = 0) -> Iterator[None]:
    """Let the controller go on, and every job end soon."""
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            here.controller.step()
            for shelf in here.shelves.values():
                for name in list(shelf.orders):
                    shelf.write(name, b"written\n") if name not in shelf.written else shelf.end(name, code)
            time.sleep(0.02)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


CONTAINER = ("submit", "--image", "img:1", "--retries", "0")


def test_a_job_is_submitted_shown_followed_and_stopped(
    here: Served, url: str, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert (
        call(
            *(*CONTAINER, "--name", "mine", "--env", "A=b=c", "--output", "model", "--grace", "90"),
            *("--", "python", "-m", "x", "--y"),
        )
        == 0
    )
    told = capfdbinary.readouterr().out.decode()
    [job] = here.desk.record.jobs()
    assert told.startswith(f"{job.id[:12]} queued: mine, container on docker; ")
    assert job.spec.command == ("python", "-m", "x", "--y")
    assert (job.spec.image, job.spec.environment, job.spec.outputs) == ("img:1", {"A": "b=c"}, ("model",))
    assert job.spec.grace_s == 90
    running = here.run(job.id)
    assert running.attempt is not None
    here.shelves["docker"].write(running.attempt.name, b"one\ntwo\n")
    assert call("logs", job.id[:8], "--tail", "1") == 0
    assert capfdbinary.readouterr().out == b"two\n"
    assert call("cancel", job.id[:8]) == 0
    assert capfdbinary.readouterr().out.decode() == f"{job.id[:12]} running, asked to stop\n"
    here.step_until(lambda: here.desk.get(job.id).has_ended, job.id)
    assert call("logs", "-f", job.id) == 0
    assert capfdbinary.readouterr().out == b"one\ntwo\n"
    assert call("jobs", job.id[:8]) == 0
    assert "attempt 1" in capfdbinary.readouterr().out.decode()
    assert call("job", job.id[:8], "--json") == 0
    assert json.loads(capfdbinary.readouterr().out)["state"] == "killed"
    assert call("retry", job.id) == 0
    assert here.desk.get(job.id).state == "queued"
    assert call("cancel", job.id) == 0
    assert call("resume", job.id, "--json") == 0
    assert here.desk.get(job.id).resume


def test_of_several_jobs_one_that_is_refused_keeps_no_other_from_being_changed(
    here: Served, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = here.end(here.run(here.submit()["id"]).id)
    ids = [ended.id, here.submit()["id"], here.submit()["id"]]
    assert call("cancel", ids[0], "0123456789ab", *ids[1:]) == StateError.exit_code
    told = capsys.readouterr()
    assert told.out == "".join(f"{job_id[:12]} killed\n" for job_id in ids[1:])
    assert f"job {ids[0]} has ended (finished)" in told.err
    assert "there is no job '0123456789ab'" in told.err
    assert call("retry", ids[0], ids[1], "--json") == StateError.exit_code
    assert [one["state"] for one in json.loads(capsys.readouterr().out)] == ["queued"]


@pytest.mark.parametrize("verb", ["cancel", "retry", "resume"])
def test_a_wrong_token_is_sent_once_for_however_many_jobs(
    here: Served, url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    counted: list[str] = []
    take = here.access.failures.take

    def count(client: str) -> float:
        counted.append(client)
        return take(client)

    monkeypatch.setattr(here.access.failures, "take", count)
    monkeypatch.setenv("LOROT_TOKEN", "lorot_wrong")
    assert call(verb, *(f"{number:012x}" for number in range(3))) == ConfigError.exit_code
    assert "LOROT_TOKEN" in capsys.readouterr().err
    assert len(counted) == 1


def test_jobs_of_others_are_told_at_the_end_and_the_own_ones_are_stopped(
    here: Served, url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = here.access.tokens.create("ann", "submit")
    own = here.submit({"Authorization": f"Bearer {secret}"})["id"]
    other = here.submit(here.token("ben", "submit"))["id"]
    monkeypatch.setenv("LOROT_TOKEN", secret)
    assert call("cancel", other, own) == ConfigError.exit_code
    assert capsys.readouterr().out == f"{own[:12]} killed\n"
    assert here.desk.get(other).state == "queued"


def test_what_is_said_of_a_new_job_is_a_command_that_finds_it(
    here: Served, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(*options: str) -> list[str]:
        assert call(*CONTAINER, *options, "--", "true") == 0
        (line,) = re.findall(r"`lorot (.+)` follows it", capsys.readouterr().out)
        return shlex.split(line)

    assert told("--server", url)[:2] == ["logs", "-f"]
    assert "--server" not in told("--server", url)
    monkeypatch.delenv("LOROT_SERVER")
    (tmp_path / "a token").write_text(here.access.tokens.create("ann", "submit"))
    given = ["--server", url, "--token-file", str(tmp_path / "a token")]
    command = told(*given)
    assert command[3:] == given
    here.desk.cancel(command[2])
    assert call(*command) == 0


@pytest.mark.parametrize(("code", "told"), [(0, 0), (3, 3), (-9, 137)])
def test_waiting_ends_as_the_job_does(
    here: Served, url: str, capsys: pytest.CaptureFixture[str], code: int, told: int
) -> None:
    with moving(here, code):
        assert call(*CONTAINER, "--wait", "--json", "--", "true") == told
    captured = capsys.readouterr()
    assert json.loads(captured.out)["state"] == ("failed" if code else "finished")
    assert ("error: job" in captured.err) is bool(code)


def test_the_same_key_names_the_same_job(here: Served, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert call(*CONTAINER, "--key", "nightly", "--", "true") == 0
    assert "this key's job is here already" in capsys.readouterr().out
    assert call(*CONTAINER, "--", "true") == 0
    assert call(*CONTAINER, "--", "true") == 0
    assert len(here.desk.record.jobs()) == 3


def test_several_jobs_are_compared(here: Served, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = (("one", 3, "[bold]"), ("two", 4, "plain"))
    ids = [here.submit(name=name, priority=rank, experiment=text)["id"] for name, rank, text in given]
    for job_id, loss in zip(ids, (0.5, 0.25), strict=True):
        run = orders.folder_of(here.settings, job_id) / "run"
        run.mkdir(parents=True)
        records = [{"step": 1, "train/loss": loss}, {"step": 2, "train/loss": 2 * loss}]
        (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert call("jobs", ids[0][:12], ids[1], "--server", url, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"] == {"name": ["one", "two"], "experiment": ["[bold]", "plain"], "priority": ["3", "4"]}
    assert (found["metrics"], found["best"]) == ({"train/loss": [1.0, 0.5]}, {"train/loss": [0.5, 0.25]})
    assert call("jobs", *ids, "--server", url) == 0
    told = capsys.readouterr().out
    assert [line.split() for line in told.splitlines() if "priority" in line] == [["priority", "3", "4"]]
    losses = [line.split() for line in told.splitlines() if "loss" in line]
    assert losses == [["train/loss", "1", "(0.5)", "0.5", "(0.25)"]]
    assert "[bold]" in told
    assert call("jobs", ids[0], "ffffffffffff", "--server", url) != 0


def test_lists_are_narrowed_and_go_over_pages(here: Served, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(4):
        here.submit(name=f"n{number}")
    assert call("jobs", "--limit", "3", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert [job["name"] for job in listed["jobs"]] == ["n3", "n2", "n1"]
    assert listed["total"] == 4
    assert call("jobs", "--limit", "3", "--name", "n", "--state", "queued", "--backend", "docker") == 0
    table = capsys.readouterr().out
    assert "and 1 more" in table
    assert "n3" in table
    assert call("jobs", "--state", "runing") == 2
    assert "none of queued, starting, running" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["submit"], "CONFIG is missing"),
        (["submit", "absent.yaml"], "absent.yaml: cannot read"),
        (["submit", "c.yaml", "seed"], "write key.sub=value"),
        (["submit", "c.yaml", "--kind", "tarin"], "--kind: 'tarin' is none of train"),
        (["submit", "c.yaml", "--backend", "slurm"], "--backend: 'slurm' is none of local"),
        (["submit", "c.yaml", "--nodes", "0"], "nodes: write the fewest and the most machines"),
        (["submit", "c.yaml", "--memory", "lots"], "resources.memory: write an amount of memory"),
        (["submit", "c.yaml", "--env", "A"], "--env 'A': write KEY=VALUE"),
        (["submit", "c.yaml", "--image", "x"], "the local backend is this one machine"),
        (["submit", "c.yaml", "--", "true"], "a configuration is for train"),
        (["submit", "--kind", "container"], "a container needs one"),
        (["submit", "--kind", "detect"], "model: name one"),
        (["submit", "--backend", "local", "--", "true"], "a container runs on docker or kubernetes"),
        (["submit", "c.yaml", "--server", "localhost:80"], "write http://HOST:PORT"),
        (["submit", "c.yaml", "--dry-run", "--format", "helm"], "--format: 'helm' is none of objects, trainjob"),
        (["jobs", "--settings", "absent.yaml"], "absent.yaml: cannot read"),
        (["jobs", "--server", "http://x", "--token-file", "absent"], "absent: no token can be read"),
    ],
)
def test_wrong_usage_says_what_would_work(
    capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    Path("c.yaml").write_text("seed: 1\n")
    assert call(*arguments) == 2
    told = capsys.readouterr().err
    assert complaint in told
    assert "Traceback" not in told


def test_a_configuration_travels_as_plain_keys(tmp_path: Path) -> None:
    (tmp_path / "lower.yaml").write_text("optimizer: {lr: 0.1, momentum: 0.5}\nduration: 3 epochs\n")
    (tmp_path / "my run!.yaml").write_text("extends: lower.yaml\noptimizer: {lr: 0.2}\n")
    wish = submitting.Wish(config=tmp_path / "my run!.yaml", overrides=("seed=7", "optimizer.lr=0.3"))
    made = submitting.spec(wish)
    assert made.config == {"optimizer": {"lr": 0.3, "momentum": 0.5}, "duration": "3 epochs", "seed": 7}
    assert (made.kind, made.backend, made.name) == ("train", "local", "my-run")
    named = submitting.Wish(config=wish.config, overrides=("name=its own",))
    assert submitting.spec(named).name == "its-own"
    assert submitting.spec(dataclasses.replace(named, name="theirs")).name == "theirs"


def test_the_kind_of_a_job_follows_from_its_configuration(tmp_path: Path) -> None:
    for job, kind in (("classify", "train"), ("detect", "detect"), ("segment", "segment")):
        (tmp_path / "c.yaml").write_text(f"job: {job}\n")
        others = {} if kind == "train" else {"model": "models:/m@best"}
        assert submitting.spec(submitting.Wish(config=tmp_path / "c.yaml", others=others)).kind == kind


def test_a_dry_run_prints_the_job_and_submits_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    Path("data").mkdir()
    Path("c.yaml").write_text("data: {name: demo, root: data/demo}\nmodel: {name: resnet_small}\n")
    assert call("submit", "c.yaml", "seed=3", "--dry-run") == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["config"]["seed"], printed["name"]) == (3, "c")
    assert call("submit", "c.yaml", "sead=3", "--dry-run") == 2
    assert "did you mean 'seed'?" in capsys.readouterr().err
    assert not Path("mlruns").exists()
    assert not Path("service-state").exists()


def test_a_dry_run_for_kubernetes_prints_manifests(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["submit", "--backend", "kubernetes", "--image", "reg/img:1", "--nodes", "2", "--dry-run"]
    line += ["--settings", in_a_cluster()]
    assert call(*line, "--", "python", "train.py") == 0
    documents = list(yaml.safe_load_all(capsys.readouterr().out))
    assert [document["kind"] for document in documents] == ["JobSet"]
    assert [*documents[0]] == ["apiVersion", "kind", "metadata", "spec"], "as people read it"
    assert call(*line, "--json", "--", "python", "train.py") == 0
    assert json.loads(capsys.readouterr().out) == documents
    assert call(*line, "--format", "trainjob", "--", "python", "train.py") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("# For Kubeflow Trainer")
    assert [document["kind"] for document in yaml.safe_load_all(printed)] == ["TrainJob"]
    assert not Path("mlruns").exists()
    assert not Path("service-state").exists()


def test_the_guides_export_for_kubeflow_works_as_it_is_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).parents[2]
    guide = (root / "deploy" / "README.md").read_text().partition("### Kubeflow")[2].replace("\\\n", "")
    (line,) = re.findall(r"^lorot (submit .*) > job.yaml$", guide, re.MULTILINE)
    monkeypatch.chdir(root)
    assert call(*shlex.split(line)) == 0
    job, part = yaml.safe_load_all(capsys.readouterr().out)
    assert (job["kind"], job["spec"]["trainer"]["numNodes"], part["kind"]) == ("TrainJob", 4, "ConfigMap")
    runtime = yaml.safe_load((root / "deploy/kubeflow/training-runtime.yaml").read_text())["metadata"]
    assert (job["spec"]["runtimeRef"]["name"], job["metadata"]["namespace"]) == (runtime["name"], runtime["namespace"])


def in_a_cluster(**place: Any) -> str:
    """Settings of this machine for a cluster that nobody can reach."""
    own = {"enabled": True, "namespace": "mine", "kubeconfig": "absent", "results_claim": "results", **place}
    Path("s.yaml").write_text(
        yaml.safe_dump(
            {"tracking_uri": "http://mlflow:5000", "backends": {"kubernetes": own}, "limits": {"retries": 4}}
        )
    )
    return "s.yaml"


@pytest.mark.parametrize(
    ("place", "arguments", "complaint"),
    [
        ({}, ["--mount", "/srv"], "mounts: a cluster shows no folders of a host"),
        ({"images": ["lorot:*"]}, ["--image", "evil/x:1"], "image evil/x:1: is none that jobs may name here"),
        ({"results_claim": None}, ["--nodes", "2"], "ReadWriteMany"),
        ({}, ["--retries", "5"], "retries: 5 are more than this service allows"),
        ({"enabled": False}, [], "backends.kubernetes.enabled: true"),
        ({}, ["--nodes", "1:2", "--format", "trainjob"], "a TrainJob has a fixed number of nodes"),
        ({}, ["--backend", "docker", "--format", "trainjob"], "backend 'docker' is not set up here"),
    ],
)
def test_a_dry_run_refuses_what_would_be_refused(
    capsys: pytest.CaptureFixture[str], place: dict[str, Any], arguments: list[str], complaint: str
) -> None:
    line = ["submit", "--backend", "kubernetes", *arguments, "--dry-run", "--settings", in_a_cluster(**place)]
    assert call(*line, "--", "true") == 2
    told = capsys.readouterr()
    assert complaint in told.err
    assert told.out == ""


def test_a_dry_run_for_a_service_prints_manifests_by_its_settings_and_not_by_those_of_this_machine(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = {"enabled": True, "namespace": "theirs", "images": ["their/*"], "kubeconfig": str(tmp_path / "absent")}
    more: dict[str, Any] = {"backends": {"kubernetes": theirs}, "worker_tracking_uri": "http://their-mlflow:5000"}
    with served(tmp_path / "service", place, **more) as here, listening(here.app) as url:
        line = ["submit", "--backend", "kubernetes", "--dry-run", "--server", url, "--settings", in_a_cluster()]
        for form, kind in (("objects", "Job"), ("trainjob", "TrainJob")):
            assert call(*line, "--format", form, "--image", "their/lorot:1", "--", "true") == 0
            (document,) = yaml.safe_load_all(printed := capsys.readouterr().out)
            assert (document["kind"], document["metadata"]["namespace"]) == (kind, "theirs")
            assert "http://their-mlflow:5000" in printed
        assert call(*line, "--image", "mine/lorot:1", "--", "true") == 2
        assert "those are their/*" in capsys.readouterr().err
        assert here.desk.record.jobs() == []


def test_without_a_service_an_empty_record_says_how_to_begin(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("jobs") == 0
    assert "lorot submit CONFIG" in capsys.readouterr().out
    assert call("jobs", "0123456789") == 2
    assert "there is no job '0123456789'" in capsys.readouterr().err


def test_a_service_that_has_the_record_is_named_and_its_jobs_are_seen(
    here: Served, place: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    job = here.submit(name="theirs")
    (tmp_path / "s.yaml").write_text(f"state: {here.settings.state}\nresults: {here.settings.results}\n")
    (here.settings.state / "service.json").write_text('{"url": "http://127.0.0.1:8080", "pid": 1}')
    assert call("jobs", "--settings", "s.yaml") == 0
    assert "theirs" in capsys.readouterr().out
    assert call("cancel", job["id"], "--settings", "s.yaml") == 2
    told = capsys.readouterr().err
    assert "another service works on this record (process" in told
    assert "--server http://127.0.0.1:8080" in told
    assert here.desk.get(job["id"]).state == "queued"


def test_nobody_at_the_address_is_said_so(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as place:
        port = place.getsockname()[1]
    assert call("jobs", "--server", f"http://127.0.0.1:{port}") == 9
    assert "no job service answers" in capsys.readouterr().err


def test_a_token_is_sent_from_a_file_or_the_environment(
    here: Served, url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    secret = here.access.tokens.create("ann", "submit")
    assert call("jobs") == 2
    told = capsys.readouterr().err
    assert "LOROT_TOKEN or --token-file" in told
    (tmp_path / "token").write_text(f"{secret}\n")
    assert call("jobs", "--token-file", "token") == 0
    monkeypatch.setenv("LOROT_TOKEN", secret)
    assert call(*CONTAINER, "--", "true") == 0
    assert here.desk.record.jobs()[0].owner == "ann"
    # A .netrc of the user is not sent in its place.
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login other password other\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    assert call("jobs") == 0


def test_errors_come_over_the_wire_as_what_they_were(here: Served, url: str) -> None:
    client = Client(url)
    with pytest.raises(UnknownJobError, match="no job 'abc'"):
        client.job("abc")
    with pytest.raises(ConfigError, match=r"did you mean 'spec\.name'"):
        client.submit(spec(nam="x"), "k")
    job, is_new = client.submit(spec(), "k")
    assert is_new
    with pytest.raises(StateError):
        client.resume(job["id"])
    with pytest.raises(UnknownJobError):
        client.job("a/../../tokens")


class Answers:
    """A server that gives these answers, one for each request: (status, headers, body), or None to hang up."""

    def __init__(self, *answers: tuple[int, dict[str, str], bytes] | None) -> None:
        self.requests: list[str] = []
        self._place = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._place.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, args=(answers,), daemon=True)
        self._thread.start()

    def _serve(self, answers: tuple[tuple[int, dict[str, str], bytes] | None, ...]) -> None:
        for answer in answers:
            connection, _ = self._place.accept()
            with connection:
                raw = b""
                while b"\r\n\r\n" not in raw:
                    raw += connection.recv(65536)
                self.requests.append(raw.decode())
                if answer is not None:
                    status, headers, body = answer
                    lines = [f"HTTP/1.1 {status} X", *(f"{key}: {value}" for key, value in headers.items())]
                    connection.sendall("\r\n".join([*lines, "Connection: close", "", ""]).encode() + body)


def test_a_busy_or_broken_service_is_asked_again_where_that_is_safe() -> None:
    job = json.dumps({"id": "a" * 32}).encode()
    full = {"Content-Length": str(len(job)), "Content-Type": "application/json"}
    waits: list[float] = []
    server = Answers((503, {"Retry-After": "7", "Content-Length": "0"}, b""), None, (201, full, job))
    made, is_new = Client(server.url, wait=waits.append).submit(spec(), "key-1")
    assert (made["id"], is_new) == ("a" * 32, True)
    assert waits[0] == 7.0
    assert len(server.requests) == 3
    # Retrying a job by hand is not the same the second time.
    once = Answers(None, (200, full, job))
    with pytest.raises(BackendError):
        Client(once.url, wait=waits.append).retry("a" * 32)
    assert len(once.requests) == 1


def test_a_followed_log_goes_on_after_the_connection_broke() -> None:
    events = {"Content-Type": "text/event-stream"}
    server = Answers(
        (200, events, b"event: attempt\ndata: {}\n\nid: 1:4\ndata: one\n\nid: 1:8\ndata: tw"),
        None,
        (200, events, b"id: 1:8\ndata: two\n\nevent: end\ndata: {}\n\n"),
    )
    waits: list[float] = []
    lines = list(Client(server.url, wait=waits.append).logs("a" * 32, follow=True))
    assert b"".join(lines) == b"one\ntwo\n"
    assert "last-event-id" not in server.requests[0].lower()
    assert "last-event-id: 1:4" in server.requests[-1].lower()


def test_a_redirect_is_not_followed_with_the_token_in_hand() -> None:
    elsewhere = Answers((200, {}, b"{}"))
    server = Answers((307, {"Location": elsewhere.url, "Content-Length": "0"}, b""))
    with pytest.raises(BackendError, match="sends elsewhere"):
        Client(server.url, "lorot_secret").page()
    assert elsewhere.requests == []


def test_what_is_no_job_service_is_recognised() -> None:
    page = b"<html>router</html>"
    server = Answers((404, {"Content-Length": str(len(page))}, page))
    with pytest.raises(BackendError, match="is the address right"):
        Client(server.url).page()


def test_tokens_are_made_listed_and_revoked_beside_a_service(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("token", "create", "ci", "--scope", "read", "state=here") == 0
    secret = capsys.readouterr().out.strip()
    assert secret.startswith("lorot_")
    assert call("token", "list", "state=here") == 0
    listed = capsys.readouterr().out
    assert "ci  read  made" in listed
    assert secret not in listed + Path("here/tokens.json").read_text()
    assert call("token", "create", "ci", "state=here") == 2
    assert call("token", "revoke", "ci", "state=here") == 0
    capsys.readouterr()
    assert call("token", "list", "--json", "state=here") == 0
    assert json.loads(capsys.readouterr().out) == {"tokens": []}


def test_an_admin_makes_tokens_from_afar(
    here: Served, url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOROT_TOKEN", here.access.tokens.create("root", "admin"))
    assert call("token", "create", "ci") == 0
    made = here.access.tokens.find(capsys.readouterr().out.strip())
    assert made is not None
    assert made.scopes == ("read", "submit")
    assert call("token", "list") == 0
    assert "root" in capsys.readouterr().out
    assert call("token", "revoke", "ci") == 0
    assert [token.name for token in here.access.tokens.list()] == ["root"]


def test_serving_off_loopback_without_a_token_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("serve", "--host", "0.0.0.0", "--port", "0") == 2
    assert "lorot token create" in capsys.readouterr().err
    assert not Path("mlruns").exists()


def test_a_port_that_is_taken_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as place:
        port = place.getsockname()[1]
        assert call("serve", "--port", str(port)) == 9
    assert f"127.0.0.1:{port}" in capsys.readouterr().err


def test_help_of_serve_explains_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("serve", "--help") == 0
    words = "".join(capsys.readouterr().out.split())
    keys = [key for key, *_ in help.describe(ServiceSettings)]
    assert [key for key in keys if key not in words] == []
    assert "backends.docker.pids" in keys
    assert "limits.requests_per_minute" in keys


def test_a_table_shows_no_control_characters_and_no_markup() -> None:
    job = Job(
        id="a" * 32,
        experiment_id="0",
        spec=JobSpec(kind="container", backend="docker", command=("sh", "\x1b[2Jx"), name="n"),
        state="failed",
        submitted_s=1.0,
        attempts=(Attempt(1, "x", started_s=1.0, ended_s=66.0, exit_code=1, reason="[bold]\x1b[31mred\x07"),),
        reason="[link=http://x]click",
    )
    console = Console(width=200, record=True)
    shown: Callable[..., Any] = job_tables.show_one
    shown(shapes.job(job), console)
    job_tables.show_list([shapes.job(job)], 1, console)
    text = console.export_text()
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[bold]" in text
    assert "[link=http://x]click" in text
    assert "took 65 s, exit code 1" in text


def test_a_job_that_was_stopped_ends_a_waiting_command_as_ctrl_c_would() -> None:
    job = {"id": "a" * 32, "state": "killed", "reason": "cancelled", "attempts": []}
    with pytest.raises(JobError) as ended:
        submitting.end_as(job)
    assert ended.value.exit_code == 130
    submitting.end_as(job | {"state": "finished"})
