"""Event streams: how they are framed, how a log is followed by many, how changes are told, and how all of it ends."""

import asyncio
import json
import random
import re
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message

from service import client
from service.api import sse
from service.api.changes import Changes
from service.api.faults import TooManyRequestsError
from service.api.followers import Followers
from service.api.growing_log import PIECE_BYTES, GrowingLog, cut
from service.api.streams import Streams
from service.errors import BackendError, ConfigError
from service.jobs.job import Job
from service.jobs.spec import JobSpec
from tests.service.api_shelf import Served, served

TRAIN = {
    "kind": "train",
    "backend": "local",
    "command": [],
    "config": {"data": {"name": "demo", "root": "data/demo"}, "model": {"name": "resnet_small"}},
}


@pytest.fixture
def here(place: str, tmp_path: Path) -> Iterator[Served]:
    (tmp_path / "data").mkdir()
    with served(tmp_path, place) as service:
        yield service


def parsed(raw: bytes) -> list[tuple[str, str, str]]:
    """(name, id, data) of each event, by the words of the standard: lines end with CRLF, LF or CR."""
    events, name, identifier, data = [], "", "", []
    for line in re.split("\r\n|\n|\r", raw.decode()):
        if not line:
            if data:
                events.append((name, identifier, "\n".join(data)))
            name, data = "", []
        elif not line.startswith(":"):
            field, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if field == "data":
                data.append(value)
            elif field == "event":
                name = value
            elif field == "id":
                identifier = value
    return events


async def all_of(events: AsyncIterator[bytes], until: Callable[[bytes], object] = lambda raw: False) -> bytes:
    """What comes until the end, or until what has come is enough; fails after some seconds."""
    raw = b""

    async def gather() -> None:
        nonlocal raw
        async for piece in events:
            raw += piece
            if until(raw):
                return

    await asyncio.wait_for(gather(), 60)
    await events.aclose()  # type: ignore[attr-defined]
    return raw


def lines_of(raw: bytes) -> str:
    return "".join(data + "\n" for name, _, data in parsed(raw) if not name)


def test_an_event_carries_its_lines_whatever_they_hold() -> None:
    for text in ("one", "one\ntwo", "", "\n", "a: b", "data: x\n\nevent: end", " led by a blank", "ünï\u2028\x0b"):
        [(name, identifier, data)] = parsed(sse.event(text, name="log", identifier="7"))
        assert (name, identifier, data) == ("log", "7", text)


def test_no_field_can_be_smuggled_in_by_a_line_end() -> None:
    raw = sse.event("a\rb\r\nc", name="x\nevent: end", identifier="1\r\nid: 2")
    assert parsed(raw) == [("xevent: end", "1id: 2", "a\nb\nc")]


def test_the_commands_reader_agrees_with_the_standard_wherever_a_stream_is_cut() -> None:
    raw = (
        b"".join(
            sse.event(text, name=name, identifier=str(i))
            for i, (text, name) in enumerate([("a\nb", ""), ("ü" * 50, "job"), ("", "end"), ("x", "")])
        )
        + sse.KEEPALIVE
    )
    for size in (1, 2, 3, 7, len(raw)):
        pieces = iter([raw[start : start + size] for start in range(0, len(raw), size)])
        assert list(client.events(pieces)) == parsed(raw)


@pytest.mark.parametrize(
    ("data", "final", "taken"),
    [
        (b"one\ntwo", False, 4),
        (b"one\ntwo", True, 7),
        (b"one", False, 0),
        (b"10%\r20%\r30%", False, 8),
        (b"one\r", False, 0),
        (b"one\r", True, 4),
        (b"one\r\n", False, 5),
        (b"\r\n", False, 2),
        (b"", True, 0),
        (b"x" * PIECE_BYTES, False, PIECE_BYTES),
        (b"x" * (PIECE_BYTES - 1) + "ü".encode()[:1], False, PIECE_BYTES - 1),
        (b"x" * (PIECE_BYTES - 2) + "ü".encode(), False, PIECE_BYTES),
        (b"x" * (PIECE_BYTES - 3) + "🙂".encode()[:3], False, PIECE_BYTES - 3),
        (b"\x80" * PIECE_BYTES, False, PIECE_BYTES),
        (b"x\n" + b"y" * (PIECE_BYTES - 2), False, 2),
    ],
)
def test_whole_lines_are_told_and_very_long_ones_in_pieces(data: bytes, final: bool, taken: int) -> None:
    assert cut(data, final) == taken


