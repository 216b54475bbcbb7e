"""Where workers meet, and what they tell each other there: whose fault it is if they cannot, or do not agree."""

import json
import os
import re
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from PIL import Image
from torch.distributed import Store, TCPStore

from service.training import distributed

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from service.errors import LorotError
from service.training import distributed
try:
    distributed.connect("cpu", timeout_s=2.0)
except LorotError as error:
    print(type(error).__name__, error)
    sys.exit(error.exit_code)
"""


def connect(rank: int, size: int, port: int) -> tuple[int, str]:
    """Exit code and words of worker `rank` of `size`, whose others do not come."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env=environment | address | {"RANK": str(rank), "WORLD_SIZE": str(size)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_an_address_that_another_program_has_is_a_fault_of_the_configuration() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for size in (1, 2):
            code, said = connect(0, size, taken.getsockname()[1])
            assert code == 2, said
            assert said.startswith(f"ConfigError worker 0 of {size} cannot meet the others")
            assert "is the port taken" in said


def test_workers_whose_others_do_not_come_have_lost_them() -> None:
    for rank in (0, 1):
        code, said = connect(rank, 2, free_port())
        assert code == 8, said
        assert said.startswith(f"LostPeerError worker {rank} of 2 cannot meet the others")


@pytest.mark.parametrize("worker", ["service.training.worker", "service.profile.worker"])
def test_a_main_worker_that_listens_and_never_answers_ends_the_others_with_its_address(
    worker: str, tmp_path: Path
) -> None:
    (tmp_path / "job.yaml").write_text("{name: job, device: cpu, timeout_s: 5, data: {name: demo}}")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHELASTIC", "LOROT"))}
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        where = f"127.0.0.1:{mute.getsockname()[1]}"
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": where.split(":")[1], "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-m", worker, "job.yaml"],
            cwd=tmp_path,
            env=inherited | address | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
            capture_output=True,
            text=True,
            timeout=300,
        )
    log = (tmp_path / "runs/job/log-rank1.txt").read_text()
    assert done.returncode == 8, log
    told = json.loads((tmp_path / "runs/job/error.json").read_text())
    assert (told["type"], told["exit_code"]) == ("LostPeerError", 8)
    said = rf"worker 1 of 2 cannot meet the others at {where} within timeout_s=5: no answer for \d+ s"
    assert re.fullmatch(said, told["message"])
    # Its place in the code, too.
    assert "in _meeting_place" in log


def place_after(restarts: int, machines: int, server: TCPStore, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Where a worker meets the others whose torchrun has restarted it so often, with one store for all restarts."""
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": server.port, "TORCHELASTIC_USE_AGENT_STORE": True}
    told |= {"TORCHELASTIC_RESTART_COUNT": restarts, "GROUP_WORLD_SIZE": machines}
    for name, value in told.items():
        monkeypatch.setenv(name, str(value))
    return distributed._meeting_place(1, 2, timedelta(seconds=30))


def test_a_collective_operation_fails_when_another_worker_stays_away_for_longer_than_the_limit() -> None:
    program = """
import os, sys, time, torch
from service.training import distributed
world = distributed.connect("cpu", timeout_s=15.0)
distributed.barrier()
if world.rank == 1:
    print("here", flush=True)
    time.sleep(600)
try:
    distributed.all_sum(torch.ones(3))
except Exception as error:
    print("lost" if distributed.is_lost_peer(error) else repr(error), flush=True)
os._exit(0)
"""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")} | address
    environment |= {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    one, other = (
        subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env=environment | {"RANK": rank},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    )
    try:
        said, _ = one.communicate(timeout=300)
        assert said == "lost\n"
        # It was not lost by its own end.
        assert other.poll() is None
    finally:
        one.kill()
        other.kill()
        one.wait()
        assert other.communicate()[0] == "here\n"


def test_addresses_of_workers_before_a_restart_are_not_found_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place_after(0, 1, server, monkeypatch).set("rank0", "an address that is gone")
    again = place_after(1, 1, server, monkeypatch)
    assert not again.check(["rank0"])
    again.set("rank0", "an address")
    assert place_after(1, 1, server, monkeypatch).get("rank0") == b"an address"


def test_machines_that_were_restarted_differently_often_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place_after(0, 2, server, monkeypatch).set("rank0", "an address")
    assert place_after(3, 2, server, monkeypatch).check(["rank0"])


# One worker each of two machines, which have a folder of their own and a rendezvous in common.
MACHINE = """
import json, sys
from service import config
from service.errors import ConfigError, LorotError
from service.training import distributed, feeding
from service.training.distributed import World

world = distributed.connect("cpu", timeout_s=60.0)

def outcome(action):
    try:
        return action()
    except LorotError as error:
        return [type(error).__name__, error.exit_code, str(error)]

def fail():
    with distributed.however_long(world, "nothing"):
        if world.rank == 1:
            raise ConfigError("its disk is full")
        return "done"

def refuse():
    raise ConfigError("so not")

job = config.resolve({"data": {"name": "folder", "root": "images", "size": 32}})
told = {
    "own": distributed.from_local_main(f"machine {world.rank}", world),
    "data": outcome(lambda: [len(split) for split in feeding.open_splits(job, world)]),
    "refused": outcome(lambda: distributed.on_main(world, refuse)),
    "failed": outcome(fail),
}
print(json.dumps(told))
distributed.leave()
"""


def test_what_goes_wrong_on_one_machine_is_an_error_on_both(tmp_path: Path) -> None:
    port = free_port()
    machines = []
    for rank in range(2):
        here = tmp_path / f"machine{rank}"
        for split in ("train", "val"):
            for name in range(2):
                path = here / "images" / split / "class0" / f"{name}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                # Of another height on the second machine, and only what is trained on.
                Image.new("RGB", (40, 41 if split == "train" and rank else 40), (name, 0, 0)).save(path)
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        ranks = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")}
        machines.append(
            subprocess.Popen(
                [sys.executable, "-c", MACHINE],
                cwd=here,
                env=environment | address | ranks | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    ended = [machine.communicate(timeout=240) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], ended
    first, second = (json.loads(said.splitlines()[-1]) for said, _ in ended)
    assert (first["own"], second["own"]) == ("machine 0", "machine 1")
    for told in (first, second):
        kind, code, why = told["data"]
        assert (kind, code) == ("DataError", 3)
        assert "the machines do not hold the same data: split 'train' of ranks 1 is not that of rank 0" in why
        assert told["refused"] == ["ConfigError", 2, "so not"]
    assert second["failed"] == ["ConfigError", 2, "its disk is full"]
    assert first["failed"] == ["JobError", 2, "another worker has failed: worker 1: its disk is full"]
