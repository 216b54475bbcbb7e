"""The scripts of configs/launch, with stand-ins for the programs that they start."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.processes import await_

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "configs" / "launch"
STUB = Path(__file__).with_name("launch_stub.py")
# Arguments that a shell would take apart.
GIVEN = ["job.yaml", "name=a b", "data={name: demo}"]

Call = list[str]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Starts a script with its arguments and variables, as a terminal does: in a group of processes of its own."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("lorot", "ssh", "srun", "scontrol", "hostname"):
        program = programs / name
        program.write_text(f"#!{sys.executable} -S\n{STUB.read_text()}")
        program.chmod(0o755)
    (tmp_path / "calls").touch()

    def run(script: str, *arguments: str, **variables: str) -> "subprocess.Popen[str]":
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MEET"))}
        environment["PATH"] = f"{programs}{os.pathsep}{environment['PATH']}"
        return subprocess.Popen(
            ["bash", str(LAUNCH / script), *arguments],
            cwd=tmp_path,
            env=environment | {"CALLS": str(tmp_path / "calls"), "CODE": "0"} | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # Where these tests run in the background it is ignored, and no shell could heed it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    return run


def calls(place: Path) -> list[Call]:
    return [json.loads(line) for line in (place / "calls").read_text().splitlines()]


def ended(job: "subprocess.Popen[str]") -> tuple[int, str]:
    """Exit code and words of a script, once nothing that it started is left to say more."""
    said, _ = job.communicate(timeout=120)
    return job.returncode, said


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.glob("*.s*")))
def test_bash_can_read_it(script: str) -> None:
    done = subprocess.run(["bash", "-n", str(LAUNCH / script)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("code", [0, 1, 8, 75])
@pytest.mark.parametrize("script", ["slurm.sbatch", "slurm-elastic.sbatch"])
def test_what_was_stopped_is_put_in_the_queue_again_and_what_failed_is_not(
    tmp_path: Path, start: Start, script: str, code: int
) -> None:
    several = ["1:4", "login1:29400"] if script == "slurm-elastic.sbatch" else []
    variables = {"SLURM_JOB_ID": "123457", "SLURM_NNODES": "4", "CODE": str(code)}
    # Its rendezvous is somewhere else.
    variables |= {"MEET": "login1:29400"} if several else {}
    assert ended(start(script, *several, *GIVEN, **variables)) == (code, "trained\n")
    again = [call for call in calls(tmp_path) if call[0] == "scontrol"]
    assert again == ([["scontrol", "requeue", "123457"]] if code == 75 else [])


@pytest.mark.parametrize(("variables", "run_id"), [({}, "0"), ({"SLURM_RESTART_COUNT": "2"}, "2")])
def test_slurm_starts_the_job_under_a_new_name_each_time_beside_a_rendezvous_that_ends_with_it(
    tmp_path: Path, start: Start, variables: dict[str, str], run_id: str
) -> None:
    ended(start("slurm.sbatch", *GIVEN, SLURM_JOB_ID="123457", SLURM_NNODES="4", **variables))
    meeting = ["--host", "login1.example", "--port", "23457"]
    machines = ["--nnodes", "4", "--rdzv", "login1.example:23457", "--run-id", f"slurm-123457-{run_id}"]
    found = calls(tmp_path)
    assert ["lorot", "rendezvous", *meeting] in found
    assert ["srun", "--kill-on-bad-exit=0", "lorot", "train", *GIVEN, "--resume", *machines] in found
    assert found[-1] == ["rendezvous ended"]


def test_an_elastic_machine_joins_where_it_is_told_to(tmp_path: Path, start: Start) -> None:
    ended(start("slurm-elastic.sbatch", "1:4", "login1:29400", *GIVEN, SLURM_JOB_ID="9", MEET="login1:29400"))
    assert calls(tmp_path) == [["srun", "lorot", "train", *GIVEN, "--nnodes", "1:4", "--rdzv", "login1:29400"]]


def test_by_ssh_each_machine_gets_the_same_line_and_a_failure_is_the_scripts(tmp_path: Path, start: Start) -> None:
    code, said = ended(start("ssh.sh", "node1 node2", "1:2", *GIVEN, CODE="8"))
    assert code == 8
    assert sorted(said.splitlines()) == ["node1: trained", "node2: trained"]
    found = calls(tmp_path)
    assert {tuple(call) for call in found if call[0] == "ssh"} == {("ssh", "-n", "node1"), ("ssh", "-n", "node2")}
    trained = ["lorot", "train", *GIVEN, "--nnodes", "1:2", "--rdzv", "login1.example:29400"]
    assert [call for call in found if "train" in call] == [trained] * 2
    assert ["lorot", "rendezvous", "--host", "login1.example", "--port", "29400"] in found
    assert found[-1] == ["rendezvous ended"]


def test_a_machine_that_is_back_is_started_alone_where_the_others_meet(tmp_path: Path, start: Start) -> None:
    assert ended(start("ssh.sh", "node2", "1:2", *GIVEN, MEET="login1:7")) == (0, "node2: trained\n")
    found = calls(tmp_path)
    assert found == [["ssh", "-n", "node2"], ["lorot", "train", *GIVEN, "--nnodes", "1:2", "--rdzv", "login1:7"]]


@pytest.mark.parametrize("hosts", ["node1", "node1 node2"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_all_machines_by_a_signal_of_their_own_and_the_place_where_they_meet_after_them(
    tmp_path: Path, start: Start, number: signal.Signals, hosts: str
) -> None:
    job = start("ssh.sh", hosts, "1:2", *GIVEN, CODE="stopped")
    names = hosts.split()
    await_(lambda: sum("train" in call for call in calls(tmp_path)) == len(names), "all machines train", 30)
    if number == signal.SIGINT:
        # To all that it has started as well, as a terminal does.
        os.killpg(job.pid, number)
    else:
        job.send_signal(number)
    code, said = ended(job)
    assert code == 75, said
    # Nobody's last words were lost.
    assert {f"{name}: stopped" for name in names} <= set(said.splitlines())
    found = calls(tmp_path)
    assert found.count(["stopped"]) == len(names)
    assert found[-1] == ["rendezvous ended"]
    assert ["leaves Ctrl-C to others"] in found
