"""Streams of logs that no file holds, and of those who may not read them any more."""

import asyncio
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from service.api import sse
from service.api.followers import Followers
from service.api.growing_log import GrowingLog
from service.client import events
from tests.service.api_shelf import Served, served


@pytest.fixture
def here(place: str, tmp_path: Path) -> Iterator[Served]:
    with served(tmp_path, place) as service:
        yield service


def test_a_log_without_a_file_is_kept_in_a_bounded_ring_and_gaps_are_told(here: Served) -> None:
    content = b"".join(b"line %06d\n" % number for number in range(40_000))
    job = here.run(here.submit()["id"])
    assert job.attempt is not None
    here.shelves["docker"].write(job.attempt.name, content)
    here.end(job.id)
    size = 100_003

    async def follow(tail: int | None) -> bytes:
        followers = Followers(here.desk, size)
        stream = followers.follow(job.id, tail=tail)
        raw = await anext(stream)
        raw += await anext(stream)
        # The attempt is announced before its log is opened.
        following = asyncio.ensure_future(anext(stream))
        raw += await asyncio.wait_for(following, 20)
        (log,) = followers._logs.values()
        while not log.done:
            await asyncio.wait_for(log.changed(log.more, 1), 20)
        assert log._file is not None
        assert os.fstat(log._file).st_size <= size
        async for piece in stream:
            raw += piece
        followers.free()
        return raw

    found = list(events(iter([asyncio.run(follow(None))])))
    told = [data for name, _, data in found if not name]
    (gap,) = [data for data in told if "bytes were left out here" in data]
    left_out = int(gap[1:].split()[0].replace(",", ""))
    offsets = [int(identifier.partition(":")[2]) for name, identifier, _ in found if not name]
    assert offsets == sorted(set(offsets))
    assert offsets[-1] == len(content)
    before, after = told[: told.index(gap)], "".join(data + "\n" for data in told[told.index(gap) + 1 :])
    assert content.decode().endswith(after)
    assert left_out + len(after) + sum(len(data) + 1 for data in before) == len(content)
    last = [data for name, _, data in events(iter([asyncio.run(follow(3))])) if not name]
    assert last == ["line 039997\nline 039998\nline 039999"]


def test_what_comes_while_a_follower_reads_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "KEEPALIVE_S", 3600.0)

    async def script() -> list[bytes]:
        with ThreadPoolExecutor(2) as pool:
            log, first = GrowingLog(pool), [b"half"]
            log._note(4)

            async def read(offset: int) -> bytes:
                # The rest and the end come after this one has looked, and before it waits.
                log._note(8, done=True)
                return first.pop() if first else b"half end"[offset:]

            monkeypatch.setattr(log, "read", read)
            followers = Followers.__new__(Followers)
            followers._closed = False
            return [piece async for piece in followers._pieces(log, "", 0, None)]

    assert asyncio.run(asyncio.wait_for(script(), 20)) == [b"id: 8\ndata: half end\n\n"]


@pytest.mark.parametrize("what", ["events", "logs"])
def test_revoking_a_token_ends_its_open_streams(here: Served, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "KEEPALIVE_S", 0.05)
    job = here.run(here.submit(here.token("ben", "submit"))["id"])
    path = "/v1/events" if what == "events" else f"/v1/jobs/{job.id}/logs?follow=true"
    headers = here.token("ann", "read")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(here.client.get, path, headers=headers)
        deadline = time.monotonic() + 20
        while not here.app.state.meters.streams:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        try:
            here.access.tokens.revoke("ann")
            assert answer.result(20).status_code == 200
        finally:
            here.app.state.changes.close()
            here.app.state.followers.close()
    assert here.app.state.meters.streams == 0
