"""A place where jobs run that exists in memory only: a test says what becomes of them, and when calls fail or hang."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from service.errors import BackendError
from service.jobs import log_file
from service.jobs.backends import Handle, Order, Status
from service.jobs.job import Job

GONE = Status("gone")


class Killed(BaseException):
    """The service dies in the middle of a call: nothing after it is done."""


class MemoryBackend:
    """Keeps to the protocol: one start for each name, however often it is asked.

    Attributes:
        now: how each attempt stands, by its name; a test puts there what is to be seen.
        starts: how often an attempt was really started.
        away: BackendError from every call.
        dies_after_start: the service is killed when the attempt has been made, before anybody could note it.
        hangs: calls for these names wait for it to be set.
    """

    def __init__(self, name: str = "local") -> None:
        self.name = name
        self.now: dict[str, Status] = {}
        self.jobs: dict[str, str] = {}
        self.orders: dict[str, Order] = {}
        self.starts: Counter[str] = Counter()
        self.cancelled: list[str] = []
        self.removed: list[str] = []
        self.away = False
        self.dies_after_start = False
        self.hangs: dict[str, threading.Event] = {}
        self.most_at_once = 0

    def check(self, job: Job) -> None:
        self._answer("")

    def start(self, order: Order) -> Handle:
        self._answer(order.name)
        if order.name not in self.now:
            self.starts[order.name] += 1
            self.now[order.name] = Status("running", started_s=1.0)
            self.jobs[order.name] = order.job.id
            self.orders[order.name] = order
            self.most_at_once = max(self.most_at_once, len(self.running()))
        if self.dies_after_start:
            raise Killed
        return {"id": order.name}

    def status(self, name: str, handle: Handle) -> Status:
        self._answer(name)
        return self.now.get(name, GONE)

    def logs(
        self,
        name: str,
        handle: Handle,
        *,
        node: int = 0,
        tail: int | None = None,
        follow: Callable[[], bool] | None = None,
        since: str = "",
    ) -> Iterator[bytes]:
        self._answer(name)
        return log_file.read(Path(str(self.orders[name].folder)) / "memory.txt", tail=tail)

    def cancel(self, name: str, handle: Handle, grace_s: float) -> None:
        self._answer(name)
        self.cancelled.append(name)

    def remove(self, name: str, handle: Handle) -> None:
        self._answer(name)
        self.removed.append(name)
        self.jobs.pop(name, None)
        self.now.pop(name, None)

    def reconcile(self) -> dict[str, str]:
        self._answer("")
        return dict(self.jobs)

    def close(self) -> None:
        """Nothing."""

    def running(self) -> list[str]:
        return [name for name, status in self.now.items() if status.phase in ("waiting", "running")]

    def end(self, name: str, exit_code: int | None = 0, **more: object) -> None:
        """The attempt has ended."""
        self.now[name] = Status("ended", exit_code=exit_code, ended_s=2.0, **more)  # type: ignore[arg-type]

    def _answer(self, name: str) -> None:
        if name in self.hangs:
            self.hangs[name].wait()
        if self.away:
            raise BackendError("the place does not answer")
