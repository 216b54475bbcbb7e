"""What test_engine starts under torchrun: trains small networks in every way, and writes down what came of it.

torchrun --nproc-per-node W tests/service/engine_program.py FOLDER
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from service.config import JobConfig, resolve
from service.models import Outputs, build
from service.training import checkpoint, distributed
from service.training.distributed import World
from service.training.engine import Engine
from service.training.starting_point import restore

STEPS, HALF, MICRO, GLOBAL, CLASSES = 4, 2, 4, 16, 5

# Half precision comes last: DeepSpeed keeps for the whole process that autocast was used once.
CASES: dict[str, dict[str, Any]] = {
    "zero0": {"zero_stage": 0},
    "zero1": {"zero_stage": 1},
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
    "clip0": {"zero_stage": 0, "clip_norm": 0.5},
    "adamw1": {"zero_stage": 1, "optimizer": {"name": "adamw"}},
    "fp16zero0": {"zero_stage": 0, "precision": "fp16", "clip_norm": 0.5},
    "fp16zero1": {"zero_stage": 1, "precision": "fp16", "clip_norm": 0.5},
    "fp16zero3": {"zero_stage": 3, "precision": "fp16", "clip_norm": 0.5},
    "bf16zero2": {"zero_stage": 2, "precision": "bf16"},
}


def job(case: str) -> JobConfig:
    """The configuration of one case."""
    values = {"global_batch": GLOBAL, "micro_batch": MICRO, "model": {"name": "resnet_small", "width": 8}}
    return resolve({"precision": "fp32", "device": "cpu", **values, **CASES[case]})


def rate(step: int) -> float:
    """A learning rate that changes with every step."""
    return 0.05 / (step + 1)


def samples(step: int) -> tuple[Tensor, Tensor]:
    """The step's global batch."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(GLOBAL, 3, 16, 16, generator=generator)
    return images, torch.randint(0, CLASSES, (GLOBAL,), generator=generator)


def loss_of(outputs: Outputs, labels: Tensor) -> Tensor:
    """What is minimised; the second head, where there is one, learns nothing."""
    return F.cross_entropy(outputs.logits.float(), labels)


def train(engine: Engine, start: int, stop: int) -> tuple[list[float], list[float]]:
    """Steps start to stop - 1; the global batch's mean losses, and the gradient norms."""
    losses, norms = [], []
    for step in range(start, stop):
        images, labels = samples(step)
        total = 0.0
        for index in range(engine.accumulation):
            first = (index * engine.world.size + engine.world.rank) * MICRO
            part = images[first : first + MICRO].to(memory_format=torch.channels_last)
            loss = loss_of(engine(part), labels[first : first + MICRO])
            engine.backward(loss)
            total += loss.item()
        norms.append(engine.step(rate(step), measure=True))
        (mean,) = engine.agree(torch.tensor([total * MICRO / GLOBAL])).tolist()
        losses.append(mean)
    return losses, norms


def start(case: str, world: World, held: checkpoint.Checkpoint | None = None) -> Engine:
    """An engine at the beginning, or where the checkpoint was written."""
    torch.manual_seed(world.rank)  # on purpose not the same everywhere: the main worker's weights have to win
    engine = Engine(job(case), build(job(case).model, CLASSES, 0), world)
    if held is not None:
        restore(held, engine, None)
    return engine


def save(folder: Path, engine: Engine, step: int) -> None:
    """Write what the engine holds; all workers take part."""
    parts = {"weights": engine.weights(), "optimizer": engine.optimizer_state()}
    if engine.world.is_main:
        checkpoint.save(folder, step, parts, facts={"scale": engine.scale_state()})
    distributed.barrier()


