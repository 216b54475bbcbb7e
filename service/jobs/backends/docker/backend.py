"""Jobs as containers of a Docker engine: one each, or a node each on a network of their own. Imports no torch.

Everything carries the attempt's name and labels, so it is found again without any note, also by another process. The
engine starts nothing again by itself: the service does, from the last checkpoint and within the job's budget.
"""

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from docker.errors import APIError, ImageNotFound

from service.errors import BackendError, ConfigError, StorageError
from service.jobs import attempt_files, log_file
from service.jobs.backends import Handle, Order, Status
from service.jobs.backends.docker import containers, ends, images
from service.jobs.backends.docker import logs as log_files
from service.jobs.backends.docker.engine import Engine, meaning
from service.jobs.job import Job
from service.jobs.places import Place, PlaceLostError
from service.jobs.settings import ServiceSettings

# Between two looks at whether a log has begun.
_LOOK_S = 0.5

Inspected = Mapping[str, Any]


class DockerBackend:
    """Containers of one engine. Thread-safe."""

    name = "docker"

    def __init__(self, settings: ServiceSettings) -> None:
        self._settings = settings
        self._docker = settings.backends.docker
        self._engine = Engine(self._docker.url)
        self._pulls = images.Pulls()
        self._lock = threading.Lock()
        # Attempts that wait for their image, and those that were asked to stop and have not yet.
        self._waiting: dict[str, tuple[Order, images.Pull]] = {}
        self._stopping: set[str] = set()

    def check(self, job: Job) -> None:
        """Refuse what no engine is to do for this job; raises ConfigError."""
        containers.check(job, self._settings)

    def start(self, order: Order) -> Handle:
        """Make and start the containers of an attempt, or find them; returns at once, also while an image is fetched.

        Raises:
            ConfigError: the engine refuses the order: its folder, limits, GPUs or command.
            BackendError: it does not answer, or has no room now.
        """
        self.check(order.job)
        containers.prepare(order, self._docker)
        try:
            with self._engine.explained(), self._lock:
                self._make(order)
        except ConfigError:
            # What was made of it before would stay for good.
            self.remove(order.name, {})
            raise
        return {"folder": str(order.folder.absolute()), "nodes": order.job.spec.most_nodes}

    def status(self, name: str, handle: Handle) -> Status:
        """How the attempt stands. What has ended leaves its logs and its end in the job's folder."""
        with self._engine.explained():
            waiting = self._await_image(name)
            if waiting is not None:
                return waiting
            found = self._nodes(name)
            if not found:
                return self._noted(name, handle)
            now = self._judge(found)
            if now.phase == "ended":
                try:
                    self._keep(name, found, now)
                except StorageError:
                    # How it ended must be heard of on a full disk too; the logs are kept later, or not removed.
                    return now
            elif ends.is_hopeless([ends.Node.of(one) for one in found], _fewest(found)):
                self._stop(name, found)
            return now

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
        """What a node has written, from the engine, or from the job's folder when its container is gone.

        Raises:
            BackendError: the engine does not answer, or lost the stream while the container runs.
            PlaceLostError: `since` is not in it any more.
        """
        while True:
            waits = name in self._waiting
            with self._engine.explained():
                found = [] if waits else [one for one in self._nodes(name) if _node(one) == str(node)]
            waits = waits or (bool(found) and ends.Node.of(found[0]).phase == "waiting")
            if not waits or follow is None or not follow():
                break
            yield b""
            time.sleep(_LOOK_S)
        place = Place.parse(since) if since else None
        if not found:
            if place is not None:
                raise PlaceLostError("the container is gone, and the copy of its log has no times")
            yield from log_file.read(attempt_files.log(*self._kept(name, handle), node), tail=tail)
            return
        container = found[0]["Id"]
        with self._engine.explained():
            if follow is None:
                last = "all" if tail is None else tail
                yield from self._engine.api.logs(container, stream=True, follow=False, tail=last)
                return
            yield from log_files.follow(self._engine.api, container, follow, tail=tail, since=place)
            if follow() and any(one["Id"] == container and one["State"]["Running"] for one in self._nodes(name)):
                raise BackendError("the engine broke off the log of a container that still runs; ask again")

    def cancel(self, name: str, handle: Handle, grace_s: float) -> None:
        """Send SIGTERM to all nodes; the engine kills what is left of them after `grace_s`. Returns at once."""
        with self._engine.explained():
            with self._lock:
                self._waiting.pop(name, None)
            found = self._nodes(name)
            for one in found:
                if ends.Node.of(one).phase == "waiting":
                    self._engine.remove(one["Id"])
            self._stop(name, found, grace_s)

    def remove(self, name: str, handle: Handle) -> None:
        """Remove the attempt's containers and network; their logs are kept in the job's folder first."""
        with self._engine.explained():
            with self._lock:
                self._waiting.pop(name, None)
            found = self._nodes(name)
            if found:
                try:
                    self._keep(name, found, self._judge(found))
                except StorageError as error:
                    raise BackendError(f"the containers of {name} are left for now: {error}") from None
            for one in self._engine.inspect(name):
                self._engine.remove(one["Id"])
            for network in self._engine.networks(name):
                self._engine.remove_network(network)

    def reconcile(self) -> dict[str, str]:
        """The attempts that have containers or a network on the engine, and the job of each."""
        with self._engine.explained():
            found = self._engine.attempts()
        return {name: order.job.id for name, (order, _) in list(self._waiting.items())} | found

    def close(self) -> None:
        """Let go of the engine."""
        self._engine.close()

    def _make(self, order: Order) -> None:
        """Make what is missing of an attempt, and start what was never started."""
        engine, nodes = self._engine, order.job.spec.most_nodes
        here = {one["Name"].removeprefix("/"): one for one in engine.inspect(order.name)}
        if not here:
            image = containers.image_of(order.job.spec, self._docker)
            try:
                engine.api.inspect_image(image)
            except ImageNotFound:
                self._waiting[order.name] = order, self._pulls.begin(engine.api, image)
                return
        beside = None
        if containers.has_own_network(order):
            labels = {containers.JOB: order.job.id, containers.ATTEMPT: order.name}
            # With the operator's network beside it, no way needs to lead out of this one.
            engine.create_network(order.name, labels, internal=self._docker.network is not None)
            beside = self._docker.network
        parts: list[tuple[str, int | None]] = [(f"{order.name}-n{node}", node) for node in range(nodes)]
        if containers.meets(order):
            parts.insert(0, (f"{order.name}-{containers.MEETING_POINT}", None))
        for name, node in parts:
            if name not in here:
                body = containers.container(order, self._settings, node)
                here[name] = engine.create(name, body, None if node is None else beside)
        for name, _ in parts:
            self._start(order, here[name])

    def _start(self, order: Order, container: Inspected) -> None:
        """Start a container that never was; one that has run is not started again: it would do the same work twice.

        An engine that crashed as it started one calls it created. It may run all the same, which the engine notices
        soon, later, or never; asked again, it would end that and begin anew.
        """
        state, node = container["State"], _node(container)
        if state["Status"] != "created" or ends.has_run(state):
            return
        if attempt_files.is_starting(order.folder, order.number, node):
            if not self._engine.remembers_making(container["Id"]):
                raise BackendError("the engine went down as it started this container, which is not started again")
        else:
            attempt_files.note_starting(order.folder, order.number, node)
        self._engine.api.start(container["Id"])

    def _await_image(self, name: str) -> Status | None:
        """How an attempt stands that waits for its image; None if none does. Starts it once the image is there."""
        with self._lock:
            if name not in self._waiting:
                return None
            order, pull = self._waiting[name]
            if not pull.done.is_set():
                return Status("waiting", reason=f"the engine fetches image {pull.image}: {pull.says}")
            error = pull.error
            try:
                if error is None:
                    self._make(order)
            except APIError as refusal:
                error = meaning(refusal)
                if isinstance(error, BackendError):
                    raise
            except ConfigError as refusal:
                error = refusal
            del self._waiting[name]
        if error is None:
            return None
        end = Status("ended", error.exit_code, reason=str(error), ended_s=time.time())
        attempt_files.note(order.folder, order.number, end)
        return end

    def _nodes(self, name: str) -> list[dict[str, Any]]:
        """The containers of an attempt, without the rendezvous."""
        return [one for one in self._engine.inspect(name) if _node(one) != containers.MEETING_POINT]

    def _judge(self, found: Sequence[Inspected]) -> Status:
        digest = self._engine.digest(found[0]["Image"])
        return ends.status([ends.Node.of(one) for one in found], _fewest(found), digest)

    def _stop(self, name: str, found: Sequence[Inspected], grace_s: float | None = None) -> None:
        """Stop containers in the background, once at a time: a second SIGTERM would begin the grace anew."""
        running = [str(one["Id"]) for one in found if one["State"]["Running"]]
        with self._lock:
            if name in self._stopping or not running:
                return
            self._stopping.add(name)

        def stop() -> None:
            try:
                self._engine.stop_all(running, None if grace_s is None else math.ceil(grace_s))
            finally:
                with self._lock:
                    self._stopping.discard(name)

        threading.Thread(target=stop, name=f"stop of {name}", daemon=True).start()

    def _keep(self, name: str, found: Sequence[Inspected], status: Status) -> None:
        """Copy logs and the end of an attempt to the job's folder, once, so that they outlive the containers."""
        labels = found[0]["Config"]["Labels"]
        folder, number = self._kept(name, {"folder": labels[containers.FOLDER]})
        for one in found:
            target = attempt_files.log(folder, number, _node(one))
            if not target.exists():
                log_files.keep(self._engine.api, one["Id"], folder, target.relative_to(folder).as_posix())
        if status.phase == "ended":
            attempt_files.note(folder, number, status)

    def _noted(self, name: str, handle: Handle) -> Status:
        """How an attempt ended whose containers are gone, as far as that was kept."""
        kept = attempt_files.noted(*self._kept(name, handle))
        return kept or Status("gone", reason=f"the engine has no container of {name}, and nothing says how it ended")

    def _kept(self, name: str, handle: Handle) -> tuple[Path, int]:
        """The job's folder and the attempt's number."""
        return attempt_files.place(self._settings.results, name, handle)


def _fewest(found: Sequence[Inspected]) -> int:
    """The nodes that have to end well."""
    return int(found[0]["Config"]["Labels"].get(containers.FEWEST) or 1)


def _node(inspected: Inspected) -> str:
    return str(inspected["Config"]["Labels"].get(containers.NODE, "0"))
