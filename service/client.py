"""A job service from outside, over HTTP: what `lorot submit`, `jobs` and `logs` speak. Imports no torch."""

import re
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from service import errors
from service.errors import BackendError, ConfigError, LorotError, TrackingError, UnknownJobError

# Seconds: until a connection stands; until the next byte comes. An event stream says something every 15 s.
_CONNECT_S, _ANSWER_S = 5.0, 120.0
_ATTEMPTS = 4
_LONGEST_WAIT_S = 30.0
# A service that is started anew is away for some seconds; a log that is followed waits so long for it in all.
_AWAY_S, _LONGEST_GAP_S = 60.0, 5.0
_ADVICE = "start one with `lorot serve`, correct --server or LOROT_SERVER, or unset it to work without a service"
_KINDS: Mapping[str, type[LorotError]] = {
    name: kind
    for name in errors.__all__
    if isinstance(kind := getattr(errors, name), type) and issubclass(kind, LorotError)
}


class UnknownTokenError(ConfigError):
    """The service does not know who asks, whatever is asked: the token is missing, wrong or revoked."""


class Client:
    """One service. Every call raises what the service has told: ConfigError, UnknownJobError, StateError, ...

    What may be sent again is, when the service is busy or its connection breaks; a job is made once all the same.

    Args:
        url: as http://127.0.0.1:8080.
        token: as `lorot token create` prints it; "" for a service that asks for none.
    """

    def __init__(self, url: str, token: str = "", *, wait: Callable[[float], None] = time.sleep) -> None:
        import requests

        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"server {url!r}: write http://HOST:PORT, as http://127.0.0.1:8080")
        self.url = url.rstrip("/")
        self._wait = wait
        self._session = requests.Session()
        # Always: without it requests would send what a .netrc has for this host.
        self._session.auth = _Bearer(token)

    def check(self, spec: Mapping[str, Any], manifests: str | None = None) -> dict[str, Any]:
        """{"spec", "config", "manifests"}: what the job would be; nothing is handed in.

        Args:
            manifests: "objects" or "trainjob": tell also what it would be in the cluster.
        """
        asked = {"spec": spec} | ({} if manifests is None else {"manifests": manifests})
        return self._json("POST", "/v1/check", json=asked, again=True)

    def submit(self, spec: Mapping[str, Any], key: str) -> tuple[dict[str, Any], bool]:
        """The job of this key, and whether it is new."""
        answer = self._ask("POST", "/v1/jobs", json={"spec": spec, "key": key}, again=True)
        job: dict[str, Any] = answer.json()
        return job, answer.status_code == 201

    def page(self, cursor: str | None = None, **questions: Any) -> dict[str, Any]:
        """{"jobs", "next", "total", "partial"}; questions: state, kind, backend, owner, name, limit."""
        asked = {key: value for key, value in {**questions, "cursor": cursor}.items() if value is not None}
        return self._json("GET", "/v1/jobs", params=asked)

    def job(self, job_id: str) -> dict[str, Any]:
        return self._json("GET", _path(job_id))

    def compare(self, job_ids: Sequence[str]) -> dict[str, Any]:
        """{"jobs", "names", "configurations", "settings", "metrics", "best"}, with a value for each job."""
        return self._json("GET", "/v1/jobs/compare", params={"id": list(job_ids)})

    def cancel(self, job_id: str) -> dict[str, Any]:
        return self._json("POST", _path(job_id, "cancel"), again=True)

    def retry(self, job_id: str) -> dict[str, Any]:
        return self._json("POST", _path(job_id, "retry"))

    def resume(self, job_id: str) -> dict[str, Any]:
        return self._json("POST", _path(job_id, "resume"))

    def logs(
        self, job_id: str, *, attempt: int | None = None, node: int = 0, tail: int | None = None, follow: bool = False
    ) -> Iterator[bytes]:
        """What a node has written; with `follow`, line by line until the job has ended, over broken connections."""
        asked = {"attempt": attempt, "node": node, "tail": tail}
        params = {key: value for key, value in asked.items() if value is not None}
        if follow:
            yield from self._followed(_path(job_id, "logs"), params | {"follow": "true"})
            return
        try:
            with self._ask("GET", _path(job_id, "logs"), params=params, stream=True) as answer, self._explained():
                yield from answer.iter_content(64 * 1024)
        except _BrokenError as error:
            raise BackendError(
                f"the connection to the job service at {self.url} broke within the log ({error}); ask again, "
                "or follow the log (-f), which goes on where it was"
            ) from None

    def tokens(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._json("GET", "/v1/tokens")["tokens"]
        return found

    def create_token(self, name: str, scope: str) -> str:
        """The new token, which is told this once."""
        return str(self._json("POST", "/v1/tokens", json={"name": name, "scope": scope})["token"])

    def revoke_token(self, name: str) -> None:
        self._ask("DELETE", f"/v1/tokens/{urllib.parse.quote(name, safe='')}")

    def close(self) -> None:
        self._session.close()

    def _followed(self, path: str, params: Mapping[str, Any]) -> Iterator[bytes]:
        last_id, begun, failures, waited_s = "", False, 0, 0.0
        while True:
            headers = {"Last-Event-ID": last_id} if last_id else {}
            try:
                # Once it has begun, the pauses are made here.
                attempts = 1 if begun else _ATTEMPTS
                answer = self._ask("GET", path, attempts=attempts, params=params, headers=headers, stream=True)
            except (BackendError, TrackingError):
                if not begun or waited_s >= _AWAY_S:
                    raise
            else:
                begun = True
                try:
                    with answer, self._explained():
                        for name, identifier, data in events(answer.iter_content(None)):
                            failures, waited_s, last_id = 0, 0.0, identifier or last_id
                            if name == "end":
                                return
                            if name == "problem":
                                raise BackendError(f"the log cannot be read on: {data}")
                            if not name:
                                yield data.encode() + b"\n"
                except _BrokenError:
                    pass
            if waited_s >= _AWAY_S:
                raise BackendError(f"the job service at {self.url} does not answer any more; {_ADVICE}")
            failures += 1
            pause = min(2.0**failures / 2, _LONGEST_GAP_S)
            waited_s += pause
            self._wait(pause)

    def _json(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self._ask(method, path, **options).json()
        return answer

    def _ask(self, method: str, path: str, *, again: bool = False, attempts: int = _ATTEMPTS, **options: Any) -> Any:
        again = again or method == "GET"
        for attempt in range(1, attempts + 1):
            try:
                with self._explained():
                    answer = self._session.request(
                        method, self.url + path, timeout=(_CONNECT_S, _ANSWER_S), allow_redirects=False, **options
                    )
            except _BrokenError as error:
                if again and attempt < attempts and error.was_connected:
                    self._wait(2.0**attempt / 2)
                    continue
                raise BackendError(f"no job service answers at {self.url} ({error}); {_ADVICE}") from None
            if answer.ok and not answer.is_redirect:
                return answer
            refused = _refusal(answer, self.url)
            after = answer.headers.get("Retry-After", "")
            if answer.status_code in (429, 503) and again and attempt < attempts and after.isdecimal():
                self._wait(min(float(after), _LONGEST_WAIT_S))
                continue
            raise refused
        raise AssertionError("the last attempt returns or raises")

    def _explained(self) -> "_Explained":
        return _Explained()


class _Bearer:
    """Puts the token into a request; made before it is sent, so that it follows no redirect to another host."""

    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: Any) -> Any:
        if self._token:
            request.headers["Authorization"] = f"Bearer {self._token}"
        return request


class _BrokenError(Exception):
    """No answer, or not all of it."""

    def __init__(self, reason: str, was_connected: bool) -> None:
        super().__init__(reason)
        self.was_connected = was_connected


class _Explained:
    """Turns what `requests` raises into a _BrokenError."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        import requests
        import urllib3

        if isinstance(error, requests.RequestException | urllib3.exceptions.HTTPError):
            cannot = isinstance(error, requests.ConnectTimeout) or "NewConnectionError" in repr(error)
            reason = "refused" if "refused" in str(error) else type(error).__name__
            raise _BrokenError(reason, not cannot) from None


def events(chunks: Iterator[bytes]) -> Iterator[tuple[str, str, str]]:
    """(name, id, data) of each server-sent event in a stream, which may be cut anywhere."""
    name, identifier = "", ""
    data: list[str] = []
    for line in _lines(chunks):
        if not line:
            if data:
                yield name, identifier, "\n".join(data)
            name, data = "", []
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            data.append(value)
        elif field == "event":
            name = value
        elif field == "id":
            identifier = value


def _lines(chunks: Iterator[bytes]) -> Iterator[str]:
    """Our service ends all lines with LF."""
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.decode("utf-8", "replace")


def _path(job_id: str, *parts: str) -> str:
    # Whatever else it is, it would be another address.
    if not re.fullmatch(r"[0-9A-Za-z_-]{1,64}", job_id):
        raise UnknownJobError(f"there is no job {job_id!r}; an id has hexadecimal digits, and `lorot jobs` lists them")
    return "/".join(("/v1/jobs", job_id, *parts))


def _refusal(answer: Any, url: str) -> LorotError:
    """The error that the service has told, as it was raised there."""
    if answer.is_redirect:
        return BackendError(f"{url} sends elsewhere, to {answer.headers.get('location', '')[:200]}; use that address")
    try:
        told = answer.json()["error"]
        kind, message = str(told["type"]), str(told["message"])
    except (ValueError, KeyError, TypeError):
        return BackendError(f"{url} answers {answer.status_code}, and not as a job service does; is the address right?")
    if answer.status_code in (401, 403):
        refused = UnknownTokenError if answer.status_code == 401 else ConfigError
        return refused(f"{message} (LOROT_TOKEN or --token-file gives a token)")
    # 429: nothing is wrong with what was asked for; later it may be had.
    is_ours = answer.status_code < 500 and answer.status_code != 429
    return _KINDS.get(kind, ConfigError if is_ours else BackendError)(message)


def read_token(path: Path) -> str:
    """The token in a file; raises ConfigError."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: no token can be read there ({getattr(error, 'strerror', None) or 'no text'})"
        ) from None
