"""What lies below s3://BUCKET/FOLDER in an object store, as backups need it: listed, read and written, with checks.

Who and where is in the environment, as for MLflow: MLFLOW_S3_ENDPOINT_URL or AWS_ENDPOINT_URL for any store but
Amazon's, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or whatever else boto3 takes.
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any

from service.errors import ConfigError, DataError, TrackingError

SCHEME = "s3://"
_ADDRESS = re.compile(r"s3://([a-z0-9][a-z0-9.-]+[a-z0-9])(?:/(.*))?")
_CHUNK_BYTES = 1 << 20
# What S3 deletes in one request.
_AT_ONCE = 1000
_ABSENT = ("404", "NoSuchKey", "NotFound")
_MD5 = re.compile("[0-9a-f]{32}")


class TornError(Exception):
    """An object's content is not what the store says of it, or the line was cut; reading it again may help."""


@dataclass(frozen=True)
class Content:
    """An object as of one moment.

    Attributes:
        source: read it once, to its end; raises TornError.
    """

    source: "_Body"
    num_bytes: int
    modified_s: int


class Objects:
    """Everything below an address; names are relative to it.

    Raises ConfigError for what is no address, and where boto3 is missing. Any method raises ConfigError if there is no
    such bucket, TrackingError if the store does not answer or refuses.
    """

    def __init__(self, address: str) -> None:
        match = _ADDRESS.fullmatch(address)
        if match is None:
            raise ConfigError(f"{address}: no address of objects; write s3://BUCKET or s3://BUCKET/FOLDER")
        self._bucket, prefix = match[1], (match[2] or "").strip("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self.address = f"{SCHEME}{self._bucket}/{prefix}".rstrip("/")
        try:
            import boto3
            import botocore.client
            import botocore.exceptions
        except ImportError as error:
            raise ConfigError(f"{address}: {error}; objects of a store take boto3: pip install boto3") from None
        self._errors = botocore.exceptions
        patience = botocore.client.Config(retries={"mode": "standard", "max_attempts": 3})
        # Without a region boto3 refuses to begin; stores of one's own have none.
        region = {} if boto3.session.Session().region_name else {"region_name": "us-east-1"}
        endpoint = os.environ.get("MLFLOW_S3_ENDPOINT_URL") or None
        with self._explained():
            self._client: Any = boto3.client("s3", endpoint_url=endpoint, config=patience, **region)

    def names(self) -> tuple[list[str], list[str]]:
        """Objects that can be files in folders, in order, and those that cannot: named as a folder is, or `..`."""
        # Stores mark a folder by an empty object; one with content has to be told of.
        found = [name for name, num_bytes in self._listed() if num_bytes or not name.endswith("/")]
        folders = {str(parent) for name in found for parent in PurePosixPath(name).parents}
        good: list[str] = []
        strange: list[str] = []
        for name in found:
            is_plain = name not in folders and "\0" not in name
            is_plain = is_plain and not any(part in ("", ".", "..") for part in name.split("/"))
            (good if is_plain else strange).append(name)
        return good, strange

    def refuse_if_filled(self) -> None:
        """Raise ConfigError unless nothing is there."""
        for name, _ in self._listed():
            raise ConfigError(
                f"{self.address}: holds {name!r} already and is not written over; name an empty bucket or a new folder"
            )

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[Content | None]:
        """An object's content; None if there is none any more."""
        try:
            with self._explained():
                answer = self._client.get_object(Bucket=self._bucket, Key=self._prefix + name)
        except KeyError:
            yield None
            return
        tag = answer["ETag"].strip('"')
        # Of an object that came in parts, or under a key of the store's own, it is something else.
        is_digest = _MD5.fullmatch(tag) and answer.get("ServerSideEncryption") in (None, "AES256")
        with contextlib.closing(answer["Body"]) as body:
            source = _Body(body, answer["ContentLength"], tag if is_digest else None, self._errors)
            yield Content(source, answer["ContentLength"], int(answer["LastModified"].timestamp()))

    def write(self, name: str, source: IO[bytes], sha256: str) -> None:
        """Make an object, read it back and compare; raises DataError if the store returns something else."""
        with self._explained():
            self._client.upload_fileobj(source, self._bucket, self._prefix + name)
        digest = hashlib.sha256()
        try:
            with self.reading(name) as written:
                while written is not None and (chunk := written.source.read(_CHUNK_BYTES)):
                    digest.update(chunk)
        except TornError as error:
            raise TrackingError(f"{self.address}/{name}: cannot be read back ({error})") from None
        if digest.hexdigest() != sha256:
            raise DataError(f"{self.address}/{name}: the store returns something else than was written to it")

    def remove(self, names: Iterable[str]) -> None:
        """Delete objects; raises TrackingError also if some are left."""
        keys = [{"Key": self._prefix + name} for name in names]
        with self._explained():
            for begin in range(0, len(keys), _AT_ONCE):
                chosen = {"Objects": keys[begin : begin + _AT_ONCE], "Quiet": True}
                answer = self._client.delete_objects(Bucket=self._bucket, Delete=chosen)
                if left := answer.get("Errors"):
                    raise TrackingError(f"{self.address}: {len(left)} objects are left, {left[0].get('Key')!r} first")

    def _listed(self) -> Iterator[tuple[str, int]]:
        """Names and sizes, bytes."""
        with self._explained():
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix):
                for entry in page.get("Contents", ()):
                    yield entry["Key"][len(self._prefix) :], entry["Size"]

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Errors of boto3 in words; KeyError for an object that is not there."""
        import boto3.exceptions

        try:
            yield
        except self._errors.ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            if code == "NoSuchBucket":
                raise ConfigError(f"{self.address}: there is no such bucket; make it, or name another") from None
            if code in _ABSENT:
                raise KeyError(self.address) from None
            raise TrackingError(f"{self.address}: the store refuses ({error})") from None
        except (self._errors.BotoCoreError, boto3.exceptions.Boto3Error, OSError) as error:
            raise TrackingError(
                f"{self.address}: the store does not answer ({error}); MLFLOW_S3_ENDPOINT_URL names one that is not "
                "Amazon's, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY who asks"
            ) from None


class _Body:
    """What the store sends, up to the size it announced, and compared with the MD5 it keeps, if it keeps one."""

    def __init__(self, body: Any, num_bytes: int, md5: str | None, errors: Any) -> None:
        self._body, self._left, self._md5, self._errors = body, num_bytes, md5, errors
        self._digest = hashlib.md5(usedforsecurity=False)

    def read(self, count: int, /) -> bytes:
        wanted = min(count, self._left)
        parts: list[bytes] = []
        while wanted:
            try:
                part = self._body.read(wanted)
            except (self._errors.BotoCoreError, OSError) as error:
                raise TornError(str(error)) from None
            if not part:
                raise TornError(f"it ended {self._left} bytes early")
            parts.append(part)
            self._digest.update(part)
            wanted -= len(part)
            self._left -= len(part)
            if not self._left and self._md5 not in (None, self._digest.hexdigest()):
                raise TornError("its MD5 is not the one that the store keeps")
        return b"".join(parts)
