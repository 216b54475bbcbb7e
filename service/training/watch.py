"""What all workers agree on once a step, though only one may have seen it: a number not finite, a signal, a clock.

Also which steps' updates were left out because their loss or gradient was not finite, and why, and whether an
evaluation is still owed: the two things about a step that do not follow from its number, and go into every checkpoint.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from service.config import TrainingConfig
from service.errors import NonFiniteLossError
from service.training import distributed
from service.training.engine import Engine, on_device
from service.training.nonfinite import NonFinite

# Batches of an evaluation that a GPU's answer is read behind, lest the host waits for it.
_EVALUATION_LAG = 8
# Steps whose samples a last word lists.
_LISTED = 10
_log = logging.getLogger(__name__)


class Asked(Protocol):
    """What a worker's keeper may ask for, or complain of."""

    def save_is_due(self) -> bool: ...

    def write_failed(self) -> bool: ...

    def finish_writing(self) -> None: ...

    def last_saved(self) -> str: ...


class Rewind(BaseException):
    """Raised on all workers alike: go back to the newest checkpoint, and leave out the step that is now known as bad.

    No error, but a way through the loop.
    """


@dataclass(frozen=True)
class Wishes:
    """What any worker asked for at this step: the number of a signal to stop for, or 0; a checkpoint."""

    stop: int
    save: bool


@dataclass(frozen=True)
class _Step:
    """A step whose answer has not been read."""

    number: int
    votes: "_Answer"
    losses: list[Tensor]
    ids: list[Tensor]


class _Answer:
    """Numbers on their way from the device.

    A GPU's are sent off at once: asked for later, they would come after all that it was given in between.
    """

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self._sent: torch.cuda.Event | None = None
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._sent = torch.cuda.Event()
            self._sent.record()

    def read(self) -> list[float]:
        """Waits for them, and for nothing that the device was given after them."""
        if self._sent is not None:
            self._sent.synchronize()
        numbers: list[float] = self._values.tolist()
        return numbers


