"""Who is compared: registered classifiers, each looked at before anything runs, in groups that are one method each."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from service import bundle, detector_bundle, resolution, store
from service.bundle import Card
from service.comparison import published
from service.errors import CheckpointError, ConfigError, TrackingError
from service.resolution import Resolved

_WORDNET = re.compile(r"n[0-9]{8}")
# Settings of a training that make another recipe, as its run has them for parameters.
_RECIPE = re.compile(
    r"(duration|global_batch|micro_batch|precision|clip_norm|sync_batchnorm|ema|pretext|objective|optimizer|schedule|model"
    r"|data\.(size|sizes|crop|scale|ratio|padding|augment|repeats|flip|train_limit|eval_size|eval_crop|mean|std))(\..+)?"
)
# Of them, what one method differs from another in.
_METHOD = re.compile(r"(pretext|objective)(\..+)?")


@dataclass(frozen=True)
class Entrant:
    """One model that is compared.

    Attributes:
        asked: its address, as it was given.
        resolved, card: where it was found, pinned to its version, and what it is.
        seed: of its training, as its run says; None if nobody knows.
        recipe: how else it was trained, by the names of the configuration; empty if nobody knows.
    """

    asked: str
    resolved: Resolved
    card: Card
    seed: int | None = None
    recipe: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """For people: the registered name and version, else the address."""
        found = self.resolved
        return f"{found.name} {found.version}" if found.version is not None else found.uri

    @property
    def slug(self) -> str:
        """For names of runs."""
        found = self.resolved
        text = f"{found.name}-{found.version}" if found.version is not None else found.run_id or found.folder.name
        return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._") or "model"

    @property
    def key(self) -> dict[str, str]:
        """What the models of a group have in common: pretext task, objective, network, training data."""
        card = self.card
        network = {key: value for key, value in card.model.items() if key != "init_from"}
        return {
            "pretext": card.pretext,
            "pretext_options": json.dumps(published.task_options(card), sort_keys=True, default=str),
            "objective": card.objective,
            "network": json.dumps(network, sort_keys=True),
            "data": card.data,
            "data_digest": card.data_digest,
        }


@dataclass(frozen=True)
class Group:
    """Models of one method, whose results are one number with a spread.

    Attributes:
        name: for people, and unique.
        entrants: its models.
        is_stated: the user has said who belongs to it; otherwise they have `Entrant.key` in common.
    """

    name: str
    entrants: tuple[Entrant, ...]
    is_stated: bool = False


@dataclass(frozen=True)
class Field:
    """All groups, and what is to be known before they are compared; for people."""

    groups: tuple[Group, ...]
    notices: tuple[str, ...]

    @property
    def entrants(self) -> tuple[Entrant, ...]:
        """All models, group by group."""
        return tuple(entrant for group in self.groups for entrant in group.entrants)


def gather(
    models: Sequence[str], stated: Mapping[str, Sequence[str]] = MappingProxyType({}), tracking_uri: str | None = None
) -> Field:
    """Find all models and put them into groups.

    Args:
        models: addresses, grouped by what their cards say.
        stated: addresses of groups that were named, each by its name.

    Raises:
        ConfigError: too few models; one in two groups; models of different classes.
        CheckpointError: some cannot be found or are no classifiers: all of them, and what there is.
        TrackingError: the tracking server does not answer.
    """
    wanted: list[tuple[str | None, str]] = [(None, address) for address in models]
    wanted += [(name, address) for name, own in stated.items() for address in own]
    if empty := [name for name, own in stated.items() if not own]:
        raise ConfigError(f"--group {empty[0]}: no models; write NAME=models:/A/1,models:/A/2")
    if not wanted:
        raise ConfigError("nothing to compare; name some models, as models:/baseline@best models:/lorot-e@best")
    found, problems = [], []
    for group, address in wanted:
        try:
            found.append((group, _find(address, tracking_uri)))
        except TrackingError:
            raise
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError("\n".join(problems))
    notices: list[str] = []
    kept = _distinct(found, notices)
    _refuse_other_classes([entrant for _, entrant in kept])
    groups = _grouped(kept)
    notices += _remarks(groups)
    return Field(groups, tuple(notices))


def _find(address: str, tracking_uri: str | None) -> Entrant:
    if (Path(address) / detector_bundle.CARD).exists():
        raise CheckpointError(
            f"{address}: a detector; classifiers are compared, and a detector is a result of the one that it stands on"
        )
    resolved = resolution.resolve(address, tracking_uri)
    card = bundle.read_card(resolved.folder)
    bundle.read_checked(resolved.folder / bundle.WEIGHTS, card.weights_sha256)
    params = _params(resolved.run_id, tracking_uri)
    seed = params.get("seed", "")
    recipe = {key: value for key, value in params.items() if _RECIPE.fullmatch(key)}
    return Entrant(address, resolved, card, int(seed) if seed.isdecimal() else None, recipe)


def _params(run_id: str | None, tracking_uri: str | None) -> dict[str, str]:
    """The settings of the run that trained a model, as far as they are known here."""
    if not run_id:
        return {}
    uri = tracking_uri or store.default_uri()
    if (path := store.sqlite_path(uri)) is not None and not path.exists():
        return {}
    run: Any = None
    with store.explained(uri), store.passing_over("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
        run = store.client(uri).get_run(run_id)
    return {} if run is None else dict(run.data.params)


def _distinct(found: Iterable[tuple[str | None, Entrant]], notices: list[str]) -> list[tuple[str | None, Entrant]]:
    """Each model once; a model that was given twice is told of."""
    kept: dict[str, tuple[str | None, Entrant]] = {}
    for group, entrant in found:
        weights = entrant.card.weights_sha256
        first = kept.setdefault(weights, (group, entrant))
        if first[1] is entrant:
            continue
        if group != first[0]:
            raise ConfigError(
                f"{entrant.asked} and {first[1].asked} are the same weights, and in two groups; leave one of them away"
            )
        notices.append(f"{entrant.asked} and {first[1].asked} are the same weights, and count once")
    return list(kept.values())


def _refuse_other_classes(entrants: Sequence[Entrant]) -> None:
    """Raises ConfigError unless all models tell the same classes apart; ids and names of ImageNet's may be mixed."""
    first = entrants[0]
    for other in entrants[1:]:
        ours, theirs = first.card.classes, other.card.classes
        ids = [bool(_WORDNET.fullmatch(classes[0])) for classes in (ours, theirs)]
        if len(ours) == len(theirs) and (ours == theirs or ids[0] != ids[1]):
            continue
        both = zip(ours, theirs, strict=False)
        what = next((f"{one!r} and {another!r}" for one, another in both if one != another), "one has more of them")
        raise ConfigError(
            f"{first.asked} knows {len(ours)} classes, {other.asked} {len(theirs)}, and not the same ({what}); "
            "compare models of the same classes"
        )


