"""`lorot serve`, all of it, but its local jobs run `tiny_job.py` in place of training: hundreds of them are cheap.

    python -m tests.integration.tiny_service SETTINGS PORT LEDGER

Specs are checked, recorded, queued and started as ever, each by a real `service.jobs.runner`; only the command differs.
A spec of another make than `spec` below, without its variables, is a training and trains.
"""

import http.client
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from service.jobs import settings_file
from service.jobs.backends import Handle, Order, local
from service.jobs.backends.local.backend import Local
from service.jobs.settings import ServiceSettings

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("tiny_job.py")
DATA = ROOT / "data"
# A training that would be possible, so that every check of it passes.
CONFIG = {
    "duration": "10 steps",
    "global_batch": 8,
    "micro_batch": 8,
    "device": "cpu",
    "data": {
        "name": "demo",
        "root": str(ROOT / "data" / "demo"),
        "size": 32,
        "options": {"train_count": 40, "val_count": 20},
    },
    "model": {"name": "resnet_small", "width": 8},
}


class TinyJobs(Local):
    """The local backend; what it starts of `spec` has another command than was ordered."""

    def __init__(self, settings: ServiceSettings, ledger: Path) -> None:
        super().__init__(settings)
        self._ledger = ledger

    def start(self, order: Order) -> Handle:
        if "TINY_LINES" not in order.job.spec.environment:
            return super().start(order)
        line = [sys.executable, "-I", "-S", str(PROGRAM), str(self._ledger)]
        return super().start(replace(order, command=tuple(line)))


class TinyService:
    """Such a service as a process of its own, which can be killed and started again at the same address.

    Args:
        folder: of everything; it has service.yaml.
        port: where it listens.
    """

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.url = folder, f"http://127.0.0.1:{port}"
        self.ledger = folder / "ledger"
        self.ledger.touch()
        self._port = port
        self.process: subprocess.Popen[bytes] | None = None

    def configure(self, *, backends: Mapping[str, Any] | None = None, **values: Any) -> None:
        """Write service.yaml; what is given comes on top of what a test needs. `backends`: besides the local one."""
        own: dict[str, Any] = {"state": str(self.folder / "state"), "results": str(self.folder / "jobs"), "poll_s": 0.2}
        own |= {"data_roots": [str(DATA)], "gpus": 0, "limits": {"requests_per_minute": 10**6}}
        own |= {"tracking_uri": f"sqlite:///{self.folder}/mlruns/mlflow.db"}
        own |= {"mounts": [str(PROGRAM.parent)], "backends": {"local": {"environment": ["TINY_*"]}, **(backends or {})}}
        (self.folder / "service.yaml").write_text(yaml.safe_dump(own | values))

    def start(self) -> None:
        """Start it; it may take a while until it answers."""
        line = [sys.executable, "-m", "tests.integration.tiny_service", str(self.folder / "service.yaml")]
        with (self.folder / "service.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*line, str(self._port), str(self.ledger)],
                cwd=self.folder,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill(self) -> None:
        """By SIGKILL, without its jobs."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def is_ready(self) -> bool:
        """Whether it says that it can do its work; fails if it has ended by itself."""
        assert self.process is not None
        assert self.process.poll() is None, self.told()
        try:
            return bool(self.ask("/readyz"))
        except OSError:
            return False

    def told(self) -> str:
        """The end of its log."""
        return (self.folder / "service.log").read_text(errors="replace")[-4000:]

    def ask(self, path: str, body: Mapping[str, Any] | None = None, timeout_s: float = 60) -> Any:
        """GET, or POST with a body; raises OSError, of which an HTTP error is one."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                return json.load(answer)
        except http.client.HTTPException as error:
            # It was killed within its answer.
            raise ConnectionError(f"{path}: {error!r}") from None

    def noted(self) -> tuple[Counter[tuple[str, str]], Counter[tuple[str, str]]]:
        """How often each (job, attempt) has begun, and has ended; those in containers have a ledger each."""
        counts: dict[str, Counter[tuple[str, str]]] = {"begin": Counter(), "end": Counter()}
        for ledger in (self.ledger, *self.folder.glob("jobs/*/outputs*/ledger")):
            for line in ledger.read_text().splitlines():
                what, job, attempt = line.split()
                counts[what][job, attempt] += 1
        return counts["begin"], counts["end"]


def spec(name: str, *, lines: int = 1, seconds: float = 0.0, **fields: Any) -> dict[str, Any]:
    """A job's, for a request."""
    environment = {"TINY_LINES": str(lines), "TINY_SECONDS": str(seconds)}
    return {"kind": "train", "name": name, "config": CONFIG, "environment": environment, **fields}


def container_spec(name: str, *, lines: int = 1, seconds: float = 0.0, **fields: Any) -> dict[str, Any]:
    """The same in a container of an image with Python; its ledger is an output of the job."""
    own = spec(name, lines=lines, seconds=seconds, kind="container", backend="docker", mounts=[str(PROGRAM.parent)])
    del own["config"]
    own |= {"command": ["python3", "-I", "-S", str(PROGRAM), "/results/ledger"], "outputs": ["ledger"]}
    return own | {"resources": {"memory": "128MiB", "shm": "1MiB"}} | fields


def main() -> None:
    settings, port, ledger = sys.argv[1:]
    # Found by its name and asked for by `make`, as any backend is.
    local.make = lambda given: TinyJobs(given, Path(ledger))
    from service.api import server

    server.serve(settings_file.load(Path(settings)), port=int(port))


if __name__ == "__main__":
    main()
