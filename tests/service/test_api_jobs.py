"""The routes of jobs: hand in, list, show, stop, repeat; and what every refusal looks like."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.api import faults
from service.errors import BackendError, ConfigError, StateError, TrackingError, UnknownJobError
from service.jobs import orders
from tests.service.api_shelf import Served, served, spec
from tests.service.job_specs import CONFIG


@pytest.fixture
def here(place: str, tmp_path: Path) -> Iterator[Served]:
    with served(tmp_path, place) as service:
        yield service


def refusal(answer: Any, status: int, kind: str) -> str:
    """The message of an error, which has the one shape that all have."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"type", "message", "request_id"}
    assert body["error"]["type"] == kind
    assert body["error"]["request_id"] == answer.headers["x-request-id"]
    return str(body["error"]["message"])


def test_a_submitted_job_is_queued_shown_and_listed(here: Served) -> None:
    answer = here.client.post("/v1/jobs", json={"spec": spec(name="first", priority=3)})
    assert answer.status_code == 201
    job = answer.json()
    assert (job["state"], job["owner"], job["name"], job["spec"]["priority"]) == ("queued", "local", "first", 3)
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    shown = here.client.get(f"/v1/jobs/{job['id'][:8]}").json()
    assert shown["id"] == job["id"]
    assert shown["progress"] == {"position": 1}
    assert [one["id"] for one in here.client.get("/v1/jobs").json()["jobs"]] == [job["id"]]
    # And it is a run of MLflow, which another desk finds.
    assert here.desk.record.get(job["id"]).spec.name == "first"


def test_a_job_tells_the_configuration_that_it_was_resolved_to(here: Served) -> None:
    training = {"kind": "train", "config": CONFIG}
    job = here.client.post("/v1/jobs", json={"spec": training}).json()
    config = here.client.get(f"/v1/jobs/{job['id'][:8]}/config").json()["config"]
    assert config == here.client.post("/v1/check", json={"spec": training}).json()["config"]
    assert config["optimizer"]["momentum"] == 0.9
    assert "no job" in refusal(here.client.get(f"/v1/jobs/{'0' * 32}/config"), 404, "UnknownJobError")


def test_the_same_key_makes_one_job_however_it_is_sent(here: Served) -> None:
    first = here.client.post("/v1/jobs", json={"spec": spec(), "key": "k-1"})
    again = here.client.post("/v1/jobs", json={"spec": spec()}, headers={"Idempotency-Key": "k-1"})
    both = here.client.post("/v1/jobs", json={"spec": spec(), "key": "k-1"}, headers={"Idempotency-Key": "k-1"})
    assert [first.status_code, again.status_code, both.status_code] == [201, 200, 200]
    assert first.json()["id"] == again.json()["id"] == both.json()["id"]
    other = here.client.post("/v1/jobs", json={"spec": spec(name="other"), "key": "k-1"})
    assert "another one" in refusal(other, 409, "StateError")
    torn = here.client.post("/v1/jobs", json={"spec": spec(), "key": "k-1"}, headers={"Idempotency-Key": "k-2"})
    assert "give it once" in refusal(torn, 400, "ConfigError")
    assert here.client.get("/v1/jobs").json()["total"] == 1


def test_a_key_is_its_owners_own(here: Served) -> None:
    ann, ben = here.token("ann", "submit"), here.token("ben", "submit")
    jobs = [
        here.client.post("/v1/jobs", json={"spec": spec(), "key": "nightly"}, headers=who).json() for who in (ann, ben)
    ]
    assert [job["owner"] for job in jobs] == ["ann", "ben"]
    assert jobs[0]["id"] != jobs[1]["id"]


def test_lists_are_narrowed_and_come_in_pages_the_newest_first(here: Served) -> None:
    ids = [here.submit(name=f"job-{number}")["id"] for number in range(5)][::-1]
    first = here.client.get("/v1/jobs", params={"limit": 2}).json()
    second = here.client.get("/v1/jobs", params={"limit": 2, "cursor": first["next"]}).json()
    third = here.client.get("/v1/jobs", params={"limit": 2, "cursor": second["next"]}).json()
    assert [job["id"] for page in (first, second, third) for job in page["jobs"]] == ids
    assert (third["next"], first["total"]) == (None, 5)
    here.client.post(f"/v1/jobs/{ids[0]}/cancel")
    assert [job["id"] for job in here.client.get("/v1/jobs", params={"state": "killed"}).json()["jobs"]] == [ids[0]]
    assert here.client.get("/v1/jobs", params={"name": "job-3", "kind": "container"}).json()["total"] == 1
    assert here.client.get("/v1/jobs", params={"backend": "local"}).json()["total"] == 0
    assert "cursor" in refusal(here.client.get("/v1/jobs", params={"cursor": "x"}), 400, "ConfigError")


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("/v1/jobs?status=failed", "status: unknown parameter; did you mean 'state'?"),
        ("/v1/jobs?zzz=1", "zzz: unknown parameter; known here: state, kind, backend, owner, name, limit, cursor"),
        ("/v1/jobs?state=failed&state=killed", "state: is given several times; give it once"),
        ("/v1/queue?limit=3", "limit: unknown parameter; this address takes none"),
        ("/v1/jobs/{id}/logs?lines=3", "lines: unknown parameter; known here: attempt, node, tail, follow"),
        ("/v1/jobs/{id}/files/config.yaml?attempt=1", "attempt: unknown parameter"),
    ],
)
def test_a_parameter_that_an_address_does_not_know_is_not_passed_over(here: Served, address: str, told: str) -> None:
    job = here.submit()
    assert told in refusal(here.client.get(address.format(id=job["id"])), 400, "ConfigError")
    assert here.client.get("/v1/jobs/compare", params={"id": [job["id"], job["id"]]}).status_code == 200


