"""What a Docker engine is asked for, what is refused before that, and what its answers mean. No engine runs here."""

import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from service.errors import BackendError, ConfigError
from service.jobs.backends import Order, Status
from service.jobs.backends.docker import containers, ends
from service.jobs.backends.docker.backend import DockerBackend
from service.jobs.job import Job
from service.jobs.settings import ServiceSettings
from service.jobs.spec import JobSpec, num_bytes

RUN = "0123456789abcdef0123456789abcdef"
NAME = "lorot-0123456789ab-1"


@pytest.fixture
def settings(tmp_path: Path) -> ServiceSettings:
    for name in ("data", "state", "secrets", "extra/deep", "jobs"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "secrets/hub").write_text("s3cret\n")
    return ServiceSettings.model_validate(
        {
            "state": tmp_path / "state",
            "results": tmp_path / "jobs",
            "data_roots": [tmp_path / "data"],
            "mounts": [tmp_path / "extra"],
            "secrets": tmp_path / "secrets",
            "tracking_uri": "http://mlflow:5000",
            "backends": {
                "docker": {
                    "enabled": True,
                    "url": f"unix://{tmp_path}/docker.sock",
                    "images": ["registry.lan/team/*"],
                    "user": f"{os.getuid() or 1000}:{os.getgid() or 1000}",
                }
            },
        }
    )


def order(settings: ServiceSettings, line: Sequence[str] = ("lorot", "train", "/job/job.yaml"), **spec: Any) -> Order:
    job = Job(RUN, "1", JobSpec.model_validate({"backend": "docker", **spec}), "starting")
    return Order(NAME, job, settings.results / RUN, tuple(line), {"LOROT_RUN_ID": RUN})


def container_order(settings: ServiceSettings, **spec: Any) -> Order:
    return order(settings, ["true"], kind="container", command=["true"], **spec)


def variables(body: dict[str, Any]) -> dict[str, str]:
    return dict(entry.split("=", 1) for entry in body["Env"])


def mounted(body: dict[str, Any]) -> dict[str, tuple[str, bool]]:
    return {mount["Target"]: (mount["Source"], mount["ReadOnly"]) for mount in body["HostConfig"]["Mounts"]}


def check(settings: ServiceSettings, **spec: Any) -> None:
    DockerBackend(settings).check(order(settings, **spec).job)


def changed(settings: ServiceSettings, **docker: Any) -> ServiceSettings:
    own = settings.backends.docker.model_copy(update=docker)
    return settings.model_copy(update={"backends": settings.backends.model_copy(update={"docker": own})})


def test_a_container_has_no_rights_beyond_an_ordinary_users(settings: ServiceSettings) -> None:
    body = containers.container(order(settings), settings, 0)
    host = body["HostConfig"]
    assert body["User"].split(":")[0] != "0"
    assert host["CapDrop"] == ["ALL"]
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert host["ReadonlyRootfs"] is True
    assert host["PidsLimit"] == 4096
    assert host["NetworkMode"] == "bridge"
    assert host["IpcMode"] == "private"
    assert not {"Privileged", "CapAdd", "Devices", "PidMode", "UsernsMode", "Binds", "VolumesFrom"} & host.keys()
    assert host["RestartPolicy"] == {"Name": "no"}
    assert host["Init"] is True


def test_resources_become_limits_without_swap_on_top(settings: ServiceSettings) -> None:
    resources = {"cpus": 2.5, "memory": "8GiB", "shm": "512MiB"}
    host = containers.container(order(settings, resources=resources), settings, 0)["HostConfig"]
    assert (host["NanoCpus"], host["Memory"], host["MemorySwap"], host["ShmSize"]) == (
        2_500_000_000,
        8_589_934_592,
        8_589_934_592,
        536_870_912,
    )
    assert "Memory" not in containers.container(order(settings), settings, 0)["HostConfig"]


