"""The engine in two real processes against a plain loop in one; and every ZeRO stage resumed, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from service.config import JobConfig, resolve
from service.errors import CheckpointError, ConfigError
from service.models import build
from service.training import checkpoint, distributed
from service.training.averaging import Averager
from service.training.engine import Engine
from service.training.engine_settings import settings
from tests.service import engine_program as program

ROOT = Path(__file__).parent.parent.parent


def torchrun(workers: int, *arguments: object) -> None:
    here = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(workers)]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    command = [*launcher, "-m", "tests.service.engine_program", *map(str, arguments)]
    done = subprocess.run(command, env=here, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    torchrun(2, folder)
    return folder


@pytest.fixture(scope="module")
def results(two_workers: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((two_workers / "result.json").read_text())
    return found


def held(folder: Path, case: str, run: str, step: int, part: str) -> dict[str, Tensor]:
    return checkpoint.read(folder / case / run / f"step-{step:08d}").tensors(part)


def plain_loop(config: JobConfig, steps: int) -> tuple[nn.Module, list[float]]:
    """What two workers do together, written down for one, without DeepSpeed: an optimizer and its gradients' mean."""
    torch.manual_seed(0)
    model = build(config.model, program.CLASSES, 0).train()
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim != 1]
    decay = config.optimizer.weight_decay
    groups = [{"params": others, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9, nesterov=True)
    if config.optimizer.name == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=1.0, foreach=False)
    norms = []
    num_micro = program.GLOBAL // program.MICRO
    for step in range(steps):
        images, labels = program.samples(step)
        optimizer.zero_grad()
        for part, target in zip(images.split(program.MICRO), labels.split(program.MICRO), strict=True):
            (program.loss_of(model(part), target) / num_micro).backward()
        limit = config.clip_norm or float("inf")
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit)))
        for group in optimizer.param_groups:
            group["lr"] = program.rate(step)
        optimizer.step()
    return model, norms


@pytest.mark.parametrize("case", ["zero0", "zero1", "zero2", "zero3", "clip0", "adamw1"])
def test_two_workers_do_what_a_plain_loop_does_in_one(two_workers: Path, results: dict[str, Any], case: str) -> None:
    model, norms = plain_loop(program.job(case), program.HALF)
    weights = held(two_workers, case, "whole", program.HALF, "weights")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(weights[name], parameter.detach(), rtol=2e-4, atol=2e-5)
    assert results[case]["norms"][: program.HALF] == pytest.approx(norms, rel=1e-4)


@pytest.mark.parametrize("case", program.CASES)
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(
    two_workers: Path, results: dict[str, Any], case: str
) -> None:
    for part in ("weights", "optimizer"):
        whole = held(two_workers, case, "whole", program.STEPS, part)
        resumed = held(two_workers, case, "resumed", program.STEPS, part)
        assert list(whole) == list(resumed)
        assert whole
        for name in whole:
            assert whole[name].numpy().tobytes() == resumed[name].numpy().tobytes(), name
    assert results[case]["again"] == results[case]["losses"][program.HALF :]


@pytest.mark.parametrize("case", program.CASES)
def test_a_live_engine_goes_back_to_a_checkpoint_bit_for_bit(
    two_workers: Path, results: dict[str, Any], case: str
) -> None:
    for step in (program.HALF, program.STEPS):
        for part in ("weights", "optimizer"):
            whole = held(two_workers, case, "whole", step, part)
            rewound = held(two_workers, case, "rewound", step, part)
            assert whole.keys() == rewound.keys()
            for name in whole:
                assert whole[name].numpy().tobytes() == rewound[name].numpy().tobytes(), (step, name)
    assert results[case]["rewound"] == results[case]["losses"][program.HALF :]
    assert results[case]["anew"] == results[case]["losses"]


