"""The job service under load: 1,000 jobs from 20 clients into a record of 10,000, and 200 who follow one log.

    python -m tests.benchmarks.service_load [--record 10000] [--jobs 1000] [--clients 20] [--followers 200]

The service is `lorot serve` as a process of its own, over HTTP, recording in SQLite. Its jobs are of kind train with a
whole configuration, checked, recorded and queued as ever, and each is started as a process with a runner of its own; in
place of `lorot train` that runs a program which writes into a ledger that it has begun and ended, so that what has run
is counted by itself and not by the service's word. The record is filled with copies of one finished job that has as
many parameters and last metrics as a real training; each has a name and a time of its own.

Latencies are those of a client in another process, one request after the other, on the same machine. Listed are pages
of 50 jobs: the first, one that is filtered, one further down; shown are jobs by id. Memory is the service's PSS. What
else the machine did meanwhile shows in its load average over a minute, which each row of latencies ends with. Exit code
1 if a job was lost or run twice, a follower missed a line, or anything is slower or larger than asked for.
"""

import argparse
import asyncio
import contextlib
import http.client
import json
import multiprocessing
import os
import random
import shutil
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
import urllib.parse
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from service import store
from service.jobs import settings_file
from service.jobs.record import Record
from service.jobs.spec import JobSpec
from tests.integration.processes import await_
from tests.integration.record_server import free_port
from tests.integration.tiny_service import TinyService, spec

LINES, LINES_S = 2000, 20.0
_PATIENCE_S = 3600.0
_PAUSE_S = 0.02
# What is asked for of list and show, 95 of 100, and of the service.
_BAR_S, _BAR_BYTES = 0.1, 300e6