def test_a_job_is_stopped_once_and_repeated_from_its_start_or_its_checkpoint(here: Served) -> None:
    job = here.run(here.submit()["id"])
    stopping = here.client.post(f"/v1/jobs/{job.id}/cancel").json()
    assert stopping["cancel"] is True
    assert here.client.post(f"/v1/jobs/{job.id}/cancel").status_code == 200
    here.step_until(lambda: here.desk.get(job.id).state == "killed", job.id)
    assert here.client.post(f"/v1/jobs/{job.id}/cancel").json()["state"] == "killed"
    again = here.client.post(f"/v1/jobs/{job.id}/retry").json()
    assert (again["state"], again["cancel"], here.desk.get(job.id).resume) == ("queued", False, False)
    assert "retry" in refusal(here.client.post(f"/v1/jobs/{job.id}/retry"), 409, "StateError")
    here.run(job.id)
    here.end(job.id, 1)
    assert here.desk.get(job.id).state == "failed"
    assert here.client.post(f"/v1/jobs/{job.id}/resume").json()["state"] == "queued"
    assert here.desk.get(job.id).resume is True
    here.run(job.id)
    here.end(job.id, 0)
    refusal(here.client.post(f"/v1/jobs/{job.id}/cancel"), 409, "StateError")


def test_jobs_are_compared(here: Served) -> None:
    ids = [here.submit(name=f"n{number}", priority=number)["id"] for number in range(2)]
    answer = here.client.get("/v1/jobs/compare", params={"id": ids})
    assert answer.json()["jobs"] == ids
    assert "id" in refusal(here.client.get("/v1/jobs/compare", params={"id": ids[0]}), 422, "ConfigError")


def test_files_are_those_of_the_list_and_cannot_run_in_a_browser(here: Served) -> None:
    job = here.submit()
    folder = orders.folder_of(here.settings, job["id"])
    (folder / "run").mkdir(parents=True)
    (folder / "run" / "samples.png").write_bytes(b"\x89PNG picture")
    (folder / "run" / "secret.key").write_text("hidden")
    listed = here.client.get(f"/v1/jobs/{job['id']}/files").json()["files"]
    assert {"name": "samples.png", "bytes": 12} in listed
    got = here.client.get(f"/v1/jobs/{job['id']}/files/samples.png")
    assert (got.content, got.headers["content-type"]) == (b"\x89PNG picture", "image/png")
    assert got.headers["content-security-policy"].startswith("sandbox; default-src 'none'")
    assert got.headers["x-content-type-options"] == "nosniff"
    for name in ("secret.key", "../state/tokens.json", "..%2F..%2Fstate%2Faudit.jsonl", "%2Fetc%2Fpasswd", "nothing"):
        answer = here.client.get(f"/v1/jobs/{job['id']}/files/{name}")
        assert answer.status_code == 404, name
        assert "hidden" not in answer.text


