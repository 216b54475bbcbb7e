"""`lorot serve` as a process of its own, and a client that knows nothing of ours: the standard library's."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import yaml
from processes import await_

from service import store

LOROT = [sys.executable, "-m", "service.cli"]
_PATIENCE_S = 120.0
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith(("LOROT_", "MLFLOW_"))} | {
    "OMP_NUM_THREADS": "1"
}
CONFIG = """
duration: {steps} steps
evaluate_every: 50 %
global_batch: 8
micro_batch: 4
workers: 1
device: cpu
precision: fp32
data:
  name: demo
  root: {root}/data/demo
  options: {{train_count: 64, val_count: 16, size: 40}}
  size: 32
  eval_crop: 1.0
  loader: torch
pretext: {{name: lorot_e}}
objective: {{name: multi_task}}
model: {{name: resnet_small, width: 8}}
optimizer: {{lr: 0.05}}
checkpoint: {{every: 20 steps}}
tracking: {{log_every: 5 steps, system_metrics: false}}
registry: {{name: {model}}}
"""


class Service:
    """A service in a folder, which can be started, ended and started again."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self.uri = str(settings.get("tracking_uri") or f"sqlite:///{folder}/mlflow.db")
        self.process: subprocess.Popen[bytes] | None = None
        self.url = ""
        values = {
            "state": f"{folder}/state",
            "results": f"{folder}/jobs",
            "data_roots": [f"{folder}/data"],
            "tracking_uri": self.uri,
            "poll_s": 0.2,
            **settings,
        }
        self.settings = folder / "service.yaml"
        self.settings.write_text(yaml.safe_dump(values))
        (folder / "data").mkdir(exist_ok=True)
        store.ensure_ready(self.uri)

    @property
    def log(self) -> Path:
        return self.folder / "service.log"

    def start(self, *options: str) -> None:
        """Start it on a free port, and wait until it says where."""
        before = self.log.stat().st_size if self.log.exists() else 0
        line = [*LOROT, "serve", "--settings", str(self.settings), "--port", "0", *options]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(line, stdout=log, stderr=log, env=ENVIRONMENT)
        process = self.process

        def said() -> bool:
            assert process.poll() is None, self.log.read_text()
            told = self.log.read_bytes()[before:].decode()
            self.url = next((text.split()[-1] for text in told.splitlines() if text.startswith("lorot serves at")), "")
            return bool(self.url)

        await_(said, "the service says where it is", 90, self.log.read_text)
        await_(lambda: self.status("/readyz") == 200, "the service is ready", 90, self.log.read_text)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Its exit code after this signal."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(60)

    def close(self) -> None:
        """Leave no process of this folder."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for process in psutil.process_iter(["cmdline"]):
            if str(self.folder) in " ".join(process.info["cmdline"] or ()):
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue

    def ask(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Any:
        """What it answers, as JSON; raises HTTPError. A question is asked again while it says not now (503)."""
        data = None if body is None else json.dumps(body).encode()
        head = {"Content-Type": "application/json", **(headers or {})}
        request = urllib.request.Request(self.url + path, data, head, method=method)
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                with urllib.request.urlopen(request, timeout=_PATIENCE_S) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                is_safe = method == "GET" or bool(body and body.get("key"))
                if error.code != 503 or not is_safe or time.monotonic() > deadline:
                    raise
            time.sleep(1)

    def status(self, path: str, headers: Mapping[str, str] | None = None) -> int:
        """The status of its answer; 0 if there is none."""
        try:
            with urllib.request.urlopen(
                urllib.request.Request(self.url + path, headers=dict(headers or {})), timeout=60
            ) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def follow(self, path: str, last_id: str = "") -> Iterator[tuple[str, str, str]]:
        """(event, id, data) as they come, until the stream ends."""
        head = {"Last-Event-ID": last_id} if last_id else {}
        with urllib.request.urlopen(urllib.request.Request(self.url + path, headers=head), timeout=120) as answer:
            name, identifier, data = "", last_id, []
            for raw in answer:
                line = raw.decode().rstrip("\n")
                if not line and data:
                    yield name, identifier, "\n".join(data)
                if not line:
                    name, data = "", []
                elif line.startswith("data: "):
                    data.append(line[6:])
                elif line.startswith("id: "):
                    identifier = line[4:]
                elif line.startswith("event: "):
                    name = line[7:]


def draw_demo(root: Path) -> None:
    """Draw the data set of `CONFIG` beforehand, for jobs that may only read it, whoever they run as."""
    options = ("train_count=64", "val_count=16", "size=40")
    drawn = lorot(root.parent, "data", "demo", "--root", str(root), *options)
    assert drawn.returncode == 0, drawn.stderr
    let_all_read(root)


def let_all_read(root: Path) -> None:
    """A data set, and the data root that it lies in."""
    for place in (root.parent, root, *root.rglob("*")):
        place.chmod(0o755 if place.is_dir() else 0o644)


def lorot(folder: Path, *arguments: str, timeout_s: float = 900) -> subprocess.CompletedProcess[str]:
    """`lorot ARGUMENTS`, to its end."""
    environment = ENVIRONMENT | {"LOROT_CACHE": str(folder / "cache")}
    return subprocess.run([*LOROT, *arguments], env=environment, capture_output=True, text=True, timeout=timeout_s)
