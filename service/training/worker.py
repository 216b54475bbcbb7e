"""What torchrun starts on every worker: `... -m service.training.worker CONFIG [key.sub=value ...] [--resume]`."""

import argparse
import os
import sys
from typing import IO, TYPE_CHECKING

from service.training.signals import Signals, Stopped

if TYPE_CHECKING:
    from service.config import TrainingConfig
    from service.run_folder import RunFolder


def main(arguments: list[str] | None = None) -> int:
    """Run one worker to its end, and end the process; returns the exit code only of one that cannot begin."""
    parser = argparse.ArgumentParser(prog="service.training.worker", description=__doc__)
    parser.add_argument("config", help="configuration file")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="values on top of it")
    parser.add_argument("--resume", action="store_true", help="go on from the newest good checkpoint")
    given = parser.parse_args(arguments)
    signals = Signals()
    try:
        signals.listen()
        # Only now: torch takes seconds to load, in which a signal may come.
        from service.training import entrance, job

        def train(config: "TrainingConfig", folder: "RunFolder", terminal: IO[str] | None) -> None:
            job.work(config, folder, given.resume, terminal, signals)

        return entrance.enter(given.config, given.overrides, train)
    except Stopped as stopped:
        print(f"error: {stopped}", file=sys.stderr, flush=True)
        os._exit(stopped.exit_code)


if __name__ == "__main__":
    sys.exit(main())
