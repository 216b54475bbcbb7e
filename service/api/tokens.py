"""API tokens: made once, shown once, kept as hashes in one file of the service's state. Imports no web framework."""

import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from service.errors import ConfigError, StorageError
from service.whole_file import write_json

# Each one may do what the ones before it may.
SCOPES = ("read", "submit", "admin")
PREFIX = "lorot_"
# Who asks where nobody has to say who they are; a token of that name would be taken for it.
LOCAL = "local"
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._@-]{0,62}[A-Za-z0-9])?")
_RANDOM_BYTES = 32


@dataclass(frozen=True)
class Token:
    """What is kept of a token.

    Attributes:
        name: whose it is; jobs carry it as their owner.
        sha256: of the token, 64 hexadecimal digits.
        scopes: all that it may, in the order of `SCOPES`.
        created: UTC, as 2026-11-22T15:04:05Z.
    """

    name: str
    sha256: str
    scopes: tuple[str, ...]
    created: str


def digest(token: str) -> str:
    """SHA-256 of a token. It has 256 random bits, so a slow hash would protect nothing more."""
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()


class Tokens:
    """The file. Other processes may write it meanwhile: it is read again whenever it has changed. Thread-safe."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._seen: tuple[int, ...] | None = None
        self._tokens: dict[str, Token] = {}

    @property
    def were_made(self) -> bool:
        """Whether anybody ever made one: without the last of them nobody is let in, rather than everybody."""
        return self.path.exists()

    def list(self) -> list[Token]:
        """All of them, by name; raises ConfigError where the file is damaged."""
        return sorted(self._current().values(), key=lambda token: token.name)

    def find(self, token: str) -> Token | None:
        """Whose this token is. Takes as long for a nearly right one as for a wrong one."""
        asked = digest(token)
        found = None
        for known in self._current().values():
            if hmac.compare_digest(known.sha256, asked):
                found = known
        return found

    def create(self, name: str, scope: str) -> str:
        """Make a token and return it: it is shown to nobody afterwards.

        Raises:
            ConfigError: the name is taken or none, or there is no such scope.
            StorageError: the file cannot be written.
        """
        if scope not in SCOPES:
            raise ConfigError(f"scope {scope!r} is none of {', '.join(SCOPES)}")
        if not _NAME.fullmatch(name) or name == LOCAL:
            raise ConfigError(f"token name {name[:80]!r}: use letters, digits, '.', '_', '@' and '-', as ci or ann@lab")
        token = PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)
        with self._changing() as tokens:
            if name in tokens:
                raise ConfigError(f"there is a token {name!r}; revoke it first, or choose another name")
            scopes = SCOPES[: SCOPES.index(scope) + 1]
            tokens[name] = Token(name, digest(token), scopes, f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}")
        return token

    def revoke(self, name: str) -> None:
        """Forget one; raises ConfigError if there is none of that name, StorageError."""
        with self._changing() as tokens:
            if name not in tokens:
                known = ", ".join(sorted(tokens)) or "none"
                raise ConfigError(f"there is no token {name[:80]!r}; there are {known}")
            del tokens[name]

    def _current(self) -> dict[str, Token]:
        with self._lock:
            try:
                state = os.stat(self.path)
            except FileNotFoundError:
                self._seen, self._tokens = None, {}
                return {}
            except OSError as error:
                raise ConfigError(f"{self.path}: cannot be read ({error.strerror})") from None
            seen = (state.st_mtime_ns, state.st_ino, state.st_size)
            if seen != self._seen:
                self._tokens, self._seen = self._read(), seen
            return self._tokens

    def _read(self) -> dict[str, Token]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            return {name: _token(name, entry) for name, entry in content.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"{self.path}: is no file of tokens ({type(error).__name__}); move it away and make new ones with "
                "`lorot token create`"
            ) from None

    @contextlib.contextmanager
    def _changing(self) -> Iterator[dict[str, Token]]:
        """The tokens, to be changed in place; then they are the file's, whole or not at all."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._lock, open(self.path.with_name(f".{self.path.name}.lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                tokens = self._read()
                yield tokens
                self._write(tokens)
                self._seen = None
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be written ({error.strerror}); is the folder yours?") from None

    def _write(self, tokens: dict[str, Token]) -> None:
        content: dict[str, Any] = {}
        for name, token in sorted(tokens.items()):
            content[name] = {key: value for key, value in asdict(token).items() if key != "name"}
        write_json(self.path, content)


def _token(name: str, entry: dict[str, Any]) -> Token:
    scopes = tuple(scope for scope in SCOPES if scope in entry["scopes"])
    if not re.fullmatch(r"[0-9a-f]{64}", entry["sha256"]):
        raise ValueError(name)
    return Token(name, entry["sha256"], scopes, str(entry["created"]))
