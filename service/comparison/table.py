"""From results to the table: one block for each job and set of images, a row for each group, numbers with their spread.

A number is a group's mean over its models, trained apart from one another; a model's own value is the mean over the
seeds of its detectors, since they are no independent models. Of a group with one model the spread is that of the seeds.
Results on different images never share a block, and printed numbers never share a column with ours.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines import datasets
from service.comparison import published
from service.comparison.course import Outcome
from service.comparison.entrants import Entrant, Field, Group
from service.comparison.measurement import JOBS, Missing, Place, Result
from service.comparison.spread import Paired, Spread, paired, spread
from service.errors import ConfigError, LorotError

_THRESHOLDS = ("0.5", "0.6", "0.7", "0.8", "0.9")
_AP = (("AP", "AP"), ("AP50", "AP at IoU 0.5"), ("AP75", "AP at IoU 0.75"))
# By kind of block: (metric, title). What `lorot wsol` calls them, the largest connected component's box unless said.
COLUMNS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "classify": (("val/top1", "top-1"), ("val/top5", "top-5")),
    "wsol": (
        ("top1_loc@0.5", "top-1 loc."),
        ("top5_loc@0.5", "top-5 loc."),
        ("max_box_acc", "MaxBoxAcc"),
        ("max_box_acc_v2", "MaxBoxAccV2"),
        # Beside the others it would look smaller than what it bounds.
        ("zhou/gt_known@0.5", "GT-known, CAM 0.2"),
        ("centre_box@0.5", "centre box"),
    ),
    "wsol-cam": tuple((f"cam/top1_loc@{value}", value) for value in _THRESHOLDS),
    "wsol-iou": tuple((f"iou/top1_loc@{value}", value) for value in _THRESHOLDS),
    "detect": _AP,
    "segment": _AP,
}
KINDS: Mapping[str, tuple[str, ...]] = {
    "wsol": ("wsol", "wsol-cam", "wsol-iou"),
    "detect": ("detect",),
    "segment": ("segment",),
}
TITLES: Mapping[str, str] = {
    "classify": "Classification",
    "wsol": "Localization at the best CAM threshold, protocol {variant}",
    "wsol-cam": "Top-1 localization by CAM threshold at IoU 0.5, protocol {variant}",
    "wsol-iou": "Top-1 localization by IoU threshold at the best CAM threshold, protocol {variant}",
    "detect": "Detection: RetinaNet on each model, box AP",
    "segment": "Segmentation: SOLOv2 on each model, mask AP",
}


@dataclass(frozen=True)
class Value:
    """An independent value: of a model, or of one of its seeds if there is only one model.

    Attributes:
        model: its title. seed: by which it is paired with others; None if unknown.
        run_ids: whose results it is the mean of.
    """

    model: str
    seed: int | None
    run_ids: tuple[str, ...]
    value: float


@dataclass(frozen=True)
class Cell:
    """What a group reaches in one metric: fractions, but for `published`, in per cent as it is printed.

    Attributes:
        paired: against the baseline, seed by seed; None for itself, and with fewer than two pairs.
        published: the printed number of the same setting; None without one.
    """

    metric: str
    values: tuple[Value, ...]
    spread: Spread | None
    paired: Paired | None = None
    published: float | None = None


@dataclass(frozen=True)
class Row:
    """A group within a block.

    Attributes:
        over: what the spread is over, "models" or "seeds".
        num_runs: results that went in. num_missing: that could not be had.
        unlike: why the printed numbers are of another setting; empty if they are of the same.
    """

    group: str
    over: str
    cells: tuple[Cell, ...]
    num_runs: int
    num_missing: int
    unlike: tuple[str, ...]


@dataclass(frozen=True)
class Apart:
    """Printed numbers of another setting: shown by themselves, never beside ours.

    Attributes:
        source: where they are printed. data: what they were measured on.
        rows: per cent, by method and metric. reasons: in what the settings differ.
    """

    source: str
    data: str
    rows: Mapping[str, Mapping[str, float]]
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """One job on one set of images.

    Attributes:
        kind: key of `COLUMNS`. variant: a localization's protocol, else "".
        images: what was measured on, for people; empty if nothing was.
        source: of the printed numbers in its rows; empty without any.
    """

    kind: str
    variant: str
    title: str
    images: str
    rows: tuple[Row, ...]
    source: str
    apart: Apart | None


@dataclass(frozen=True)
class Comparison:
    """All that is shown; `baseline` is the group that the others are paired with."""

    baseline: str
    field: Field
    blocks: tuple[Block, ...]
    outcome: Outcome


@dataclass(frozen=True)
class _Found:
    """A result of one model, whatever the job: `seed` is the detector's, or that of the only training."""

    entrant: Entrant
    seed: int | None
    run_id: str
    metrics: Mapping[str, float]
    unlike: tuple[str, ...]


