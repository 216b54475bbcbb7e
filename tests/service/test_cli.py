"""The command line: what it prints, and how it ends."""

import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
import typer
from rich.console import Console

from service import cli, doctor, errors, help, inventory, quickstart, registry
from service.config import JobConfig, Section
from service.jobs import local

ROOT = Path(__file__).parents[2]


def call(*arguments: str) -> int:
    """The exit code of `lorot ARGUMENTS`, run in this process."""
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    return int(ended.value.code or 0)


@pytest.fixture(autouse=True)
def _plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOROT_DEBUG", "")
    monkeypatch.setenv("COLUMNS", "160")


def lorot(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "service.cli", *arguments]
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120)


def test_help_names_every_command_and_every_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help") == 0
    text = capsys.readouterr().out
    for command in ("train", "check", "doctor", "wsol", "models", "quickstart", "data", "report", "version"):
        assert f" {command} " in text
    for error in (errors.LorotError, *errors.LorotError.__subclasses__()):
        assert f"{error.exit_code} " in text.partition("Exit codes:")[2]


def test_help_of_train_explains_every_key_of_the_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "--help") == 0
    text = capsys.readouterr().out
    keys = [key for key, *_ in help.describe()]
    assert [key for key in keys if f"\n{key} " not in text] == []
    assert "data.crop" in keys
    assert "ema.decay" in keys
    assert len(keys) > 60


def test_every_key_has_a_readable_type_and_a_meaning() -> None:
    rows = {key: (kind, default, meaning) for key, kind, default, meaning in help.describe()}
    assert all(meaning for _, _, meaning in rows.values())
    assert [
        key
        for key, (kind, _, _) in rows.items()
        if "Annotated" in kind or "<" in kind or "." in kind.replace("...", "")
    ] == []
    assert rows["duration"][:2] == ("duration", "90 epochs")
    assert rows["clip_norm"][:2] == ("float|null", "null")
    assert rows["checkpoint.every"][0] == "duration|null"
    assert rows["data.scale"][:2] == ("[float, float]", "[0.08, 1]")
    assert rows["schedule.milestones"][0] == "[duration, ...]"
    assert rows["model.name"][0].startswith("resnet18|")


def test_every_section_of_the_configuration_says_what_it_is_for() -> None:
    assert all(section.__doc__ for section in (JobConfig, *Section.__subclasses__()))


def test_an_error_is_one_message_on_stderr_and_its_own_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise errors.NonFiniteLossError("step 3: [loss] is nan")

    monkeypatch.setattr(local, "run", fail)
    assert call("train", "any.yaml") == 4
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", "error: step 3: [loss] is nan\n")


