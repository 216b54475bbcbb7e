"""Remote files against real servers: an S3 stand-in (moto) in a process of its own, and HTTP servers."""

import http.server
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import boto3
import numpy as np
import pytest
import torch

from pipelines import datasets, manifest, pretext, remote
from pipelines.errors import DataError, UnreachableError
from pipelines.files import open_files
from pipelines.loading import Source, open_train
from pipelines.manifest import Heading, Manifest, Rows
from pipelines.plan import View
from pipelines.prepare import prepare
from pipelines.remote import RemoteFiles, use_cache
from pipelines.resizing import Recipe
from tests.integration.processes import await_
from tests.integration.record_server import free_port
from tests.pipelines.conftest import HEADING, draw, write_files

pytestmark = pytest.mark.integration

CONTENT = np.random.default_rng(0).bytes(3_000_000)
LARGE = 10**12


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """A client of a local S3 server, with the environment that fsspec finds it by; `log` holds its requests."""
    port, log = free_port(), tmp_path_factory.mktemp("s3") / "log"
    given = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }
    with pytest.MonkeyPatch.context() as patch, log.open("wb") as output:
        for name, value in given.items():
            patch.setenv(name, value)
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=output, stderr=output
        )
        try:
            client = boto3.client("s3")
            for _ in range(300):
                try:
                    client.create_bucket(Bucket="data")
                    break
                except Exception:
                    time.sleep(0.1)
            client.log = log
            yield client
        finally:
            server.terminate()
            server.wait()


