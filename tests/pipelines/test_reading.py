"""Who is in a batch and what is read for it: repeats, sizes, block order, shards."""

import numpy as np
import pytest
import torch

from pipelines import manifest, pretext
from pipelines.errors import DataError, LorotError
from pipelines.loading import Source, open_eval, open_train
from pipelines.manifest import Heading, Manifest, Rows
from pipelines.order import WINDOW
from pipelines.plan import View
from pipelines.reading import Reader, Training
from tests.pipelines.conftest import HEADING, draw, write_files

COUNT = 40
VIEW = View(size=16)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """40 small JPEG files."""
    return write_files(tmp_path_factory.mktemp("few"), [draw(n, 24 + n % 5, 30 - n % 7) for n in range(COUNT)])


@pytest.fixture
def sharded(few, tmp_path):
    """The same samples in 4 shards of 10."""
    return write_shards(few, tmp_path, 10)


def write_shards(few, folder, each):
    shards, offsets, sizes = np.arange(COUNT) // each, [], []
    for shard in range(COUNT // each):
        with (folder / f"{shard}.tar").open("wb") as file:
            for number in range(shard * each, shard * each + each):
                offsets.append(file.tell())
                sizes.append(file.write((few.root / f"{number:04d}.jpg").read_bytes()))
    rows = Rows(few.labels, few.heights, few.widths, shards=shards, offsets=np.array(offsets), sizes=np.array(sizes))
    names = tuple(f"{shard}.tar" for shard in range(COUNT // each))
    heading = Heading(classes=few.classes, class_ids=few.class_ids, shards=names, **HEADING)
    manifest.write(folder / "index.arrow", heading, rows)
    return Manifest.open(folder / "index.arrow", folder)


def source_of(opened, task="lorot_i", **options):
    return Source(opened, VIEW, pretext.load(task), seed=4, **options)


def train(source, kind="torch", **options):
    steps = {"start_step": 0, "stop_step": 6, "global_batch": 16, "micro_batch": 8, "num_threads": 1}
    return open_train(kind, source, **(steps | options))


def assert_same(batches, others):
    batches, others = list(batches), list(others)
    assert len(batches) == len(others) > 0
    for one, other in zip(batches, others, strict=True):
        for name, left, right in zip(one._fields, one, other, strict=True):
            assert torch.equal(left, right), name


def test_shards_give_the_same_batches_as_files(few, sharded):
    assert_same(train(source_of(few)), train(source_of(sharded)))


def test_a_repeated_sample_comes_so_often_in_a_row_each_time_with_other_draws(few):
    plain = torch.cat([batch.ids for batch in train(source_of(few), stop_step=2)])
    batches = list(train(source_of(few, repeats=3), stop_step=6))
    ids, images = torch.cat([b.ids for b in batches]), torch.cat([b.images for b in batches])
    assert ids.tolist() == plain.repeat_interleave(3).tolist()[: len(ids)]
    for start in range(0, len(ids), 3):
        trio = images[start : start + 3]
        assert not any(torch.equal(trio[i], trio[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_repetitions_have_draws_of_their_own_in_every_epoch(few):
    source = source_of(few, repeats=2)
    schedule = Training(source.sequence, 0, 100, 16, 8, 0, 1, repeats=2)
    slots = [schedule.slots(index) for index in range(30)]
    drawn = list(zip(*(np.concatenate([getattr(s, name) for s in slots]) for name in ("epochs", "ids")), strict=True))
    assert len(set(drawn)) == len(drawn) == 240
    # 240 positions are three epochs of 40 samples twice.
    assert sorted(drawn) == [(epoch, sample) for epoch in range(6) for sample in range(COUNT)]


@pytest.mark.parametrize("kind", ["dali", "torch"])
@pytest.mark.parametrize("options", [{"repeats": 3}, {"order": "blocks", "block": 4}, {"sizes": ((3, 24), (5, 8))}])
def test_a_restart_and_any_world_size_give_the_same_batches(few, sharded, kind, options):
    source = source_of(sharded, **options)
    whole = list(train(source, kind))
    assert_same(train(source, kind, start_step=4), whole[8:])
    shares = [list(train(source, kind, rank=rank, world_size=2)) for rank in range(2)]
    assert_same([share[i] for i in range(len(shares[0])) for share in shares], whole)


def test_a_repeated_sample_of_a_batch_is_read_once(few):
    reader = Reader(source_of(few, repeats=4), Training(source_of(few).sequence, 0, 9, 16, 8, 0, 1, repeats=4))
    assert len(reader.wanted(reader.slots(0))) == 2


@pytest.mark.parametrize("kind", ["dali", "torch"])
def test_the_size_changes_with_the_step_and_boxes_with_it(few, kind):
    batches = list(train(source_of(few, "rotation", sizes=((2, 24), (4, 32))), kind))
    assert [batch.images.shape[-1] for batch in batches] == [16] * 4 + [24] * 4 + [32] * 4
    assert all((batch.boxes[:, 2] == batch.images.shape[-1]).all() for batch in batches)
    (evaluated,) = open_eval(kind, source_of(few, sizes=((0, 24),)), batch_size=COUNT, num_threads=1)
    assert evaluated.images.shape[-1] == 16


def test_the_last_size_that_has_begun_counts(few):
    source = source_of(few, sizes=((10, 24), (20, 32)))
    assert [source.size_at(step) for step in (0, 9, 10, 19, 20, 10**9)] == [16, 16, 24, 24, 32, 32]
    assert source.all_sizes == (16, 24, 32)


def test_a_pretext_task_that_does_not_fit_one_of_the_sizes_is_refused_at_the_start(few):
    with pytest.raises(LorotError, match="does not fit an input of 3 x 3"):
        Source(few, VIEW, pretext.load("lorot_e", grid=4), 0, sizes=((0, 64), (50, 3)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "random"}, "global, blocks"),
        ({"block": 0}, "at least 1"),
        ({"repeats": 0}, "at least 1"),
        ({"sizes": ((5, 16), (3, 24))}, "ascending"),
        ({"sizes": ((0, 0),)}, "sizes of at least 1"),
    ],
)
def test_impossible_options_are_errors(few, options, message):
    with pytest.raises(LorotError, match=message):
        source_of(few, **options)


class Noted:
    """Files that note what is asked of them."""

    own_limit = False

    def __init__(self, files):
        self.files, self.expected, self.reads = files, [], []

    def read(self, path, offset=0, size=None):
        self.reads.append((path, offset, size))
        return self.files.read(path, offset, size)

    def expect(self, path, offset, size):
        self.expected.append((path, offset, size))


def test_block_order_reads_the_storage_in_whole_blocks_each_once(few, tmp_path):
    opened = write_shards(few, tmp_path, 20)
    opened.files = noted = Noted(opened.files)
    source = source_of(opened, order="blocks", block=1)
    # Two epochs of 40 blocks, and the window beyond.
    batches = list(train(source, stop_step=5))
    assert len(batches) == 10
    firsts, _ = source.sequence.blocks(np.zeros(10**3, np.int64), np.arange(10**3))
    wanted = [opened.location(sample) for sample in firsts.tolist()]
    assert noted.expected == wanted[: len(noted.expected)]
    assert 80 <= len(noted.expected) <= 80 + WINDOW
    assert set(noted.reads) <= set(noted.expected)


def test_a_block_is_one_piece_of_a_shard_and_two_where_shards_meet(few, tmp_path):
    opened = write_shards(few, tmp_path, 10)
    opened.files = noted = Noted(opened.files)
    list(train(source_of(opened, order="blocks", block=8), stop_step=1))
    ends = [opened.location(sample) for sample in range(COUNT)]
    pieces = [sample for start in range(0, COUNT, 8) for sample in [(start, min(start + 8, COUNT))]]
    whole = set()
    for start, stop in pieces:
        for shard in {path for path, _, _ in ends[start:stop]}:
            own = [(offset, offset + size) for path, offset, size in ends[start:stop] if path == shard]
            whole.add((shard, own[0][0], own[-1][1] - own[0][0]))
    assert set(noted.expected) <= whole
    assert len(set(noted.expected)) == len(whole) == 8


def test_within_a_batch_reading_goes_forward_only(sharded):
    sharded.files = noted = Noted(sharded.files)
    list(train(source_of(sharded, order="blocks", block=2), stop_step=5, read_threads=1))
    for start in range(0, len(noted.reads), 8):
        assert noted.reads[start : start + 8] == sorted(noted.reads[start : start + 8])


def test_in_block_order_the_reads_of_some_batches_lie_near_together(few, tmp_path):
    opened = write_shards(few, tmp_path, 40)
    source = source_of(opened, order="blocks", block=1)
    near = source.sequence.samples(np.arange(WINDOW))[1]
    firsts, _ = source.sequence.blocks(np.zeros(WINDOW, np.int64), np.arange(WINDOW))
    assert sorted(near) == sorted(firsts)


@pytest.mark.parametrize("kind", ["dali", "torch"])
def test_a_shard_that_disappears_or_is_cut_off_in_the_middle_of_a_run_is_named(few, tmp_path, kind):
    opened = write_shards(few, tmp_path, 10)
    loader = train(source_of(opened), kind, stop_step=40)
    next(loader)
    with (tmp_path / "2.tar").open("r+b") as shard:
        shard.truncate(100)
    with pytest.raises(DataError, match=r"2\.tar: ends before the \d+ bytes at \d+"):
        list(loader)
    (tmp_path / "1.tar").unlink()
    again = Manifest.open(tmp_path / "index.arrow", tmp_path)
    with pytest.raises(DataError, match=r"[12]\.tar"):
        list(train(source_of(again), kind))


def test_data_types_are_passed_on(few):
    for dtype in ("uint8", "float16"):
        (batch, *_) = train(source_of(few), dtype=dtype)
        assert batch.images.dtype == getattr(torch, dtype)