def test_metrics_that_are_no_numbers_become_null(here: Served) -> None:
    job = here.submit()
    folder = orders.folder_of(here.settings, job["id"]) / "run"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 1, "train/loss": NaN}\n{"step": 2, "train/loss": 0.5}\n')
    found = here.client.get(f"/v1/jobs/{job['id']}/metrics").json()["metrics"]
    assert [(one["step"], one["train/loss"]) for one in found] == [(1, None), (2, 0.5)]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"spec": spec(nam="x")}, "spec.nam: unknown key; did you mean 'spec.name'?"),
        ({"spec": spec(resources={"gpu": 1})}, "spec.resources.gpu: unknown key; did you mean 'spec.resources.gpus'?"),
        ({"spec": spec(gpus=1)}, "spec.gpus: unknown key; did you mean 'spec.resources.gpus'?"),
        (
            {"spec": spec(name="my job")},
            "spec.name: write up to 63 letters, digits, '.', '_' and '-', a letter or digit",
        ),
        ({"spec": spec(priority="high")}, "spec.priority: Input should be a valid integer"),
        ({"spec": spec(priority=101)}, "spec.priority: Input should be less than or equal to 100 (given: 101)"),
        ({"spec": spec(command=[])}, "spec: command: a container needs one"),
        ({"spec": spec(environment={"LOROT_RUN_ID": "1"})}, "is set by the service"),
        ({"spec": spec(environment={"1A": "x"})}, "spec.environment.1A: "),
        ({"specs": spec()}, "spec: is missing"),
        ({"spec": spec(), "key": "two words"}, "key: String should match pattern"),
        ({"spec": spec(config={"a": [[[[1]]]]}, kind="train", command=[], backend="local", nodes="0")}, "fewest"),
    ],
)
def test_a_wrong_field_is_named_with_what_would_work(here: Served, body: dict[str, Any], told: str) -> None:
    assert told in refusal(here.client.post("/v1/jobs", json=body), 422, "ConfigError")
    assert here.client.get("/v1/jobs").json()["total"] == 0


