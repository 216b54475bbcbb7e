"""Steps whose loss or gradient is not finite, through loop and engine, beside a loop that never saw them."""

import json
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipelines.batch import Batch
from service.config import JobConfig, resolve
from service.errors import NonFiniteLossError
from service.models import build
from service.training import distributed, loop, objectives
from service.training.ema import Ema
from service.training.engine import Engine
from service.training.lengths import Lengths
from service.training.meters import Meters
from service.training.nonfinite import NonFinite
from service.training.schedule import learning_rate
from service.training.watch import Rewind, Watch

STEPS, MICRO, GLOBAL, CLASSES, BAD = 5, 4, 8, 6, 3
LENGTHS = Lengths(1000, total=STEPS, record=2, evaluate=STEPS, save=0)


class Keeper:
    """Keeps records and what was saved in memory; a write fails when it is told to."""

    def __init__(self) -> None:
        self.records: list[tuple[int, dict[str, float]]] = []
        self.saved: list[int] = []

    def step(self, step: int) -> None: ...

    def record(self, metrics: Mapping[str, float], step: int) -> None:
        self.records.append((step, dict(metrics)))

    def save_is_due(self) -> bool:
        return False

    def write_failed(self) -> bool:
        return False

    def finish_writing(self) -> None: ...

    def is_best(self, metrics: Mapping[str, float]) -> bool:
        return False

    def save(self, step: int, metrics: Mapping[str, float], *, wait: bool = False) -> None:
        self.saved.append(step)

    def last_saved(self) -> str:
        return "checkpoint 7"


def job(**values: Any) -> JobConfig:
    return resolve(
        {
            "global_batch": GLOBAL,
            "micro_batch": MICRO,
            "device": "cpu",
            "precision": "fp32",
            "duration": f"{STEPS} steps",
            "model": {"name": "resnet_small", "width": 8},
            "optimizer": {"name": "adamw", "lr": 0.01},
            **values,
        }
    )


def batches(first_step: int, spoil: bool) -> Iterator[Batch]:
    """Two micro-batches a step; the second of step BAD holds an image of NaNs if `spoil`."""
    for number in range(first_step * 2, STEPS * 2):
        generator = torch.Generator().manual_seed(number)
        images = torch.randn(MICRO, 3, 16, 16, generator=generator)
        if spoil and number == (BAD - 1) * 2 + 1:
            images[1] = torch.nan
        labels = torch.randint(0, CLASSES, (MICRO,), generator=generator)
        zeros = torch.zeros(MICRO, dtype=torch.int64)
        ids = torch.arange(MICRO) + MICRO * number
        yield Batch(
            images=images,
            labels=labels,
            pretext_labels=zeros,
            ids=ids,
            boxes=torch.zeros(MICRO, 3, dtype=torch.int64),
            turns=zeros,
            valid=torch.ones(MICRO, dtype=torch.bool),
        )


class Trained:
    """A job at its start, with everything that training changes."""

    def __init__(self, config: JobConfig) -> None:
        torch.manual_seed(0)
        model = build(config.model, CLASSES, 0)
        self.config = config
        # ZeRO 3 cuts the weights that an average would copy.
        self.ema = Ema(model, 0.9) if config.zero_stage < 3 else None
        self.engine = Engine(config, model, distributed.connect("cpu"))
        self.meters = Meters(CLASSES, ("loss", "class_loss"))
        self.keeper = Keeper()
        self.said: list[str] = []
        self.watch = Watch(config, self.engine, self.keeper, say=self.said.append)

    def run(self, given: Iterator[Batch], first_step: int = 0) -> None:
        evaluate: Callable[[], Mapping[str, float]] = lambda: {"val/top1": 0.5}  # noqa: E731
        loop.train(
            self.config,
            LENGTHS,
            self.engine,
            self.ema,
            given,
            self.meters,
            evaluate,
            self.keeper,
            self.watch,
            first_step,
        )

    def state(self) -> dict[str, Tensor]:
        parts = {"weights": self.engine.weights(), "optimizer": self.engine.optimizer_state()}
        if self.ema is not None:
            parts["ema"] = dict(self.ema.state_dict())
        return {f"{part}/{name}": value.clone() for part, held in parts.items() for name, value in held.items()}


