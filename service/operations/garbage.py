"""What of ended jobs nobody needs any more: found first, with sizes, and then removed, or only told.

Never touched: anything of a job that waits or runs, or that such a job's configuration names; the checkpoint that a
failed or stopped job would go on from; artifacts and registered models; a folder that a living process holds; links.
"""

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from service import resolution
from service.jobs.job import Job
from service.jobs.settings import ServiceSettings
from service.operations import checkpoints, removal

DAY_S = 86400.0
_ID = re.compile(r"[0-9a-f]{32}")
# The run, and earlier ones that a retry has set aside.
_RUN = re.compile(r"run(\.[0-9]+)?")
_LOG = re.compile(r"log-node[0-9]+\.txt")
_CACHED = re.compile(r"[0-9a-f]{64}|\.fetching-.*")
# On its way out, or never finished. One that has stepped aside (.old) may be the only one of its step.
_LEFTOVER = re.compile(r"\.(step-[0-9]{8,}(\.writing(\.leaving)?|\.leaving)|[0-9a-f]{32}\.leaving)")
_CHECKPOINTS = "checkpoints"

Kind = Literal["checkpoint", "log", "folder", "model", "leftover"]


@dataclass(frozen=True)
class Rules:
    """What counts as needed.

    Attributes:
        older_than_s: since a job's end; nothing younger goes.
        keep_last: newest checkpoints of each run that stay in any case.
        experiments: of these alone; empty: of all, and what belongs to no job.
        drop_resumable: let those go too that failed and stopped jobs would go on from.
        log_bytes: what stays of an attempt's log.
    """

    older_than_s: float = 30 * DAY_S
    keep_last: int = 0
    experiments: tuple[str, ...] = ()
    drop_resumable: bool = False
    log_bytes: int = 10_000_000


@dataclass(frozen=True)
class Item:
    """One thing to remove.

    Attributes:
        kind: a checkpoint, a log that is cut, the folder of a job without a record, a model that was fetched from a
            server, or what a process has left that was killed.
        root, parts: where it lies.
        num_bytes: that come free.
        why: in a few words.
        job: whose it is; "" for nobody's.
    """

    kind: Kind
    root: Path
    parts: tuple[str, ...]
    num_bytes: int
    why: str
    job: str = ""

    @property
    def path(self) -> Path:
        return self.root.joinpath(*self.parts)


@dataclass
class Findings:
    """What would go, and what was left alone for a reason that a person should know."""

    items: list[Item] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return sum(item.num_bytes for item in self.items)


def find(
    settings: ServiceSettings,
    jobs: Sequence[Job],
    rules: Rules,
    is_unknown: Callable[[str], bool],
    now_s: float | None = None,
) -> Findings:
    """Look for what can go; changes nothing.

    Args:
        jobs: all in the record.
        is_unknown: whether the record has no run of this id, not even a deleted one; raises if it cannot be asked.
        now_s: seconds since the epoch.
    """
    now_s = time.time() if now_s is None else now_s
    found = Findings()
    results = settings.results.resolve()
    needed = named_by(job for job in jobs if not job.has_ended)
    for job in sorted(jobs, key=lambda job: job.id):
        age_s = now_s - job.ended_s
        experiment = job.spec.experiment or settings.experiment
        if not job.has_ended or not job.ended_s or age_s < rules.older_than_s:
            continue
        if rules.experiments and experiment not in rules.experiments:
            continue
        if not removal.is_folder(results, (job.id,)):
            if (results / job.id).is_symlink():
                found.notes.append(f"{results / job.id}: is a link and is left alone")
        elif job.id in needed:
            found.notes.append(f"{results / job.id}: a job that has not ended names it; it is left alone")
        elif _is_worked_in(results, job.id, now_s):
            found.notes.append(f"{results / job.id}: a process still works there; it is left alone")
        else:
            found.items += _of_job(results, job, f"{job.state} {_shown(age_s)} ago", rules, found.notes)
    if not rules.experiments:
        found.items += _orphans(results, {job.id for job in jobs}, is_unknown, rules, now_s, found.notes)
        found.items += _cached(resolution.cache_folder() / "models", rules, now_s)
    return found


def remove(
    found: Findings,
    has_ended: Callable[[str], bool],
    rules: Rules,
    say: Callable[[Item], object] = lambda item: None,
) -> list[str]:
    """Remove what was found; returns what could not be, with the reason.

    Args:
        has_ended: asks the record anew whether a job still is as it was found: somebody may have resumed it since.
        rules: as it was found by.
        say: is told each thing, before it goes.
    """
    problems = []
    ended: dict[str, bool] = {}
    for item in found.items:
        if item.job and item.job not in ended:
            ended[item.job] = has_ended(item.job)
            if not ended[item.job]:
                problems.append(f"job {item.job} has been started again; what is left of it stays")
        if not ended.get(item.job, True):
            continue
        if item.kind != "model" and _is_worked_in(item.root, item.parts[0]):
            problems.append(f"{item.path}: a process works there by now; it stays")
            continue
        say(item)
        try:
            if item.kind == "log":
                removal.trim(item.root, item.parts, rules.log_bytes)
            else:
                removal.remove(item.root, item.parts)
        except FileNotFoundError:
            continue
        except (OSError, RecursionError) as error:
            problems.append(f"{item.path}: cannot be removed ({getattr(error, 'strerror', None) or error})")
    return problems


