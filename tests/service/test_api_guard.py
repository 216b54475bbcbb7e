"""What every request passes: names, sizes, how often; what every answer carries; and what the logs say of it."""

import asyncio
import io
import json
import logging
import re
import stat
import threading
import time
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message, Receive

from service.api import guard, structured_log
from service.api.audit import KEPT, Audit
from service.api.limits import Buckets
from service.jobs.job import Job
from tests.service.api_shelf import Served, served, spec


@pytest.fixture
def here(place: str, tmp_path: Path) -> Iterator[Served]:
    with served(tmp_path, place, limits={"body_bytes": 5000}, hosts=["jobs.lan"]) as service:
        yield service


@pytest.fixture
def told() -> Iterator[io.StringIO]:
    """What the service logs, as it would stand on stderr."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(structured_log.JsonLines())
    loggers = [structured_log.ACCESS, structured_log.SERVICE]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    yield stream
    for logger in loggers:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


@pytest.mark.parametrize("host", ["localhost", "localhost:8080", "127.0.0.1:1", "[::1]:8080", "[::1]", "JOBS.lan:80"])
def test_the_service_is_called_by_its_own_names(here: Served, host: str) -> None:
    assert here.client.get("/v1/queue", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "", "jobs.lan.evil", "[::2]", "x@localhost"],
)
def test_a_strange_name_is_refused_lest_a_page_elsewhere_reads_what_is_here(here: Served, host: str) -> None:
    answer = here.client.get("/v1/queue", headers={"Host": host})
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "HostError")
    # Probes know no name.
    assert here.client.get("/healthz", headers={"Host": host}).status_code == 200


def test_off_loopback_any_name_will_do_unless_some_are_said(place: str, tmp_path: Path) -> None:
    for hosts, status in (((), 200), (("jobs.lan",), 400)):
        with served(tmp_path / str(status), place, host="0.0.0.0", hosts=hosts) as here:
            token = here.token("ann", "read")
            assert here.client.get("/v1/queue", headers={"Host": "other.lan", **token}).status_code == status


def test_a_body_is_measured_while_it_comes(here: Served) -> None:
    long = json.dumps({"spec": spec(environment={"A": "x" * 6000})}).encode()
    taken = 0

    def pieces() -> Iterator[bytes]:
        nonlocal taken
        for _ in range(1000):
            taken += 1
            yield b"x" * 1000

    for content in (long, iter([long]), pieces()):
        answer = here.client.post("/v1/jobs", content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 413, answer.text
        assert answer.json()["error"]["type"] == "TooLargeError"
        assert "5,000 bytes" in answer.json()["error"]["message"]
    lying = {"Content-Type": "application/json", "Content-Length": "10"}
    assert here.client.post("/v1/jobs", content=long, headers=lying).status_code == 413
    fits = json.dumps({"spec": spec(environment={"A": "x" * 4000})}).encode()
    for content in (fits, iter([fits[:50], fits[50:]])):
        answer = here.client.post("/v1/jobs", content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 201


def test_who_asks_too_often_is_told_when_to_come_back_and_others_are_not(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No time goes by, however slow this machine is.
    monkeypatch.setattr("service.api.guard.Buckets", lambda per_minute: Buckets(per_minute, lambda: 0.0))
    with served(tmp_path, place, limits={"requests_per_minute": 5}) as here:
        ann, ben = here.token("ann", "read"), here.token("ben", "read")
        found = [here.client.get("/v1/queue", headers=ann) for _ in range(7)]
        assert [answer.status_code for answer in found] == [200] * 5 + [429] * 2
        assert 1 <= int(found[-1].headers["retry-after"]) <= 13
        assert found[-1].json()["error"]["type"] == "TooManyRequestsError"
        assert here.client.get("/v1/queue", headers=ben).status_code == 200
        # Whoever says no name is counted by address; a made-up token makes no bucket of its own.
        wrong = [here.client.get("/v1/queue", headers={"Authorization": f"Bearer lorot_{n}"}) for n in range(7)]
        assert [answer.status_code for answer in wrong] == [401] * 5 + [429] * 2
        assert {here.client.get("/healthz").status_code for _ in range(20)} == {200}


def test_every_answer_carries_what_keeps_a_browser_safe(here: Served) -> None:
    answers = [here.client.get(path) for path in ("/v1/jobs", "/v1/none", "/healthz", "/v1/openapi.json")]
    for answer in [*answers, here.client.get("/v1/jobs", headers={"Host": "evil.example"})]:
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "same-origin"
        assert answer.headers["cache-control"] == "no-store"
        assert "server" not in answer.headers


def test_a_request_has_one_id_from_the_client_to_the_logs(here: Served, told: io.StringIO) -> None:
    answer = here.client.post("/v1/jobs", json={"spec": spec()}, headers={"X-Request-ID": "build-77.a"})
    assert answer.headers["x-request-id"] == "build-77.a"
    assert json.loads(told.getvalue().splitlines()[-1])["request_id"] == "build-77.a"
    assert here.audited()[-1]["request_id"] == "build-77.a"
    for strange in ("a b", "x" * 65, 'a"b', "a;b", "ä".encode()):
        given = here.client.get("/v1/queue", headers={"X-Request-ID": strange}).headers["x-request-id"]
        assert re.fullmatch(r"[0-9a-f]{32}", given)


def test_the_access_log_says_who_asked_for_what_and_nothing_secret(here: Served, told: io.StringIO) -> None:
    secret = here.access.tokens.create("ann", "submit")
    ann = {"Authorization": f"Bearer {secret}"}
    body = {"spec": spec(environment={"A": "in-the-environment"}), "key": "k"}
    job = here.client.post("/v1/jobs", json=body, headers=ann).json()["id"]
    here.client.get("/v1/jobs", params={"name": "in-the-query"}, headers=ann)
    here.client.get(f"/v1/jobs/{job}/files/a%1b%22b", headers=ann)
    here.client.get("/v1/jobs", headers={"Authorization": "Bearer lorot_nearly-right", "Cookie": "lorot_session=abc"})
    lines = [json.loads(line) for line in told.getvalue().splitlines()]
    assert [(line["method"], line["path"], line["status"], line["who"]) for line in lines] == [
        ("POST", "/v1/jobs", 201, "ann"),
        ("GET", "/v1/jobs", 200, "ann"),
        ("GET", f'/v1/jobs/{job}/files/a\x1b"b', 404, "ann"),
        ("GET", "/v1/jobs", 401, ""),
    ]
    assert lines[0].keys() >= {"time", "level", "logger", "request_id", "took_ms", "bytes", "address"}
    everything = told.getvalue() + (here.settings.state / "audit.jsonl").read_text()
    for hidden in (secret, "nearly-right", "in-the-environment", "in-the-query", "lorot_session"):
        assert hidden not in everything


def test_the_audit_log_says_who_changed_what_and_who_was_refused(here: Served) -> None:
    ann, ben = here.token("ann", "submit"), here.token("ben", "submit")
    job = here.submit(ann)["id"]
    here.client.get(f"/v1/jobs/{job}", headers=ann)
    here.client.post(f"/v1/jobs/{job}/cancel", headers=ben)
    here.client.post(f"/v1/jobs/{job}/cancel", headers=ann)
    here.client.get("/v1/tokens", headers=ann)
    here.client.get("/v1/jobs", headers={"Authorization": "Bearer lorot_wrong"})
    # Nobody in particular, and a question.
    for _ in range(3):
        here.client.post("/v1/jobs", json={"spec": spec()})
        here.client.post("/v1/check", json={"spec": spec()}, headers=ann)
    found = [(line["who"], line["what"], line["job"], line["result"]) for line in here.audited()]
    assert found == [
        ("ann", "submit", job, 201),
        ("ben", "cancel", job, 403),
        ("ann", "cancel", job, 200),
        ("ann", "GET /v1/tokens", "", 403),
        ("", "GET /v1/jobs", "", 401),
    ]
    assert {line["address"] for line in here.audited()} == {"testclient"}
    assert stat.S_IMODE((here.settings.state / "audit.jsonl").stat().st_mode) == 0o600


def test_the_audit_log_is_rotated_and_loses_no_line_before_its_time(tmp_path: Path) -> None:
    audit = Audit(tmp_path / "audit.jsonl", 1000)
    threads = [threading.Thread(target=lambda: [audit.write(who="x" * 50) for _ in range(5)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    files = sorted(tmp_path.glob("audit.jsonl*"))
    assert len(files) > 1
    assert all(path.stat().st_size <= 1000 for path in files)
    assert sum(len(path.read_text().splitlines()) for path in files) == 20
    for _ in range(200):
        audit.write(who="y" * 50)
    assert len(list(tmp_path.glob("audit.jsonl.*"))) == KEPT
    assert all(json.loads(line)["who"] for line in (tmp_path / f"audit.jsonl.{KEPT}").read_text().splitlines())


def test_a_disk_that_takes_no_audit_log_stops_nothing_and_is_complained_of(here: Served, told: io.StringIO) -> None:
    (here.settings.state / "audit.jsonl").mkdir(parents=True)
    assert here.client.post("/v1/jobs", json={"spec": spec()}).status_code == 201
    assert "the audit log cannot be written" in told.getvalue()


def stepped(here: Served) -> None:
    """A round of the controller, and all that it has begun."""
    here.controller.step()
    wait(list(here.controller._busy.values()), 60)


def test_health_is_of_the_process_and_readiness_of_what_it_needs(here: Served) -> None:
    assert here.client.get("/healthz").json() == {"status": "alive"}
    stepped(here)
    assert here.client.get("/readyz").json() == {"status": "ready", "problems": {}}
    here.controller.problems["docker"] = "the engine is away"
    answer = here.client.get("/readyz")
    assert (answer.status_code, answer.json()["problems"]) == (200, {"docker": "the engine is away"})
    here.controller.problems["mlflow"] = "does not answer"
    answer = here.client.get("/readyz")
    assert (answer.status_code, answer.json()["problems"]["mlflow"]) == (503, "does not answer")
    assert "retry-after" in answer.headers
    assert here.client.get("/healthz").status_code == 200


@pytest.mark.parametrize("scope", ["read", "submit", "admin"])
def test_once_there_are_tokens_strangers_hear_which_part_is_away_and_not_where_it_is(here: Served, scope: str) -> None:
    stepped(here)
    known = here.token("ann", scope)
    secret = "MLflow at http://ann:word@10.0.0.7:5000 does not answer"
    strangers: list[dict[str, str]] = [{}, {"Authorization": "Bearer lorot_wrong"}, {"Authorization": "Basic x"}]
    for where, status, word in (("docker", 200, "ready"), ("mlflow", 503, "not ready")):
        here.controller.problems = {where: secret}
        for headers in strangers:
            answer = here.client.get("/readyz", headers=headers)
            said = answer.json()
            assert (answer.status_code, said["status"], list(said["problems"])) == (status, word, [where])
            assert "10.0.0.7" not in answer.text
            assert "retry-after" in answer.headers or status == 200
        assert here.client.get("/readyz", headers=known).json() == {"status": word, "problems": {where: secret}}
    here.access.tokens.revoke("ann")
    assert "10.0.0.7" not in here.client.get("/readyz", headers=known).text


def test_who_came_through_a_proxy_to_a_service_without_tokens_is_a_stranger_to_its_probe_too(here: Served) -> None:
    stepped(here)
    here.controller.problems["docker"] = "unix:///run/secret.sock does not answer"
    assert "secret.sock" in here.client.get("/readyz").text
    assert "secret.sock" not in here.client.get("/readyz", headers={"X-Forwarded-For": "10.1.1.1"}).text


def samples(text: str) -> dict[str, float]:
    """Prometheus' text format, by another program's rules: NAME{LABELS} VALUE."""
    rows = [line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, value in rows}


def test_prometheus_reads_the_queue_the_states_and_how_running_jobs_do(
    here: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def progress(job_id: str) -> dict[str, Any]:
        asked.append(job_id)
        return {"images_per_s": 1234.5, "data_wait_share": 0.25, "step": 3}

    running, failing = here.submit(name="fast")["id"], here.submit(name="bad")["id"]
    here.run(running)
    here.run(failing)
    here.end(failing, 1)
    waiting = here.submit(resources={"cpus": 99.5})["id"]
    stepped(here)
    monkeypatch.setattr(here.desk, "progress", progress)
    monkeypatch.setattr("service.api.meters.PROGRESS_S", 3600.0)
    found = samples(here.client.get("/metrics").text)
    assert found['lorot_jobs{state="running"}'] == 1
    assert found['lorot_jobs{state="failed"}'] == 1
    assert found["lorot_queue_length"] == 1
    assert found["lorot_running"] == 1
    assert found['lorot_submissions_total{backend="docker",kind="container"}'] == 3
    assert found['lorot_job_failures_total{backend="docker"}'] == 1
    label = f'{{job_id="{running}",job_name="fast"}}'
    assert found[f"lorot_job_images_per_second{label}"] == 1234.5
    assert found[f"lorot_job_data_wait_share{label}"] == 0.25
    assert found["lorot_controller_well"] == 1
    assert found["lorot_jobs_partial"] == 0
    assert found['lorot_request_seconds_count{method="POST",route="/v1/jobs",status="2xx"}'] == 3
    here.client.get("/metrics")
    assert asked == [running], "what a job says is asked once in a while"
    assert here.desk.get(waiting).state == "queued"


def test_prometheus_reads_how_long_rounds_take(here: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def read() -> tuple[float, float]:
        found = samples(here.client.get("/metrics").text)
        return found["lorot_controller_round_seconds_count"], found["lorot_controller_round_seconds_sum"]

    count, sum_s = read()
    began = time.monotonic()
    for _ in range(3):
        here.controller.step()
    monkeypatch.setattr(here.controller, "_round", lambda: 1 / 0)
    here.controller.step()
    took_s = time.monotonic() - began
    assert read()[0] == count + 4, "one that fails counts too"
    assert 0 < read()[1] - sum_s <= took_s


def test_made_up_methods_and_addresses_make_no_series(here: Served) -> None:
    for number in range(20):
        here.client.request(f"X{number}", f"/none/{number}")
        here.client.get(f"/v1/jobs/{number:06x}")
    text = here.client.get("/metrics").text
    assert 'method="other"' in text
    assert "X1" not in text
    assert "/none/" not in text
    assert text.count('lorot_request_seconds_count{method="GET",route="/v1/jobs/{job_id}"') == 1


def test_a_failure_is_counted_once_however_often_it_is_told(here: Served) -> None:
    job = here.run(here.submit()["id"])
    failed = here.end(job.id, 1)
    meters = here.app.state.meters
    for _ in range(3):
        meters.changed(failed)

    def count() -> float:
        return samples(meters.text().decode())['lorot_job_failures_total{backend="docker"}']

    assert count() == 1
    here.desk.retry(job.id)
    here.run(job.id)
    again: Job = here.end(job.id, 1)
    assert again.state == "failed"
    assert count() == 2


def test_who_is_not_known_fills_no_memory_with_bodies(place: str, tmp_path: Path) -> None:
    with served(tmp_path, place) as here:
        long = json.dumps({"spec": spec(environment={"A": "x" * 5000, "B": "x" * 8000, "C": "x" * 8000})}).encode()
        assert len(long) > guard.STRANGERS_BYTES
        kind = {"Content-Type": "application/json"}
        answer = here.client.post("/v1/jobs", content=long, headers=kind)
        assert answer.status_code == 201, "nobody has to say who they are"
        ann = here.token("ann", "submit")
        assert here.client.post("/v1/jobs", content=long, headers=ann | kind).status_code == 201
        # No JSON: who has read all of it says so.
        for content in (b"x" * 20_000, iter([b"x" * 10_000] * 2)):
            for headers in ({}, {"Authorization": "Bearer lorot_wrong"}, {"Cookie": "lorot_session=a|1|b|c"}):
                answer = here.client.post("/v1/jobs", content=content, headers=headers | kind)
                assert (answer.status_code, answer.json()["error"]["type"]) == (401, "UnauthorizedError")


def asked(here: Served, *head: tuple[bytes, bytes], receive: Receive) -> list[Message]:
    """What is sent to somebody unknown elsewhere, who sends a job so."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/jobs", "query_string": b"", "scheme": "http"}
    headers = [(b"host", b"localhost"), *head]
    asyncio.run(here.app(scope | {"client": ("10.0.0.9", 1), "headers": headers, "root_path": ""}, receive, send))
    return sent


def test_a_body_that_does_not_come_is_not_awaited_for_ever(here: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_S", 0.05)

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    sent = asked(here, (b"content-length", b"10"), receive=receive)
    assert sent[0]["status"] == 408
    assert json.loads(sent[1]["body"])["error"]["type"] == "SlowError"


def test_of_a_body_that_is_too_long_no_more_is_read(here: Served) -> None:
    here.token("ann", "submit")
    heard = 0

    async def receive() -> Message:
        nonlocal heard
        heard += 1
        return {"type": "http.request", "body": b"x" * 1000, "more_body": True}

    for head, most in (((b"transfer-encoding", b"chunked"), 6), ((b"content-length", b"1000000"), 0)):
        heard = 0
        sent = asked(here, head, (b"content-type", b"application/json"), receive=receive)
        assert (sent[0]["status"], heard) == (401, most)
