"""`lorot doctor`: each finding on a machine that has the thing, and on one that lacks it."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from rich.console import Console

from service import doctor, machine
from service.doctor import Finding


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_a_program_that_ends_well_is_believed_and_one_that_crashes_is_a_finding() -> None:
    assert doctor._try("print('all is well')") == (True, "all is well")
    assert doctor._try("import nothing_of_this_name") == (
        False,
        "ModuleNotFoundError: No module named 'nothing_of_this_name'",
    )
    assert doctor._try("import os; os.kill(os.getpid(), 11)") == (False, "ended by signal 11")


def test_a_program_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_TIMEOUT_S", 0.5)
    assert doctor._try("import time; time.sleep(60)") == (False, "gave no answer within 0.5 s")


def test_both_loaders_really_render_here(tmp_path: Path) -> None:
    for finding in (doctor._dali(str(tmp_path)), doctor._torch_loader(str(tmp_path))):
        assert finding.state == "ok", finding
        assert "decodes, crops, turns and normalises" in finding.detail


@pytest.mark.parametrize(
    ("installed", "part"),
    [
        ([], 'pip install "lorot[cu13]"'),
        (["nvidia-dali-cuda130", "nvidia-dali-cuda120"], "uninstall both"),
    ],
)
def test_dali_must_be_there_once(monkeypatch: pytest.MonkeyPatch, installed: list[str], part: str) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: "2.4.0" if name in installed else None)
    finding = doctor._dali("unused")
    assert (finding.state, finding.required) == ("missing", True)
    assert part in finding.fix


@pytest.mark.parametrize(("lost", "state"), [((), "ok"), (("c++", "g++"), "limited"), (("ninja",), "limited")])
def test_deepspeed_trains_without_a_compiler_and_says_what_it_could_not_do(
    monkeypatch: pytest.MonkeyPatch, lost: tuple[str, ...], state: str
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None if name in lost else f"/bin/{name}")
    finding = doctor._compiler()
    assert finding.state == state
    assert all(name in finding.detail for name in lost if name != "g++")


def test_a_tracking_server_that_does_not_answer_is_a_finding_that_fails() -> None:
    finding = doctor._tracking("http://127.0.0.1:9")
    assert (finding.state, finding.required) == ("missing", True)
    assert "127.0.0.1:9" in finding.detail


def test_looking_for_the_tracking_database_does_not_make_one(tmp_path: Path) -> None:
    assert doctor._tracking(None).state == "ok"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("probe", "module", "name", "little"),
    [
        (doctor._cores, machine, "cores", lambda: 1),
        (doctor._memory, machine, "memory_bytes", lambda: 10**9),
        (doctor._disk, shutil, "disk_usage", lambda path: namedtuple("usage", "total used free")(9, 8, 1)),
        (doctor._shared_memory, shutil, "disk_usage", lambda path: namedtuple("usage", "total used free")(9, 8, 1)),
    ],
)
def test_little_of_something_is_a_limit_with_advice_not_a_failure(
    monkeypatch: pytest.MonkeyPatch, probe, module, name: str, little
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(module, name, little)
    finding = probe()
    assert finding.state == "limited"
    assert finding.fix
    assert not doctor.fails([finding])


def test_the_table_says_how_to_mend_what_is_not_well_and_only_that() -> None:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    doctor.show(
        [Finding("A", "ok", "fine", "never shown"), Finding("B", "missing", "gone", "fetch [it]", required=True)],
        console,
    )
    text = console.export_text()
    assert "never shown" not in text
    assert "fix: fetch [it]" in text
    assert "does not work here yet" in text
