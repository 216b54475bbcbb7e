"""The life of jobs in a cluster: the backend with the official client, over HTTP, against a stand-in API server."""

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.errors import BackendError, ConfigError
from service.jobs.backends import Order, Status, load
from service.jobs.backends.kubernetes.backend import KubernetesBackend
from service.jobs.places import Placed
from service.jobs.settings import ServiceSettings
from tests.integration.processes import await_
from tests.integration.stand_in_cluster import DIGEST, NAMESPACE, Cluster, cluster, disrupted, ended, running, waiting
from tests.service.kubernetes_orders import JOB_ID, NAME, SHAPES, job, order, settings

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]


class Place:
    """A cluster, and a service that uses it."""

    def __init__(self, there: Cluster, tmp_path: Path, **place: Any) -> None:
        self.there = there
        self.settings = settings(tmp_path, kubeconfig=str(there.kubeconfig), namespace=NAMESPACE, **place)
        self.backend = KubernetesBackend(self.settings)

    def start(self, shape: str = "one node", **more: Any) -> Order:
        own = order(self.settings, **{**SHAPES[shape], **more})
        self.handle = self.backend.start(own)
        return own

    def status(self) -> Status:
        found = self.backend.status(NAME, self.handle)
        # By name alone, a service that was killed before it wrote the handle down has to see the same.
        assert self.backend.status(NAME, {}) == found
        return found


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with cluster(tmp_path) as there:
        made = Place(there, tmp_path)
        yield made
        made.backend.close()


@pytest.fixture
def sets(tmp_path: Path) -> Iterator[Place]:
    """With JobSets installed."""
    with cluster(tmp_path, jobsets=True) as there:
        made = Place(there, tmp_path)
        yield made
        made.backend.close()


def test_a_job_is_submitted_waits_runs_and_finishes(place: Place) -> None:
    own = place.start()
    assert own.job.id == JOB_ID
    assert (place.status().phase, place.status().reason) == ("waiting", "the cluster has not made its pods yet")

    (pod,) = place.there.make_pods(NAME)
    unschedulable = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes"}
    place.there.set(pod, conditions=[unschedulable])
    assert place.status().reason == "no machine has room for it: 0/3 nodes"
    place.there.set(pod, **waiting("ImagePullBackOff", "not found"), conditions=[])
    assert place.status().reason == "image lorot cannot be pulled: not found"
    place.there.set(pod, **waiting("CreateContainerConfigError", 'secret "store" not found'))
    assert 'secret "store" not found' in place.status().reason

    place.there.place(pod)
    place.there.set(pod, **running())
    found = place.status()
    assert (found.phase, found.reason, found.image_digest) == ("running", "", DIGEST)
    assert found.started_s == 1767225610.0
    assert found.nodes == ("node 0: running on gpu-1",)

    place.there.set(pod, **ended(0))
    place.there.conclude(NAME, "Complete")
    found = place.status()
    assert (found.phase, found.exit_code, found.reason) == ("ended", 0, "")
    assert found.ended_s == 1767225910.0


def test_the_server_stores_what_was_rendered_and_nothing_less(place: Place) -> None:
    from service.jobs.manifests import workloads

    own = place.start("elastic")
    configuration = (own.folder / "job.yaml").read_text()
    wanted = workloads.objects(own, place.settings.backends.kubernetes, configuration, jobsets=False)
    kinds = {"Job": "batch/v1/jobs", "Service": "v1/services", "ConfigMap": "v1/configmaps"}
    owner = place.there.get("Job", NAME)["metadata"]["uid"]
    for document in wanted:
        found = place.there.get(kinds[document["kind"]], document["metadata"]["name"])
        about = {key: value for key, value in found["metadata"].items() if key not in ("uid", "creationTimestamp")}
        references = about.pop("ownerReferences", [])
        assert {**found, "metadata": about} == document
        assert [reference["uid"] for reference in references] == ([owner] if document is not wanted[0] else [])


def test_starting_twice_makes_one_thing(place: Place) -> None:
    own = place.start("elastic")
    before = {kind: sorted(place.there.api.living(kind)) for kind in ("batch/v1/jobs", "v1/services", "v1/configmaps")}
    assert place.backend.start(own) == place.handle
    assert KubernetesBackend(place.settings).start(own) == place.handle
    after = {kind: sorted(place.there.api.living(kind)) for kind in before}
    assert after == before
    assert before["batch/v1/jobs"] == [NAME, f"{NAME}-rdzv"]


