"""An MLflow or a backend that hangs: what needs it is told so soon, and everything else goes on."""

import threading
import time
from collections.abc import Callable, Iterator, Sized
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest

from service import registry
from service.api import model_routes, questions
from service.api.questions import Questions
from service.console import pages
from service.errors import TrackingError
from service.jobs import history, runs
from tests.service.api_shelf import Served, served


@pytest.fixture
def here(place: str, tmp_path: Path) -> Iterator[Served]:
    with served(tmp_path, place) as service:
        pages.mount(service.app)
        yield service


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """MLflow's registry and histories give no answer while the test runs; who has asked."""
    ended, asked = threading.Event(), []

    def hang(*arguments: object) -> list[object]:
        asked.append(str(arguments[-1]))
        ended.wait(150)
        return []

    monkeypatch.setattr(registry, "list_models", hang)
    monkeypatch.setattr(history, "_recorded", hang)
    monkeypatch.setattr(questions, "SHORT_S", 0.5)
    monkeypatch.setattr(model_routes, "LONG_S", 0.5)
    yield asked
    ended.set()


def await_all_threads(asking: Sized) -> None:
    """Until as many questions hang as there are threads for them."""
    deadline = time.monotonic() + 60
    while len(asking) < 8:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_list_that_has_to_be_read_first_stops_no_other_route(here: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, over, real = threading.Event(), threading.Event(), runs.open_ones

    def slow(uri: str) -> list[runs.Found]:
        begun.set()
        over.wait(120)
        return real(uri)

    job = here.submit()
    monkeypatch.setattr(runs, "open_ones", slow)
    here.desk.record._has_open = here.desk.record._has_all = False
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(here.client.get, "/v1/jobs")
        try:
            assert begun.wait(60)
            assert here.client.get("/healthz").status_code == 200
            assert not asked.done()
        finally:
            over.set()
        assert [found["id"] for found in asked.result().json()["jobs"]] == [job["id"]]


def test_more_questions_to_a_hanging_mlflow_than_there_are_threads_stop_no_other_route(
    here: Served, hanging: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()

    def within(timeout_s: float, ask: Callable[[], object]) -> NoReturn:
        # The time is over when this test has looked at everything else.
        threading.Thread(target=ask, daemon=True).start()
        over.wait(120)
        raise TimeoutError

    monkeypatch.setattr(questions, "store", SimpleNamespace(within=within))
    monkeypatch.setattr(questions, "_FRESH_S", 3600.0)
    job = here.submit()
    with ThreadPoolExecutor(60) as pool:
        asked = [pool.submit(here.client.get, "/v1/models") for _ in range(60)]
        try:
            await_all_threads(hanging)
            # Answered while all of them still wait.
            assert here.client.get("/v1/jobs").status_code == 200
            assert here.client.get(f"/v1/jobs/{job['id']}").status_code == 200
            assert here.client.get("/").status_code == 200
            assert not any(answer.done() for answer in asked)
        finally:
            over.set()
        assert {answer.result().status_code for answer in asked} == {503}
    assert len(hanging) == 8


def test_a_job_without_records_is_shown_while_mlflow_hangs_and_it_is_asked_once(
    here: Served, hanging: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(questions, "_FRESH_S", 3600.0)
    job = here.run(here.submit()["id"])
    here.app.state.questions.ask = patient(here.app.state.questions)
    for _ in range(3):
        assert here.client.get(f"/jobs/{job.id}").status_code == 200
    answer = here.client.get(f"/v1/jobs/{job.id}/metrics")
    assert answer.status_code == 503
    assert "has not answered" in answer.json()["error"]["message"]
    assert hanging == [job.id]


def patient(asked: Questions) -> object:
    """`ask` with half a second for every question."""
    ask = asked.ask
    return lambda key, question, timeout_s=0.5: ask(key, question, 0.5)


def test_empty_histories_and_failures_are_remembered_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions, "_FRESH_S", 3600.0)
    asked: list[str] = []

    def empty() -> list[float]:
        asked.append("empty")
        return []

    def failing() -> list[float]:
        asked.append("failing")
        raise TrackingError("refuses")

    kept = Questions()
    for _ in range(3):
        assert kept.ask("a", empty) == []
        with pytest.raises(TrackingError, match="refuses"):
            kept.ask("b", failing)
    assert asked == ["empty", "failing"]
    monkeypatch.setattr(questions, "_FRESH_S", -1.0)
    fresh = Questions()
    for _ in range(2):
        fresh.ask("a", empty)
    assert asked == ["empty", "failing", "empty", "empty"]


def test_a_backend_that_hangs_leaves_the_other_routes_alone(here: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    job, ended, begun = here.run(here.submit()["id"]), threading.Event(), []

    def hang(*_: object, **__: object) -> Iterator[bytes]:
        begun.append(1)
        ended.wait(150)
        yield b"late\n"

    monkeypatch.setattr(here.shelves["docker"], "logs", hang)
    with ThreadPoolExecutor(60) as pool:
        asked = [pool.submit(here.client.get, f"/v1/jobs/{job.id}/logs") for _ in range(60)]
        try:
            await_all_threads(begun)
            assert here.client.get("/v1/jobs").status_code == 200
        finally:
            ended.set()
        assert {answer.result().content for answer in asked} == {b"late\n"}