@pytest.mark.parametrize(
    ("text", "count"),
    [("1", 1), ("7B", 7), ("3k", 3000), ("8GB", 8 * 10**9), ("8Gi", 8 * 2**30), ("2TiB", 2**41), ("5M", 5 * 10**6)],
)
def test_amounts_of_memory_are_read_as_they_are_written(text: str, count: int) -> None:
    assert num_bytes(text) == count


def test_each_node_gets_its_own_gpus_by_name(settings: ServiceSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    two = replace(order(settings, nodes="2", resources={"gpus": 2}), gpus=(0, 1, 2, 4))

    def devices(node: int) -> list[str]:
        (request,) = containers.container(two, settings, node)["HostConfig"]["DeviceRequests"]
        assert request["Capabilities"] == [["gpu"]]
        return list(request["DeviceIDs"])

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert (devices(0), devices(1)) == (["0", "1"], ["2", "4"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4,5,6,GPU-aa")
    assert (devices(0), devices(1)) == (["3", "4"], ["5", "GPU-aa"])
    assert "DeviceRequests" not in containers.container(order(settings), settings, 0)["HostConfig"]


@pytest.mark.parametrize("written", ["{link}", "{link}/", "{link}/."])
def test_a_link_that_was_turned_after_the_check_is_not_mounted(
    settings: ServiceSettings, tmp_path: Path, written: str
) -> None:
    link = tmp_path / "extra/link"
    link.symlink_to(tmp_path / "extra/deep")
    made = order(settings, mounts=[written.format(link=link)])
    containers.check(made.job, settings)
    for other, said in ((tmp_path, "no job may see"), (tmp_path / "run", "not in a folder")):
        link.unlink()
        link.symlink_to(other)
        with pytest.raises(ConfigError, match=said):
            containers.container(made, settings, 0)


def test_a_job_writes_to_its_run_folder_and_nowhere_else(settings: ServiceSettings, tmp_path: Path) -> None:
    found = mounted(containers.container(order(settings, mounts=[str(tmp_path / "extra/deep")]), settings, 0))
    assert found == {
        str(tmp_path / "extra/deep"): (str(tmp_path / "extra/deep"), True),
        str(tmp_path / "data"): (str(tmp_path / "data"), True),
        "/job": (str(tmp_path / "jobs" / RUN), True),
        "/job/run": (str(tmp_path / "jobs" / RUN / "run"), False),
    }


def test_a_plain_container_sees_of_the_jobs_folder_only_its_outputs(settings: ServiceSettings, tmp_path: Path) -> None:
    found = mounted(containers.container(container_order(settings), settings, 0))
    assert found == {
        str(tmp_path / "data"): (str(tmp_path / "data"), True),
        "/results": (str(tmp_path / "jobs" / RUN / "outputs"), False),
    }


def test_a_data_root_that_is_a_link_is_there_under_both_names(settings: ServiceSettings, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "data")
    linked = settings.model_copy(update={"data_roots": (tmp_path / "link", tmp_path / "missing")})
    found = mounted(containers.container(container_order(settings), linked, 0))
    assert found[str(tmp_path / "link")] == found[str(tmp_path / "data")] == (str(tmp_path / "data"), True)
    assert str(tmp_path / "missing") not in found


def test_the_command_is_run_as_it_is_whatever_entry_point_an_image_has(settings: ServiceSettings) -> None:
    body = containers.container(order(settings, ["python", "-c", "print('$HOME')"]), settings, 0)
    assert (body["Entrypoint"], body["Cmd"]) == (["python"], ["-c", "print('$HOME')"])


def test_several_nodes_meet_on_a_network_of_their_own(settings: ServiceSettings) -> None:
    several = order(settings, ["lorot", "train", "--rdzv", "{rendezvous}"], nodes="1:2")
    first, second = (containers.container(several, settings, node) for node in range(2))
    assert first["Cmd"] == second["Cmd"] == ["train", "--rdzv", f"{NAME}-rdzv:29400"]
    assert first["HostConfig"]["NetworkMode"] == NAME
    assert [body["Labels"]["lorot.node"] for body in (first, second)] == ["0", "1"]
    assert {body["Labels"]["lorot.attempt"] for body in (first, second)} == {NAME}
    assert {body["Labels"]["lorot.job"] for body in (first, second)} == {RUN}
    place = containers.container(several, settings, None)
    assert (place["Entrypoint"], place["Cmd"]) == (["lorot"], ["rendezvous", "--port", "29400"])
    assert containers.meets(several)
    assert not containers.meets(order(settings))


def test_an_image_that_asks_for_all_gpus_sees_those_of_its_job(settings: ServiceSettings) -> None:
    without = variables(containers.container(order(settings), settings, 0))
    assert (without["NVIDIA_VISIBLE_DEVICES"], without["CUDA_VISIBLE_DEVICES"]) == ("void", "")
    made = replace(order(settings, resources={"gpus": 2}), gpus=(1, 3))
    own = variables(containers.container(made, settings, 0))
    assert (own["NVIDIA_VISIBLE_DEVICES"], own["CUDA_VISIBLE_DEVICES"]) == ("1,3", "0,1")


def test_the_rendezvous_gets_neither_data_nor_results_nor_secrets(settings: ServiceSettings) -> None:
    several = order(settings, ["run", "{rendezvous}"], nodes="2", secrets={"TOKEN": "hub"}, image="registry.lan/team/a")
    place = containers.container(several, settings, None)
    assert mounted(place) == {}
    assert "TOKEN" not in variables(place)


def test_secrets_are_variables_and_in_no_label(settings: ServiceSettings) -> None:
    body = containers.container(order(settings, secrets={"TOKEN": "hub"}), settings, 0)
    assert variables(body)["TOKEN"] == "s3cret"
    assert "s3cret" not in str({key: value for key, value in body.items() if key != "Env"})


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"image": "elsewhere/lorot"}, "registry.lan/team/"),
        ({"image": "registry.lan/teamster/a:1"}, "registry.lan/team/"),
        ({"mounts": ["/"]}, "mounts"),
        ({"mounts": ["/run"]}, "docker.sock"),
        ({"mounts": ["/var/run/docker.sock"]}, "docker.sock"),
        ({"mounts": ["/etc"]}, "/etc"),
        ({"mounts": ["/proc/1"]}, "/proc"),
        ({"mounts": ["relative"]}, "not in a folder"),
        ({"mounts": ["{folder}/data"]}, "extra"),
        ({"mounts": ["{folder}/extra/../data"]}, "extra"),
        ({"mounts": ["{folder}/extra/missing"]}, "does not exist"),
        ({"mounts": ["{folder}/secrets"]}, "no job may see"),
        ({"mounts": ["{folder}/state/tokens"]}, "no job may see"),
        ({"mounts": ["{folder}"]}, "no job may see"),
        ({"secrets": {"TOKEN": "other"}}, "'other'"),
    ],
)
def test_what_a_job_may_not_have_is_refused(
    settings: ServiceSettings, tmp_path: Path, spec: dict[str, Any], said: str
) -> None:
    if "mounts" in spec:
        spec = {"mounts": [path.format(folder=tmp_path) for path in spec["mounts"]]}
    with pytest.raises(ConfigError, match=said):
        check(settings, **spec)


