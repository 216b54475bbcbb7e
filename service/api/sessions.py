"""A browser's session: a signed cookie that stands for a token, and the proof that a form is of our own pages."""

import contextlib
import hashlib
import hmac
import json
import logging
import os
import secrets
import threading
import time
from pathlib import Path

from service.api.tokens import Token
from service.errors import StorageError
from service.whole_file import write_json

_log = logging.getLogger(__name__)

COOKIE = "lorot_session"
LIFETIME_S = 12 * 3600
_KEY_BYTES = 32
_FORGOTTEN_MOST = 10_000


class Sessions:
    """Signs and reads cookies. Of open ones nothing is kept but the key: they outlive a restart of the service.

    A cookie is `NAME|EXPIRES|NONCE|SIGNATURE`; the signature covers the hash of the token as well, so a session ends
    with its token.
    """

    def __init__(self, key_file: Path) -> None:
        self._key_file = key_file
        self._closed_file = key_file.with_suffix(".closed")
        self._own_key: bytes | None = None
        self._forgotten = self._kept_closed()
        self._lock = threading.Lock()

    def open(self, token: Token, now_s: float | None = None) -> str:
        """The cookie's value; raises StorageError where no key can be kept."""
        expires = int((time.time() if now_s is None else now_s) + LIFETIME_S)
        nonce = secrets.token_urlsafe(16)
        return f"{token.name}|{expires}|{nonce}|{self._signature(token, str(expires), nonce)}"

    def name_in(self, cookie: str) -> str | None:
        """The token's name that a cookie claims, unproven."""
        parts = cookie.split("|")
        return parts[0] if len(parts) == 4 else None

    def holds(self, cookie: str, token: Token, now_s: float | None = None) -> bool:
        """Whether we made this cookie for this token, and it has neither expired nor been closed."""
        name, expires, nonce, signature = cookie.split("|")
        signed = self._signature(token, expires, nonce)
        if name != token.name or not hmac.compare_digest(signed.encode(), signature.encode("utf-8", "replace")):
            return False
        return float(expires) > (time.time() if now_s is None else now_s) and nonce not in self._forgotten

    def close(self, cookie: str) -> None:
        """Let a cookie be worth nothing any more, here and after a restart."""
        _, expires, nonce, _ = cookie.split("|")
        with self._lock:
            now = time.time()
            self._forgotten = {key: until for key, until in self._forgotten.items() if until > now}
            if len(self._forgotten) >= _FORGOTTEN_MOST:
                return
            self._forgotten[nonce] = float(expires)
            try:
                write_json(self._closed_file, self._forgotten)
            except OSError as error:
                # It is closed all the same while this process lives.
                _log.warning("%s: a session that was closed is not noted there (%s)", self._closed_file, error.strerror)

    def csrf(self, cookie: str) -> str:
        """What a form of our own pages carries along, and a page of another site cannot know."""
        return hmac.new(self._key(), b"csrf|" + cookie.encode("utf-8", "replace"), hashlib.sha256).hexdigest()

    def is_ours(self, cookie: str, given: str) -> bool:
        """Whether a form came from one of our pages."""
        return hmac.compare_digest(self.csrf(cookie).encode(), given.encode("utf-8", "replace"))

    def _kept_closed(self) -> dict[str, float]:
        """Nonces of closed sessions, and until when their cookies would have held, seconds since the epoch."""
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
            found = json.loads(self._closed_file.read_text())
            return {str(nonce): float(expires) for nonce, expires in found.items()}
        return {}

    def _signature(self, token: Token, expires: str, nonce: str) -> str:
        text = "|".join(("session", token.name, expires, nonce, token.sha256))
        return hmac.new(self._key(), text.encode("utf-8", "replace"), hashlib.sha256).hexdigest()

    def _key(self) -> bytes:
        with self._lock:
            if self._own_key is None:
                self._own_key = self._kept_key()
            return self._own_key

    def _kept_key(self) -> bytes:
        try:
            self._key_file.parent.mkdir(parents=True, exist_ok=True)
            beside = self._key_file.with_name(f".{self._key_file.name}.{os.getpid()}")
            beside.unlink(missing_ok=True)
            with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(secrets.token_bytes(_KEY_BYTES))
                file.flush()
                # An empty one after a power cut would let nobody in any more.
                os.fsync(file.fileno())
            try:
                # Fails where there is one, which is then everybody's.
                os.link(beside, self._key_file)
            except FileExistsError:
                pass
            finally:
                beside.unlink()
            key = self._key_file.read_bytes()
        except OSError as error:
            raise StorageError(f"{self._key_file}: no key of sessions can be kept there ({error.strerror})") from None
        if len(key) != _KEY_BYTES:
            raise StorageError(f"{self._key_file}: holds no key of {_KEY_BYTES} bytes; remove it, a new one is made")
        return key
