"""Sends the records of a spool to MLflow: one request for a row of metrics, one for each of anything else."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from service.spool import Record, RefusedError
from service.store import client

METRICS_PER_REQUEST = 1000
_KEY_CHARS = 250


class Delivery:
    """Sends consecutive records of one run: metrics together, all else one at a time."""

    def __init__(self, uri: str, run_id: str, folder: Path) -> None:
        self._run_id = run_id
        self._folder = folder
        self._client = client(uri)
        self._senders: dict[str, Callable[..., None]] = {
            "params": self._params,
            "tags": self._tags,
            "model_tags": self._model_tags,
            "artifact": self._artifact,
            "text": self._text,
            "status": self._status,
        }

    def __call__(self, records: list[Record]) -> None:
        with _refusals():
            if records[0]["op"] == "metrics":
                self._metrics(records)
            elif records[0]["op"] in self._senders:
                self._senders[records[0]["op"]](**records[0])
            else:
                raise RefusedError(f"{records[0]['op']!r} is no kind of record")

    def _metrics(self, records: list[Record]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(key, value, record["time_ms"], record["step"])
            for record in records
            for key, value in record["values"].items()
        ]
        self._client.log_batch(self._run_id, metrics=metrics)

    def _params(self, values: dict[str, str], **_: Any) -> None:
        from mlflow.entities import Param

        try:
            self._client.log_batch(self._run_id, params=[Param(key, value) for key, value in values.items()])
        except Exception as error:
            if not _is_refusal(error):
                raise
            # Parameters never change in MLflow; a resumed run whose configuration did shows both values.
            known = self._client.get_run(self._run_id).data.params
            missing = [Param(key, value) for key, value in values.items() if key not in known]
            self._client.log_batch(self._run_id, params=missing)
            for key, value in values.items():
                if known.get(key, value) != value:
                    self._client.set_tag(self._run_id, f"changed.{key}"[:_KEY_CHARS], value)

    def _tags(self, values: dict[str, str], **_: Any) -> None:
        from mlflow.entities import RunTag

        self._client.log_batch(self._run_id, tags=[RunTag(key, value) for key, value in values.items()])

    def _model_tags(self, name: str, version: int, values: dict[str, str], **_: Any) -> None:
        for key, value in values.items():
            self._client.set_model_version_tag(name, str(version), key, value)

    def _artifact(self, path: str, subfolder: str | None, **_: Any) -> None:
        local = self._folder / path
        if local.is_dir():
            self._client.log_artifacts(self._run_id, str(local), subfolder)
        elif local.is_file():
            self._client.log_artifact(self._run_id, str(local), subfolder)
        else:
            raise RefusedError(f"{local} has gone before it could be sent")

    def _text(self, text: str, name: str, **_: Any) -> None:
        self._client.log_text(self._run_id, text, name)

    def _status(self, status: str, time_ms: int, **_: Any) -> None:
        if status == "RUNNING":
            self._client.update_run(self._run_id, status=status)
        else:
            self._client.set_terminated(self._run_id, status, time_ms)


def take(records: list[Record]) -> int:
    """How many of the records go into one request: a row of metrics up to MLflow's limit, or one of anything else."""
    count = metrics = 0
    for record in records:
        metrics += len(record["values"]) if record.get("op") == "metrics" else METRICS_PER_REQUEST + 1
        if metrics > METRICS_PER_REQUEST:
            break
        count += 1
    return max(1, count)


def _is_refusal(error: Exception) -> bool:
    return getattr(error, "error_code", None) == "INVALID_PARAMETER_VALUE"


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except RefusedError:
        raise
    except (KeyError, TypeError) as error:
        raise RefusedError(f"the record is incomplete: {error}") from error
    except Exception as error:
        if _is_refusal(error):
            raise RefusedError(str(error)) from error
        raise
