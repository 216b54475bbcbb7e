"""The machines of a job, torchrun's command line and its log, and the account of restarts."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from service import config
from service.errors import ConfigError
from service.jobs import local, nodes, torchrun
from service.jobs.nodes import Nodes
from service.jobs.restarts import Account
from service.run_folder import RunFolder
from service.training import pulse

SEVERAL = Nodes(2, 4, "meet.example", 29400, "week", "10.1.2.3")


def options(line: list[str]) -> dict[str, str]:
    """What torchrun's own parser makes of its options, in a process of its own since it imports torch."""
    program = (
        "import json, sys\nfrom torch.distributed.run import get_args_parser\n"
        "print(json.dumps(vars(get_args_parser().parse_args(sys.argv[1:]))))"
    )
    line = [sys.executable, "-c", program, *line]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def test_torchrun_reads_the_command_line_of_several_machines_as_it_was_meant() -> None:
    line = torchrun.command("job.yaml", ["seed=7"], workers=8, shutdown_s=23, resume=True, nodes=SEVERAL, restarts=True)
    found = options(line[3:])
    wanted = {
        "nnodes": "2:4",
        "nproc_per_node": "8",
        "rdzv_backend": "c10d",
        "rdzv_endpoint": "meet.example:29400",
        "rdzv_id": "week",
        "local_addr": "10.1.2.3",
        "shutdown_timeout": 23,
        "module": True,
        "training_script": "service.training.worker",
        "training_script_args": ["job.yaml", "seed=7", "--resume"],
    }
    assert {name: found[name] for name in wanted} == wanted
    settings = dict(part.split("=") for part in found["rdzv_conf"].split(","))
    # A machine is taken for lost, and its place given up, well within half a minute; and none of them is the store.
    assert int(settings["keep_alive_interval"]) * int(settings["keep_alive_max_attempt"]) <= 5
    # As long as those that are there wait for further ones; torchrun's own is half a minute.
    assert int(settings["last_call_timeout"]) <= 5
    assert settings["is_host"] == "0"


def test_one_machine_restarts_nothing_unless_asked_to() -> None:
    line = torchrun.command("job.yaml", [], workers=2)
    assert "--max-restarts" not in line
    assert "--max-restarts" in torchrun.command("job.yaml", [], workers=2, restarts=True)