def main() -> int:
    """Run it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=int, default=10_000, help="jobs that the record holds before")
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--followers", type=int, default=200)
    parser.add_argument("--cpus", type=int, default=4, help="jobs that run at once")
    parser.add_argument("--keep", type=Path, help="leave everything here; a record that was filled here is used again")
    given = parser.parse_args()
    if given.keep:
        given.keep.mkdir(parents=True, exist_ok=True)
        for name in ("jobs", "state", "mlruns"):
            shutil.rmtree(given.keep / name, ignore_errors=True)
        (given.keep / "ledger").unlink(missing_ok=True)
    folder = (given.keep or Path(tempfile.mkdtemp(prefix="lorot-load-"))).resolve()
    service = TinyService(folder, free_port())
    service.configure(cpus=given.cpus, poll_s=1.0)
    try:
        return 0 if measure(service, given) else 1
    finally:
        service.kill()
        if not given.keep:
            shutil.rmtree(folder, ignore_errors=True)


def measure(service: TinyService, given: argparse.Namespace) -> bool:
    """All of it, printed as it comes; whether nothing was lost or done twice, and every bar was met."""
    began = time.monotonic()
    slowest: dict[str, float] = {}
    known = filled(service, given.record)
    row("record filled", f"{given.record} jobs in {time.monotonic() - began:.0f} s")
    began = time.monotonic()
    service.start()
    await_(service.is_ready, "the service is ready", 600, service.told)
    row("start until ready", f"{time.monotonic() - began:.1f} s")
    with Memory(service) as memory:
        with sampled(service, known, slowest, "while the record is read"):
            await_(lambda: not service.ask("/v1/jobs?limit=1")["partial"], "all is read", _PATIENCE_S, service.told)
        row("start until all is read", f"{time.monotonic() - began:.1f} s")
        assert service.ask("/v1/jobs?limit=1")["total"] == given.record
        row("PSS at rest", f"{memory.now() / 1e6:.0f} MB")
        with sampled(service, known, slowest, "at rest"):
            time.sleep(10)
        with sampled(service, known, slowest, "while jobs are submitted and run"):
            ids, seconds = submit(service, given.jobs, given.clients)
            row(
                "submitted",
                f"{len(ids)} jobs by {given.clients} clients, {len(ids) / sum(seconds) * given.clients:.1f}/s",
            )
            row("submit, ms", shown(seconds))
            began = time.monotonic()
            await_(lambda: service.ask("/v1/queue")["waiting"] == [], "the queue is empty", _PATIENCE_S, service.told)
            await_(lambda: not service.ask("/v1/queue")["running"], "nothing runs", 600, service.told)
            row("until the last has ended", f"{time.monotonic() - began:.0f} s after the last submission")
        with sampled(service, [*known, *ids], slowest, "afterwards"):
            time.sleep(10)
        with sampled(service, [*known, *ids], slowest, "while a log is followed"):
            followed, whole = follow(service, given.followers)
        row("followers with every line", f"{whole} of {given.followers}, {LINES} lines in {LINES_S:.0f} s")
        row("PSS, highest", bar(f"{memory.highest / 1e6:.0f} MB", memory.highest, _BAR_BYTES, "300 MB"))
    for name, seconds in slowest.items():
        row(f"{name}, p95 of the slowest stretch", bar(f"{1000 * seconds:.1f} ms", seconds, _BAR_S, "100 ms"))
    is_within = memory.highest < _BAR_BYTES and max(slowest.values()) < _BAR_S
    return account(service, [*ids, followed], given.record) and whole == given.followers and is_within


def filled(service: TinyService, count: int) -> list[str]:
    """As `fill`, or what that has made here before."""
    kept, ids = service.folder / f"filled-{count}.db", service.folder / f"filled-{count}.json"
    database = service.folder / "mlruns" / "mlflow.db"
    if ids.exists():
        database.parent.mkdir()
        shutil.copy(kept, database)
    else:
        found = fill(service, count)
        shutil.copy(database, kept)
        ids.write_text(json.dumps(found))
    known: list[str] = json.loads(ids.read_text())
    return known


def fill(service: TinyService, count: int) -> list[str]:
    """A record of one job that was made as ever, and of copies of what the database holds of it; ids, a sample."""
    settings = settings_file.load(service.folder / "service.yaml")
    record = Record(settings)
    template, _ = record.create(JobSpec.model_validate(spec("earlier")), key="template")
    from mlflow.entities import Metric, Param

    api = store.client(record.uri)
    now_ms = int(time.time() * 1000)
    api.log_batch(template.id, params=[Param(f"group.setting_{number}", str(number)) for number in range(80)])
    api.log_batch(template.id, metrics=[Metric(f"train/m{number}", 0.5, now_ms, 100) for number in range(20)])
    record.change(template.id, state="starting")
    record.change(template.id, state="finished", ended_s=time.time())
    path = store.sqlite_path(record.uri)
    assert path is not None
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TEMP TABLE copies (id TEXT, number INTEGER)")
        copies = [(uuid.uuid4().hex, number) for number in range(1, count)]
        database.executemany("INSERT INTO copies VALUES (?, ?)", copies)
        for table in ("runs", "tags", "params", "metrics", "latest_metrics"):
            columns = [str(entry[1]) for entry in database.execute(f"PRAGMA table_info({table})")]
            values = ", ".join(copied(table, column) for column in columns)
            names = ", ".join(columns)
            chosen = f"SELECT {values} FROM {table} AS own, copies WHERE own.run_uuid = :old"
            database.execute(f"INSERT INTO {table} ({names}) {chosen}", {"old": template.id})
        database.commit()
    return random.Random(0).sample([template.id, *(job for job, _ in copies)], min(200, count))


def copied(table: str, column: str) -> str:
    """What a copy has in a column, as SQL: its own id, key and name in the place of the original's, and its time."""
    if column == "run_uuid":
        return "copies.id"
    if (table, column) == ("runs", "artifact_uri"):
        return "replace(own.artifact_uri, :old, copies.id)"
    if (table, column) != ("tags", "value"):
        # A second older, each than the one before.
        return f"own.{column} - 1000 * copies.number" if column in ("start_time", "end_time") else f"own.{column}"
    renamed = "replace(own.value, '/template', '/template-' || copies.number)"
    return (
        "CASE own.key WHEN 'lorot.job.submitted' THEN CAST(CAST(own.value AS REAL) - copies.number AS TEXT) "
        "WHEN 'lorot.job.spec' THEN replace(own.value, '\"earlier\"', '\"earlier-' || copies.number || '\"') "
        f"ELSE {renamed} END"
    )


