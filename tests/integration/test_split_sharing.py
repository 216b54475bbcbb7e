"""Workers of several machines, each with its own copy of the data: two processes stand in for each machine."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from service import config, splits

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
WORKER = """
import json, os, sys
from pipelines import listing
from service import config
from service.training import distributed, feeding
looked = []
files = listing.files
listing.files = lambda *given: (looked.append(1), files(*given))[1]
world = distributed.connect("cpu")
train_set, eval_set = feeding.open_splits(config.load("job.yaml", []), world)
print(json.dumps([world.rank, bool(looked), str(train_set.path), len(train_set), train_set.read(0).hex()]))
distributed.leave()
"""


def make_machines(folder: Path) -> list[Path]:
    machines = [folder / name for name in ("one", "two")]
    for split in ("train", "val"):
        (machines[0] / "data" / split / "cat").mkdir(parents=True)
        Image.new("RGB", (8, 6)).save(machines[0] / "data" / split / "cat/a.png")
    (machines[0] / "job.yaml").write_text("data: {name: folder, root: data, size: 32}\n")
    shutil.copytree(*machines)
    return machines


def run(machines: list[Path], **told: str) -> list[list[object]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = []
    for rank in range(4):
        where = {"RANK": rank, "WORLD_SIZE": 4, "LOCAL_RANK": rank % 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        environment = {name: str(value) for name, value in where.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
        workers.append(
            subprocess.Popen(
                [sys.executable, "-c", WORKER],
                cwd=machines[rank // 2],
                env=os.environ | environment | told,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    printed = [worker.communicate(timeout=400)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 4
    return [json.loads(text.splitlines()[-1]) for text in printed]


def test_one_worker_of_each_machine_looks_at_the_files_and_the_others_map_its_manifest(tmp_path: Path) -> None:
    machines = make_machines(tmp_path)
    found = run(machines)
    assert [looked for _, looked, *_ in found] == [True, False, True, False]
    assert [(machines[rank // 2] / str(path)).exists() for rank, _, path, *_ in found] == [True] * 4
    assert len({content for *_, content in found}) == 1


def test_none_looks_if_the_launcher_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machines = make_machines(tmp_path)
    monkeypatch.chdir(machines[0])
    told = splits.announcement(splits.load(config.load("job.yaml", [])))
    found = run([machines[0], machines[0]], **{splits.VARIABLE: told})
    assert [looked for _, looked, *_ in found] == [False] * 4
