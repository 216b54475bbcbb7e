"""One machine's part in a job of several: real torchrun at a real rendezvous, with a small stand-in for the worker."""

import json
import socket
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from service.errors import ConfigError
from service.jobs import local

CONFIG = """
name: job
global_batch: 8
micro_batch: 4
data: {name: demo, root: drawn, size: 32, options: {train_count: 12, val_count: 10, size: 48}}
tracking: {uri: "sqlite:///unused.db"}
"""
# It says what it was given, and leaves a checkpoint as a worker does that is lost later.
WORKER = """
import json, pathlib, sys
with open("given.jsonl", "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
pathlib.Path("runs/job/checkpoints/step-00000001").mkdir(parents=True, exist_ok=True)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "job.yaml").write_text(CONFIG)
    (tmp_path / "stand_in.py").write_text(WORKER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(local, "WORKER", "stand_in")
    monkeypatch.setattr(local.tracking, "ensure_ready", lambda *_: None)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_a_machine_waits_for_the_rendezvous_and_one_that_comes_back_goes_on_with_its_run(here: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    opened: list[TCPStore] = []

    def say(text: str) -> None:
        if text == f"waiting for the rendezvous at 127.0.0.1:{port}":
            opened.append(TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False))

    place = {"workers": 1, "nnodes": "1", "rdzv": f"127.0.0.1:{port}"}
    local.run("job.yaml", run_id="week", say=say, **place)  # type: ignore[arg-type]
    assert len(opened) == 1
    del opened[:]
    local.run("job.yaml", run_id="week", say=say, **place)  # type: ignore[arg-type]
    given = [json.loads(line) for line in (here / "given.jsonl").read_text().splitlines()]
    # Whoever comes first has nothing to go on with yet, and those that join it later have.
    assert given == [["job.yaml", "--resume"]] * 2
    with pytest.raises(ConfigError, match="holds an earlier run"):
        local.run("job.yaml", run_id="another", say=say, **place)  # type: ignore[arg-type]
