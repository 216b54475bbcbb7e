"""The job service as a user meets it: `lorot serve` in a process, jobs that really train, signals, restarts."""

import json
import signal
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from processes import await_
from service_process import CONFIG, Service, lorot

from service.jobs import orders
from service.jobs.settings import ServiceSettings

pytestmark = pytest.mark.integration


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    made = Service(tmp_path, limits={"requests_per_minute": 10**6})
    yield made
    made.close()


def test_a_job_trains_to_a_registered_model_while_the_service_ends_and_comes_back(service: Service) -> None:
    service.start()
    config = yaml.safe_load(CONFIG.format(root=service.folder, steps=60, model="lorot-tiny"))
    body = {"spec": {"kind": "train", "name": "tiny", "config": config}, "key": "tiny-1"}
    states: list[str] = []
    watching = threading.Thread(target=lambda: states.extend(told(service)), daemon=True)
    watching.start()
    # Else the job may be further than it is to be seen.
    await_(lambda: _meter(service, "lorot_streams ") == 1, "the watcher listens", 60)
    job = service.ask("POST", "/v1/jobs", body)
    assert service.ask("POST", "/v1/jobs", body)["id"] == job["id"]

    # Up to the first lines, and then the service is asked to end in the middle of the stream.
    text, last_id = "", ""
    for name, identifier, data in service.follow(f"/v1/jobs/{job['id']}/logs?follow=true"):
        text, last_id = text + ("" if name else data + "\n"), identifier
        if text and service.process is not None and service.process.poll() is None:
            await_(lambda: {"starting", "running"} & set(states), "the watcher is told", 60)
            service.process.send_signal(signal.SIGTERM)
            break
    assert service.process is not None
    assert service.process.wait(120) == 0, service.log.read_text()
    watching.join(60)
    assert not watching.is_alive(), "an open stream outlives the service"

    service.start()
    shown = service.ask("GET", f"/v1/jobs/{job['id'][:8]}")
    assert shown["state"] in ("running", "finished")
    assert len(shown["attempts"]) == 1
    ended = ""
    for name, _, data in service.follow(f"/v1/jobs/{job['id']}/logs?follow=true", last_id):
        text += "" if name else data + "\n"
        ended = data if name == "end" else ended
    assert json.loads(ended) == {"state": "finished", "reason": "", "attempt": 1, "exit_code": 0}, text

    settings = ServiceSettings(results=service.folder / "jobs")
    whole = (orders.attempt_folder(settings, job["id"], 1) / "log-node0.txt").read_bytes().decode("utf-8", "replace")
    assert text == whole.replace("\r\n", "\n").replace("\r", "\n")
    done = service.ask("GET", f"/v1/jobs/{job['id']}")
    assert (done["state"], done["failures"], len(done["attempts"])) == ("finished", 0, 1)
    metrics = service.ask("GET", f"/v1/jobs/{job['id']}/metrics")["metrics"]
    assert any("val/top1" in record for record in metrics)
    files = {one["name"] for one in service.ask("GET", f"/v1/jobs/{job['id']}/files")["files"]}
    assert {"job.yaml", "config.yaml", "summary.json"} <= files
    model = service.ask("GET", "/v1/models/lorot-tiny/latest")
    assert (model["version"], model["run_id"]) == (1, job["id"])
    # The commands see the same through it.
    seen = lorot(service.folder, "jobs", "--json", "--server", service.url)
    assert [one["id"] for one in json.loads(seen.stdout)["jobs"]] == [job["id"]]
    assert service.end(signal.SIGINT) == 0
    lines = [line for line in service.log.read_text().splitlines() if not line.startswith("lorot serves")]
    assert all(json.loads(line)["level"] for line in lines), "the service logs JSON alone"


def told(service: Service) -> Iterator[str]:
    for name, _, data in service.follow("/v1/events"):
        if name == "job":
            yield json.loads(data)["state"]


