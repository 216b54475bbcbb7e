import io
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from pipelines import dali, loading, pretext, readahead
from pipelines.errors import DataError, LorotError
from pipelines.loading import Source, open_eval, open_train
from pipelines.plan import View
from pipelines.soundness import UnsoundError
from pipelines.torch_reference import rotate_patch
from tests.pipelines.conftest import draw, index_files, write_files

KINDS = ["dali", "torch"]
COUNT = 30
VIEW = View(size=16)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """30 small JPEG files."""
    return write_files(tmp_path_factory.mktemp("few"), [draw(n, 24 + n % 5, 30 - n % 7) for n in range(COUNT)])


@pytest.fixture
def broken(few, tmp_path):
    """A copy of them, to be damaged."""
    for file in few.root.glob("*.jpg"):
        shutil.copy(file, tmp_path)
    return index_files(tmp_path, list(zip(few.heights, few.widths, strict=True)))


def source_of(manifest, task="lorot_i", **options):
    return Source(manifest, VIEW, pretext.load(task), seed=4, **options)


def train(kind, source, start=0, stop=6, rank=0, world_size=1, threads=1, prefetch=2, micro_batch=4, global_batch=16):
    return open_train(
        kind,
        source,
        start_step=start,
        stop_step=stop,
        global_batch=global_batch,
        micro_batch=micro_batch,
        rank=rank,
        world_size=world_size,
        num_threads=threads,
        prefetch=prefetch,
    )


def assert_same(batches, others):
    batches, others = list(batches), list(others)
    assert len(batches) == len(others)
    for one, other in zip(batches, others, strict=True):
        for name, left, right in zip(one._fields, one, other, strict=True):
            assert torch.equal(left, right), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 30), (1, 7), (2, 4), (3, 8), (4, 16)])
def test_evaluation_sees_every_sample_once_with_its_own_label_and_image(few, kind, world_size, batch_size):
    seen = {}
    for rank in range(world_size):
        loader = open_eval(kind, source_of(few), batch_size=batch_size, rank=rank, world_size=world_size, num_threads=1)
        assert len(loader) == -(-COUNT // (batch_size * world_size))
        for batch in loader:
            assert batch.images.shape == (batch_size, 3, 16, 16)
            for number in batch.valid.nonzero()[:, 0].tolist():
                sample = int(batch.ids[number])
                assert sample not in seen
                assert batch.labels[number] == few.labels[sample]
                seen[sample] = batch.images[number]
    assert sorted(seen) == list(range(COUNT))
    (whole,) = open_eval(kind, source_of(few), batch_size=COUNT, num_threads=1)
    assert all(torch.equal(seen[n], whole.images[n]) for n in range(COUNT))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("threads", "prefetch"), [(1, 1), (2, 3), (3, 5)])
def test_batches_do_not_depend_on_threads_and_queues(few, kind, threads, prefetch):
    assert_same(train(kind, source_of(few)), train(kind, source_of(few), threads=threads, prefetch=prefetch))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", [1, 2, 5])
def test_a_restart_at_any_step_goes_on_with_the_same_batches(few, kind, start):
    # 16 samples a step of 30 an epoch: steps 1, 3 and 5 straddle two epochs.
    whole = list(train(kind, source_of(few)))
    assert len(whole) == 6 * 4
    assert_same(train(kind, source_of(few), start=start), whole[start * 4 :])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("task", ["lorot_e", "lorot_i"])
