"""Jobs of a cluster as their users see them: API, desk, controller and record above the stand-in for a cluster."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from service import store
from service.jobs.job import Job
from service.jobs.job_tags import JOB
from tests.integration.stand_in_cluster import NAMESPACE, Cluster, cluster, disrupted, ended, running
from tests.service.api_shelf import Served, served
from tests.service.job_specs import CONFIG

pytestmark = pytest.mark.integration

SPEC = {
    "kind": "train",
    "name": "gang",
    "backend": "kubernetes",
    "nodes": "2",
    "retries": 1,
    "config": {**CONFIG, "data": {**CONFIG["data"], "root": "/data/demo"}},
}
KINDS = ("batch/v1/jobs", "v1/services", "v1/configmaps", "v1/pods")


class Place:
    """A service, its record, and the cluster that it uses."""

    def __init__(self, here: Served, there: Cluster, uri: str) -> None:
        self.here, self.there = here, there
        self._record = store.client(uri)

    def submit(self) -> str:
        answer = self.here.client.post("/v1/jobs", json={"spec": SPEC, "key": ""})
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def until(self, job_id: str, holds: Callable[[Job], bool]) -> Job:
        return self.here.step_until(lambda: holds(self.here.desk.get(job_id)), job_id)

    def begun(self, job_id: str, number: int) -> list[str]:
        """The pods of an attempt, once the service has made it and both run."""
        job = self.until(job_id, lambda job: len(job.attempts) == number and bool(job.attempts[-1].started_s))
        assert job.state == "starting"
        name = f"lorot-{job_id[:12]}-{number}"
        main = self.there.get("Job", name)["spec"]["template"]["spec"]["containers"][0]
        told = {entry["name"]: entry["value"] for entry in main["env"]}
        assert (told["LOROT_RUN_ID"], told["LOROT_JOB_ATTEMPT"]) == (job_id, str(number))
        assert ("--resume" in main["command"]) == (number > 1)
        pods = self.there.make_pods(name)
        for node, pod in enumerate(pods):
            self.there.set(pod, **running())
            self.there.api.logs[pod] = [b"attempt %d of node %d\n" % (number, node)]
        self.until(job_id, lambda job: job.state == "running")
        return pods

    def end(self, job_id: str, pods: list[str], condition: str, *ends: dict[str, Any]) -> None:
        for pod, end in zip(pods, ends, strict=True):
            self.there.set(pod, **end)
        self.there.conclude(pods[0].removesuffix("-0-0"), condition)

    def recorded(self, job_id: str) -> tuple[str, str, str, str]:
        """Of the run in MLflow: its status, and of the job's tags the state, the failures and the wish to stop."""
        run = self._record.get_run(job_id)
        return (run.info.status, *(run.data.tags[f"{JOB}.{name}"] for name in ("state", "failures", "cancel")))

    def artifacts(self, job_id: str, folder: str) -> list[str]:
        return [one.path for one in self._record.list_artifacts(job_id, folder)]

    def left(self) -> list[str]:
        """All objects in the cluster."""
        return [name for kind in KINDS for name in self.there.api.living(kind)]


@contextmanager
def service(tmp_path: Path, there: Cluster) -> Iterator[Place]:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    store.ensure_ready(uri)
    own = {"enabled": True, "namespace": NAMESPACE, "kubeconfig": str(there.kubeconfig)}
    own |= {"results_claim": "results", "data_claim": "data"}
    more: dict[str, Any] = {"backends": {"kubernetes": own}, "worker_tracking_uri": "http://mlflow:5000"}
    with served(tmp_path, uri, **more) as here:
        yield Place(here, there, uri)


def test_a_job_of_a_cluster_is_pre_empted_runs_out_of_memory_and_finishes_and_another_is_cancelled(
    tmp_path: Path,
) -> None:
    with cluster(tmp_path) as there:
        with service(tmp_path, there) as place:
            job = place.submit()
            assert place.recorded(job) == ("SCHEDULED", "queued", "0", "")
            pods = place.begun(job, 1)
            assert place.recorded(job) == ("RUNNING", "running", "0", "")

            # Killed when its grace was over: by its exit code alone it would have failed.
            taken = ended(137, **disrupted("PreemptionByScheduler"))
            place.end(job, pods, "Failed", taken, taken)
            pods = place.begun(job, 2)
            # By no fault of its own: of the one retry nothing is used up.
            assert place.recorded(job) == ("RUNNING", "running", "0", "")
            first = place.here.desk.get(job).attempts[0]
            assert (first.exit_code, "a pod of higher priority took its place" in first.reason) == (137, True)

        # A service that has been started anew knows of it what the record and the cluster know.
        with service(tmp_path, there) as place:
            place.end(job, pods, "Failed", ended(8), ended(137, "OOMKilled"))
            pods = place.begun(job, 3)
            assert place.recorded(job) == ("RUNNING", "running", "1", "")
            second = place.here.desk.get(job).attempts[1]
            assert (second.exit_code, "node 1: " in second.reason) == (137, True)
            assert "resources.memory" in second.reason

            place.end(job, pods, "Complete", ended(0), ended(0))
            done = place.until(job, lambda job: job.has_ended)
            assert [attempt.exit_code for attempt in done.attempts] == [137, 137, 0]
            assert place.recorded(job) == ("FINISHED", "finished", "1", "")
            assert place.left() == []
            # Of each attempt that has ended the logs stay.
            assert place.artifacts(job, "attempts/3") == [f"attempts/3/log-node{node}.txt" for node in (0, 1)]
            log = place.here.client.get(f"/v1/jobs/{job}/logs", params={"attempt": 2, "node": 1})
            assert log.content == b"attempt 2 of node 1\n"

            other = place.submit()
            place.begun(other, 1)
            answer = place.here.client.post(f"/v1/jobs/{other}/cancel")
            assert answer.status_code == 200, answer.text
            assert place.recorded(other) == ("RUNNING", "running", "0", "1")
            gone = place.until(other, lambda job: job.has_ended)
            assert (gone.state, gone.reason, len(gone.attempts)) == ("killed", "cancelled", 1)
            assert place.recorded(other) == ("KILLED", "killed", "0", "1")
            assert place.left() == []
