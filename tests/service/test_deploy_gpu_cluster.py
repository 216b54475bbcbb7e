"""deploy/overlays/gpu-cluster: Kueue's objects, their quotas, Kubeflow's runtime, volumes for many machines."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubeflow_trainer_api import models
from kubernetes.utils import parse_quantity

from tests.service import kueue_schema
from tests.service.kubernetes_schemas import validate
from tests.service.kustomization import build
from tests.service.overlays import DEPLOY, Documents, jobs_of, of_kind, told


@pytest.mark.parametrize(
    ("line", "instead", "says"),
    [
        ("nominalQuota: 2Ti", "nominalQuotas: 2Ti", "nominalQuota"),
        ("nominalQuota: 2Ti", "nominalQuota: 2 TB", "nominalQuota"),
        ('nominalQuota: "256"', "nominalQuota: -1", "minimum"),
        ("        - memory\n", "", "does not list"),
        ("BestEffortFIFO", "BestEffort", "queueingStrategy"),
        ("withinClusterQueue", "withinQueue", "withinQueue"),
        ("namespaceSelector:", "namespaces:", "namespaces"),
        ("operator: Exists", "operator: Exist", "operator"),
        ("clusterQueue: lorot", "clusterqueue: lorot", "clusterqueue"),
        ("  namespace: lorot\n", "", "namespace"),
        ("v1beta2", "v1beta1", "apiVersion"),
    ],
)
def test_a_slip_in_kueues_objects_is_noticed(line: str, instead: str, says: str) -> None:
    text = (DEPLOY / "overlays/gpu-cluster/kueue.yaml").read_text()
    assert line in text
    wrong = yaml.safe_load_all(text.replace(line, instead))
    assert says in " ".join(problem for document in wrong for problem in kueue_schema.problems(document))


def test_kubeflows_runtime_is_what_kubeflow_takes() -> None:
    (runtime,) = build(DEPLOY / "kubeflow")
    assert_runtime(runtime)


def test_kubeflows_runtime_comes_with_the_cluster_where_it_is_switched_on(tmp_path: Path) -> None:
    folder = tmp_path / "deploy"
    shutil.copytree(DEPLOY, folder)
    path = folder / "overlays/gpu-cluster/kustomization.yaml"
    assert not of_kind(build(path.parent), "TrainingRuntime"), "kubectl refuses kinds that a cluster does not know"
    path.write_text(path.read_text().replace("# - ../../kubeflow", "- ../../kubeflow"))
    (runtime,) = of_kind(build(path.parent), "TrainingRuntime").values()
    assert_runtime(runtime)


def assert_runtime(runtime: dict[str, Any]) -> None:
    assert models.TrainerV1alpha1TrainingRuntime.from_dict(runtime).to_dict() == runtime
    (part,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert (part["name"], part["template"]["spec"]["template"]["spec"]["containers"][0]["name"]) == ("node", "node")


def test_several_machines_need_volumes_that_several_can_write_to() -> None:
    documents = build(DEPLOY / "overlays" / "gpu-cluster")
    claims = of_kind(documents, "PersistentVolumeClaim")
    assert claims["lorot-results"]["spec"]["accessModes"] == ["ReadWriteMany"]
    assert claims["lorot-data"]["spec"]["accessModes"] == ["ReadWriteMany"]


def test_the_claim_for_data_can_be_a_bucket_that_a_driver_mounts_read_only(tmp_path: Path) -> None:
    """Bound for good: neither can be taken by another, and no provisioner makes a volume of its own."""
    folder = tmp_path / "deploy"
    shutil.copytree(DEPLOY, folder)
    path = folder / "overlays/gpu-cluster/kustomization.yaml"
    text = path.read_text()
    path.write_text(text.replace("# components: [../../bucket-data]", "components: [../../bucket-data]"))
    assert path.read_text() != text
    documents = build(path.parent)
    for document in documents:
        if document["kind"] in ("PersistentVolume", "PersistentVolumeClaim"):
            validate(document)
    volume = of_kind(documents, "PersistentVolume")["lorot-data"]["spec"]
    claim = of_kind(documents, "PersistentVolumeClaim")["lorot-data"]
    assert claim["metadata"]["namespace"] == volume["claimRef"]["namespace"]
    assert (claim["metadata"]["name"], claim["spec"]["volumeName"]) == (volume["claimRef"]["name"], "lorot-data")
    assert claim["spec"]["storageClassName"] == volume["storageClassName"] == ""
    assert set(claim["spec"]["accessModes"]) <= set(volume["accessModes"])
    assert parse_quantity(claim["spec"]["resources"]["requests"]["storage"]) <= parse_quantity(
        volume["capacity"]["storage"]
    )
    assert {"read-only", "allow-other"} <= set(volume["mountOptions"])
    assert told(documents, tmp_path).backends.kubernetes.data_claim == "lorot-data"


def test_the_queue_has_a_quota_for_all_that_jobs_ask_for(tmp_path: Path) -> None:
    documents = build(DEPLOY / "overlays" / "gpu-cluster")
    assert_quotas(documents, tmp_path)


def test_the_queue_has_a_quota_for_the_fast_network_where_all_that_speaks_of_it_is_switched_on(tmp_path: Path) -> None:
    folder = tmp_path / "deploy"
    shutil.copytree(DEPLOY, folder)
    for name in ("kueue.yaml", "service.yaml"):
        path = folder / "overlays" / "gpu-cluster" / name
        path.write_text(re.sub(r"# (.*rdma/hca)", r"\1", path.read_text()))
    documents = build(folder / "overlays" / "gpu-cluster")
    assert told(documents, tmp_path).backends.kubernetes.rdma == "rdma/hca"
    assert_quotas(documents, tmp_path)


def assert_quotas(documents: Documents, tmp_path: Path) -> None:
    queue = of_kind(documents, "ClusterQueue")[of_kind(documents, "LocalQueue")["lorot"]["spec"]["clusterQueue"]]
    (group,) = queue["spec"]["resourceGroups"]
    (flavor,) = group["flavors"]
    assert flavor["name"] in of_kind(documents, "ResourceFlavor")
    assert [entry["name"] for entry in flavor["resources"]] == group["coveredResources"]
    spec = jobs_of(told(documents, tmp_path), tmp_path)[0]["spec"]["template"]["spec"]
    for container in [*spec["containers"], *spec["initContainers"]]:
        # Kueue admits nothing that asks for a resource without a quota.
        assert set(container["resources"]["requests"]) <= set(group["coveredResources"])
