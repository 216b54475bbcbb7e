"""A whole job service in this process: a real desk on SQLite, the API, and a backend that keeps its jobs on a shelf."""

import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.testclient import TestClient

from service.api import app as application
from service.api.access import Access
from service.jobs import orders
from service.jobs.backends import Handle, Order, Status
from service.jobs.controller import Controller
from service.jobs.desk import Desk
from service.jobs.job import Job
from service.jobs.places import PlaceLostError
from service.jobs.settings import ServiceSettings

LOCAL = "http://localhost"


class Shelf:
    """A backend whose jobs run until the test ends them, and have written what the test says."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.orders: dict[str, Order] = {}
        self.ends: dict[str, int] = {}
        self.written: dict[str, bytes] = {}
        # How many last lines were asked for, each time that a log was.
        self.tails: list[int | None] = []
        self._more = threading.Condition()

    def check(self, job: Job) -> None:
        """All is well."""

    def start(self, order: Order) -> Handle:
        self.orders.setdefault(order.name, order)
        return {"name": order.name}

    def status(self, name: str, handle: Handle) -> Status:
        if name not in self.orders:
            return Status("gone")
        if name in self.ends:
            return Status("ended", exit_code=self.ends[name], started_s=1.0, ended_s=time.time())
        return Status("running", started_s=1.0)

    def logs(
        self,
        name: str,
        handle: Handle,
        *,
        node: int = 0,
        tail: int | None = None,
        follow: Callable[[], bool] | None = None,
        since: str = "",
    ) -> Iterator[bytes]:
        if since:
            raise PlaceLostError("a shelf knows no places")
        self.tails.append(tail)
        told, data = 0, self.written.get(name, b"")
        if tail is not None:
            told = len(data) - len(b"".join(data.splitlines(keepends=True)[-tail:]) if tail else b"")
        while True:
            ended = name in self.ends
            data = self.written.get(name, b"")
            if data[told:]:
                yield data[told:]
                told = len(data)
            if follow is None or not follow() or ended:
                return
            yield b""
            with self._more:
                self._more.wait(0.05)

    def cancel(self, name: str, handle: Handle, grace_s: float) -> None:
        self.ends.setdefault(name, -15)

    def remove(self, name: str, handle: Handle) -> None:
        """Nothing is left there."""

    def reconcile(self) -> dict[str, str]:
        return {name: order.job.id for name, order in self.orders.items()}

    def close(self) -> None:
        """Nothing is open."""

    def write(self, name: str, data: bytes) -> None:
        """Let a job write."""
        with self._more:
            self.written[name] = self.written.get(name, b"") + data
            self._more.notify_all()

    def end(self, name: str, code: int = 0) -> None:
        """Let a job end."""
        with self._more:
            self.ends[name] = code
            self._more.notify_all()


@dataclasses.dataclass
class Served:
    """A service and a client of it, who is this machine's user unless they send a token."""

    settings: ServiceSettings
    desk: Desk
    controller: Controller
    access: Access
    app: FastAPI
    client: TestClient
    shelves: Mapping[str, Shelf]

    def token(self, name: str, scope: str) -> dict[str, str]:
        """Headers of a new token."""
        return {"Authorization": f"Bearer {self.access.tokens.create(name, scope)}"}

    def submit(self, headers: Mapping[str, str] | None = None, **fields: Any) -> dict[str, Any]:
        """A job on the shelf, as JSON."""
        answer = self.client.post("/v1/jobs", json={"spec": spec(**fields)}, headers=dict(headers or {}))
        assert answer.status_code == 201, answer.text
        job: dict[str, Any] = answer.json()
        return job

    def run(self, job_id: str) -> Job:
        """Let the controller go on until the job runs."""
        return self.step_until(lambda: self.desk.get(job_id).state == "running", job_id)

    def end(self, job_id: str, code: int = 0) -> Job:
        """Let a running job end with this code."""
        attempt = self.desk.get(job_id).attempt
        assert attempt is not None
        self.shelves[self.desk.get(job_id).spec.backend].end(attempt.name, code)
        return self.step_until(lambda: self.desk.get(job_id).attempts[attempt.number - 1].ended_s > 0, job_id)

    def step_until(self, holds: Callable[[], bool], job_id: str) -> Job:
        deadline = time.monotonic() + 30
        while not holds():
            assert time.monotonic() < deadline, (self.desk.get(job_id), self.controller.problems)
            self.controller.step()
        return self.desk.get(job_id)

    def log(self, job: Job, number: int = 1) -> Path:
        """Where the log of a local job's attempt lies."""
        return orders.attempt_folder(self.settings, job.id, number) / "log-node0.txt"

    def audited(self) -> list[dict[str, Any]]:
        path = self.settings.state / "audit.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def spec(**fields: Any) -> dict[str, Any]:
    """A container job; what is given stands in the place of its fields."""
    return {"kind": "container", "backend": "docker", "name": "task", "command": ["true"], "retries": 0, **fields}


@contextlib.contextmanager
def served(folder: Path, uri: str, *, host: str = "127.0.0.1", **settings: Any) -> Iterator[Served]:
    """A service in `folder` that records at `uri`; its controller moves when the test says so."""
    values = {"state": folder / "state", "results": folder / "jobs", "tracking_uri": uri, "cpus": 100.0, **settings}
    chosen = ServiceSettings.model_validate(values)
    shelves = {name: Shelf(name) for name in ("local", "docker")}
    desk = Desk(chosen, backends=shelves)
    controller = Controller(desk)
    access = Access(chosen, host=host)
    app = application.create(desk, controller, access)
    controller.open()
    try:
        with TestClient(app, base_url=LOCAL) as client:
            yield Served(chosen, desk, controller, access, app, client, shelves)
    finally:
        controller.stop()
