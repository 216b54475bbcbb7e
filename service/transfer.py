"""A detector trained on a registered model: `lorot detect` and `lorot segment`. Imports no torch.

What is started is a training job like any other, of a configuration with `job: detect` or `job: segment`. Here the
model is found, pinned to its version and looked at before any worker starts.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console
from rich.table import Table

from service import bundle, config, config_file, lineage, resolution, splits, store
from service.bundle import Card
from service.config import DetectionConfig
from service.errors import ConfigError, JobError
from service.jobs import local
from service.lineage import Earlier
from service.resolution import Resolved
from service.run_folder import RunFolder

# The configurations that are used unless another one is named.
CONFIGS = MappingProxyType({"detect": "downstream/coco-retinanet.yaml", "segment": "downstream/coco-solov2.yaml"})
_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Transfer:
    """A detector's job that can be started, looked for, or gone on with.

    Attributes:
        path, overrides: its configuration, as the launcher takes it, with the model pinned to its version.
        job: the configuration itself.
        card, resolved: the model's.
    """

    path: Path
    overrides: tuple[str, ...]
    job: DetectionConfig
    card: Card
    resolved: Resolved


def prepare(
    job: str,
    model: str,
    *,
    path: Path | None = None,
    data: str | None = None,
    root: Path | str | None = None,
    overrides: Sequence[str] = (),
    tracking_uri: str | None = None,
    goes_on: bool = False,
) -> Transfer:
    """Find the model, and make the job's configuration: `path`, the options on top of it, then the overrides.

    A run that neither the configuration nor an override names is called JOB-NAME-VERSION, as detect-lorot-imagenet-3.

    Args:
        job: "detect" or "segment".
        model: models:/NAME@ALIAS, models:/NAME/VERSION, runs:/RUN_ID, or a bundle's folder.
        path: configuration; default: that of `CONFIGS`.
        data, root: of the data set.
        goes_on: with a run that is there. If it has a name, its folder is looked into first: what it began with is
            taken from there, and neither server nor alias is asked, if that is a version of the model that is given.

    Raises:
        ConfigError: the configuration is wrong, or that of another job.
        CheckpointError: there is no such model, alias or version (which there are), or it is damaged or half written.
        TrackingError: the tracking server does not answer.
    """
    path = path if path is not None else config_file.shipped(CONFIGS[job])
    _refuse_another(job, model, overrides)
    options = [("data.name", data), ("data.root", root), ("tracking.uri", tracking_uri)]
    given = [*(f"{key}={json.dumps(str(value))}" for key, value in options if value is not None), *overrides]

    def load(*more: str, backbone: str) -> DetectionConfig:
        found = config.load_any(path, [*given, f"job={job}", f"model.backbone={json.dumps(backbone)}", *more])
        assert isinstance(found, DetectionConfig), "`job` is given"
        return found

    # Its own mistakes are told before a server is asked.
    first = load(backbone=model)
    name = _given_name(path, overrides) or _name_of(job, model)
    resolved = _kept(RunFolder(first.output / name), model) if goes_on and name else None
    if resolved is None:
        resolved = resolution.resolve(model, first.tracking.uri)
    card = bundle.read_card(resolved.folder)
    bundle.read_checked(resolved.folder / bundle.WEIGHTS, card.weights_sha256)
    if not name:
        about = f"{resolved.name}-{resolved.version}" if resolved.name else resolved.run_id or resolved.folder.name
        name = _name(f"{job}-{about}")
    everything = [*given, f"job={job}", f"model.backbone={json.dumps(resolved.uri)}", f"name={json.dumps(name)}"]
    found = load(f"name={json.dumps(name)}", backbone=resolved.uri)
    return Transfer(path, tuple(everything), found, card, resolved)


def earlier(transfer: Transfer) -> Earlier | None:
    """The newest finished result of this very job: same weights, same data, same settings; None if there is none.

    Raises:
        DataError: the data cannot be opened.
        TrackingError: the tracking server does not answer.
    """
    train_set, eval_set = splits.load(transfer.job)
    found = lineage.find_downstream(
        transfer.job.job,
        transfer.card.weights_sha256,
        data_digest=lineage.split_digest(train_set.digest, eval_set.digest),
        config_digest=transfer.job.digest,
        tracking_uri=transfer.job.tracking.uri,
    )
    return found[0] if found else None


def run(
    transfer: Transfer,
    *,
    resume: bool = False,
    restart: bool = False,
    eval_only: bool = False,
    launch: Mapping[str, Any] = _NOTHING,
    say: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Train and evaluate; returns the result, which also lies in the run folder as JOB.json.

    Args:
        resume, restart: as for `local.run`.
        eval_only: evaluate the detector of a finished run once more, and record that.
        launch: what else `local.run` takes: workers, port, nnodes, rdzv, run_id, max_restarts.

    Raises:
        ConfigError: `eval_only`, and no run has finished there.
        LorotError: as `local.run`.
    """
    folder = RunFolder(transfer.job.folder)
    if eval_only and not folder.summary.exists():
        raise ConfigError(
            f"{folder.path}: --eval-only evaluates a finished run again, and none is there; leave it away, or say "
            "which with name=NAME or output=FOLDER"
        )
    job, card = transfer.job, transfer.card
    say(f"{job.model.name} on {card.model['name']} of {transfer.resolved.uri}, {job.data.name} in {job.data.root}")
    local.run(transfer.path, transfer.overrides, resume=resume or eval_only, restart=restart, say=say, **launch)
    result = folder.read(f"{job.job}.json")
    if not result:
        raise JobError(f"{folder.path}: the job has left no {job.job}.json there; see log-rank0.txt beside it")
    return result


