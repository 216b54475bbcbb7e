"""Bad images, a manifest that no longer holds and a lost shard, each in a whole training run as a user starts it."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pipelines import datasets
from service import tracking
from tests.pipelines import odd_images

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]
GOOD = 14
# Of a whole run, which on two quiet cores takes ten seconds.
PATIENCE_S = 600


def photograph(seed: int, side: int = 48) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((side, side))


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def odd() -> dict[str, bytes]:
    """What has to be trained on like any other image."""
    picture = photograph(100)
    deep = odd_images.png([row.astype(">u2").tobytes() for row in odd_images.DEEP], 2, 16)
    return {
        "cmyk.jpg": encoded(picture.convert("CMYK"), "JPEG"),
        "grey.jpg": encoded(picture.convert("L"), "JPEG"),
        "grey16.png": encoded(odd_images.GREY16, "PNG"),
        "colour16.png": deep,
        "turned.jpg": odd_images.turned("JPEG", 6),
        "huge.png": encoded(Image.new("L", (12_500, 8_000), 128), "PNG"),
        "tiny.png": encoded(photograph(101, 1), "PNG"),
    }


def bad() -> dict[str, bytes]:
    whole = encoded(photograph(102), "JPEG")
    return {"truncated.jpg": whole[: len(whole) // 2], "empty.jpg": b""}


def fill(folder: Path, *, with_bad: bool) -> Path:
    files = {f"train/cat/{number}.jpg": encoded(photograph(number), "JPEG") for number in range(GOOD)}
    files |= {f"train/dog/{name}": data for name, data in odd().items()}
    files |= {
        f"val/{kind}/{number}.jpg": encoded(photograph(number), "JPEG")
        for kind in ("cat", "dog")
        for number in (50, 51)
    }
    if with_bad:
        files |= {f"train/dog/{name}": data for name, data in bad().items()}
        files["val/dog/cut.jpg"] = bad()["truncated.jpg"]
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    uri = f"sqlite:///{folder}/mlflow.db"
    tracking.ensure_ready(uri)
    (folder / "job.yaml").write_text(
        f"""