class Server:
    """An HTTP server of some files that counts whole downloads and misbehaves when told to."""

    def __init__(self, files):
        self.files, self.downloads, self.misbehave, self.pause_s = files, [], [], 0.0
        self.tells_size = True
        # Unless it is set, a download stops after its first piece; after a test nothing hangs any more.
        self.go, self.over = threading.Event(), threading.Event()
        self.go.set()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.begin()

            def do_GET(self):
                content = self.begin()
                if content is None:
                    return
                outer.downloads.append(self.path)
                how = outer.misbehave.pop(0) if outer.misbehave else ""
                if how == "hang":
                    outer.over.wait(600)
                if how == "truncate":
                    content = content[: len(content) // 2]
                for start in range(0, len(content), 100_000):
                    self.wfile.write(content[start : start + 100_000])
                    outer.go.wait(120)
                    time.sleep(outer.pause_s)

            def begin(self):
                content = outer.files.get(self.path)
                self.send_response(404 if content is None else 200)
                if outer.tells_size:
                    self.send_header("Content-Length", str(len(content or b"")))
                self.end_headers()
                return content

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def web():
    server = Server({f"/set/{name}.tar": CONTENT for name in "abcd"})
    yield server
    server.go.set()
    server.over.set()
    server.server.shutdown()


def cached(folder):
    return sorted(path.name for path in folder.rglob("*.tar"))


def left_over(folder):
    return list(folder.rglob("*.partial"))


def await_begun(folder, count):
    """So many downloads have got their first piece."""
    await_(lambda: sum(path.stat().st_size > 0 for path in left_over(folder)) == count, "downloads under way", 60)


READ = """
import sys
from pipelines.remote import RemoteFiles
files = RemoteFiles(sys.argv[1], sys.argv[2], 10**12)
print(sum(len(files.read(sys.argv[3], offset, 1000)) for offset in range(0, 10**6, 10**4)), flush=True)
"""


def start_reader(url, folder, path):
    return subprocess.Popen([sys.executable, "-c", READ, url, str(folder), path], stdout=subprocess.PIPE, text=True)


def test_ranges_and_whole_files_of_a_bucket_are_read(s3, tmp_path):
    s3.put_object(Bucket="data", Key="one/a.tar", Body=CONTENT)
    s3.put_object(Bucket="data", Key="one/small/label.json", Body=b"{}")
    files = RemoteFiles("s3://data/one", tmp_path, LARGE)
    assert files.read("a.tar", 12_345, 678) == CONTENT[12_345 : 12_345 + 678]
    assert files.read("a.tar") == CONTENT
    assert files.read("small/label.json") == b"{}"
    assert files.read("a.tar", len(CONTENT) - 5, 5) == CONTENT[-5:]
    with pytest.raises(DataError, match=r"s3://data/one/a\.tar: ends before"):
        files.read("a.tar", len(CONTENT) - 5, 6)
    with pytest.raises(DataError, match=r"s3://data/one/b\.tar: no such file"):
        files.read("b.tar", 0, 1)
    with pytest.raises(DataError, match=r"s3://nowhere/one/a\.tar"):
        RemoteFiles("s3://nowhere/one", tmp_path, LARGE).read("a.tar")
    with pytest.raises(DataError, match="leaves the data folder"):
        files.read("../one/a.tar")


def test_two_processes_of_a_node_download_a_shard_of_a_bucket_once(s3, tmp_path):
    s3.put_object(Bucket="data", Key="two/once.tar", Body=CONTENT)
    readers = [start_reader("s3://data/two", tmp_path, "once.tar") for _ in range(2)]
    assert [reader.communicate(timeout=120)[0].strip() for reader in readers] == ["100000"] * 2
    assert s3.log.read_text().count("GET /data/two/once.tar") == 1


def test_a_training_set_in_a_bucket_gives_the_batches_that_it_gives_from_a_disk(s3, tmp_path):
    (tmp_path / "here").mkdir()
    images, places, shards = [], [], []
    for number in range(24):
        picture = tmp_path / "picture.jpg"
        draw(number, 30, 40).save(picture, quality=90)
        images.append(picture.read_bytes())
    for shard in range(3):
        own = images[shard * 8 : shard * 8 + 8]
        starts = np.cumsum([0] + [len(image) for image in own])
        places += [(shard, start, len(image)) for start, image in zip(starts, own, strict=False)]
        shards.append(f"{shard}.tar")
        (tmp_path / "here" / shards[-1]).write_bytes(b"".join(own))
        s3.put_object(Bucket="data", Key=f"three/{shard}.tar", Body=b"".join(own))
    indices, offsets, sizes = np.array(places).T
    rows = Rows(np.arange(24) % 2, np.full(24, 30), np.full(24, 40), shards=indices, offsets=offsets, sizes=sizes)
    heading = Heading(classes=("a", "b"), class_ids=("a", "b"), shards=tuple(shards), **HEADING)
    manifest.write(tmp_path / "index.arrow", heading, rows)
    use_cache(tmp_path / "cache", LARGE)
    batches = []
    for root in (tmp_path / "here", "s3://data/three"):
        opened = Manifest.open(tmp_path / "index.arrow", root)
        source = Source(opened, View(size=16), pretext.load("lorot_e"), 1, order="blocks", block=4)
        steps = {"start_step": 0, "stop_step": 5, "global_batch": 8, "micro_batch": 8, "num_threads": 1}
        batches.append(list(open_train("torch", source, **steps)))
    use_cache(None)
    for ours, theirs in zip(*batches, strict=True):
        for left, right in zip(ours, theirs, strict=True):
            assert torch.equal(left, right)
    assert cached(tmp_path / "cache") == shards


def test_an_unreachable_bucket_is_an_error_with_its_address_within_the_time_limit(s3, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    # Instances are kept by address of the bucket: a fresh process would not have this one.
    import fsspec

    fsspec.get_filesystem_class("s3").clear_instance_cache()
    began = time.monotonic()
    with pytest.raises(UnreachableError, match=r"s3://data/one/a\.tar: cannot be downloaded .* check the network"):
        RemoteFiles("s3://data/one", tmp_path, LARGE, timeout_s=3).read("a.tar")
    assert time.monotonic() - began < 120
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_many_threads_and_processes_download_a_file_once(web, tmp_path):
    files = RemoteFiles(f"{web.url}/set", tmp_path, LARGE)
    web.pause_s = 0.01
    found = []
    threads = [threading.Thread(target=lambda: found.append(files.read("a.tar", 7, 9))) for _ in range(8)]
    readers = [start_reader(f"{web.url}/set", tmp_path, "a.tar") for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [reader.communicate(timeout=120)[0].strip() for reader in readers] == ["100000"] * 2
    assert found == [CONTENT[7:16]] * 8
    assert web.downloads == ["/set/a.tar"]
    assert left_over(tmp_path) == []


def test_what_was_not_used_for_longest_goes_and_can_still_be_read_by_who_has_it_open(web, tmp_path):
    files = RemoteFiles(f"{web.url}/set", tmp_path, int(2.5 * len(CONTENT)))
    files.read("a.tar", 0, 1)
    files.read("b.tar", 0, 1)
    (b,), (a,) = tmp_path.rglob("b.tar"), tmp_path.rglob("a.tar")
    os.utime(b, (1, 1))
    reading = files._kept.get("b.tar")
    files.read("c.tar", 0, 1)
    assert cached(tmp_path) == ["a.tar", "c.tar"]
    assert os.pread(reading.number, 4, 100) == CONTENT[100:104]
    os.utime(a, (1, 1))
    # Wanted again, it is downloaded again, and the next one goes.
    assert files.read("b.tar", 50, 3) == CONTENT[50:53]
    assert cached(tmp_path) == ["b.tar", "c.tar"]
    assert web.downloads == [f"/set/{name}.tar" for name in "abcb"]


def test_a_limit_below_one_file_still_lets_one_be_read(web, tmp_path):
    files = RemoteFiles(f"{web.url}/set", tmp_path, 10)
    for name in "ab":
        assert files.read(f"{name}.tar", 3, 4) == CONTENT[3:7]
        assert cached(tmp_path) == [f"{name}.tar"]


def test_nothing_but_its_own_copies_is_counted_or_removed(web, tmp_path):
    others = [
        tmp_path / name for name in ("film.partial", "large.bin", "lorot-remote/notes", "lorot-remote/mine/a.tar")
    ]
    for path in others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(CONTENT)
        os.utime(path, (1, 1))
    files = RemoteFiles(f"{web.url}/set", tmp_path, int(2.5 * len(CONTENT)))
    for name in "abc":
        files.read(f"{name}.tar", 0, 1)
    assert all(path.read_bytes() == CONTENT for path in others)
    assert web.downloads == ["/set/a.tar", "/set/b.tar", "/set/c.tar"]
    assert len(cached(tmp_path)) == 2 + 1


def test_a_download_that_is_under_way_counts_as_what_it_will_be(web, tmp_path):
    files = RemoteFiles(f"{web.url}/set", tmp_path, int(2.5 * len(CONTENT)))
    files.read("b.tar", 0, 1)
    web.go.clear()
    other = start_reader(f"{web.url}/set", tmp_path, "a.tar")
    await_begun(tmp_path, 1)
    reading = threading.Thread(target=files.read, args=("c.tar", 0, 1))
    reading.start()
    # The other one is held up until room has been made for this one.
    await_begun(tmp_path, 2)
    web.go.set()
    reading.join()
    # It has come in part: with what has come alone, all would have had room.
    assert cached(tmp_path)[0] != "b.tar"
    assert other.communicate(timeout=120)[0].strip() == "100000"
    assert cached(tmp_path) == ["a.tar", "c.tar"]


def test_a_file_whose_size_the_server_does_not_tell_makes_room_once_it_has_come(web, tmp_path):
    web.tells_size = False
    files = RemoteFiles(f"{web.url}/set", tmp_path, int(2.5 * len(CONTENT)))
    for number, name in enumerate("abc"):
        assert files.read(f"{name}.tar", 9, 5) == CONTENT[9:14]
        for path in tmp_path.rglob(f"{name}.tar"):
            os.utime(path, (number, number))
    assert cached(tmp_path) == ["b.tar", "c.tar"]


def test_what_fails_while_a_lock_is_held_is_told_as_it_is(tmp_path):
    for problem in (OSError(5, "disk"), BlockingIOError(11, "busy")):
        with pytest.raises(OSError, match=problem.strerror), remote._locked(tmp_path / "lock", tmp_path / "p", 1.0):
            raise problem
        with remote._locked(tmp_path / "lock", tmp_path / "p", 1.0) as held:
            assert held


@pytest.fixture
def published(web, tmp_path, monkeypatch):
    """The address of a prepared set, which is served from memory."""
    (tmp_path / "source").mkdir()
    source = write_files(tmp_path / "source", [draw(number, 50, 60 + number) for number in range(30)])
    prepare(source, tmp_path / "set", recipe=Recipe(size=40), shard_bytes=30_000)
    web.files = {f"/set/{path.name}": path.read_bytes() for path in (tmp_path / "set").iterdir() if path.is_file()}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    use_cache(tmp_path / "cache", LARGE)
    yield f"{web.url}/set"
    use_cache(None)


def test_a_set_that_is_here_as_a_whole_is_used_without_its_server_and_said_so(web, published, caplog, monkeypatch):
    opened = datasets.load("prepared", published, "train")
    samples = [opened.read(sample) for sample in range(30)]
    web.server.shutdown()
    web.server.server_close()
    # Not before: a download that works may take longer.
    monkeypatch.setattr(remote, "TIMEOUT_S", 1.0)
    with caplog.at_level(logging.WARNING):
        again = datasets.load("prepared", published, "train")
    assert "all of split train is kept here as it was last opened" in caplog.text
    assert [again.read(sample) for sample in range(30)] == samples


def test_a_set_that_is_here_in_part_is_an_error_that_says_so(web, published, monkeypatch):
    opened = datasets.load("prepared", published, "train")
    opened.read(0)
    web.server.shutdown()
    web.server.server_close()
    # Not before: a download that works may take longer.
    monkeypatch.setattr(remote, "TIMEOUT_S", 1.0)
    shards = len(opened.heading.shards)
    with pytest.raises(UnreachableError, match=rf"set\.json: cannot be downloaded.*1 of {shards} shards are kept here"):
        datasets.load("prepared", published, "train")


def test_a_shard_that_the_server_no_longer_has_is_never_taken_for_bad_images(web, published):
    opened = datasets.load("prepared", published, "train")
    del web.files["/set/train-000001.tar"]
    source = Source(opened, View(size=16), pretext.load("none"), 1, on_bad_image="skip")
    with pytest.raises(UnreachableError, match=r"train-000001\.tar: no such file"):
        list(open_train("torch", source, start_step=0, stop_step=4, global_batch=8, micro_batch=8, num_threads=1))


def test_a_killed_download_is_taken_over_and_its_remains_are_removed(web, tmp_path):
    web.go.clear()
    doomed = start_reader(f"{web.url}/set", tmp_path, "a.tar")
    other = start_reader(f"{web.url}/set", tmp_path, "b.tar")
    await_begun(tmp_path, 2)
    for process in (doomed, other):
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    web.go.set()
    assert len(left_over(tmp_path)) == 2
    files = RemoteFiles(f"{web.url}/set", tmp_path, LARGE)
    assert files.read("a.tar", 0, 10) == CONTENT[:10]
    assert left_over(tmp_path) == []
    assert cached(tmp_path) == ["a.tar"]


def test_a_download_that_breaks_off_is_tried_again(web, tmp_path):
    web.misbehave = ["truncate", "truncate"]
    assert RemoteFiles(f"{web.url}/set", tmp_path, LARGE).read("a.tar") == CONTENT
    assert len(web.downloads) == 3


def test_a_server_that_sends_nothing_is_given_up_on_in_time(web, tmp_path):
    web.misbehave = ["hang"] * 9
    began = time.monotonic()
    with pytest.raises(UnreachableError, match=r"set/a\.tar: cannot be downloaded \(nothing has come for 2 s\)"):
        RemoteFiles(f"{web.url}/set", tmp_path, LARGE, timeout_s=2).read("a.tar")
    assert time.monotonic() - began < 120
    assert cached(tmp_path) == left_over(tmp_path) == []


def test_an_unreachable_storage_is_never_taken_for_bad_images(web, tmp_path):
    rows = Rows(np.zeros(8), np.full(8, 9), np.full(8, 9), [f"{number}.jpg" for number in range(8)])
    heading = Heading(classes=("a",), class_ids=("a",), **HEADING)
    manifest.write(tmp_path / "index.arrow", heading, rows)
    opened = Manifest.open(tmp_path / "index.arrow", tmp_path)
    opened.files = RemoteFiles(f"http://127.0.0.1:{free_port()}", tmp_path / "cache", LARGE, timeout_s=1)
    source = Source(opened, View(size=16), pretext.load("none"), 1, on_bad_image="skip")
    with pytest.raises(UnreachableError, match="http://127"):
        list(open_train("torch", source, start_step=0, stop_step=2, global_batch=4, micro_batch=4, num_threads=1))


def test_what_is_expected_is_downloaded_before_it_is_read(web, tmp_path):
    files = RemoteFiles(f"{web.url}/set", tmp_path, LARGE)
    files.expect("a.tar", 0, 10)
    deadline = time.monotonic() + 30
    while cached(tmp_path) != ["a.tar"] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert files.read("a.tar", 5, 5) == CONTENT[5:10]
    assert web.downloads == ["/set/a.tar"]


def test_a_url_opens_remote_files_in_the_chosen_cache(tmp_path):
    import fsspec

    fsspec.filesystem("memory").pipe("/set/a.tar", b"0123456789")
    use_cache(tmp_path / "cache", LARGE)
    files = open_files("memory://set")
    use_cache(None)
    assert files.read("a.tar", 2, 3) == b"234"
    assert cached(tmp_path / "cache") == ["a.tar"]
    with pytest.raises(DataError, match="none://set/a"):
        RemoteFiles("none://set", tmp_path, LARGE).read("a.tar")


def test_a_cache_that_cannot_be_written_is_named(web, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file.*cache_folder"):
        RemoteFiles(f"{web.url}/set", Path(tmp_path / "file"), LARGE).read("a.tar")
