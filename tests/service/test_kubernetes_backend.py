"""The kubernetes backend without a cluster: what pods and jobs say, what is refused, what is left in the folder."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
from urllib3.response import HTTPResponse

from service.errors import ConfigError
from service.jobs import attempt_files
from service.jobs.backends.kubernetes import logs as kubernetes_logs
from service.jobs.backends.kubernetes.backend import KubernetesBackend
from service.jobs.backends.kubernetes.logs import _Lines, follow
from service.jobs.backends.kubernetes.pods import Pod, seconds
from service.jobs.backends.kubernetes.status import status
from service.jobs.places import Place, Placed, PlaceLostError
from tests.service.kubernetes_orders import CONTAINER, JOB_ID, NAME, job, settings

DIGEST = "sha256:" + "0f" * 32


def pod(node: int = 0, *, created: int = 0, phase: str = "Pending", **given: Any) -> Pod:
    labels = {"batch.kubernetes.io/job-completion-index": str(node)}
    about = {"name": f"p-{node}-{created}", "labels": labels, "creationTimestamp": f"2026-01-01T00:00:{created:02d}Z"}
    return Pod({"metadata": about, "status": {"phase": phase, **given}})


def ran(code: int, *, node: int = 0, created: int = 0, reason: str = "", at: int = 0, **given: Any) -> Pod:
    end = {"exitCode": code, "reason": reason, "finishedAt": f"2026-01-01T01:00:{at:02d}Z"}
    state = {"name": "main", "imageID": f"x@{DIGEST}", "state": {"terminated": end}}
    phase = "Failed" if code else "Succeeded"
    return pod(node, created=created, phase=phase, containerStatuses=[state], **given)


def works(node: int = 0, created: int = 0) -> Pod:
    state = {"name": "main", "state": {"running": {"startedAt": "2026-01-01T00:30:00Z"}}}
    return pod(node, created=created, phase="Running", containerStatuses=[state])


def workload(*, condition: str = "", reason: str = "", message: str = "", **spec: Any) -> dict[str, Any]:
    conditions = [{"type": condition, "status": "True", "reason": reason, "message": message}] if condition else []
    return {"kind": "Job", "metadata": {"name": NAME}, "spec": spec, "status": {"conditions": conditions}}


DISRUPTED = [{"type": "DisruptionTarget", "status": "True", "reason": "TerminationByKubelet"}]


def test_a_condition_that_is_no_longer_true_counts_as_none() -> None:
    found = workload(condition="Failed")
    found["status"]["conditions"][0]["status"] = "False"
    assert status(found, [works()]).phase == "running"
    undisturbed = pod(phase="Failed", conditions=[{**DISRUPTED[0], "status": "False"}])
    assert not undisturbed.preempted


@pytest.mark.parametrize(
    ("codes", "cause"),
    [
        ({0: 8, 1: 1, 2: 75}, 1),
        ({0: 1, 1: 4, 2: 1}, 1),
        ({0: 8, 1: 75, 2: 8}, 2),
        ({0: 1, 1: 1, 2: 1}, 2),
    ],
)
def test_the_cause_is_a_node_of_its_own_fault_before_those_that_followed(codes: dict[int, int], cause: int) -> None:
    # The later the node's number, the earlier it has ended.
    pods = [ran(code, node=node, at=30 - node) for node, code in codes.items()]
    found = status(workload(condition="Failed"), pods)
    assert found.reason.startswith(f"node {cause}: ")
    assert found.exit_code == codes[cause]


def test_a_gang_that_was_pre_empted_in_part_did_not_fail_by_itself() -> None:
    pods = [ran(75, node=0, conditions=DISRUPTED), ran(75, node=1, conditions=DISRUPTED)]
    found = status(workload(condition="Failed"), pods)
    assert found.preempted
    # Killed when its grace was over; the other one has lost its peer by that.
    taken = [ran(137, node=0, at=9, conditions=DISRUPTED), ran(8, node=1)]
    assert status(workload(condition="Failed"), taken).preempted
    # One that failed by itself is the cause even where another was taken before.
    mixed = status(workload(condition="Failed"), [taken[0], ran(1, node=1, at=20)])
    assert not mixed.preempted
    assert mixed.exit_code == 1


def test_an_earlier_try_of_a_node_is_not_its_end() -> None:
    found = status(workload(), [ran(1, created=1), works(created=5)])
    assert (found.phase, found.nodes) == ("running", ("node 0: running on a machine",))


def test_the_words_of_the_job_controller_tell_the_exit_code_when_its_pods_are_gone() -> None:
    message = "Container main for pod jobs/x-0-abc failed with exit code 5 matching FailJob rule at index 2"
    found = status(workload(condition="Failed", reason="PodFailurePolicy", message=message), [])
    assert (found.phase, found.exit_code, found.reason) == ("ended", 5, message)
    unknown = status(workload(condition="Failed", reason="DeadlineExceeded"), [])
    assert (unknown.exit_code, unknown.reason) == (None, "DeadlineExceeded")


def test_an_elastic_job_that_must_not_go_on_has_failed_even_where_one_node_ended_well() -> None:
    pods = [ran(0, node=0), ran(3, node=1)]
    final = workload(condition="Failed", reason="PodFailurePolicy", maxFailedIndexes=1)
    assert status(final, pods).exit_code == 3
    assert status(workload(condition="Failed", reason="FailedIndexes", maxFailedIndexes=1), pods).exit_code == 0
    fixed = workload(condition="Failed", reason="FailedIndexes", maxFailedIndexes=0)
    assert status(fixed, pods).exit_code == 3


def test_a_fixed_gang_is_not_over_while_a_node_is_still_to_come() -> None:
    assert status(workload(maxFailedIndexes=0), [ran(0, node=0), pod(1)]).phase == "waiting"


def test_a_pod_that_ended_without_an_exit_code_says_what_its_machine_said() -> None:
    evicted = pod(phase="Failed", reason="Evicted", message="Usage of EmptyDir volume exceeds the limit")
    found = status(workload(condition="Failed"), [evicted])
    assert (found.exit_code, found.preempted, found.reason) == (
        None,
        False,
        "Usage of EmptyDir volume exceeds the limit",
    )
    silent = status(workload(condition="Failed"), [pod(phase="Failed")])
    assert silent.reason == "it ended, and nobody knows how"


def test_a_signal_is_told_by_its_number_and_a_program_that_is_not_there_by_its_message() -> None:
    assert ran(139).end() == "exit code 139: ended by signal 11"
    missing = ran(128, reason="StartError")
    missing.raw["status"]["containerStatuses"][0]["state"]["terminated"]["message"] = 'exec: "lorot": not found\n'
    assert missing.end() == 'exit code 128; exec: "lorot": not found'


def test_what_is_wrong_is_told_before_what_takes_time() -> None:
    broken = {"name": "main", "image": "x", "state": {"waiting": {"reason": "ErrImagePull", "message": "denied"}}}
    pods = [pod(0), pod(1, containerStatuses=[broken])]
    assert status(workload(), pods).reason == "node 1: image x cannot be pulled: denied"


def test_a_node_that_waits_for_the_rendezvous_is_not_taken_for_one_that_runs() -> None:
    first = [{"name": "await-rendezvous", "state": {"running": {}}}]
    found = status(workload(), [pod(initContainerStatuses=first)])
    assert (found.phase, found.reason) == ("waiting", "waits for the rendezvous")


def test_a_deleted_attempt_is_gone_only_with_its_pods() -> None:
    assert status(None, []).phase == "gone"
    assert status(None, [works()]).phase == "running"
    assert status(None, [ran(75)]).phase == "gone"
    leaving = workload()
    leaving["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert status(leaving, [works()]).reason == "stopping"


def test_times_and_digests_are_read() -> None:
    assert (seconds("1970-01-01T00:01:00Z"), seconds(None)) == (60.0, 0.0)
    assert ran(0).image_digest == DIGEST
    assert works().image_digest == ""


def wrote(created: int) -> Pod:
    end = {"exitCode": 0, "startedAt": "2026-01-01T00:30:00Z", "finishedAt": "2026-01-01T01:00:00Z"}
    state = {"name": "main", "state": {"terminated": end}}
    return pod(created=created, phase="Succeeded", containerStatuses=[state])


class Logs:
    """A cluster that knows nothing but logs: of each pod what its connections give, one after the other."""

    def __init__(self, **pieces: list[bytes]) -> None:
        self._pieces = pieces
        self.asked: list[tuple[str, int | None]] = []

    def log(
        self, pod: str, container: str, *, tail: int | None = None, follow: bool = False, **rest: Any
    ) -> HTTPResponse:
        if follow:
            self.asked.append((pod, tail))
        text = self._pieces[pod].pop(0) if follow else self._pieces[pod][0]
        return HTTPResponse(io.BytesIO(text), preload_content=False)


def stamped(*numbers: int) -> bytes:
    return b"".join(b"2026-01-01T00:00:%02dZ %d\n" % (number, number) for number in numbers)


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_lines_come_whole_and_once_however_they_are_cut(cut: int) -> None:
    text = b"".join(
        [
            b"2026-01-01T00:00:00.1Z one\n",
            b"2026-01-01T00:00:00.12Z two\n",
            # Two at once, and one that another stream has written before them.
            b"2026-01-01T00:00:00.12Z two\n",
            b"2026-01-01T00:00:00.09Z three\n",
            b"2026-01-01T00:00:00.123456789Z \n",
            b"2026-01-01T00:00:01Z five\n",
        ]
    )
    cluster, lines = cast(Any, Logs(p=[text, text])), _Lines("p", None, None)
    lines.open(cluster)
    told = [piece for at in range(0, 90, cut) for piece in lines.take(text[at : at + cut])]
    # Anew from the beginning, as after a broken connection.
    lines.open(cluster)
    told += [piece for at in range(0, len(text), cut) for piece in lines.take(text[at : at + cut])]
    assert b"".join(told) + lines.rest() == b"one\ntwo\ntwo\nthree\n\nfive\n"
    assert all(told), "an empty piece says that there is nothing just now"


def test_what_was_put_away_while_a_connection_was_broken_is_said_to_be_missing() -> None:
    cluster, lines = cast(Any, Logs(p=[stamped(1, 2), stamped(8, 9)])), _Lines("p", None, None)
    lines.open(cluster)
    assert b"".join(lines.take(stamped(1, 2))) == b"1\n2\n"
    lines.open(cluster)
    told = b"".join(lines.take(stamped(8, 9)))
    assert told.startswith(b"[")
    assert told.endswith(b"lines may be missing]\n8\n9\n")


def test_a_connection_to_a_pod_that_has_ended_may_break_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes_logs, "_LOOK_S", 0.0)

    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > 0:
                raise ConnectionResetError
            return super().read(40)

    logs = Logs(**{"p-0-0": [stamped(1, 2, 3)] * 2})
    answers = iter([HTTPResponse(Broken(stamped(1, 2, 3)), preload_content=False)])
    whole = logs.log
    monkeypatch.setattr(
        logs, "log", lambda *given, **more: (more.get("follow") and next(answers, None)) or whole(*given, **more)
    )
    assert b"".join(follow(cast(Any, logs), lambda: ([wrote(0)], False), lambda: True)) == b"1\n2\n3\n"


def test_a_pods_log_is_gone_on_with_from_a_place_and_so_are_those_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes_logs, "_LOOK_S", 0.0)
    pods = ([wrote(0), wrote(1), wrote(2)], False)
    lines = _Lines("p-0-1", 9, None)
    lines.open(cast(Any, Logs(**{"p-0-1": [b""]})))
    piece = next(lines.take(stamped(4)))
    assert isinstance(piece, Placed)
    place = Place.parse(piece.place)
    logs = Logs(**{"p-0-1": [stamped(3, 4, 5)], "p-0-2": [stamped(6)]})
    assert b"".join(follow(cast(Any, logs), lambda: pods, lambda: True, since=place)) == b"4\n5\n6\n"
    for left in ([wrote(0), wrote(2)], [wrote(0), wrote(1)]):
        gone = follow(cast(Any, Logs(**{"p-0-1": [stamped(5, 6)]})), lambda: (left, False), lambda: True, since=place)  # noqa: B023
        with pytest.raises(PlaceLostError):
            next(gone)


@pytest.mark.parametrize("with_an_older_one", [False, True])
def test_the_tail_of_a_pod_whose_connection_broke_is_read_to_its_end_before_the_pod_that_took_its_place(
    monkeypatch: pytest.MonkeyPatch, with_an_older_one: bool
) -> None:
    monkeypatch.setattr(kubernetes_logs, "_LOOK_S", 0.0)
    logs = Logs(**{"p-0-0": [], "p-0-1": [stamped(1, 2), stamped(1, 2, 3, 4)], "p-0-2": [stamped(5, 6)]})
    older = [wrote(0)] if with_an_older_one else []
    looks = iter([([works(created=1)], True), ([wrote(1), wrote(2)], False)])
    last: tuple[list[Pod], bool] = ([], True)

    def pods() -> tuple[list[Pod], bool]:
        nonlocal last
        last = next(looks, last)
        return [*older, *last[0]], last[1]

    told = follow(cast(Any, logs), pods, lambda: True, tail=9)
    assert b"".join(told) == b"1\n2\n3\n4\n5\n6\n"
    # The one that came later is wanted from its first line.
    assert logs.asked == [("p-0-1", 9), ("p-0-1", None), ("p-0-2", None)]


def test_a_pod_that_was_replaced_before_it_had_begun_keeps_no_tail_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes_logs, "_LOOK_S", 0.0)
    logs = Logs(**{"p-0-2": [stamped(5, 6)]})
    looks = iter([([pod(created=1)], True), ([pod(created=1, phase="Failed"), wrote(2)], False)])
    last: tuple[list[Pod], bool] = ([], True)

    def pods() -> tuple[list[Pod], bool]:
        nonlocal last
        last = next(looks, last)
        return last

    assert b"".join(follow(cast(Any, logs), pods, lambda: True, tail=9)) == b"5\n6\n"


@pytest.mark.parametrize(
    ("given", "place", "words"),
    [
        ({"mounts": ("/srv",)}, {}, "mounts: a cluster shows no folders"),
        ({"image": "evil/x:1"}, {"images": ["lorot:*", "registry.lan/*"]}, "those are lorot:\\*, registry.lan/\\*"),
        ({"nodes": "2"}, {"results_claim": None}, "ReadWriteMany"),
        ({"priority": 5}, {}, "priority: 5 has no class in this cluster; those that have are 0, and"),
        ({"priority": 5}, {"priority_classes": {-1: "a", 10: "b"}}, "those that have are -1, 0, 10, and backends"),
    ],
)
def test_what_no_cluster_can_do_is_refused(
    tmp_path: Path, given: dict[str, Any], place: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        KubernetesBackend(settings(tmp_path, **place)).check(job(**given))


def test_what_a_cluster_can_do_passes_without_asking_one(tmp_path: Path) -> None:
    place = {"kubeconfig": str(tmp_path / "missing"), "priority_classes": {10: "high"}}
    backend = KubernetesBackend(settings(tmp_path, **place))
    for given in ({}, CONTAINER, {"nodes": "2:4"}, {"image": "a/b:1"}, {"secrets": {"A": "a"}}, {"priority": 10}):
        backend.check(job(**given))


@pytest.mark.parametrize("given", [{}, CONTAINER])
@pytest.mark.parametrize("where", ["worker_tracking_uri", "tracking_uri", "MLFLOW_TRACKING_URI"])
def test_a_password_in_the_tracking_uri_would_be_seen_in_the_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], where: str
) -> None:
    uri, service = "http://me:hunter2@mlflow:5000", settings(tmp_path)
    if where.isupper():
        monkeypatch.setenv(where, uri)
        service = service.model_copy(update={"tracking_uri": None})
    else:
        service = service.model_copy(update={where: uri})
    with pytest.raises(ConfigError, match="job_secret") as caught:
        KubernetesBackend(service).check(job(**given))
    assert "hunter2" not in str(caught.value)


def test_the_folder_of_an_attempt_is_found_by_its_name_alone(tmp_path: Path) -> None:
    service = settings(tmp_path)
    note = service.results / JOB_ID / "attempts" / "1" / "exit.json"
    note.parent.mkdir(parents=True)
    job_folder = service.results / JOB_ID
    assert attempt_files.place(service.results, NAME, {}) == (job_folder, 1)
    assert attempt_files.place(service.results, NAME, {"folder": "/elsewhere"}) == (Path("/elsewhere"), 1)
    assert attempt_files.log(job_folder, 1, 0).parent == note.parent
    note.write_text(json.dumps({"exit_code": 0}))
    assert attempt_files.noted(job_folder, 1) is None, "a note that is cut short says nothing"


def test_the_official_client_is_loaded_when_a_cluster_is_asked_and_not_before() -> None:
    program = (
        "import sys; import service.jobs.backends.kubernetes as place; "
        "from service.jobs.settings import ServiceSettings; "
        "place.make(ServiceSettings()); print([name for name in ('kubernetes', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