@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_an_error_with_a_jobs_last_words_gives_no_orders_to_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, debug: list[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise errors.JobError("job 1 failed: \x1b]52;c;cm0gLXJmIH4=\x07\x9b2J\nsecond line ä", 3)

    monkeypatch.setattr(local, "run", fail)
    assert call(*debug, "train", "any.yaml") == 3
    told = capsys.readouterr().err
    assert [character for character in told if not character.isprintable() and character != "\n"] == []
    assert told.endswith("error: job 1 failed:  ]52;c;cm0gLXJmIH4=  2J\nsecond line ä\n")
    assert ("Traceback" in told) is bool(debug)


def test_debug_shows_where_an_error_comes_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--debug", "check", "absent.yaml") == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_an_unexpected_failure_is_told_apart_from_a_mistake(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("lost")

    monkeypatch.setattr(local, "run", fail)
    assert call("train", "any.yaml") == 1
    told = capsys.readouterr().err
    assert "unexpected KeyError: 'lost'" in told
    assert "--debug" in told
    assert "Traceback" not in told


def test_options_reach_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    monkeypatch.setattr(local, "run", lambda path, overrides, **options: seen.update(path=path, o=overrides, **options))
    assert call("train", "a.yaml", "seed=3", "--workers", "2", "data.size=32", "--resume", "--port", "4000") == 0
    assert seen == {
        "path": Path("a.yaml"),
        "o": ["seed=3", "data.size=32"],
        "workers": 2,
        "resume": True,
        "restart": False,
        "port": 4000,
        "nnodes": None,
        "rdzv": None,
        "run_id": None,
        "max_restarts": None,
        "say": typer.echo,
    }


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["trian"], "No such command 'trian'"),
        (["train"], "Missing argument"),
        (["train", "a.yaml", "--workers", "0"], "--workers"),
        (["train", "a.yaml", "--port", "99999"], "--port"),
        (["wsol"], "--model"),
        (["wsol", "--model", "models:/m/1", "--axis", "map"], "'map' is none of cam, iou"),
        (["check", "absent.yaml"], "absent.yaml"),
        (["data", "info", "nothing", "--root", "here"], "'nothing' does not exist"),
    ],
)
def test_wrong_usage_is_refused_with_a_code_of_its_own(
    capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    assert call(*arguments) in (2, 3)
    told = capsys.readouterr()
    assert complaint in told.err
    assert "Traceback" not in told.err


def test_data_info_says_what_a_split_holds(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["train_count=12", "val_count=10", "size=48"]
    assert call("data", "demo", "--root", "drawn", *options) == 0
    assert call("data", "info", "demo", "--root", "drawn", "--split", "val", *options) == 0
    text = capsys.readouterr().out
    assert "12 samples in drawn" in text
    assert text.count("10 samples in drawn") == 2
    assert "height 48 to 48, width 48 to 48" in text
    assert "10, of 1 to 2 samples" in text


def test_models_of_an_empty_registry_say_how_to_get_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("models") == 0
    assert "lorot quickstart" in capsys.readouterr().out
    assert not Path("mlruns").exists()


def test_version_names_what_the_code_stands_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("version") == 0
    printed = dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines())
    assert printed["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "dali", "deepspeed", "mlflow"} <= printed.keys()


def test_the_command_runs_as_a_program_and_returns_its_code_to_the_shell() -> None:
    done = lorot("train", "absent.yaml")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: absent.yaml: cannot read this configuration")
    assert len(done.stderr.splitlines()) == 1


def test_the_shell_can_complete_commands() -> None:
    environment = {"_LOROT_COMPLETE": "complete_bash", "COMP_WORDS": "lorot qui", "COMP_CWORD": "1"}
    program = "import sys; sys.argv = ['lorot']; from service.cli import app; app(prog_name='lorot')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == ["quickstart"]


def test_the_doctor_fails_only_for_what_every_job_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanting = [doctor.Finding("GPU", "limited", "none"), doctor.Finding("DALI", "missing", "gone", "pip [it]", True)]
    monkeypatch.setattr(doctor, "examine", lambda uri: wanting[:1])
    assert call("doctor") == 0
    monkeypatch.setattr(doctor, "examine", lambda uri: wanting)
    assert call("doctor") == 1
    assert "fix: pip [it]" in capsys.readouterr().out


def test_the_quickstart_uses_the_configuration_of_the_checkout() -> None:
    assert quickstart.configuration() == ROOT / "configs" / "quickstart.yaml"


def test_a_listed_model_shows_its_metrics_lineage_and_what_was_found_later_on_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = registry.Row(
        name="lorot-demo",
        version=3,
        aliases=("best", "latest"),
        metrics={"val/top1": 0.993},
        data="demo",
        data_digest="d" * 64,
        pretext="lorot_e",
        objective="multi_task",
        run_name="quickstart",
        run_id="8b20d604882149f6a0c2ed5e02a40296",
        created=datetime(2026, 11, 22, 3, 35, tzinfo=UTC),
        downstream={"wsol.gt_known@0.5": 0.943},
    )
    monkeypatch.setattr(registry, "list_models", lambda uri: [row])
    inventory.show_models(Console(width=80))
    shown = capsys.readouterr().out
    for text in (
        "lorot-demo/3",
        "best, latest",
        "val/top1 0.993",
        "wsol.gt_known@0.5 0.943",
        "quickstart 8b20d604882149f6a0c2ed5e02a40296",
    ):
        assert text in shown
