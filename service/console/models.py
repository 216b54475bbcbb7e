"""What the pages of registered models show: versions, where they come from, what was found out about them since."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from service import registry, store
from service.api.questions import LONG_S, Questions
from service.errors import LorotError, UnknownJobError
from service.lineage import DATA, DOWNSTREAM, is_measured
from service.registry import Row


@dataclass(frozen=True)
class Finding:
    """What one downstream job found out about a version: its numbers, by which run, on which data."""

    job: str
    metrics: Mapping[str, float]
    run_id: str = ""
    data_digest: str = ""


@dataclass(frozen=True)
class Origin:
    """Where a version comes from, besides what its row says.

    Attributes:
        experiment_id, run_status: of the run that trained it; "" if the run is gone.
        init_from: the model that training began with; "" for none.
        commit: of the code.
        imported: what an imported model says of its file.
        weights_sha256: of the weights.
    """

    experiment_id: str = ""
    run_status: str = ""
    init_from: str = ""
    commit: str = ""
    imported: Mapping[str, str] = field(default_factory=dict)
    weights_sha256: str = ""
    findings: tuple[Finding, ...] = ()


class Shelf:
    """What the registry has, as the service's questions to MLflow tell it: some seconds old at most.

    Args:
        uri: MLflow.
    """

    def __init__(self, uri: str, questions: Questions) -> None:
        self._uri = uri
        self._questions = questions

    def rows(self) -> list[Row]:
        """Every version; raises TrackingError."""
        # By the key that the API asks by, so that one answer does for both.
        return self._questions.ask(("rows", self._uri), lambda: registry.list_models(self._uri), LONG_S)

    def versions(self, name: str) -> list[Row]:
        """The versions of a model, newest first; raises UnknownJobError if there is none, TrackingError."""
        rows = self.rows()
        found = [row for row in rows if row.name == name]
        if not found:
            names = sorted({row.name for row in rows})
            raise UnknownJobError(f"no registered model {name!r}; registered: {', '.join(names) or 'none yet'}")
        return found

    def version(self, name: str, number: int) -> Row:
        """One version; raises UnknownJobError, TrackingError."""
        versions = self.versions(name)
        found = next((row for row in versions if row.version == number), None)
        if found is None:
            known = ", ".join(str(row.version) for row in versions[:20])
            raise UnknownJobError(f"{name} has no version {number}; versions: {known}")
        return found

    def made_by(self, run_id: str) -> list[tuple[str, int]]:
        """(name, version) of what a run has registered; none if the registry cannot be asked just now."""
        try:
            return self._questions.ask(("made by", run_id), lambda: _made_by(self._uri, run_id))
        except LorotError:
            return []

    def origin(self, row: Row) -> Origin:
        """Where a version comes from; raises TrackingError."""
        return self._questions.ask(("origin", row.name, row.version), lambda: _origin(self._uri, row), LONG_S)


def grouped(rows: Sequence[Row]) -> list[tuple[str, Row, Row | None]]:
    """(name, newest version, the version that is `best`) of every model."""
    names: dict[str, list[Row]] = {}
    for row in rows:
        names.setdefault(row.name, []).append(row)
    return [
        (name, versions[0], next((row for row in versions if "best" in row.aliases), None))
        for name, versions in names.items()
    ]


def headline(metrics: Mapping[str, float]) -> tuple[str, float] | None:
    """The metric that a list shows of a model."""
    for name in ("val/top1", "val/AP", "val/top5"):
        if name in metrics:
            return name, metrics[name]
    return next(iter(sorted(metrics.items())), None)


def commands(row: Row) -> list[tuple[str, str]]:
    """(what for, what to type) of a version."""
    alias = next((alias for alias in ("best", *row.aliases) if alias in row.aliases), None)
    uri = shlex.quote(f"models:/{row.name}@{alias}" if alias else f"models:/{row.name}/{row.version}")
    start = shlex.quote(f"model.init_from=models:/{row.name}/{row.version}")
    return [
        ("Find out where it looks", f"lorot wsol --model {uri}"),
        ("Train a detector on it", f"lorot detect --model {uri} --data coco --root data/coco"),
        ("Begin another training from it", f"lorot train configs/train/imagenet-lorot_e.yaml {start}"),
        ("Write it for another tool", f"lorot export --model {uri} --to onnx --output model.onnx"),
    ]


def python(row: Row) -> str:
    """How a program loads it."""
    uri = f"models:/{row.name}/{row.version}"
    return f"from service import registry\n\nmodel, card, found = registry.load({uri!r})"


def _made_by(uri: str, run_id: str) -> list[tuple[str, int]]:
    if (path := store.sqlite_path(uri)) is not None and not path.exists():
        return []
    api = store.client(uri)
    with store.explained(uri):
        versions = list(store.pages(api.search_model_versions, filter_string=f"run_id='{run_id}'"))
    return sorted((found.name, int(found.version)) for found in versions)


def _origin(uri: str, row: Row) -> Origin:
    api = store.client(uri)
    run = None
    with store.explained(uri):
        tags = api.get_model_version(row.name, str(row.version)).tags
        with store.passing_over("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            run = api.get_run(row.run_id) if row.run_id else None
    params = run.data.params if run else {}
    init_from = params.get("model.init_from", "")
    return Origin(
        experiment_id=run.info.experiment_id if run else "",
        run_status=run.info.status if run else "",
        init_from="" if init_from in ("null", "None") else init_from,
        commit=run.data.tags.get("git.commit", "") if run else "",
        imported={key.removeprefix("origin."): text for key, text in tags.items() if key.startswith("origin.")},
        weights_sha256=tags.get("weights_sha256", ""),
        findings=_findings(tags, row),
    )


def _findings(tags: Mapping[str, str], row: Row) -> tuple[Finding, ...]:
    jobs = sorted({key.removeprefix(DOWNSTREAM).partition(".")[0] for key in tags if key.startswith(DOWNSTREAM)})
    return tuple(
        Finding(
            job,
            {
                key.removeprefix(f"{job}."): value
                for key, value in row.downstream.items()
                if key.startswith(f"{job}.") and is_measured(key)
            },
            tags.get(f"{DOWNSTREAM}{job}.run_id", ""),
            tags.get(f"{DOWNSTREAM}{job}.{DATA}", ""),
        )
        for job in jobs
    )


__all__ = ["Finding", "Origin", "Shelf", "commands", "grouped", "headline", "python"]
