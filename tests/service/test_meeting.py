"""Workers that cannot meet: what is a fault of the configuration, and what is one of another machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

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
