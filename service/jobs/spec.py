"""What is submitted: a configuration to train by, or a container with a command. Data alone. Imports no torch."""

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, model_validator

from service.config_fields import Positive, Section
from service.jobs import traits

# As Kubernetes, the narrowest of the places that a name gets to.
_NAME = r"^[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$"
_VARIABLE = r"^[A-Za-z_][A-Za-z0-9_]*$"
_SIZE = re.compile(r"^([1-9][0-9]*)((?:[kMGT]i?)?)B?$")
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
# What the service itself says to a job; a user's value would be in its way.
_OURS = ("LOROT_", "MLFLOW_", "TORCHELASTIC_", "MASTER_", "LD_", "PYTHON", "NVIDIA_VISIBLE_", "NVIDIA_DRIVER_")
_OUR_NAMES = ("PATH", "HOME", "RANK", "WORLD_SIZE", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")

Kind = Literal["train", "detect", "segment", "container"]
KINDS: tuple[Kind, ...] = get_args(Kind)
if TYPE_CHECKING:
    # Found when the program begins, which no type checker sees.
    BackendName = str
else:
    BackendName = Literal[traits.NAMES]


def _name(text: str) -> str:
    if not re.fullmatch(_NAME, text):
        raise ValueError("write up to 63 letters, digits, '.', '_' and '-', a letter or digit first and last")
    return text


def _size(text: str) -> str:
    if not _SIZE.match(text):
        raise ValueError("write an amount of memory, as 8GB or 512MiB")
    return text


def num_bytes(text: str) -> int:
    """An amount of memory as `Size` has it: 8GB is 8e9, 8GiB or 8Gi is 8 x 2^30."""
    found = _SIZE.match(text)
    assert found is not None, text
    return int(found[1]) * _UNITS[found[2]]


def _nodes(text: str) -> str:
    found = re.fullmatch(r"(\d{1,4})(?::(\d{1,4}))?", text)
    if not found or not 1 <= int(found[1]) <= int(found[2] or found[1]):
        raise ValueError("write the fewest and the most machines, as 1:4, or one number")
    return text


def _all_text(value: Any) -> bool:
    """Whether every text in a value, nested as JSON is, can be a variable, an argument or a database's text."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            waiting += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple):
            waiting += one
        elif isinstance(one, str) and ("\0" in one or any("\ud800" <= character <= "\udfff" for character in one)):
            return False
    return True


def _others() -> str:
    """What to use where containers are needed."""
    return traits.either(traits.those(lambda place: place.in_containers))


Size = Annotated[str, AfterValidator(_size)]


class Resources(Section):
    """What one node of a job takes."""

    gpus: int = Field(0, ge=0, le=64, description="GPUs of a node")
    cpus: Positive = Field(1.0, description="cores of a node")
    memory: Size | None = Field(None, description="most that a node may use, as 64GB; default: no limit")
    shm: Size = Field("2GB", description="/dev/shm of a container: workers hand batches over there")


class JobSpec(Section):
    """One job, as a client hands it in."""

    kind: Kind = Field("train", description="what runs")
    name: Annotated[str, AfterValidator(_name)] = Field(
        "job", json_schema_extra={"pattern": _NAME}, description="for people; need not be the only one"
    )
    experiment: str | None = Field(None, max_length=200, description="MLflow experiment; default: the service's")
    config: dict[str, Any] = Field({}, description="train, detect, segment: the keys of a configuration")
    model: str | None = Field(None, max_length=500, description="detect, segment: the model, as models:/NAME@best")
    command: tuple[Annotated[str, Field(max_length=4096)], ...] = Field(
        (), max_length=256, description="container: program and arguments; no shell reads it"
    )
    outputs: tuple[Annotated[str, Field(max_length=500)], ...] = Field(
        (), max_length=100, description="container: files and folders below /results to be kept in the record"
    )
    backend: BackendName = Field(traits.NAMES[0], description="where it runs")
    image: str | None = Field(
        None,
        max_length=500,
        pattern=r"^[a-z0-9][A-Za-z0-9._:/@-]*$",
        description="of a backend that runs containers: default: the service's",
    )
    nodes: Annotated[str, AfterValidator(_nodes)] = Field("1", description="machines, or MIN:MAX of an elastic job")
    workers: int | None = Field(None, ge=1, le=64, description="processes of a node; default: one per GPU, or one")
    resources: Resources = Resources()
    environment: dict[
        Annotated[str, Field(pattern=_VARIABLE, max_length=200)], Annotated[str, Field(max_length=8192)]
    ] = Field({}, max_length=100, description="variables; no secrets, they are in the record")
    secrets: dict[
        Annotated[str, Field(pattern=_VARIABLE, max_length=200)],
        Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,251}$")],
    ] = Field({}, max_length=100, description="variables whose values are secrets: the names of those")
    mounts: tuple[Annotated[str, Field(max_length=1000)], ...] = Field(
        (),
        max_length=20,
        description="of a backend that takes them: host folders, read-only, of those that the service allows",
    )
    priority: int = Field(0, ge=-100, le=100, description="higher ones start first; the same: first come first served")
    retries: int = Field(3, ge=0, le=1000, description="how often it is started again, from its last checkpoint")
    grace_s: float = Field(30.0, ge=1, le=3600, description="from a request to stop to the kill")

    @model_validator(mode="after")
    def _is_text(self) -> "JobSpec":
        for key, value in self:
            if not _all_text(value):
                raise ValueError(f"{key}: holds a NUL or half a character, which no program or database takes")
        return self

    @model_validator(mode="after")
    def _fits(self) -> "JobSpec":
        in_containers = traits.of(self.backend).in_containers
        if self.kind == "container":
            if not self.command:
                raise ValueError("command: a container needs one, as [python, train.py]")
            if not in_containers:
                raise ValueError(
                    f"backend: a container runs on {_others()}; the {self.backend} one runs no foreign code"
                )
            if self.config or self.model:
                raise ValueError("config, model: are for train, detect and segment; a container has its command")
        elif self.command or self.outputs:
            raise ValueError(f"command, outputs: are for kind container; {self.kind} has its configuration")
        if self.kind in ("detect", "segment") and not self.model:
            raise ValueError("model: name one, as models:/NAME@best")
        if self.kind == "train" and self.model:
            raise ValueError("model: is for detect and segment; training begins from config.model.init_from")
        if not in_containers and (self.image or self.mounts or self.most_nodes > 1):
            raise ValueError(f"image, mounts, nodes: the {self.backend} backend is this one machine; use {_others()}")
        for name in (*self.environment, *self.secrets):
            if name.startswith(_OURS) or name in _OUR_NAMES:
                raise ValueError(f"environment.{name}: is set by the service; leave it away")
        if both := self.environment.keys() & self.secrets.keys():
            raise ValueError(f"secrets.{min(both)}: is in environment too; give it once")
        return self

    @property
    def fewest_nodes(self) -> int:
        return int(self.nodes.partition(":")[0])

    @property
    def most_nodes(self) -> int:
        return int(self.nodes.rpartition(":")[2])