def test_a_start_that_was_cut_off_is_completed_by_the_next(place: Place) -> None:
    place.there.api.refusals["create", "configmaps"] = (500, "etcd is away")
    with pytest.raises(BackendError, match="etcd is away"):
        place.start("elastic")
    assert list(place.there.api.living("v1/configmaps")) == []
    place.there.api.refusals.clear()
    place.start("elastic")
    assert list(place.there.api.living("v1/configmaps")) == [NAME]
    assert sorted(place.there.api.living("batch/v1/jobs")) == [NAME, f"{NAME}-rdzv"]


def test_a_name_that_is_somebody_elses_is_not_adopted(place: Place) -> None:
    place.there.api.objects["batch/v1/jobs", NAMESPACE, NAME] = {"metadata": {"name": NAME, "uid": "x"}, "spec": {}}
    with pytest.raises(BackendError, match=f"is not of job {JOB_ID}"):
        place.start()


def test_memory_that_ran_out_is_told_apart(place: Place) -> None:
    place.start()
    (pod,) = place.there.make_pods(NAME)
    place.there.set(pod, **ended(137, "OOMKilled"))
    place.there.conclude(NAME, "Failed", reason="BackoffLimitExceeded")
    found = place.status()
    assert (found.phase, found.exit_code, found.out_of_memory, found.preempted) == ("ended", 137, True, False)
    assert "resources.memory" in found.reason


def test_what_was_pre_empted_is_started_again_by_the_cluster_and_told_apart_when_it_is_not(place: Place) -> None:
    place.start()
    (pod,) = place.there.make_pods(NAME)
    place.there.set(pod, **ended(75, **disrupted("EvictionByEvictionAPI")))
    found = place.status()
    assert found.phase == "waiting"
    assert "its machine was being emptied" in found.reason
    (again,) = place.there.make_pods(NAME, generation=1)
    place.there.set(again, **running())
    assert place.status().phase == "running"
    place.there.set(again, **ended(75, **disrupted("PreemptionByScheduler")))
    place.there.conclude(NAME, "Failed", reason="DeadlineExceeded")
    found = place.status()
    assert (found.phase, found.exit_code, found.preempted) == ("ended", 75, True)
    assert "a pod of higher priority took its place" in found.reason


def test_of_several_nodes_the_one_that_caused_the_end_is_named(place: Place) -> None:
    place.start("gang")
    pods = place.there.make_pods(NAME)
    for pod, code in zip(pods, (8, 3, 8, 75), strict=True):
        place.there.set(pod, **ended(code))
    place.there.conclude(NAME, "Failed", reason="PodFailurePolicy", message="Container main failed with exit code 3")
    found = place.status()
    assert (found.exit_code, found.reason) == (3, "node 1: exit code 3: bad data")
    for pod in pods:
        place.there.vanish(pod)
    assert place.status().exit_code == 3, "the Job controller's own words say it too"


def test_an_elastic_job_ends_well_with_its_first_node_that_does_and_the_last_that_runs(place: Place) -> None:
    place.start("elastic")
    pods = place.there.make_pods(NAME)
    for pod in pods[:2]:
        place.there.set(pod, **running())
    place.there.set(pods[2], **ended(1))
    assert place.status().phase == "running"
    place.there.set(pods[0], **ended(0))
    assert place.status().phase == "running", "the main worker may still register the model"
    place.there.set(pods[1], **ended(0))
    found = place.status()
    assert (found.phase, found.exit_code) == ("ended", 0)
    assert found.nodes[2:] == (
        "node 2: exit code 1: unexpected failure",
        "node 3: waits for a machine",
    )


def test_a_queue_keeps_a_job_waiting_and_can_take_it_out_again(tmp_path: Path) -> None:
    with cluster(tmp_path) as there:
        place = Place(there, tmp_path, queue="lorot")
        place.start()
        assert place.status().reason == "waits in the cluster's queue lorot"
        there.api.objects["batch/v1/jobs", NAMESPACE, NAME].patch({"spec": {"suspend": False}})
        (pod,) = there.make_pods(NAME)
        there.set(pod, **running())
        assert place.status().phase == "running"
        there.vanish(pod)
        there.api.objects["batch/v1/jobs", NAMESPACE, NAME].patch({"spec": {"suspend": True}})
        assert (place.status().phase, place.status().reason) == ("waiting", "waits in the cluster's queue lorot")