@pytest.mark.parametrize("case", program.CASES)
def test_training_goes_on_changing_the_weights_after_the_checkpoint(two_workers: Path, case: str) -> None:
    before = held(two_workers, case, "whole", program.HALF, "weights")
    after = held(two_workers, case, "whole", program.STEPS, "weights")
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_a_checkpoint_has_the_same_tensors_whatever_the_zero_stage(two_workers: Path) -> None:
    kept = [held(two_workers, f"zero{stage}", "whole", program.HALF, "optimizer") for stage in range(4)]
    shapes = [{name: tensor.shape for name, tensor in part.items()} for part in kept]
    assert shapes[0] == shapes[1] == shapes[2] == shapes[3]
    for name in kept[0]:
        torch.testing.assert_close(kept[0][name], kept[3][name], rtol=1e-3, atol=1e-5)


def test_one_worker_goes_on_from_the_checkpoints_of_two(
    two_workers: Path, results: dict[str, Any], tmp_path: Path
) -> None:
    torchrun(1, tmp_path, two_workers)
    found = json.loads((tmp_path / "result.json").read_text())
    assert set(found) == {"zero0 to zero0", "zero1 to zero1", "zero3 to zero3", "zero3 to zero0"}
    for losses in found.values():
        assert losses == pytest.approx(results["zero0"]["losses"][program.HALF :], rel=1e-3)


def test_all_workers_agree_on_the_mean_of_their_batchnorm_statistics_and_the_sum_of_their_votes(
    results: dict[str, Any],
) -> None:
    own, agreed = (torch.tensor(results["statistics"][name]) for name in ("own", "agreed"))
    assert not torch.allclose(own[0], own[1])
    assert torch.equal(agreed[0], agreed[1])
    torch.testing.assert_close(agreed[0], own.mean(0))
    assert results["statistics"]["votes"] == [2.0, 1.0]


@pytest.mark.parametrize("case", ["fp16zero0", "fp16zero1", "fp16zero3"])
def test_an_fp16_overflow_skips_the_step_on_all_workers_and_halves_the_scale(
    results: dict[str, Any], case: str
) -> None:
    assert results[f"overflow {case}"] == {"kept": True, "scale": 32768.0, "next": 32768.0}


@pytest.mark.parametrize("case", ["fp16zero0", "fp16zero1", "fp16zero3", "bf16zero2"])
def test_half_precision_stays_near_fp32_and_clips_the_unscaled_norm(results: dict[str, Any], case: str) -> None:
    exact = results["clip0" if case.startswith("fp16") else "zero0"]
    assert results[case]["losses"] == pytest.approx(exact["losses"], rel=0.01)
    assert results[case]["norms"] == pytest.approx(exact["norms"], rel=0.03)


def config(**values: Any) -> JobConfig:
    return resolve({"global_batch": 16, "micro_batch": 4, "device": "cpu", "precision": "fp32", **values})


def derive(job: JobConfig, workers: int = 2) -> dict[str, Any]:
    return settings(job, world_size=workers, num_parameters=1000, device=torch.device("cpu"))


def test_a_deepspeed_block_is_merged_over_what_is_derived() -> None:
    merged = derive(config(deepspeed={"zero_optimization": {"reduce_bucket_size": 77}, "memory_breakdown": True}))
    assert merged["zero_optimization"]["reduce_bucket_size"] == 77
    assert merged["zero_optimization"]["stage"] == 0
    assert merged["memory_breakdown"] is True
    assert merged["gradient_accumulation_steps"] == 2