def build(field: Field, jobs: Sequence[str], outcome: Outcome, baseline: str | None = None) -> Comparison:
    """The table of what there is; raises ConfigError if no group is called `baseline`."""
    reference = _baseline(field, baseline)
    blocks = [*_classification(field, reference)]
    for job in (job for job in JOBS if job in jobs):
        blocks += _blocks(job, field, outcome, reference)
    return Comparison(reference.name, field, tuple(blocks), outcome)


def _baseline(field: Field, name: str | None) -> Group:
    if name is None:
        return field.groups[0]
    found = next((group for group in field.groups if group.name == name), None)
    if found is None:
        known = ", ".join(repr(group.name) for group in field.groups)
        raise ConfigError(f"--baseline {name!r}: there is no such group; there are {known}")
    return found


def _classification(field: Field, baseline: Group) -> list[Block]:
    """What the models' cards say of their own evaluation; models that were evaluated on other images stand apart."""
    sets: dict[tuple[str, str, str], list[_Found]] = {}
    for entrant in field.entrants:
        card = entrant.card
        run_id = entrant.resolved.run_id or card.run_id
        one = _Found(entrant, entrant.seed, run_id, card.metrics, _unlike_classification(entrant))
        sets.setdefault((card.data or "unknown data", card.split, card.data_digest), []).append(one)
    blocks = []
    for (data, split, digest), found in sets.items():
        images = f"{data}/{split}, of the data set {digest[:12] or 'without a digest'}"
        blocks.append(_block("classify", "", images, field, found, (), baseline))
    return blocks


def _unlike_classification(entrant: Entrant) -> tuple[str, ...]:
    card = entrant.card
    if unlike := published.differences(card):
        return unlike
    try:
        return published.other_images(datasets.load(card.data, card.root, card.split, **card.data_options))
    except LorotError as error:
        return (f"the images that it was evaluated on cannot be looked at ({error})",)


def _blocks(job: str, field: Field, outcome: Outcome, baseline: Group) -> list[Block]:
    results = [result for result in outcome.results if result.place.job == job]
    missing = [one for one in outcome.missing if one.place.job == job]
    by_variant = job == "wsol"

    def variant(place: Place) -> str:
        return place.variant if by_variant else ""

    blocks = []
    for own in dict.fromkeys(
        variant(place) for place in [one.place for one in results] + [one.place for one in missing]
    ):
        sets: dict[str, list[Result]] = {}
        for result in results:
            if variant(result.place) == own:
                sets.setdefault(result.images.digest, []).append(result)
        lost = tuple(one for one in missing if variant(one.place) == own)
        for kind in KINDS[job]:
            for number, members in enumerate(sets.values() or [[]]):
                images = ""
                if members:
                    on = members[0].images
                    images = f"{on.name}/{on.split}, {on.count:,} images, digest {on.digest[:12]}"
                found = [_found(result) for result in members]
                blocks.append(_block(kind, own, images, field, found, lost if number == 0 else (), baseline))
    return blocks


def _found(result: Result) -> _Found:
    place = result.place
    seed = place.entrant.seed if place.job == "wsol" else int(place.variant)
    return _Found(place.entrant, seed, result.run_id, result.metrics, result.unlike_published)