def submit(service: TinyService, count: int, clients: int) -> tuple[list[str], list[float]]:
    """Ids of all jobs, and how long each answer took, seconds. Each client sends one after the other, some twice."""
    ids: dict[str, str] = {}
    seconds: list[float] = []
    problems: list[str] = []

    def work(number: int) -> None:
        dice = random.Random(number)
        connection = Connection(service)
        try:
            for index in range(number, count, clients):
                key = f"load-{index}"
                for _ in range(1 + (dice.random() < 0.05)):
                    began = time.perf_counter()
                    answer = connection.ask("/v1/jobs", {"spec": spec(key), "key": key})
                    seconds.append(time.perf_counter() - began)
                    if ids.setdefault(key, answer["id"]) != answer["id"]:
                        problems.append(f"{key} has two jobs")
        except Exception as error:
            problems.append(f"client {number}: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems, problems[:5]
    assert len(set(ids.values())) == count
    return list(ids.values()), seconds


def follow(service: TinyService, count: int) -> tuple[str, int]:
    """One job that writes for a while, followed by many; its id, and how many had every line once, in order."""
    job = str(
        service.ask("/v1/jobs", {"spec": spec("followed", lines=LINES, seconds=LINES_S), "key": "followed"})["id"]
    )
    await_(lambda: service.ask(f"/v1/jobs/{job}")["attempts"], "it has begun", 60, service.told)
    expected = [f"line {number} of {job}" for number in range(LINES)]

    async def all_of_them() -> list[list[str]]:
        return await asyncio.gather(*(read_events(service.url, job) for _ in range(count)))

    return job, sum(lines == expected for lines in asyncio.run(all_of_them()))


async def read_events(url: str, job: str) -> list[str]:
    """Every line of a job's log, as server-sent events bring them."""
    address = urllib.parse.urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    # Of an older version of HTTP, an answer ends with its connection and comes in no pieces.
    writer.write(f"GET /v1/jobs/{job}/logs?follow=true HTTP/1.0\r\nHost: {address.netloc}\r\n\r\n".encode())
    await writer.drain()
    lines, name = [], ""
    while line := await asyncio.wait_for(reader.readline(), LINES_S + 300):
        text = line.decode().rstrip("\r\n")
        if text.startswith("event:"):
            name = text.partition(":")[2].strip()
        elif text.startswith("data:") and not name:
            lines.append(text.removeprefix("data:").removeprefix(" "))
        elif not text:
            name = ""
    writer.close()
    return lines


def account(service: TinyService, ids: Sequence[str], before: int) -> bool:
    """What was lost, and what ran twice: by the ledger that the jobs themselves have written, and by the service.

    Returns:
        Whether nothing was, and all are listed as finished.
    """
    begun, ended = service.noted()
    states: Counter[str] = Counter()
    cursor, total = "", 0
    wanted = set(ids)
    while True:
        page = service.ask(f"/v1/jobs?limit=200{f'&cursor={cursor}' if cursor else ''}")
        total += len(page["jobs"])
        states.update(job["state"] for job in page["jobs"] if job["id"] in wanted)
        cursor = page["next"]
        if not cursor:
            break
    lost = {
        "never begun": len(wanted - {job for job, _ in begun}),
        "begun and not ended": sum((begun - ended).values()),
        "begun twice": sum(count > 1 for count in begun.values()) + len(begun) - len({job for job, _ in begun}),
        "unknown jobs that ran": len({job for job, _ in begun} - wanted),
    }
    for name, count in lost.items():
        row(name, count)
    row("states", ", ".join(f"{state} {count}" for state, count in states.items()))
    row("jobs in the list", f"{total} of {before + len(ids)}")
    return not any(lost.values()) and states == {"finished": len(wanted)} and total == before + len(ids)


class Connection:
    """One client's, kept open."""

    def __init__(self, service: TinyService) -> None:
        address = urllib.parse.urlsplit(service.url)
        self._connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=120)

    def ask(self, path: str, body: Any = None) -> Any:
        """The answer's JSON; raises RuntimeError for any that is no success."""
        content = None if body is None else json.dumps(body)
        self._connection.request("GET" if body is None else "POST", path, content, {"content-type": "application/json"})
        answer = self._connection.getresponse()
        text = answer.read()
        if answer.status not in (200, 201):
            raise RuntimeError(f"{path}: {answer.status} {text[:300]!r}")
        return json.loads(text)


