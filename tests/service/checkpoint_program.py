"""What test_checkpoint_kill starts: writes checkpoints in child processes, and kills each of them at another moment.

python -m tests.service.checkpoint_program FOLDER

Every call that changes the disk is a moment: a child dies before it, or, for a write, when half of it is done; or the
call fails because the disk is full. The program prints what it did and what was there afterwards, as JSON.
"""

import errno
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from service.errors import StorageError
from service.training import checkpoint
from service.training.retention import Retention
from service.training.writer import HostCopy, Writer

CHANGES = ("write", "pwrite", "fsync", "mkdir", "rename", "replace", "unlink", "remove", "rmdir", "truncate", "link")
KEEP_LAST = 1
# Scenario -> steps that are there before, and the step that is written.
SCENARIOS = {"first": ((), 3), "next": ((1, 2), 3), "again": ((1, 3), 3)}


def state(step: int, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """What the checkpoint of a step holds; `seed` tells two of one step apart."""
    generator = torch.Generator().manual_seed(1000 * seed + step)
    return {
        "weights": {"conv": torch.randn(4, 3, generator=generator), "count": torch.tensor(step)},
        "optimizer": {"momentum.conv": torch.randn(4, 3, generator=generator)},
        "ema": {"module.conv": torch.randn(4, 3, generator=generator)},
    }


def save(folder: Path, step: int, seed: int = 0) -> None:
    """As the main worker saves: a copy, then a thread that writes and deletes."""
    copies = HostCopy(pinned=False).take(state(step, seed))
    retention = Retention(KEEP_LAST, "val/top1", "max")

    def write() -> None:
        retention.written(checkpoint.save(folder, step, copies, facts={"seed": seed}))
        retention.prune(folder, step)

    writer = Writer()
    writer.start(write)
    writer.wait()


class Moments:
    """Counts the calls that change the disk, and at one of them ends the process or finds the disk full."""

    def __init__(self, deadly: int = -1, how: str = "before") -> None:
        self.names: list[str] = []
        self._deadly, self._how = deadly, how

    def watch(self) -> None:
        """From now on every such call of this process is counted, whoever makes it."""
        for name in CHANGES:
            setattr(os, name, self._watched(name, getattr(os, name)))
        # Files are also made by opening them, in C as well.
        sys.addaudithook(self._opened)

    def _watched(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            deadly = self._count(name)
            if deadly and self._how == "half" and name in ("write", "pwrite"):
                descriptor, data, *rest = arguments
                original(descriptor, bytes(data)[: len(data) // 2], *rest)
                die()
            return original(*arguments, **options)

        return call

    def _opened(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self._count("open")

    def _count(self, name: str) -> bool:
        self.names.append(name)
        deadly = len(self.names) - 1 == self._deadly
        if deadly and self._how == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if deadly and self._how == "before":
            die()
        return deadly


def die() -> None:
    """As the kernel ends a process: nothing is tidied."""
    os.kill(os.getpid(), signal.SIGKILL)


def in_child(action: Callable[[], object]) -> int:
    """Run it in a process of its own; its exit code, or the signal that ended it, negative."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            action()
            code = 0
        except StorageError as error:
            code = error.exit_code
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def prepare(folder: Path, steps: tuple[int, ...]) -> None:
    """A folder as earlier saves left it; nothing of it was deleted."""
    shutil.rmtree(folder, ignore_errors=True)
    for step in steps:
        pattern = folder.with_name("patterns")
        if not checkpoint.place(pattern, step).exists():
            checkpoint.save(pattern, step, state(step), facts={"seed": 0})
        shutil.copytree(checkpoint.place(pattern, step), checkpoint.place(folder, step))


def moments(folder: Path, scenario: str) -> list[str]:
    """The calls of a save that nothing disturbs, in their order."""
    steps, step = SCENARIOS[scenario]
    prepare(folder, steps)
    report = folder.with_suffix(".calls")

    def action() -> None:
        watched = Moments()
        watched.watch()
        save(folder, step, seed=1)
        names = list(watched.names)
        report.write_text(json.dumps(names))

    assert in_child(action) == 0
    found: list[str] = json.loads(report.read_text())
    return found


def found_in(folder: Path) -> list[int] | None:
    """(step, seed) of the checkpoint that a run would go on from, if it is whole; None without one."""
    checkpoint.tidy(folder)
    one, problems = checkpoint.newest(folder)
    assert not problems, problems
    if one is None:
        return None
    seed = int(one.facts["seed"])
    expected = state(one.step, seed)
    for part, tensors in expected.items():
        held = one.tensors(part)
        assert held.keys() == tensors.keys()
        assert all(torch.equal(held[name], value) for name, value in tensors.items()), (part, one)
    return [one.step, seed]


def rounds(folder: Path, scenario: str) -> Iterator[dict[str, Any]]:
    """One kill or full disk each, and what became of it."""
    steps, step = SCENARIOS[scenario]
    names = moments(folder, scenario)
    for number, name in enumerate(names):
        for how in ("before", "half", "full") if name in ("write", "pwrite") else ("before", "full"):
            prepare(folder, steps)

            def action(number: int = number, how: str = how) -> None:
                Moments(number, how).watch()
                save(folder, step, seed=1)

            ended = in_child(action)
            there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
            first = found_in(folder)
            save(folder, step + 1, seed=2)
            left = sorted(path.name for path in folder.iterdir())
            yield {
                "scenario": scenario,
                "call": name,
                "number": number,
                "how": how,
                "code": ended,
                "there": there,
                "found": first,
                "next": found_in(folder),
                "left": left,
            }


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1]) / "checkpoints"
    print(json.dumps([one for scenario in SCENARIOS for one in rounds(folder, scenario)]))


if __name__ == "__main__":
    main()