_ROWS = {
    "AP": "mean of IoU 0.50 to 0.95",
    "AP50": "at IoU 0.50",
    "AP75": "at IoU 0.75",
    "APs": "objects below 32 x 32 pixels",
    "APm": "objects of 32 x 32 to 96 x 96 pixels",
    "APl": "objects above 96 x 96 pixels",
}


def show(transfer: Transfer, result: Mapping[str, Any], console: Console) -> None:
    """Print a result of `run`, in per cent."""
    what = {"detect": "box", "segment": "mask"}[transfer.job.job]
    table = Table.grid(padding=(0, 2))
    scores = result["scores"]
    for name, meaning in _ROWS.items():
        if name in scores:
            table.add_row(f"{what} {name}", f"{100 * scores[name]:.1f}", meaning)
    console.print(f"{result['detector']} on {result['data']}/{result['split']}, {result['model_uri']}", markup=False)
    console.print(table, markup=False, highlight=False)
    place = store.shown(transfer.job.tracking.uri or store.default_uri())
    console.print(f"run {result['record_id']} in {place}; the files are in {transfer.job.folder}", markup=False)


def _refuse_another(job: str, model: str, overrides: Sequence[str]) -> None:
    """Raises ConfigError if overrides make it another job, or let it begin with another model than `model`."""
    said: dict[str, Any] = {}
    for override in overrides:
        config_file.assign(said, override)
    if (other := said.get("job", job)) != job:
        advice = (
            f"`lorot {other}` is that job's command" if str(other) in CONFIGS else "`lorot train` takes a configuration"
        )
        raise ConfigError(f"override job={other}: this is `lorot {job}`; {advice}")
    own = said.get("model")
    if isinstance(own, dict) and own.get("backbone", model) != model:
        raise ConfigError(
            f"override model.backbone={own['backbone']}: the job would begin with that, and be recorded at {model}; "
            f"say it with --model {own['backbone']}"
        )


def _given_name(path: Path, overrides: Sequence[str]) -> str | None:
    """The run's name as the configuration or an override has it."""
    values = config_file.read(path)
    for override in overrides:
        config_file.assign(values, override)
    name = values.get("name")
    return None if name is None else str(name)


def _name_of(job: str, model: str) -> str | None:
    """The name of a run on a version that is given as such, which nobody need be asked for."""
    version = re.fullmatch(r"models:/+([^/:@]+)/([0-9]{1,18})", model)
    return _name(f"{job}-{version[1]}-{int(version[2])}") if version else None


def _kept(folder: RunFolder, model: str) -> Resolved | None:
    """The copy of the model that the run began with; None without one, or if `model` says that it is another's."""
    kept = lineage.kept_backbone(folder)
    if kept is None:
        return None
    alias = re.fullmatch(r"models:/+([^/:@]+)@[^/:@]+", model)
    # An alias may have moved on since; which version of that model it is, the run knows.
    return kept if model == kept.uri or (alias is not None and alias[1] == kept.name) else None


def _name(text: str) -> str:
    """A run's name out of any text."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._") or "detector"