def test_any_bytes_written_in_any_pieces_arrive_once_and_in_order(here: Served) -> None:
    draws = random.Random(5)
    parts = [b"plain line\n", b"progress 10%\r", b"\r\n", b"\xff\xfe broken\n", "ünï\n".encode(), b"x" * 70_000 + b"\n"]
    content = b"".join(draws.choices(parts, k=60)) + b"no end"
    job = here.run(here.submit()["id"])
    assert job.attempt is not None
    name = job.attempt.name

    def write() -> None:
        left = content
        while left:
            size = draws.randint(1, 30_000)
            here.shelves["docker"].write(name, left[:size])
            left = left[size:]
        here.end(job.id)

    async def follow() -> bytes:
        followers = Followers(here.desk)
        writing = threading.Thread(target=write)
        writing.start()
        raw = await all_of(followers.follow(job.id))
        writing.join()
        followers.free()
        return raw

    raw = asyncio.run(follow())
    events = parsed(raw)
    told = [(identifier, data) for kind, identifier, data in events if not kind]
    # Without the line ends that a very long line gets in between.
    expected = content.decode("utf-8", "replace").replace("\r\n", "\n").replace("\r", "\n").replace("\n", "")
    assert "".join(data for _, data in told).replace("\n", "") == expected
    offsets = [int(identifier.removeprefix("1:")) for identifier, _ in told]
    assert offsets == sorted(set(offsets))
    assert offsets[-1] == len(content)
    assert events[0][0] == "attempt"
    assert events[-1][0] == "end"
    assert json.loads(events[-1][2])["state"] == "finished"


def test_a_connection_that_breaks_anywhere_goes_on_where_it_was(here: Served) -> None:
    content = b"".join(b"line %d\n" % number for number in range(20_000))
    job = here.run(here.submit(**TRAIN)["id"])
    here.log(job).parent.mkdir(parents=True, exist_ok=True)
    here.log(job).write_bytes(content)
    here.end(job.id)

    async def follow() -> str:
        followers, text, last_id = Followers(here.desk), "", ""
        for _ in range(100):
            # Broken off after a random number of events, of which each has arrived whole.
            left = draws.randint(2, 4)
            async for raw in followers.follow(job.id, last_id=last_id):
                for name, identifier, data in parsed(raw):
                    last_id = identifier or last_id
                    text += "" if name else data + "\n"
                    if name == "end":
                        return text
                left -= 1
                if not left:
                    break
        raise AssertionError("never at the end")

    draws = random.Random(3)
    assert asyncio.run(follow()) == content.decode()


def test_an_attempt_that_is_asked_for_has_plain_offsets_as_ids(here: Served) -> None:
    job = here.run(here.submit(**TRAIN)["id"])
    here.log(job).parent.mkdir(parents=True, exist_ok=True)
    here.log(job).write_bytes(b"one\ntwo\n")
    here.end(job.id)
    answer = here.client.get(f"/v1/jobs/{job.id}/logs", params={"follow": "true", "attempt": 1})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert ("", "8", "one\ntwo") in parsed(answer.content)
    again = here.client.get(
        f"/v1/jobs/{job.id}/logs", params={"follow": "true", "attempt": 1}, headers={"Last-Event-ID": "4"}
    )
    assert lines_of(again.content) == "two\n"
    for wrong in ("x", "-1", "1:2:3", "9" * 60, "1:"):
        asked = {"follow": "true"}
        assert (
            here.client.get(f"/v1/jobs/{job.id}/logs", params=asked, headers={"Last-Event-ID": wrong}).status_code
            == 400
        )


