"""The API under requests that nobody would write, made from its own OpenAPI description by schemathesis.

What is tried, on a real server with a real record and a token of scope admin. The requests are the same in every run;
LOROT_FUZZ_SEED=NUMBER draws others, and LOROT_FUZZ_TIMES=NUMBER so many times more:
- every operation of the description but the endless streams (/v1/events, and `follow` of the logs), with values that
  its description allows, most of them about jobs that exist, and with values that it forbids: wrong types, patterns,
  lengths, ranges, unknown and missing keys, empty and repeated parameters, in path, query, headers and body;
- after each request: no 5xx; a status, content type, headers and body that the description has for it; what is
  forbidden is refused; a method that is not there gets a 405 with Allow; and the same request without the token, or
  with a wrong one, is refused;
- bodies of arbitrary bytes and of JSON that is cut, doubled or nested at random places, as any content type; and
  headers of arbitrary bytes (Authorization, Cookie, Idempotency-Key, Last-Event-ID, X-Request-ID, X-CSRF-Token,
  Origin): no 5xx, nobody is let in, and every refusal has the one shape that errors have;
- the streams, of jobs that wait, run and have ended, with any parameters and Last-Event-ID: no 5xx, what comes first is
  server-sent events (no more is read), and each gives its place back when its reader goes away.
"""

import contextlib
import copy
import http.client
import json
import os
import re
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from service import store
from service.api import questions
from tests.integration.processes import await_
from tests.service.api_shelf import Served, served, spec
from tests.service.listening import listening

pytestmark = pytest.mark.integration

CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
    checks.allow_header_conformance,
    checks.ignored_auth,
]
SEED = os.environ.get("LOROT_FUZZ_SEED")
TIMES = int(os.environ.get("LOROT_FUZZ_TIMES", "1"))
EXAMPLES = 12
QUIET = {
    "deadline": None,
    "database": None,
    "derandomize": SEED is None,
    "suppress_health_check": list(HealthCheck),
    "phases": (Phase.explicit, Phase.generate),
}
STREAM = "text/event-stream"
# Of a stream, what is read: to here, or until nothing comes for so long.
MOST_BYTES = 65536
PAUSE_S = 0.05
EVENTS = re.compile(rb"((:|(id|event|data): ).*\n|\n)*")
VALID = json.dumps({"spec": spec(environment={"A": "b"}), "key": "k"}).encode()


@dataclass
class Target:
    """A server, what it says of itself, a token that may do everything, and some jobs that it knows."""

    service: Served
    url: str
    description: dict[str, Any]
    head: dict[str, str]
    jobs: list[str]


def examples(number: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """So many requests, drawn as the environment says."""

    def drawn(test: Callable[..., None]) -> Callable[..., None]:
        test = settings(max_examples=number * TIMES, **QUIET)(test)  # type: ignore[arg-type]
        return test if SEED is None else seed(int(SEED))(test)

    return drawn


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    folder = tmp_path_factory.mktemp("fuzz")
    uri = f"sqlite:///{folder}/mlflow.db"
    store.ensure_ready(uri)
    limits = {"requests_per_minute": 10_000_000, "failures_per_minute": 10_000_000}
    with pytest.MonkeyPatch.context() as patch, served(folder, uri, limits=limits) as service:
        # On a busy machine MLflow may need longer than a page waits: that is a 503, which is rightly no 2xx.
        patch.setattr(questions, "within", lambda timeout_s, question: question())
        jobs = [service.submit(name=f"n{number}")["id"] for number in range(4)]
        ended = service.run(jobs[0])
        service.shelves["docker"].write(ended.attempts[0].name, b"line\n\xff\r\n")
        service.end(ended.id)
        running = service.run(jobs[1])
        service.shelves["docker"].write(running.attempts[0].name, b"one\ntwo\n\xff\r\nhalf a li")
        description = copy.deepcopy(service.app.openapi())
        del description["paths"]["/v1/events"]
        logs = description["paths"]["/v1/jobs/{job_id}/logs"]["get"]
        logs["parameters"] = [one for one in logs["parameters"] if one["name"] != "follow"]
        with listening(service.app) as url:
            yield Target(service, url, description, service.token("root", "admin"), jobs)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["allowed", "forbidden"])
