"""The submit form: from its fields to a job's spec, and from what is wrong with that back to a field and a line."""

import contextlib
import functools
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from service import config_file
from service.api.shapes import Question
from service.console import yaml_text
from service.console.yaml_text import YamlText
from service.errors import ConfigError, LorotError
from service.jobs import allowed, backends, traits
from service.jobs.desk import Desk
from service.jobs.job import Job
from service.jobs.settings import ServiceSettings
from service.jobs.spec import JobSpec

# What an empty form is shown with.
_FIRST = "quickstart.yaml"
# What a field holds that nobody has filled in.
DEFAULTS: Mapping[str, str] = {
    "base": "",
    "yaml": "",
    "overrides": "",
    "kind": "train",
    "name": "",
    "experiment": "",
    "model": "",
    "command": "",
    "outputs": "",
    "backend": traits.NAMES[0],
    "image": "",
    "nodes": "1",
    "workers": "",
    "gpus": "0",
    "cpus": "1",
    "memory": "",
    "shm": "2GB",
    "priority": "0",
    "retries": "3",
    "environment": "",
    "secrets": "",
    "mounts": "",
}
# Of those fields whose label is not their name.
LABELS: Mapping[str, str] = {
    "base": "Configuration",
    "yaml": "YAML",
    "gpus": "GPUs of a node",
    "cpus": "Cores of a node",
    "shm": "Shared memory",
}
_RESOURCES = ("gpus", "cpus", "memory", "shm")
_AS_THEY_ARE = ("kind", "name", "experiment", "model", "backend", "image", "nodes", "workers", "priority", "retries")
# The fields that a key of the spec is written in, where they differ.
_FIELDS = {"config": "yaml", **{f"resources.{name}": name for name in _RESOURCES}}
_PATH = re.compile(r"([A-Za-z_][\w.-]*(?:, ?[A-Za-z_][\w.-]*)*): ")
_LONGEST = 200_000


@dataclass(frozen=True)
class Problem:
    """What is wrong: in which field of the form ("" : of no single one), on which line of it (0: none), in words."""

    field: str
    text: str
    line: int = 0


@dataclass(frozen=True)
class Checked:
    """A form that was looked at.

    Attributes:
        spec: what would be submitted; None if there are problems.
        resolved: the whole configuration as the job would see it; empty for a container.
        about: the first lines of the shipped configuration, which say what it is for.
    """

    problems: tuple[Problem, ...] = ()
    spec: JobSpec | None = None
    resolved: Mapping[str, Any] = field(default_factory=dict)
    about: str = ""

    def of(self, name: str) -> list[Problem]:
        """The problems of a field."""
        return [problem for problem in self.problems if problem.field == name]


@functools.cache
def shipped() -> dict[str, str]:
    """The configurations that come with the program: name -> kind of job."""
    folder = _folder()
    names = ["quickstart.yaml", *(f"{part}/{path.name}" for part in ("train", "downstream") for path in _yamls(part))]
    found = {}
    for name in names:
        try:
            job = config_file.read(folder / name).get("job", "classify")
        except LorotError:
            continue
        found[name] = "train" if job == "classify" else str(job)
    return found


def fields_of(form: Mapping[str, Any], settings: ServiceSettings) -> dict[str, str]:
    """The texts of the form's fields, known ones alone, with defaults for what is not there."""
    defaults = {**DEFAULTS, "backend": next(iter(backends.enabled(settings)), DEFAULTS["backend"])}
    values = {}
    for name, default in defaults.items():
        value = form.get(name)
        values[name] = value.replace("\r\n", "\n")[:_LONGEST] if isinstance(value, str) else default
    return values


def first(settings: ServiceSettings) -> tuple[dict[str, str], str]:
    """The form as it is first shown, such that it may be submitted, and what to know before that ("" : nothing)."""
    values = fields_of({"base": _FIRST}, settings)
    backend = values["backend"]
    data = config_file.read(_folder() / _FIRST)["data"]
    with contextlib.suppress(ConfigError):
        allowed.inside(data["root"], settings, "data.root", backend)
        return values, ""
    if not (folders := allowed.roots(settings, backend)):
        return values | {
            "base": ""
        }, "Jobs here may read no folder (data_roots of the settings), only what lies below data_urls."
    root = folders[0] / data["name"]
    # Not as an override, which would win over what somebody writes there instead.
    values["yaml"] = yaml.safe_dump({"data": {"root": str(root)}})
    if root.is_dir():
        return values, ""
    return values, f"{_FIRST} trains on images that are not in {root} yet: `lorot data demo --root {root}` draws them."