@pytest.mark.parametrize("kind", [{}, TRAIN])
def test_the_last_lines_of_what_is_there_come_first(here: Served, kind: dict[str, Any]) -> None:
    job = here.run(here.submit(**kind)["id"])
    assert job.attempt is not None
    content = b"".join(b"line %d\n" % number for number in range(30_000)) + b"last"
    if kind:
        here.log(job).parent.mkdir(parents=True, exist_ok=True)
        here.log(job).write_bytes(content)
    else:
        here.shelves["docker"].write(job.attempt.name, content)
    here.end(job.id)
    for tail, expected in ((0, ""), (1, "last\n"), (3, "line 29998\nline 29999\nlast\n")):
        raw = here.client.get(f"/v1/jobs/{job.id}/logs", params={"follow": "true", "tail": tail}).content
        assert lines_of(raw) == expected
    raw = here.client.get(f"/v1/jobs/{job.id}/logs", params={"follow": "true", "tail": 99_999}).content
    assert lines_of(raw) == content.decode() + "\n"


def test_following_waits_for_the_start_and_goes_on_with_every_further_attempt(here: Served) -> None:
    job_id = here.submit(retries=1)["id"]

    def play() -> None:
        for number in (1, 2):
            job = here.step_until(lambda: len(here.desk.get(job_id).attempts) == number, job_id)  # noqa: B023
            job = here.run(job_id)
            assert job.attempt is not None
            here.shelves["docker"].write(job.attempt.name, b"attempt %d\n" % number)
            here.end(job_id, 1 if number == 1 else 0)

    async def follow() -> bytes:
        followers = Followers(here.desk)
        playing = threading.Thread(target=play)
        events = followers.follow(job_id)
        assert await anext(events) == sse.KEEPALIVE
        playing.start()
        raw = await all_of(events)
        playing.join()
        return raw

    raw = asyncio.run(follow())
    assert lines_of(raw) == "attempt 1\nattempt 2\n"
    assert [name for name, _, _ in parsed(raw) if name] == ["attempt", "attempt", "end"]


def test_many_followers_of_one_log_take_one_look_at_it_and_no_thread_each(here: Served) -> None:
    job = here.run(here.submit(**TRAIN)["id"])
    here.log(job).parent.mkdir(parents=True, exist_ok=True)
    here.log(job).write_bytes(b"begin\n")

    async def follow() -> tuple[list[bytes], int, int]:
        followers = Followers(here.desk)
        before = threading.active_count()
        arrived = 0

        async def one() -> bytes:
            nonlocal arrived
            raw = b""
            async for piece in followers.follow(job.id):
                raw += piece
                arrived += b"begin" in piece
            return raw

        tasks = [asyncio.create_task(one()) for _ in range(200)]
        await until(lambda: arrived == 200)
        open_logs, threads = len(followers._logs), threading.active_count() - before
        with here.log(job).open("ab") as file:
            file.write(b"end\n")
        await asyncio.to_thread(here.end, job.id)
        found = await asyncio.wait_for(asyncio.gather(*tasks), 60)
        assert followers._logs == {}
        return found, open_logs, threads

    found, open_logs, threads = asyncio.run(follow())
    assert {lines_of(raw) for raw in found} == {"begin\nend\n"}
    assert open_logs == 1
    assert threads <= 5


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not holds():
            await asyncio.sleep(0.01)


def test_closing_ends_all_streams_and_their_threads(here: Served) -> None:
    jobs = [here.run(here.submit()["id"]), here.run(here.submit(**TRAIN)["id"])]

    async def follow() -> None:
        followers, changes = Followers(here.desk), Changes()
        changes.open()
        streams = [followers.follow(job.id) for job in jobs] + [changes.listen()]
        tasks = [asyncio.create_task(all_of(stream)) for stream in streams]
        await until(lambda: len(followers._logs) == 2)
        followers.close()
        changes.close()
        await asyncio.wait_for(asyncio.gather(*tasks), 60)
        await until(lambda: not any(thread.name == "lorot-log" for thread in threading.enumerate()))

    asyncio.run(follow())


