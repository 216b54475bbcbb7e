"""Images that an engine does not have yet: fetched in the background, since that may take minutes. Imports no torch."""

import threading
from dataclasses import dataclass, field
from typing import Any

import docker.errors
import requests

from service.errors import BackendError, ConfigError

# What registries say of an image that they do not have or do not show; engines pass it on in various ways.
_NOWHERE = ("manifest unknown", "name unknown", "repository does not exist", "access to the resource is denied")


@dataclass
class Pull:
    """One image on its way.

    Attributes:
        error: what has become of it, if nothing good.
        says: how far it is, in the engine's words.
    """

    image: str
    done: threading.Event = field(default_factory=threading.Event)
    error: ConfigError | BackendError | None = None
    says: str = "asked for"

    def run(self, api: Any) -> None:
        """Fetch it."""
        try:
            for line in api.pull(self.image, stream=True, decode=True):
                if "error" in line:
                    # After the answer has begun the engine has no other way to say so.
                    self.error = BackendError(f"image {self.image!r} could not be fetched: {line['error']}")
                self.says = str(line.get("status", self.says))
        except docker.errors.APIError as error:
            said = str(error.explanation or error)
            if isinstance(error, docker.errors.NotFound) or any(sign in said for sign in _NOWHERE):
                self.error = missing(f"{self.image}: {said}")
            else:
                self.error = BackendError(f"image {self.image!r} is not on the engine and could not be fetched: {said}")
        except (docker.errors.DockerException, requests.exceptions.RequestException, OSError) as error:
            self.error = BackendError(
                f"image {self.image!r} could not be fetched: the engine does not answer ({error})"
            )
        finally:
            self.done.set()


def missing(said: str) -> ConfigError:
    """There is no such image, on the engine or where it looks."""
    return ConfigError(
        f"the job's image is not on the engine, and nowhere that it looks ({said.strip()}); correct the name, or build "
        "or load it there: docker build -t lorot -f docker/Dockerfile ."
    )


class Pulls:
    """The images on their way, each fetched once for all jobs that wait for it."""

    def __init__(self) -> None:
        self._pulls: dict[str, Pull] = {}
        self._lock = threading.Lock()

    def begin(self, api: Any, image: str) -> Pull:
        """Fetch an image, or find the fetching that goes on."""
        with self._lock:
            pull = self._pulls.get(image)
            if pull is None or pull.done.is_set():
                pull = self._pulls[image] = Pull(image)
                threading.Thread(target=pull.run, args=(api,), name=f"pull of {image}", daemon=True).start()
            return pull
