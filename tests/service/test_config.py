"""The configuration: what is accepted, what is refused, and what people are told."""

import contextlib
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from service import config, explaining
from service.config import JobConfig
from service.errors import ConfigError


def refusal(values: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        config.resolve(values)
    return str(caught.value)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_resolved_configuration_reads_back_equal_from_its_own_yaml(tmp_path: Path) -> None:
    values = {
        "duration": "7.5 epochs",
        "ema": {"decay": 0.99},
        "data": {
            "scale": [0.2, 0.9],
            "root": "somewhere/else",
            "options": {"size": 80},
            "sizes": [{"size": 128, "until": "2 epochs"}, {"size": 160, "until": "60 %"}],
            "augment": [{"name": "rand_augment", "options": {"magnitude": 3}}, {"name": "random_erasing"}],
            "eval_size": 256,
            "repeats": 3,
        },
        "pretext": {"name": "lorot_e", "options": {"grid": 4}},
        "objective": {"name": "multi_task"},
        "schedule": {"name": "step", "milestones": ["30 epochs", "60 %"]},
        "checkpoint": {"every": None, "every_minutes": 1e-5},
        "deepspeed": {"comms_logger": {"enabled": True}},
    }
    first = config.resolve(values)
    again = config.load(write(tmp_path / "dumped.yaml", config.dump(first)))
    assert again == first
    assert str(again.schedule.milestones[1]) == "60 %"


def test_a_configuration_cannot_be_changed_after_it_was_checked() -> None:
    with pytest.raises(ValueError, match="frozen"):
        JobConfig().seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "hint"),
    [
        ({"optimiser": {}}, "optimiser: unknown key; did you mean 'optimizer'?"),
        ({"data": {"siez": 64}}, "data.siez: unknown key; did you mean 'data.size'?"),
        ({"ema": {"decai": 0.9}}, "ema.decai: unknown key; did you mean 'ema.decay'?"),
        ({"lr": 0.1}, "lr: unknown key; did you mean 'optimizer.lr'?"),
        (
            {"objective": {"weight_decay": 1}},
            "objective.weight_decay: unknown key; did you mean 'optimizer.weight_decay'?",
        ),
        ({1: 2}, "1: "),
        ({"ema": {"zzz": 1}}, "ema.zzz: unknown key; known here: decay, every"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(values: dict, hint: str) -> None:
    assert hint in refusal(values)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"seed": "many"}, ["seed", "integer", "'many'"]),
        ({"seed": 1.5}, ["seed", "integer"]),
        ({"global_batch": 0}, ["global_batch", "greater than or equal to 1"]),
        ({"data": 5}, ["data", "dictionary", "5"]),
        ({"data": {"crop": "center"}}, ["data.crop", "random_resized", "pad", "whole"]),
        ({"data": {"scale": [0.5, 0.1]}}, ["data.scale", "the smaller one first"]),
        ({"data": {"scale": [0.5, 1.5]}}, ["data.scale", "more than the whole image"]),
        ({"data": {"std": [0.2, 0.0, 0.2]}}, ["data.std.1", "greater than 0"]),
        ({"optimizer": {"lr": float("inf")}}, ["optimizer.lr", "finite"]),
        ({"optimizer": {"lr": float("nan")}}, ["optimizer.lr", "finite"]),
        ({"optimizer": {"betas": [0.9, 1.0]}}, ["optimizer.betas.1", "less than 1"]),
        ({"duration": "long"}, ["duration", "'long'", "90 epochs"]),
        ({"duration": "0 epochs"}, ["duration", "no time at all"]),
        ({"duration": "10 %"}, ["duration", "share of itself"]),
        ({"evaluate_every": "0 steps"}, ["evaluate_every", "no time at all"]),
        ({"name": "../elsewhere"}, ["name", "pattern"]),
        ({"data": {"name": "dmeo"}}, ["data.name", "'dmeo' is none of", "did you mean 'demo'?"]),
        ({"data": {"options": {"train_cuont": 3}}}, ["data.options.train_cuont", "did you mean 'train_count'?"]),
        ({"pretext": {"name": "lorot_x"}, "objective": {"name": "multi_task"}}, ["pretext.name", "lorot_e", "lorot_i"]),
        ({"pretext": {"name": "lorot_e"}}, ["objective.name", "multi_task"]),
        ({"objective": {"name": "multi_task"}}, ["pretext.name", "rotation"]),
        (
            {"pretext": {"name": "lorot_e", "options": {"gird": 3}}, "objective": {"name": "multi_task"}},
            ["pretext", "gird", "grid"],
        ),
        (
            {"pretext": {"name": "lorot_e", "options": {"grid": 3}}, "objective": {"name": "multi_task"}},
            ["pretext", "224", "3"],
        ),
        ({"global_batch": 100, "micro_batch": 64}, ["micro_batch", "64", "100", "50 would"]),
        ({"global_batch": 16, "micro_batch": 64}, ["micro_batch", "16 would"]),
        ({"schedule": {"name": "step"}}, ["schedule.milestones"]),
        ({"zero_stage": 3, "ema": {}}, ["ema", "zero_stage 0, 1 or 2"]),
        ({"device": "cpu", "sync_batchnorm": True}, ["sync_batchnorm", "GPU"]),
    ],
)
def test_a_wrong_value_is_refused_with_its_key_and_what_would_work(values: dict, parts: list[str]) -> None:
    message = refusal(values)
    assert [part for part in parts if part not in message] == [], message


