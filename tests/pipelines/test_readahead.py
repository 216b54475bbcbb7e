"""Reading ahead: enough threads for slow storage, a hard cap on memory, reads that never return."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipelines import pretext, readahead, reading
from pipelines.errors import DataError
from pipelines.loading import Source, open_eval, open_train
from pipelines.plan import View
from tests.pipelines.conftest import draw, write_files

COUNT = 48
VIEW = View(size=16)


class Wrapped:
    """A data set's files, with something done before each read."""

    own_limit = False

    def __init__(self, files, before):
        self.files, self.before = files, before

    def read(self, path, offset=0, size=None):
        self.before(path)
        return self.files.read(path, offset, size)

    def expect(self, path, offset, size):
        self.files.expect(path, offset, size)


class OwnTime(threading.local):
    """A clock of each thread, which goes on only when told to: what a busy machine does beside is in none of them."""

    now = 1.0
    monotonic = staticmethod(time.monotonic)

    def perf_counter(self):
        return self.now

    def take(self, seconds):
        self.now += seconds


@pytest.fixture
def few(tmp_path):
    """48 small JPEG files; the later, the larger."""
    return write_files(tmp_path, [draw(n, 20 + n, 24 + 2 * n) for n in range(COUNT)])


def source_of(manifest, **options):
    return Source(manifest, VIEW, pretext.load("lorot_e"), seed=4, **options)


def train(source, kind="torch", **options):
    steps = {"start_step": 0, "stop_step": 6, "global_batch": 16, "micro_batch": 8, "num_threads": 1}
    return open_train(kind, source, **(steps | options))


def assert_same(batches, others):
    for one, other in zip(batches, others, strict=True):
        for left, right in zip(one, other, strict=True):
            assert torch.equal(left, right)


@pytest.mark.parametrize(
    ("latency_s", "rate", "wanted"),
    [(0.0, 4000, 1), (25e-6, 4000, 1), (2e-3, 4000, 8), (20e-3, 2000, 40), (20e-3, 4000, 64), (9.0, 4000, 64)],
)
def test_as_many_threads_read_as_latency_times_rate_asks_for(latency_s, rate, wanted):
    assert readahead.threads_wanted(latency_s, rate, most=64) == wanted


def test_slow_reads_run_side_by_side_up_to_the_limit_and_change_nothing(few):
    expected = list(train(source_of(few)))
    inside, most, lock, enough = 0, 0, threading.Lock(), threading.Event()

    def wait_for_company(_):
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
            if inside == 12:
                enough.set()
        # Whoever reads alone waits in vain.
        assert enough.wait(120)
        time.sleep(0.002)
        with lock:
            inside -= 1

    few.files = Wrapped(few.files, wait_for_company)
    loader = train(source_of(few), read_threads=12)
    assert_same(loader, expected)
    assert most == loader.num_read_threads == 12


def test_fast_reads_need_few_threads(few, monkeypatch):
    clock = OwnTime()
    monkeypatch.setattr(readahead, "time", clock)
    few.files = Wrapped(few.files, lambda _: clock.take(2e-4))
    loader = train(source_of(few), stop_step=30)
    assert sum(1 for _ in loader) == 60
    assert loader.num_read_threads == 1


@pytest.mark.parametrize("kind", ["dali", "torch"])
@pytest.mark.parametrize("share", [1e-9, 0.5, 1.0, 2.5, 1000.0])
def test_no_more_is_held_than_allowed_and_nothing_changes(few, kind, share):
    expected = list(train(source_of(few), kind))
    sizes = np.array([(few.root / f"{n:04d}.jpg").stat().st_size for n in range(COUNT)])
    largest = max(int(sizes[np.unique(batch.ids)].sum()) for batch in expected)
    loader = train(source_of(few), kind, readahead_mb=share * largest / 10**6, prefetch=3)
    assert_same(loader, expected)
    # One batch may be read whatever the limit is.
    assert 0 < loader.peak_read_bytes <= max(share * largest, largest)
    if share > 100:
        assert loader.peak_read_bytes > 2 * largest


