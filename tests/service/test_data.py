"""The data commands: what they print, draw, and how they end."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from pipelines import datasets, loading, pretext, remote
from pipelines.amounts import shown_bytes
from pipelines.plan import Plan
from service import cli, config
from service.data import pictures, preparation, statistics
from service.errors import ConfigError


def call(*arguments: str) -> int:
    """The exit code of `lorot ARGUMENTS`, run in this process."""
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    return int(ended.value.code or 0)


@pytest.fixture
def pets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six training and two validation images of two classes."""
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("LOROT_DEBUG", "")
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for number in range(count):
            path = tmp_path / "pets" / split / ("cat", "dog")[number % 3 == 0] / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((80 + number, 60), Image.Resampling.BICUBIC).save(path)
    return tmp_path / "pets"


def test_a_set_is_prepared_checked_and_counted(pets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = str(tmp_path / "set")
    assert call("data", "prepare", str(pets), target, "--size", "30", "--shard-size", "1MB") == 0
    text = capsys.readouterr().out
    assert "6 samples of 2 classes" in text
    assert "2 samples of 2 classes" in text
    assert re.search(r"kB before, .* after \(\d+%\)", text)
    assert call("data", "prepare", str(pets), target, "--size", "30", "--shard-size", "1MB") == 0
    assert capsys.readouterr().out.count("nothing to do") == 2
    assert call("data", "verify", target, "--decode") == 0
    assert capsys.readouterr().out.count("all whole") == 2
    assert call("data", "stats", target, "--split", "train") == 0
    text = capsys.readouterr().out
    assert "2: 2 samples in the smallest, 3 median, 4 in the largest" in text
    assert re.search(r"short side, pixels +│ +30 │ +30 │ +30 │ +30 │ +30", text)


def test_damage_is_listed_and_ends_with_the_code_of_bad_data(
    pets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "set"
    assert call("data", "prepare", str(pets), str(target), "--split", "train") == 0
    shard = target / "train-000000.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 255
    shard.write_bytes(content)
    capsys.readouterr()
    assert call("data", "verify", str(target)) == 3
    text = capsys.readouterr().out
    assert "2 found damaged" in text
    assert "train-000000.tar, byte 512 (made from train/cat/1.jpg): its checksum" in text
    assert "lorot data prepare" in text
    shard.unlink()
    assert call("data", "verify", str(target)) == 3
    assert call("data", "prepare", str(pets), str(target), "--split", "train") == 0
    assert call("data", "verify", str(target)) == 0


def test_plain_folders_are_verified_too(pets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("data", "verify", str(pets)) == 0
    assert "train: 6 samples" in capsys.readouterr().out
    path = pets / "val/cat/1.jpg"
    path.write_bytes(path.read_bytes()[:-100])
    assert call("data", "verify", str(pets)) == 3
    assert "val/cat/1.jpg" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["prepare", "{pets}", "{set}", "--shard-size", "many"], 2, "--shard-size"),
        (["prepare", "{pets}", "{set}", "--resize", "both"], 2, "short, long, none"),
        (["prepare", "{pets}", "{set}", "--split", "test"], 3, "no split 'test'"),
        (["verify", "{set}"], 3, "no such folder"),
        (["show", "{pets}", "--output", "sheet.bmp"], 2, ".png or .html"),
        (["show", "{pets}", "data.sise=3"], 2, "data.size"),
    ],
)
def test_wrong_usage_says_what_would_work(
    pets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, said: str
) -> None:
    named = [argument.format(pets=pets, set=tmp_path / "set") for argument in arguments]
    assert call("data", *named) == code
    assert said in capsys.readouterr().err


def test_sizes_are_read_and_written_as_people_do() -> None:
    assert [preparation.parse_size(text) for text in ("256MB", "1.5 gb", "1000", "3 kB", "7b")] == [
        256_000_000,
        1_500_000_000,
        1000,
        3000,
        7,
    ]
    for text in ("", "MB", "0", "-1MB", "1e30", "nan"):
        with pytest.raises(ValueError, match=r"could not convert|no size"):
            preparation.parse_size(text)
    assert [shown_bytes(number) for number in (12, 1500, 26_500_000, 2e12)] == ["12 B", "1.5 kB", "26.5 MB", "2.0 TB"]


def test_a_sheet_shows_the_planned_window_where_the_pixels_come_from(pets: Path, tmp_path: Path) -> None:
    output = tmp_path / "sheet.png"
    options = ["data.size=32", "pretext.name=none", "data.flip=false", "data.scale=[0.2, 0.3]"]
    pictures.show(Console(quiet=True), pets, options, split="train", count=3, epoch=0, first=0, output=output)
    sheet = np.asarray(Image.open(output)).astype(int)
    blue = np.abs(sheet - np.array([0, 150, 255])).sum(axis=2) < 30
    tile, gap = 220, 10
    rows, columns = np.nonzero(blue[:, : tile + gap])
    top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    inside = Image.fromarray(sheet[top + 2 : bottom - 2, left + 2 : right - 2].astype(np.uint8)).resize((40, 40))
    shown = Image.fromarray(sheet[gap : gap + tile, tile + 2 * gap : 2 * (tile + gap)].astype(np.uint8)).resize(
        (40, 40)
    )
    assert np.abs(np.asarray(inside).astype(int) - np.asarray(shown)).mean() < 20