def test_without_a_clip_norm_deepspeed_is_told_not_to_clip() -> None:
    assert derive(config())["gradient_clipping"] == 0.0
    assert derive(config(clip_norm=2.5))["gradient_clipping"] == 2.5


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"train_batch_size": 32}, ("train_batch_size", "32", "16", "global_batch")),
        ({"gradient_accumulation_steps": 4}, ("gradient_accumulation_steps", "4", "2")),
        ({"gradient_clipping": 1.0}, ("gradient_clipping", "1.0", "0.0", "clip_norm")),
        ({"zero_optimization": {"stage": 2}}, ("zero_optimization.stage", "2", "0", "zero_stage")),
        ({"torch_autocast": {"enabled": True}}, ("torch_autocast.enabled", "True", "False", "precision")),
        ({"optimizer": {"type": "Adam"}}, ("optimizer", "optimizer.name")),
        ({"scheduler": {}}, ("scheduler", "schedule.name")),
        ({"bf16": {"enabled": True}}, ("bf16", "precision=bf16")),
        ({"elasticity": {}}, ("elasticity", "global_batch")),
        ({"zero_optimization": True}, ("zero_optimization", "True", "block of keys")),
    ],
)
def test_a_deepspeed_key_that_contradicts_the_job_is_an_error_that_names_both(
    given: dict[str, Any], named: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        derive(config(deepspeed=given))
    assert all(word in str(caught.value) for word in named)


def test_a_deepspeed_key_that_agrees_with_the_job_or_says_auto_is_accepted() -> None:
    given = {"train_batch_size": 16, "zero_optimization": {"stage": 0}, "gradient_clipping": "auto"}
    assert derive(config(deepspeed=given))["gradient_clipping"] == 0.0


def test_lamb_is_refused_where_zero_would_cut_its_layers() -> None:
    assert derive(config(optimizer={"name": "lamb"}))
    with pytest.raises(ConfigError, match="lamb"):
        derive(config(optimizer={"name": "lamb"}, zero_stage=1))


@pytest.fixture(scope="module")
def alone() -> distributed.World:
    return distributed.connect("cpu")


def test_synchronised_batchnorm_is_refused_on_a_cpu(alone: distributed.World) -> None:
    job = config(model={"name": "resnet_small", "width": 8}, sync_batchnorm=True, device="auto")
    with pytest.raises(ConfigError, match="sync_batchnorm"):
        Engine(job, build(job.model, 3, 0), alone)


def test_another_optimizers_state_is_refused_by_the_names_of_its_tensors(alone: distributed.World) -> None:
    job = config(model={"name": "resnet_small", "width": 8})
    engine = Engine(job, build(job.model, 3, 0), alone)
    name = next(name for name, _ in engine.module.named_parameters())
    with pytest.raises(CheckpointError, match=r"exp_avg\.fc\.bias: missing"):
        engine.load_optimizer_state(
            {f"exp_avg.{name}": torch.zeros(dict(engine.module.named_parameters())[name].shape)}
        )
    engine.close()


def test_an_averager_averages_each_gradient_once_and_only_at_the_boundary(alone: distributed.World) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    twin = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    twin.load_state_dict(layers.state_dict())
    seen: list[int] = []

    def double(flat: Tensor) -> None:
        seen.append(flat.numel())
        flat.mul_(2)

    averager = Averager(list(layers.parameters()), double, bucket_numel=20)
    for _ in range(2):
        for index in range(3):
            images = torch.randn(5, 3)
            averager.begin(boundary=index == 2)
            layers(images).sum().backward()
            twin(images).sum().backward()
            # Averaging runs on a thread: at the boundary it has been asked for, after `finish` it has happened.
            assert (averager._launched == len(averager.flats)) == (index == 2)
            assert not seen or index == 2
        averager.finish()
        # The last layer's 10 numbers and the second's first 4 (its bias) or more make the first bucket: order is fixed.
        assert sum(seen) == sum(parameter.numel() for parameter in layers.parameters())
        for ours, plain in zip(layers.parameters(), twin.parameters(), strict=True):
            assert ours.grad is not None
            assert plain.grad is not None
            torch.testing.assert_close(ours.grad, 2 * plain.grad)
        layers.zero_grad()
        twin.zero_grad()
        seen.clear()
    averager.close()


def test_a_parameter_without_a_gradient_gets_zeros_so_that_all_workers_send_as_much() -> None:
    used, unused = nn.Linear(2, 2), nn.Linear(2, 2)
    averager = Averager([*used.parameters(), *unused.parameters()], lambda flat: flat, bucket_numel=1)
    averager.begin(boundary=True)
    used(torch.ones(1, 2)).sum().backward()
    averager.finish()
    assert unused.weight.grad is not None
    assert unused.weight.grad.tolist() == [[0, 0], [0, 0]]
    assert used.bias.grad is not None
    assert used.bias.grad.tolist() == [1, 1]
    averager.close()