def without_the_bad_step(config: JobConfig) -> dict[str, Tensor]:
    """A loop of its own that is given all steps but BAD, at their own learning rates."""
    trained = Trained(config)
    engine = trained.engine
    engine.train()
    for step in (step for step in range(STEPS) if step + 1 != BAD):
        for batch in list(batches(step, spoil=False))[:2]:
            engine.backward(objectives.compute(engine, batch, config.objective).losses["loss"])
        engine.step(learning_rate(config.schedule, config.optimizer.lr, step, STEPS, 1000, GLOBAL))
        engine.agree(torch.zeros(1))
        if trained.ema is not None:
            trained.ema.update(engine.module, step + 1)
    state = trained.state()
    engine.close()
    return state


def equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
@pytest.mark.parametrize("spoilt", ["loss", "gradient"])
def test_a_skipped_step_leaves_everything_as_if_it_had_not_been(zero_stage: int, spoilt: str) -> None:
    config = job(on_nonfinite="skip", zero_stage=zero_stage)
    trained = Trained(config)
    if spoilt == "gradient":
        spoil_gradient(trained)
    trained.run(batches(0, spoil=spoilt == "loss"))
    equal(trained.state(), without_the_bad_step(config))
    trained.engine.close()
    first = (BAD - 1) * GLOBAL + MICRO
    named = range(first, first + MICRO) if spoilt == "loss" else range(first - MICRO, first + MICRO)
    assert trained.said == [
        f"the {spoilt} is not finite at step {BAD}, in micro-batches of samples {', '.join(map(str, named))}; "
        "its update is left out (1 of at most 10)"
    ]
    why = {"step": BAD, "kind": spoilt, "samples": list(named), "num_samples": len(named)}
    assert trained.watch.state()["nonfinite_steps"] == [why]
    counts = [(step, record["train/skipped_steps"]) for step, record in trained.keeper.records if "train/lr" in record]
    assert counts == [(2, 0), (4, 1), (5, 1)]
    assert all(value == value for _, record in trained.keeper.records for value in record.values())