def test_a_link_out_of_an_allowed_folder_leads_nowhere(settings: ServiceSettings, tmp_path: Path) -> None:
    (tmp_path / "extra/way").symlink_to(tmp_path / "data")
    with pytest.raises(ConfigError, match="not in a folder that jobs may ask to see"):
        check(settings, mounts=[str(tmp_path / "extra/way")])


def test_what_a_job_may_have_is_not_refused(settings: ServiceSettings, tmp_path: Path) -> None:
    check(settings)
    check(settings, image="registry.lan/team/lorot:2@sha256:00")
    check(settings, image="lorot:latest", mounts=[str(tmp_path / "extra"), str(tmp_path / "extra/deep")])


@pytest.mark.parametrize("user", ["0:0", "0:1000", "1000:0", "root", "1000", "-1:5"])
def test_root_is_refused_as_a_containers_user(settings: ServiceSettings, user: str) -> None:
    with pytest.raises(ConfigError, match="ordinary user"):
        check(changed(settings, user=user))


@pytest.mark.parametrize("network", ["host", "none", "container:other"])
def test_the_hosts_network_is_refused(settings: ServiceSettings, network: str) -> None:
    with pytest.raises(ConfigError, match="docker network create"):
        check(changed(settings, network=network))


@pytest.mark.parametrize("root", ["/", "/run", "/var"])
def test_data_roots_that_hold_the_engines_socket_are_refused(settings: ServiceSettings, root: str) -> None:
    with pytest.raises(ConfigError, match="no job may see"):
        check(settings.model_copy(update={"data_roots": (Path(root),)}))