def test_a_global_batch_holds_the_same_augmented_samples_at_any_world_size(few, kind, world_size, task):
    source = source_of(few, task)
    alone = list(train(kind, source))
    shares = [list(train(kind, source, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert_same([share[i] for i in range(len(shares[0])) for share in shares], alone)


def test_an_epoch_holds_every_sample_once_whatever_the_batch(few):
    ids = torch.cat([batch.ids for batch in train("torch", source_of(few), stop=15, micro_batch=2, global_batch=4)])
    assert sorted(ids[:COUNT].tolist()) == sorted(ids[COUNT:].tolist()) == list(range(COUNT))


@pytest.mark.parametrize("kind", KINDS)
def test_epochs_show_the_same_sample_differently(few, kind):
    batches = list(train(kind, source_of(few), stop=15, micro_batch=2, global_batch=4))
    images, ids = torch.cat([b.images for b in batches]), torch.cat([b.ids for b in batches])
    first, second = (ids == 3).nonzero()[:, 0].tolist()
    assert not torch.equal(images[first], images[second])


@pytest.mark.parametrize("kind", KINDS)
def test_without_rendering_the_drawn_turns_come_along_with_untouched_images(few, kind):
    source = source_of(few, "lorot_e", render_pretext=False)
    plain, turned = list(train(kind, source_of(few, "none"))), list(train(kind, source_of(few, "lorot_e")))
    for batch, bare, full in zip(train(kind, source), plain, turned, strict=True):
        assert torch.equal(batch.images, bare.images)
        for name in ("turns", "boxes", "pretext_labels"):
            assert torch.equal(getattr(batch, name), getattr(full, name))
        assert batch.turns.any()


def test_rendering_is_rotate_patch_of_the_image_without_it(few):
    bare = train("dali", source_of(few, render_pretext=False))
    for one, other in zip(bare, train("dali", source_of(few)), strict=True):
        assert torch.equal(rotate_patch(one.images, one.boxes, one.turns), other.images)


@pytest.mark.parametrize("kind", KINDS)
def test_a_limit_is_kept_in_training_and_evaluation(few, kind):
    source = source_of(few, limit=8)
    trained = torch.cat([batch.ids for batch in train(kind, source)])
    evaluated = torch.cat([b.ids[b.valid] for b in open_eval(kind, source, batch_size=3, num_threads=1)])
    assert set(trained.tolist()) == set(evaluated.tolist())
    assert len(evaluated) == 8


def damage(manifest, sample, how):
    file = manifest.root / f"{sample:04d}.jpg"
    data = file.read_bytes()
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes({"empty": b"", "truncated": data[: len(data) // 2], "html": b"<html></html>"}[how])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["empty", "truncated", "html", "missing"])
def test_a_bad_image_is_an_error_that_names_it(broken, kind, how):
    damage(broken, 7, how)
    with pytest.raises(DataError, match=r"0007\.jpg.*on_bad_image=skip"):
        list(train(kind, source_of(broken)))
    with pytest.raises(DataError, match=r"0007\.jpg"):
        list(open_eval(kind, source_of(broken), batch_size=8, num_threads=1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_image_is_bad_whatever_window_is_asked_for(broken, kind):
    file = broken.root / "0007.jpg"
    file.write_bytes(file.read_bytes()[:-4])
    loader = train(kind, source_of(broken, on_bad_image="skip"))
    assert not any(7 in batch.ids for batch in loader)
    assert "truncated: its end-of-image marker is missing" in loader.skipped[7]


@pytest.mark.parametrize("kind", KINDS)
def test_good_batches_before_a_bad_image_are_delivered(broken, kind):
    ids = [batch.ids for batch in train(kind, source_of(broken), prefetch=1)]
    bad = int(ids[9][0])
    first = next(number for number, batch in enumerate(ids) if bad in batch)
    damage(broken, bad, "truncated")
    loader = train(kind, source_of(broken), prefetch=1)
    for _ in range(first):
        next(loader)
    with pytest.raises(DataError):
        next(loader)


@pytest.mark.parametrize("kind", KINDS)
def test_skipping_in_training_takes_the_next_readable_sample(broken, kind):
    whole = list(train(kind, source_of(broken)))
    for sample, how in ((7, "truncated"), (8, "empty"), (29, "missing")):
        damage(broken, sample, how)
    loader = train(kind, source_of(broken, on_bad_image="skip"))
    batches = list(loader)
    assert set(loader.skipped) == {7, 8, 29}
    assert "0007.jpg" in loader.skipped[7]
    replaced = {7: 9, 8: 9, 29: 0}
    for before, after in zip(whole, batches, strict=True):
        assert after.ids.tolist() == [replaced.get(sample, sample) for sample in before.ids.tolist()]
        assert after.labels.tolist() == broken.labels[after.ids.numpy()].tolist()
        assert after.valid.all()
        kept = before.ids == after.ids
        assert torch.equal(before.images[kept], after.images[kept])


def test_skipping_stays_within_the_samples_that_the_limit_keeps(broken):
    source = source_of(broken, on_bad_image="skip", limit=6)
    kept = set(source.sequence.members(np.arange(6)).tolist())
    for sample in sorted(kept)[:3]:
        damage(broken, sample, "empty")
    seen = {sample for batch in train("torch", source) for sample in batch.ids.tolist()}
    assert seen == set(sorted(kept)[3:])


@pytest.mark.parametrize("kind", KINDS)
def test_skipping_in_evaluation_leaves_the_sample_out(broken, kind):
    damage(broken, 7, "truncated")
    loader = open_eval(kind, source_of(broken, on_bad_image="skip"), batch_size=8, num_threads=1)
    batches = list(loader)
    valid = torch.cat([batch.ids[batch.valid] for batch in batches])
    assert valid.tolist() == [n for n in range(COUNT) if n != 7]
    assert list(loader.skipped) == [7]


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_whose_header_could_not_be_indexed_is_bad(few, tmp_path, kind):
    for file in few.root.glob("*.jpg"):
        shutil.copy(file, tmp_path)
    sizes = list(zip(few.heights, few.widths, strict=True))
    sizes[5] = (0, 0)
    (tmp_path / "0005.jpg").write_bytes(b"nothing")
    manifest = index_files(tmp_path, sizes)
    with pytest.raises(DataError, match=r"0005\.jpg"):
        list(train(kind, source_of(manifest)))
    loader = train(kind, source_of(manifest, on_bad_image="skip"))
    assert not any(5 in batch.ids for batch in loader)
    assert set(loader.skipped) == {5}


@pytest.mark.parametrize("kind", KINDS)
def test_damage_that_only_a_decoder_sees_is_found_too(tmp_path, kind):
    sizes = [(20, 20)] * 12
    for number in range(12):
        file = io.BytesIO()
        draw(number, 20, 20).save(file, "PNG")
        data = bytearray(file.getvalue())
        if number == 6:
            data[60:90] = bytes(30)
        (tmp_path / f"{number:04d}.jpg").write_bytes(data)
    manifest = index_files(tmp_path, sizes)
    options = {"stop": 5, "micro_batch": 2, "global_batch": 4}
    with pytest.raises(DataError, match=r"0006\.jpg.*damaged"):
        list(train(kind, source_of(manifest), **options))
    loader = train(kind, source_of(manifest, on_bad_image="skip"), prefetch=3, **options)
    ids = torch.cat([batch.ids for batch in loader])
    _, expected = source_of(manifest).sequence.samples(np.arange(20))
    assert ids.tolist() == [7 if sample == 6 else sample for sample in expected.tolist()]
    assert set(loader.skipped) == {6}


@pytest.mark.parametrize("kind", KINDS)
def test_no_readable_image_at_all_is_an_error(broken, kind):
    for sample in range(COUNT):
        damage(broken, sample, "empty")
    with pytest.raises(DataError, match="no image"):
        list(train(kind, source_of(broken, on_bad_image="skip")))


@pytest.mark.parametrize("kind", KINDS)
def test_a_loader_closed_early_leaves_no_thread_and_its_batches_stay_valid(few, kind, monkeypatch):
    # Time enough for threads that end; one that does not would be there after it, too.
    monkeypatch.setattr(readahead, "CLOSE_S", 60.0)
    before = threading.active_count()
    with train(kind, source_of(few), threads=2) as loader:
        batch = next(loader)
        copy = batch.images.clone()
    # Threads of earlier tests may end meanwhile.
    assert threading.active_count() <= before
    assert list(loader) == []
    list(train(kind, source_of(few)))
    assert torch.equal(batch.images, copy)
    assert threading.active_count() <= before


@pytest.mark.parametrize("kind", KINDS)
def test_no_steps_are_no_batches(few, kind):
    loader = train(kind, source_of(few), start=3, stop=3)
    assert len(loader) == 0
    assert list(loader) == []


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_of_pixels_are_loaded_too(pixels, kind):
    source = Source(pixels, View(size=32, crop="pad", padding=4), pretext.load("lorot_e"), 0)
    seen = [batch.ids[batch.valid] for batch in open_eval(kind, source, batch_size=16, num_threads=1)]
    assert torch.cat(seen).tolist() == list(range(50))
    black = (0 - torch.tensor(source.view.mean)) / torch.tensor(source.view.std)
    images = torch.cat([b.images for b in train(kind, source, stop=3)])
    assert (images[:, :, 0, 0] - black).abs().max(dim=1).values.min() < 1e-5


def test_what_cannot_be_opened_says_what_would_work(few):
    with pytest.raises(LorotError, match="dali, stock, torch"):
        train("ffcv", source_of(few))
    with pytest.raises(LorotError, match="global_batch 16"):
        train("torch", source_of(few), world_size=3)
    with pytest.raises(LorotError, match="error, skip"):
        source_of(few, on_bad_image="ignore")


def test_the_reference_does_not_import_dali():
    code = "import sys, pipelines.loading; print(any(name.startswith('nvidia.dali') for name in sys.modules))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"


def write_progressive(folder):
    """12 progressive JPEG files, of which number 6 has bit errors in its lower half: none of its scans is whole."""
    for number in range(12):
        file = io.BytesIO()
        draw(number, 160, 160).save(file, "JPEG", quality=90, progressive=True)
        data = bytearray(file.getvalue())
        if number == 6:
            noise = np.random.default_rng(1).integers(0, 255, len(data) // 2 - 2, dtype=np.uint8)
            data[len(data) - len(noise) - 2 : -2] = noise.tobytes()
            data[-40:-38] = b"\xff\xc3"
        (folder / f"{number:04d}.jpg").write_bytes(data)
    return index_files(folder, [(160, 160)] * 12)


class Windowed(dali.Renderer):
    """A decoder that fails only where the damage of number 6 is: in windows that reach into its lower half."""

    def prepare(self, samples, plan):
        low = (plan.ids == 6) & (plan.windows[:, 0] + plan.windows[:, 2] > 80) & plan.valid
        return super().prepare(samples, plan) | {"low": low.any()}

    def submit(self, inputs):
        self.__dict__.setdefault("low", []).append(inputs.pop("low"))
        super().submit(inputs)

    def collect(self):
        images = super().collect()
        if self.low.pop(0):
            raise UnsoundError("a marker that is none")
        return images

    def fault(self, sample, plan):
        single = Windowed(self.graph, device="cpu", batch_size=1, num_threads=1, depth=1)
        single.submit(single.prepare([sample], plan))
        try:
            single.collect()
        except UnsoundError as error:
            return str(error)
        finally:
            single.close()
        return None


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("prefetch", [1, 3])
def test_an_interrupted_run_over_a_damaged_image_is_the_uninterrupted_one(tmp_path, monkeypatch, windowed, prefetch):
    if windowed:
        # DALI's own decoders on a CPU fail in all windows of an image or in none.
        monkeypatch.setattr(dali, "Renderer", Windowed)
        manifest = write_files(tmp_path, [draw(n, 160, 160) for n in range(12)])
    else:
        manifest = write_progressive(tmp_path)
    source = Source(manifest, View(size=16, scale=(0.05, 0.3)), pretext.load("lorot_e"), 4, on_bad_image="skip")
    options = {"stop": 30, "micro_batch": 2, "global_batch": 4, "prefetch": prefetch, "threads": 2}
    loader = train("dali", source, **options)
    whole = list(loader)
    assert set(loader.skipped) == {6}
    shown = sum(int((batch.ids == 6).sum()) for batch in whole)
    assert 0 < shown < 10 if windowed else shown == 0
    for start in (3, 10, 17, 25):
        assert_same(train("dali", source, **options, start=start), whole[2 * start :])


def test_where_sizes_vary_the_first_rows_tell():
    class Counted(np.ndarray):
        looked = 0

        def __getitem__(self, rows):
            Counted.looked += 1
            return np.asarray(super().__getitem__(rows))

    same = np.full(10**6, 32).view(Counted)
    assert loading._all_of_size(32, same, same)
    other = same.copy().view(Counted)
    np.asarray(other)[5] = 33
    Counted.looked = 0
    assert not loading._all_of_size(32, other, other)
    assert Counted.looked == 2
    np.asarray(other)[5] = 32
    np.asarray(other)[-1] = 33
    assert not loading._all_of_size(32, other, other)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loader_that_was_left_open_is_closed_before_the_interpreter_goes(few, kind):
    code = f"""
import atexit, sys, threading
from pathlib import Path
atexit.register(lambda: print(sorted(thread.name for thread in threading.enumerate())))
from pipelines import pretext, readahead
readahead.CLOSE_S = 60.0
from pipelines.loading import Source, open_train
from pipelines.manifest import Manifest
from pipelines.plan import View
manifest = Manifest.open({str(few.root / "index.arrow")!r}, {str(few.root)!r})
source = Source(manifest, View(size=16), pretext.load("none"), 0)
steps = dict(start_step=0, stop_step=10**6, global_batch=16, micro_batch=8, num_threads=2, prefetch=3)
for batch in open_train({kind!r}, source, **steps):
    break
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    assert not any(word in done.stdout for word in ("reader-", "preparer-", "renderer"))
