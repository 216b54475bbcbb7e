"""A worker as any, whose loss is not finite at the steps that a file of its working directory names.

A step's number decides, not the attempt at it: made again, it comes out the same, as a diverging job's would. What is
done to the images of one of its micro-batches, the network turns into a loss.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from service.training import worker
from service.training.signals import Signals

# The steps, which others write while this runs; and a line for each time that one of them was computed.
STEPS, LOSSES = Path("bad-steps.json"), Path("bad-losses.jsonl")


def named(folder: Path = Path()) -> set[int]:
    """The steps whose losses are not finite."""
    path = folder / STEPS
    return set(json.loads(path.read_text())) if path.exists() else set()


def spoil() -> None:
    """Let training compute such losses."""
    import torch

    from service.training import classification, sample_log

    chosen: set[int] = set()

    def logged(batches: Any, folder: Any, world: Any, first: int, parts: int, real: Any = sample_log.logged) -> Any:
        return follow(real(batches, folder, world, first, parts), world, first, parts)

    def follow(batches: Iterable[Any], world: Any, first: int, parts: int) -> Iterator[Any]:
        """Choose the first micro-batch of such a step, of one worker alone."""
        for number, batch in enumerate(batches):
            step, part = first + number // parts + 1, number % parts
            chosen.clear()
            if part == 0 and step % world.size == world.rank and step in named():
                chosen.add(step)
            yield batch

    def learn(config: Any, engine: Any, batch: Any, meters: Any, real: Any = classification.learn) -> Any:
        # Of a step that is passed over, because it is known as bad, nothing is learnt.
        for step in chosen:
            with LOSSES.open("a") as file:
                file.write(json.dumps({"step": step, "samples": batch.ids.tolist()}) + "\n")
            batch = batch._replace(images=torch.full_like(batch.images, torch.nan))
        return real(config, engine, batch, meters)

    sample_log.logged = logged
    classification.learn = learn


def main() -> int:
    """Be a worker."""

    def listen(signals: Signals, real: Any = Signals.listen) -> None:
        real(signals)
        # Only now: it loads torch, and a signal may come meanwhile.
        spoil()

    Signals.listen = listen  # type: ignore[method-assign]
    return worker.main()


if __name__ == "__main__":
    sys.exit(main())