@pytest.mark.parametrize("uri", ["sqlite:///mlruns/mlflow.db", "http://127.0.0.1:5000", "http://localhost:5000"])
def test_a_record_that_containers_cannot_reach_is_refused_for_what_writes_to_it(
    settings: ServiceSettings, uri: str
) -> None:
    deaf = settings.model_copy(update={"tracking_uri": uri})
    with pytest.raises(ConfigError, match="worker_tracking_uri"):
        check(deaf)
    check(deaf.model_copy(update={"worker_tracking_uri": "http://mlflow:5000"}))
    DockerBackend(deaf).check(container_order(deaf).job)


def test_an_engine_that_does_not_answer_is_an_error_that_says_what_to_do(settings: ServiceSettings) -> None:
    backend = DockerBackend(settings)
    for call in (
        lambda: backend.status(NAME, {}),
        lambda: backend.start(container_order(settings)),
        lambda: backend.cancel(NAME, {}, 1),
        lambda: backend.remove(NAME, {}),
        lambda: backend.reconcile(),
        lambda: list(backend.logs(NAME, {})),
    ):
        with pytest.raises(BackendError, match=r"docker\.sock does not answer .*systemctl start docker"):
            call()


def inspected(
    node: int = 0, status: str = "exited", code: int = 0, ended: str = "2026-01-01T00:00:10Z", **state: Any
) -> dict[str, Any]:
    """As the engine answers, without what is not looked at."""
    return {
        "State": {
            "Status": status,
            "ExitCode": code,
            "OOMKilled": False,
            "Error": "",
            "StartedAt": "2026-01-01T00:00:00.123456789Z",
            "FinishedAt": ended if status == "exited" else "0001-01-01T00:00:00Z",
            **state,
        },
        "Config": {"Labels": {"lorot.node": str(node)}},
        "HostConfig": {"Memory": 64 * 2**20},
    }


def judged(*found: dict[str, Any], fewest: int = 1) -> Status:
    return ends.status([ends.Node.of(one) for one in found], fewest)


def test_success_has_no_reason() -> None:
    now = judged(inspected())
    assert (now.phase, now.exit_code, now.reason) == ("ended", 0, "")
    assert now.ended_s - now.started_s == pytest.approx(10 - 0.123456, abs=1e-5)


def test_running_and_waiting_have_no_exit_code() -> None:
    assert (judged(inspected(status="running")).phase, judged(inspected(status="running")).exit_code) == (
        "running",
        None,
    )
    assert judged(inspected(status="paused")).phase == "running"
    waiting = judged(inspected(status="created", StartedAt="0001-01-01T00:00:00Z"))
    assert (waiting.phase, waiting.started_s, waiting.ended_s) == ("waiting", 0, 0)


