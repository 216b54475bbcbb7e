"""Backups of artifacts in an object store, against a server that speaks S3 (moto)."""

import contextlib
import hashlib
import logging
import os
import socket
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from service import store
from service.errors import ConfigError, DataError, TrackingError
from service.jobs import settings_file
from service.jobs.settings import ServiceSettings
from service.operations import archive, database, objects
from service.operations.backup import back_up
from service.operations.objects import Objects, TornError
from service.operations.restore import restore

ROOT = Path(__file__).parents[2]
LARGE = os.urandom(1 << 20) * 9


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client, and two buckets: `old`, and `new`, which is empty."""
    for name in ("AWS_PROFILE", "AWS_DEFAULT_REGION", "AWS_REGION", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", address)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    client = boto3.client("s3", endpoint_url=address, region_name="us-east-1")
    for bucket in ("old", "new"):
        client.create_bucket(Bucket=bucket)
    yield client
    for bucket in ("old", "new"):
        empty(client, bucket)
        with contextlib.suppress(client.exceptions.NoSuchBucket):
            client.delete_bucket(Bucket=bucket)


def held(client: Any, bucket: str) -> dict[str, str]:
    """Every object, and the SHA-256 of what a plain GET returns."""
    names = [entry["Key"] for entry in client.list_objects_v2(Bucket=bucket).get("Contents", ())]
    return {
        name: hashlib.sha256(client.get_object(Bucket=bucket, Key=name)["Body"].read()).hexdigest() for name in names
    }


def empty(client: Any, bucket: str) -> None:
    with contextlib.suppress(client.exceptions.NoSuchBucket):
        for entry in client.list_objects_v2(Bucket=bucket).get("Contents", ()):
            client.delete_object(Bucket=bucket, Key=entry["Key"])


def without_large(client: Any) -> None:
    """Leave the one object of whose MD5 the store knows: what came in parts has none."""
    for name in held(client, "old"):
        if name.endswith("large.bin"):
            client.delete_object(Bucket="old", Key=name)


@pytest.fixture
def settings(place: str, s3: Any, tmp_path: Path) -> ServiceSettings:
    """A service with a record whose artifacts MLflow itself has put into the store, one of them in parts."""
    api = store.client(place)
    experiment = api.create_experiment("lorot", artifact_location="s3://old/mlflow/1")
    run = api.create_run(experiment, run_name="run")
    api.log_text(run.info.run_id, "weights", "model/weights.txt")
    (tmp_path / "large.bin").write_bytes(LARGE)
    api.log_artifact(run.info.run_id, str(tmp_path / "large.bin"))
    s3.put_object(Bucket="old", Key="others/secret.txt", Body=b"not MLflow's")
    return ServiceSettings(results=tmp_path / "jobs", state=tmp_path / "state", data_roots=(tmp_path / "data",))


def told(uri: str) -> tuple[str, bytes]:
    """What MLflow says of the run's artifacts."""
    api = store.client(uri)
    (run,) = api.search_runs([api.get_experiment_by_name("lorot").experiment_id])
    text = Path(api.download_artifacts(run.info.run_id, "model/weights.txt")).read_text()
    return text, Path(api.download_artifacts(run.info.run_id, "large.bin")).read_bytes()


def test_what_lay_in_a_store_comes_back_in_another_and_mlflow_finds_it_there(
    settings: ServiceSettings, s3: Any, tmp_path: Path
) -> None:
    said: list[str] = []
    made = back_up(settings, tmp_path / "b.tar", artifacts="s3://old/mlflow/", say=said.append)
    assert not any("not in it: artifacts in s3" in text for text in said)
    before = held(s3, "old")
    empty(s3, "old")
    done = restore(made, tmp_path / "new", artifacts="s3://new/again")
    assert done.server_artifacts == "s3://new/again"
    assert not (tmp_path / "new" / "artifacts" / "server").exists()
    found = held(s3, "new")
    assert {name.replace("again/", "mlflow/") for name in found} == before.keys() - {"others/secret.txt"}
    assert all(before[name.replace("again/", "mlflow/")] == digest for name, digest in found.items())
    uri = str(settings_file.load(done.settings).tracking_uri)
    assert "s3://new/again/1" in database.locations(uri)
    assert told(uri) == ("weights", LARGE)


