"""A run's folder: which files lie in it, and whose it is. Imports no torch.

config.yaml       the resolved configuration        summary.json     what came out, and what it cost
run.json          its MLflow run                    confusion.json   counts of (true, predicted)
metrics.jsonl     a line per record                 samples.png      what the network was shown
checkpoints/      one folder per saved step         model/           what is registered
backbone/         what a detector began with        detector/        the detector, as it was evaluated
log-rank*.txt     everything third parties print    error.json       why it failed
.reserve          room for that word on a full disk  launch.json    the job's name where several machines meet
end.json          when all was done, for launchers
"""

import contextlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from service.errors import ConfigError, LorotError, StorageError
from service.whole_file import write_text

_RESERVE = ".reserve"
_LAUNCH = "launch.json"
_END = "end.json"
_RESERVE_BYTES = 256 * 1024
# Integers beyond it are not what they were once they are floats.
_MOST_COUNTED = 2**53


@dataclass(frozen=True)
class RunFolder:
    """The places inside one run's folder."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.png"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def confusion(self) -> Path:
        return self.path / "confusion.json"

    @property
    def error(self) -> Path:
        return self.path / "error.json"

    @property
    def is_read_only(self) -> bool:
        """Whether nothing can be written there; false for a disk that is full, and for one that does not answer."""
        try:
            found = os.statvfs(self.path)
        except OSError:
            return False
        return bool(found.f_flag & os.ST_RDONLY) or not os.access(self.path, os.W_OK)

    @property
    def end(self) -> str:
        """Of a run whose main worker has done all of its work, registration and record included: when, else empty."""
        return str(self.read(_END).get("time_ns", ""))

    def note_end(self, is_done: bool) -> None:
        """Write down, or take back, what `end` then says; for the one who has the folder."""
        # Where it cannot be written, launchers do without.
        with contextlib.suppress(OSError, StorageError):
            if is_done:
                self.write(_END, {"time_ns": time.time_ns()})
            else:
                (self.path / _END).unlink(missing_ok=True)

    @property
    def meeting(self) -> str:
        """The name at the rendezvous of the job that has the folder or had it last; empty for one machine's."""
        return str(self.read(_LAUNCH).get("run_id", ""))

    def note_meeting(self, run_id: str) -> None:
        """Write down what `meeting` then says; for the one who has the folder. Raises StorageError."""
        if run_id:
            self.write(_LAUNCH, {"run_id": run_id})
        else:
            with contextlib.suppress(OSError):
                (self.path / _LAUNCH).unlink(missing_ok=True)

    def log(self, rank: int) -> Path:
        """Where worker `rank`'s third parties write."""
        return self.path / f"log-rank{rank}.txt"

    def make(self) -> None:
        """Make the folder; raises StorageError."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"{self.path}: cannot be made ({error.strerror}); output=FOLDER chooses another"
            ) from None

    def claim(self, resume: bool) -> None:
        """Make the folder; raises ConfigError if an earlier run's checkpoints lie there and it is not to be resumed."""
        self.make()
        if self.is_taken() and not resume:
            raise ConfigError(
                f"{self.path}: holds an earlier run. --resume goes on with it, --restart sets it aside and begins "
                "anew, name=OTHER leaves it alone"
            )
        reserve = self.path / _RESERVE
        with contextlib.suppress(OSError):
            if not reserve.exists():
                reserve.write_bytes(bytes(_RESERVE_BYTES))

    def make_room(self) -> None:
        """Give up what `claim` has set aside, so that a full disk takes the last words of a job."""
        with contextlib.suppress(OSError):
            (self.path / _RESERVE).unlink(missing_ok=True)

    def is_taken(self) -> bool:
        """Whether a run has left a checkpoint or a summary here."""
        return self.summary.exists() or any(self.checkpoints.glob("step-*"))

    def set_aside(self) -> Path | None:
        """Rename the folder to NAME.1 (or the next free number), so that nothing in it is lost; None without one."""
        if not self.is_taken():
            return None
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        self.path.rename(aside)
        return aside

    def read(self, name: str) -> dict[str, Any]:
        """A JSON object that lies here; empty if there is none or it is damaged."""
        try:
            content = json.loads((self.path / name).read_text())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def write(self, name: str, content: Mapping[str, Any]) -> Path:
        """Write a JSON object whole; raises StorageError."""
        path = self.path / name
        try:
            write_text(path, json.dumps(content, indent=1, default=str) + "\n")
        except OSError as error:
            raise StorageError(f"{path}: cannot be written ({error.strerror}); free some space and --resume") from None
        return path

    def append_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Add a line to metrics.jsonl; raises StorageError."""
        try:
            with self.metrics.open("a") as file:
                file.write(json.dumps({"step": step, "time_s": round(time.time(), 3), **metrics}) + "\n")
        except OSError as error:
            raise StorageError(f"{self.metrics}: cannot be written ({error.strerror}); free some space") from None

    def forget_after(self, step: int, unevaluated: bool = False) -> None:
        """Drop the metrics after `step`, which a resumed run measures again, and those of a line cut short.

        Args:
            unevaluated: `step` itself is still to be evaluated; drop what was recorded of that as well.
        """
        if not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            again = unevaluated and record["step"] == step and any(name.startswith("val/") for name in record)
            if record["step"] <= step and not again:
                kept.append(line + "\n")
        write_text(self.metrics, "".join(kept))

    def forget_error(self, before: float) -> None:
        """Remove an earlier job's error.json: one that was written before this time, seconds since the epoch."""
        with contextlib.suppress(OSError):
            if self.error.stat().st_mtime < before:
                self.error.unlink()

    def report_error(self, error: BaseException) -> None:
        """Say in error.json why this worker failed, unless another has: the first failure causes the others."""
        known = isinstance(error, LorotError)
        message = str(error) if known else f"unexpected {type(error).__name__}: {error}"
        content = {
            "type": type(error).__name__,
            "message": message,
            "exit_code": error.exit_code if isinstance(error, LorotError) else 1,
        }
        try:
            with self.error.open("x") as file:
                json.dump(content, file)
        except FileExistsError:
            return
        except OSError:
            # Nothing can be written here; the log has this error too. What is cut short would be in another's way.
            with contextlib.suppress(OSError):
                self.error.unlink()


def parse_metrics(lines: Iterable[str | bytes]) -> list[dict[str, float]]:
    """The records in lines of a metrics.jsonl, numbers only; a line that holds none is left out.

    A job writes what it likes: integers that no float holds, which nobody could reckon with, are left out.
    """
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and is_count(record.get("step")):
            numbers = {key: value for key, value in record.items() if isinstance(value, float) or is_count(value)}
            records.append(numbers)
    return records


def is_count(value: object) -> TypeGuard[int]:
    """Whether it is an integer that a float holds exactly; True and False are none."""
    return type(value) is int and abs(value) <= _MOST_COUNTED