def test_all_mistakes_are_told_at_once() -> None:
    message = refusal({"seed": -1, "optimiser": {}, "data": {"size": "big"}})
    assert len(message.splitlines()) == 4


@settings(max_examples=60)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from([*JobConfig.model_fields, "decay", "options", "name", "size", "every"])
                | st.text(max_size=3),
                inner,
                max_size=4,
            )
        ),
        max_leaves=8,
    )
)
def test_whatever_yaml_holds_it_is_a_configuration_or_a_configuration_error(values: object) -> None:
    with contextlib.suppress(ConfigError):
        config.resolve(values if isinstance(values, dict) else {"data": values})


def test_overrides_are_typed_as_yaml_and_reach_any_depth(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "seed: 1\n")
    overrides = [
        "seed=7",
        "optimizer.lr=1e-3",
        "data.options.train_count=40",
        "data.flip=false",
        "ema.decay=0.5",
        "name=x=y",
    ]
    loaded = config.load(path, overrides[:-1])
    assert (loaded.seed, loaded.optimizer.lr, loaded.data.flip) == (7, 0.001, False)
    assert loaded.data.options == {"train_count": 40}
    assert loaded.ema is not None
    assert loaded.ema.decay == 0.5
    with pytest.raises(ConfigError, match="'x=y'"):
        config.load(path, overrides)


@pytest.mark.parametrize("override", ["seed", "=3", "seed.deeper=3"])
def test_an_override_that_fits_nothing_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="override"):
        config.load(write(tmp_path / "a.yaml", "seed: 1\n"), [override])


