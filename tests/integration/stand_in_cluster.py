"""A stand-in for a cluster's API server (kmock, over HTTP), and what its controllers and machines would do.

Added to kmock: label and field selectors, uids, the garbage collector, logs of pods, refusals, and an account of who
asked for what.
"""

import asyncio
import threading
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import aiohttp.web
import kmock
import yaml

T = TypeVar("T")

INDEX = "batch.kubernetes.io/job-completion-index"
JOBSETS = "jobset.x-k8s.io/v1alpha2/jobsets"
RESOURCES = {"Job": "batch/v1/jobs", "JobSet": JOBSETS}
VERBS = {"FETCH": "get", "LIST": "list", "CREATE": "create", "DELETE": "delete", "UPDATE": "patch", "WATCH": "watch"}
NAMESPACE = "jobs"
STARTED = "2026-01-01T00:00:10Z"
ENDED = "2026-01-01T00:05:10Z"
DIGEST = "sha256:" + "ab" * 32


class Api(kmock.KubernetesEmulator):
    """kmock's emulator with what it lacks."""

    def __init__(self, *, jobsets: bool) -> None:
        super().__init__()
        self.used: set[tuple[str, str, str]] = set()
        self.paths: list[str] = []
        # The options of each request to delete.
        self.deletions: list[dict[str, str]] = []
        self.refusals: dict[tuple[str, str], tuple[int, str]] = {}
        self.logs: dict[str, list[bytes]] = {}
        self.ended_logs: set[str] = set()
        # Of a log that is followed: how many lines are sent before the connection breaks, once.
        self.breaks: dict[str, int] = {}
        self.count = 0
        names = ["batch/v1/jobs", "v1/pods", "v1/services", "v1/configmaps", "v1/events"]
        for name in [*names, *([JOBSETS] if jobsets else [])]:
            self.resources[name].namespaced = True

    async def _handle(self, request: kmock.Request) -> aiohttp.web.StreamResponse:
        self.paths.append(f"{request.method.value} {request.url.path}")
        what = request.resource
        if what is None or what.plural is None or request.action is None:
            return await super()._handle(request)
        plural = f"{what.plural}/{request.subresource}" if request.subresource else what.plural
        verb = VERBS[request.action.value]
        self.used.add((what.group, plural, verb))
        if (verb, plural) in self.refusals:
            status, message = self.refusals[verb, plural]
            raise kmock.KubernetesError(status=status, reason="Refused", message=message)
        if what not in self.resources:
            raise kmock.KubernetesResourceNotFoundError()
        if plural == "pods/log":
            return await self._log(request)
        if verb == "list":
            return aiohttp.web.json_response({"metadata": {}, "items": self._listed(request)})
        if verb == "create":
            self.count += 1
            request.data["metadata"] |= {"uid": f"uid-{self.count}", "creationTimestamp": "2026-01-01T00:00:00Z"}
        if verb == "delete":
            self.deletions.append(dict(request.params))
            doomed = self.objects[what, request.namespace, request.name].raw["metadata"].get("uid")
            answer = await super()._handle(request)
            self._collect(doomed)
            return answer
        return await super()._handle(request)

    def living(self, resource: str) -> dict[str, dict[str, Any]]:
        """All objects of a kind, by name."""
        wanted = kmock.resource(resource)
        found = {name: entry for (kind, _, name), entry in self.objects.items() if kind == wanted}
        return {name: entry.raw for name, entry in found.items() if not entry.deleted}

    def _listed(self, request: kmock.Request) -> list[dict[str, Any]]:
        found = list(
            self.living(
                f"{request.resource.group}/{request.resource.version}/{request.resource.plural}"
                if request.resource.group
                else f"v1/{request.resource.plural}"
            ).values()
        )
        for term in filter(None, request.params.get("labelSelector", "").split(",")):
            name, equals, value = term.partition("=")
            found = [
                one
                for one in found
                if name in (given := one["metadata"].get("labels", {})) and (not equals or given[name] == value)
            ]
        for term in filter(None, request.params.get("fieldSelector", "").split(",")):
            path, _, value = term.partition("=")
            found = [one for one in found if at(one, path) == value]
        return found

    def _collect(self, owner: str) -> None:
        """What the garbage collector does: what is owned goes with its owner."""
        for _, entry in list(self.objects.items()):
            if not entry.deleted and any(
                reference["uid"] == owner for reference in entry.raw["metadata"].get("ownerReferences", ())
            ):
                entry.delete()

    async def _log(self, request: kmock.Request) -> aiohttp.web.StreamResponse:
        name, asked = str(request.name), request.params
        assert asked["container"] == "main"
        stamped = asked.get("timestamps", "").lower() == "true"
        response = aiohttp.web.StreamResponse()
        assert request._raw_request is not None
        await response.prepare(request._raw_request)
        sent = 0 if "tailLines" not in asked else max(0, len(self.logs.get(name, [])) - int(asked["tailLines"]))
        try:
            while True:
                for line in self.logs.get(name, [])[sent:]:
                    stamp = b"2026-01-01T00:00:%02d.%dZ " % divmod(sent + 1, 10) if stamped else b""
                    sent += 1
                    await response.write(stamp + line)
                    if self.breaks.get(name) == sent and stamped:
                        del self.breaks[name]
                        # Within a line, as networks do.
                        await response.write(b"2026-01-01T00:00:59.1Z hal")
                        assert request._raw_request.transport is not None
                        request._raw_request.transport.abort()
                        return response
                if asked.get("follow", "").lower() != "true" or name in self.ended_logs:
                    break
                await asyncio.sleep(0.01)
            await response.write_eof()
        except ConnectionError:
            pass
        return response