def _block(
    kind: str,
    variant: str,
    images: str,
    field: Field,
    found: Sequence[_Found],
    missing: Sequence[Missing],
    baseline: Group,
) -> Block:
    columns, printed = COLUMNS[kind], published.TABLES.get(kind)
    values = {group.name: {metric: _values(group, found, metric) for metric, _ in columns} for group in field.groups}
    rows, aside, reasons = [], {}, []
    for group in field.groups:
        own = [one for one in found if one.entrant in group.entrants]
        lost = sum(one.place.entrant in group.entrants for one in missing)
        if not own and not lost:
            continue
        names = {published.method(entrant.card) for entrant in group.entrants}
        name = next(iter(names)) if len(names) == 1 else None
        unlike = tuple(dict.fromkeys(reason for one in own for reason in one.unlike))
        line = dict(printed.values.get(name or "", {})) if printed is not None else {}
        beside = line if own and not unlike else {}
        if line and own and unlike:
            aside[str(name)] = line
            reasons += [reason for reason in unlike if reason not in reasons]
        cells = []
        for metric, _ in columns:
            ours, theirs = values[group.name][metric], values[baseline.name][metric]
            pairs = None if group is baseline else _pairs(group, ours, baseline, theirs)
            cells.append(Cell(metric, ours, spread([one.value for one in ours]), pairs, beside.get(metric)))
        rows.append(Row(group.name, _over(group, found), tuple(cells), len({one.run_id for one in own}), lost, unlike))
    shown = any(cell.published is not None for row in rows for cell in row.cells)
    source = printed.source if printed is not None and shown else ""
    apart = Apart(printed.source, printed.data, aside, tuple(reasons)) if printed is not None and aside else None
    return Block(kind, variant, TITLES[kind].format(variant=variant), images, tuple(rows), source, apart)


def _over(group: Group, found: Iterable[_Found]) -> str:
    """Whether a group's independent values are its models, or the seeds of what was made of its only one."""
    own = [one for one in found if one.entrant in group.entrants]
    return "seeds" if len(group.entrants) == 1 and len(own) > 1 else "models"


def _values(group: Group, found: Sequence[_Found], metric: str) -> tuple[Value, ...]:
    over = _over(group, found)
    values = []
    for entrant in group.entrants:
        own = [one for one in found if one.entrant is entrant and math.isfinite(one.metrics.get(metric, math.nan))]
        if over == "seeds":
            values += [Value(entrant.title, one.seed, (one.run_id,), one.metrics[metric]) for one in own]
        elif own:
            mean = sum(one.metrics[metric] for one in own) / len(own)
            values.append(Value(entrant.title, entrant.seed, tuple(one.run_id for one in own), mean))
    return tuple(values)


def _pairs(group: Group, ours: Sequence[Value], baseline: Group, theirs: Sequence[Value]) -> Paired | None:
    """Seed by seed, where both learnt from the same images; None with fewer than two pairs."""
    if len({entrant.card.data_digest for entrant in (*group.entrants, *baseline.entrants)}) > 1:
        return None
    if (len(group.entrants) == 1) != (len(baseline.entrants) == 1):
        # Seeds of trainings on one side, of detectors on the other.
        return None
    found = paired(_by_seed(ours), _by_seed(theirs))
    return found if found is not None and len(found.seeds) > 1 else None


def _by_seed(values: Sequence[Value]) -> dict[int, float]:
    """Values by their seed; a seed that is there twice pairs with nothing."""
    seeds = [one.seed for one in values]
    return {one.seed: one.value for one in values if one.seed is not None and seeds.count(one.seed) == 1}


def as_json(found: Comparison) -> dict[str, Any]:
    """Plain values only; `table` is the same whenever the results are."""
    return {
        "format": 1,
        "table": {
            "baseline": found.baseline,
            "groups": [_group_json(group) for group in found.field.groups],
            "blocks": [dataclasses.asdict(block) for block in found.blocks],
        },
        "results": [_result_json(result) for result in found.outcome.results],
        "missing": [
            {"entry": one.place.title, "reason": one.reason, "exit_code": one.exit_code}
            for one in found.outcome.missing
        ],
        "notices": list(found.field.notices),
    }


def _group_json(group: Group) -> dict[str, Any]:
    models = [
        {
            "model": entrant.title,
            "asked": entrant.asked,
            "uri": entrant.resolved.uri,
            "run_id": entrant.resolved.run_id,
            "seed": entrant.seed,
            "weights_sha256": entrant.card.weights_sha256,
            **entrant.key,
        }
        for entrant in group.entrants
    ]
    return {"name": group.name, "stated": group.is_stated, "models": models}


def _result_json(result: Result) -> dict[str, Any]:
    return {
        "job": result.place.job,
        "model": result.place.entrant.title,
        "variant": result.place.variant,
        "run_id": result.run_id,
        "reused": result.is_reused,
        "ended": result.ended.isoformat(timespec="seconds") if result.ended else None,
        "data": dataclasses.asdict(result.images),
        "metrics": {name: value for name, value in sorted(result.metrics.items()) if math.isfinite(value)},
    }