def test_a_job_whose_pods_the_cluster_will_not_make_says_why(place: Place) -> None:
    place.start()
    for number, message in enumerate(["exceeded quota", "violates PodSecurity"]):
        place.there.api.objects["v1/events", NAMESPACE, f"event-{number}"] = {
            "metadata": {"name": f"event-{number}"},
            "involvedObject": {"name": NAME},
            "type": "Warning",
            "reason": "FailedCreate",
            "message": message,
            "lastTimestamp": f"2026-01-01T00:00:0{number}Z",
        }
    assert place.status().reason == "FailedCreate: violates PodSecurity"


def test_a_fixed_gang_is_a_job_set_where_the_cluster_has_them(sets: Place) -> None:
    own = sets.start("gang")
    assert sets.handle["kind"] == "JobSet"
    assert list(sets.there.api.living("v1/services")) == []
    pods = sets.there.make_pods(NAME, "JobSet")
    assert len(pods) == 4
    for pod in pods:
        sets.there.set(pod, **running())
    assert sets.status().phase == "running"
    assert sets.backend.reconcile() == {NAME: JOB_ID}
    # After a restart of the service, and should JobSets be gone from its settings: the same one.
    assert KubernetesBackend(sets.settings).start(own)["uid"] == sets.handle["uid"]
    for pod in pods:
        sets.there.set(pod, **ended(0))
    sets.there.conclude(NAME, "Completed", "JobSet")
    assert (sets.status().phase, sets.status().exit_code) == ("ended", 0)
    sets.backend.remove(NAME, sets.handle)
    assert list(sets.there.api.living("jobset.x-k8s.io/v1alpha2/jobsets")) == []


def test_whether_there_are_job_sets_is_asked_once(sets: Place) -> None:
    sets.start("gang")
    sets.status()
    sets.backend.reconcile()
    asked = [path for path in sets.there.api.paths if path.rstrip("/").endswith("jobset.x-k8s.io/v1alpha2")]
    assert len(asked) == 1


def test_where_job_sets_have_to_be_and_are_not_the_error_says_what_would_work(tmp_path: Path) -> None:
    with cluster(tmp_path) as there:
        place = Place(there, tmp_path, kind="jobset")
        with pytest.raises(ConfigError, match="set kind to auto or job"):
            place.start("gang")


def test_a_cancelled_job_is_there_until_its_last_pod_has_gone(place: Place) -> None:
    place.start("elastic")
    pods = place.there.make_pods(NAME)
    for pod in pods:
        place.there.api.logs[pod] = [b"step 1\n"]
        place.there.set(pod, **running())
        # Pods outlive their Job by their grace.
        place.there.api.objects["v1/pods", NAMESPACE, pod].raw["metadata"]["ownerReferences"] = []
    place.backend.cancel(NAME, place.handle, 30.0)
    assert list(place.there.api.living("batch/v1/jobs")) == []
    assert list(place.there.api.living("v1/services")) == []
    assert (place.status().phase, place.status().reason) == ("running", "stopping")
    place.backend.cancel(NAME, place.handle, 30.0)
    for pod in pods:
        place.there.vanish(pod)
    assert place.status().phase == "gone"
    assert b"".join(place.backend.logs(NAME, place.handle, node=2)) == b"step 1\n", "what was known by then is kept"


def test_pods_get_the_grace_of_the_job_when_it_is_deleted(place: Place) -> None:
    place.start(grace_s=77)
    (pod,) = place.there.make_pods(NAME)
    assert place.there.get("v1/pods", pod)["spec"]["terminationGracePeriodSeconds"] == 87
    place.there.set(pod, **running())
    place.backend.cancel(NAME, place.handle, 77)
    assert place.there.api.deletions == [{"propagationPolicy": "Background"}]