def test_batches_that_grow_beyond_all_expectation_stay_within_the_limit(few):
    # The first batches are all asked for at once, by a guess that is a hundredth of the truth.
    for number in range(4, COUNT):
        file = few.root / f"{number:04d}.jpg"
        file.write_bytes(file.read_bytes() + bytes(100_000))
    loader = open_eval("torch", source_of(few), batch_size=4, num_threads=3, prefetch=3, readahead_mb=0.5)
    ids = [next(loader).ids for _ in range(2)]
    # Time to read too much while nobody asks for more.
    time.sleep(1)
    ids += [batch.ids for batch in loader]
    assert torch.cat(ids).tolist() == list(range(COUNT))
    assert 400_000 < loader.peak_read_bytes <= 500_000


@pytest.mark.parametrize("kind", ["dali", "torch"])
def test_a_read_that_never_returns_is_an_error_that_names_the_file(few, kind, monkeypatch):
    expected = list(train(source_of(few), kind))
    stuck = int(expected[5].ids[2])
    first = next(number for number, batch in enumerate(expected) if stuck in batch.ids)
    released, begun, now = threading.Event(), threading.Event(), [1.0]
    monkeypatch.setattr(readahead, "time", SimpleNamespace(perf_counter=lambda: now[0], monotonic=time.monotonic))

    def hang(path):
        if path == f"{stuck:04d}.jpg":
            begun.set()
            released.wait(60)

    whole, few.files = few.files, Wrapped(few.files, hang)
    loader = train(source_of(few, on_bad_image="skip"), kind, read_timeout_s=1.0, prefetch=1)
    try:
        assert_same([next(loader) for _ in range(first)], expected[:first])
        assert begun.wait(60)
        # No other read is under way, and none lasts from now on: reads that take no time are one thread's.
        now[0] += 2
        began = time.monotonic()
        with pytest.raises(DataError, match=rf"{stuck:04d}\.jpg: a read has not come back.*read_timeout_s"):
            next(loader)
        assert time.monotonic() - began < 50
        assert list(loader) == []
    finally:
        released.set()
        few.files = whole


def test_closing_does_not_wait_for_a_read_that_never_returns(few):
    released, begun = threading.Event(), threading.Event()

    def hang(_):
        begun.set()
        released.wait(60)

    few.files = Wrapped(few.files, hang)
    loader = train(source_of(few))
    try:
        assert begun.wait(60)
        began = time.monotonic()
        loader.close()
        assert time.monotonic() - began < 50
    finally:
        released.set()


def test_a_slow_read_holds_up_nobody_but_itself(few):
    # All the others are read while one thread is stuck: nothing but time can tell, so the stuck one waits for them.
    others, lock, all_read = set(), threading.Lock(), threading.Event()

    def wait_for_the_others(path):
        with lock:
            first = not others
            others.add(path)
            if len(others) == 8:
                all_read.set()
        if first:
            assert all_read.wait(120)

    few.files = Wrapped(few.files, wait_for_the_others)
    assert len(list(train(source_of(few)))) == 12


def test_an_error_that_is_no_bad_image_reaches_the_caller(few):
    def fail(_):
        raise RuntimeError("out of order")

    few.files = Wrapped(few.files, fail)
    with pytest.raises(RuntimeError, match="out of order"):
        list(train(source_of(few)))


def test_waiting_and_rendering_are_counted(few):
    few.files = Wrapped(few.files, lambda _: time.sleep(0.001))
    loader = train(source_of(few))
    assert len(list(loader)) == loader.rendered == 12
    assert loader.waited_s > 0
    assert loader.read_wait_s > 0


def test_rewriting_odd_images_is_no_latency_and_no_more_of_them_run_at_once_than_prepare(few, monkeypatch):
    inside, most, lock, clock = 0, 0, threading.Lock(), OwnTime()

    def rewrite(encoded, height, width):
        nonlocal inside, most
        clock.take(1.0)
        with lock:
            inside += 1
            most = max(most, inside)
        time.sleep(0.01)
        with lock:
            inside -= 1
        return encoded

    expected = list(train(source_of(few)))
    monkeypatch.setattr(reading, "sound", rewrite)
    monkeypatch.setattr(readahead, "time", clock)
    # Slow reads, so that many threads read.
    few.files = Wrapped(few.files, lambda _: clock.take(0.01))
    loader = train(source_of(few), num_threads=2)
    assert_same(loader, expected)
    assert loader.num_read_threads > 8
    assert most == 2
    few.files = few.files.files
    loader = train(source_of(few), num_threads=2)
    assert_same(loader, expected)
    assert loader.num_read_threads == 1
