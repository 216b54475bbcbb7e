"""What Prometheus reads at /metrics: a registry of this service's own."""

import contextlib
import math
import threading
import time
from collections import Counter as Counts
from collections.abc import Iterator
from typing import Any, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from service.errors import LorotError
from service.jobs.controller import Controller
from service.jobs.desk import Desk
from service.jobs.job import Job, State

# How long what a running job says of itself is believed, seconds.
PROGRESS_S = 10.0
_METHODS = ("GET", "POST", "DELETE", "PUT", "PATCH", "HEAD", "OPTIONS")
_SHARES = {
    "images_per_s": ("lorot_job_images_per_second", "Images a second of a running job, over all its workers."),
    "data_wait_share": ("lorot_job_data_wait_share", "Share of its time that a running job waits for data, 0 to 1."),
    "share": ("lorot_job_progress_share", "Share of its steps that a running job has done, 0 to 1."),
}


class Meters:
    """Counters and histograms of the requests, and gauges of the record as it stands when it is asked."""

    def __init__(self, desk: Desk, controller: Controller) -> None:
        self.registry = CollectorRegistry()
        self.submissions = Counter("lorot_submissions", "Jobs taken in.", ("kind", "backend"), registry=self.registry)
        self.failures = Counter("lorot_job_failures", "Jobs that failed.", ("backend",), registry=self.registry)
        self.requests = Histogram(
            "lorot_request_seconds",
            "From a request to its answer's end; event streams are left out.",
            ("method", "route", "status"),
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
            registry=self.registry,
        )
        self.rounds = Histogram(
            "lorot_controller_round_seconds",
            "How long a round of the controller takes.",
            buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
            registry=self.registry,
        )
        self.streams = 0
        self._failed: set[str] = set()
        ProcessCollector(registry=self.registry)
        self.registry.register(_Standing(self, desk, controller))
        controller.on_change.append(self.changed)
        controller.on_round.append(self.rounds.observe)

    def request(self, method: str, route: str, status: int, took_s: float) -> None:
        """Note an answer. Whatever a client writes as its method or path makes no series of its own."""
        if route in ("/v1/events", "/v1/jobs/{job_id}/logs"):
            return
        known = method if method in _METHODS else "other"
        self.requests.labels(known, route, f"{status // 100}xx").observe(took_s)

    def changed(self, job: Job) -> None:
        """Count a job that fails once, however often it is told; one that is repeated and fails again counts again."""
        if job.state != "failed":
            self._failed.discard(job.id)
        elif job.id not in self._failed:
            self._failed.add(job.id)
            self.failures.labels(job.spec.backend).inc()

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)


class _Standing(Collector):
    """What the record, the controller and the running jobs say now."""

    def __init__(self, meters: Meters, desk: Desk, controller: Controller) -> None:
        self._meters = meters
        self._desk = desk
        self._controller = controller
        self._lock = threading.Lock()
        self._progress: dict[str, tuple[float, dict[str, Any]]] = {}

    def describe(self) -> list[Metric]:
        """Nothing: else the registry would ask for all of it when it is made."""
        return []

    def collect(self) -> Iterator[Metric]:
        is_partial = self._desk.record.is_partial
        jobs = self._desk.record.jobs()
        states = Counts(job.state for job in jobs)
        by_state = GaugeMetricFamily("lorot_jobs", "Jobs in the record, by state.", labels=("state",))
        for state in get_args(State):
            by_state.add_metric((state,), states[state])
        yield by_state
        yield GaugeMetricFamily(
            "lorot_jobs_partial", "Whether jobs that have ended are still being read, 0 or 1.", value=is_partial
        )
        yield GaugeMetricFamily("lorot_queue_length", "Jobs that wait for their start.", value=states["queued"])
        yield GaugeMetricFamily(
            "lorot_running",
            "Jobs that are started and have not ended.",
            value=states["starting"] + states["running"] + states["stopping"],
        )
        yield GaugeMetricFamily(
            "lorot_controller_last_round_timestamp_seconds",
            "When the controller's last round ended, seconds since the epoch; it stands still where that hangs.",
            value=self._controller.last_round_s,
        )
        yield GaugeMetricFamily(
            "lorot_controller_well", "Whether the controller's rounds go well, 0 or 1.", value=self._controller.is_well
        )
        yield GaugeMetricFamily("lorot_streams", "Open event streams.", value=self._meters.streams)
        yield from self._of_running([job for job in jobs if job.state == "running"])

    def _of_running(self, jobs: list[Job]) -> Iterator[Metric]:
        said = {job.id: self._said(job) for job in jobs}
        with self._lock:
            self._progress = {key: kept for key, kept in self._progress.items() if key in said}
        for key, (name, meaning) in _SHARES.items():
            family = GaugeMetricFamily(name, meaning, labels=("job_id", "job_name"))
            for job in jobs:
                value = said[job.id].get(key)
                if isinstance(value, int | float) and math.isfinite(value):
                    family.add_metric((job.id, job.spec.name), value)
            yield family

    def _said(self, job: Job) -> dict[str, Any]:
        with self._lock:
            when, kept = self._progress.get(job.id, (-math.inf, {}))
        if time.monotonic() - when < PROGRESS_S:
            return kept
        with contextlib.suppress(LorotError):
            kept = self._desk.progress(job.id)
        with self._lock:
            self._progress[job.id] = (time.monotonic(), kept)
        return kept
