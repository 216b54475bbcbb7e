"""The benchmark's own arithmetic: pairs, bars, and whether its checks catch a loader that does less than the others."""

import numpy as np
import pytest
from PIL import Image

from tests.benchmarks.data import checks, corpus, environment, loaders, table

SIZE = 32


def measured(rate: float, memory: float = 1.0) -> dict[str, float]:
    return {
        "images_per_s": 2 * rate,
        "images_per_cpu_s": rate,
        "first_batch_s": 3.0,
        "pss_bytes": memory,
        "rss_bytes": memory,
    }


def test_ratios_are_taken_within_a_round_and_a_failed_round_counts_nowhere() -> None:
    rounds = {
        "a": [measured(10), measured(40), None, measured(90)],
        "b": [measured(5), measured(10), measured(1), None],
    }
    found = table.ratio(rounds, "a", "b", "images_per_cpu_s")
    # 10 / 5 and 40 / 10; medians of each alone would give 40 / 5.
    assert found == table.Spread(2.5, 3.0, 3.5)
    assert table.ratio(rounds, "a", "c", "images_per_cpu_s") is None


@pytest.mark.parametrize(("ours", "memory", "met"), [(33, 0.9, True), (31, 0.9, False), (33, 1.1, False)])
def test_bars_are_met_from_the_asked_ratio_on_and_up_to_the_asked_memory(ours: float, memory: float, met: bool) -> None:
    text, found = table.bars({"ours": [measured(ours, memory)], "torchvision": [measured(10)]})
    assert found is met
    assert ("MISSED" in text) is not met
    assert "not measured" in text


def test_it_is_the_median_that_has_to_reach_a_bar() -> None:
    rounds = {"ours": [measured(rate, 0.5) for rate in (31, 31, 40)], "torchvision": [measured(10)] * 3}
    assert not table.bars(rounds)[1]
    rounds["ours"] = [measured(rate, 0.5) for rate in (20, 33, 33)]
    assert table.bars(rounds)[1]


def test_every_bar_names_rows_that_exist() -> None:
    rows = loaders.available()
    assert {name for bar in table.BARS for name in (bar.row, bar.other)} <= rows.keys()


def test_the_bars_are_those_that_were_agreed_on() -> None:
    asked = {(bar.row, bar.other): bar.least or bar.most for bar in table.BARS if bar.key == "images_per_cpu_s"}
    assert asked == {
        ("ours", "torchvision"): 3.2,
        ("ours", "ffcv_half"): 1.5,
        ("ours_256", "torchvision"): 5.0,
        ("ours_256", "ffcv_jpeg256"): 1.6,
        ("ours_256", "ffcv_raw256"): 1.2,
        ("ours", "limit_plain"): 0.9,
        ("ours_lorot_e", "ours"): 0.97,
        ("ours_lorot_i", "ours"): 0.97,
    }


def test_the_table_marks_a_row_whose_images_are_not_the_same_and_says_why() -> None:
    rows = {"a": table.Row("one", 1000, ["dtype float16"]), "torchvision": table.Row("two", 2000)}
    text = table.markdown(rows, {"a": [measured(30)], "torchvision": [measured(10)]})
    assert "| one (*) | 60 | 30 | 3.00 [3.00, 3.00] |" in text
    assert "not the same work: dtype float16" in text
    assert "two (*)" not in text


def ruler_images(scale: tuple[float, float], mirrored: float, offset: float = 0.0, count: int = 512) -> np.ndarray:
    """Windows of the ruler, drawn and cut by torchvision and resized by PIL: normalised (count, 3, SIZE, SIZE)."""
    import torch
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(1)
    ruler = corpus._ramps()
    like = torch.empty(3, corpus.HEIGHT, corpus.WIDTH)
    images = []
    for index in range(count):
        y, x, height, width = RandomResizedCrop.get_params(like, scale, (3 / 4, 4 / 3))
        image = ruler.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=(x, y, x + width, y + height))
        pixels = np.asarray(image, np.float32) / 255
        images.append(pixels[:, ::-1] if index < mirrored * count else pixels)
    mean, std = np.array(loaders.MEAN, np.float32), np.array(loaders.STD, np.float32)
    return ((np.stack(images) + offset - mean) / std).astype(np.float32).transpose(0, 3, 1, 2)


@pytest.fixture(scope="module")
def wanted() -> dict[str, np.ndarray]:
    return checks.expected(5000)


@pytest.fixture(scope="module")
def honest() -> np.ndarray:
    return ruler_images((0.08, 1.0), mirrored=0.5)


def test_windows_read_off_the_ruler_are_those_that_were_cut(honest: np.ndarray, wanted: dict[str, np.ndarray]) -> None:
    found = checks.describe([honest[:256], honest[256:]])
    assert checks.differences_in_windows(found, wanted) == []
    assert np.mean(found["mirrored"]) == 0.5
    assert np.mean(found["area"]) == pytest.approx(np.mean(wanted["area"]), abs=0.05)


@pytest.mark.parametrize(
    ("scale", "mirrored", "offset", "complaint"),
    [
        ((0.35, 1.0), 0.5, 0.0, "area"),
        ((0.08, 1.0), 0.0, 0.0, "mirrored"),
        ((0.08, 1.0), 0.5, 0.02, "normalisation"),
    ],
)
def test_a_loader_that_augments_otherwise_is_found_out(
    scale: tuple[float, float], mirrored: float, offset: float, complaint: str, wanted: dict[str, np.ndarray]
) -> None:
    found = checks.describe([ruler_images(scale, mirrored, offset)])
    assert any(complaint in problem for problem in checks.differences_in_windows(found, wanted))


def test_photographs_in_another_shape_type_or_sharpness_are_found_out() -> None:
    rng = np.random.default_rng(0)
    photographs = rng.normal(size=(16, 3, SIZE, SIZE)).astype(np.float32)
    reference = checks.describe([photographs])
    compare = {"reference": reference, "batch": 16, "size": SIZE}
    assert checks.differences_in_pixels(reference, **compare) == []
    blurred = (photographs + np.roll(photographs, 1, axis=3)) / np.sqrt(2)
    assert "sharpness" in checks.differences_in_pixels(checks.describe([blurred.astype(np.float32)]), **compare)[0]
    half = checks.differences_in_pixels(checks.describe([photographs.astype(np.float16)]), **compare)
    assert half == ["dtype float16"]
    small = checks.differences_in_pixels(checks.describe([photographs[:8]]), **compare)
    assert small[0].startswith("shape (8")
    brighter = checks.differences_in_pixels(checks.describe([photographs + np.float32(0.3)]), **compare)
    assert brighter[0].startswith("mean")


def test_every_row_is_a_loader_with_a_source_that_can_be_made() -> None:
    for module, row, _ in loaders.available().values():
        assert row.form in ("files", "files256") or hasattr(loaders.load(module), "write"), row.name
        assert row.source in ("files", "files256")
        assert row.stored in ("full", "256")


def test_requirements_are_pinned() -> None:
    assert all("==" in line for line in environment.requirements())
