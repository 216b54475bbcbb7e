"""The objects that a job becomes in a cluster: each valid, each as the pitfalls of the field demand."""

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from socket import create_server
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api import models

from service.errors import ConfigError
from service.jobs import manifests
from service.jobs.manifests import PLACEHOLDER, kinds, pods, workloads
from service.jobs.manifests.train_job import train_job
from service.jobs.settings import ServiceSettings
from tests.service.kubernetes_orders import JOB_ID, NAME, PLACES, SHAPES, job, order, settings
from tests.service.kubernetes_schemas import VERSIONS, validate

CASES = [(shape, place, sets) for shape in SHAPES for place in PLACES for sets in (True, False)]


def documents(tmp_path: Path, shape: str, place: str = "plain", jobsets: bool = False) -> list[dict[str, Any]]:
    service = settings(tmp_path, **PLACES[place])
    return workloads.objects(
        order(service, **SHAPES[shape]), service.backends.kubernetes, "name: run\n", jobsets=jobsets
    )


def pod_specs(value: Any) -> Iterator[dict[str, Any]]:
    """Every pod spec below a value."""
    if isinstance(value, dict):
        if "containers" in value:
            yield value
        for inner in value.values():
            yield from pod_specs(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from pod_specs(inner)


def node_of(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The pod spec that runs the job's command."""
    return next(spec for spec in pod_specs(found) if any(mount["name"] == "results" for mount in mounts(spec)))


def mounts(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return list(spec["containers"][0].get("volumeMounts", []))


def main_of(found: list[dict[str, Any]]) -> dict[str, Any]:
    return dict(node_of(found)["containers"][0])


def env_of(found: list[dict[str, Any]]) -> dict[str, Any]:
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in main_of(found)["env"]}


@pytest.mark.parametrize(("shape", "place", "sets"), CASES)
def test_every_object_is_what_the_schemas_demand(tmp_path: Path, shape: str, place: str, sets: bool) -> None:
    for document in documents(tmp_path, shape, place, sets):
        if document["kind"] == "JobSet":
            assert models.JobsetV1alpha2JobSet.from_dict(document).to_dict() == document
            # The jobs inside are core kinds, which the model of a JobSet checks less strictly.
            for part in document["spec"]["replicatedJobs"]:
                inner = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": part["name"]}}
                validate({**inner, "spec": part["template"]["spec"]})
        else:
            validate(document)


def test_the_guide_names_the_versions_that_every_object_is_held_to() -> None:
    told = f"Kubernetes {VERSIONS[0].rpartition('.')[0]} to {VERSIONS[-1].rpartition('.')[0]}"
    guide = " ".join((Path(__file__).parents[2] / "deploy" / "README.md").read_text().split())
    assert told in guide
    assert len(VERSIONS) > 5


def test_the_strict_schemas_would_refuse_a_field_that_is_misspelt(tmp_path: Path) -> None:
    document = documents(tmp_path, "one node")[0]
    document["spec"]["template"]["spec"]["restartpolicy"] = "Never"
    with pytest.raises(kubernetes_validate.ValidationError, match="restartpolicy"):
        validate(document)


@pytest.mark.parametrize(("shape", "place", "sets"), CASES)
def test_no_pod_can_do_harm(tmp_path: Path, shape: str, place: str, sets: bool) -> None:
    found = list(pod_specs(documents(tmp_path, shape, place, sets)))
    assert found
    for spec in found:
        assert spec["automountServiceAccountToken"] is False
        assert spec["restartPolicy"] == "Never"
        about = spec["securityContext"]
        assert about["runAsNonRoot"] is True
        assert about["runAsUser"] > 0
        assert about["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not spec.keys() & {"hostNetwork", "hostPID", "hostIPC"}
        assert all(set(volume) - {"name"} <= SAFE_VOLUMES for volume in spec.get("volumes", []))
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["requests"]["cpu"]


SAFE_VOLUMES = {"emptyDir", "persistentVolumeClaim", "configMap"}


@pytest.mark.parametrize(("shape", "place", "sets"), CASES)
def test_names_and_labels_are_such_as_a_cluster_takes(tmp_path: Path, shape: str, place: str, sets: bool) -> None:
    found = documents(tmp_path, shape, place, sets)
    first = found[0]["metadata"]
    assert first["name"] == NAME
    assert first["labels"]["lorot.dev/job"] == JOB_ID
    assert first["labels"]["lorot.dev/attempt"] == NAME
    assert first["labels"]["lorot.dev/role"] == "attempt"
    assert [document["metadata"]["labels"]["lorot.dev/role"] for document in found[1:]] == ["part"] * (len(found) - 1)
    assert len({(document["kind"], document["metadata"]["name"]) for document in found}) == len(found)
    for document in found:
        assert document["metadata"]["namespace"] == "jobs"
        assert len(document["metadata"]["name"]) < 50


def test_one_node_is_a_plain_job_that_the_service_and_not_the_cluster_retries(tmp_path: Path) -> None:
    job, configuration = documents(tmp_path, "one node", jobsets=True)
    assert (job["kind"], job["spec"]["completionMode"], job["spec"]["backoffLimit"]) == ("Job", "NonIndexed", 0)
    assert "initContainers" not in job["spec"]["template"]["spec"]
    assert configuration["data"] == {"job.yaml": "name: run\n"}


def test_a_fixed_gang_is_a_job_set_that_starts_again_as_a_whole(tmp_path: Path) -> None:
    found = documents(tmp_path, "gang", jobsets=True)
    assert [document["kind"] for document in found] == ["JobSet", "ConfigMap"]
    spec = found[0]["spec"]
    assert spec["failurePolicy"]["restartStrategy"] == "BlockingRecreate"
    assert spec["failurePolicy"]["maxRestarts"] == 3
    assert spec["failurePolicy"]["rules"] == [
        {"name": "final", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]
    meeting, nodes = spec["replicatedJobs"]
    # The rendezvous never ends by itself.
    assert spec["successPolicy"] == {"operator": "All", "targetReplicatedJobs": ["node"]}
    assert nodes["template"]["spec"]["parallelism"] == nodes["template"]["spec"]["completions"] == 4
    assert {part["template"]["spec"]["completionMode"] for part in (meeting, nodes)} == {"Indexed"}
    assert spec["network"] == {"enableDNSHostnames": True, "publishNotReadyAddresses": True}
    # JobSet's rule for a pod's name: SET-JOB-INDEX-POD, in the subdomain of the set.
    host = f"{NAME}-{meeting['name']}-0-0.{NAME}"
    assert f"{host}:29400" in main_of(found)["command"]
    assert host in node_of(found)["initContainers"][0]["command"]


def test_without_job_sets_a_gang_is_an_indexed_job_that_no_single_host_can_end(tmp_path: Path) -> None:
    found = documents(tmp_path, "gang", jobsets=False)
    assert [document["kind"] for document in found] == ["Job", "Service", "Service", "Job", "ConfigMap"]
    spec = found[0]["spec"]
    assert "backoffLimit" not in spec
    assert (spec["backoffLimitPerIndex"], spec["maxFailedIndexes"]) == (3, 0)
    assert spec["podReplacementPolicy"] == "Failed"
    names = found[1]["spec"]
    assert (names["clusterIP"], names["publishNotReadyAddresses"]) == ("None", True)
    assert spec["template"]["spec"]["subdomain"] == found[1]["metadata"]["name"]


def test_the_rendezvous_of_an_elastic_job_lies_outside_of_its_nodes(tmp_path: Path) -> None:
    found = documents(tmp_path, "elastic", jobsets=True)
    job, _, door, store, _ = found
    assert (job["kind"], job["spec"]["completions"], job["spec"]["maxFailedIndexes"]) == ("Job", 4, 2)
    labels = store["spec"]["template"]["metadata"]["labels"]
    assert door["spec"]["selector"].items() <= labels.items()
    assert not door["spec"]["selector"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
    where = f"{door['metadata']['name']}:{door['spec']['ports'][0]['port']}"
    command = main_of(found)["command"]
    assert command[command.index("--rdzv") + 1] == where
    assert command[command.index("--nnodes") + 1] == "2:4"
    assert store["spec"]["template"]["spec"]["containers"][0]["command"] == ["lorot", "rendezvous", "--port", "29400"]


def test_pre_emption_counts_as_nothing_and_what_no_retry_mends_ends_the_job(tmp_path: Path) -> None:
    for shape, jobsets in (("one node", False), ("elastic", False), ("gang", False), ("gang", True)):
        found = documents(tmp_path, shape, jobsets=jobsets)[0]["spec"]
        spec = found["replicatedJobs"][-1]["template"]["spec"] if jobsets else found
        rules = spec["podFailurePolicy"]["rules"]
        assert rules[0] == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
        by_code = {
            code: rule["action"] for rule in rules[1:] for code in rule["onExitCodes"]["values"] if rule["onExitCodes"]
        }
        assert by_code == {75: "Ignore", 2: "FailJob", 3: "FailJob", 4: "FailJob", 5: "FailJob"}
        assert {rule["onExitCodes"]["containerName"] for rule in rules[1:]} == {"main"}


def test_the_exit_codes_of_a_foreign_container_mean_nothing_to_us(tmp_path: Path) -> None:
    rules = documents(tmp_path, "container")[0]["spec"]["podFailurePolicy"]["rules"]
    assert [rule for rule in rules if "onExitCodes" in rule] == []


@pytest.mark.parametrize(
    ("shape", "jobsets"), [("one node", False), ("gang", True), ("gang", False), ("elastic", False)]
)
def test_a_queue_gets_the_job_suspended_and_by_its_label(tmp_path: Path, shape: str, jobsets: bool) -> None:
    first, *rest = documents(tmp_path, shape, "full", jobsets)
    assert first["spec"]["suspend"] is True
    assert first["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "lorot"
    assert all("kueue.x-k8s.io/queue-name" not in document["metadata"]["labels"] for document in rest)
    assert "suspend" not in documents(tmp_path, shape, "plain", jobsets)[0]["spec"]


def test_kueue_may_admit_fewer_nodes_of_an_elastic_job_and_of_no_other(tmp_path: Path) -> None:
    told = documents(tmp_path, "elastic", "full")[0]["metadata"]["annotations"]
    assert told["kueue.x-k8s.io/job-min-parallelism"] == "2"
    assert told["kueue.x-k8s.io/job-completions-equal-parallelism"] == "true"
    assert "kueue.x-k8s.io/job-min-parallelism" not in str(documents(tmp_path, "gang", "full"))


def test_amounts_are_asked_for_and_are_the_limit(tmp_path: Path) -> None:
    found = documents(tmp_path, "one node with all there is", "full")
    wanted = {"cpu": "64", "memory": "512G", "amd.com/gpu": "8"}
    assert main_of(found)["resources"] == {"requests": wanted, "limits": wanted}
    volumes = {volume["name"]: volume for volume in node_of(found)["volumes"]}
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "64Gi"}
    assert {"name": "shm", "mountPath": "/dev/shm"} in main_of(found)["volumeMounts"]
    assert node_of(found)["tolerations"][0]["key"] == "amd.com/gpu"
    assert node_of(found)["terminationGracePeriodSeconds"] > 120
    assert node_of(found)["priorityClassName"] == "low"


@pytest.mark.parametrize(("shape", "jobsets"), [("one node", False), ("gang", True), ("elastic", False)])
def test_a_priority_is_the_class_of_all_pods_of_the_job(tmp_path: Path, shape: str, jobsets: bool) -> None:
    service = settings(tmp_path, priority_class="low", priority_classes={-10: "lowest", 10: "high"})
    for priority, expected in ((10, "high"), (0, "low"), (-10, "lowest")):
        own = order(service, **SHAPES[shape], priority=priority)
        found = workloads.objects(own, service.backends.kubernetes, "", jobsets=jobsets)
        assert {spec["priorityClassName"] for spec in pod_specs(found)} == {expected}


def test_the_fast_network_is_asked_for_by_gpus_of_several_nodes_alone(tmp_path: Path) -> None:
    asking = {
        shape for shape in SHAPES if "rdma/hca" in main_of(documents(tmp_path, shape, "full"))["resources"]["limits"]
    }
    assert asking == {"gang", "elastic"}


@pytest.mark.parametrize(
    ("size", "quantity"),
    [("8GB", "8G"), ("512MiB", "512Mi"), ("64", "64"), ("4kiB", "4Ki"), ("4k", "4k"), ("2Ti", "2Ti"), ("1B", "1")],
)
def test_sizes_are_written_as_kubernetes_reads_them(size: str, quantity: str) -> None:
    assert pods.amount(size) == quantity


def test_a_job_sees_its_own_results_and_the_data_read_only(tmp_path: Path) -> None:
    found = documents(tmp_path, "one node with all there is", "full")
    where = {mount["mountPath"]: mount for mount in main_of(found)["volumeMounts"]}
    # The rest of the job's folder is the service's, which writes there.
    own = {path: mount["subPath"] for path, mount in where.items() if mount["name"] == "results"}
    assert own == {"/job/run": f"{JOB_ID}/run", "/results": f"{JOB_ID}/outputs"}
    assert where["/data"]["readOnly"] is True
    claims = {volume["name"]: volume.get("persistentVolumeClaim") for volume in node_of(found)["volumes"]}
    assert claims["results"] == {"claimName": "results"}
    assert claims["data"] == {"claimName": "data", "readOnly": True}


@pytest.mark.parametrize(
    ("shape", "begins"),
    [
        ("one node", ("train", "/etc/lorot/job.yaml")),
        ("detector", ("detect", "--model", "models:/small@best", "--config", "/etc/lorot/job.yaml")),
        ("masks on one node", ("segment", "--model", "models:/small/1", "--config", "/etc/lorot/job.yaml")),
    ],
)
def test_the_configuration_comes_from_a_config_map_and_the_command_reads_it_there(
    tmp_path: Path, shape: str, begins: tuple[str, ...]
) -> None:
    found = documents(tmp_path, shape)
    where = {mount["mountPath"]: mount for mount in main_of(found)["volumeMounts"]}
    volume = next(entry for entry in node_of(found)["volumes"] if entry["name"] == where["/etc/lorot"]["name"])
    assert volume["configMap"]["name"] in {one["metadata"]["name"] for one in found if one["kind"] == "ConfigMap"}
    assert tuple(main_of(found)["command"][: 1 + len(begins)]) == ("lorot", *begins)


def test_a_pod_that_is_made_again_goes_on_with_the_run(tmp_path: Path) -> None:
    assert "--resume" in main_of(documents(tmp_path, "one node"))["command"]


def test_secrets_are_references_and_never_values(tmp_path: Path) -> None:
    service = settings(tmp_path, **PLACES["full"])
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "store").write_text("hunter2")
    found = documents(tmp_path, "one node with all there is", "full")
    assert env_of(found)["STORE_KEY"] == {"secretKeyRef": {"name": "store", "key": "value"}}
    assert main_of(found)["envFrom"] == [{"secretRef": {"name": "job-variables"}}]
    assert "hunter2" not in str(found) + drafted(service, "one node with all there is")
    service = settings(tmp_path, **{**PLACES["full"], "job_secret": None})
    export = drafted(service, "one node with all there is", "trainjob")
    assert "hunter2" not in export
    assert "name: store" in export


def expanded(text: str, variables: dict[str, str]) -> str:
    """As the kubelet does it (third_party/forked/golang/expansion): $(NAME) is replaced if known, $$ is a dollar."""
    found, at = "", 0
    while at < len(text):
        if text[at] == "$" and at + 1 < len(text):
            if text[at + 1] == "$":
                found, at = found + "$", at + 2
                continue
            if text[at + 1] == "(" and (end := text.find(")", at)) > 0:
                name = text[at + 2 : end]
                found, at = found + variables.get(name, f"$({name})"), end + 1
                continue
        found, at = found + text[at], at + 1
    return found


def test_commands_and_values_reach_the_program_as_they_were_given(tmp_path: Path) -> None:
    known = {"HOME": "/root", "A": "1"}
    command = main_of(documents(tmp_path, "container"))["command"]
    assert [expanded(word, known) for word in command] == list(SHAPES["container"]["command"])
    value = env_of(documents(tmp_path, "one node with all there is"))["B"]
    assert expanded(value, known) == "$(A) costs $5"


def test_nccl_is_told_of_the_fast_network_only_where_there_is_one(tmp_path: Path) -> None:
    assert env_of(documents(tmp_path, "gang", "full"))["NCCL_NET"] == "IB"
    assert env_of(documents(tmp_path, "gang", "plain"))["NCCL_IB_DISABLE"] == "1"
    assert not {name for name in env_of(documents(tmp_path, "one node")) if name.startswith("NCCL")}


def test_what_the_user_sets_stays(tmp_path: Path) -> None:
    service = settings(tmp_path)
    own = order(service, nodes="2", resources={"gpus": 1}, environment={"NCCL_IB_DISABLE": "0"})
    found = workloads.objects(own, service.backends.kubernetes, "", jobsets=False)
    assert env_of(found)["NCCL_IB_DISABLE"] == "0"


def test_containers_that_do_not_meet_have_no_rendezvous(tmp_path: Path) -> None:
    assert "rdzv" not in str(documents(tmp_path, "containers that do not meet", jobsets=True))
    assert "{rendezvous}" not in str(documents(tmp_path, "containers that meet", jobsets=True))


def test_a_foreign_image_does_not_have_to_hold_our_rendezvous(tmp_path: Path) -> None:
    service = settings(tmp_path)
    own = order(service, **{**SHAPES["containers that meet"], "image": "busybox:1"})
    for jobsets in (True, False):
        found = workloads.objects(own, service.backends.kubernetes, "", jobsets=jobsets)
        assert main_of(found)["image"] == "busybox:1"
        others = {spec["containers"][0]["image"] for spec in pod_specs(found) if spec is not node_of(found)}
        assert others == {"registry.lan/lorot:1"}
        assert node_of(found)["initContainers"][0]["image"] == "registry.lan/lorot:1"


def test_nodes_wait_until_the_rendezvous_listens(tmp_path: Path) -> None:
    *line, _, _, _ = node_of(documents(tmp_path, "elastic"))["initContainers"][0]["command"]
    with create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=listening.accept, daemon=True).start()
        here = [sys.executable, *line[1:], "127.0.0.1", str(listening.getsockname()[1]), "20"]
        assert subprocess.run(here, timeout=30).returncode == 0
    gone = subprocess.run([*here[:-1], "0"], capture_output=True, text=True, timeout=30)
    assert gone.returncode == 1
    assert "no rendezvous at 127.0.0.1" in gone.stderr


def test_parts_are_owned_by_the_attempt_so_that_they_go_with_it(tmp_path: Path) -> None:
    first, *rest = documents(tmp_path, "elastic")
    owner = {**first, "metadata": {**first["metadata"], "uid": "u-1"}}
    for document in rest:
        part = workloads.owned(document, owner)
        validate(part)
        (reference,) = part["metadata"]["ownerReferences"]
        assert reference == {"apiVersion": "batch/v1", "kind": "Job", "name": NAME, "uid": "u-1"}


@pytest.mark.parametrize("shape", ["one node", "one node with all there is", "gang", "masks on one node", "container"])
def test_a_train_job_is_what_kubeflow_takes(tmp_path: Path, shape: str) -> None:
    service = settings(tmp_path, **{**PLACES["full"], "job_secret": None})
    job, *rest = train_job(order(service, **SHAPES[shape]), service.backends.kubernetes, "a: 1\n")
    assert models.TrainerV1alpha1TrainJob.from_dict(job).to_dict() == job
    assert job["spec"]["trainer"]["numNodes"] == SHAPES[shape].get("nodes", 1) or int(SHAPES[shape]["nodes"]) == 4
    for document in rest:
        validate(document)


def test_a_train_job_of_several_nodes_uses_the_torchrun_that_kubeflow_sets_up(tmp_path: Path) -> None:
    service = settings(tmp_path)
    job, _ = train_job(order(service, **SHAPES["gang"]), service.backends.kubernetes, "a: 1\n")
    trainer = job["spec"]["trainer"]
    assert trainer["command"] == ["torchrun", "-m", "service.training.worker", "/etc/lorot/job.yaml", "--resume"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (4, 8)


def test_what_a_train_job_cannot_be_is_refused_in_words(tmp_path: Path) -> None:
    service = settings(tmp_path)
    with pytest.raises(ConfigError, match="fixed number of nodes"):
        train_job(order(service, **SHAPES["elastic"]), service.backends.kubernetes, "")
    with pytest.raises(ConfigError, match="it can have one node"):
        train_job(order(service, **SHAPES["containers that meet"]), service.backends.kubernetes, "")
    with pytest.raises(ConfigError, match="kind detect: as a TrainJob it can have one node"):
        train_job(order(service, **SHAPES["detector"]), service.backends.kubernetes, "")
    with pytest.raises(ConfigError, match="priority: 5 has no place in a TrainJob"):
        train_job(order(service, priority=5), service.backends.kubernetes, "")


RESOLVED = {"seed": 7, "name": "run", "output": "runs", "tracking": {"uri": None}}


def drafted(service: ServiceSettings, shape: str, form: manifests.Format = "objects", **more: Any) -> str:
    """A dry run's."""
    spec = job(**{**SHAPES[shape], **more}).spec
    resolved = {} if spec.kind == "container" else RESOLVED
    return manifests.text(manifests.documents(spec, service, resolved, form), form)


def test_a_dry_run_renders_all_objects_and_says_what_its_zeros_are(tmp_path: Path) -> None:
    service = settings(tmp_path)
    text = drafted(service, "elastic")
    found = list(yaml.safe_load_all(text))
    assert [document["kind"] for document in found] == ["Job", "Service", "Service", "Job", "ConfigMap"]
    assert found[0]["metadata"]["labels"]["lorot.dev/job"] == PLACEHOLDER
    assert env_of(found)["LOROT_RUN_ID"] == PLACEHOLDER
    assert yaml.safe_load(found[-1]["data"]["job.yaml"])["seed"] == 7
    assert f"# {PLACEHOLDER} stands for" in text
    assert not service.results.exists(), "a dry run writes nothing"


@pytest.mark.parametrize("shape", ["one node", "gang", "container"])
def test_an_export_is_nobodys_attempt(tmp_path: Path, shape: str) -> None:
    service = settings(tmp_path, **{**PLACES["full"], "job_secret": None})
    text = drafted(service, shape, "trainjob")
    # A worker takes the run that LOROT_RUN_ID names, and refuses one that MLflow does not know.
    assert "0" * 12 not in text
    assert "LOROT_" not in text
    # By these the service would take it, or what Kubeflow makes of it, for an attempt of its own.
    assert not re.findall(r"lorot\.dev/(?:job|attempt|role)", text)
    first, *_ = yaml.safe_load_all(text)
    assert first["metadata"]["annotations"] == {"lorot.dev/name": "a-run"}
    pod = first["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]
    # The policies in deploy/ let pods of this name reach MLflow and one another.
    assert pod["template"]["spec"]["template"]["metadata"]["labels"] == {"app.kubernetes.io/name": "lorot-job"}


@pytest.mark.parametrize("shape", ["one node", "gang", "container"])
def test_two_exports_have_nothing_in_common_that_both_would_make_or_write_to(tmp_path: Path, shape: str) -> None:
    service = settings(tmp_path)
    names, folders = set(), set()
    for _ in range(2):
        found = list(yaml.safe_load_all(drafted(service, shape, "trainjob")))
        (name,) = {document["metadata"]["name"] for document in found}
        node = node_of(found)
        own = {mount["mountPath"]: mount["subPath"] for mount in mounts(node) if mount["name"] == "results"}
        assert own == {"/job/run": f"{name}/run", "/results": f"{name}/outputs"}
        if shape != "container":
            maps = [volume["configMap"]["name"] for volume in node["volumes"] if "configMap" in volume]
            assert maps == [name]
            told = yaml.safe_load(found[1]["data"]["job.yaml"])
            assert (told["output"], told["name"]) == ("/job/run", "a-run"), "its run is called as the job is"
        # The pods of a JobSet have NAME-node-0-0-abcde, of 63 characters at most.
        assert re.fullmatch(r"[a-z][a-z0-9-]{,40}[a-z0-9]", name)
        names.add(name)
        folders.update(own.values())
    assert (len(names), len(folders)) == (2, 4)


def test_rendering_loads_neither_torch_nor_the_official_client() -> None:
    program = (
        "import sys; import service.jobs.manifests; "
        "print([name for name in ('torch', 'kubernetes', 'mlflow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_names_are_put_in_camel_case_and_what_was_not_given_is_left_out() -> None:
    about = kinds.ServiceSpec(selector={"a_b": "c_d"}, cluster_ip="None", publish_not_ready_addresses=False)
    assert kinds.as_dict(about) == {
        "selector": {"a_b": "c_d"},
        "clusterIP": "None",
        "publishNotReadyAddresses": False,
    }
    assert kinds.as_dict(kinds.Volume(name="tmp", empty_dir=kinds.EmptyDir())) == {"name": "tmp", "emptyDir": {}}