def fields_like(job: Job) -> dict[str, str]:
    """The form filled in as `job` was."""
    spec = job.spec
    resources = spec.resources
    texts: dict[str, Any] = {
        **{name: getattr(spec, name) for name in _AS_THEY_ARE},
        **{name: getattr(resources, name) for name in _RESOURCES},
        "base": "",
        "yaml": yaml.safe_dump(dict(spec.config), sort_keys=False, allow_unicode=True) if spec.config else "",
        "command": shlex.join(spec.command),
        "outputs": "\n".join(spec.outputs),
        "environment": "\n".join(f"{name}={value}" for name, value in spec.environment.items()),
        "secrets": "\n".join(f"{name}={value}" for name, value in spec.secrets.items()),
        "mounts": "\n".join(spec.mounts),
    }
    return {**DEFAULTS, **{name: "" if value is None else _text(value) for name, value in texts.items()}}


def check(values: Mapping[str, str], desk: Desk) -> Checked:
    """Look at a form by the rules of `lorot check` and of the service. Starts nothing, records nothing."""
    problems: list[Problem] = []
    is_container = values["kind"] == "container"
    text = YamlText() if is_container else yaml_text.read(values["yaml"])
    config: dict[str, Any] = {}
    about = ""
    if not is_container:
        config, about = _configuration(values, text, problems)
    whole = not problems
    raw = _raw(values, config, problems)
    spec = None
    try:
        # The API's own, which refuses what the record could not keep as well.
        spec = Question.model_validate({"spec": raw}).spec
    except ValidationError as error:
        problems += [_of_spec(problem, values) for problem in error.errors()]
    resolved: Mapping[str, Any] = {}
    asked = spec or (_bare(raw) if config else None)
    if asked is not None and whole:
        try:
            resolved = desk.check(asked)
        except ConfigError as error:
            problems += _located(str(error), values, text)
        except LorotError as error:
            problems.append(Problem("", str(error)))
    problems = list(dict.fromkeys(problems))
    return Checked(tuple(problems), None if problems else spec, {} if problems else resolved, about)


def _configuration(values: Mapping[str, str], text: YamlText, problems: list[Problem]) -> tuple[dict[str, Any], str]:
    """The shipped configuration, what was typed on top of it, and the overrides on top of that."""
    config: dict[str, Any] = {}
    about = ""
    if values["base"]:
        if values["base"] in shipped():
            path = _folder() / values["base"]
            config, about = config_file.read(path), _about(path)
        else:
            problems.append(Problem("base", f"there is no configuration {values['base']!r}"))
    if text.problem:
        problems.append(Problem("yaml", text.problem, text.line))
    config = config_file.merge(config, text.values)
    for line, override in _lines(values["overrides"]):
        if told := _override_problem(override):
            problems.append(Problem("overrides", told, line))
            continue
        try:
            config_file.assign(config, override)
        except ConfigError as error:
            problems.append(Problem("overrides", str(error), line))
    if not config and not problems:
        problems.append(Problem("yaml", "choose a configuration above, or write one here"))
    return config, about


def _override_problem(override: str) -> str:
    """Why a line is not even to be assigned; "" if it may be."""
    key, _, value = override.partition("=")
    with contextlib.suppress(yaml.YAMLError, ValueError):  # what is no YAML is a text
        if told := yaml_text.unbounded(value)[0]:
            return f"{key}: {told}"
        found = yaml_text.not_plain(yaml.safe_load(value), (key,))
        return found[1] if found else ""
    return ""


