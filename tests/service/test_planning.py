"""`lorot plan` against published figures, torchvision's own counts, hand-worked cases and what the command prints."""

import json
import math
from pathlib import Path

import pytest
import torchvision
from PIL import Image
from typer.testing import CliRunner

from service import check, cli, config, machine
from service.config import JobConfig, ModelConfig
from service.errors import ConfigError
from service.planning import assembly, command, hardware, network, prediction
from service.planning.assembly import Measured, Wish
from service.planning.network import Network
from service.planning.prediction import Machines

ROOT = Path(__file__).parents[2]
IMAGENET = str(ROOT / "configs" / "train" / "imagenet-baseline.yaml")
# Ten million weights, no BatchNorm; a backward pass costs twice a forward pass.
SIMPLE = Network(10_000_000, 0, 2e9, 6e9, 50e6, 1000)


@pytest.fixture(autouse=True)
def _no_gpu_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "gpus", lambda: 0)


def job(**values: object) -> JobConfig:
    """ImageNet, as far as that can be assumed of a folder that is not there."""
    data = {"name": "folder", "root": "nowhere"}
    return config.resolve({"global_batch": 256, "micro_batch": 32, "data": data, **values})


def machines(**values: object) -> Machines:
    """Eight workers of two nodes: 1,000 images/s each, 100 MB/s inside a node and 10 MB/s between them."""
    given: dict[str, object] = {
        "gpus": 4,
        "nodes": 2,
        "forwarded_per_s": {224: 1000.0},
        "interconnect": 100e6,
        "network": 10e6,
        "memory_bytes_per_s": math.inf,
        "hides": True,
        "core_s_per_image": 0.002,
    }
    return Machines(**(given | values))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101"])
def test_operations_and_parameters_are_those_that_torchvision_publishes(name: str) -> None:
    weights = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
    found = network.count(ModelConfig(name=name), 1000, 0, 224)
    assert found.forward_flops / 2e9 == pytest.approx(weights.meta["_ops"], abs=0.001)
    assert found.parameters == weights.meta["num_params"]
    # A backward pass is two such passes, less the gradient of the images themselves.
    assert 2.9 < found.training_flops / found.forward_flops < 3


def test_operations_of_a_small_network_are_those_worked_out_by_hand() -> None:
    found = network.count(ModelConfig(name="resnet_small", width=16), 10, 0, 32)
    stem = 8 * 3 * 9 * 16 * 16
    first = 8 * 8 * (16 * 8 * 9 + 16 * 16 * 9 + 16 * 8)
    second = 4 * 4 * (32 * 16 * 9 + 32 * 32 * 9 + 32 * 16)
    third = 4 * 4 * (64 * 32 * 9 + 64 * 64 * 9 + 64 * 32)
    assert found.forward_flops == 2 * (stem + first + second + third + 64 * 10)


@pytest.mark.parametrize("row", hardware.PUBLISHED, ids=lambda row: f"{row.count} {row.gpu} {row.half}")
def test_the_prediction_is_within_the_stated_factor_of_published_resnet_50_rates(row: hardware.Published) -> None:
    # 64 images a GPU; NVIDIA's batches differ by GPU and precision, and the rate hardly depends on them.
    asked = job(precision="fp16" if row.half else "fp32", micro_batch=64, global_batch=64 * row.count)
    gpu, counted = hardware.find(row.gpu), network.count(asked.model, 1000, 0, 224)
    rate = 1 / hardware.seconds(gpu, row.half, counted.training_flops, counted.traffic)
    link = gpu.link_gb_per_s * 1e9
    wanted = machines(gpus=row.count, nodes=1, forwarded_per_s={224: rate}, interconnect=link)
    step = prediction.step(asked, counted, wanted, 1, 224)
    assert 1 / hardware.WITHIN < step.images_per_s / row.images_per_s < hardware.WITHIN


def test_averaging_over_many_nodes_costs_what_goyal_et_al_report() -> None:
    # arXiv:1706.02677: 8 P100 of one server take 29 hours for 90 epochs, 256 of them an hour, over 50 Gbit/s Ethernet,
    # 32 images each, "about 90 % scaling efficiency"; they work out 12.8 Gbit/s during the 125 ms of a backward pass.
    rate = 90 * 1_281_167 / (29 * 3600) / 8
    recipe = {"micro_batch": 32, "precision": "fp32"}
    one = assembly.assemble(job(global_batch=256, **recipe), Wish(gpus=8, images_per_s=rate, interconnect=80))
    many = assembly.assemble(
        job(global_batch=8192, **recipe), Wish(gpus=8, nodes=32, images_per_s=rate, interconnect=80, network=6.25)
    )
    efficiency = many.last.images_per_s / one.last.images_per_s / 32
    assert 0.85 < efficiency < 1
    assert 8 * many.averaged_bytes / 0.125 == pytest.approx(12.8e9, rel=0.05)