@pytest.mark.parametrize(
    ("raw", "status", "told"),
    [
        (b"{", 422, "no JSON"),
        (b"", 422, "the body is missing"),
        (b"null", 422, "the body"),
        (b"[]", 422, "the body"),
        (b'{"spec": {"name": NaN}}', 422, "no number of JSON"),
        (b'{"spec": {"config": {"a": 1e999}}}', 422, "no number of JSON"),
        (b'{"spec": {"config": {"a": "\\ud800"}}}', 422, "surrogate"),
        (b'{"spec": {"config": {"a": "x\\u0000"}}}', 422, "NUL"),
        (b'{"spec": {"config": {"\\u0000": 1}}}', 422, "NUL"),
        (b'{"spec": {"config": {"a": 99999999999999999999999}}}', 422, "64 bits"),
        (b'{"spec": {"config": {"a": ' + b"[" * 100 + b"]" * 100 + b"}}}", 422, "deep"),
        (b'{"spec": {"config": {"a": ' + b"[" * 50_000 + b"]" * 50_000 + b"}}}", 400, "JSON"),
        (b'{"spec": {"config": {"a": ' + b"9" * 10_000 + b"}}}", 400, "JSON"),
        (b'{"spec": "\xff\xfe"}', 400, "UTF-8"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_it_is(here: Served, raw: bytes, status: int, told: str) -> None:
    answer = here.client.post("/v1/jobs", content=raw, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    assert told in answer.json()["error"]["message"]


def test_a_form_of_another_page_is_no_json(here: Served) -> None:
    body = b'{"spec": {"kind": "container", "backend": "docker", "command": ["true"]}}'
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        answer = here.client.post("/v1/jobs", content=body, headers={"Content-Type": kind})
        assert "with the header Content-Type: application/json" in refusal(answer, 422, "ConfigError")
    assert here.client.get("/v1/jobs").json()["total"] == 0


def test_unknown_addresses_and_methods_are_answered_in_the_same_shape(here: Served) -> None:
    message = refusal(here.client.get("/v1/job"), 404, "NotFoundError")
    assert "did you mean '/v1/jobs'?" in message
    answer = here.client.put("/v1/jobs")
    assert "takes GET, POST, not PUT" in refusal(answer, 405, "MethodNotAllowedError")
    assert answer.headers["allow"] == "GET, POST"
    assert "no job" in refusal(here.client.get("/v1/jobs/0123456789ab"), 404, "UnknownJobError")
    refusal(here.client.get("/v1/models/none"), 404, "UnknownJobError")
    refusal(here.client.get("/v1/jobs", params={"limit": "many"}), 422, "ConfigError")


@pytest.mark.parametrize(
    ("error", "status", "waits"),
    [
        (ConfigError("a"), 400, False),
        (UnknownJobError("a"), 404, False),
        (StateError("a"), 409, False),
        (TrackingError("a"), 503, True),
        (BackendError("a"), 503, True),
    ],
)
def test_each_error_has_its_status(
    here: Served, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int, waits: bool
) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(here.desk, "page", fail)
    answer = here.client.get("/v1/jobs")
    assert refusal(answer, status, type(error).__name__) == "a"
    assert ("retry-after" in answer.headers) is waits


def test_an_unexpected_failure_tells_a_client_nothing_of_the_inside(
    here: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(**_: object) -> None:
        raise KeyError("/inner/path")

    monkeypatch.setattr(here.desk, "page", fail)
    answer = here.client.get("/v1/jobs")
    message = refusal(answer, 500, "InternalError")
    assert "KeyError" in message
    assert "/inner/path" not in answer.text
    assert "/inner/path" in caplog.text


def test_every_error_has_a_status_and_subclasses_stand_before_their_bases() -> None:
    kinds = [kind for kind, _ in faults.STATUSES]
    for number, kind in enumerate(kinds):
        assert not any(issubclass(later, kind) for later in kinds[number + 1 :]), kind


def test_the_log_is_text_whole_or_its_last_lines(here: Served) -> None:
    waiting = here.submit()
    assert here.client.get(f"/v1/jobs/{waiting['id']}/logs").content == b""
    job = here.run(waiting["id"])
    assert job.attempt is not None
    here.shelves["docker"].write(job.attempt.name, b"one\ntwo \xff\nthree\n")
    answer = here.client.get(f"/v1/jobs/{job.id}/logs")
    assert answer.content == b"one\ntwo \xff\nthree\n"
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert here.client.get(f"/v1/jobs/{job.id}/logs", params={"tail": 1}).content == b"three\n"
    refusal(here.client.get(f"/v1/jobs/{job.id}/logs", params={"attempt": 7}), 404, "UnknownJobError")
    refusal(here.client.get(f"/v1/jobs/{job.id}/logs", params={"node": 1}), 404, "UnknownJobError")


def test_a_check_submits_nothing_and_resolves_all_defaults(here: Served, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    config = {"data": {"name": "demo", "root": "data/demo"}, "model": {"name": "resnet_small"}}
    wanted = {"kind": "train", "config": config}
    answer = here.client.post("/v1/check", json={"spec": wanted})
    assert answer.status_code == 200, answer.text
    assert answer.json()["config"]["optimizer"]["name"] == "sgd"
    config["optimiser"] = {"lr": 0.1}
    assert "did you mean 'optimizer'?" in refusal(
        here.client.post("/v1/check", json={"spec": wanted}), 400, "ConfigError"
    )
    outside = {"kind": "train", "config": {"data": {"name": "demo", "root": "/etc"}}}
    assert "/etc" in refusal(here.client.post("/v1/check", json={"spec": outside}), 400, "ConfigError")
    assert here.client.get("/v1/jobs").json()["total"] == 0


def test_whoever_may_read_is_told_what_a_job_would_be_in_the_cluster_and_no_secrets(place: str, tmp_path: Path) -> None:
    there = {"enabled": True, "namespace": "theirs", "kubeconfig": str(tmp_path / "absent")}
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "store").write_text("hunter2")
    more: dict[str, Any] = {"backends": {"kubernetes": there}, "worker_tracking_uri": "http://mlflow:5000"}
    with served(tmp_path, place, secrets=tmp_path / "secrets", **more) as here:
        reader = here.token("ann", "read")
        wanted = spec(backend="kubernetes", secrets={"KEY": "store"})

        def ask(wanted: dict[str, Any], form: str | None) -> Any:
            return here.client.post("/v1/check", json={"spec": wanted, "manifests": form}, headers=reader)

        assert ask(wanted, None).json()["manifests"] is None
        for form, kind in (("objects", "Job"), ("trainjob", "TrainJob")):
            answer = ask(wanted, form)
            assert answer.status_code == 200, answer.text
            (document,) = answer.json()["manifests"]
            assert (document["kind"], document["metadata"]["namespace"]) == (kind, "theirs")
            assert "hunter2" not in answer.text
        told = refusal(ask(spec(backend="docker"), "objects"), 400, "ConfigError")
        assert told == "manifests: a docker job has none; those of backend kubernetes have"
        refusal(ask(wanted, "helm"), 422, "ConfigError")
        refusal(ask({**wanted, "nodes": "2"}, "objects"), 400, "ConfigError")
        assert here.desk.record.jobs() == []


def test_the_queue_says_whose_turn_it_is(here: Served) -> None:
    low, high = here.submit()["id"], here.submit(priority=9)["id"]
    found = here.client.get("/v1/queue").json()
    assert found["waiting"] == [high, low]
    assert found["cpus"] == {"all": 100.0, "used": 0.0}
    here.run(high)
    assert high in here.client.get("/v1/queue").json()["running"]


def test_the_description_has_an_id_a_summary_and_its_errors_for_every_operation(here: Served) -> None:
    content = here.client.get("/v1/openapi.json").json()
    operations = [operation for path in content["paths"].values() for operation in path.values()]
    ids = [operation["operationId"] for operation in operations]
    assert len(set(ids)) == len(ids) >= 20
    for operation in operations:
        assert operation["summary"]
        assert operation["description"]
        assert operation["tags"]
        assert re.fullmatch(r"[a-z]+[A-Za-z]+", operation["operationId"])
    assert "FaultShape" in content["components"]["schemas"]
    assert "HTTPValidationError" not in content["components"]["schemas"]
    assert "HTTPValidationError" not in str(content["paths"])
