"""`lorot detect` up to the moment the workers start: the model is found, pinned and looked at first."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from small_model import written
from small_scenes import drawn

from service import bundle, cli, config, config_file, lineage, registry, store, tracking, transfer
from service.config import TrackingConfig
from service.errors import CheckpointError, ConfigError
from service.jobs import local
from service.run_folder import RunFolder

OPTIONS = ("data.short_sides=[64]", "data.long_side=96")


def registered(folder: Path, seed: int = 0) -> Path:
    run = tracking.open_run(TrackingConfig(system_metrics=False), name="small", folder=folder / f"run-{seed}")
    run.finish()
    model = written(folder / f"run-{seed}" / "model", seed=seed)
    registry.register(model, name="small", run_id=run.run_id, metric="val/top1")
    return model


def test_an_alias_is_pinned_to_its_version_and_names_the_run(place: str, tmp_path: Path) -> None:
    registered(tmp_path)
    found = transfer.prepare("detect", "models:/small@best", root="scenes", overrides=OPTIONS)
    assert found.job.model.backbone == "models:/small/1"
    assert (found.job.name, found.job.job, str(found.job.data.root)) == ("detect-small-1", "detect", "scenes")
    # What the launcher and its workers read again is the same.
    assert config.load_any(found.path, list(found.overrides)) == found.job
    registered(tmp_path, seed=1)
    assert transfer.prepare("segment", "models:/small@latest").job.name == "segment-small-2"
    assert transfer.prepare("segment", "models:/small@latest", overrides=["name=mine"]).job.name == "mine"


def test_a_configurations_own_name_is_kept(place: str, tmp_path: Path) -> None:
    registered(tmp_path)
    (tmp_path / "other.yaml").write_text("job: detect\nname: mine\n")
    (tmp_path / "extends.yaml").write_text("extends: other.yaml\nseed: 1\n")
    for path in ("other.yaml", "extends.yaml"):
        found = transfer.prepare("detect", "models:/small@best", path=tmp_path / path)
        assert found.job.name == "mine"
        assert config.load_any(found.path, list(found.overrides)) == found.job
    found = transfer.prepare("detect", "models:/small@best", path=tmp_path / "other.yaml", overrides=["name=yours"])
    assert found.job.name == "yours"
    demo = config_file.shipped("downstream/demo-retinanet.yaml")
    assert transfer.prepare("detect", "models:/small@best", path=demo).job.name == "detect-small-1"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("model.backbone=models:/small/2", r"recorded at models:/small@best; say it with --model models:/small/2"),
        ("model={backbone: models:/small/2}", r"say it with --model models:/small/2"),
        ("job=segment", r"this is `lorot detect`; `lorot segment` is that job's command"),
        ("job=classify", r"this is `lorot detect`; `lorot train` takes"),
    ],
)
def test_an_override_cannot_make_it_another_job_or_let_it_begin_with_another_model(
    place: str, tmp_path: Path, override: str, told: str
) -> None:
    registered(tmp_path)
    with pytest.raises(ConfigError, match=told):
        transfer.prepare("detect", "models:/small@best", overrides=[override])


def test_a_block_of_the_model_leaves_the_pinned_version_where_it_was(place: str, tmp_path: Path) -> None:
    registered(tmp_path)
    block = "model={name: retinanet, options: {fpn_channels: 16}}"
    found = transfer.prepare("detect", "models:/small@best", overrides=[block, "job=detect"])
    assert (found.job.model.backbone, found.job.model.options) == ("models:/small/1", {"fpn_channels": 16})


def begun(place: str, folder: Path, name: str) -> RunFolder:
    """A run that has come to a checkpoint, of version 1; its model's files are gone and the alias is on another."""
    registered(folder)
    first = transfer.prepare("detect", "models:/small@best", overrides=[f"name={name}"])
    assert first.job.name == name
    run = RunFolder(first.job.folder)
    (run.checkpoints / "step-00000001").mkdir(parents=True)
    copy = {part: (first.resolved.folder / part).read_bytes() for part in ("model.json", "model.safetensors")}
    origin = lineage.origin_file(first.resolved.uri, first.resolved)
    bundle.write_folder(run.path / "backbone", copy | origin)
    registered(folder, seed=1)
    store.client(place).set_registered_model_alias("small", "best", "2")
    shutil.rmtree(first.resolved.folder)
    return run