def test_gloo_takes_the_loopback_on_one_machine_and_the_interface_of_the_address_on_several(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert torchrun.environment(2)["GLOO_SOCKET_IFNAME"] == "lo"
    entry = SimpleNamespace(address="10.1.2.3")
    monkeypatch.setattr(nodes.psutil, "net_if_addrs", lambda: {"lo": [], "ib0": [entry]})
    assert torchrun.environment(2, SEVERAL)["GLOO_SOCKET_IFNAME"] == "ib0"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    assert torchrun.environment(2, SEVERAL)["GLOO_SOCKET_IFNAME"] == "mine"


def test_workers_of_several_machines_are_told_where_those_give_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(pulse.VARIABLE, raising=False)
    assert pulse.VARIABLE not in torchrun.environment(2)
    assert torchrun.environment(2, SEVERAL)[pulse.VARIABLE] == "meet.example:29400"
    # A worker of several machines starts a job of its own.
    monkeypatch.setenv(pulse.VARIABLE, "theirs.example:29400")
    assert pulse.VARIABLE not in torchrun.environment(2)
    assert torchrun.environment(2, SEVERAL)[pulse.VARIABLE] == "meet.example:29400"


@pytest.mark.parametrize(
    ("nnodes", "meeting", "least", "most", "host", "port"),
    [
        ("3", "127.0.0.1", 3, 3, "127.0.0.1", 29400),
        ("1:4", "localhost:40000", 1, 4, "localhost", 40000),
        ("2:2", "[::1]:5000", 2, 2, "::1", 5000),
    ],
)
def test_machines_are_described_as_they_are_written(
    nnodes: str, meeting: str, least: int, most: int, host: str, port: int
) -> None:
    found = nodes.describe(nnodes, meeting, "job")
    assert (found.least, found.most, found.host, found.port) == (least, most, host, port)
    assert nodes.interface_of(found.address) == "lo"


@pytest.mark.parametrize(
    ("nnodes", "meeting", "run_id", "said"),
    [
        ("0:2", "localhost", "job", "--nnodes 0:2"),
        ("3:2", "localhost", "job", "--nnodes 3:2"),
        ("two", "localhost", "job", "--nnodes two"),
        ("1:2", None, "job", "lorot rendezvous"),
        ("1:2", "localhost:0", "job", "HOST:PORT"),
        ("1:2", "localhost:70000", "job", "HOST:PORT"),
        ("1:2", "no such host", "job", "no way leads there"),
        ("1:2", "localhost", "a job", "--run-id"),
    ],
)
def test_a_wrong_description_of_the_machines_is_refused(
    nnodes: str, meeting: str | None, run_id: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        nodes.describe(nnodes, meeting, run_id)


def test_a_batch_is_refused_at_start_if_any_number_of_machines_could_not_share_it() -> None:
    job = config.resolve({"global_batch": 96, "micro_batch": 8, "data": {"name": "demo"}})
    nodes.check_batch(job, Nodes(1, 3, "", 1, "job", ""), 2)
    nodes.check_batch(job, Nodes(1, 4, "", 1, "job", ""), 1)
    with pytest.raises(ConfigError) as caught:
        nodes.check_batch(job, Nodes(1, 6, "", 1, "job", ""), 2)
    # 12 micro-batches: 4 machines of 2 make 8 workers, 5 make 10.
    assert "which 4 or 5 machines of 2 workers cannot share" in str(caught.value)
    assert "workers that can: 1, 2, 3, 4, 6, 12; of such machines: 1, 2, 3, 6." in str(caught.value)


def test_where_nothing_listens_one_is_told_how_to_start_it() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        said: list[str] = []
        place = Nodes(1, 2, "127.0.0.1", port, "job", "127.0.0.1")
        with pytest.raises(ConfigError, match=f"lorot rendezvous --port {port}"):
            nodes.await_rendezvous(place, said.append, patience_s=0.1)
        assert said == [f"waiting for the rendezvous at 127.0.0.1:{port}"]
        free.listen()
        nodes.await_rendezvous(place, said.append, patience_s=0.1)
    assert len(said) == 1


FAILED = "E1122 08:42:24 8265 api.py:1002] failed (exitcode: {}) local_rank: 1 (pid: 42) of binary: python\n"


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "torchrun.log").write_text("what an earlier job left: " + FAILED.format(-9) * 9)
    return RunFolder(tmp_path)


def opened(folder: RunFolder, allowed: int, alone: bool = False) -> tuple[Account, Path]:
    log = folder.path / "torchrun.log"
    return Account(folder, log, log.stat().st_size, allowed, alone), log


def write(log: Path, *codes: int) -> None:
    with log.open("a") as file:
        file.writelines(FAILED.format(code) for code in codes)


def test_only_failures_of_its_own_without_a_checkpoint_between_them_use_up_a_machines_restarts(
    folder: RunFolder,
) -> None:
    account, log = opened(folder, allowed=2)
    # Another machine was lost (8), or came (75): however often.
    write(log, 8, 75, 8, 75, 8, -9, -9)
    assert not account.is_over()
    (folder.checkpoints / "step-00000020").mkdir()
    write(log, -9, 1)
    assert not account.is_over()
    assert account.complaint() == ""
    write(log, -11)
    assert account.is_over()
    assert "failed 3 times since step-00000020" in account.complaint()
    assert "worker 1, by signal 11" in account.complaint()


def test_what_no_restart_would_mend_ends_the_job_at_once(folder: RunFolder) -> None:
    account, _ = opened(folder, allowed=100)
    assert not account.is_over()
    for code, kind, over in (
        (4, "NonFiniteLossError", True),
        (1, "JobError", False),
        (8, "LostPeerError", False),
        (75, "JobError", False),
        (3, "DataError", True),
        (3, "UnreachableError", False),
    ):
        folder.write("error.json", {"type": kind, "message": "", "exit_code": code})
        assert account.is_over() == over, kind


def test_a_folder_that_became_read_only_ends_the_job_though_no_worker_can_say_so_there(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    account, log = opened(folder, allowed=3)
    # The superuser, who runs many tests, may write to folders that are read-only by their mode.
    monkeypatch.setattr(os, "access", lambda path, mode: path != folder.path or not mode & os.W_OK)
    assert not account.is_over()
    # Of one machine its main worker, of another one that has lost it.
    write(log, 8)
    assert account.is_over()
    error = local.failure(folder, account, 1, 0)
    assert error.exit_code == 7
    assert str(error).startswith(f"{folder.path}: cannot be written; ")
    # What a worker could still say is the reason.
    folder.write("error.json", {"type": "NonFiniteLossError", "message": "not finite", "exit_code": 4})
    assert local.failure(folder, account, 1, 0).exit_code == 4


@pytest.mark.parametrize("code", [75, 130])
def test_a_stop_that_was_asked_for_ends_a_job_of_one_machine_only(folder: RunFolder, code: int) -> None:
    alone, log = opened(folder, 3, alone=True)
    one_of_several, _ = opened(folder, 3)
    write(log, code)
    assert alone.is_over()
    assert not one_of_several.is_over()


def test_a_worker_that_torchrun_stopped_after_another_was_killed_is_no_stop_of_the_job(folder: RunFolder) -> None:
    account, log = opened(folder, 1, alone=True)
    folder.write("error.json", {"type": "JobError", "message": "stopped by SIGTERM", "exit_code": 75})
    write(log, -9)
    assert not account.is_over()
    write(log, -9)
    assert account.is_over()
    error = local.failure(folder, account, 1, 0)
    assert str(error).startswith("workers of this machine failed 2 times")
    assert "stopped by SIGTERM" not in str(error)


def test_the_word_of_a_worker_that_was_stopped_is_not_taken_for_that_of_one_that_failed(folder: RunFolder) -> None:
    account, log = opened(folder, 0, alone=True)
    folder.write("error.json", {"type": "JobError", "message": "stopped by SIGTERM", "exit_code": 75})
    write(log, 1)
    error = local.failure(folder, account, 1, 0)
    assert (error.exit_code, "no worker said why" in str(error)) == (1, True)
    write(log, 75)
    assert local.failure(folder, account, 1, 0).exit_code == 75


def test_a_hang_that_recurs_uses_up_the_restarts_of_one_machine(folder: RunFolder) -> None:
    account, log = opened(folder, 1, alone=True)
    write(log, 8)
    assert not account.is_over()
    folder.write("error.json", {"type": "LostPeerError", "message": "worker 1 stopped answering", "exit_code": 8})
    write(log, 8)
    assert account.is_over()
    said = str(local.failure(folder, account, 1, 0))
    assert "failed 2 times" in said
    assert "worker 1 stopped answering" in said


def test_what_restarts_did_not_mend_ends_the_job_with_the_exit_code_of_what_a_worker_says_of_it(
    folder: RunFolder,
) -> None:
    account, log = opened(folder, 2)
    folder.write("error.json", {"type": "UnreachableError", "message": "train-000000.tar: missing", "exit_code": 3})
    write(log, 3, 3)
    assert not account.is_over()
    write(log, 3)
    assert account.is_over()
    error = local.failure(folder, account, 1, 0)
    assert error.exit_code == 3
    assert "failed 3 times" in str(error)
    assert str(error).endswith("\ntrain-000000.tar: missing")


def test_a_folder_that_another_job_has_is_tried_again_by_one_of_several_machines_only(folder: RunFolder) -> None:
    alone, log = opened(folder, 2, alone=True)
    one_of_several, _ = opened(folder, 2)
    write(log, 2, 2)
    assert alone.is_over()
    assert local.failure(folder, alone, 1, 0).exit_code == 2
    assert not one_of_several.is_over()
    write(log, 2)
    assert one_of_several.is_over()


def test_the_script_for_plain_torchrun_has_the_options_of_lorot_train(tmp_path: Path) -> None:
    told = tmp_path / "torchrun"
    told.write_text('#!/bin/sh\nprintf "%s\\n" "$TORCH_DISABLE_SHARE_RDZV_TCP_STORE" "$LOROT_RENDEZVOUS" "$@"\n')
    told.chmod(0o755)
    root = Path(__file__).parents[2]
    line = [str(root / "configs/launch/torchrun.sh"), "2:4", "meet.example:29400", "8", "week", "job.yaml", "seed=7"]
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "ADDRESS": "10.1.2.3"}
    done = subprocess.run(["bash", *line], env=environment, capture_output=True, text=True, check=True)
    shares_store, meeting, *given = done.stdout.splitlines()
    told_by_train = torchrun.environment(8, SEVERAL)
    assert shares_store == told_by_train["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"]
    assert meeting == told_by_train[pulse.VARIABLE]
    found = options(given)
    shutdown_s = config.resolve({"data": {"name": "demo"}}).shutdown_s
    line = torchrun.command(
        "job.yaml", ["seed=7"], workers=8, shutdown_s=shutdown_s, resume=True, nodes=SEVERAL, restarts=True
    )
    wanted = options(line[3:])
    # torchrun itself has to end such a job at some time.
    assert 3 < int(found.pop("max_restarts")) < int(wanted.pop("max_restarts"))
    assert found == wanted