def test_it_comes_back_as_a_folder_where_no_store_is_named(settings: ServiceSettings, s3: Any, tmp_path: Path) -> None:
    made = back_up(settings, tmp_path / "b.tar", artifacts="s3://old/mlflow")
    empty(s3, "old")
    done = restore(made, tmp_path / "new")
    assert done.server_artifacts == tmp_path / "new" / "artifacts" / "server"
    assert told(str(settings_file.load(done.settings).tracking_uri)) == ("weights", LARGE)
    assert held(s3, "new") == {}


def test_without_the_option_it_says_what_is_not_in_it(settings: ServiceSettings, tmp_path: Path) -> None:
    said: list[str] = []
    back_up(settings, tmp_path / "b.tar", say=said.append)
    assert any("not in it: artifacts in s3://old/mlflow/1" in text for text in said)


def test_a_folder_of_the_store_in_which_nothing_lies_is_no_backup(settings: ServiceSettings, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="s3://old/mlfow: nothing lies there"):
        back_up(settings, tmp_path / "b.tar", artifacts="s3://old/mlfow")
    assert not (tmp_path / "b.tar").exists()


def test_sigterm_leaves_no_pieces_of_a_backup(settings: ServiceSettings, place: str, tmp_path: Path) -> None:
    """A store that takes the question and never answers holds it up half-way."""
    target = tmp_path / "backups"
    target.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        here = {"MLFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{silent.getsockname()[1]}", "PYTHONPATH": str(ROOT)}
        line = [sys.executable, "-m", "service.cli", "backup", str(target), "--database", place]
        line += ["--artifacts", "s3://old", f"state={tmp_path}/state", f"results={tmp_path}/jobs"]
        with subprocess.Popen(line, env=os.environ | here) as process:
            silent.settimeout(120)
            asked, _ = silent.accept()
            assert [path.suffix for path in target.iterdir()] == [".making"]
            process.terminate()
            assert process.wait(60) == 75
            asked.close()
    assert list(target.iterdir()) == []


def test_objects_that_can_be_no_files_are_left_out_and_named(
    settings: ServiceSettings, s3: Any, tmp_path: Path
) -> None:
    empty(s3, "old")
    strange = ["both", "double//slash", "up/../../away", "./here", "content/"]
    for name in [*strange, "both/inner.txt", "folder/", "good.txt"]:
        s3.put_object(Bucket="old", Key=name, Body=name.encode() * (name != "folder/"))
    said: list[str] = []
    made = back_up(settings, tmp_path / "b.tar", artifacts="s3://old", say=said.append)
    for name in strange:
        assert any(text.endswith(f"s3://old/{name}") for text in said), name
    restore(made, tmp_path / "new", artifacts="s3://new")
    assert held(s3, "new").keys() == {"both/inner.txt", "good.txt"}


class Spoilt:
    """A connection on which the first byte arrives as another, in as many answers as it is told."""

    def __init__(self, body: Any, times: list[int]) -> None:
        self._body, self._times = body, times

    def read(self, count: int) -> bytes:
        content: bytes = self._body.read(count)
        if content and self._times:
            self._times.pop()
            content = bytes([content[0] ^ 1]) + content[1:]
        return content


def spoil(monkeypatch: pytest.MonkeyPatch, times: int, knows_digest: bool = True) -> None:
    left, real = [0] * times, objects._Body

    def body(body: Any, size: int, md5: str | None, errors: Any) -> Any:
        return real(Spoilt(body, left), size, md5 if knows_digest else None, errors)

    monkeypatch.setattr(objects, "_Body", body)