def _grouped(kept: Sequence[tuple[str | None, Entrant]]) -> tuple[Group, ...]:
    own: dict[str, list[Entrant]] = {}
    stated: dict[str, list[Entrant]] = {}
    for name, entrant in kept:
        if name is not None:
            stated.setdefault(name, []).append(entrant)
        else:
            own.setdefault(json.dumps(entrant.key), []).append(entrant)
    named = dict(zip(_names([members[0] for members in own.values()]), own.values(), strict=True))
    if both := named.keys() & stated.keys():
        raise ConfigError(f"--group {min(both)}: the other models make a group of this name; choose another")
    groups = [Group(name, tuple(members)) for name, members in named.items()]
    groups += [Group(name, tuple(members), is_stated=True) for name, members in stated.items()]
    # The paper's order: what has no pretext task comes first.
    return tuple(sorted(groups, key=lambda group: group.entrants[0].card.pretext != "none"))


def _names(firsts: Sequence[Entrant]) -> list[str]:
    """A name for the group of each of these, of what they differ in."""
    keys = [entrant.key for entrant in firsts]
    differing = {part for part in keys[0] if len({key[part] for key in keys}) > 1} if keys else set()
    names = []
    for entrant in firsts:
        card = entrant.card
        parts = [published.METHODS.get((card.pretext, card.objective), f"{card.pretext} ({card.objective})")]
        if published.method(card) is None and card.pretext != "none":
            options = published.task_options(card)
            parts += [f"{name} {value}" for name, value in options.items()]
        if "objective" in differing and card.objective == "imported":
            parts.append("imported")
        if "network" in differing:
            width = f" of width {card.model.get('width')}" if card.model.get("name") == "resnet_small" else ""
            parts.append(f"{card.model.get('name')}{width}")
        if "data" in differing:
            parts.append(card.data or "unknown data")
        if "data_digest" in differing:
            parts.append(f"data {card.data_digest[:8] or 'unknown'}")
        names.append(", ".join(parts))
    return [name if names.count(name) == 1 else f"{name} ({number + 1})" for number, name in enumerate(names)]


def _remarks(groups: Sequence[Group]) -> list[str]:
    """What makes the comparison less than it looks."""
    found = []
    for group in groups:
        keys = [entrant.key for entrant in group.entrants]
        if unlike := [part for part in keys[0] if len({key[part] for key in keys}) > 1]:
            found.append(f"{group.name}: its models differ in {', '.join(unlike)}")
        for what in _mixed(group.entrants, method_too=True):
            found.append(f"{group.name}: its models were trained differently: {what}")
        seeds = [entrant.seed for entrant in group.entrants]
        if len(seeds) > 1 and None in seeds:
            found.append(f"{group.name}: not all runs say what their seed was, so not all can be paired")
        for seed in sorted({seed for seed in seeds if seed is not None and seeds.count(seed) > 1}):
            found.append(f"{group.name}: {seeds.count(seed)} models were trained with seed {seed}; they are not paired")
    entrants = [entrant for group in groups for entrant in group.entrants]
    for what in _mixed([group.entrants[0] for group in groups], method_too=False):
        found.append(f"the groups differ in more than their method: {what}")
    if len({entrant.card.data_digest for entrant in entrants}) > 1:
        found.append("not all models were trained on the same images")
    return found


def _mixed(entrants: Sequence[Entrant], method_too: bool) -> list[str]:
    """Settings that differ between these models, with their values; unknown ones are passed over."""
    known = [entrant for entrant in entrants if entrant.recipe]
    names = sorted({name for entrant in known for name in entrant.recipe})
    found = []
    for name in names:
        if not method_too and _METHOD.fullmatch(name):
            continue
        values = dict.fromkeys(entrant.recipe.get(name, "not said") for entrant in known)
        if len(values) > 1:
            found.append(f"{name} is {', '.join(values)}")
    return found


def parse_group(text: str) -> tuple[str, tuple[str, ...]]:
    """`NAME=models:/A/1,models:/A/2` as its name and addresses; raises ConfigError."""
    name, equals, rest = text.partition("=")
    addresses = tuple(part.strip() for part in rest.split(",") if part.strip())
    if equals and name.strip() and addresses:
        return name.strip(), addresses
    raise ConfigError(f"--group {text!r}: write NAME=models:/A/1,models:/A/2")