def test_a_job_that_has_ended_is_cleared_away_and_its_logs_and_end_stay(place: Place) -> None:
    own = place.start("gang")
    for pod in place.there.make_pods(NAME):
        place.there.api.logs[pod] = [b"of " + pod.encode() + b"\n"]
        place.there.set(pod, **ended(4))
    place.there.conclude(NAME, "Failed", reason="PodFailurePolicy")
    before = place.status()
    assert (own.folder / "attempts" / "1" / "log-node2.txt").exists(), "the record takes it from there"
    place.backend.remove(NAME, place.handle)
    place.backend.remove(NAME, place.handle)
    for kind in ("batch/v1/jobs", "v1/services", "v1/configmaps", "v1/pods"):
        assert list(place.there.api.living(kind)) == []
    assert (own.folder / "attempts" / "1" / "log-node2.txt").read_text() == f"of {NAME}-2-0\n"
    assert place.status() == before
    assert b"".join(place.backend.logs(NAME, {}, node=3)) == f"of {NAME}-3-0\n".encode()


def test_where_no_log_can_be_kept_the_end_is_told_and_nothing_is_cleared_away(place: Place) -> None:
    own = place.start()
    (pod,) = place.there.make_pods(NAME)
    place.there.api.logs[pod] = [b"one\n"]
    place.there.set(pod, **ended(0))
    place.there.conclude(NAME, "Complete")
    (own.folder / "attempts" / "1").rmdir()
    (own.folder / "attempts" / "1").touch()
    assert (place.status().phase, place.status().exit_code) == ("ended", 0)
    with pytest.raises(BackendError, match="the log cannot be kept"):
        place.backend.remove(NAME, place.handle)
    assert list(place.there.api.living("batch/v1/jobs")) == [NAME]


def test_a_machine_that_is_gone_with_its_logs_does_not_keep_a_job_from_being_cleared_away(place: Place) -> None:
    place.start()
    (pod,) = place.there.make_pods(NAME)
    place.there.set(pod, **ended(1))
    place.there.conclude(NAME, "Failed")
    place.there.api.refusals["get", "pods/log"] = (500, "no route to host")
    place.backend.remove(NAME, place.handle)
    assert list(place.there.api.living("batch/v1/jobs")) == []


def test_logs_are_those_of_the_node_that_is_asked_for(place: Place) -> None:
    place.start("elastic")
    first = place.there.make_pods(NAME)
    second = place.there.make_pods(NAME, generation=1)
    for pod in first:
        place.there.api.logs[pod] = [b"first of " + pod[-3:].encode() + b"\n"]
        place.there.set(pod, **ended(75))
    place.there.api.logs[second[1]] = [b"one\n", b"two\n", b"three\n"]
    place.there.set(second[1], **running())
    assert b"".join(place.backend.logs(NAME, place.handle, node=1)) == b"first of 1-0\none\ntwo\nthree\n"
    assert b"".join(place.backend.logs(NAME, place.handle, node=1, tail=2)) == b"two\nthree\n"
    assert b"".join(place.backend.logs(NAME, place.handle, node=2)) == b"first of 2-0\n"


class Follower:
    """Reads a log on a thread of its own."""

    def __init__(self, place: Place, **options: Any) -> None:
        self.text, self.silences, self.wanted, self.error = b"", 0, True, ""
        self.places: list[str] = []
        self._options = options
        self._place = place
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        try:
            for piece in self._place.backend.logs(
                NAME, self._place.handle, follow=lambda: self.wanted, **self._options
            ):
                self.places += [piece.place] if isinstance(piece, Placed) else []
                self.text += piece
                self.silences += not piece
        except Exception as error:
            self.error = repr(error)


def test_a_log_is_followed_from_before_the_start_over_a_new_pod_to_the_end(place: Place) -> None:
    place.start()
    follower = Follower(place)
    await_(lambda: follower.silences > 0, "the log", 20)
    (pod,) = place.there.make_pods(NAME)
    place.there.api.logs[pod] = [b"one\n"]
    place.there.set(pod, **running())
    await_(lambda: follower.text == b"one\n", "the log", 20)
    place.there.api.logs[pod].append(b"two\n")
    await_(lambda: follower.text == b"one\ntwo\n", "the log", 20)
    place.there.set(pod, **ended(75, **disrupted("DeletionByPodGC")))
    place.there.api.ended_logs.add(pod)
    (again,) = place.there.make_pods(NAME, generation=1)
    place.there.api.logs[again] = [b"three\n", b"without an end"]
    place.there.api.ended_logs.add(again)
    place.there.set(again, **ended(0))
    place.there.conclude(NAME, "Complete")
    follower.thread.join(120)
    assert not follower.thread.is_alive()
    assert (follower.text, follower.error) == (b"one\ntwo\nthree\nwithout an end", "")