def test_a_ring_sends_its_share_of_the_gradients_over_its_slowest_link() -> None:
    asked = job()
    # 40 MB of gradients; each of 8 workers sends 2 x 7 / 8 of it: 70 MB, at 80 % of 10 MB/s.
    assert prediction.averaged_bytes(asked, SIMPLE, 8, 1) == 70e6
    assert prediction.averaged_bytes(asked, SIMPLE, 1, 1) == 0
    step = prediction.step(asked, SIMPLE, machines(), 1, 224)
    assert step.averaging == pytest.approx(70 / 8)
    inside = prediction.step(asked, SIMPLE, machines(nodes=1, gpus=8), 1, 224)
    assert inside.averaging == pytest.approx(0.7 / 0.8)
    apart = prediction.step(asked, SIMPLE, machines(nodes=8, gpus=1), 1, 224)
    assert apart.averaging == pytest.approx(70 / 8)
    alone = prediction.step(asked, SIMPLE, machines(nodes=1, gpus=1), 8, 224)
    assert (alone.averaging, alone.exposed) == (0, 0)


def test_zero_moves_more_from_stage_2_on() -> None:
    volumes = [prediction.averaged_bytes(job(zero_stage=stage), SIMPLE, 8, 4) / 35e6 for stage in (0, 1, 2, 3)]
    assert volumes == [2, 2, 5, 12]


def test_only_what_the_last_backward_pass_does_not_hide_is_waited_for() -> None:
    # 32 images take 32 ms: 21.3 ms of it backward. 70 MB at 0.8 of 10 GB/s take 8.75 ms: all but the last bucket hides.
    hidden = prediction.step(job(), SIMPLE, machines(interconnect=1e10, network=1e10), 1, 224)
    assert hidden.exposed == pytest.approx(0.00875 / 5)
    slow = prediction.step(job(), SIMPLE, machines(interconnect=1e9, network=1e9), 1, 224)
    assert slow.exposed == pytest.approx(0.0875 - 0.032 * 2 / 3)
    accumulated = prediction.step(job(), SIMPLE, machines(interconnect=1e9, network=1e9), 4, 224)
    assert accumulated.exposed == slow.exposed
    assert accumulated.computing == pytest.approx(4 * slow.computing)
    on_cores = prediction.step(job(), SIMPLE, machines(interconnect=1e10, network=1e10, hides=False), 1, 224)
    assert on_cores.exposed == on_cores.averaging == pytest.approx(0.00875)


@pytest.mark.parametrize(
    ("objective", "passes"),
    [
        ({"name": "multi_task"}, 1),
        ({"name": "augmentation"}, 1),
        ({"name": "parallel_task"}, 4),
        ({"name": "parallel_task", "turns": "one"}, 2),
    ],
)
def test_turned_copies_are_forwarded_too(objective: dict[str, str], passes: int) -> None:
    asked = job(objective=objective, pretext={"name": "rotation"})
    step = prediction.step(asked, SIMPLE, machines(), 1, 224)
    assert step.computing == pytest.approx(passes * 32 / 1000)


def test_a_node_with_few_cores_is_held_up_by_loading() -> None:
    wide = prediction.step(job(), SIMPLE, machines(cores=100), 1, 224)
    # 256 images of 2 ms on 2 x 4 cores.
    narrow = prediction.step(job(), SIMPLE, machines(cores=4, interconnect=1e12, network=1e12), 1, 224)
    assert narrow.seconds == narrow.loading == pytest.approx(0.064)
    assert wide.seconds > wide.loading
    found = assembly.assemble(job(), Wish(gpus=8, gpu="A100", cores=4))
    assert found.last.images_per_s == pytest.approx(4 * 574)
    assert "loading is the limit" in found.warnings[0]


def test_progressive_sizes_add_up_and_cost_by_their_operations() -> None:
    sizes = [{"size": 112, "until": "25 %"}]
    asked = job(duration="4 epochs", data={"name": "folder", "root": "nowhere", "size": 224, "sizes": sizes})
    found = assembly.assemble(asked, Wish(gpus=8, images_per_s=1000, samples=25_600))
    assert [(size, count) for size, count, _ in found.steps] == [(112, 100), (224, 300)]
    small, large = (part for _, _, part in found.steps)
    assert large.computing == pytest.approx(0.032)
    # A quarter of the pixels; the stem's and the head's rounding make it a little more.
    assert 0.25 <= small.computing / large.computing < 0.27
    assert found.train_s == pytest.approx(100 * small.seconds + 300 * large.seconds)


def test_an_evaluation_is_forward_passes_over_all_workers() -> None:
    assert prediction.evaluation_seconds(SIMPLE, machines(), 224, 24_000) == pytest.approx(24_000 / 3 / 8000)
    assert prediction.evaluation_seconds(SIMPLE, machines(cores=1), 224, 24_000) == pytest.approx(24.0)