def at(value: Any, path: str) -> Any:
    """The value at a dotted path."""
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


class Cluster:
    """The server on a thread of its own, and the hands of everything else that lives in a cluster."""

    def __init__(self, folder: Path, *, jobsets: bool = False) -> None:
        self.api = Api(jobsets=jobsets)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._run(self.api.__aenter__())
        self._server: kmock.Server | None = None
        self._port: int | None = None
        self.come()
        self.kubeconfig = folder / "kubeconfig"
        self.kubeconfig.write_text(yaml.safe_dump(self._config()))

    def come(self) -> None:
        """The server answers, at the port that it had before."""
        self._server = kmock.Server(self.api, port=self._port)
        self._run(self._server.__aenter__())
        self._port = self._server.port

    def go(self) -> None:
        """The server is away."""
        assert self._server is not None
        self._run(self._server.__aexit__(None, None, None))
        self._server = None

    def close(self) -> None:
        if self._server is not None:
            self.go()
        self._run(self.api.__aexit__(None, None, None))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self, work: Awaitable[T]) -> T:
        async def doing() -> T:
            return await work

        return asyncio.run_coroutine_threadsafe(doing(), self._loop).result(120)

    def _config(self) -> dict[str, Any]:
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "clusters": [{"name": "test", "cluster": {"server": f"http://127.0.0.1:{self._port}"}}],
            "users": [{"name": "test", "user": {"token": "a-token"}}],
        }

    def get(self, kind: str, name: str) -> dict[str, Any]:
        return self.api.living(RESOURCES.get(kind, kind))[name]

    def make_pods(self, name: str, kind: str = "Job", *, generation: int = 0) -> list[str]:
        """What the Job controller does with a job that is not suspended: a pod for each index, of its template."""
        found = self.get(kind, name)
        spec = found["spec"]
        if kind == "JobSet":
            spec = next(part for part in spec["replicatedJobs"] if part["name"] == "node")["template"]["spec"]
        names = [f"{name}-{index}-{generation}" for index in range(spec["completions"])]
        for index, pod in enumerate(names):
            template = spec["template"]
            labels = {**template["metadata"]["labels"]}
            if spec["completionMode"] == "Indexed":
                labels[INDEX] = str(index)
            about = {
                "name": pod,
                "namespace": NAMESPACE,
                "labels": labels,
                "creationTimestamp": f"2026-01-01T00:0{generation}:00Z",
                "ownerReferences": [{"uid": found["metadata"]["uid"]}],
            }
            self.api.objects["v1/pods", NAMESPACE, pod] = {
                "metadata": about,
                "spec": template["spec"],
                "status": {"phase": "Pending"},
            }
        return names

    def set(self, pod: str, **status: Any) -> None:
        """The status of a pod, as its machine or the scheduler writes it."""
        self.api.objects["v1/pods", NAMESPACE, pod].patch({"status": status})

    def place(self, pod: str, machine: str = "gpu-1") -> None:
        self.api.objects["v1/pods", NAMESPACE, pod].patch({"spec": {"nodeName": machine}})

    def conclude(self, name: str, type: str, kind: str = "Job", reason: str = "", message: str = "") -> None:
        """What a controller writes of the end of a job."""
        condition = {"type": type, "status": "True", "reason": reason, "message": message, "lastTransitionTime": ENDED}
        self.api.objects[RESOURCES[kind], NAMESPACE, name].patch({"status": {"conditions": [condition]}})

    def vanish(self, pod: str) -> None:
        del self.api.objects["v1/pods", NAMESPACE, pod]


def main(state: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
    return [{"name": "main", "image": "lorot", "imageID": f"registry.lan/lorot@{DIGEST}", "state": state, **more}]


def running() -> dict[str, Any]:
    return {"phase": "Running", "containerStatuses": main({"running": {"startedAt": STARTED}})}


def ended(code: int, reason: str = "", **more: Any) -> dict[str, Any]:
    state = {"exitCode": code, "reason": reason or ("Error" if code else "Completed"), "startedAt": STARTED}
    return {
        "phase": "Failed" if code else "Succeeded",
        "containerStatuses": main({"terminated": {**state, "finishedAt": ENDED}}),
        **more,
    }


def waiting(reason: str, message: str = "") -> dict[str, Any]:
    state = {"waiting": {"reason": reason, "message": message}}
    return {"phase": "Pending", "containerStatuses": main(state)}


def disrupted(reason: str) -> dict[str, Any]:
    return {"conditions": [{"type": "DisruptionTarget", "status": "True", "reason": reason}]}


@contextmanager
def cluster(folder: Path, *, jobsets: bool = False) -> Iterator[Cluster]:
    """A cluster for a test."""
    made = Cluster(folder, jobsets=jobsets)
    try:
        yield made
    finally:
        made.close()