def run(case: str, folder: Path, world: World) -> dict[str, Any]:
    """Without interruption, gone back half way in the middle of it, and interrupted there; all ends are on disk."""
    engine = start(case, world)
    save(folder / case / "whole", engine, 0)
    losses, norms = train(engine, 0, HALF)
    # An uninterrupted run writes here too; that must change nothing.
    save(folder / case / "whole", engine, HALF)
    more, more_norms = train(engine, HALF, STEPS)
    save(folder / case / "whole", engine, STEPS)
    scale = engine.scale_state()
    held = checkpoint.read(folder / case / "whole" / f"step-{HALF:08d}")
    restore(held, engine, None)
    # At once, before any step.
    save(folder / case / "rewound", engine, HALF)
    rewound, _ = train(engine, HALF, STEPS)
    save(folder / case / "rewound", engine, STEPS)
    # Also to where there was no optimizer state yet.
    restore(checkpoint.read(folder / case / "whole" / f"step-{0:08d}"), engine, None)
    anew, _ = train(engine, 0, STEPS)
    engine.close()
    resumed = start(case, world, held)
    again, _ = train(resumed, HALF, STEPS)
    save(folder / case / "resumed", resumed, STEPS)
    resumed.close()
    return {
        "losses": losses + more,
        "norms": norms + more_norms,
        "again": again,
        "rewound": rewound,
        "anew": anew,
        "scale": scale,
    }


def overflow(case: str, world: World) -> dict[str, Any]:
    """One step with a gradient that fp16 cannot hold, and one without."""
    engine = start(case, world)
    before = {name: tensor.clone() for name, tensor in engine.weights().items() if "running" not in name}
    images, labels = samples(0)
    for index in range(engine.accumulation):
        loss = loss_of(engine(images[:MICRO]), labels[:MICRO])
        # One worker's micro-batch is enough.
        engine.backward(loss * (float("inf") if index == 0 and world.rank == 0 else 1.0))
    engine.step(0.1)
    after = engine.weights()
    kept = all(torch.equal(before[name], after[name]) for name in before if "num_batches" not in name)
    scale = engine.scale_state()["scale"]
    train(engine, 1, 2)
    engine.close()
    return {"kept": kept, "scale": scale, "next": engine.scale_state()["scale"]}


def statistics(world: World) -> dict[str, Any]:
    """BatchNorm's running statistics of both workers after one step: their own, and what they agree on."""
    engine = start("zero0", world)
    images, labels = samples(0)
    for index in range(engine.accumulation):
        first = (index * world.size + world.rank) * MICRO
        engine.backward(loss_of(engine(images[first : first + MICRO]), labels[first : first + MICRO]))
    engine.step(0.1)

    def flat() -> Tensor:
        return torch.cat([tensor.flatten() for name, tensor in engine.weights().items() if "running" in name])

    own = distributed.gather(flat())
    votes = engine.agree(torch.tensor([1.0, float(world.rank)])).tolist()
    agreed = distributed.gather(flat())
    engine.close()
    return {"own": own.tolist(), "agreed": agreed.tolist(), "votes": votes}


def elsewhere(folder: Path, source: Path, world: World) -> dict[str, Any]:
    """Go on from the checkpoints of another number of workers, and of another ZeRO stage."""
    found = {}
    for case, other in (("zero0", "zero0"), ("zero1", "zero1"), ("zero3", "zero3"), ("zero0", "zero3")):
        held = checkpoint.read(source / other / "whole" / f"step-{HALF:08d}")
        engine = start(case, world, held)
        found[f"{other} to {case}"] = train(engine, HALF, STEPS)[0]
        engine.close()
    return found


def main() -> None:
    torch.set_num_threads(1)
    world = distributed.connect("cpu")
    folder = Path(sys.argv[1])
    if len(sys.argv) > 2:
        result = elsewhere(folder, Path(sys.argv[2]), world)
    else:
        result = {"statistics": statistics(world)}
        result |= {case: run(case, folder, world) for case in CASES}
        result |= {f"overflow {case}": overflow(case, world) for case in ("fp16zero0", "fp16zero1", "fp16zero3")}
    if world.is_main:
        (folder / "result.json").write_text(json.dumps(result))
    distributed.barrier()
    distributed.disconnect()
    distributed.leave()


if __name__ == "__main__":
    main()
