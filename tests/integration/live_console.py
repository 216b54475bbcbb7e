"""A real service with a console, and a record in which something has happened: for tests in a browser."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from service import store
from service.jobs.desk import Desk
from service.jobs.job import Attempt
from service.jobs.orders import attempt_folder, folder_of
from service.jobs.settings import ServiceSettings
from service.jobs.spec import JobSpec
from tests.integration import processes

LONG = "x" * 300
HOSTILE = f"<img src=x onerror=alert(1)><script>document.title='taken'</script> \x1b[31mred\x1b[0m {LONG}"


@dataclass(frozen=True)
class Console:
    """A service that runs.

    Attributes:
        root: its folder.
        url: where it listens.
        failed, finished: ids of jobs that were there before it started.
    """

    root: Path
    url: str
    failed: str
    finished: str


@contextmanager
def serving(root: Path) -> Iterator[Console]:
    """`lorot serve` in this folder, with a record in which something has happened already."""
    (root / "data").mkdir()
    content = {
        "state": f"{root}/state",
        "results": f"{root}/jobs",
        "data_roots": [f"{root}/data"],
        "tracking_uri": f"sqlite:///{root}/mlflow.db",
        "cpus": 2,
        "gpus": 0,
        "poll_s": 0.2,
        "backends": {"local": {"environment": ["GREETING"]}},
    }
    (root / "service.yaml").write_text(json.dumps(content))
    failed, finished = remembered(ServiceSettings.model_validate(content))
    log = (root / "serve.log").open("w")
    line = [sys.executable, "-m", "service.cli", "serve", "--settings", f"{root}/service.yaml", "--port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "LOROT_CACHE": f"{root}/cache"}
    process = subprocess.Popen(line, env=environment, stdout=log, stderr=subprocess.STDOUT)
    note = root / "state" / "service.json"

    def told() -> str:
        return (root / "serve.log").read_text()[-3000:]

    try:
        processes.await_(lambda: note.exists() or process.poll() is not None, "the service listens", 60, told)
        assert process.poll() is None, told()
        yield Console(root, json.loads(note.read_text())["url"], failed, finished)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)
        log.close()


def remembered(settings: ServiceSettings) -> tuple[str, str]:
    """Put two jobs that have ended into the record, one of them with everything that could do harm or stick out."""
    desk = Desk(settings)
    ids = []
    for name, state in (("a" * 63, "failed"), ("quickstart", "finished")):
        config = {"duration": "10 steps", "data": {"root": str(settings.data_roots[0])}}
        spec = JobSpec.model_validate({"name": name, "config": config, "environment": {"GREETING": HOSTILE}})
        job, _ = desk.submit(spec, owner="local")
        now = time.time()
        attempt = Attempt(1, f"lorot-{job.id[:12]}-1", {"pid": 1, "note": HOSTILE}, now - 900, now - 60, 1, HOSTILE)
        desk.record.change(job.id, state="starting", attempts=(attempt,))
        desk.record.change(job.id, state="running")
        desk.record.change(job.id, state=state, reason=HOSTILE if state == "failed" else "", ended_s=now - 60)
        folder = attempt_folder(settings, job.id, 1)
        folder.mkdir(parents=True)
        (folder / "log-node0.txt").write_text("".join(f"{HOSTILE} {number}\n" for number in range(50)))
        run = folder_of(settings, job.id) / "run"
        run.mkdir()
        records = [{"step": 10 * k, "time_s": k, "train/loss": 3 / k, "val/top1": 1 - 1 / k} for k in range(1, 30)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        (run / "run.json").write_text(json.dumps({"total_steps": 290}))
        Image.new("RGB", (1096, 320), (40, 90, 160)).save(run / "samples.png")
        ids.append(job.id)
    api = store.client(desk.record.uri)
    api.create_registered_model("lorot-earlier")
    found = {"downstream.wsol.gt_known:0.5": "0.75", "downstream.wsol.run_id": ids[0], "data": HOSTILE[:200]}
    tags = {"data_digest": "d" * 64, "objective": "multi_task", "pretext": "lorot_e", "metric.val/top1": "0.8125"}
    api.create_model_version("lorot-earlier", f"runs:/{ids[1]}/model", ids[1], tags={**found, **tags})
    return ids[0], ids[1]