@pytest.mark.parametrize(
    ("state", "code", "out_of_memory", "said"),
    [
        ({"code": 137, "OOMKilled": True}, 137, True, "limit of 64 MiB"),
        # A worker of it was killed, and the launcher reported that.
        ({"code": 1, "OOMKilled": True}, 1, True, "limit of 64 MiB"),
        # A child was killed, and nobody minded.
        ({"code": 0, "OOMKilled": True}, 0, False, ""),
        ({"code": 137}, 137, False, "not for a memory limit"),
        ({"code": 143}, 143, False, ""),
        ({"code": 1}, 1, False, ""),
        ({"code": 127}, 127, False, "no such program"),
        ({"code": 255}, 255, False, "crashed"),
        ({"code": 128, "Error": "no such device"}, 128, False, "could not be started: no such device"),
    ],
)
def test_exit_codes_and_kills_for_memory_are_told_apart(
    state: dict[str, Any], code: int, out_of_memory: bool, said: str
) -> None:
    now = judged(inspected(**state))
    assert (now.phase, now.exit_code, now.out_of_memory) == ("ended", code, out_of_memory)
    assert said in now.reason
    assert bool(said) == bool(now.reason)


def test_a_container_that_could_not_be_started_has_ended() -> None:
    now = judged(inspected(status="created", code=127, Error="exec: no such file"))
    assert (now.phase, now.exit_code) == ("ended", 127)
    assert "exec: no such file" in now.reason


def test_a_container_that_ran_though_the_engine_went_down_as_it_started_it_has_ended_with_its_own_code() -> None:
    # As an engine has told of such a one.
    state = {"StartedAt": "0001-01-01T00:00:00Z", "FinishedAt": "2026-01-01T00:00:09.5Z"}
    assert judged(inspected(status="created", **state)).exit_code == 0
    now = judged(inspected(status="created", code=3, **state))
    assert (now.phase, now.exit_code, now.reason, now.started_s) == ("ended", 3, "", 0)
    assert now.ended_s == datetime.fromisoformat("2026-01-01T00:00:09.5+00:00").timestamp()


def test_of_several_nodes_the_first_failure_counts_that_is_no_consequence() -> None:
    now = judged(
        inspected(0, code=8, ended="2026-01-01T00:00:10Z"),
        inspected(1, code=3, ended="2026-01-01T00:00:12Z"),
        inspected(2, code=1, ended="2026-01-01T00:00:14Z"),
        fewest=3,
    )
    assert now.exit_code == 3
    assert now.nodes == (
        "node 0: ended with exit code 8",
        "node 1: ended with exit code 3",
        "node 2: ended with exit code 1",
    )
    assert judged(inspected(0, code=75), inspected(1, code=75), fewest=2).exit_code == 75


def test_an_elastic_job_has_ended_well_when_enough_nodes_have() -> None:
    lost = inspected(1, code=137)
    assert judged(inspected(0), lost, fewest=1).exit_code == 0
    fixed = judged(inspected(0), lost, fewest=2)
    assert fixed.exit_code == 137
    assert fixed.reason.startswith("node 1: ")


def test_an_attempt_has_not_ended_while_a_node_runs() -> None:
    assert judged(inspected(0, status="running"), inspected(1, code=137)).phase == "running"


def test_nodes_that_wait_for_one_that_will_not_come_back_are_found() -> None:
    def hopeless(fewest: int, *found: dict[str, Any]) -> bool:
        return ends.is_hopeless([ends.Node.of(one) for one in found], fewest)

    alive, done, lost = inspected(0, status="running"), inspected(1), inspected(2, code=137)
    assert hopeless(2, alive, lost)
    assert not hopeless(1, alive, lost)
    assert not hopeless(2, alive, done)
    assert not hopeless(3, alive, done, inspected(2, status="running"))
    assert hopeless(3, alive, done, lost)
    # There is nothing left to be stopped.
    assert not hopeless(2, done, lost)