def test_the_service_keeps_to_its_description_whatever_is_asked(target: Target, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_dict(target.description)
    tried: dict[str, int] = {}
    for found in schema.get_all_operations():
        operation = found.ok()
        known = [None, *target.jobs] if mode is GenerationMode.POSITIVE else [None]

        @given(case=operation.as_strategy(generation_mode=mode), job=st.sampled_from(known))
        @examples(EXAMPLES)
        def ask(case: Any, job: str | None) -> None:
            if job is not None and "job_id" in (case.path_parameters or {}):
                case.path_parameters["job_id"] = job
            tried[case.operation.label] = tried.get(case.operation.label, 0) + 1
            case.call_and_validate(base_url=target.url, headers=target.head, checks=CHECKS, timeout=120)

        if mode is GenerationMode.POSITIVE or _takes_anything(operation):
            ask()
    assert len(tried) >= (20 if mode is GenerationMode.POSITIVE else 12), tried
    print(sum(tried.values()), "requests", tried)


def _takes_anything(operation: Any) -> bool:
    """Whether there is something in it that could be wrong."""
    return bool(list(operation.iter_parameters()) or operation.body)


def ask(target: Target, method: str, path: str, body: bytes, head: dict[str, bytes]) -> tuple[int, bytes, str]:
    """Status, body and content type of an answer to a request that is sent as it is; of a stream, how it begins."""
    for _ in range(5):
        # Who refuses a request by its headers closes before the body has come, and the answer may be lost with that.
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            return ask_once(target, method, path, body, head)
    return ask_once(target, method, path, body, head)


def ask_once(target: Target, method: str, path: str, body: bytes, head: dict[str, bytes]) -> tuple[int, bytes, str]:
    host, port = target.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=120)
    try:
        connection.putrequest(method, path, skip_accept_encoding=True)
        for name, value in ({"Content-Length": str(len(body)).encode()} | head).items():
            connection.putheader(name, value)
        connection.endheaders(body)
        place = connection.sock
        answer = connection.getresponse()
        kind = answer.headers.get("content-type", "")
        return answer.status, beginning(answer, place) if kind.startswith(STREAM) else answer.read(), kind
    finally:
        connection.close()


def beginning(answer: http.client.HTTPResponse, place: socket.socket) -> bytes:
    """What has come of a stream before it paused."""
    place.settimeout(PAUSE_S)
    found = b""
    with contextlib.suppress(TimeoutError):
        while len(found) < MOST_BYTES and (more := answer.read1(MOST_BYTES)):
            found += more
    return found


def is_told_well(status: int, body: bytes, kind: str) -> bool:
    """Whether a refusal has the shape of all errors; 400 is also uvicorn's own word for what is no HTTP."""
    if status < 400 or (status == 400 and kind.startswith("text/plain")):
        return True
    error = json.loads(body)["error"]
    return error.keys() == {"type", "message", "request_id"} and bool(error["message"])


@st.composite
def torn(draw: st.DrawFn) -> bytes:
    """A valid body with a piece cut out, doubled, or put somewhere else."""
    start, end = sorted(draw(st.tuples(*[st.integers(0, len(VALID))] * 2)))
    at = draw(st.integers(0, len(VALID)))
    times = draw(st.sampled_from([0, 2, 500]))
    return VALID[:at] + VALID[start:end] * times + VALID[at:]