def _of_job(results: Path, job: Job, ended: str, rules: Rules, notes: list[str]) -> Iterator[Item]:
    """Of a job that has ended long enough ago."""
    for run in (name for name in removal.names(results, (job.id,)) if _RUN.fullmatch(name)):
        place = (job.id, run, _CHECKPOINTS)
        for name in removal.names(results, place):
            if _LEFTOVER.fullmatch(name) and removal.is_folder(results, (*place, name)):
                yield _item("leftover", results, (*place, name), "left by a process that was killed", job.id)
        stay = set(checkpoints.find(results, place)[: rules.keep_last])
        if run == "run" and job.state != "finished" and not rules.drop_resumable:
            sound = next(
                (own for own in checkpoints.find(results, place) if checkpoints.is_sound(results, (*place, own))), None
            )
            if sound is None:
                if checkpoints.find(results, place):
                    notes.append(
                        f"{results.joinpath(*place)}: no checkpoint is sound; they stay for a person to look at"
                    )
                continue
            stay.add(sound)
        for name in checkpoints.find(results, place):
            if name not in stay:
                yield _item("checkpoint", results, (*place, name), ended, job.id)
    for number in removal.names(results, (job.id, "attempts")):
        for log in removal.names(results, (job.id, "attempts", number)):
            parts = (job.id, "attempts", number, log)
            state = removal.state_of(results, parts) if _LOG.fullmatch(log) else None
            if state is not None and state.st_size > rules.log_bytes:
                why = f"{ended}; the last {rules.log_bytes / 1e6:g} MB stay"
                yield Item("log", results, parts, state.st_size - rules.log_bytes, why, job.id)


def _orphans(
    results: Path,
    known: set[str],
    is_unknown: Callable[[str], bool],
    rules: Rules,
    now_s: float,
    notes: list[str],
) -> Iterator[Item]:
    """Folders of jobs that the record knows nothing of, not even that they were deleted."""
    entries = removal.names(results)
    for name in entries:
        if _LEFTOVER.fullmatch(name) and removal.is_folder(results, (name,)):
            yield _item("leftover", results, (name,), "left by a process that was killed")
    folders = [name for name in entries if _ID.fullmatch(name) and removal.is_folder(results, (name,))]
    strange = [name for name in folders if name not in known]
    if strange and len(strange) == len(folders):
        notes.append(
            f"{results}: the record knows none of the {len(folders)} job folders there, so none of them is removed; "
            "are these the right settings?"
        )
        return
    least_s = max(DAY_S, rules.older_than_s)
    for name in strange:
        num_bytes, newest_s = removal.measure(results, (name,))
        if now_s - newest_s < least_s or not is_unknown(name):
            continue
        if _is_worked_in(results, name, now_s):
            notes.append(f"{results / name}: is in no record, but a process still works there; it is left alone")
            continue
        yield Item("folder", results, (name,), num_bytes, f"in no record, untouched for {_shown(now_s - newest_s)}")


def _cached(models: Path, rules: Rules, now_s: float) -> Iterator[Item]:
    """Models from a server; one that is needed again is fetched again."""
    for name in removal.names(models):
        if (_CACHED.fullmatch(name) or removal.is_leaving(name)) and removal.is_folder(models, (name,)):
            num_bytes, newest_s = removal.measure(models, (name,), by_reading=True)
            if now_s - newest_s >= max(DAY_S, rules.older_than_s):
                yield Item("model", models, (name,), num_bytes, f"unused for {_shown(now_s - newest_s)}")


def _is_worked_in(results: Path, job: str, now_s: float | None = None) -> bool:
    runs = (name for name in removal.names(results, (job,)) if _RUN.fullmatch(name))
    return any(checkpoints.is_held(results, (job, run), now_s) for run in runs) or checkpoints.is_run(results, job)


def named_by(jobs: Iterable[Job]) -> set[str]:
    """Every run id that these jobs' specs hold: weights to start from may lie in another job's folder."""
    return {own for job in jobs for own in _ID.findall(json.dumps(job.spec.model_dump(mode="json")))}


def _item(kind: Kind, root: Path, parts: tuple[str, ...], why: str, job: str = "") -> Item:
    return Item(kind, root, parts, removal.measure(root, parts)[0], why, job)


def _shown(seconds: float) -> str:
    return f"{seconds / DAY_S:.0f} days" if seconds >= 2 * DAY_S else f"{seconds / 3600:.0f} hours"
