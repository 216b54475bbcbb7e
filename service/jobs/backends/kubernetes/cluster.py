"""The API server, as far as jobs need it: the official client's calls, plain dicts, and errors for people.

The client takes two seconds and 80 MB to load, so it is loaded at the first call and not before.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from service.errors import BackendError, ConfigError
from service.jobs.manifests.workloads import JOBSETS
from service.jobs.settings import KubernetesSettings

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

Document = dict[str, Any]

# Seconds: to connect, and to the answer. A log that is followed may be silent for longer.
_PATIENCE_S = (5, 30)
_SILENCE_S = (5, 300)
# How long a cluster that had no JobSets is believed to have none.
_BELIEVED_S = 300.0
_PAGE = 500
# That are kept open; each log that is followed takes one.
_CONNECTIONS = 32
_JOBSET = {"group": JOBSETS, "version": "v1alpha2", "plural": "jobsets"}
_RESOURCES = {
    "Job": "jobs.batch",
    "JobSet": "jobsets.jobset.x-k8s.io",
    "Service": "services",
    "ConfigMap": "configmaps",
    "Pod": "pods",
    "Event": "events",
}


class Cluster:
    """One namespace of a cluster. Thread-safe."""

    def __init__(self, settings: KubernetesSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._client: ApiClient | None = None
        self._jobsets = (False, float("-inf"))

    def has_jobsets(self) -> bool:
        """Whether JobSets are installed; asked once, and again after five minutes if they were not."""
        there, asked_s = self._jobsets
        if not there and time.monotonic() - asked_s > _BELIEVED_S:
            from kubernetes.client import CustomObjectsApi

            with self._explained(f"read /apis/{JOBSETS}"):
                api = CustomObjectsApi(self._connect())
                answer = self._found(api.get_api_resources, JOBSETS, _JOBSET["version"])
            there = answer is not None
            self._jobsets = (there, time.monotonic())
        return there

    def create(self, document: Mapping[str, Any]) -> Document | None:
        """Make an object; returns it as it was stored, or None if there is one of that name.

        Raises:
            ConfigError: the cluster finds it faulty.
            BackendError: it does not answer, or does not allow it.
        """
        from kubernetes.client import ApiException, BatchV1Api, CoreV1Api, CustomObjectsApi

        kind = str(document["kind"])
        with self._explained(f"create {_RESOURCES[kind]}"):
            client, where = self._connect(), self._settings.namespace
            try:
                if kind == "JobSet":
                    api = CustomObjectsApi(client)
                    answer = self._ask(
                        api.create_namespaced_custom_object, **_JOBSET, namespace=where, body=dict(document)
                    )
                else:
                    call = {
                        "Job": BatchV1Api(client).create_namespaced_job,
                        "Service": CoreV1Api(client).create_namespaced_service,
                        "ConfigMap": CoreV1Api(client).create_namespaced_config_map,
                    }[kind]
                    answer = self._ask(call, where, body=document)
            except ApiException as error:
                if error.status == 409:
                    return None
                raise
        # Single objects come without these.
        return {"apiVersion": document["apiVersion"], "kind": kind, **answer}

    def get(self, kind: str, name: str) -> Document | None:
        """A Job or JobSet; None if there is none."""
        from kubernetes.client import BatchV1Api, CustomObjectsApi

        where = self._settings.namespace
        with self._explained(f"get {_RESOURCES[kind]}"):
            client = self._connect()
            if kind == "JobSet":
                call = CustomObjectsApi(client).get_namespaced_custom_object
                found = self._found(call, **_JOBSET, namespace=where, name=name)
            else:
                found = self._found(BatchV1Api(client).read_namespaced_job, name, where)
        return None if found is None else {"kind": kind, **found}

    def delete(self, kind: str, name: str) -> None:
        """Delete a Job or JobSet and, after it, all that it owns; pods get their own time to end."""
        from kubernetes.client import BatchV1Api, CustomObjectsApi

        where = self._settings.namespace
        with self._explained(f"delete {_RESOURCES[kind]}"):
            client = self._connect()
            if kind == "JobSet":
                custom = CustomObjectsApi(client).delete_namespaced_custom_object
                self._found(custom, **_JOBSET, namespace=where, name=name, propagation_policy="Background")
            else:
                self._found(BatchV1Api(client).delete_namespaced_job, name, where, propagation_policy="Background")

    def find(self, kind: str, *, labels: str | None = None, fields: str | None = None) -> list[Document]:
        """All objects of a kind that carry the labels."""
        from kubernetes.client import BatchV1Api, CoreV1Api, CustomObjectsApi

        found: list[Document] = []
        asked: dict[str, Any] = {"limit": _PAGE}
        asked |= {"label_selector": labels} if labels is not None else {}
        asked |= {"field_selector": fields} if fields is not None else {}
        with self._explained(f"list {_RESOURCES[kind]}"):
            client, where = self._connect(), self._settings.namespace
            call: Any
            if kind == "JobSet":
                call, asked = CustomObjectsApi(client).list_namespaced_custom_object, {**_JOBSET, **asked}
            else:
                call = {
                    "Job": BatchV1Api(client).list_namespaced_job,
                    "Pod": CoreV1Api(client).list_namespaced_pod,
                    "Event": CoreV1Api(client).list_namespaced_event,
                }[kind]
            while True:
                answer = self._ask(call, namespace=where, **asked)
                found += answer.get("items", ())
                if not (more := answer.get("metadata", {}).get("continue")):
                    return found
                asked["_continue"] = more

    def log(
        self,
        pod: str,
        container: str,
        *,
        tail: int | None = None,
        since_s: int | None = None,
        timed: bool = False,
        follow: bool = False,
    ) -> Any:
        """A pod's log as an open HTTP response, `timed` with its time before each line; with `follow` it goes on.

        Args:
            since_s: of that age at most, by the clock of the pod's machine.
        """
        from kubernetes.client import CoreV1Api

        asked: dict[str, Any] = {"container": container}
        asked |= {"tail_lines": tail} if tail is not None else {}
        asked |= {"since_seconds": since_s} if since_s is not None else {}
        asked |= {"timestamps": True} if timed else {}
        asked |= {"follow": True} if follow else {}
        with self._explained("get pods/log"):
            return CoreV1Api(self._connect()).read_namespaced_pod_log(
                pod,
                self._settings.namespace,
                **asked,
                _preload_content=False,
                _request_timeout=_SILENCE_S if follow else _PATIENCE_S,
            )

    def close(self) -> None:
        """Let go of all connections."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def _connect(self) -> "ApiClient":
        from kubernetes import config
        from kubernetes.client import ApiClient, Configuration
        from urllib3.util import Retry

        with self._lock:
            if self._client is None:
                found, given = Configuration(), self._settings
                if given.kubeconfig is None and "KUBERNETES_SERVICE_HOST" in os.environ:
                    config.load_incluster_config(client_configuration=found)
                else:
                    path = str(given.kubeconfig) if given.kubeconfig is not None else None
                    config.load_kube_config(
                        path, context=given.context, client_configuration=found, persist_config=False
                    )
                # One more try where a connection that was kept open has been closed meanwhile.
                found.retries = Retry(1, backoff_factor=0, status=0)
                found.connection_pool_maxsize = _CONNECTIONS
                self._client = ApiClient(found)
            return self._client

    def _ask(self, call: Any, *arguments: Any, **options: Any) -> Document:
        """What the API server answers, as it is: the client's own types would refuse what they do not know."""
        response = call(*arguments, **options, _preload_content=False, _request_timeout=_PATIENCE_S)
        try:
            answer: Document = json.loads(response.data)
            return answer
        finally:
            response.release_conn()

    def _found(self, call: Any, *arguments: Any, **options: Any) -> Document | None:
        from kubernetes.client import ApiException

        try:
            return self._ask(call, *arguments, **options)
        except ApiException as error:
            if error.status == 404:
                return None
            raise

    @contextlib.contextmanager
    def _explained(self, doing: str) -> Iterator[None]:
        """Turn what the client raises into errors that say what would work."""
        from kubernetes.client import ApiException, OpenApiException
        from kubernetes.config import ConfigException
        from urllib3.exceptions import HTTPError

        place = self._settings
        which = place.kubeconfig or "~/.kube/config"
        try:
            yield
        except ApiException as error:
            raise _meaning(error, doing, place.namespace) from None
        except (ConfigException, OSError) as error:
            raise BackendError(
                f"no way to a cluster: {error}; backends.kubernetes.kubeconfig names a file that leads to one ({which} "
                "was looked at), and a pod of the cluster needs none"
            ) from None
        except (HTTPError, ValueError) as error:
            host = self._client.configuration.host if self._client is not None else which
            reason = getattr(error, "reason", None) or error
            raise BackendError(f"the cluster at {host} does not answer ({doing}: {reason})") from None
        except OpenApiException as error:
            raise ConfigError(f"the cluster's client refuses to {doing}: {error}") from None


def _meaning(error: Any, doing: str, namespace: str) -> BackendError | ConfigError:
    """Of a refusal by the API server."""
    message = _message(error)
    if error.status == 401:
        return BackendError(
            f"the cluster does not know who asks ({doing}): {message}; the token or certificate in the kubeconfig has "
            "to be a valid one"
        )
    if error.status == 403:
        verb, _, resource = doing.partition(" ")
        return BackendError(
            f"the cluster does not allow it: {message}; its account needs the verb {verb!r} on {resource} in namespace "
            f"{namespace}, as the Role in deploy/base/access.yaml has it"
        )
    if error.status in (400, 422) and doing.startswith("create"):
        return ConfigError(f"the cluster finds the job faulty ({doing}): {message}")
    if error.status == 404 and doing.startswith(("create", "list")):
        return BackendError(f"the cluster has no such place ({doing}): {message}; is there a namespace {namespace}?")
    return BackendError(f"the cluster answers {error.status} ({doing}): {message}")


def _message(error: Any) -> str:
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        return str(json.loads(error.body)["message"])
    with contextlib.suppress(KeyError):
        return str(json.loads(error.body)["reason"])
    return str(error.reason)