@pytest.mark.parametrize("flip", [False, True])
def test_a_box_of_the_input_is_drawn_on_the_source_where_it_comes_from(flip: bool) -> None:
    # A window of half the input's size, 10 pixels from the top and 20 from the left.
    corners = pictures._on_source((8, 4, 16), (10, 20, 32, 32), 64, flip)
    assert corners == ((20 + 22, 14, 20 + 30, 22) if flip else (22, 14, 30, 22))


def test_what_is_shown_is_what_training_loads(pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [
        "pretext.name=lorot_i",
        "data.size=32",
        "data.sizes=[{size: 16, until: 2 steps}]",
        "data.repeats=2",
        "data.order=blocks",
        "data.block=2",
        "global_batch=4",
        "micro_batch=4",
        "duration=4 steps",
        "evaluate_every=4 steps",
        f"data.cache_folder={tmp_path / 'own cache'}",
        "data.cache_gb=3",
    ]
    job = pictures.job_of(pets, options)
    shown: list[tuple[int, Plan]] = []
    monkeypatch.setattr(pictures, "_row", lambda manifest, view, plan, data, wanted: shown.append((wanted, plan)))
    monkeypatch.setattr(pictures, "_sheet", lambda rows: Image.new("RGB", (1, 1)))
    kept: list[tuple[object, int]] = []
    monkeypatch.setattr(remote, "use_cache", lambda *given: kept.append(given))
    pictures.show(Console(quiet=True), pets, options, split=None, count=6, epoch=1, first=0, output=tmp_path / "a.png")
    assert kept == [(job.data.cache_folder, 3 * 10**9)]

    # An epoch has six positions; the second begins in the middle of step 1, before the size changes.
    source = loading.Source(
        datasets.load("folder", pets, "train"),
        config.view(job.data),
        pretext.load("lorot_i"),
        job.seed,
        repeats=2,
        order="blocks",
        block=2,
        sizes=((0, 16), (2, 32)),
    )
    steps = loading.open_train("torch", source, start_step=0, stop_step=3, global_batch=4, micro_batch=4, num_threads=1)
    loaded = [(batch.images.shape[-1], sample) for batch in steps for sample in batch.ids.tolist()]
    assert [(plan.size, sample) for sample, plan in shown] == loaded[6:12]
    assert [size for size, _ in loaded[6:12]] == [16, 16, 32, 32, 32, 32]


def test_a_page_holds_its_pictures_and_escapes_names(pets: Path, tmp_path: Path) -> None:
    (pets / "train/cat").rename(pets / "train/c<b>")
    (pets / "val").rename(tmp_path / "away")
    output = tmp_path / "page.html"
    pictures.show(Console(quiet=True), pets, ["data.size=32"], split=None, count=6, epoch=1, first=0, output=output)
    text = output.read_text()
    assert text.count("data:image/png;base64,") == 12
    assert "c&lt;b&gt;" in text
    assert "c<b>" not in text
    assert "://" not in text


def test_an_unreadable_sample_is_shown_as_such(pets: Path, tmp_path: Path) -> None:
    for path in (pets / "train").rglob("*.jpg"):
        path.write_bytes(path.read_bytes()[:-100])
    output = tmp_path / "page.html"
    pictures.show(Console(quiet=True), pets, ["data.size=32"], split=None, count=2, epoch=0, first=0, output=output)
    assert output.read_text().count("<br>unreadable<br>") == 2


def test_other_names_of_pictures_are_refused(pets: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.png or \.html"):
        pictures.show(Console(), pets, [], split=None, count=1, epoch=0, first=0, output=Path("a.gif"))


def test_statistics_of_boxes_are_shares_of_the_image(tmp_path: Path) -> None:
    manifest = datasets.load("demo", tmp_path / "demo", "val", train_count=10, val_count=10, size=48)
    text = io.StringIO()
    statistics.show(Console(file=text, width=160), manifest)
    assert "boxes a sample (10 in all)" in text.getvalue()
    shares = [
        float(np.prod(manifest.boxes(sample)[0, 2:] - manifest.boxes(sample)[0, :2]) / 48**2) for sample in range(10)
    ]
    row = next(line for line in text.getvalue().splitlines() if line.startswith("box, % of the image"))
    assert f"{100 * min(shares):.1f}" in row
    assert f"{100 * max(shares):.1f}" in row
