"""The record of a job in MLflow: parameters, metrics, files. The only module that logs runs.

A job writes to a spool on disk and goes on; a thread sends the spool (see `service.spool`). So a server that is slow,
down or restarted costs the job nothing, and every record arrives in the order and with the time of its writing, once:
MLflow's database knows a metric by (run, key, time, step, value), and all other records may be repeated without effect.
"""

import logging
import math
import os
import re
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from service import provenance, recovery, registration, store
from service.config import TrackingConfig
from service.delivery import HOLDER, METRICS_PER_REQUEST, RESUMED, Delivery, take
from service.errors import LorotError, TrackingError
from service.holder import Holder
from service.naming import TAG_CHARS, flatten, legal_key, legal_text
from service.run_creation import create_run
from service.run_folder import RunFolder
from service.spool import Record, Sender, Spool
from service.store import client, default_uri, ensure_ready

_log = logging.getLogger(__name__)

_PARAMS_PER_REQUEST = 100
# How long a resume asks about its run before it goes on without an answer.
_QUESTION_S = 5.0
# `lorot sync` may hold the spool while torchrun starts a lost worker again.
_PATIENCE_S = 10.0

_NONE: Mapping[str, str] = MappingProxyType({})


class Run:
    """One MLflow run of one job. Every method returns at once; only `finish` waits, and not for long.

    Attributes:
        run_id: MLflow's id of the run.
        experiment: name of its experiment.
        uri: where it is recorded.
        resumed: how often it was gone on with.
        holder: who answers for the processes that work on it.
    """

    def __init__(self, run_id: str, experiment: str, uri: str, folder: Path, resumed: int | None = None) -> None:
        """Record in `folder`; `resumed` is how often others know it to have been gone on with, None for a new run."""
        self.run_id = run_id
        self.experiment = experiment
        self.uri = uri
        self.holder = Holder.here()
        self._folder = folder
        self._spool = _open_spool(folder, run_id, uri)
        self._last_steps, told = _history(self._spool.records())
        self.resumed = 0 if resumed is None else 1 + max(resumed, told)
        self._lock = threading.Lock()
        self._system: _SystemMetrics | None = None
        self._sender = Sender(self._spool, Delivery(uri, run_id, folder), take)
        self._sender.start()
        self._finished = False

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Record settings; nested mappings become dotted keys. A value that differs on a resume becomes a tag."""
        flat = list(flatten(values).items())
        for start in range(0, len(flat), _PARAMS_PER_REQUEST):
            self._append("params", values=dict(flat[start : start + _PARAMS_PER_REQUEST]))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record numbers at an optimizer step, with the present time.

        The steps of a metric rise: what is not above the last step recorded under its name is left out. A run that was
        killed and repeats the steps since its last checkpoint therefore leaves one point a step.
        """
        with self._lock:
            fresh = {legal_key(key): float(value) for key, value in metrics.items()}
            fresh = {key: value for key, value in fresh.items() if step > self._last_steps.get(key, -math.inf)}
            self._last_steps.update(dict.fromkeys(fresh, step))
            items = list(fresh.items())
            for start in range(0, len(items), METRICS_PER_REQUEST):
                self._append("metrics", step=step, values=dict(items[start : start + METRICS_PER_REQUEST]))

    def log_artifact(self, path: Path | str, subfolder: str | None = None) -> None:
        """Record a file or a folder's content. It is read when it is sent: leave it where it is until the job ends."""
        self._append("artifact", path=os.path.relpath(path, self._folder), subfolder=subfolder)

    def log_text(self, text: str, name: str) -> None:
        """Record a text as the artifact `name`."""
        self._append("text", text=legal_text(text), name=name)

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags of the run; the last value of a key stays."""
        items = [(legal_key(key), legal_text(value)[:TAG_CHARS]) for key, value in tags.items()]
        for start in range(0, len(items), _PARAMS_PER_REQUEST):
            self._append("tags", values=dict(items[start : start + _PARAMS_PER_REQUEST]))

    def tag_model_version(self, name: str, version: int, tags: Mapping[str, Any]) -> None:
        """Set tags of a registered model's version: what a downstream job found out about it."""
        values = {legal_key(key): legal_text(value) for key, value in tags.items()}
        self._append("model_tags", name=name, version=version, values=values)

    def register_model(self, folder: Path, name: str, metric: str, mode: str) -> None:
        """Make the bundle in `folder` the newest version of the registered model `name`, when the server takes it.

        Its version is then written into the job's summary.json. Leave the bundle where it is until the job ends.

        Raises:
            ConfigError: MLflow does not accept the name.
        """
        registration.check_name(name)
        self._append("register", folder=os.path.relpath(folder, self._folder), name=name, metric=metric, mode=mode)

    def settle(self, timeout_s: float) -> bool:
        """Wait until the server has every record so far, not for long if it does not answer; whether it has them."""
        return self._sender.drain(timeout_s)

    def about(self) -> dict[str, Any]:
        """For run.json: with it the run can be gone on with, and can be seen to be dead."""
        return {
            "run_id": self.run_id,
            "experiment": self.experiment,
            "tracking_uri": self.uri,
            "resumed": self.resumed,
            "holder": self.holder.content(),
        }

    def watch_system(self) -> None:
        """Record CPU, memory, disk, network and GPU load every ten seconds until the run is finished."""
        if self._system is None:
            self._system = _SystemMetrics(self)

    def unsent(self) -> int:
        """Number of records that the server has not got yet."""
        return self._spool.waiting()

    def finish(self, status: str = "FINISHED", timeout_s: float | None = None) -> str:
        """End the run with FINISHED, FAILED or KILLED and wait for the records to arrive.

        Args:
            timeout_s: the longest wait; by default 30 s, but 5 s for KILLED, since whoever stops a job gives it little
                time. A server that takes nothing at all is not waited for longer than 5 s.

        Returns:
            Empty if the server has everything; otherwise a sentence for the user: how many records wait, and where.
        """
        if status not in ("FINISHED", "FAILED", "KILLED"):
            raise ValueError(f"status {status!r} is none of FINISHED, FAILED, KILLED")
        if self._finished:
            return ""
        self._finished = True
        if self._system is not None:
            self._system.stop()
        self._append_status(status)
        notice = ""
        if not self._sender.drain((5.0 if status == "KILLED" else 30.0) if timeout_s is None else timeout_s):
            notice = (
                f"{self._spool.waiting()} records of this run wait in {self._spool.path}: {store.shown(self.uri)} did "
                f"not take them ({self._sender.last_error or 'too slow'}); they are sent when the run is resumed, "
                f"or by `lorot sync {self._folder}`"
            )
            _log.warning(notice)
        if self._sender.stop():
            self._spool.close()
        return notice

    def _append_status(self, status: str) -> None:
        self._append("status", status=status, resumed=self.resumed, holder=self.holder.content())

    def _append(self, op: str, **values: Any) -> None:
        self._spool.append({"op": op, "time_ms": int(time.time() * 1000), **values})
        self._sender.wake()


