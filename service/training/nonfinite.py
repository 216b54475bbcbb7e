"""What is remembered of a step whose loss or gradient was not finite: which of the two, and the samples concerned."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Of a step's samples: what a line of the log, a checkpoint and the report have room for.
_KEPT = 64


@dataclass(frozen=True)
class NonFinite:
    """One such step.

    Attributes:
        kind: "loss" or "gradient".
        samples: ids, at most 64: of the micro-batches whose loss it was, or of the whole step.
        num_samples: of how many these are the first.
    """

    kind: str
    samples: tuple[int, ...]
    num_samples: int

    @classmethod
    def of(cls, kind: str, samples: Sequence[int]) -> "NonFinite":
        """Keep the first of `samples`."""
        return cls(kind, tuple(samples[:_KEPT]), len(samples))

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "NonFinite":
        """What `state` gave."""
        return cls(str(state["kind"]), tuple(int(sample) for sample in state["samples"]), int(state["num_samples"]))

    def state(self) -> dict[str, Any]:
        """For a checkpoint and the summary; JSON values."""
        return {"kind": self.kind, "samples": list(self.samples), "num_samples": self.num_samples}

    def told(self) -> str:
        """The samples, for a line of the log."""
        more = self.num_samples - len(self.samples)
        return ", ".join(map(str, self.samples)) + (f" and {more} more" if more else "")
