"""A job service that goes away and comes back, or is too busy, while a command waits or follows."""

import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest

from service.client import Client
from service.commands import submitting
from service.errors import BackendError, LorotError, TrackingError

JOB = "a" * 32
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


class Place:
    """A port where somebody listens only as long as there are answers to give."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self._listening = self._listen(0)
        self.port = self._listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def answer(self, *answers: bytes) -> None:
        """Give these, one for each request; then nobody listens there."""
        if self._listening.fileno() < 0:
            self._listening = self._listen(self.port)
        threading.Thread(target=self._serve, args=(self._listening, answers), daemon=True).start()

    def _listen(self, port: int) -> socket.socket:
        return socket.create_server(("127.0.0.1", port), reuse_port=False)

    def _serve(self, listening: socket.socket, answers: tuple[bytes, ...]) -> None:
        for number, answer in enumerate(answers, 1):
            connection, _ = listening.accept()
            with connection:
                raw = b""
                while b"\r\n\r\n" not in raw:
                    raw += connection.recv(65536)
                self.requests.append(raw.decode())
                # Before the answer has ended, lest the next request finds it still open.
                if number == len(answers):
                    listening.close()
                connection.sendall(answer)


def test_a_followed_log_outlives_a_restart_of_the_service() -> None:
    place = Place()
    place.answer(STREAM + b"id: 1:4\ndata: one\n\n")
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 7:
            away = b"HTTP/1.1 503 X\r\nRetry-After: 5\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            place.answer(away, STREAM + b"id: 1:8\ndata: two\n\nevent: end\ndata: {}\n\n")

    lines = list(Client(place.url, wait=wait).logs(JOB, follow=True))
    assert b"".join(lines) == b"one\ntwo\n"
    assert len(waits) == 8
    assert "last-event-id: 1:4" in place.requests[-1].lower()


def test_a_service_that_never_comes_back_is_waited_for_about_a_minute() -> None:
    place = Place()
    place.answer(STREAM + b"id: 1:4\ndata: one\n\n")
    waits: list[float] = []
    with pytest.raises(BackendError, match="no job service answers"):
        list(Client(place.url, wait=waits.append).logs(JOB, follow=True))
    assert 60 <= sum(waits) <= 70
    # One that was never there is told of at once.
    waits.clear()
    with pytest.raises(BackendError, match="no job service answers"):
        list(Client(place.url, wait=waits.append).logs(JOB, follow=True))
    assert waits == []


def test_a_connection_that_breaks_within_a_log_is_an_error_for_people() -> None:
    place = Place()
    place.answer(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 100\r\n\r\nhalf of")
    with pytest.raises(BackendError, match="broke within the log"):
        list(Client(place.url).logs(JOB))


@pytest.mark.parametrize("error", [TrackingError("MLflow is away"), BackendError("too often"), BackendError("refused")])
def test_waiting_for_a_job_goes_on_while_its_service_cannot_answer(
    error: LorotError, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submitting.time, "sleep", lambda seconds: None)
    answers: list[Callable[[], dict[str, Any]]] = [
        raising(error),
        raising(error),
        lambda: {"id": JOB, "state": "finished"},
    ]

    class Desk:
        def job(self, job_id: str) -> dict[str, Any]:
            return answers.pop(0)()

    ended = submitting.await_end(Desk(), {"id": JOB, "state": "running"}, say=lambda text: None)
    assert ended["state"] == "finished"


def test_too_many_requests_are_the_services_affair_and_no_bad_input() -> None:
    place = Place()
    body = b'{"error": {"type": "TooManyRequestsError", "message": "too often", "request_id": "r"}}'
    head = f"HTTP/1.1 429 X\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
    place.answer(head + body)
    with pytest.raises(BackendError, match="too often"):
        Client(place.url).job(JOB)


def raising(error: LorotError) -> Callable[[], dict[str, Any]]:
    def ask() -> dict[str, Any]:
        raise error

    return ask