def open_run(
    config: TrackingConfig,
    *,
    name: str,
    folder: Path,
    run_id: str | None = None,
    scheduled: str | None = None,
    tags: Mapping[str, Any] = _NONE,
) -> Run:
    """Start a run, or go on with the run `run_id`, and record it until `finish`. Call it in one process of a job.

    The code's commit and the package versions are tagged besides `tags`. Records of `folder/spool.jsonl` that an
    earlier process of this run could not send go first; those of another run are set aside under its id, for `sync`.

    Args:
        scheduled: the run that was made for this job before anybody works on it; it takes the place of a new one.

    Raises:
        TrackingError: a new run and the server does not answer within seconds, or refuses; `run_id` is not known there;
            another process records in this folder. Going on with a run needs no server: its records wait.
    """
    uri = config.uri or default_uri()
    folder.mkdir(parents=True, exist_ok=True)
    if run_id is None and scheduled is not None:
        run = Run(scheduled, config.experiment, uri, folder, resumed=_times_resumed(uri, scheduled, begun=False))
    elif run_id is None:
        run_id = create_run(uri, config.experiment, name)
        try:
            run = Run(run_id, config.experiment, uri, folder)
        except LorotError:
            with store.explained(uri):
                client(uri).set_terminated(run_id, "FAILED")
            raise
    else:
        earlier = RunFolder(folder).read("run.json")
        told = int(earlier.get("resumed", 0)) if earlier.get("run_id") == run_id else 0
        known = _times_resumed(uri, run_id)
        run = Run(run_id, config.experiment, uri, folder, resumed=max(told, known or 0))
    run._append_status("RUNNING")
    recovery.send_aside(folder)
    run.set_tags(provenance.code_version())
    run.set_tags({f"version.{package}": version for package, version in provenance.package_versions().items()})
    run.set_tags(tags)
    if config.system_metrics:
        run.watch_system()
    return run