class Watch:
    """Lets the workers agree, and knows what they agreed on.

    Reading the answer makes the host wait for a GPU, so there it is read a step later, when it has long been there.
    Only `on_nonfinite: skip` has to know before the weights move, and waits.

    Args:
        heard: the number of the signal that asked this worker to stop, or 0.
        say: is told which steps are left out.

    Attributes:
        owes_evaluation: the last step done is to be evaluated and has not been.
    """

    def __init__(
        self,
        config: TrainingConfig,
        engine: Engine,
        keeper: Asked,
        heard: Callable[[], int] = lambda: 0,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._policy, self._limit = config.on_nonfinite, config.nonfinite_limit
        self._engine, self._keeper = engine, keeper
        self._heard, self._say = heard, say
        self._lags = engine.world.device.type == "cuda"
        self._losses: list[Tensor] = []
        self._ids: list[Tensor] = []
        self._waiting: list[_Step] = []
        self._asking: list[_Answer] = []
        self._asked = -1
        self._stop = 0
        # None: left out by a version that did not write down why.
        self._left_out: dict[int, NonFinite | None] = {}
        self.owes_evaluation = False

    @property
    def skips(self) -> bool:
        """Whether a bad update is to be left out before it is made."""
        return self._policy == "skip"

    @property
    def counts(self) -> bool:
        """Whether steps may be left out at all, and are counted."""
        return self._policy != "stop" or bool(self._left_out)

    def leaves_out(self, step: int) -> bool:
        """Whether `step` (counted from 1) is known to be bad, and must not be computed again."""
        return self._policy == "rewind" and step in self._left_out

    def num_left_out(self, step: int) -> int:
        """Updates left out among the first `step` steps."""
        return sum(number <= step for number in self._left_out)

    def state(self) -> dict[str, Any]:
        """For a checkpoint; JSON values, the same on all workers."""
        return {
            "left_out": sorted(self._left_out),
            "nonfinite_steps": [{"step": step} | why.state() for step, why in sorted(self._known().items())],
            "owes_evaluation": self.owes_evaluation,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `state()`'s result. Steps that are already known as bad stay so."""
        for step in state.get("left_out", ()):
            self._left_out.setdefault(int(step), None)
        self._left_out |= {int(why["step"]): NonFinite.from_state(why) for why in state.get("nonfinite_steps", ())}
        self.owes_evaluation = bool(state.get("owes_evaluation"))
        self._losses, self._ids, self._waiting, self._asking = [], [], [], []
        self._asked = -1

    def note(self, loss: Tensor, ids: Tensor) -> None:
        """A micro-batch's loss and its samples."""
        self._losses.append(loss.detach())
        self._ids.append(ids)

    def spoilt(self) -> Tensor:
        """Whether a loss of this step is not finite on this worker: 1.0 or 0.0, on the device."""
        return (~torch.isfinite(torch.stack(self._losses))).any().float()

    def agree(self, step: int, flush: bool = False) -> Wishes:
        """What the workers ask for after `step`. `flush` leaves no answer for later.

        Raises:
            NonFiniteLossError: on all workers, if the run is to stop for a number that is not finite.
            Rewind: on all workers, if it is to go back.
            StorageError: on all workers, if a checkpoint could not be written.
        """
        if step != self._asked:
            self._ask(step)
        keep = 0 if flush or not self._lags else 1
        save = False
        while len(self._waiting) > keep:
            save |= self._read(self._waiting.pop(0))
        return Wishes(self._stop, save)

    def asked_to_stop(self) -> bool:
        """Whether a signal has asked any worker to stop; for long work between steps. All workers call it alike."""
        self._asking.append(_Answer(self._engine.agree(self._signals(), buffers=False)))
        while len(self._asking) > (_EVALUATION_LAG if self._lags else 0):
            self._hear(*self._asking.pop(0).read())
        return self._stop != 0

    def settle(self) -> int:
        """The number of the signal that asked any worker to stop, or 0, with every answer read."""
        while self._asking:
            self._hear(*self._asking.pop(0).read())
        return self._stop

    def _ask(self, step: int) -> None:
        self._asked = step
        device = self._engine.world.device
        bad = [self.spoilt(), self._engine.bad_gradient] if self._losses else [torch.zeros((), device=device)] * 2
        rest = [float(self._keeper.save_is_due()), float(self._keeper.write_failed())]
        votes = torch.cat([torch.stack(bad), self._signals(), on_device(rest, device)])
        # After an update left out the buffers are alike everywhere; their mean might not be, in its last bit.
        moved = bool(self._losses) and not self._engine.dropped
        answer = _Answer(self._engine.agree(votes, buffers=moved))
        self._waiting.append(_Step(step, answer, self._losses, self._ids))
        self._losses, self._ids = [], []

    def _signals(self) -> Tensor:
        number = self._heard()
        return on_device([float(number == 2), float(number not in (0, 2))], self._engine.world.device)

    def _hear(self, interrupted: float, terminated: float) -> None:
        # The first that was agreed on counts.
        self._stop = self._stop or (2 if interrupted else 15 if terminated else 0)

    def _read(self, step: _Step) -> bool:
        bad_loss, bad_gradient, interrupted, terminated, save, failed = step.votes.read()
        if failed:
            self._keeper.finish_writing()
        if bad_loss or bad_gradient:
            self._leave_out(step, "loss" if bad_loss else "gradient")
        self._hear(interrupted, terminated)
        return bool(save)

    def _known(self) -> dict[int, NonFinite]:
        return {step: why for step, why in self._left_out.items() if why is not None}

    def _leave_out(self, step: _Step, what: str) -> None:
        why = NonFinite.of(what, self._samples(step, what))
        told = f"the {what} is not finite at step {step.number}, in micro-batches of samples {why.told()}"
        advice = "A lower optimizer.lr, clip_norm, a longer schedule.warmup or precision=bf16 in place of fp16 may help"
        if self._policy == "stop":
            raise NonFiniteLossError(
                f"{told}; nothing after {self._keeper.last_saved()} was kept. {advice}, or on_nonfinite=skip; "
                "--resume goes on from there"
            )
        if len(self._left_out.keys() | {step.number}) > self._limit:
            raise NonFiniteLossError(
                f"{told}; nonfinite_limit: {self._limit} updates were left out already, of steps "
                f"{', '.join(map(str, sorted(self._left_out)))}. {advice}{self._earlier()}"
            )
        self._left_out[step.number] = why
        count = f"its update is left out ({len(self._left_out)} of at most {self._limit})"
        _log.warning("%s; %s", told, count)
        if self._policy == "rewind":
            self._say(f"{told}; back to {self._keeper.last_saved()}, and {count}")
            raise Rewind(told)
        self._say(f"{told}; {count}")

    def _earlier(self) -> str:
        """The samples of the latest steps left out, a line each: no summary will name them."""
        latest = sorted(self._known().items())[-_LISTED:]
        return "".join(f"\n  step {step}: the {why.kind}, samples {why.told()}" for step, why in latest)

    def _samples(self, step: _Step, what: str) -> list[int]:
        """The bad micro-batches' samples of all workers; a gradient is everybody's."""
        # -1 stands for those that were fine.
        chosen = [
            part if what == "gradient" or not torch.isfinite(loss) else torch.full_like(part, -1)
            for loss, part in zip(step.losses, step.ids, strict=True)
        ]
        found = distributed.gather(torch.stack(chosen)).flatten().tolist()
        return [sample for sample in found if sample >= 0]
