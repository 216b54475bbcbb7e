"""The record of a job in MLflow: parameters, metrics, files. The only module that logs runs.

A job writes to a spool on disk and goes on; a thread sends the spool (see `service.spool`). So a server that is slow,
down or restarted costs the job nothing, and every record arrives in the order and with the time of its writing, once:
MLflow's database knows a metric by (run, key, time, step, value), and all other records may be repeated without effect.
"""

import contextlib
import getpass
import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from service import provenance, store
from service.config import TrackingConfig
from service.delivery import METRICS_PER_REQUEST, Delivery, take
from service.errors import TrackingError
from service.spool import Record, Sender, Spool, deliver_next
from service.store import client, default_uri, ensure_ready

_log = logging.getLogger(__name__)

# MLflow's limits (mlflow.utils.validation): longer values and larger requests are refused.
_PARAM_CHARS = 6000
_TAG_CHARS = 8000
_KEY_CHARS = 250
_PARAMS_PER_REQUEST = 100

_NONE: Mapping[str, str] = MappingProxyType({})


class Run:
    """One MLflow run of one job. Every method returns at once; only `finish` waits, and not for long.

    Attributes:
        run_id: MLflow's id of the run.
        experiment: name of its experiment.
        uri: where it is recorded.
    """

    def __init__(self, run_id: str, experiment: str, uri: str, folder: Path) -> None:
        self.run_id = run_id
        self.experiment = experiment
        self.uri = uri
        self._folder = folder
        self._spool = _open_spool(folder, run_id, uri)
        self._last_steps = _last_steps(self._spool.records())
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
        self._append("text", text=text, name=name)

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags of the run; the last value of a key stays."""
        items = [(legal_key(key), str(value)[:_TAG_CHARS]) for key, value in tags.items()]
        for start in range(0, len(items), _PARAMS_PER_REQUEST):
            self._append("tags", values=dict(items[start : start + _PARAMS_PER_REQUEST]))

    def tag_model_version(self, name: str, version: int, tags: Mapping[str, Any]) -> None:
        """Set tags of a registered model's version: what a downstream job found out about it."""
        values = {legal_key(key): str(value) for key, value in tags.items()}
        self._append("model_tags", name=name, version=version, values=values)

    def watch_system(self) -> None:
        """Record CPU, memory, disk, network and GPU load every ten seconds until the run is finished."""
        if self._system is None:
            self._system = _SystemMetrics(self)

    def unsent(self) -> int:
        """Number of records that the server has not got yet."""
        return self._spool.waiting()

    def finish(self, status: str = "FINISHED", timeout_s: float = 30.0) -> str:
        """End the run with FINISHED, FAILED or KILLED and wait for the records to arrive, at most `timeout_s`.

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
        self._append("status", status=status)
        notice = ""
        if not self._sender.drain(timeout_s):
            notice = (
                f"{self._spool.waiting()} records of this run wait in {self._spool.path}: {store.shown(self.uri)} did "
                f"not take them ({self._sender.last_error or 'too slow'}); they are sent when the run is resumed"
            )
            _log.warning(notice)
        if self._sender.stop():
            self._spool.close()
        return notice

    def _append(self, op: str, **values: Any) -> None:
        self._spool.append({"op": op, "time_ms": int(time.time() * 1000), **values})
        self._sender.wake()


def open_run(
    config: TrackingConfig,
    *,
    name: str,
    folder: Path,
    run_id: str | None = None,
    tags: Mapping[str, Any] = _NONE,
) -> Run:
    """Start a run, or go on with the run `run_id`, and record it until `finish`. Call it in one process of a job.

    The code's commit and the package versions are tagged besides `tags`. Records of `folder/spool.jsonl` that an
    earlier process of this run could not send go first; those of another run are set aside under its id, for `sync`.

    Raises:
        TrackingError: a new run and the server does not answer within seconds, or refuses; `run_id` is not known there;
            another process records in this folder. Going on with a run needs no server: its records wait.
    """
    uri = config.uri or default_uri()
    folder.mkdir(parents=True, exist_ok=True)
    if run_id is None:
        run_id = _create_run(uri, config.experiment, name)
        run = Run(run_id, config.experiment, uri, folder)
    else:
        _check_known(uri, run_id)
        run = Run(run_id, config.experiment, uri, folder)
        run._append("status", status="RUNNING")
    run.set_tags(provenance.code_version())
    run.set_tags({f"version.{package}": version for package, version in provenance.package_versions().items()})
    run.set_tags(tags)
    if config.system_metrics:
        run.watch_system()
    return run


def sync(folder: Path, uri: str | None = None) -> int:
    """Send what waits in a run's folder, of every run that was recorded there; returns the number of records sent.

    Raises:
        TrackingError: nothing was ever recorded there, the job is still running, or the server does not take them.
    """
    paths = sorted(folder.glob("spool*.jsonl"))
    if not paths:
        raise TrackingError(f"{folder}: no spool.jsonl; name the folder of a run, as in runs/train")
    sent = 0
    for path in paths:
        spool = Spool(path)
        try:
            header = spool.header()
            to = uri or str(header.get("uri", default_uri()))
            before = spool.waiting()
            if before:
                ensure_ready(to)
                with store.explained(to):
                    while not deliver_next(spool, Delivery(to, str(header.get("run_id")), folder), take):
                        pass
            sent += before
        finally:
            spool.close()
    return sent


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as MLflow parameters: dotted keys, texts as they are, the rest as JSON, cut to the limit."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
            continue
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        flat[legal_key(f"{prefix}{key}")] = text if len(text) <= _PARAM_CHARS else text[: _PARAM_CHARS - 1] + "…"
    return flat


def legal_key(key: str) -> str:
    """`key` with what MLflow does not allow in names replaced: `@` by `:`, anything else by `_`."""
    key = re.sub(r"[^/\w.\- :]", "_", str(key).replace("@", ":"), flags=re.ASCII)
    # MLflow also refuses what would name another place if it were a path: "..", "a//b", "/a", "a/".
    return "/".join(part for part in key.split("/") if part.strip("."))[:_KEY_CHARS] or "_"


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


def _last_steps(records: list[Record]) -> dict[str, int]:
    last: dict[str, int] = {}
    for record in records:
        if record.get("op") == "metrics":
            for key in record["values"]:
                last[key] = max(last.get(key, record["step"]), record["step"])
    return last


def _open_spool(folder: Path, run_id: str, uri: str) -> Spool:
    header = {"run_id": run_id, "uri": store.absolute(uri)}
    spool = Spool(folder / "spool.jsonl", header)
    other = str(spool.header().get("run_id", "unknown"))
    if other == run_id:
        return spool
    if spool.empty():
        spool.discard()
    else:
        aside = folder / f"spool-{re.sub(r'[^0-9A-Za-z-]', '_', other)}.jsonl"
        _log.warning("%d unsent records of run %s are set aside in %s", spool.waiting(), other, aside)
        spool.move(aside)
    spool.close()
    return Spool(folder / "spool.jsonl", header)


def _create_run(uri: str, experiment: str, name: str) -> str:
    ensure_ready(uri)
    tags = {"mlflow.source.name": "lorot", "mlflow.source.type": "LOCAL"}
    with contextlib.suppress(Exception):  # a container's user may have no name
        tags["mlflow.user"] = getpass.getuser()
    if commit := provenance.code_version().get("git.commit"):
        tags["mlflow.source.git.commit"] = commit
    with store.explained(uri):
        return str(client(uri).create_run(_experiment_id(uri, experiment), run_name=name, tags=tags).info.run_id)


def _experiment_id(uri: str, name: str) -> str:
    from mlflow.exceptions import MlflowException

    api = client(uri)
    found = api.get_experiment_by_name(name)
    if found is None:
        path = store.sqlite_path(uri)
        # Beside a local database; a server knows its own place.
        place = None if path is None else (path.resolve().parent / "artifacts").as_uri()
        try:
            return str(api.create_experiment(name, artifact_location=place))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = api.get_experiment_by_name(name)  # another job was a moment faster
    if found.lifecycle_stage != "active":
        raise TrackingError(
            f"tracking.experiment: {name!r} was deleted in {store.shown(uri)}; choose another name, or restore it with "
            f"`mlflow experiments restore -x {found.experiment_id}`"
        )
    return str(found.experiment_id)


def _check_known(uri: str, run_id: str) -> None:
    try:
        ensure_ready(uri)
    except store.UnreachableError as error:
        _log.warning("%s; this run goes on, its records wait on disk", error)
        return
    from mlflow.exceptions import MlflowException

    try:
        client(uri).get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            raise TrackingError(
                f"{store.shown(uri)} knows no run {run_id}; resume with the tracking URI the run was started with, "
                "or delete its run.json to record a new one"
            ) from None
        _log.warning("%s: %s; this run goes on, its records wait on disk", store.shown(uri), error)


__all__ = ["Run", "client", "default_uri", "ensure_ready", "flatten", "legal_key", "open_run", "sync"]
