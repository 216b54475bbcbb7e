"""From the command's words to what is compared, and how."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from service.comparison.course import Wish
from service.comparison.measurement import JOBS
from service.errors import ConfigError
from service.training_config import none_of

_OVERRIDE = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*=.*", re.DOTALL)


def apart(words: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The models' addresses and the overrides among the command's words."""
    overrides = tuple(word for word in words if _OVERRIDE.fullmatch(word))
    return tuple(word for word in words if word not in overrides), overrides


def wish(
    jobs: str,
    *,
    seeds: str | None = None,
    configs: Sequence[str] = (),
    data: Sequence[str] = (),
    root: Sequence[str] = (),
    overrides: Sequence[str] = (),
    tracking_uri: str | None = None,
) -> Wish:
    """The options as a wish.

    Args:
        jobs: as wsol,detect,segment. seeds: as 0,1,2.
        configs: JOB=FILE. data, root: JOB=VALUE, or VALUE for all detectors (for localization, if that is all).
        overrides: JOB.key.sub=VALUE, or key.sub=VALUE for all detectors (likewise).

    Raises:
        ConfigError: no such job; a value that cannot be; something is said of a job that is not asked for.
    """
    names = [name.strip() for name in jobs.split(",") if name.strip()]
    for name in names:
        if name not in JOBS:
            raise ConfigError(f"--jobs: {name!r} {none_of(name, JOBS)}")
    chosen = tuple(job for job in JOBS if job in names)
    if not chosen:
        raise ConfigError(f"--jobs: name some of {', '.join(JOBS)}")
    paths = {job: Path(path) for job, path in _by_job("--config", configs, chosen, unsaid=()).items()}
    # A data set of objects is no data set of classes, so one word is never taken for both.
    unsaid = tuple(job for job in chosen if job != "wsol") or chosen
    return Wish(
        jobs=chosen,
        seeds=None if seeds is None else _seeds(seeds),
        configs=paths,
        data=_by_job("--data", data, chosen, unsaid),
        root=_by_job("--root", root, chosen, unsaid),
        overrides=_overrides(overrides, chosen, unsaid),
        tracking_uri=tracking_uri,
    )


def _by_job(option: str, given: Sequence[str], chosen: Sequence[str], unsaid: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in given:
        job, equals, value = text.partition("=")
        own = (job,) if equals and job in JOBS else unsaid
        value = value if equals and job in JOBS else text
        if not own:
            raise ConfigError(f"{option} {text!r}: write JOB=FILE, with one of {', '.join(chosen)}")
        _refuse_unasked(f"{option} {text}", own, chosen)
        for name in own:
            if name in found:
                raise ConfigError(f"{option} is given twice for {name}: {found[name]} and {value}")
            found[name] = value
    return found


def _overrides(given: Sequence[str], chosen: Sequence[str], unsaid: Sequence[str]) -> Mapping[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for text in given:
        job, point, rest = text.partition(".")
        own = (job,) if point and job in JOBS else unsaid
        _refuse_unasked(text, own, chosen)
        for name in own:
            found[name] = (*found.get(name, ()), rest if point and job in JOBS else text)
    return found


def _refuse_unasked(what: str, jobs: Sequence[str], chosen: Sequence[str]) -> None:
    if unasked := [job for job in jobs if job not in chosen]:
        raise ConfigError(f"{what}: --jobs has no {unasked[0]}; it has {', '.join(chosen)}")


def _seeds(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(re.fullmatch("[0-9]{1,18}", part) for part in parts):
        raise ConfigError(f"--seeds {text!r}: write whole numbers, as 0,1,2")
    seeds = [int(part) for part in parts]
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds {text!r}: a seed is there twice, and its run would be the same one")
    return tuple(seeds)