def test_numbers_of_workers_that_cannot_share_the_batch_are_refused_with_those_that_can() -> None:
    with pytest.raises(ConfigError, match="numbers of workers that can: 1, 2, 4, 8"):
        assembly.assemble(job(), Wish(gpus=3, nodes=2, gpu="A100"))


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        (Wish(), "what is to compute"),
        (Wish(gpu="K80"), "known are H100, A100"),
        (Wish(gpu="A100", network=0.0), "--network 0.0: write a number above 0"),
        (Wish(images_per_s=float("nan")), "--images-per-s nan"),
        (Wish(images_per_s=5, tflops=3), "give one of them"),
    ],
)
def test_a_wish_that_makes_no_plan_says_why(wish: Wish, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        assembly.assemble(job(), wish)


def test_bf16_on_a_gpu_without_it_is_refused_and_auto_chooses_for_the_gpu() -> None:
    with pytest.raises(ConfigError, match="V100 has no bf16"):
        assembly.assemble(job(precision="bf16"), Wish(gpu="V100"))
    chosen = [assembly.assemble(job(), Wish(gpus=8, gpu=name)).precision for name in ("A100", "V100")]
    assert chosen == ["bf16", "fp32"]


def test_a_given_rate_is_that_of_the_batch_and_flops_are_the_networks() -> None:
    turned = {"objective": {"name": "parallel_task"}, "pretext": {"name": "rotation"}, "model": {"name": "resnet18"}}
    given = assembly.assemble(job(**turned), Wish(images_per_s=100))
    assert given.last.images_per_s == pytest.approx(100)
    sustained = assembly.assemble(job(**turned), Wish(tflops=10))
    assert sustained.last.images_per_s == pytest.approx(1e13 / given.network.training_flops / 4)


def test_on_cores_workers_share_what_one_of_them_was_measured_at() -> None:
    data = {"name": "folder", "root": "nowhere", "size": 32}
    asked = job(device="cpu", data=data, model={"name": "resnet_small", "width": 16})
    # One worker with one thread: 300 images/s for 4 ms of core time. Four of them on two cores cannot pass 500.
    found = Measured("cpu", images_per_s=300, core_s=0.004, cores=2, link=1e12)
    rates = [assembly.assemble(asked, Wish(gpus=count), found).last.images_per_s for count in (1, 2, 4)]
    assert rates == pytest.approx([300, 500, 500], rel=1e-3)
    slow = Measured("cpu", images_per_s=300, core_s=0.004, cores=2, link=1e5)
    plan = assembly.assemble(asked, Wish(gpus=2), slow)
    assert plan.last.exposed == plan.last.averaging == pytest.approx(plan.averaged_bytes / 0.8e5)
    assert plan.precision == "fp32"


def test_files_are_weighed_to_say_what_is_read(tmp_path: Path) -> None:
    for split, sizes in (("train", (10, 30)), ("val", (10,))):
        for side in sizes:
            place = tmp_path / "set" / split / "cat" / f"{side}.bmp"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (side, side)).save(place)
    weights = [path.stat().st_size for path in (tmp_path / "set" / "train" / "cat").iterdir()]
    asked = job(global_batch=32, data={"name": "folder", "root": str(tmp_path / "set"), "size": 32})
    found = assembly.assemble(asked, Wish(images_per_s=100))
    assert found.data_bytes == sum(weights)
    assert found.read_bytes_per_s == pytest.approx(sum(weights) / 2 * found.last.images_per_s)
    assert found.samples == 2


def test_memory_and_checkpoints_are_those_of_lorot_check() -> None:
    asked = job(precision="fp32", device="cuda", ema={"decay": 0.9})
    found = assembly.assemble(asked, Wish(gpus=8, gpu="A100"))
    checked = check.examine(asked, 8)
    assert found.memory == {name: size for name, size in checked.memory.items() if name != "libraries"}
    assert (found.checkpoint_bytes, found.storage_bytes) == (checked.checkpoint_bytes, checked.storage_bytes)
    crowded = assembly.assemble(
        job(global_batch=4096, micro_batch=512, precision="fp32"), Wish(gpus=8, gpu="V100-16GB")
    )
    assert "a smaller micro_batch" in crowded.warnings[0]


def test_the_command_prints_the_plan_with_all_that_was_assumed() -> None:
    line = ["plan", IMAGENET, "--gpus", "4", "--nodes", "2", "--gpu", "a100"]
    text = CliRunner().invoke(cli.app, line, env={"COLUMNS": "200"}).output
    for word in (
        "4.09 billion",
        "25.56 million",
        "8 workers x micro-batch 32",
        "Gbit/s",
        "CPU cores",
        "300 of 204.5 MB",
    ):
        assert word in text
    assumed = text[text.index("assumed:") :]
    for word in ("1,281,167", "factor of 1.4", "NVLink", "100 Gbit/s", "ms of CPU time", "ring all-reduce"):
        assert word in assumed
    found = json.loads(CliRunner().invoke(cli.app, [*line, "--json"]).output)
    assert found["steps"] == math.ceil(300 * 1_281_167 / 256)
    assert found["images_per_s"] == pytest.approx(256 / found["step_s"])
    assert found["total_s"] == pytest.approx(found["steps"] * found["step_s"] + found["evaluate_s"])
    assert len(found["assumptions"]) >= 6


def test_times_are_told_as_people_say_them() -> None:
    told = [command.duration(seconds) for seconds in (0.0123, 4.5, 200, 3 * 3600 + 60, 100 * 3600)]
    assert told == ["12.3 ms", "4.5 s", "3 min 20 s", "3 h 1 min", "4 d 4 h"]