def test_an_object_that_does_not_come_whole_is_read_again_and_never_put_in_damaged(
    settings: ServiceSettings, s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_large(s3)
    with monkeypatch.context() as patch:
        spoil(patch, times=2)
        made = back_up(settings, tmp_path / "b.tar", artifacts="s3://old/mlflow")
    with archive.reading(made) as reader:
        reader.verify()
        (name,) = reader.manifest.below("artifacts/server")
        assert reader.text(name) == "weights"
    with tarfile.open(made) as opened:
        assert opened.getnames().count(name) == 1
    with monkeypatch.context() as patch:
        spoil(patch, times=100)
        with pytest.raises(TrackingError, match=r"weights.txt: cannot be read whole \(its MD5"):
            back_up(settings, tmp_path / "c.tar", artifacts="s3://old/mlflow")
    assert not [path for path in tmp_path.iterdir() if "c.tar" in path.name]


@pytest.mark.parametrize("knows_digest", [True, False])
def test_what_a_store_does_not_return_as_it_was_written_fails_the_restore_and_is_taken_away(
    knows_digest: bool, settings: ServiceSettings, s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_large(s3)
    made = back_up(settings, tmp_path / "b.tar", artifacts="s3://old/mlflow")
    with monkeypatch.context() as patch:
        spoil(patch, times=1, knows_digest=knows_digest)
        with pytest.raises(TrackingError if knows_digest else DataError, match=r"read back|something else"):
            restore(made, tmp_path / "new", artifacts="s3://new")
    assert held(s3, "new") == {}
    assert not (tmp_path / "new").exists()


def test_a_restore_that_fails_later_empties_the_store_again(
    settings: ServiceSettings, s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = back_up(settings, tmp_path / "b.tar", artifacts="s3://old/mlflow")

    def fails(*_: object) -> None:
        assert held(s3, "new"), "the objects come first"
        raise TrackingError("the database refuses")

    monkeypatch.setattr(database, "restore", fails)
    with pytest.raises(TrackingError, match="the database refuses"):
        restore(made, tmp_path / "new", artifacts="s3://new")
    assert held(s3, "new") == {}


def test_an_object_that_is_deleted_meanwhile_is_passed_over(
    settings: ServiceSettings, s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Objects.names

    def listed(self: Objects) -> tuple[list[str], list[str]]:
        found = real(self)
        s3.delete_object(Bucket="old", Key=f"mlflow/{found[0][0]}")
        return found

    monkeypatch.setattr(Objects, "names", listed)
    made = back_up(settings, tmp_path / "b.tar", artifacts="s3://old/mlflow")
    with archive.reading(made) as reader:
        assert len(reader.manifest.below("artifacts/server")) == 1


def test_a_damaged_archive_puts_nothing_into_a_store(settings: ServiceSettings, s3: Any, tmp_path: Path) -> None:
    made = back_up(settings, tmp_path / "b.tar", artifacts="s3://old/mlflow")
    content = bytearray(made.read_bytes())
    content[content.index(b"weights")] ^= 1
    made.write_bytes(content)
    with pytest.raises(DataError):
        restore(made, tmp_path / "new", artifacts="s3://new")
    assert held(s3, "new") == {}


def test_what_cannot_work_is_refused_in_words(
    settings: ServiceSettings, s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for wrong in ("s3://", "s3://Upper", "s3:///folder"):
        with pytest.raises(ConfigError, match="s3://BUCKET"):
            back_up(settings, tmp_path / "b.tar", artifacts=wrong)
    for wrong in (str(tmp_path / "nowhere"), "gs://bucket"):
        with pytest.raises(ConfigError, match="no folder of artifacts"):
            back_up(settings, tmp_path / "b.tar", artifacts=wrong)
    with pytest.raises(ConfigError, match="no such bucket"):
        back_up(settings, tmp_path / "b.tar", artifacts="s3://missing")
    assert not [path for path in tmp_path.iterdir() if "b.tar" in path.name]
    made = back_up(settings, tmp_path / "b.tar", artifacts="s3://old/mlflow")
    with pytest.raises(ConfigError, match=r"holds .*already"):
        restore(made, tmp_path / "new", artifacts="s3://old")
    plain = back_up(settings, tmp_path / "plain.tar")
    with pytest.raises(ConfigError, match="holds no artifacts of a tracking server"):
        restore(plain, tmp_path / "new", artifacts="s3://new")
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(TrackingError, match=r"does not answer.*MLFLOW_S3_ENDPOINT_URL"):
        restore(made, tmp_path / "new", artifacts="s3://new")
    assert not (tmp_path / "new").exists()


def test_a_body_that_ends_early_is_torn() -> None:
    class Short:
        def read(self, count: int) -> bytes:
            return b""

    import botocore.exceptions

    with pytest.raises(TornError, match="3 bytes early"):
        objects._Body(Short(), 3, None, botocore.exceptions).read(10)
