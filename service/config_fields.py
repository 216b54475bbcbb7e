"""The kinds of values that a configuration is made of."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

from service.duration import Duration


def _duration(value: Any) -> Duration:
    return value if isinstance(value, Duration) else Duration.parse(value)


def _positive(value: Duration) -> Duration:
    if value.amount == 0:
        raise ValueError(f"'{value}' is no time at all; write more than 0")
    return value


def _range(value: tuple[float, float]) -> tuple[float, float]:
    if not 0 < value[0] <= value[1]:
        raise ValueError("write two numbers above 0, the smaller one first")
    return value


def _root(value: Any) -> Any:
    # A path would lose one of a URL's slashes.
    return Path(value) if isinstance(value, str) and "://" not in value else value


Root = Annotated[Path | str, BeforeValidator(_root)]
Length = Annotated[Duration, BeforeValidator(_duration), PlainSerializer(str)]
Span = Annotated[Length, AfterValidator(_positive)]
Range = Annotated[tuple[float, float], AfterValidator(_range)]
Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """One block of the configuration. Unknown keys are errors; values do not change after checking."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, arbitrary_types_allowed=True, validate_default=True, allow_inf_nan=False
    )