def test_a_connection_that_breaks_within_a_line_loses_and_repeats_nothing(place: Place) -> None:
    place.start()
    (pod,) = place.there.make_pods(NAME)
    place.there.api.logs[pod] = [b"line %d\n" % number for number in range(25)]
    place.there.api.breaks[pod] = 7
    place.there.set(pod, **running())
    follower = Follower(place)
    await_(lambda: follower.text.count(b"\n") == 25, "the log", 20)
    place.there.api.ended_logs.add(pod)
    place.there.set(pod, **ended(0))
    place.there.conclude(NAME, "Complete")
    follower.thread.join(120)
    assert pod not in place.there.api.breaks, "it did break"
    assert follower.text == b"".join(place.there.api.logs[pod])


def test_a_service_that_was_restarted_goes_on_with_a_tail_where_it_was(place: Place) -> None:
    place.start()
    (pod,) = place.there.make_pods(NAME)
    place.there.api.logs[pod] = [b"line %d\n" % number for number in range(25)]
    place.there.set(pod, **running())
    tail = Follower(place, tail=5)
    await_(lambda: tail.text.count(b"\n") == 5, "the log", 20)
    tail.wanted = False
    tail.thread.join(120)
    place.there.api.logs[pod] += [b"later %d\n" % number for number in range(3)]
    place.backend.close()
    place.backend = KubernetesBackend(place.settings)
    again = Follower(place, since=tail.places[0])
    await_(lambda: b"later 2" in again.text, "the log", 20)
    (newer,) = place.there.make_pods(NAME, generation=1)
    place.there.api.logs[newer] = [b"end\n"]
    place.there.api.ended_logs |= {pod, newer}
    place.there.set(pod, **ended(75, **disrupted("DeletionByPodGC")))
    place.there.set(newer, **ended(0))
    place.there.conclude(NAME, "Complete")
    again.thread.join(120)
    rest = b"later 0\nlater 1\nlater 2\nend\n"
    assert (again.text, again.error) == (tail.text + rest, "")
    del place.there.api.logs[pod][:]
    lost = Follower(place, since=tail.places[0])
    lost.thread.join(120)
    assert (lost.text, lost.error.partition("(")[0]) == (b"", "PlaceLostError")


def test_a_follower_is_told_of_a_log_that_cannot_be_read(place: Place) -> None:
    place.start()
    (pod,) = place.there.make_pods(NAME)
    place.there.set(pod, **running())
    place.there.api.refusals["get", "pods/log"] = (400, "container is waiting to start")
    follower = Follower(place)
    follower.thread.join(120)
    assert follower.error.startswith("BackendError")
    assert "waiting to start" in follower.error


def test_a_follower_can_stop_while_nothing_is_written(place: Place) -> None:
    place.start()
    (pod,) = place.there.make_pods(NAME)
    place.there.api.logs[pod] = [b"old\n", b"new\n"]
    place.there.set(pod, **running())
    follower = Follower(place, tail=1)
    await_(lambda: follower.text == b"new\n" and follower.silences > 0, "the log", 20)
    follower.wanted = False
    follower.thread.join(120)
    assert not follower.thread.is_alive()


def test_a_service_that_was_restarted_finds_its_jobs_and_no_others(place: Place) -> None:
    place.start("elastic")
    place.there.api.objects["batch/v1/jobs", NAMESPACE, "foreign"] = {"metadata": {"name": "foreign"}, "spec": {}}
    fresh = KubernetesBackend(place.settings)
    assert fresh.reconcile() == {NAME: JOB_ID}
    assert fresh.status(NAME, {}).phase == "waiting"
    assert load("kubernetes", place.settings).name == "kubernetes"