def test_a_log_that_cannot_be_read_on_says_why(here: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    job = here.run(here.submit()["id"])

    def broken(*_: object, **__: object) -> Iterator[bytes]:
        yield b"so far\n"
        raise BackendError("the engine is away")

    monkeypatch.setattr(here.shelves["docker"], "logs", broken)
    raw = here.client.get(f"/v1/jobs/{job.id}/logs", params={"follow": "true"}).content
    assert lines_of(raw) == "so far\n"
    assert parsed(raw)[-1][0] == "problem"
    assert "the engine is away" in parsed(raw)[-1][2]


def test_a_link_in_the_place_of_a_log_is_not_followed(here: Served, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("hidden\n")
    job = here.run(here.submit(**TRAIN)["id"])
    here.log(job).parent.mkdir(parents=True, exist_ok=True)
    here.log(job).symlink_to(tmp_path / "secret")
    here.end(job.id)
    assert b"hidden" not in here.client.get(f"/v1/jobs/{job.id}/logs", params={"follow": "true"}).content


def test_a_place_in_the_streams_is_given_back(place: str, tmp_path: Path) -> None:
    with served(tmp_path, place, limits={"followers": 1}) as here:
        job = here.run(here.submit()["id"])
        here.end(job.id)
        asked = {"params": {"follow": "true"}}
        for _ in range(3):
            assert here.client.get(f"/v1/jobs/{job.id}/logs", **asked).status_code == 200  # type: ignore[arg-type]
        here.app.state.meters.streams = 1
        answer = here.client.get(f"/v1/jobs/{job.id}/logs", **asked)  # type: ignore[arg-type]
        assert answer.status_code == 429
        assert "retry-after" in answer.headers


def test_nobody_takes_the_places_of_all_others(here: Served) -> None:
    async def events() -> AsyncIterator[bytes]:
        yield sse.KEEPALIVE

    async def tried() -> None:
        streams = Streams(3, 2, here.app.state.meters)
        first, _ = (streams.answer(events(), "token ann", lambda: None) for _ in range(2))
        with pytest.raises(TooManyRequestsError, match="2 event streams of yours"):
            streams.answer(events(), "token ann", lambda: None)
        streams.answer(events(), "token ben", lambda: None)
        with pytest.raises(TooManyRequestsError, match="3 event streams are open"):
            streams.answer(events(), "token eve", lambda: None)

        async def receive() -> Message:
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: Message) -> None:
            """Nobody looks."""

        await first({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send)
        streams.answer(events(), "token ann", lambda: None)

    asyncio.run(tried())


@pytest.mark.parametrize(("most", "each"), [(300, 250), (120, 100), (7, 5), (2, 1), (1, 1)])
def test_however_few_places_there_are_one_client_leaves_some(place: str, tmp_path: Path, most: int, each: int) -> None:
    with served(tmp_path, place, limits={"followers": most}) as here:
        assert here.app.state.streams._most_each == each


def test_who_follows_is_counted_by_their_token(place: str, tmp_path: Path) -> None:
    with served(tmp_path, place, limits={"followers_each": 1}) as here:
        job = here.run(here.submit()["id"])
        here.end(job.id)
        here.app.state.streams._held["token ann"] = 1
        for name, status in (("ann", 429), ("ben", 200)):
            headers = here.token(name, "read")
            for path, asked in ((f"/v1/jobs/{job.id}/logs", {"follow": "true"}), ("/v1/events", {})):
                if status == 429 or asked:
                    assert here.client.get(path, params=asked, headers=headers).status_code == status


def job_of(number: int) -> Job:
    spec = JobSpec(kind="container", backend="docker", command=("true",), name=f"n{number}")
    return Job(f"{number:032x}", "0", spec, "queued")


def listening(script: Callable[[Changes], Awaitable[None]], kept: int = 5) -> None:
    async def run() -> None:
        changes = Changes(kept)
        changes.open()
        await script(changes)

    asyncio.run(run())


def test_changes_are_told_in_order_to_all_and_again_after_a_reconnect() -> None:
    async def script(changes: Changes) -> None:
        streams = [changes.listen() for _ in range(3)]
        assert [await anext(stream) for stream in streams] == [sse.KEEPALIVE] * 3
        threading.Thread(target=lambda: [changes.tell(job_of(number)) for number in range(4)]).start()
        for stream in streams:
            raw = await all_of(stream, lambda raw: raw.count(b"event: job") == 4)
            assert [json.loads(data)["name"] for _, _, data in parsed(raw)] == ["n0", "n1", "n2", "n3"]
        second = parsed(raw)[1][1]
        missed = await all_of(changes.listen(second), lambda raw: raw.count(b"event: job") == 2)
        assert [json.loads(data)["name"] for _, _, data in parsed(missed)] == ["n2", "n3"]

    listening(script)


def test_who_was_away_too_long_or_before_a_restart_is_told_to_look_again() -> None:
    async def script(changes: Changes) -> None:
        for number in range(9):
            changes._add(job_of(number))
        first = f"{changes._service}-1"
        for last_id in (first, "otherone-3", f"{changes._service}-99", f"{changes._service}-x", "nonsense"):
            raw = await all_of(changes.listen(last_id), lambda raw: b"reload" in raw)
            assert parsed(raw)[0][0] == "reload"

    listening(script)


def test_a_slow_listener_costs_no_memory_and_is_told_that_it_missed_something() -> None:
    async def script(changes: Changes) -> None:
        stream = changes.listen()
        await anext(stream)
        for number in range(50):
            changes._add(job_of(number))
        assert len(changes._events) == 5
        assert b"event: reload" in await anext(stream)
        changes._add(job_of(50))
        assert b'"n50"' in await anext(stream)

    listening(script)


def test_a_change_in_the_api_and_one_of_the_controller_both_reach_the_stream(here: Served) -> None:
    job = here.submit()
    here.run(job["id"])

    def told() -> list[dict[str, Any]]:
        return [json.loads(data) for _, _, data in parsed(b"".join(here.app.state.changes._events))]

    # They come by way of the event loop, which is another thread's.
    deadline = time.monotonic() + 60
    while not any(one["state"] == "running" for one in told()):
        assert time.monotonic() < deadline, told()
        here.client.get("/healthz")
    states = list(dict.fromkeys(one["state"] for one in told()))
    assert states == ["queued", "starting", "running"]
    assert {one["id"] for one in told()} == {job["id"]}
    assert "spec" not in told()[-1]


def test_a_log_that_nobody_reads_any_more_is_let_go_while_it_is_looked_at(tmp_path: Path) -> None:
    async def script() -> None:
        with ThreadPoolExecutor(2) as pool:
            for _ in range(30):
                path = tmp_path / "log"
                path.write_bytes(b"x\n")
                log = GrowingLog(pool)
                log.watch(path, lambda: False)
                await asyncio.sleep(0)
                log.close()
            assert log._file is None

    asyncio.run(script())


def test_an_id_that_is_none_is_refused() -> None:
    assert Followers.place("2:70", None) == (2, 70, "")
    assert Followers.place("2:70@0123abcd", None) == (2, 70, "0123abcd")
    assert Followers.place("70", 3) == (3, 70, "")
    longest = f"{10**12 - 1}.{10**9 - 1}-0123abcd-0123abcd~"
    assert Followers.place(f"{10**9 - 1}:{10**19 - 1}@{longest}", None) == (10**9 - 1, 10**19 - 1, longest)
    for wrong in ("seventy", "²:3", "1:70@", "1:70@0123abc/", ":70", "70@0123abcd@0123abcd"):
        with pytest.raises(ConfigError, match="Last-Event-ID"):
            Followers.place(wrong, None)
