"""What `lorot profile` makes of its measurements, by hand-worked cases; and one measurement of a real job."""

import dataclasses
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from pipelines import datasets, loading, pretext
from pipelines.plan import View
from service.profile import command, worker
from service.profile.findings import Findings, Phase, Setting

GPU = Setting(
    device="cuda",
    cores=8,
    workers=2,
    num_threads=4,
    prefetch=2,
    accumulation=1,
    precision="bf16",
    compiled=True,
    loader="dali",
    encoded=True,
    source_pixels=341 * 256,
    size=224,
)
CPU = dataclasses.replace(GPU, device="cpu", cores=2, workers=1, num_threads=2, precision="fp32")


def phase(images_per_s: float, core_s_per_image: float, waits: float = 0.0) -> Phase:
    """Ten seconds of so many images a second, at so many core-seconds each, waiting for this share of the time."""
    images = round(10 * images_per_s)
    return Phase(images, 10.0, images * core_s_per_image, 10.0 * waits)


# On a GPU the step costs hardly any CPU time: loading alone has the cores.
LOADER_BOUND = Findings(GPU, phase(1000, 0.004), phase(2500, 0.0002), phase(990, 0.004, waits=0.6))
STEP_BOUND = Findings(GPU, phase(4000, 0.001), phase(1000, 0.0002), phase(990, 0.001, waits=0.01))
# On two cores: 500 + 400 images/s alone; one core-second makes 250 and 200, so together they cannot pass 2 / 0.009.
SHARED = Findings(CPU, phase(500, 0.004), phase(400, 0.005), phase(215, 0.009, waits=0.2))


def test_rates_costs_and_shares_are_the_quotients_they_say() -> None:
    measured = Phase(images=600, seconds=3.0, cpu_s=4.5, wait_s=0.6)
    assert (measured.images_per_s, measured.core_s_per_image, measured.wait_share) == (200, 0.0075, pytest.approx(0.2))


def test_a_loader_slower_than_the_step_is_the_bottleneck() -> None:
    assert LOADER_BOUND.bottleneck == "loader"
    assert "loader is the bottleneck" in LOADER_BOUND.verdict()


def test_a_loader_that_waits_for_its_files_is_told_from_one_that_computes() -> None:
    slow_disk = dataclasses.replace(LOADER_BOUND, loader=phase(1000, 0.001, waits=0.5))
    assert slow_disk.bottleneck == "storage"
    assert "data.read_threads" in slow_disk.advice()[0]
    assert not any("read_threads" in text for text in LOADER_BOUND.advice())


def test_a_step_that_gets_its_data_in_time_is_the_bottleneck() -> None:
    assert STEP_BOUND.bottleneck == "step"
    large = dataclasses.replace(GPU, source_pixels=500 * 375, num_threads=1)
    advice = dataclasses.replace(STEP_BOUND, setting=large).advice()
    assert not any(word in text for text in advice for word in ("prepare", "num_threads", "micro_batch"))
    interpreted = dataclasses.replace(GPU, compiled=False, precision="fp32", accumulation=4)
    advice = dataclasses.replace(STEP_BOUND, setting=interpreted).advice()
    assert [text.partition("=")[0] for text in advice[:2]] == ["precision", "compile"]
    assert "adds up 4 of them" in advice[2]


def test_parts_that_are_fast_alone_and_slow_together_share_the_cores() -> None:
    assert SHARED.bottleneck == "cores"
    apart = dataclasses.replace(SHARED, both=phase(395, 0.009))
    assert apart.bottleneck == "step", "together nearly as fast as the slower one alone: nothing is shared"


def test_waiting_although_the_loader_is_faster_on_average_is_called_bursts() -> None:
    bursts = dataclasses.replace(STEP_BOUND, both=phase(900, 0.001, waits=0.08))
    assert bursts.bottleneck == "bursts"
    assert bursts.advice() == ["data.prefetch=4: on average the loader is fast enough"]
    assert dataclasses.replace(bursts, both=phase(900, 0.001, waits=0.049)).bottleneck == "step"


def test_threads_that_balance_a_gpu_follow_from_what_an_image_costs() -> None:
    # 2,500 images/s at 4 ms of a core each keep 10 cores busy; a tenth more is 11, over two workers 5.5.
    assert LOADER_BOUND.cores_wanted == pytest.approx(10.0)
    assert "data.num_threads=6" in LOADER_BOUND.balance()
    # 8 cores serve 2 * 8 / 11 workers: one.
    assert "enough for 1 such workers" in LOADER_BOUND.balance()
    # 1,000 images/s at 1 ms: one core, half of it for each worker.
    assert STEP_BOUND.balance().endswith("1.0 cores: data.num_threads=1 in each of 2 workers")


def test_cores_shared_with_a_cpu_step_are_divided_as_the_costs_are() -> None:
    # 2 / 0.009 = 222 images/s; loading's part of the cores is 2 * 4 / 9.
    assert SHARED.best_shared == pytest.approx(222.2, abs=0.1)
    assert SHARED.balance().startswith("of 2 cores, 0.9 for loading and 1.1 for the step would be 222 images/s at best")


def test_preparing_the_data_is_advised_where_more_is_decoded_than_the_network_sees() -> None:
    large = dataclasses.replace(LOADER_BOUND, setting=dataclasses.replace(GPU, source_pixels=500 * 375))
    assert "short side of 256" in large.advice()[0]
    assert not any("lorot data prepare" in text for text in LOADER_BOUND.advice())
    pixels = dataclasses.replace(large, setting=dataclasses.replace(large.setting, encoded=False))
    assert not any("lorot data prepare" in text for text in pixels.advice())


def test_idle_cores_are_offered_to_the_decoder_and_otherwise_more_are_asked_for() -> None:
    idle = dataclasses.replace(LOADER_BOUND, setting=dataclasses.replace(GPU, num_threads=2))
    assert idle.advice()[0].startswith("data.num_threads=4")
    assert LOADER_BOUND.advice()[0].startswith("more CPU cores")


def test_the_reference_loader_is_named_where_it_is_the_reason() -> None:
    slow = dataclasses.replace(LOADER_BOUND, setting=dataclasses.replace(GPU, loader="torch"))
    assert slow.advice()[0].startswith("data.loader=dali")


def test_cores_that_nobody_uses_are_pointed_out_on_a_cpu() -> None:
    # 90 images/s at 9 ms each: 0.8 of two cores.
    idle = dataclasses.replace(SHARED, step=phase(95, 0.005), both=phase(90, 0.009))
    assert any("of 2 cores 0.8 are at work" in text for text in idle.advice())
    assert not any("are at work" in text for text in SHARED.advice())


def test_a_job_of_several_sizes_is_measured_at_the_largest_all_the_time(tmp_path: Path) -> None:
    (tmp_path / "train/cat").mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(tmp_path / "train/cat/a.png")
    manifest = datasets.load("folder", tmp_path, "train")
    source = loading.Source(manifest, View(size=32), pretext.load("none"), 0, sizes=((0, 16), (5, 48), (9, 32)))
    measured = worker.at_largest(source)
    assert measured.view.size == 48
    assert {measured.size_at(step) for step in (0, 6, 10)} == {48}


def test_the_size_measured_is_said() -> None:
    console = Console(record=True, width=200)
    command.show(STEP_BOUND, console)
    assert "measured at an input of 224 x 224 pixels" in console.export_text()
