"""Streams of logs that no file holds, and of those who may not read them any more."""

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from service.api import followers as followers_
from service.api import growing_log, sse
from service.api.followers import Followers
from service.api.growing_log import GrowingLog
from service.client import events
from service.errors import BackendError
from service.jobs.places import APART_BYTES, Place, Trail, timed
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
        raw += await asyncio.wait_for(following, 60)
        (log,) = followers._logs.values()
        while not log.done:
            await asyncio.wait_for(log.changed(log.more, 1), 60)
        assert log._file is not None
        assert os.fstat(log._file).st_size <= size
        async for piece in stream:
            raw += piece
        followers.free()
        return raw

    found = list(events(iter([asyncio.run(follow(None))])))
    told = [data for name, _, data in found if not name]
    # More than one where this follower was slow to begin.
    gaps = [data for data in told if "bytes were left out here" in data]
    assert gaps
    left_out = sum(int(gap[1:].split()[0].replace(",", "")) for gap in gaps)
    offsets = [int(identifier.partition(":")[2]) for name, identifier, _ in found if not name]
    assert offsets == sorted(set(offsets))
    assert offsets[-1] == len(content)
    assert content.decode().endswith("".join(data + "\n" for data in told[told.index(gaps[-1]) + 1 :]))
    assert left_out + sum(len(data) + 1 for data in told if data not in gaps) == len(content)
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

    assert asyncio.run(asyncio.wait_for(script(), 60)) == [b"id: 8\ndata: half end\n\n"]


@pytest.mark.parametrize("what", ["events", "logs"])
def test_revoking_a_token_ends_its_open_streams(here: Served, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "KEEPALIVE_S", 0.05)
    job = here.run(here.submit(here.token("ben", "submit"))["id"])
    path = "/v1/events" if what == "events" else f"/v1/jobs/{job.id}/logs?follow=true"
    headers = here.token("ann", "read")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(here.client.get, path, headers=headers)
        deadline = time.monotonic() + 60
        while not here.app.state.meters.streams:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        try:
            here.access.tokens.revoke("ann")
            assert answer.result(60).status_code == 200
        finally:
            here.app.state.changes.close()
            here.app.state.followers.close()
    assert here.app.state.meters.streams == 0


def lines(first: int, last: int) -> bytes:
    return b"".join(b"line %06d\n" % number for number in range(first, last))


async def told(stream: AsyncIterator[bytes], until: bytes, times: int = 1) -> list[tuple[str, str, str]]:
    """Events up to the one with which `until` has come so many times."""
    raw = b""
    async with asyncio.timeout(60):
        async for piece in stream:
            raw += piece
            if raw.count(until) >= times:
                break
    return list(events(iter([raw])))


def joined(found: list[tuple[str, str, str]]) -> bytes:
    return "".join(data + "\n" for name, _, data in found if not name).encode()


def test_a_tail_is_asked_of_the_backend_and_nothing_before_it_is_read(here: Served) -> None:
    job = here.run(here.submit()["id"])
    assert job.attempt is not None
    shelf = here.shelves["docker"]
    shelf.write(job.attempt.name, lines(0, 50_000))

    async def script() -> int:
        followers = Followers(here.desk)
        streams = [followers.follow(job.id, tail=3) for _ in range(5)]
        firsts = [await told(stream, b"049999") for stream in streams]
        assert {joined(first) for first in firsts} == {lines(49_997, 50_000)}
        (log,) = followers._logs.values()
        read = log.size
        shelf.write(job.attempt.name, lines(50_000, 50_010))
        for stream in streams:
            assert joined(await told(stream, b"050009")) == lines(50_000, 50_010)
        for stream in streams:
            await stream.aclose()  # type: ignore[attr-defined]
        followers.free()
        return read

    # Not 650,000: what was asked for, and a little more for lines that an engine has kept in pieces.
    assert asyncio.run(script()) < 1000
    assert shelf.tails == [3 + 32]


def test_a_broken_tail_goes_on_where_it_was_wherever_it_breaks(here: Served) -> None:
    job = here.run(here.submit()["id"])
    assert job.attempt is not None
    name, shelf = job.attempt.name, here.shelves["docker"]
    shelf.write(name, lines(0, 1000))

    async def script() -> bytes:
        followers, arrived, last_id = Followers(here.desk), b"", ""
        for number in range(1000, 1040):
            stream = followers.follow(job.id, tail=10, last_id=last_id)
            found = await told(stream, b"line %06d" % (number - 1))
            arrived += joined(found)
            last_id = [identifier for _, identifier, _ in found if identifier][-1]
            await stream.aclose()  # type: ignore[attr-defined]
            # While nobody listens.
            shelf.write(name, lines(number, number + 1))
        here.end(job.id)
        found = await told(followers.follow(job.id, tail=10, last_id=last_id), b"event: end")
        followers.free()
        return arrived + joined(found)

    assert asyncio.run(script()) == lines(990, 1040)
    assert len(shelf.tails) == 1


