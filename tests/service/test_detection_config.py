"""The configuration of a detector's job: the 1x schedule, what is refused, and what its digest covers."""

from pathlib import Path
from typing import Any

import pytest

from service import config, config_file
from service.config import DetectionConfig
from service.errors import ConfigError
from service.training.schedule import learning_rate

BACKBONE = "models:/lorot-demo/1"


def resolved(**values: Any) -> DetectionConfig:
    model = {"backbone": BACKBONE, **values.pop("model", {})}
    found = config.resolve_any({"job": "detect", "model": model, **values})
    assert isinstance(found, DetectionConfig)
    return found


def refusal(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        config.resolve_any({"job": "detect", "model": {"backbone": BACKBONE}, **values})
    return str(caught.value)


def test_what_is_not_given_is_the_1x_schedule() -> None:
    job = resolved()
    assert (str(job.duration), job.global_batch, job.clip_norm) == ("12 epochs", 16, None)
    assert (job.optimizer.name, job.optimizer.lr, job.optimizer.momentum) == ("sgd", 0.01, 0.9)
    assert (job.optimizer.nesterov, job.optimizer.weight_decay) == (False, 1e-4)
    assert (job.data.name, job.data.short_sides, job.data.long_side) == ("coco", (800,), 1333)
    assert (job.model.name, job.registry.metric, job.registry.mode) == ("retinanet", "val/AP", "max")
    masks = resolved(job="segment")
    assert (masks.model.name, masks.clip_norm, masks.optimizer) == ("solov2", 35.0, job.optimizer)


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        # COCO has 117,266 images with objects, 7329.1 steps of 16 an epoch; decay at 8 and 11 epochs, rounded up.
        (0, 0.01 / 501),
        (249, 0.01 * 250 / 501),
        (500, 0.01),
        (58_632, 0.01),
        (58_633, 0.001),
        (80_620, 0.001),
        (80_621, 0.0001),
        (87_949, 0.0001),
    ],
)
def test_the_rate_rises_over_steps_and_falls_at_epochs(step: int, rate: float) -> None:
    job = resolved()
    sizes = {"samples_per_epoch": 117_266, "global_batch": 16}
    total = job.duration.steps(**sizes)
    assert total == 87_950
    assert learning_rate(job.schedule, job.optimizer.lr, step, total, *sizes.values()) == pytest.approx(rate)


def test_one_key_of_a_block_leaves_the_others_as_they_are() -> None:
    job = resolved(optimizer={"lr": 0.02}, schedule={"warmup": "5 steps"})
    assert (job.optimizer.lr, job.optimizer.nesterov) == (0.02, False)
    assert (str(job.schedule.warmup), job.schedule.name, len(job.schedule.milestones)) == ("5 steps", "step", 2)


def test_a_classifiers_momentum_is_still_nesterovs() -> None:
    assert config.resolve({}).optimizer.nesterov is True


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"job": "detct"}, ["job: 'detct' is none of classify, detect, segment", "did you mean 'detect'?"]),
        ({"job": ["detect"]}, ["job: ['detect'] is none of"]),
        ({"pretext": {"name": "lorot_e"}}, ["pretext: unknown key"]),
        ({"data": {"short_side": 600}}, ["data.short_side: unknown key; did you mean 'data.short_sides'?"]),
        ({"data": {"crop": "pad"}}, ["data.crop: unknown key"]),
        ({"data": {"short_sides": []}}, ["data.short_sides"]),
        ({"data": {"short_sides": [8]}}, ["data.short_sides", "32 pixels at least"]),
        ({"data": {"long_side": 500}}, ["data.long_side: 500 is less than the short side may be, 800"]),
        ({"registry": {"name": "mine"}}, ["registry.name: unknown key"]),
        ({"model": {}}, ["model.backbone: missing", "models:/NAME@ALIAS"]),
        ({"model": {"backbone": BACKBONE, "name": "solov2"}}, ["'solov2' is for job: segment; detect has 'retinanet'"]),
        ({"model": {"backbone": BACKBONE, "name": "fasterrcnn"}}, ["model.name", "retinanet", "solov2"]),
        ({"micro_batch": 3}, ["micro_batch: 3 does not divide global_batch 16; 2 would"]),
        ({"data": {"name": "cooc"}}, ["'cooc' is none of", "did you mean 'coco'?"]),
        ({"lr": 0.1}, ["lr: unknown key; did you mean 'optimizer.lr'?"]),
    ],
)
def test_a_wrong_key_or_value_is_refused_with_what_would_work(values: dict[str, Any], parts: list[str]) -> None:
    message = refusal(values)
    assert [part for part in parts if part not in message] == [], message


def test_it_reads_back_equal_from_its_own_yaml_and_commands_for_classifiers_refuse_it(tmp_path: Path) -> None:
    job = resolved(data={"short_sides": [96, 128], "long_side": 200}, model={"options": {"fpn_channels": 16}})
    (tmp_path / "dumped.yaml").write_text(config.dump(job))
    assert config.load_any(tmp_path / "dumped.yaml") == job
    with pytest.raises(ConfigError, match="job: 'detect' trains no classifier"):
        config.load(tmp_path / "dumped.yaml")


def test_the_digest_covers_what_the_result_follows_from_and_nothing_else() -> None:
    known = resolved().digest
    for values in (
        {"name": "other", "output": "elsewhere", "workers": 2, "log_samples": True, "zero_stage": 1},
        {"data": {"root": "elsewhere", "num_threads": 3}},
        {"model": {"backbone": "models:/lorot-demo/2"}},
        {"tracking": {"experiment": "mine"}, "checkpoint": {"every": "7 steps"}, "evaluate_every": "3 epochs"},
    ):
        assert resolved(**values).digest == known, values
    changed = [
        resolved(seed=1),
        resolved(optimizer={"lr": 0.02}),
        resolved(micro_batch=1),
        resolved(data={"short_sides": [640]}),
        resolved(data={"train_limit": 100}),
        resolved(model={"options": {"trainable_layers": 2}}),
        resolved(job="segment"),
    ]
    assert len({known, *(job.digest for job in changed)}) == 1 + len(changed)


@pytest.mark.parametrize(("name", "job"), [("coco-retinanet", "detect"), ("coco-solov2", "segment")])
def test_the_shipped_configurations_are_the_defaults(name: str, job: str) -> None:
    path = config_file.shipped(f"downstream/{name}.yaml")
    found = config.load_any(path, [f"model.backbone={BACKBONE}"])
    assert found == resolved(job=job, name=name)


def test_a_configuration_that_is_not_shipped_is_refused_with_where_it_was_sought() -> None:
    with pytest.raises(ConfigError, match=r"no downstream/absent\.yaml at .*configs/downstream/absent\.yaml"):
        config_file.shipped("downstream/absent.yaml")
