"""What clients may hand in and ask for."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service import machine
from service.errors import BackendError, ConfigError, StateError, UnknownJobError
from service.jobs import desk as desks
from service.jobs import orders, settings_file
from service.jobs.desk import Desk
from service.jobs.job import Attempt, Job
from service.jobs.settings import ServiceSettings
from service.jobs.spec import JobSpec
from tests.service.job_specs import settings, spec, with_config
from tests.service.memory_backend import MemoryBackend


@pytest.fixture
def desk(place: str, tmp_path: Path) -> Desk:
    (tmp_path / "data" / "inner").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "data" / "within").symlink_to(tmp_path / "data" / "inner")
    chosen = settings(tmp_path, data_urls=["s3://bucket/sets/", "https://host"])
    return Desk(chosen, backends={"local": MemoryBackend(), "docker": MemoryBackend("docker")})


def test_what_is_checked_is_the_whole_configuration_with_the_data_under_an_absolute_path(
    desk: Desk, tmp_path: Path
) -> None:
    resolved = desk.check(spec())
    assert resolved["data"]["root"] == str(tmp_path / "data" / "demo")
    assert resolved["optimizer"]["momentum"] == 0.9


REFUSED: list[tuple[str, Any, str]] = [
    ("data.root", "/etc", "lies outside"),
    ("data.root", "data/../outside", "lies outside"),
    ("data.root", "data/link", "lies outside"),
    ("data.root", "data/link/deeper", "lies outside"),
    ("data.root", "datum", "lies outside"),
    ("data.root", "~/data", "lies outside"),
    ("data.root", "file:///etc", "may not be read"),
    ("data.root", "ftp://host/folder", "may not be read"),
    ("data.root", "models:/x@best", "may not be read"),
    ("data.root", "http://169.254.169.254/latest", r"\(data_urls of .*\): s3://bucket/sets, https://host$"),
    ("data.root", "http://host/folder", "data_urls"),
    ("data.root", "https://host.else/folder", "data_urls"),
    ("data.root", "https://host@else/folder", "data_urls"),
    ("data.root", "https://host:8443/folder", "data_urls"),
    ("data.root", "s3://bucket/setsuma", "data_urls"),
    ("data.root", "s3://bucket/sets/../secret", "data_urls"),
    ("data.root", "s3://bucket/sets/%2e%2E/secret", "data_urls"),
    ("data.root", "s3://bucket/sets/..\\secret", "data_urls"),
    ("data.root", "https://host/.\t./x", "data_urls"),
    ("data.root", "https://host/x::file:///etc", "data_urls"),
    ("data.options.annotations", "../../etc/passwd", "lies outside"),
    ("data.options.annotations", "/etc/passwd", "lies outside"),
    ("data.train_split", "../../outside", "lies outside"),
    ("data.cache_folder", "data/cache", "the service's to decide"),
    ("model.init_from", "/etc/model.safetensors", "lies outside"),
    ("model.init_from", "file:///etc/model", "may not be read"),
    ("model.init_from", "s3://bucket/model", "may not be read"),
    ("deepspeed", "/etc/passwd", "lies outside"),
    ("deepspeed", "https://host/ds.json", "may not be read"),
    ("output", "/tmp/elsewhere", "the service's to decide"),
    ("tracking.uri", "file:///tmp/mlruns", "the service's to decide"),
    ("extends", "../../secret.yaml", "stands alone"),
    ("job", "detect", "kind 'detect' takes it"),
    ("optimizer.learning_rate", 1, "unknown key"),
    ("micro_batch", 3, "does not divide"),
    ("workers", 3, "cannot share evenly"),
]


@pytest.mark.parametrize(("key", "value", "told"), REFUSED)
def test_what_a_configuration_may_not_say_is_refused_with_its_key(desk: Desk, key: str, value: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as raised:
        desk.submit(with_config(key, value))
    assert key.rpartition(".")[2] in str(raised.value)
    assert desk.record.jobs() == []


ALLOWED: list[tuple[str, Any]] = [
    ("data.root", "data/within"),
    ("data.root", "data/inner/../inner"),
    ("data.root", "s3://bucket/sets"),
    ("data.root", "s3://bucket/sets/imagenet"),
    ("data.root", "https://host/folder"),
    ("model.init_from", "models:/lorot-demo@best"),
    ("model.init_from", "runs:/0123456789abcdef"),
    ("model.init_from", "data/model"),
    ("output", "runs"),
    ("tracking.uri", None),
    ("name", "mine"),
]


@pytest.mark.parametrize(("key", "value"), ALLOWED)
def test_what_a_configuration_may_say_is_taken(desk: Desk, key: str, value: Any) -> None:
    assert desk.check(with_config(key, value))


@pytest.mark.parametrize("kind", ["train", "detect"])
def test_a_job_without_a_configuration_trains_nothing_by_the_defaults(desk: Desk, kind: str) -> None:
    with pytest.raises(ConfigError, match="config: is empty"):
        desk.submit(spec(kind=kind, config={}, model=None if kind == "train" else "models:/mine@best"))


def test_no_address_of_data_is_allowed_before_the_operator_names_one(place: str, tmp_path: Path) -> None:
    desk = Desk(settings(tmp_path), backends={"local": MemoryBackend()})
    with pytest.raises(ConfigError, match=r"s3://bucket/sets.* \(data_urls of .*\): there are none$"):
        desk.check(with_config("data.root", "s3://bucket/sets"))


@pytest.mark.parametrize("url", ["s3://", "https:///sets", "bucket/sets", "file:///data", "s3://bucket/../other"])
def test_what_is_no_address_of_data_cannot_be_declared(tmp_path: Path, url: str) -> None:
    with pytest.raises(ValueError, match="with a bucket or host"):
        settings(tmp_path, data_urls=[url])


def test_a_job_that_can_never_fit_is_refused_with_the_numbers(desk: Desk) -> None:
    with pytest.raises(ConfigError, match="5 GPUs never fit this machine, which has 4"):
        desk.check(spec(resources={"gpus": 5}))
    with pytest.raises(ConfigError, match="9 cores never fit this machine, which has 8"):
        desk.check(spec(resources={"cpus": 9}))
    with pytest.raises(ConfigError, match=r"memory: 65\.0 GB never fit this machine, of which jobs may take 64\.0 GB"):
        desk.check(spec(resources={"memory": "65GB"}))
    with pytest.raises(ConfigError, match=r"memory: 96\.0 GB on 3 nodes"):
        desk.check(spec(backend="docker", nodes="3", resources={"memory": "32GB"}))
    with pytest.raises(ConfigError, match="6 GPUs on 3 nodes"):
        desk.check(spec(backend="docker", nodes="3", resources={"gpus": 2}))
    with pytest.raises(ConfigError, match="retries: 21"):
        desk.check(spec(retries=21))
    assert desk.check(spec(resources={"gpus": 4, "cpus": 8, "memory": "64GB"}))


def test_what_a_machine_has_of_memory_is_found_out_where_it_is_not_said(desk: Desk, tmp_path: Path) -> None:
    assert Desk(settings(tmp_path, memory=None)).capacity.memory == machine.memory_bytes() > 0


def test_a_backend_that_is_off_is_refused_with_those_that_are_on(desk: Desk) -> None:
    with pytest.raises(ConfigError, match=r"on are: local; .*backends\.kubernetes\.enabled: true"):
        desk.check(spec(backend="kubernetes"))


def test_a_detector_begins_with_the_model_of_the_job(desk: Desk) -> None:
    job = JobSpec(kind="detect", model="models:/lorot-demo@best", config={"data": {"root": "data/coco"}})
    assert desk.check(job)["model"]["backbone"] == "models:/lorot-demo@best"
    with pytest.raises(ConfigError, match="another model"):
        desk.check(job.model_copy(update={"config": {**job.config, "model": {"backbone": "models:/other@best"}}}))
    with pytest.raises(ConfigError, match="lies outside"):
        desk.check(job.model_copy(update={"model": "/etc"}))


def test_secrets_are_refused_where_the_service_has_none_of_that_name(desk: Desk, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keeps no secrets"):
        desk.check(spec(secrets={"TOKEN": "token"}))
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "token").write_text("hush\n")
    other = Desk(settings(tmp_path, secrets=tmp_path / "secrets"), backends={"local": MemoryBackend()})
    assert other.check(spec(secrets={"TOKEN": "token"}))
    assert orders.secret_values(spec(secrets={"TOKEN": "token"}), other.settings) == {"TOKEN": "hush"}
    with pytest.raises(ConfigError, match="no secret 'tokn'"):
        other.check(spec(secrets={"TOKEN": "tokn"}))


def test_pages_are_whole_whatever_comes_between_them(desk: Desk) -> None:
    for number in range(7):
        desk.submit(spec(name=f"job-{number}"), owner="ada" if number % 2 else "bob")
    first = desk.page(limit=3)
    assert [job.spec.name for job in first.jobs] == ["job-6", "job-5", "job-4"]
    assert first.total == 7
    desk.submit(spec(name="late"))
    second = desk.page(limit=3, cursor=first.next)
    third = desk.page(limit=3, cursor=second.next)
    assert [job.spec.name for job in (*second.jobs, *third.jobs)] == ["job-3", "job-2", "job-1", "job-0"]
    assert third.next is None
    assert [job.spec.name for job in desk.page(owner="ada").jobs] == ["job-5", "job-3", "job-1"]
    assert desk.page(name="LATE").total == 1
    assert desk.page(state="running").total == desk.page(kind="detect").total == desk.page(backend="docker").total == 0
    for wrong in ("x", "", "WzFd", "eyJhIjoxfQ"):
        with pytest.raises(ConfigError, match="cursor"):
            desk.page(cursor=wrong)
    with pytest.raises(ConfigError, match="limit"):
        desk.page(limit=0)


def test_jobs_of_one_moment_are_paged_whole_too(desk: Desk) -> None:
    for _ in range(5):
        job, _ = desk.submit(spec())
        desk.record._jobs[job.id] = Job(job.id, "1", job.spec, "queued", submitted_s=1.0)
    desk.record._newest = None
    desk.record._order = sorted((1.0, job_id) for job_id in desk.record._jobs)
    seen: list[str] = []
    cursor = None
    while True:
        page = desk.page(limit=2, cursor=cursor)
        seen += [job.id for job in page.jobs]
        cursor = page.next
        if cursor is None:
            break
    assert sorted(seen) == sorted(desk.record._jobs)


def test_a_job_is_found_by_the_beginning_of_its_id(desk: Desk) -> None:
    job, _ = desk.submit(spec())
    assert desk.get(job.id[:6]) == desk.get(job.id) == job
    with pytest.raises(UnknownJobError, match="give 6 digits of its id at least"):
        desk.get(job.id[:5])
    with pytest.raises(UnknownJobError):
        desk.get("../" + job.id)
    twin = Job(job.id[:8] + "f" * 24, "1", job.spec, "queued")
    desk.record._added(twin)
    with pytest.raises(UnknownJobError, match="2 jobs"):
        desk.get(job.id[:8])


def test_cancelling_is_at_once_for_what_waits_and_may_be_said_twice(desk: Desk) -> None:
    job, _ = desk.submit(spec())
    assert desk.cancel(job.id).state == "killed"
    assert desk.cancel(job.id).state == "killed"
    other, _ = desk.submit(spec())
    desk.record.change(other.id, state="starting")
    assert desk.cancel(other.id).cancel
    assert desk.cancel(other.id).state == "starting"
    desk.record.change(other.id, state="failed", ended_s=1.0)
    with pytest.raises(StateError, match="has ended"):
        desk.cancel(other.id)


def test_retry_and_resume_are_for_what_failed_or_was_killed(desk: Desk) -> None:
    job, _ = desk.submit(spec())
    for what in (desk.retry, desk.resume):
        with pytest.raises(StateError, match="cancel it first"):
            what(job.id)
    desk.cancel(job.id)
    resumed = desk.resume(job.id)
    assert (resumed.state, resumed.resume, resumed.cancel, resumed.failures) == ("queued", True, False, 0)
    desk.cancel(job.id)
    retried = desk.retry(job.id)
    assert (retried.resume, retried.reason, retried.ended_s) == (False, "", 0.0)
    assert retried.queued_s > job.queued_s
    desk.record.change(job.id, state="starting")
    desk.record.change(job.id, state="finished")
    for what in (desk.retry, desk.resume):
        with pytest.raises(StateError, match="finished"):
            what(job.id)


@pytest.mark.parametrize("what", ["retry", "resume"])
def test_what_was_allowed_once_is_asked_again_and_failures_are_counted_anew(
    what: str, desk: Desk, tmp_path: Path
) -> None:
    job, _ = desk.submit(spec())
    desk.record.change(job.id, state="failed", failures=3)
    (tmp_path / "data" / "demo").symlink_to(tmp_path / "outside")
    with pytest.raises(ConfigError, match="lies outside"):
        getattr(desk, what)(job.id)
    assert desk.get(job.id).state == "failed"
    (tmp_path / "data" / "demo").unlink()
    assert getattr(desk, what)(job.id).failures == 0


def test_the_queue_tells_what_is_used_and_who_is_next(desk: Desk) -> None:
    running, _ = desk.submit(spec(resources={"gpus": 1, "cpus": 2, "memory": "20GB"}))
    desk.record.change(running.id, state="starting")
    low, _ = desk.submit(spec())
    high, _ = desk.submit(spec(priority=1, backend="docker", nodes="2"))
    found = desk.queue()
    assert found["gpus"] == {"all": 4, "used": 1}
    assert found["cpus"] == {"all": 8.0, "used": 2.0}
    assert found["memory"] == {"all": 64 * 10**9, "used": 20 * 10**9}
    assert (found["waiting"], found["running"]) == ([high.id, low.id], [running.id])
    assert desk.progress(low.id) == {"position": 2}


def test_the_order_of_a_training_names_the_service_s_places_and_holds_no_secret(desk: Desk, tmp_path: Path) -> None:
    job = Job("ab" * 16, "1", spec(environment={"NOTE": "x"}, workers=2), "starting", resume=True)
    attempt = Attempt(2, "lorot-abababababab-2")
    resolved = desk.check(job.spec)
    order = orders.order(job, attempt, desk.settings, resolved, (1,))
    folder = tmp_path / "jobs" / job.id
    assert order.command[1:] == (
        *("-m", "service.cli", "train", f"{folder}/job.yaml", "--resume"),
        *("--workers", "2", "--max-restarts", "3"),
    )
    assert order.environment == {
        "NOTE": "x",
        "LOROT_RUN_ID": job.id,
        "LOROT_JOB_ATTEMPT": "2",
        "LOROT_JOB_NAME": "job",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlruns/mlflow.db",
        "LOROT_ARTIFACT_ROOTS": "[]",
    }
    orders.prepare(order, desk.settings, resolved)
    from service import config

    read = config.load_any(folder / "job.yaml")
    assert read.folder == folder / "run"
    assert (read.tracking.uri, read.tracking.experiment) == (None, "lorot")


def test_an_order_for_containers_has_their_paths_and_a_place_to_meet(tmp_path: Path) -> None:
    chosen = settings(tmp_path, tracking_uri="http://mlflow:5000", worker_tracking_uri="http://inside:5000")
    job = Job("ab" * 16, "1", spec(backend="docker", nodes="1:2"), "starting")
    order = orders.order(job, Attempt(1, "lorot-abababababab-1"), chosen, {})
    assert order.command == (
        *("lorot", "train", "/job/job.yaml", "--max-restarts", "3"),
        *("--nnodes", "1:2", "--rdzv", "{rendezvous}", "--run-id", "lorot-abababababab-1"),
    )
    assert order.environment["MLFLOW_TRACKING_URI"] == "http://inside:5000"
    alone = settings(tmp_path, tracking_uri="sqlite:///x.db", worker_tracking_uri=None)
    with pytest.raises(ConfigError, match="do not see sqlite:"):
        orders.order(job, Attempt(1, "x"), alone, {})
    with pytest.raises(ConfigError, match="start an MLflow server"):
        Desk(alone, backends={"docker": MemoryBackend("docker")}).check(job.spec)


def test_what_an_attempt_began_is_set_aside_once_by_one_that_begins_anew(desk: Desk, tmp_path: Path) -> None:
    folder = tmp_path / "jobs" / ("ab" * 16)

    def prepare(number: int, resume: bool) -> None:
        job = Job("ab" * 16, "1", spec(), "starting", resume=resume)
        orders.prepare(
            orders.order(job, Attempt(number, f"lorot-abababababab-{number}"), desk.settings, {}), desk.settings, {}
        )

    prepare(1, resume=False)
    (folder / "run").mkdir()
    (folder / "run" / "run.json").write_text("{}")
    # The service was killed while it started the attempt, which has begun.
    prepare(1, resume=False)
    prepare(2, resume=True)
    assert (folder / "run" / "run.json").exists()
    prepare(3, resume=False)
    assert not (folder / "run").exists()
    assert (folder / "run.1" / "run.json").exists()


def test_only_plain_files_of_a_job_are_shown(desk: Desk, tmp_path: Path) -> None:
    job, _ = desk.submit(spec())
    run = orders.folder_of(desk.settings, job.id) / "run"
    run.mkdir(parents=True)
    (run / "samples.png").write_bytes(b"png")
    (run / "secret.png").symlink_to("/etc/passwd")
    (run / "report.html").symlink_to("/etc/passwd")
    (run / "config.yaml").mkdir()
    (run / "notes.txt").write_text("mine")
    assert desk.files(job.id) == {"samples.png": run / "samples.png"}
    os.rename(run, tmp_path / "outside" / "run")
    run.symlink_to(tmp_path / "outside" / "run")
    assert desk.files(job.id) == {}


def test_progress_is_what_the_run_folder_tells_and_the_rest_is_estimated_from_the_last_records(desk: Desk) -> None:
    job, _ = desk.submit(spec())
    desk.record.change(job.id, state="starting")
    assert desk.progress(job.id) == {}
    run = orders.folder_of(desk.settings, job.id) / "run"
    run.mkdir(parents=True)
    (run / "run.json").write_text('{"total_steps": 100}')
    lines = [f'{{"step": {10 * n}, "time_s": {100 + 5 * n}, "train/images_per_s": 64.0}}' for n in range(1, 5)]
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 50, "time']))
    found = desk.progress(job.id)
    assert (found["step"], found["share"], found["images_per_s"]) == (40, 0.4, 64.0)
    assert found["eta_s"] == pytest.approx(60 / 2)
    assert [record["step"] for record in desk.metrics(job.id)] == [10, 20, 30, 40]


def test_jobs_side_by_side_show_the_settings_that_differ_and_the_last_of_each_metric(desk: Desk) -> None:
    one, _ = desk.submit(with_config("optimizer.lr", 0.1))
    other, _ = desk.submit(with_config("optimizer.lr", 0.2))
    run = orders.folder_of(desk.settings, one.id) / "run"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 1, "val/top1": 0.1}\n{"step": 2, "val/top1": 0.3}\n')
    found = desk.compare([one.id, other.id])
    assert found["settings"] == {"config.optimizer.lr": ["0.1", "0.2"]}
    assert found["metrics"] == {"val/top1": [0.3, None]}


def test_logs_of_an_attempt_that_has_ended_come_from_its_folder(desk: Desk) -> None:
    job, _ = desk.submit(spec())
    assert b"".join(desk.logs(job.id)) == b""
    attempts = (Attempt(1, "a", ended_s=1.0), Attempt(2, "b", ended_s=2.0))
    desk.record.change(job.id, state="starting", attempts=attempts)
    for number in (1, 2):
        folder = orders.attempt_folder(desk.settings, job.id, number)
        folder.mkdir(parents=True)
        (folder / "log-node0.txt").write_text(f"first of {number}\nlast of {number}\n")
    assert b"".join(desk.logs(job.id)) == b"first of 2\nlast of 2\n"
    assert b"".join(desk.logs(job.id, attempt=1, tail=1, follow=lambda: True)) == b"last of 1\n"
    with pytest.raises(UnknownJobError, match="there are 1, 2"):
        desk.logs(job.id, attempt=3)


def test_what_was_kept_of_a_log_is_shown_while_its_backend_is_away(desk: Desk) -> None:
    job, _ = desk.submit(spec())
    desk.record.change(job.id, state="starting", attempts=(Attempt(1, "a"),))
    backend = desk.backend("local")
    assert isinstance(backend, MemoryBackend)
    backend.away = True
    with pytest.raises(BackendError):
        b"".join(desk.logs(job.id))
    folder = orders.attempt_folder(desk.settings, job.id, 1)
    folder.mkdir(parents=True)
    (folder / "log-node0.txt").write_text("so far\n")
    assert b"".join(desk.logs(job.id)) == b"so far\n"


@pytest.mark.parametrize("since", ["", "1700000000.000000000-0123abcd-0123abcd"])
def test_what_was_kept_of_a_log_does_not_come_behind_lines_that_were_told(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, since: str
) -> None:
    job, _ = desk.submit(spec())
    desk.record.change(job.id, state="starting", attempts=(Attempt(1, "a"),))
    desk.record.change(job.id, state="running")
    folder = orders.attempt_folder(desk.settings, job.id, 1)
    folder.mkdir(parents=True)
    (folder / "log-node0.txt").write_text("so far\n")

    def broken(*given: object, **more: object) -> Iterator[bytes]:
        if not since:
            yield b"so far\n"
        raise BackendError("the engine is away")

    monkeypatch.setattr(desk.backend("local"), "logs", broken)
    told: list[bytes] = []
    with pytest.raises(BackendError):
        told.extend(desk.logs(job.id, follow=lambda: True, since=since))
    assert told == ([] if since else [b"so far\n"])


def test_the_log_of_a_job_that_waits_is_waited_for_with_signs_of_life(desk: Desk) -> None:
    job, _ = desk.submit(spec())
    left = [3]

    def follow() -> bool:
        left[0] -= 1
        return left[0] > 0

    assert set(desk.logs(job.id, follow=follow)) == {b""}


def test_the_settings_file_that_is_shipped_says_what_holds_without_it() -> None:
    root = Path(desks.__file__).parents[2]
    assert settings_file.load(root / "configs" / "service.yaml") == settings_file.load(None) == ServiceSettings()
    assert settings_file.load(None, ["gpus=2", "limits.retries=5"]).limits.retries == 5
    with pytest.raises(ConfigError, match=r"limits\.retry: unknown key; did you mean 'limits.retries'"):
        settings_file.load(None, ["limits.retry=5"])


@pytest.mark.parametrize(
    "uri", ["mlflow.lan:5000", "mlflow.lan", "sqlite:///mlflow.db", "http://", "//mlflow.lan:5000"]
)
def test_an_address_that_no_browser_can_be_led_to_is_refused_with_one_that_works(uri: str) -> None:
    with pytest.raises(
        ConfigError, match=r"browser_tracking_uri: write http:// or https://.* as http://mlflow\.lan:5000"
    ):
        settings_file.load(None, [f"browser_tracking_uri={uri}"])
    for good in ("http://mlflow.lan:5000", "https://someone:secret@mlflow.lan/", "null"):
        assert settings_file.load(None, [f"browser_tracking_uri={good}"]).browser_tracking_uri in (good, None)