def test_a_file_extends_another_block_by_block(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    write(tmp_path / "base" / "root.yaml", "seed: 1\ndata: {size: 32, flip: false}\n")
    write(tmp_path / "middle.yaml", "extends: base/root.yaml\nseed: 2\n")
    loaded = config.load(write(tmp_path / "leaf.yaml", "extends: middle.yaml\ndata: {size: 48}\n"))
    assert (loaded.seed, loaded.data.size, loaded.data.flip) == (2, 48, False)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("- a\n- b\n", "list"),
        ("just words", "str"),
        ("a: [1", "not valid YAML"),
        ("seed: 1\nseed: 2\n", "'seed' is given twice"),
        ("data: {size: 32, size: 64}\n", "'size' is given twice"),
        ("seed: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        ("extends: nowhere.yaml\n", "nowhere.yaml"),
        ("extends: bad.yaml\n", "circle"),
        ("? [1, 2]\n: 3\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        config.load(write(tmp_path / "bad.yaml", text))


def test_a_missing_or_binary_file_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml.*No such file"):
        config.load(tmp_path / "absent.yaml")
    (tmp_path / "picture.yaml").write_bytes(b"\xff\xd8\xff\xe0\x00")
    with pytest.raises(ConfigError, match=r"picture\.yaml.*not valid YAML"):
        config.load(tmp_path / "picture.yaml")


@settings(max_examples=40)
@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 24))
def test_the_workers_share_the_batch_evenly_or_are_told_who_could(micro: int, count: int, world_size: int) -> None:
    job = config.resolve({"global_batch": micro * count, "micro_batch": micro})
    if count % world_size == 0:
        assert config.accumulation_steps(job, world_size) * micro * world_size == micro * count
    else:
        with pytest.raises(ConfigError) as caught:
            config.accumulation_steps(job, world_size)
        could = [int(n) for n in str(caught.value).rpartition(": ")[2].split(", ")]
        assert could == [n for n in range(1, count + 1) if count % n == 0]


def test_the_run_folder_and_the_models_name_follow_from_the_configuration() -> None:
    job = config.resolve({"name": "first", "output": "out", "data": {"name": "demo"}})
    assert (job.folder, job.model_name) == (Path("out/first"), "lorot-demo")
    assert config.resolve({"registry": {"name": ""}}).model_name == ""
    assert config.resolve({"registry": {"name": "mine"}}).model_name == "mine"


def test_the_dump_is_plain_yaml() -> None:
    assert yaml.safe_load(config.dump(JobConfig()))["schedule"]["warmup"] == "5 %"


def test_deepspeeds_own_json_file_may_be_named(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"reduce_bucket_size": 1000}}')
    assert config.resolve({"deepspeed": str(path)}).deepspeed == {"zero_optimization": {"reduce_bucket_size": 1000}}
    with pytest.raises(ConfigError, match=r"deepspeed.*gone\.json"):
        config.resolve({"deepspeed": str(tmp_path / "gone.json")})


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        ({"augment": [{"name": "randaugment"}]}, ["data.augment: augmentation 'randaugment' does not", "rand_augment"]),
        ({"augment": [{"name": "rand_augment", "options": {"num": 2}}]}, ["no option 'num'", "num_ops, magnitude"]),
        ({"augment": [{"name": "random_erasing"}, {"name": "lighting"}]}, ["'random_erasing'", "must be the last"]),
        ({"augment": [{"name": "lighting"}, {"name": "lighting"}]}, ["'lighting' stands twice"]),
        ({"augment": [{"name": "lighting", "opions": {}}]}, ["data.augment.0.opions: unknown key", "options"]),
        ({"augment": "lighting"}, ["data.augment"]),
        ({"sizes": [{"size": 128}]}, ["data.sizes.0.until"]),
        ({"sizes": [{"size": 0, "until": "1 epochs"}]}, ["data.sizes.0.size"]),
        ({"sizes": [{"size": 128, "untl": "1 epochs"}]}, ["data.sizes.0.untl: unknown key", "'data.sizes.0.until'"]),
        ({"repeats": 0}, ["data.repeats"]),
        ({"eval_size": 0}, ["data.eval_size"]),
    ],
)
def test_a_wrong_augmentation_or_size_is_refused_with_what_there_is(data: dict, parts: list[str]) -> None:
    message = refusal({"data": data})
    assert all(part in message for part in parts), message


def test_a_pretext_task_that_does_not_fit_one_of_the_sizes_is_refused_with_that_size() -> None:
    values = {
        "pretext": {"name": "lorot_e", "options": {"grid": 3}},
        "objective": {"name": "multi_task"},
        "data": {"size": 224 - 2, "sizes": [{"size": 96, "until": "1 epochs"}, {"size": 128, "until": "2 epochs"}]},
    }
    assert "does not divide images of 128 pixels" in refusal(values)
    values["data"]["sizes"].pop()
    config.resolve(values)


def test_the_view_holds_the_augmentations_ready_to_draw() -> None:
    augment = [
        {"name": "color_jitter", "options": {"hue": 0.1}},
        {"name": "random_erasing", "options": {"scale": [0.1, 0.2]}},
    ]
    view = config.view(config.resolve({"data": {"augment": augment, "eval_size": 256}}).data)
    assert (view.size, view.eval_size, len(view.slots)) == (224, 256, 5)
    assert view.augment[1].scale == (0.1, 0.2)


def test_who_sends_ten_thousand_wrong_keys_is_told_of_some(monkeypatch: pytest.MonkeyPatch) -> None:
    sought: list[str] = []

    def nothing(word: str, *_: object, **__: object) -> list[str]:
        sought.append(word)
        return []

    monkeypatch.setattr("difflib.get_close_matches", nothing)
    lines = refusal({f"k{number}": 1 for number in range(10_000)}).splitlines()
    assert len(lines) == explaining.LINES_MOST + 2
    assert lines[-1].strip() == f"and {10_000 - explaining.LINES_MOST:,} more"
    assert len(sought) == explaining.LINES_MOST, "each takes its time, which anybody who may ask could take"
