"""The service with its console in one process: a real record, and a backend that only remembers. For its tests."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.testclient import TestClient

from service.api.access import Access
from service.api.app import create
from service.console import pages
from service.jobs.backends import Handle, Order, Status
from service.jobs.controller import Controller
from service.jobs.desk import Desk
from service.jobs.job import Attempt, Job
from service.jobs.orders import attempt_folder, folder_of
from service.jobs.settings import ServiceSettings
from service.jobs.spec import JobSpec

TINY: dict[str, Any] = {
    "duration": "4 steps",
    "global_batch": 8,
    "micro_batch": 4,
    "data": {
        "name": "demo",
        "root": "data/demo",
        "size": 32,
        "options": {"train_count": 24, "val_count": 8, "size": 40},
    },
    "model": {"name": "resnet_small", "width": 8},
}


class Remembered:
    """A place that starts nothing: what was asked of it, and the logs that it was given."""

    def __init__(self, name: str = "local") -> None:
        self.name = name
        self.cancelled: list[str] = []
        self.log = b""

    def check(self, job: Job) -> None:
        """Everything can be done here."""

    def start(self, order: Order) -> Handle:
        """Nothing runs."""
        return {"pid": 812}

    def status(self, name: str, handle: Handle) -> Status:
        """For ever on its way."""
        return Status("running")

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
        """What it was given."""
        yield self.log

    def cancel(self, name: str, handle: Handle, grace_s: float) -> None:
        """Remembered."""
        self.cancelled.append(name)

    def remove(self, name: str, handle: Handle) -> None:
        """There is nothing."""

    def reconcile(self) -> dict[str, str]:
        """There is nothing."""
        return {}

    def close(self) -> None:
        """Nothing is open."""


@dataclass
class Service:
    """One service.

    Attributes:
        client: a browser without JavaScript, which follows no redirect by itself.
    """

    app: FastAPI
    desk: Desk
    backend: Remembered
    access: Access
    client: TestClient

    def submit(self, *, owner: str = "local", **fields: Any) -> Job:
        spec = JobSpec.model_validate({"name": "demo", "config": TINY, **fields})
        return self.desk.submit(spec, owner=owner)[0]

    def run(self, job: Job, *, started_s: float | None = None, handle: Mapping[str, Any] | None = None) -> Job:
        """Let it be in its first attempt."""
        attempt = Attempt(1, f"lorot-{job.id[:12]}-1", handle or {"pid": 812}, started_s or time.time())
        self.desk.record.change(job.id, state="starting", attempts=(attempt,))
        return self.desk.record.change(job.id, state="running")

    def measured(self, job: Job, records: list[dict[str, Any]], total_steps: int = 400) -> Path:
        """Let its worker have written these."""
        run = folder_of(self.desk.settings, job.id) / "run"
        run.mkdir(parents=True)
        (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        (run / "run.json").write_text(json.dumps({"total_steps": total_steps}))
        return run

    def wrote(self, job: Job, log: bytes) -> None:
        """Let its first attempt have written this."""
        self.backend.log = log
        folder = attempt_folder(self.desk.settings, job.id, 1)
        folder.mkdir(parents=True)
        (folder / "log-node0.txt").write_bytes(log)

    def log_in(self, name: str, scope: str) -> TestClient:
        """Another browser, with a session of a new token."""
        token = self.access.tokens.create(name, scope)
        browser = browse(self.app)
        answer = browser.post("/login", data={"token": token, "next": "/"})
        assert answer.status_code == 303, answer.text
        return browser


def service(root: Path, **settings: Any) -> Service:
    """A service that keeps everything below `root`, which is the working folder."""
    given = ServiceSettings.model_validate(
        {
            "state": root / "state",
            "results": root / "jobs",
            "data_roots": [root / "data"],
            "cpus": 8,
            "gpus": 0,
            "backends": {"docker": {"enabled": True}},
            "worker_tracking_uri": "http://mlflow:5000",
            **settings,
        }
    )
    backend = Remembered()
    desk = Desk(given, backends={"local": backend, "docker": Remembered("docker")})
    access = Access(given)
    app = create(desk, Controller(desk), access)
    pages.mount(app)
    return Service(app, desk, backend, access, browse(app))


def browse(app: FastAPI) -> TestClient:
    return TestClient(app, base_url="http://127.0.0.1:8080", follow_redirects=False)
