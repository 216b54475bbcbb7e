"""Rendering without a queue of its own: what both torch references hand to the loader."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from pipelines.soundness import UnsoundError

R = TypeVar("R")


class InlineRenderer(Generic[R]):
    """Renders in `prepare`, in the calling thread; `submit` and `collect` only queue."""

    depth = 1
    ready = True

    def __init__(self, render: Callable[[Sequence[bytes | np.ndarray], Any], R]) -> None:
        """`render` makes a batch of samples and their plan."""
        self._render = render
        self._rendered: deque[R] = deque()

    def prepare(self, samples: Sequence[bytes | np.ndarray], plan: Any) -> R:
        """The rendered batch; raises UnsoundError if one of its images cannot be decoded."""
        try:
            return self._render(samples, plan)
        except (OSError, SyntaxError, ValueError) as error:
            raise UnsoundError(str(error)) from None

    def submit(self, rendered: R) -> None:
        """Hand in one prepared batch."""
        self._rendered.append(rendered)

    def collect(self) -> R:
        """The oldest batch submitted."""
        return self._rendered.popleft()

    def fault(self, sample: bytes | np.ndarray, plan: Any) -> str | None:
        """Why PIL cannot decode one sample, of which `plan` is the one row; None if it can."""
        try:
            self.prepare([sample], plan)
        except UnsoundError as error:
            return f"the file is damaged: {error}"
        return None

    def close(self) -> None:
        """Nothing is held but what was not collected."""
        self._rendered.clear()
