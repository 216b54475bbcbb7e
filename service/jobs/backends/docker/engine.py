"""The connection to a Docker engine, and its few actions that everything else is made of. Imports no torch."""

import contextlib
import math
import os
import threading
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

import requests
import urllib3
from docker.errors import APIError, DockerException, ImageNotFound, NotFound

import docker
from service.errors import BackendError, ConfigError
from service.jobs.backends.docker import images
from service.jobs.backends.docker.containers import ATTEMPT, JOB

_TIMEOUT_S = 30
# What an engine says of an order that it will never carry out, however often it is asked.
_REFUSALS = (
    "executable file not found",
    "no such file or directory",
    "not a directory",
    "permission denied",
    "unknown or invalid runtime",
)


class Engine:
    """One engine. Thread-safe."""

    def __init__(self, url: str | None) -> None:
        self._url = url
        self._client: Any = None
        self._connecting = threading.Lock()
        self._digests: dict[str, str] = {}

    @property
    def api(self) -> Any:
        """The engine's own calls (`docker.APIClient`); the first use asks it for its version."""
        with self._connecting:
            if self._client is None:
                if self._url is None:
                    self._client = docker.from_env(timeout=_TIMEOUT_S)
                else:
                    self._client = docker.DockerClient(base_url=self._url, version="auto", timeout=_TIMEOUT_S)
            return self._client.api

    def close(self) -> None:
        """Let go of it; a further call connects anew."""
        with self._connecting:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def inspect(self, attempt: str) -> list[dict[str, Any]]:
        """The containers of an attempt, as they are now."""
        found = []
        for one in self.api.containers(all=True, filters={"label": f"{ATTEMPT}={attempt}"}):
            # Some are gone by the time they are looked at.
            with contextlib.suppress(NotFound):
                found.append(self.api.inspect_container(one["Id"]))
        return found

    def networks(self, attempt: str) -> list[str]:
        """The networks of an attempt, by id."""
        return [str(one["Id"]) for one in self.api.networks(filters={"label": f"{ATTEMPT}={attempt}"})]

    def attempts(self) -> dict[str, str]:
        """All attempts that have a container or a network here, and the job of each."""
        chosen = {"label": [JOB, ATTEMPT]}
        everything = [*self.api.containers(all=True, filters=chosen), *self.api.networks(filters=chosen)]
        return {one["Labels"][ATTEMPT]: one["Labels"][JOB] for one in everything}

    def create(self, name: str, body: dict[str, Any], network: str | None = None) -> dict[str, Any]:
        """Make a container, or find the one that an earlier call has made.

        Args:
            network: joined besides the one in `body`.
        """
        try:
            self.api.create_container_from_config(body, name)
        except APIError as error:
            if error.status_code != 409:
                raise
        made: dict[str, Any] = self.api.inspect_container(name)
        if made["Config"]["Labels"].get(ATTEMPT) != body["Labels"][ATTEMPT]:
            raise BackendError(f"a container called {name} exists and is not the service's; rename or remove it")
        if network is not None and network not in made["NetworkSettings"]["Networks"]:
            self.api.connect_container_to_network(name, network)
        return made

    def remembers_making(self, container: str) -> bool:
        """Whether the engine is still the process that made this container; it may also have forgotten that it is.

        It keeps the last few hundred events of its life, and begins anew with none.
        """
        now = datetime.fromisoformat(self.api.info()["SystemTime"])
        chosen = {"container": container, "event": "create"}
        events = self.api.events(since=0, until=math.ceil(now.timestamp()), filters=chosen, decode=True)
        with contextlib.closing(events):
            return any(True for _ in events)

    def create_network(self, name: str, labels: dict[str, str], internal: bool) -> None:
        """Make a network, or find the one that an earlier call has made; no way leads out of an internal one."""
        if self.networks(labels[ATTEMPT]):
            return
        try:
            self.api.create_network(name, driver="bridge", check_duplicate=True, internal=internal, labels=labels)
        except APIError as error:
            if "address pool" in str(error.explanation):
                raise BackendError(
                    "the engine has no addresses left for a further network; `docker network prune` removes unused "
                    "ones, default-address-pools in /etc/docker/daemon.json gives it more"
                ) from None
            raise

    def remove(self, container: str) -> None:
        """Remove a container, whatever it does, and its anonymous volumes."""
        try:
            self.api.remove_container(container, v=True, force=True)
        except NotFound:
            return
        except APIError as error:
            # Another call removes it already.
            if error.status_code != 409:
                raise

    def remove_network(self, network: str) -> None:
        """Remove a network that no container is in any more."""
        with contextlib.suppress(NotFound):
            self.api.remove_network(network)

    def stop_all(self, running: Sequence[str], timeout_s: int | None) -> None:
        """SIGTERM, and after `timeout_s` (None: as each was made with) SIGKILL; returns when they have ended.

        The engine goes on with it should this process end. What could not be asked still runs.
        """
        api = self.api

        def stop(container: str) -> None:
            with contextlib.suppress(DockerException, requests.exceptions.RequestException, OSError):
                api.stop(container, timeout=timeout_s)

        threads = [threading.Thread(target=stop, args=(container,), daemon=True) for container in running]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def digest(self, image: str) -> str:
        """Of an image by its id: what its registry calls it, or else the id itself."""
        if image not in self._digests:
            try:
                known = self.api.inspect_image(image).get("RepoDigests") or []
            except NotFound:
                return image
            self._digests[image] = known[0].rpartition("@")[2] if known else image
        return self._digests[image]

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Turn what the engine's client raises into errors for people."""
        try:
            yield
        except APIError as error:
            raise meaning(error) from None
        except (DockerException, requests.exceptions.RequestException, urllib3.exceptions.HTTPError) as error:
            where = self._url or os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
            advice = (
                "let the service's user join the group docker"
                if "Permission denied" in str(error)
                else "start it (systemctl start docker), or correct backends.docker.url or DOCKER_HOST"
            )
            raise BackendError(f"the Docker engine at {where} does not answer ({error}); {advice}") from None


def meaning(error: APIError) -> ConfigError | BackendError:
    """Whether the engine refuses this order for good, or could not carry it out now."""
    said = str(error.explanation or error)
    if isinstance(error, ImageNotFound):
        return images.missing(said)
    if "could not select device driver" in said:
        return ConfigError(
            "the engine cannot hand out GPUs; install NVIDIA's container toolkit on its machine, and restart it"
        )
    if error.status_code == 400 or any(sign in said.lower() for sign in _REFUSALS):
        return ConfigError(f"the engine refuses this container: {said}")
    return BackendError(f"the engine could not do it: {said}")
