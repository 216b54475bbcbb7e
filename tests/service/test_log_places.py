"""Places in logs that engines keep: found again for certain, or lost and said so."""

import random
from collections.abc import Sequence

import pytest

from service.jobs.places import APART_BYTES, Place, Placed, PlaceLostError, Trail, timed

START_NS = 1_700_000_000 * 10**9


def entry(written_ns: int, content: bytes) -> bytes:
    """As docker writes it: nine digits, whatever they are."""
    seconds, ns = divmod(written_ns, 10**9)
    days, rest = divmod(seconds, 86_400)
    assert days == 19_675, "14 November 2023"
    return b"2023-11-14T%02d:%02d:%02d.%09dZ %s" % (rest // 3600, rest // 60 % 60, rest % 60, ns, content)


def since(log: Sequence[tuple[int, bytes]], start_s: int) -> list[bytes]:
    """What an engine tells of a log from a time on: nothing from before, wherever it stands."""
    return [entry(*one) for one in log if one[0] >= start_s * 10**9]


def written(draws: random.Random, count: int) -> list[tuple[int, bytes]]:
    """A log as two streams write it: same times, times out of order, same lines, parts of long lines, no end."""
    log, now_ns = [], START_NS
    while len(log) < count:
        now_ns += draws.choice([0, 1, 1000, 10**6, 10**9])
        at_ns = now_ns - draws.choice([0, 0, 0, 500, 10**8])
        kind = draws.randrange(4)
        if kind == 0:
            parts = [b"=" * draws.choice([16_384, 16_383])] * draws.randint(1, 4) + [b"==\n"]
            log += [(at_ns, part) for part in parts]
        else:
            log.append((at_ns, draws.choice([b"\n", b"x\n", b"y\n", b"line %d\n" % len(log)])))
    return log


@pytest.mark.parametrize("seed", range(60))
def test_who_comes_back_to_a_place_has_every_byte_once_or_is_told_that_it_is_lost(seed: int) -> None:
    draws = random.Random(seed)
    log = written(draws, 300)
    begin, broke = draws.randrange(250), draws.randrange(260, 300)
    trail, told, found = Trail("box"), b"", []
    for one in log[begin:broke]:
        piece = trail.take(entry(*one))
        if isinstance(piece, Placed):
            found.append((len(told), piece.place))
        told += piece
    assert told == b"".join(content for _, content in log[begin:broke])
    rest, num_lost = told + b"".join(content for _, content in log[broke:]), 0
    # Some of it has been thrown away by then, but of lines that are the same at once all or none.
    cut = draws.choice([0, 0, begin + 20])
    while set(log[:cut]) & set(log[cut:]):
        cut += 1
    kept = log[cut:]
    assert found
    for offset, text in found:
        place = Place.parse(text)
        assert (str(place), place.is_of("box"), place.is_of("crate")) == (text, True, False)
        try:
            place.find(since(kept, place.since_s))
        except PlaceLostError:
            num_lost += 1
            continue
        again = Trail("box", since=place)
        assert b"".join(again.take(one) for one in since(kept, place.since_s)) == rest[offset:]
    # Only those of the first second are in doubt, and those that were thrown away are gone.
    assert num_lost <= 1 or cut


@pytest.mark.parametrize("seed", range(40))
def test_a_connection_that_breaks_again_and_again_repeats_and_loses_nothing(seed: int) -> None:
    draws = random.Random(1000 + seed)
    log = written(draws, 200)
    trail, told = Trail("box", is_whole=True), b""
    for _ in range(20):
        trail.rewind()
        come = since(log, trail.place.since_s if trail.place else 0)
        for one in come[: draws.randrange(len(come))]:
            told += trail.take(one)
    trail.rewind()
    assert trail.place is not None
    for one in since(log, trail.place.since_s):
        told += trail.take(one)
    assert told == b"".join(content for _, content in log)


def test_a_place_is_never_far_behind() -> None:
    trail, distance = Trail("box"), 0
    for number in range(5000):
        piece = trail.take(entry(START_NS + number * 10**7, b"%0100d\n" % number))
        distance = 0 if isinstance(piece, Placed) else distance
        distance += len(piece)
        assert distance < APART_BYTES + 200


def test_of_two_lines_that_are_the_same_at_once_the_first_of_a_tail_is_in_doubt() -> None:
    log = [(START_NS, b"x\n"), (START_NS, b"x\n"), (START_NS, b"y\n")]
    piece = Trail("box").take(entry(*log[1]))
    assert isinstance(piece, Placed)
    place = Place.parse(piece.place)
    with pytest.raises(PlaceLostError, match="two lines"):
        place.find(since(log, place.since_s))
    place.find(since(log[1:], place.since_s))
    whole = Trail("box", is_whole=True).take(entry(*log[0]))
    assert isinstance(whole, Placed)
    Place.parse(whole.place).find(since(log, place.since_s))


def test_no_part_of_a_long_line_is_a_place_but_its_last_one() -> None:
    trail = Trail("box")
    told = [trail.take(entry(START_NS, part)) for part in (b"=" * 16_384, b"=" * 16_384, b"==\n")]
    told.append(trail.take(entry(START_NS + 1, b"=" * 16_384)))
    assert not any(isinstance(piece, Placed) for piece in told)
    assert isinstance(Trail("box").take(entry(START_NS, b"==\n")), Placed)


def test_a_place_that_does_not_come_is_not_waited_for() -> None:
    log = [(START_NS + number * 10**9, b"%d\n" % number) for number in range(10)]
    piece = Trail("box").take(entry(*log[2]))
    assert isinstance(piece, Placed)
    place = Place.parse(piece.place)
    with pytest.raises(PlaceLostError, match="not kept"):
        place.find(since(log[:2], place.since_s))
    again = Trail("box", since=place)
    assert again.take(entry(*log[3])) == b"", "it may only be out of its order"
    with pytest.raises(PlaceLostError, match="not kept"):
        again.take(entry(*log[4]))


def test_what_is_lost_is_gone_on_behind_by_time() -> None:
    trail = Trail("box", is_whole=True)
    log = [(START_NS + number, b"%d\n" % number) for number in range(10)]
    assert b"".join(trail.take(entry(*one)) for one in log[:5]) == b"0\n1\n2\n3\n4\n"
    trail.rewind()
    trail.give_up()
    assert b"".join(trail.take(entry(*one)) for one in log[3:]) == b"5\n6\n7\n8\n9\n"


@pytest.mark.parametrize(
    ("raw", "written_ns"),
    [
        (b"2023-11-14T22:13:20Z x", START_NS),
        (b"2023-11-14T22:13:20.1Z x", START_NS + 10**8),
        (b"2023-11-14T22:13:20.09Z x", START_NS + 9 * 10**7),
        (b"2023-11-14T22:13:20.000000001Z x", START_NS + 1),
        (b"2023-11-15T00:13:20.000000001+02:00 x", START_NS + 1),
        (b"x", None),
        (b"x 2023-11-14T22:13:20Z x", None),
    ],
)
def test_times_are_read_in_every_form(raw: bytes, written_ns: int | None) -> None:
    assert timed(raw) == (written_ns, raw if written_ns is None else b"x")


@pytest.mark.parametrize("text", ["0123abcd", "1.5-x", "", "1700000000.000000000-0123abcd-0123abcd~~"])
def test_what_is_no_place_is_none_in_any_log(text: str) -> None:
    with pytest.raises(PlaceLostError, match="no place"):
        Place.parse(text)