def _raw(values: Mapping[str, str], config: Mapping[str, Any], problems: list[Problem]) -> dict[str, Any]:
    """The form as the spec's keys; empty fields are left away."""
    raw: dict[str, Any] = {name: values[name].strip() for name in _AS_THEY_ARE if values[name].strip()}
    raw["resources"] = {name: values[name].strip() for name in _RESOURCES if values[name].strip()}
    raw.setdefault("name", _name(values, config))
    if raw.get("kind") == "container":
        raw.pop("model", None)
        try:
            raw["command"] = shlex.split(values["command"])
        except ValueError as error:
            problems.append(Problem("command", f"{error}; close every quote"))
        raw["outputs"] = [line for _, line in _lines(values["outputs"])]
    else:
        raw["config"] = dict(config)
        if raw.get("kind") == "train":
            raw.pop("model", None)
    # Of what is not shown for a backend, nothing is handed in; of one that there is not, the spec tells.
    place = traits.of(raw["backend"]) if raw.get("backend") in traits.NAMES else None
    if place is not None and not place.in_containers:
        raw.pop("image", None)
    raw["mounts"] = [line for _, line in _lines(values["mounts"])] if place is not None and place.takes_mounts else []
    for name in ("environment", "secrets"):
        raw[name] = {}
        for line, pair in _lines(values[name]):
            key, equals, value = pair.partition("=")
            if not equals:
                problems.append(Problem(name, f"{pair!r}: write NAME=VALUE", line))
            else:
                raw[name][key.strip()] = value
    return raw


def _bare(raw: Mapping[str, Any]) -> JobSpec | None:
    """The configuration alone, so that its problems are told beside those of the other fields."""
    try:
        return JobSpec.model_validate({key: raw[key] for key in ("kind", "config", "model") if key in raw})
    except ValidationError:
        return None


def _of_spec(problem: Any, values: Mapping[str, str]) -> Problem:
    path = [str(part) for part in problem["loc"][1:]]
    message = problem["msg"].removeprefix("Value error, ")
    if not path:
        found = _PATH.match(message)
        names = [name.strip().partition(".")[0] for name in found[1].split(",")] if found else []
        known = [name for name in names if name in DEFAULTS]
        # Of several that do not go together, one that somebody has filled in.
        given = next((name for name in known if values[name] != DEFAULTS[name]), next(iter(known), ""))
        return Problem(given, message)
    name = _FIELDS.get(".".join(path[:2]), _FIELDS.get(path[0], path[0]))
    where = "".join(f"{part}: " for part in path[1:] if name not in _RESOURCES and part not in ("[key]",))
    return Problem(name if name in DEFAULTS else "", f"{where}{message}")


def _located(message: str, values: Mapping[str, str], text: YamlText) -> Iterator[Problem]:
    """The problems that a ConfigError lists, each at the line that caused it."""
    first, *rest = message.splitlines()
    # `configuration:` is a heading, unless it is all that was said.
    lines = rest if rest and first.endswith(":") else [first, *rest]
    for line in lines:
        said = line.strip()
        found = _PATH.match(said)
        if found is None:
            yield Problem("", said)
            continue
        name = found[1].partition(",")[0].removeprefix("config.").strip()
        yield _place(name, said, values, text)


def _place(name: str, said: str, values: Mapping[str, str], text: YamlText) -> Problem:
    path = name.split(".")
    for number, override in _lines(values["overrides"]):
        key = override.partition("=")[0].strip()
        if key == name or name.startswith(f"{key}.") or key.startswith(f"{name}."):
            return Problem("overrides", said, number)
    if line := text.line_of(path):
        return Problem("yaml", said, line)
    own = _FIELDS.get(name, path[0])
    if own in DEFAULTS and own not in ("base", "yaml", "overrides"):
        return Problem(own, said)
    if values["base"] and path[0] in config_file.read(_folder() / values["base"]):
        return Problem("base", f"{said} (as {values['base']} has it)")
    return Problem("yaml" if values["yaml"].strip() or not values["base"] else "base", said)


def _name(values: Mapping[str, str], config: Mapping[str, Any]) -> str:
    """A job without a name is called like its configuration."""
    given = config.get("name")
    text = given if isinstance(given, str) else Path(values["base"]).stem
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("._-")[:63].strip("._-") or "job"


def _about(path: Path) -> str:
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" ").rstrip())
    return "\n".join(lines).strip("\n")


def _lines(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield number, line.strip()


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _folder() -> Path:
    return config_file.shipped("quickstart.yaml").parent


def _yamls(part: str) -> Sequence[Path]:
    return sorted((_folder() / part).glob("*.yaml"))


__all__ = [
    "DEFAULTS",
    "LABELS",
    "Checked",
    "Problem",
    "check",
    "fields_like",
    "fields_of",
    "first",
    "shipped",
]
