"""Sends the records of a spool to MLflow: one request for a row of metrics, one for each of anything else."""

import contextlib
import inspect
import logging
import os
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from service import artifact_places, registration, store
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

    Args:
        roots: where artifacts may lie, see `service.artifact_places`; None: where this process was told that they may.

    Raises, when it is called:
        RefusedError: the server is well, knows the run, and will not take this record.
        BusyError: the server says when to come back.
        Exception: what MLflow and the network raise; try again later.
    """

    def __init__(self, uri: str, run_id: str, folder: Path, roots: artifact_places.Roots | None = None) -> None:
        self._uri = uri
        # None once the place is known to be a good one, too.
        self._roots = artifact_places.given() if roots is None else roots
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
        self._refuse_foreign_place()
        local = self._folder / path
        if local.is_dir():
            self._client.log_artifacts(self._run_id, str(local), subfolder)
        elif local.is_file():
            self._client.log_artifact(self._run_id, str(local), subfolder)
        else:
            raise RefusedError(f"{local} has gone before it could be sent")

    def _refuse_foreign_place(self) -> None:
        """Raise RefusedError if the run keeps its artifacts where this process may not write."""
        if self._roots is None:
            return
        try:
            location = self._client.get_run(self._run_id).info.artifact_uri
            artifact_places.refuse_foreign(location, self._uri, self._roots)
        except artifact_places.PlaceError as error:
            raise RefusedError(str(error)) from None
        self._roots = None

    def _text(self, text: str, name: str, **_: Any) -> None:
        self._refuse_foreign_place()
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
        self._refuse_foreign_place()
        try:
            version = registration.enter(self._client, self._folder / folder, name, self._run_id, metric, mode)
        except LorotError as error:
            raise RefusedError(str(error)) from error
        self._note_version(name, version)

    def _note_version(self, name: str, version: int) -> None:
        place = RunFolder(self._folder)
        summary = place.read(place.summary.name)
        if summary and summary.get("model_version") != version:
            place.write(place.summary.name, summary | {"model_name": name, "model_version": version})
        if (page := self._folder / "report.html").exists():
            from service import report

            with contextlib.suppress(LorotError):
                report.write(self._folder, page)


class StrictDelivery(Delivery):
    """As `Delivery`, of records and files that foreign code has written: it refuses what `lorot` would not write.

    Nothing is read through a link, nor from outside of the folder, and nothing is written there.
    """

    def _sending(self, records: list[Record]) -> Callable[[], None]:
        return super()._sending([self._fitting(record) for record in records])

    def _fitting(self, record: Record) -> Record:
        """The record with the keys that are known and allowed; raises RefusedError."""
        op = record.get("op")
        shape = _SHAPES.get(op) if isinstance(op, str) else None
        if shape is None:
            raise RefusedError(f"{str(op)[:100]!r} is no kind of record")
        try:
            fitting = shape.model_validate(record).model_dump()
        except (ValidationError, RecursionError) as error:
            where = f": {error.errors()[0]['loc']}" if isinstance(error, ValidationError) else ""
            raise RefusedError(f"the {op} record has another form{where}") from None
        if op == "tags":
            fitting["values"] = {key: value for key, value in fitting["values"].items() if not _is_services(key)}
            if len(fitting["values"]) < len(record["values"]):
                _log.warning("%s: tags that only the job service sets are left out", self._folder)
        return {"op": op, **fitting}

    def _artifact(self, path: str, subfolder: str | None, **_: Any) -> None:
        self._refuse_unless_plain(path)
        super()._artifact(path, subfolder)

    def _register(self, folder: str, name: str, metric: str, mode: str, **_: Any) -> None:
        self._refuse_unless_plain(folder)
        super()._register(folder, name, metric, mode)

    def _note_version(self, name: str, version: int) -> None:
        _log.info("run %s is version %d of %s", self._run_id, version, name)

    def _refuse_unless_plain(self, name: str) -> None:
        """Raise RefusedError unless it is a readable file, or a folder of such, with no link on the way nor below."""
        parts = PurePosixPath(name).parts
        if not parts or any(part in ("..", "/", "//") for part in parts):
            raise RefusedError(f"{name[:200]!r} is not in the run's folder")
        path = self._folder
        try:
            for part in parts:
                path = path / part
                if stat.S_ISLNK(path.lstat().st_mode):
                    raise RefusedError(f"{str(path)[:500]!r} is a link")
            found = [path]
            while found:
                one = found.pop()
                mode = one.lstat().st_mode
                if stat.S_ISDIR(mode):
                    found += one.iterdir()
                elif not stat.S_ISREG(mode) or not os.access(one, os.R_OK):
                    raise RefusedError(f"{str(one)[:500]!r} is no file that may be read")
        except OSError as error:
            raise RefusedError(f"{name[:200]!r} cannot be read ({error.strerror})") from None


def _is_services(key: str) -> bool:
    # Written by `service.jobs.record` alone.
    return key == "lorot.key" or key.startswith("lorot.job")


def _below(name: str) -> str:
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        raise ValueError("leads elsewhere")
    return name


_Text = Annotated[str, Field(pattern=r"^[^\x00]*$")]
_Below = Annotated[_Text, AfterValidator(_below)]
_Count = Annotated[int, Field(ge=0, lt=2**53)]


class _Shape(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")
    time_ms: _Count


class _Metrics(_Shape):
    values: dict[_Text, float]
    step: _Count


class _Texts(_Shape):
    values: dict[_Text, _Text]


class _ModelTags(_Texts):
    name: _Text
    version: _Count


class _Artifact(_Shape):
    path: _Text
    subfolder: _Below | None


class _TextFile(_Shape):
    text: _Text
    name: _Below


class _Status(_Shape):
    status: Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]
    resumed: _Count = 0
    holder: Any = None
    lost: _Text | None = None


class _Register(_Shape):
    folder: _Text
    name: _Text
    metric: _Text
    mode: Literal["min", "max"]


_SHAPES: Mapping[str, type[_Shape]] = {
    "params": _Texts,
    "metrics": _Metrics,
    "tags": _Texts,
    "model_tags": _ModelTags,
    "artifact": _Artifact,
    "text": _TextFile,
    "status": _Status,
    "register": _Register,
}


def take(records: list[Record]) -> int:
    """How many of the records go into one request: a row of metrics up to MLflow's limit, or one of anything else."""
    count = metrics = 0
    for record in records:
        values = record.get("values") if record.get("op") == "metrics" else None
        metrics += len(values) if isinstance(values, dict) else METRICS_PER_REQUEST + 1
        if metrics > METRICS_PER_REQUEST:
            break
        count += 1
    return max(1, count)


def _is_refusal(error: Exception) -> bool:
    return getattr(error, "error_code", None) == "INVALID_PARAMETER_VALUE"