def test_what_the_account_may_not_do_is_named(place: Place) -> None:
    message = 'jobs.batch is forbidden: User "system:serviceaccount:lorot:x" cannot create resource "jobs"'
    place.there.api.refusals["create", "jobs"] = (403, message)
    with pytest.raises(BackendError) as caught:
        place.start()
    for part in (message, "the verb 'create' on jobs.batch in namespace jobs", "deploy/base/access.yaml"):
        assert part in str(caught.value)
    assert caught.value.exit_code == 9
    assert list(place.there.api.living("batch/v1/jobs")) == []


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (401, BackendError, "does not know who asks"),
        (422, ConfigError, "finds the job faulty"),
        (429, BackendError, "answers 429"),
        (500, BackendError, "answers 500"),
    ],
)
def test_refusals_say_whose_turn_it_is(place: Place, status: int, error: type[Exception], words: str) -> None:
    place.there.api.refusals["create", "jobs"] = (status, "because")
    with pytest.raises(error, match=f"{words}.*because"):
        place.start()


def test_a_server_that_is_away_is_an_error_and_its_return_is_noticed(place: Place) -> None:
    place.start()
    place.there.go()
    for call in (
        lambda: place.backend.status(NAME, place.handle),
        lambda: place.backend.cancel(NAME, place.handle, 1.0),
        lambda: place.backend.reconcile(),
        lambda: list(place.backend.logs(NAME, place.handle)),
    ):
        with pytest.raises(BackendError, match=r"the cluster at http://127.0.0.1:\d+ does not answer"):
            call()
    place.there.come()
    assert place.status().phase == "waiting"


def test_without_a_way_to_a_cluster_the_error_says_how_to_give_one(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path / "empty"):
        if path.name == "empty":
            path.write_text("")
        backend = KubernetesBackend(settings(tmp_path, kubeconfig=str(path)))
        with pytest.raises(BackendError, match=r"backends\.kubernetes\.kubeconfig names a file"):
            backend.reconcile()


def granted() -> set[tuple[str, str, str]]:
    documents = yaml.safe_load_all((ROOT / "deploy/base/access.yaml").read_text())
    (role,) = [document for document in documents if document["kind"] == "Role"]
    return {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def test_the_role_allows_what_the_backend_does_and_nothing_else(tmp_path: Path) -> None:
    used: set[tuple[str, str, str]] = set()
    for jobsets, shape in ((False, "elastic"), (True, "gang")):
        with cluster(tmp_path, jobsets=jobsets) as there:
            place = Place(there, tmp_path)
            place.start(shape)
            place.status()
            kind = str(place.handle["kind"])
            for pod in there.make_pods(NAME, kind):
                there.set(pod, **running())
            place.status()
            list(place.backend.logs(NAME, place.handle))
            place.backend.reconcile()
            place.backend.cancel(NAME, place.handle, 1.0)
            place.backend.remove(NAME, place.handle)
            used |= there.api.used
    assert used == granted()


@pytest.mark.parametrize("overlay", sorted(path.name for path in (ROOT / "deploy/overlays").iterdir()))
def test_kubectl_builds_each_overlay_as_the_tests_read_it(overlay: str) -> None:
    from tests.service.kustomization import build

    program = shutil.which("kubectl")
    assert program, "kubectl is needed to build the overlays: install Debian's kubernetes-client, or kubectl itself"
    line = [program, "kustomize", str(ROOT / "deploy/overlays" / overlay)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, env={**os.environ, "HOME": "/nonexistent"})
    assert done.returncode == 0, done.stderr

    def named(documents: Any) -> dict[tuple[str, str], Any]:
        return {(document["kind"], document["metadata"]["name"]): document for document in documents}

    assert named(yaml.safe_load_all(done.stdout)) == named(build(ROOT / "deploy/overlays" / overlay))


def test_settings_of_the_whole_service_can_name_the_cluster(tmp_path: Path) -> None:
    with cluster(tmp_path) as there:
        service: ServiceSettings = settings(tmp_path, kubeconfig=str(there.kubeconfig), context="test")
        backend = load("kubernetes", service)
        backend.check(job())
        assert backend.reconcile() == {}
        backend.close()
        assert backend.reconcile() == {}, "closed, it connects anew"


def test_a_job_that_was_taken_with_a_priority_starts_though_it_has_no_class_any_more(place: Place) -> None:
    own = place.start(priority=5)
    with pytest.raises(ConfigError, match="priority: 5 has no class"):
        place.backend.check(own.job)
    assert place.status().phase == "waiting"