def test_the_attempts_after_a_tail_are_told_whole_and_counted_from_their_first_byte(here: Served) -> None:
    job_id = here.submit(retries=1)["id"]

    def play(number: int, content: bytes) -> None:
        here.step_until(lambda: len(here.desk.get(job_id).attempts) == number, job_id)
        attempt = here.run(job_id).attempt
        assert attempt is not None
        here.shelves["docker"].write(attempt.name, content)

    async def script() -> list[bytes]:
        followers, found = Followers(here.desk), []
        await asyncio.to_thread(play, 1, lines(0, 100))
        stream = followers.follow(job_id, tail=1)
        found.append(joined(await told(stream, b"000099")))
        await asyncio.to_thread(here.end, job_id, 1)
        await asyncio.to_thread(play, 2, lines(200, 300))
        second = await told(stream, b"000299")
        found.append(joined(second))
        assert second[-1][1] == f"2:{len(lines(200, 300))}"
        await stream.aclose()  # type: ignore[attr-defined]
        here.shelves["docker"].write(here.desk.get(job_id).attempts[1].name, lines(300, 302))
        # The client asks as it did at first, and says what it has.
        again = followers.follow(job_id, tail=1, last_id=second[-1][1])
        found.append(joined(await told(again, b"000301")))
        await again.aclose()  # type: ignore[attr-defined]
        followers.free()
        return found

    assert asyncio.run(script()) == [lines(99, 100), lines(200, 300), lines(300, 302)]


def test_who_comes_back_too_late_is_told_that_lines_come_again(here: Served) -> None:
    job = here.run(here.submit()["id"])
    assert job.attempt is not None
    shelf = here.shelves["docker"]
    shelf.write(job.attempt.name, lines(0, 1000))

    async def script() -> list[tuple[str, str, str]]:
        followers = Followers(here.desk)
        stream = followers.follow(job.id, tail=2)
        last_id = (await told(stream, b"000999"))[-1][1]
        await stream.aclose()  # type: ignore[attr-defined]
        followers.free()
        # The service was started anew.
        later = Followers(here.desk)
        found = await told(later.follow(job.id, tail=2, last_id=last_id), b"000999")
        later.free()
        return found

    found = asyncio.run(script())
    assert [name for name, _, _ in found] == ["attempt", "", ""]
    (_, notice_id, notice), (_, _, again) = found[1:]
    assert (notice_id, "not known any more" in notice) == ("", True)
    assert (again + "\n").encode() == lines(998, 1000)