output: {folder}/runs
duration: 12 steps
evaluate_every: 1000 steps
global_batch: 8
micro_batch: 4
workers: 2
device: cpu
log_samples: true
data: {{name: folder, size: 32, eval_crop: 1.0, num_threads: 1}}
model: {{name: resnet_small, width: 8}}
optimizer: {{lr: 0.01}}
checkpoint: {{every: 4 steps}}
tracking: {{uri: "{uri}", log_every: 4 steps, system_metrics: false}}
registry: {{name: ""}}
"""
    )
    return folder


def command(place: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "service.cli", "train", str(place / "job.yaml"), *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def train(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(place, *arguments), env=environment(), capture_output=True, text=True, timeout=PATIENCE_S
    )


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    return load_file(newest / "weights.safetensors") | load_file(newest / "optimizer.safetensors")


def same(first: Path, second: Path) -> bool:
    one, other = weights(first), weights(second)
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_bad_images_are_left_out_by_name_and_odd_ones_trained_on(place: Path) -> None:
    root = fill(place / "mixed", with_bad=True)
    done = train(place, f"data.root={root}", "name=skips", "data.on_bad_image=skip")
    assert done.returncode == 0, done.stderr
    run = place / "runs" / "skips"
    assert json.loads((run / "summary.json").read_text())["skipped_images"] == {"train": 2, "eval": 1}
    named = json.loads((run / "left_out.json").read_text())
    told = {
        split: sorted(line.partition(":")[0].removeprefix(f"{root}/") for line in lines)
        for split, lines in named.items()
    }
    assert told == {"train": ["train/dog/empty.jpg", "train/dog/truncated.jpg"], "eval": ["val/dog/cut.jpg"]}
    assert "empty" in " ".join(named["train"])
    assert "left_out.json" in done.stdout + done.stderr
    assert "2 of training, 1 of evaluation" in (run / "report.html").read_text()
    # Four epochs: everything that can be read was trained on, the odd kinds among it.
    manifest = datasets.load("folder", root, "train")
    records = [line for path in run.glob("samples-rank*.jsonl") for line in path.read_text().splitlines()]
    seen = {manifest.source_path(sample) for record in records for ids in json.loads(record)["ids"] for sample in ids}
    assert seen == {f"train/dog/{name}" for name in odd()} | {f"train/cat/{number}.jpg" for number in range(GOOD)}

    # As after a death behind the last step: an earlier part has met the bad images, and this one meets none.
    for name in ("left_out.json", "summary.json"):
        (run / name).unlink()
    again = train(place, f"data.root={root}", "name=skips", "data.on_bad_image=skip", "--resume")
    assert again.returncode == 0, again.stderr
    assert json.loads((run / "summary.json").read_text())["skipped_images"]["train"] == 2
    assert [told.partition(":")[0] for told in json.loads((run / "left_out.json").read_text())["train"]] == [
        told.partition(":")[0] for told in named["train"]
    ]


def test_a_bad_image_stops_the_run_by_name_unless_it_may_be_left_out(place: Path) -> None:
    root = fill(place / "mixed", with_bad=True)
    done = train(place, f"data.root={root}", "name=stops")
    assert done.returncode == 3, done.stderr
    assert f"{root}/train/dog/" in done.stderr
    assert "truncated" in done.stderr or "empty" in done.stderr
    assert "data.on_bad_image=skip" in done.stderr
    assert not (place / "runs" / "stops" / "summary.json").exists()


def start_and_await(place: Path, name: str, *arguments: str, step: int = 8) -> "subprocess.Popen[str]":
    """A run that has saved a checkpoint and goes on."""
    job = subprocess.Popen(
        command(place, f"name={name}", *arguments),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    first = place / "runs" / name / "checkpoints"
    deadline = time.monotonic() + PATIENCE_S
    while not any(int(path.name[5:]) >= step for path in first.glob("step-????????")):
        assert job.poll() is None, job.communicate()[1]
        if time.monotonic() > deadline:
            job.terminate()
            raise AssertionError(f"no checkpoint of step {step} after {PATIENCE_S} s")
        time.sleep(0.02)
    return job


def test_images_that_change_or_go_while_a_run_reads_them_end_it_by_name(place: Path) -> None:
    root = fill(place / "changing", with_bad=False)
    given = (f"data.root={root}", "duration=100000 steps")
    job = start_and_await(place, "changes", *given)
    gone, other = root / "train/cat/3.jpg", root / "train/cat/5.jpg"
    smaller = place / "smaller.jpg"
    smaller.write_bytes(encoded(photograph(7, 20), "JPEG"))
    gone.unlink()
    # At once: what is half written would be refused for that.
    smaller.replace(other)
    _, said = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 3, said
    assert f"{gone}: cannot be read" in said or f"{other}: the image is 20 x 20 pixels, but was 48 x 48" in said
    assert list((place / "runs" / "changes" / "checkpoints").glob("step-*"))
    # The manifest is made anew of what is there now, and a run that began on other data does not go on with it.
    again = train(place, "name=changes", *given, "--resume")
    assert again.returncode == 5, again.stderr
    assert "data" in again.stderr


def test_a_run_that_loses_a_shard_says_which_and_goes_on_from_its_checkpoint_once_it_is_back(place: Path) -> None:
    source, root = fill(place / "source", with_bad=False), place / "prepared"
    line = [sys.executable, "-m", "service.cli", "data", "prepare", str(source), str(root), "--size", "48"]
    made = subprocess.run(
        [*line, "--shard-size", "20kB"], env=environment(), capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert made.returncode == 0, made.stderr
    shards = sorted(root.rglob("*train*.tar"))
    assert len(shards) > 1
    # Left to be skipped, a lost shard would silently become a smaller data set.
    given = (
        "data.name=prepared",
        f"data.root={root}",
        "data.on_bad_image=skip",
        "duration=200 steps",
        "checkpoint.every=20 steps",
    )
    whole = train(place, "name=undisturbed", *given)
    assert whole.returncode == 0, whole.stderr
    content, times = shards[0].read_bytes(), shards[0].stat()

    def bring_back() -> None:
        shards[0].write_bytes(content)
        os.utime(shards[0], ns=(times.st_atime_ns, times.st_mtime_ns))

    # The run may end before it misses the shard, where this process has to wait for its turn.
    for number in range(5):
        name = f"bereft-{number}"
        job = start_and_await(place, name, *given, step=20)
        # A removed file can still be read through what is open: this is what a server that lost it answers.
        os.truncate(shards[0], 0)
        _, said = job.communicate(timeout=PATIENCE_S)
        if job.returncode != 0:
            break
        bring_back()
    run = place / "runs" / name
    assert job.returncode == 3, said
    assert str(shards[0]) in said
    last = sorted((run / "checkpoints").glob("step-*"))[-1].name
    assert "step-00000020" <= last < "step-00000200"
    shards[0].unlink()
    refused = train(place, f"name={name}", *given, "--resume")
    assert refused.returncode == 3, refused.stderr
    assert str(shards[0]) in refused.stderr
    assert sorted((run / "checkpoints").glob("step-*"))[-1].name == last

    bring_back()
    done = train(place, f"name={name}", *given, "--resume")
    assert done.returncode == 0, done.stderr
    assert same(run, place / "runs" / "undisturbed")
    assert json.loads((run / "summary.json").read_text())["skipped_images"] == {"train": 0, "eval": 0}
