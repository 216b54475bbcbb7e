"""Lengths of training as people say them: `90 epochs`, `5000 steps`, `1.2e6 samples`, `5 %`."""

import math
import re
from dataclasses import dataclass
from fractions import Fraction

_UNITS = {"step": "steps", "epoch": "epochs", "sample": "samples", "%": "%", "percent": "%"}
# At most two digits of exponent: an exact fraction of 1e999999999 would fill the memory.
_PATTERN = re.compile(r"\s*([0-9]{1,30}(?:\.[0-9]{0,30})?(?:e[+-]?[0-9]{1,2})?)\s*(%|[a-z]+)\s*", re.ASCII)


@dataclass(frozen=True)
class Duration:
    """An amount of training in one of the units steps, epochs, samples or % (of the whole run)."""

    amount: Fraction
    unit: str

    @classmethod
    def parse(cls, text: str) -> "Duration":
        """Read `"90 epochs"`; raises ValueError with the accepted forms otherwise."""
        match = _PATTERN.fullmatch(str(text).lower())
        unit = _UNITS.get(match[2] if match[2] == "%" else match[2].removesuffix("s")) if match else None
        if match is None or unit is None:
            raise ValueError(
                f"{text!r} is no duration; write an amount and its unit: 90 epochs, 5000 steps, 1e6 samples or 5 %"
            )
        return cls(Fraction(match[1]), unit)

    def steps(self, *, samples_per_epoch: int, global_batch: int, total_steps: int | None = None) -> int:
        """Optimizer steps, rounded up, so that `1 epochs` covers every sample. A share needs `total_steps`."""
        if self.unit == "steps":
            return math.ceil(self.amount)
        if self.unit == "samples":
            return math.ceil(self.amount / global_batch)
        if self.unit == "epochs":
            return math.ceil(self.amount * samples_per_epoch / global_batch)
        if total_steps is None:
            raise ValueError(f"{self} is a share of a run of unknown length; give steps, epochs or samples")
        return math.ceil(self.amount * total_steps / 100)

    def __str__(self) -> str:
        amount = int(self.amount) if self.amount.denominator == 1 else float(self.amount)
        return f"{amount} {self.unit}"