def test_without_a_service_a_job_goes_on_by_itself_and_the_next_command_finds_its_end(service: Service) -> None:
    (service.folder / "job.yaml").write_text(CONFIG.format(root=service.folder, steps=6, model="''"))
    here = ("--settings", str(service.settings))
    config = str(service.folder / "job.yaml")
    submitted = lorot(service.folder, "submit", config, "--json", *here)
    assert submitted.returncode == 0, submitted.stderr
    job = json.loads(submitted.stdout)
    assert job["state"] in ("queued", "starting", "running")
    # Nobody of ours runs now but the job itself.
    followed = lorot(service.folder, "logs", "-f", job["id"][:8], *here)
    assert followed.returncode == 0, followed.stderr
    shown = lorot(service.folder, "job", job["id"], "--json", *here)
    assert json.loads(shown.stdout)["state"] == "finished", followed.stdout
    assert "tiny" not in followed.stdout
    # A job that fails ends the command that waits as it ended itself: 3 is bad data.
    broken = lorot(
        service.folder, "submit", config, "data.name=folder", f"data.root={service.folder}/data/none",
        "data.options={}", "--wait", *here,
    )  # fmt: skip
    assert broken.returncode == 3, broken.stdout + broken.stderr
    assert "failed" in broken.stderr
    assert "Traceback" not in broken.stderr


def test_off_loopback_it_starts_with_a_token_only_and_asks_everybody_for_one(service: Service) -> None:
    here = ("--settings", str(service.settings))
    refused = lorot(service.folder, "serve", *here, "--host", "0.0.0.0", "--port", "0")
    assert refused.returncode == 2
    assert "lorot token create" in refused.stderr
    made = lorot(service.folder, "token", "create", "ci", "--scope", "read", *here)
    token = made.stdout.strip()
    service.start("--host", "0.0.0.0")
    service.url = f"http://127.0.0.1:{service.url.rpartition(':')[2]}"
    await_(lambda: service.status("/healthz") == 200, "it answers", 30)
    assert service.status("/v1/jobs") == 401
    assert service.status("/v1/jobs", {"Authorization": f"Bearer {token}"}) == 200
    assert service.status("/v1/tokens", {"Authorization": f"Bearer {token}"}) == 403
    # A second one of the same record says who has it.
    second = lorot(service.folder, "serve", *here, "--port", "0")
    assert second.returncode == 2
    assert "another service works on this record" in second.stderr
    assert token not in service.log.read_text()
    assert service.end() == 0


def test_two_hundred_followers_cost_little_and_leave_room_for_others(service: Service) -> None:
    service.start()
    assert service.process is not None
    process = psutil.Process(service.process.pid)
    before = process.memory_info().rss
    counted: list[int] = []

    def follow() -> None:
        counted.append(sum(1 for _ in service.follow("/v1/events")))

    threads = [threading.Thread(target=follow, daemon=True) for _ in range(200)]
    for thread in threads:
        thread.start()

    def streams() -> float:
        return _meter(service, "lorot_streams ")

    await_(lambda: streams() == 200, "all follow", 60)
    body = {"spec": {"kind": "train", "config": {"data": {"root": f"{service.folder}/data/demo"}}}}
    job = service.ask("POST", "/v1/jobs", body)
    service.ask("POST", f"/v1/jobs/{job['id']}/cancel")
    assert service.ask("GET", "/v1/jobs")["total"] == 1
    grown = process.memory_info().rss - before
    assert grown < 60e6
    assert process.num_threads() < 80
    assert service.end() == 0
    for thread in threads:
        thread.join(120)
    assert len(counted) == 200
    assert min(counted) >= 1


def _meter(service: Service, name: str) -> float:
    with urllib.request.urlopen(f"{service.url}/metrics", timeout=60) as answer:
        return float(next(line for line in answer.read().decode().splitlines() if line.startswith(name)).split()[-1])