def test_bodies_of_any_bytes_are_refused_in_the_one_shape_of_errors(target: Target) -> None:
    nested = st.integers(1, 40_000).map(
        lambda depth: b'{"spec":{"config":' + b'{"a":' * depth + b"1" + b"}" * depth + b"}}"
    )
    bodies = st.one_of(st.binary(max_size=300), torn(), nested, st.just(VALID))
    kinds = st.sampled_from([b"application/json", b"text/plain", b"application/json; charset=utf-16", b"", b"\xff"])
    paths = st.sampled_from(["/v1/jobs", "/v1/check", "/v1/tokens"])

    @given(body=bodies, kind=kinds, path=paths)
    @examples(250)
    def send(body: bytes, kind: bytes, path: str) -> None:
        head = {name: value.encode() for name, value in target.head.items()} | {"Content-Type": kind}
        status, answer, told = ask(target, "POST", path, body, head)
        assert status < 500, answer
        assert is_told_well(status, answer, told)

    send()


def test_headers_of_any_bytes_break_nothing_and_let_nobody_in(target: Target) -> None:
    # What may stand in a header at all; the rest is the server's own to refuse.
    values = st.binary(max_size=80).map(lambda raw: re.sub(rb"[\r\n\0]", b"", raw).strip())
    names = st.sampled_from(
        ["Authorization", "Cookie", "Idempotency-Key", "Last-Event-ID", "X-Request-ID", "X-CSRF-Token", "Origin"]
    )
    cookies = values.map(lambda raw: b"lorot_session=" + raw)
    bearers = values.map(lambda raw: b"Bearer lorot_" + raw)
    places = st.sampled_from([("GET", "/v1/jobs"), ("GET", f"/v1/jobs/{target.jobs[0]}/logs"), ("POST", "/v1/jobs")])

    @given(place=places, heads=st.dictionaries(names, st.one_of(values, cookies, bearers), max_size=4))
    @examples(250)
    def send(place: tuple[str, str], heads: dict[str, bytes]) -> None:
        status, answer, told = ask(target, *place, VALID if place[0] == "POST" else b"", {**heads})
        assert status in (400, 401), answer
        assert is_told_well(status, answer, told)

    send()


def test_streams_begin_as_streams_do_and_give_their_places_back(target: Target) -> None:
    jobs = [f"/v1/jobs/{job}/logs" for job in (*target.jobs[:3], target.jobs[0][:8], "none")]
    numbers = st.one_of(st.integers(-1, 3), st.integers(), st.text(max_size=5))
    texts = st.one_of(st.booleans(), st.text(max_size=5))
    optional = {"attempt": numbers, "node": numbers, "tail": numbers}
    parameters = st.fixed_dictionaries({"follow": st.one_of(st.just("true"), texts)}, optional=optional)
    offsets = st.from_regex(rb"[0-9]{1,3}(:[0-9]{1,20})?(@[a-z0-9]{1,8})?", fullmatch=True)
    garbage = st.binary(max_size=90).map(lambda raw: re.sub(rb"[\r\n\0]", b"", raw).strip())
    begun = []

    @given(
        path=st.sampled_from(["/v1/events", *jobs]), asked=parameters, last=st.one_of(st.just(b""), offsets, garbage)
    )
    @examples(100)
    def follow(path: str, asked: dict[str, Any], last: bytes) -> None:
        head = {name: value.encode() for name, value in target.head.items()} | {"Last-Event-ID": last}
        status, answer, kind = ask(target, "GET", f"{path}?{urlencode(asked)}", b"", head)
        assert status < 500, answer
        assert is_told_well(status, answer, kind)
        if kind.startswith(STREAM):
            begun.append(answer)
            # A line that is cut is one that goes on.
            assert EVENTS.fullmatch(answer[: answer.rfind(b"\n") + 1]), answer

    follow()
    assert len([answer for answer in begun if b"data: " in answer]) > 10, begun
    meters = target.service.app.state.meters
    await_(lambda: meters.streams == 0, "all places are given back", 60, lambda: str(meters.streams))