class _SystemMetrics:
    """Samples MLflow's system monitors into the spool.

    MLflow's own thread sends by itself and ends for good at the first failed request, so only its gauges are used.
    """

    def __init__(self, run: Run) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._run = run
        self._monitor = SystemMetricsMonitor(run.run_id, tracking_uri=run.uri)
        recorded = (step for key, step in run._last_steps.items() if key.startswith("system/"))
        self._step = 1 + max(recorded, default=-1)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="lorot-system-metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(5.0)

    def _work(self) -> None:
        # Rates are means since the last reading: the first reading only starts the clock.
        self._monitor.collect_metrics()
        try:
            while not self._stop.wait(self._monitor.sampling_interval):
                self._sample()
            self._sample()
        except Exception:
            _log.exception("system metrics end here")

    def _sample(self) -> None:
        for monitor in self._monitor.monitors:
            monitor.clear_metrics()
        self._monitor.collect_metrics()
        gauges = self._monitor.aggregate_metrics()
        self._run.log_metrics({f"system/{key}": value for key, value in gauges.items()}, self._step)
        self._step += 1


def _history(records: Iterable[Record]) -> tuple[dict[str, int], int]:
    """The last step of each metric, and how often the run was gone on with."""
    last: dict[str, int] = {}
    resumed = 0
    for record in records:
        if record.get("op") == "metrics":
            for key in record["values"]:
                last[key] = max(last.get(key, record["step"]), record["step"])
        elif record.get("op") == "status":
            resumed = max(resumed, int(record.get("resumed", 0)))
    return last, resumed


def _open_spool(folder: Path, run_id: str, uri: str) -> Spool:
    header = {"run_id": run_id, "uri": store.absolute(uri)}
    spool = Spool(folder / recovery.SPOOL, header, _PATIENCE_S)
    other = str(spool.header().get("run_id", "unknown"))
    if other == run_id:
        return spool
    recovery.mark(spool, "FAILED", "its folder was taken by another run", certain=True)
    if spool.empty():
        spool.discard()
    else:
        aside = folder / f"spool-{re.sub(r'[^0-9A-Za-z-]', '_', other)}.jsonl"
        _log.warning("%d unsent records of run %s are set aside in %s", spool.waiting(), other, aside)
        spool.move(aside)
    spool.close()
    return Spool(folder / recovery.SPOOL, header)


def _times_resumed(uri: str, run_id: str, begun: bool = True) -> int | None:
    """How often the server knows the run to have been gone on with; None: it was not begun.

    Args:
        begun: what to think if the server does not answer within seconds.
    """

    def ask() -> int | None:
        ensure_ready(uri)
        tags = client(uri).get_run(run_id).data.tags
        if not tags.keys() & {HOLDER, RESUMED}:
            return None
        return int(registration.number(tags.get(RESUMED)) or 0)

    try:
        return store.within(_QUESTION_S, ask)
    except TrackingError as error:
        if not isinstance(error, store.UnreachableError):
            raise
        _log.warning("%s; this run goes on, its records wait on disk", error)
    except Exception as error:
        if getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST":
            raise TrackingError(
                f"{store.shown(uri)} knows no run {run_id}; resume with the tracking URI the run was started with, "
                "or delete its run.json to record a new one"
            ) from None
        _log.warning("%s: %s; this run goes on, its records wait on disk", store.shown(uri), error)
    return 0 if begun else None


__all__ = ["Run", "client", "default_uri", "ensure_ready", "flatten", "legal_key", "open_run"]
