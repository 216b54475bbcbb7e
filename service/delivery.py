"""Sends the records of a spool to MLflow: one request for a row of metrics, one for each of anything else."""

import contextlib
import inspect
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from service import registration, store
from service.errors import LorotError, TrackingError
from service.holder import Holder
from service.naming import KEY_CHARS, TAG_CHARS, legal_text
from service.run_folder import RunFolder
from service.spool import BusyError, Record, RefusedError

_log = logging.getLogger(__name__)

METRICS_PER_REQUEST = 1000
# How often the run was gone on with, by which process it is worked on, and why it ended if its workers could not say.
RESUMED = "lorot.resumed"
HOLDER = "lorot.holder"
FAILURE = "lorot.failure"

_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST")
_REFUSAL = re.compile(r"failed with error code (400|413|414|415|422)\b")
_BUSY = re.compile(r"too many (429|503) error responses|failed with error code (429|503)\b")


class Delivery:
    """Sends consecutive records of one run: metrics together, all else one at a time.

    Every record may be sent again: a request may have been served although its answer was lost.

    Raises, when it is called:
        RefusedError: the server is well, knows the run, and will not take this record.
        BusyError: the server says when to come back.
        Exception: what MLflow and the network raise; try again later.
    """

    def __init__(self, uri: str, run_id: str, folder: Path) -> None:
        self._uri = uri
        self._run_id = run_id
        self._folder = folder
        self._client = store.client(uri)
        self._senders: dict[str, Callable[..., None]] = {
            "params": self._params,
            "tags": self._tags,
            "model_tags": self._model_tags,
            "artifact": self._artifact,
            "text": self._text,
            "status": self._status,
            "register": self._register,
        }

    def __call__(self, records: list[Record]) -> None:
        send = self._sending(records)
        try:
            send()
        except RefusedError:
            raise
        except Exception as error:
            text = " ".join(str(error).split())
            if getattr(error, "error_code", None) in _REFUSALS or _REFUSAL.search(text):
                self._ask_for_run()
                raise RefusedError(text) from error
            if _BUSY.search(text) and (pause_s := store.retry_after_s(self._uri)):
                raise BusyError(text, pause_s) from error
            raise

    def _sending(self, records: list[Record]) -> Callable[[], None]:
        """What sends these records; raises RefusedError for one that is no record."""
        first = records[0]
        if first.get("op") == "metrics":
            if not all({"values", "step", "time_ms"} <= record.keys() for record in records):
                raise RefusedError("the record is incomplete")
            return lambda: self._metrics(records)
        send = self._senders.get(first.get("op", ""))
        if send is None:
            raise RefusedError(f"{first.get('op')!r} is no kind of record")
        try:
            inspect.signature(send).bind(**first)
        except TypeError as error:
            raise RefusedError(f"the record is incomplete: {error}") from None
        return lambda: send(**first)

    def _ask_for_run(self) -> None:
        """Raises unless the server is well and takes records of this run: then a refusal means the record alone."""
        if self._client.get_run(self._run_id).info.lifecycle_stage != "active":
            raise TrackingError(
                f"run {self._run_id} was deleted in {store.shown(self._uri)}; `mlflow runs restore --run-id "
                f"{self._run_id}` brings it back"
            )

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
                    self._client.set_tag(self._run_id, f"changed.{key}"[:KEY_CHARS], value)

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

    def _status(
        self, status: str, time_ms: int, resumed: int = 0, holder: Any = None, lost: str | None = None, **_: Any
    ) -> None:
        """Set the run's status, unless it was gone on with after this was written.

        Args:
            lost: why the run ended, if not the holder itself but somebody else says that it did.
        """
        tags = self._client.get_run(self._run_id).data.tags
        theirs = int(registration.number(tags.get(RESUMED)) or 0)
        known = Holder.read(holder)
        label = known.label() if known is not None else ""
        other = lost is not None and tags.get(HOLDER, label) != label
        if theirs > resumed or (theirs == resumed and other):
            _log.info("run %s goes on elsewhere; it does not become %s", self._run_id, status)
            return
        if status == "RUNNING":
            self._tags({HOLDER: label} | ({RESUMED: str(resumed)} if resumed else {}))
            if FAILURE in tags:
                self._client.delete_tag(self._run_id, FAILURE)
            self._client.update_run(self._run_id, status=status)
            return
        if lost:
            self._tags({FAILURE: legal_text(lost)[:TAG_CHARS]})
        self._client.set_terminated(self._run_id, status, time_ms)

    def _register(self, folder: str, name: str, metric: str, mode: str, **_: Any) -> None:
        """Register the run's model, and write its version into what the job left behind."""
        try:
            version = registration.enter(self._client, self._folder / folder, name, self._run_id, metric, mode)
        except LorotError as error:
            raise RefusedError(str(error)) from error
        place = RunFolder(self._folder)
        summary = place.read(place.summary.name)
        if summary and summary.get("model_version") != version:
            place.write(place.summary.name, summary | {"model_name": name, "model_version": version})
        if (page := self._folder / "report.html").exists():
            from service import report

            with contextlib.suppress(LorotError):
                report.write(self._folder, page)


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