class Kept:
    """What an engine keeps of a log, as its entries; all that it is asked to tell of it is followed.

    Attributes:
        entries: each with its time before it.
        asked: from which place on, or how many last ones.
    """

    def __init__(self) -> None:
        self.entries: list[bytes] = []
        self.asked: list[str | int | None] = []
        self.num_read = 0

    def write(self, *contents: bytes) -> None:
        """Entries, one a millisecond, of which every third has the time of the one before it."""
        for content in contents:
            tick = len(self.entries) - len(self.entries) % 3 // 2
            time_of_day = b"00:%02d:%02d.%03d" % (tick // 60_000, tick // 1000 % 60, tick % 1000)
            self.entries.append(b"2026-01-01T" + time_of_day + b"Z " + content)

    def logs(
        self, *given: object, tail: int | None = None, follow: Callable[[], bool], since: str = "", **more: object
    ) -> Iterator[bytes]:
        self.asked.append(since or tail)
        place = Place.parse(since) if since else None
        if place is not None:
            place.find(self.entries)
        told = 0 if tail is None else max(0, len(self.entries) - tail)
        trail = Trail("box", is_whole=tail is None, since=place)
        while follow():
            for entry in self.entries[told:]:
                told += 1
                self.num_read += 1
                if piece := trail.take(entry):
                    yield piece
            yield b""
            time.sleep(0.01)


@pytest.fixture
def kept(here: Served, monkeypatch: pytest.MonkeyPatch) -> Kept:
    engine = Kept()
    monkeypatch.setattr(here.shelves["docker"], "logs", engine.logs)
    return engine


def line(number: int) -> bytes:
    return b"line %06d\n" % number


def test_a_tail_goes_on_where_it_was_when_the_service_is_started_anew(here: Served, kept: Kept) -> None:
    job = here.run(here.submit()["id"])
    kept.write(*map(line, range(1000)))

    async def script() -> bytes:
        arrived, last_id = b"", ""
        for number in range(1000, 1040):
            followers = Followers(here.desk)
            stream = followers.follow(job.id, tail=10, last_id=last_id)
            found = await told(stream, b"line %06d" % (number - 1))
            arrived += joined(found)
            last_id = [identifier for _, identifier, _ in found if identifier][-1]
            await stream.aclose()  # type: ignore[attr-defined]
            # While no service is there.
            followers.free()
            kept.write(line(number))
        return arrived

    assert asyncio.run(script()) == lines(990, 1039)


def test_a_line_that_is_still_written_when_the_service_is_started_anew_comes_whole(here: Served, kept: Kept) -> None:
    job = here.run(here.submit()["id"])
    kept.write(b"first\n", b"=" * 16_384, b"=" * 16_384)

    async def script() -> bytes:
        followers = Followers(here.desk)
        found = await told(followers.follow(job.id, tail=10), b"first")
        followers.free()
        kept.write(b"=" * 16_384, b"==\n", b"last\n")
        later = Followers(here.desk)
        found += await told(later.follow(job.id, tail=10, last_id=found[-1][1]), b"last")
        later.free()
        return joined(found)

    assert asyncio.run(script()) == b"first\n" + b"=" * (3 * 16_384 + 2) + b"\nlast\n"


def test_all_who_come_back_to_a_service_that_was_started_anew_share_one_reading_of_the_end(
    here: Served, kept: Kept
) -> None:
    job = here.run(here.submit()["id"])
    content = [b"%0999d\n" % number for number in range(3000)]
    kept.write(content[0])

    async def script() -> set[bytes]:
        followers = Followers(here.desk)
        stream = followers.follow(job.id, tail=10)
        await told(stream, content[0].strip())
        kept.write(*content[1:-1])
        last_id = (await told(stream, content[-2].strip()))[-1][1]
        await stream.aclose()  # type: ignore[attr-defined]
        followers.free()
        kept.num_read = 0
        kept.asked.clear()
        later = Followers(here.desk)
        streams = [later.follow(job.id, tail=10, last_id=last_id) for _ in range(200)]
        tasks = [asyncio.create_task(told(stream, content[-1].strip())) for stream in streams]
        await asyncio.sleep(0)
        kept.write(content[-1])
        found = {joined(one) for one in await asyncio.gather(*tasks)}
        assert [key[3] for key in later._logs] == kept.asked
        later.free()
        return found

    assert asyncio.run(script()) == {content[-1]}
    assert len(kept.asked) == 1
    place = Place.parse(str(kept.asked[0]))
    behind = sum(timed(entry)[0] >= place.written_ns for entry in kept.entries)
    assert behind * 1000 <= APART_BYTES + 2000, "3 MB were written, of which 64 kB are told again at most"


def test_a_tail_whose_job_has_ended_meanwhile_begins_anew_in_the_file_and_says_so(here: Served, kept: Kept) -> None:
    job = here.run(here.submit()["id"])
    kept.write(*map(line, range(100)))

    async def script() -> list[tuple[str, str, str]]:
        followers = Followers(here.desk)
        last_id = (await told(followers.follow(job.id, tail=2), b"000099"))[-1][1]
        followers.free()
        here.log(job).parent.mkdir(parents=True, exist_ok=True)
        here.log(job).write_bytes(lines(0, 110))
        await asyncio.to_thread(here.end, job.id)
        later = Followers(here.desk)
        found = await told(later.follow(job.id, tail=2, last_id=last_id), b"event: end")
        later.free()
        return found

    found = asyncio.run(script())
    assert [name for name, _, _ in found] == ["attempt", "", "", "end"]
    assert "not known any more" in found[1][2]
    assert (found[2][2] + "\n").encode() == lines(108, 110)
    assert kept.asked == [2 + 32]


def test_logs_that_nobody_follows_are_kept_for_a_while_and_only_so_many(
    here: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(followers_, "_MOST_LINGERING", 3)
    jobs = [here.run(here.submit()["id"]) for _ in range(5)]
    for job in jobs:
        assert job.attempt is not None
        here.shelves["docker"].write(job.attempt.name, b"x\n")

    async def look(followers: Followers, job_id: str) -> None:
        stream = followers.follow(job_id, tail=1)
        await told(stream, b"data: x")
        await stream.aclose()  # type: ignore[attr-defined]

    async def script() -> None:
        followers = Followers(here.desk)
        for job in jobs:
            await look(followers, job.id)
        assert [key[0] for key in followers._logs] == [job.id for job in jobs[2:]]
        followers.free()
        assert followers._logs == {}
        monkeypatch.setattr(followers_, "LINGER_S", 0.0)
        short = Followers(here.desk)
        await look(short, jobs[0].id)
        async with asyncio.timeout(60):
            while short._logs:
                await asyncio.sleep(0.01)
            while any(thread.name == "lorot-log" for thread in threading.enumerate()):
                await asyncio.sleep(0.01)
        short.free()

    asyncio.run(script())


def test_the_tail_of_a_job_that_is_never_silent_begins_all_the_same(
    here: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growing_log, "SETTLES_S", 0.1)
    job, pace = here.run(here.submit()["id"]), threading.Event()

    def chatter(*given: object, follow: Callable[[], bool], **more: object) -> Iterator[bytes]:
        number = 100
        yield lines(0, number)
        while follow():
            # Never a second of silence, after which a stream would say that there is nothing just now.
            pace.wait(0.01)
            yield lines(number, number + 1)
            number += 1

    monkeypatch.setattr(here.shelves["docker"], "logs", chatter)

    async def script() -> bytes:
        followers = Followers(here.desk)
        stream = followers.follow(job.id, tail=3)
        found = joined(await told(stream, b"line ", 20))
        await stream.aclose()  # type: ignore[attr-defined]
        followers.free()
        return found

    found = asyncio.run(script())
    first = int(found.split()[1])
    assert first >= 97
    assert lines(first, 10_000).startswith(found)


def test_one_that_has_all_lines_is_no_tail_before_it_has_reached_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing_log, "SETTLES_S", 0.0)

    async def script() -> list[bool]:
        found = []
        with ThreadPoolExecutor(1) as pool:
            for name in ("", "0123abcd"):
                log, rest = GrowingLog(pool), threading.Event()

                def pieces(go_on: Callable[[], bool], rest: threading.Event = rest) -> Iterator[bytes]:
                    yield from [b"x\n"] * 1000
                    rest.wait(150)

                log.pump(pieces, 1 << 20, place=name)
                async with asyncio.timeout(60):
                    while log.size < 2000:
                        await asyncio.sleep(0.01)
                found.append(log.settled)
                rest.set()
                log.close()
        return found

    assert asyncio.run(script()) == [False, True]


def test_who_waits_for_the_first_lines_of_a_tail_hears_that_the_service_is_there(
    here: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse, "KEEPALIVE_S", 0.02)
    job, answers = here.run(here.submit()["id"]), threading.Event()

    def slow(*given: object, follow: Callable[[], bool], **more: object) -> Iterator[bytes]:
        answers.wait(150)
        yield lines(0, 5)
        yield b""

    monkeypatch.setattr(here.shelves["docker"], "logs", slow)

    async def script() -> None:
        followers = Followers(here.desk)
        stream = followers.follow(job.id, tail=2)
        await told(stream, b"event: attempt")
        async with asyncio.timeout(60):
            assert [await anext(stream) for _ in range(3)] == [sse.KEEPALIVE] * 3
        answers.set()
        assert joined(await told(stream, b"000004")) == lines(3, 5)
        await stream.aclose()  # type: ignore[attr-defined]
        followers.free()

    try:
        asyncio.run(script())
    finally:
        answers.set()


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_log_that_broke_while_nobody_followed_is_opened_anew(
    here: Served, monkeypatch: pytest.MonkeyPatch, comes_back: bool
) -> None:
    job, shelf, breaks = here.run(here.submit()["id"]), here.shelves["docker"], threading.Event()
    assert job.attempt is not None
    shelf.write(job.attempt.name, lines(0, 1000))
    whole = shelf.logs

    def breaking(*given: Any, **more: Any) -> Iterator[bytes]:
        for piece in whole(*given, **more):
            yield piece
            if breaks.is_set():
                raise BackendError("the engine was stopped")

    monkeypatch.setattr(shelf, "logs", breaking)

    async def script() -> list[tuple[str, str, str]]:
        followers = Followers(here.desk)
        stream = followers.follow(job.id, tail=2)
        last_id = (await told(stream, b"000999"))[-1][1]
        await stream.aclose()  # type: ignore[attr-defined]
        (log,) = followers._logs.values()
        breaks.set()
        async with asyncio.timeout(60):
            while not log.problem:
                await asyncio.sleep(0.01)
        breaks.clear()
        again = followers.follow(job.id, tail=2, last_id=last_id if comes_back else "")
        found = await told(again, b"000999")
        assert [key[3] for key in followers._logs] == [2]
        assert not followers._lingering
        await again.aclose()  # type: ignore[attr-defined]
        followers.free()
        return found

    name, *found = asyncio.run(script())
    assert name[0] == "attempt"
    if comes_back:
        (_, _, notice), *found = found
        assert "not known any more" in notice
    assert joined(found) == lines(998, 1000)