def spoil_gradient(trained: Trained) -> None:
    """Of the last micro-batch of step BAD one parameter's gradient becomes infinite; the loss does not."""
    count = 0

    def spoil(gradient: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return torch.full_like(gradient, torch.inf) if count == BAD * 2 else gradient

    next(iter(trained.engine.module.parameters())).register_hook(spoil)


class Made(TorchDispatchMode):
    """Notes who makes a tensor out of the host's numbers, which a GPU would have to be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.by: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "lift_fresh" in str(func):
            outside = [frame for frame in traceback.extract_stack()[:-1] if "/torch/" not in frame.filename]
            self.by.append(Path(outside[-1].filename).name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_what_the_workers_tell_each_other_is_made_on_the_device(zero_stage: int) -> None:
    with Made() as seen:
        torch.tensor([1.0])
    assert seen.by == [Path(__file__).name]
    trained = Trained(job(zero_stage=zero_stage))
    batch = next(batches(0, spoil=False))
    for _ in range(2):
        trained.engine.backward(objectives.compute(trained.engine, batch, trained.config.objective).losses["loss"])
        trained.watch.note(torch.ones(()), batch.ids)
    with Made() as seen:
        assert not trained.watch.asked_to_stop()
        trained.engine.step(0.1)
        trained.watch.agree(1)
    trained.engine.close()
    # DeepSpeed makes some of its own.
    assert not {"engine.py", "watch.py"} & set(seen.by)


def test_by_default_the_run_stops_and_names_step_samples_and_checkpoint() -> None:
    trained = Trained(job())
    with pytest.raises(NonFiniteLossError) as caught:
        trained.run(batches(0, spoil=True))
    trained.engine.close()
    assert str(caught.value).startswith(
        "the loss is not finite at step 3, in micro-batches of samples 20, 21, 22, 23; "
        "nothing after checkpoint 7 was kept"
    )
    assert trained.keeper.saved == []


def test_a_gradient_that_is_not_finite_stops_the_run_though_its_loss_is() -> None:
    trained = Trained(job())
    spoil_gradient(trained)
    with pytest.raises(NonFiniteLossError, match="the gradient is not finite at step 3"):
        trained.run(batches(0, spoil=False))
    trained.engine.close()


def test_beyond_the_limit_skipping_stops_the_run() -> None:
    trained = Trained(job(on_nonfinite="skip", nonfinite_limit=1))
    trained.watch.load_state({"left_out": [1]})
    with pytest.raises(
        NonFiniteLossError, match=r"step 3.*nonfinite_limit: 1 updates were left out already, of steps 1"
    ):
        trained.run(batches(0, spoil=True))
    trained.engine.close()


def test_beyond_the_limit_the_last_word_lists_the_samples_of_earlier_steps() -> None:
    trained = Trained(job(on_nonfinite="skip", nonfinite_limit=1))
    why = {"step": 2, "kind": "gradient", "samples": [4, 8], "num_samples": 70}
    trained.watch.load_state({"left_out": [2], "nonfinite_steps": [why]})
    with pytest.raises(NonFiniteLossError) as caught:
        trained.run(batches(0, spoil=True))
    trained.engine.close()
    assert str(caught.value).splitlines()[1:] == ["  step 2: the gradient, samples 4, 8 and 68 more"]


def test_why_steps_were_left_out_outlives_a_checkpoint_also_beside_an_older_ones_steps() -> None:
    trained = Trained(job(on_nonfinite="skip"))
    # A version that did not write down why.
    trained.watch.load_state({"left_out": [1], "owes_evaluation": False})
    assert trained.watch.state() == {"left_out": [1], "nonfinite_steps": [], "owes_evaluation": False}
    trained.run(batches(0, spoil=True))
    trained.engine.close()
    kept = json.loads(json.dumps(trained.watch.state()))
    assert (kept["left_out"], [why["step"] for why in kept["nonfinite_steps"]]) == ([1, BAD], [BAD])
    again = Trained(job(on_nonfinite="skip"))
    again.watch.load_state(kept)
    assert again.watch.state() == kept
    # As after going back to a checkpoint of before: what is known by then is not forgotten.
    again.watch.load_state({"left_out": [1, BAD]})
    again.watch.load_state({})
    again.engine.close()
    assert again.watch.state() == kept | {"owes_evaluation": False}


def test_of_very_many_samples_the_first_are_kept_and_how_many_there_were() -> None:
    found = NonFinite.of("gradient", range(100, 1100))
    assert found.state() == {"kind": "gradient", "samples": list(range(100, 164)), "num_samples": 1000}
    assert NonFinite.from_state(found.state()) == found
    assert found.told().endswith(", 163 and 936 more")


def test_going_back_and_leaving_the_step_out_ends_where_skipping_it_does() -> None:
    config = job(on_nonfinite="rewind")
    trained = Trained(config)
    weights = {name: value.clone() for name, value in trained.engine.weights().items()}
    assert trained.ema is not None
    average = {name: value.clone() for name, value in trained.ema.state_dict().items()}
    with pytest.raises(Rewind):
        trained.run(batches(0, spoil=True))
    assert trained.said[0].startswith("the loss is not finite at step 3")
    assert "back to checkpoint 7" in trained.said[0]
    # What the job does then, from a checkpoint of step 0.
    again = trained.watch.state()
    assert again["left_out"] == [BAD]
    trained.engine.load_weights(weights)
    trained.engine.load_optimizer_state({})
    trained.ema.load_state_dict(average)
    trained.meters.clear()
    trained.watch.load_state({"left_out": [], "owes_evaluation": False})
    trained.keeper.records.clear()
    trained.run(batches(0, spoil=True))
    equal(trained.state(), without_the_bad_step(config))
    trained.engine.close()
    assert trained.watch.num_left_out(STEPS) == 1
    skipping = Trained(job(on_nonfinite="skip"))
    skipping.run(batches(0, spoil=True))
    skipping.engine.close()
    timed = ("images_per_s", "data_wait_share", "step_time", "memory")

    def figures(trained: Trained) -> list[tuple[int, dict[str, float]]]:
        return [
            (step, {name: value for name, value in record.items() if not any(part in name for part in timed)})
            for step, record in trained.keeper.records
        ]

    assert figures(trained) == figures(skipping)


def test_a_fault_of_the_loss_scale_in_fp16_is_not_taken_for_a_bad_gradient() -> None:
    trained = Trained(job(precision="fp16", on_nonfinite="skip"))
    spoil_gradient(trained)
    before = trained.engine.scale_state()["scale"]
    trained.run(batches(0, spoil=False))
    # Its own way to leave the update out: half the scale, and no count against the limit.
    assert trained.engine.scale_state()["scale"] == before / 2
    trained.engine.close()
    assert trained.watch.num_left_out(STEPS) == 0