def test_a_run_is_gone_on_with_by_its_name_though_alias_model_and_server_are_gone(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begun(place, tmp_path, "mine")
    monkeypatch.setattr(store, "client", lambda *_: pytest.fail("the server was asked"))
    for model in ("models:/small@best", "models:/small/1"):
        found = transfer.prepare("detect", model, overrides=["name=mine"], goes_on=True)
        assert found.job.model.backbone == found.resolved.uri == "models:/small/1"
        assert found.resolved.folder.resolve() == (run.path / "backbone").resolve()
        assert (found.resolved.name, found.resolved.version) == ("small", 1)
        assert found.resolved.run_id


def test_a_run_on_a_version_is_found_by_it_and_one_on_another_model_is_not_taken_for_it(
    place: str, tmp_path: Path
) -> None:
    begun(place, tmp_path, "detect-small-1")
    assert transfer.prepare("detect", "models:/small/1", goes_on=True).job.name == "detect-small-1"
    # Not the run's: they are asked for, and compared with what it began with when it is gone on with.
    found = transfer.prepare("detect", "models:/small/2", overrides=["name=detect-small-1"], goes_on=True)
    assert found.resolved.uri == "models:/small/2"
    with pytest.raises(CheckpointError, match=r"model\.json"):
        transfer.prepare("detect", "models:/small/1", overrides=["name=detect-small-1"])


def test_a_models_folder_will_do(place: str, tmp_path: Path) -> None:
    found = transfer.prepare("detect", str(written(tmp_path / "my model")))
    assert (found.job.name, found.resolved.version) == ("detect-my-model", None)


def test_an_alias_that_does_not_exist_is_told_which_do(place: str, tmp_path: Path) -> None:
    registered(tmp_path)
    with pytest.raises(CheckpointError, match="aliases: best, latest; versions: 1"):
        transfer.prepare("detect", "models:/small@bset")


def test_a_half_written_artifact_is_refused_before_anything_starts(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    registered(tmp_path)
    weights = registry.resolve("models:/small@best").folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    monkeypatch.setattr(local, "run", lambda *_, **__: pytest.fail("it was started"))
    with pytest.raises(SystemExit) as ended:
        cli.main(["detect", "--model", "models:/small@best"])
    assert ended.value.code == 5
    assert "damaged or incomplete" in capsys.readouterr().err


def test_a_mistake_in_the_configuration_is_told_before_a_server_is_asked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="short_side: unknown key"):
        transfer.prepare("detect", "models:/x@best", overrides=["data.short_side=3", "tracking.uri=http://nowhere:1"])
    (tmp_path / "masks.yaml").write_text("job: segment\nmodel: {name: solov2}\n")
    with pytest.raises(ConfigError, match="'solov2' is for job: segment"):
        transfer.prepare("detect", "models:/x@best", path=tmp_path / "masks.yaml")


def test_an_evaluation_alone_needs_a_finished_run(place: str, tmp_path: Path) -> None:
    registered(tmp_path)
    with pytest.raises(ConfigError, match="--eval-only evaluates a finished run again, and none is there"):
        transfer.run(transfer.prepare("detect", "models:/small@best"), eval_only=True)


def test_options_reach_the_launcher(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registered(tmp_path)
    seen: dict[str, Any] = {}

    def run(path: Path, overrides: tuple[str, ...], **options: Any) -> None:
        seen.update(options, job=config.load_any(path, list(overrides)))

    monkeypatch.setattr(local, "run", run)
    line = [
        "segment",
        "--model",
        "models:/small@best",
        "--data",
        "coco",
        "--root",
        "scenes",
        "seed=4",
        "--workers",
        "2",
    ]
    with pytest.raises(SystemExit) as ended:
        cli.main([*line, "--resume", "--nnodes", "2", "--rdzv", "here:1"])
    # Nothing was run, so nothing was left.
    assert ended.value.code == 1
    assert (seen["workers"], seen["resume"], seen["restart"], seen["nnodes"]) == (2, True, False, "2")
    assert (seen["job"].seed, seen["job"].job, seen["job"].data.name) == (4, "segment", "coco")


def test_an_earlier_result_is_sought_by_both_splits_of_the_data(place: str, tmp_path: Path) -> None:
    model = registered(tmp_path)
    drawn(tmp_path / "scenes", train=2, val=2)
    drawn(tmp_path / "others", train=3, val=2)
    found = transfer.prepare("detect", str(model), root=tmp_path / "scenes", overrides=OPTIONS)
    assert transfer.earlier(found) is None
    from service import lineage, splits

    digest = lineage.split_digest(*(split.digest for split in splits.load(found.job)))
    tags = lineage.run_tags(found.resolved, "detect", config_digest=found.job.digest) | {lineage.DATA: digest}
    recording = TrackingConfig(system_metrics=False)
    run = tracking.open_run(recording, name="detect", folder=tmp_path / "detect", tags=tags)
    run.log_metrics({"detect/AP": 0.5}, step=0)
    run.finish()
    earlier = transfer.earlier(found)
    assert earlier is not None
    assert (earlier.run_id, earlier.metrics) == (run.run_id, {"AP": 0.5})
    elsewhere = transfer.prepare("detect", str(model), root=tmp_path / "others", overrides=OPTIONS)
    assert transfer.earlier(elsewhere) is None