@contextlib.contextmanager
def sampled(service: TinyService, ids: Sequence[str], slowest: dict[str, float], when: str) -> Iterator[None]:
    """Another process asks for lists and jobs meanwhile; printed are its latencies, and `slowest` keeps their p95."""
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    path = service.folder / "latencies.json"
    process = context.Process(target=sample, args=(service.folder, service.url, list(ids), path, stop))
    process.start()
    try:
        yield
    finally:
        stop.set()
        process.join()
    assert process.exitcode == 0, f"the client that measures has ended with {process.exitcode}"
    for name, seconds in json.loads(path.read_text()).items():
        row(f"{name}, ms, {when}", shown(seconds))
        slowest[name] = max(slowest.get(name, 0.0), statistics.quantiles(seconds, n=100)[94])


def sample(folder: Path, url: str, ids: Sequence[str], path: Path, stop: Any) -> None:
    """Ask one after the other until told to stop, and write down how long each answer took."""
    connection = Connection(TinyService(folder, urllib.parse.urlsplit(url).port or 0))
    dice = random.Random(0)
    seconds: dict[str, list[float]] = {"list": [], "show": []}
    # Until so many are read, there is no second page.
    while not (cursor := connection.ask("/v1/jobs?limit=50")["next"]):
        time.sleep(_PAUSE_S)
    lists = ["/v1/jobs?limit=50", "/v1/jobs?limit=50&state=finished&name=ear", f"/v1/jobs?limit=50&cursor={cursor}"]
    while not stop.is_set():
        for name, choice in (("list", lambda: dice.choice(lists)), ("show", lambda: f"/v1/jobs/{dice.choice(ids)}")):
            seconds[name].append(timed(lambda choice=choice: connection.ask(choice())))  # type: ignore[misc]
            time.sleep(_PAUSE_S)
    path.write_text(json.dumps(seconds))


def timed(ask: Callable[[], object]) -> float:
    began = time.perf_counter()
    ask()
    return time.perf_counter() - began


class Memory:
    """The service's PSS, looked at twice a second while this is open. Its jobs are not counted."""

    def __init__(self, service: TinyService) -> None:
        assert service.process is not None
        self._process = psutil.Process(service.process.pid)
        self.highest = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *problem: object) -> None:
        self._ended.set()
        self._thread.join()

    def now(self) -> int:
        """Bytes."""
        rollup = Path(f"/proc/{self._process.pid}/smaps_rollup").read_text()
        return next(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:"))

    def _look(self) -> None:
        while not self._ended.wait(0.5):
            self.highest = max(self.highest, self.now())


def shown(seconds: Sequence[float]) -> str:
    """Median, 95th and 99th percentile and the longest, in milliseconds; the load average."""
    cuts = statistics.quantiles(seconds, n=100)
    values = {"p50": statistics.median(seconds), "p95": cuts[94], "p99": cuts[98], "max": max(seconds)}
    told = "  ".join(f"{name} {1000 * own:.1f}" for name, own in values.items())
    return f"{told}  ({len(seconds)} requests, load {os.getloadavg()[0]:.1f})"


def bar(told: str, value: float, limit: float, limit_told: str) -> str:
    """A figure beside what was asked for."""
    return f"{told}, {'under' if value < limit else 'NOT under'} {limit_told}"


def row(name: str, value: object) -> None:
    print(f"{name:48} {value}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
