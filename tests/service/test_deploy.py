"""deploy/: what each overlay puts into a cluster is valid, hangs together, and can do no harm."""

import re
import shutil
import tomllib
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from service.jobs.spec import num_bytes
from tests.service import kueue_schema
from tests.service.kubernetes_schemas import validate
from tests.service.kustomization import build
from tests.service.overlays import (
    DEPLOY,
    OVERLAYS,
    Documents,
    allowed,
    containers,
    jobs_of,
    named,
    of_kind,
    templates,
    told,
)

# Of nobody in a cluster.
OUTSIDE = "52.216.0.1"


@pytest.fixture(params=OVERLAYS)
def documents(request: pytest.FixtureRequest) -> Documents:
    return build(DEPLOY / "overlays" / request.param)


@pytest.fixture
def with_demo(documents: Documents) -> Documents:
    """An overlay, and the demo's images drawn into it."""
    return [*documents, *build(DEPLOY / "demo")]


def test_there_is_an_overlay_for_each_kind_of_place() -> None:
    assert OVERLAYS == ["dev", "gpu-cluster", "single-node"]


def test_every_object_is_what_the_schemas_demand(documents: Documents) -> None:
    for document in documents:
        if document["kind"] in kueue_schema.KINDS:
            assert kueue_schema.problems(document) == []
            continue
        try:
            validate(document)
        except kubernetes_validate.ValidationError as error:
            pytest.fail(f"{document['kind']} {document['metadata']['name']}: {error.message}")


def test_everything_lies_in_one_namespace_that_refuses_harmful_pods(with_demo: Documents) -> None:
    labels = of_kind(with_demo, "Namespace")["lorot"]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    wide = {"Namespace", "PriorityClass", "ResourceFlavor", "ClusterQueue"}
    for document in with_demo:
        expected = None if document["kind"] in wide else "lorot"
        assert document["metadata"].get("namespace") == expected, document["metadata"]["name"]


def test_no_pod_can_do_harm_and_each_says_what_it_needs(with_demo: Documents) -> None:
    for name, template in templates(with_demo).items():
        about = template["spec"]["securityContext"]
        assert about["runAsNonRoot"] is True, name
        assert about["runAsUser"] > 0, name
        assert about["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not template["spec"].keys() & {"hostNetwork", "hostPID", "hostIPC"}, name
        for volume in template["spec"].get("volumes", []):
            assert set(volume) - {"name"} <= {"configMap", "emptyDir", "persistentVolumeClaim"}, name
        for container in containers(template):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, container["name"]
            assert container["resources"]["requests"].keys() == {"cpu", "memory"}
            assert container["resources"]["limits"].keys() == {"cpu", "memory"}


def test_only_the_service_gets_a_token_of_the_cluster(with_demo: Documents) -> None:
    for name, template in templates(with_demo).items():
        assert template["spec"].get("automountServiceAccountToken") is (name == "lorot"), name
    for account in of_kind(with_demo, "ServiceAccount").values():
        assert account["automountServiceAccountToken"] is False
    (binding,) = of_kind(with_demo, "RoleBinding").values()
    assert [subject["name"] for subject in binding["subjects"]] == ["lorot"]
    assert not of_kind(with_demo, "ClusterRole"), "all that the service may do lies in its namespace"


def test_every_server_is_probed_and_the_service_by_its_own_pages(documents: Documents) -> None:
    for name, template in templates(documents).items():
        if name in of_kind(documents, "CronJob"):
            continue
        (container,) = template["spec"]["containers"]
        assert {"startupProbe", "livenessProbe", "readinessProbe"} <= container.keys(), name
    (service,) = templates(documents)["lorot"]["spec"]["containers"]
    assert service["livenessProbe"]["httpGet"]["path"] == "/healthz"
    assert service["readinessProbe"]["httpGet"]["path"] == "/readyz"
    from service.api import guard

    assert guard.PROBES == ("/healthz", "/readyz"), "asked by address, so they may not look at the Host"


def test_there_is_one_service_and_never_two_at_once(documents: Documents) -> None:
    spec = of_kind(documents, "Deployment")["lorot"]["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})


def test_every_volume_account_secret_and_port_that_is_named_exists(with_demo: Documents) -> None:
    claims = set(of_kind(with_demo, "PersistentVolumeClaim"))
    for name, template in templates(with_demo).items():
        spec = template["spec"]
        own = of_kind(with_demo, "StatefulSet").get(name, {}).get("spec", {}).get("volumeClaimTemplates", [])
        volumes = {volume["name"] for volume in spec.get("volumes", [])} | {one["metadata"]["name"] for one in own}
        assert {mount["name"] for one in containers(template) for mount in one["volumeMounts"]} == volumes, name
        for volume in spec.get("volumes", []):
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims, name
            if "configMap" in volume:
                assert volume["configMap"]["name"] in of_kind(with_demo, "ConfigMap"), name
        if "serviceAccountName" in spec:
            assert spec["serviceAccountName"] in of_kind(with_demo, "ServiceAccount")


def matching(documents: Documents, selector: dict[str, str]) -> list[str]:
    found = templates(documents).items()
    return [name for name, template in found if selector.items() <= template["metadata"]["labels"].items()]


def test_services_and_budgets_find_the_pods_they_are_for(documents: Documents) -> None:
    for name, service in of_kind(documents, "Service").items():
        assert matching(documents, service["spec"]["selector"]) == [name]
        ports = {
            port
            for container in templates(documents)[name]["spec"]["containers"]
            for entry in container["ports"]
            for port in (entry["name"], entry["containerPort"])
        }
        assert all(entry.get("targetPort", entry["port"]) in ports for entry in service["spec"]["ports"])
    for name, budget in of_kind(documents, "PodDisruptionBudget").items():
        assert matching(documents, budget["spec"]["selector"]["matchLabels"]) == [name]
    assert "lorot" in of_kind(documents, "PodDisruptionBudget")
    for name, document in {**of_kind(documents, "Deployment"), **of_kind(documents, "StatefulSet")}.items():
        labels = document["spec"]["template"]["metadata"]["labels"]
        assert document["spec"]["selector"]["matchLabels"].items() <= labels.items(), name


def test_pods_reach_what_they_need_and_nothing_else(documents: Documents) -> None:
    service, work, record = named("lorot"), named("lorot-job"), named("mlflow")
    assert allowed(documents, service, record, 5000)
    assert allowed(documents, work, record, 5000)
    assert allowed(documents, named("gc"), record, 5000)
    assert allowed(documents, work, work, 29400)
    assert not allowed(documents, work, OUTSIDE, 443), "for data in an object store somebody has to say so"
    assert not allowed(documents, work, service, 8080), "a job has no business with the service"
    assert not allowed(documents, record, work, 5000)
    if "postgres" in templates(documents):
        assert allowed(documents, record, named("postgres"), 5432)
        assert allowed(documents, record, named("store"), 8333)
        assert allowed(documents, named("backup"), named("postgres"), 5432)
        assert allowed(documents, named("backup"), named("store"), 8333)
        assert not allowed(documents, named("backup"), record, 5000)
        assert not allowed(documents, named("gc"), named("postgres"), 5432)
        for other in (service, work):
            assert not allowed(documents, other, named("postgres"), 5432)
            assert not allowed(documents, other, named("store"), 8333)


def test_everybody_may_ask_for_names_also_of_a_machines_own_cache(documents: Documents) -> None:
    for name in templates(documents):
        assert allowed(documents, named(name), "169.254.20.10", 53), name
        assert not allowed(documents, named(name), "169.254.169.254", 53), name


def test_the_services_pod_has_room_for_the_logs_that_may_be_followed(documents: Documents, tmp_path: Path) -> None:
    from service.api import followers

    most = told(documents, tmp_path).limits.followers + followers._MOST_LINGERING - followers._LARGE_SPOOLS
    spools = followers.SPOOL_BYTES * (followers._LARGE_SPOOLS + most / followers._SMALLER)
    (volume,) = (one for one in templates(documents)["lorot"]["spec"]["volumes"] if one["name"] == "tmp")
    size = num_bytes(volume["emptyDir"]["sizeLimit"])
    # Beside what else lies there.
    assert size > spools + 2**30, "the kubelet evicts a pod that has more"


def test_what_drains_and_upgrades_speak_of_is_there(documents: Documents) -> None:
    guide = (DEPLOY / "README.md").read_text()
    kept = {name for name, one in of_kind(documents, "PodDisruptionBudget").items() if "minAvailable" in one["spec"]}
    for name in kept:
        assert f"{name}-0" in guide.partition("### Drain a machine")[2].partition("###")[0], "a drain waits for it"
        assert name in of_kind(documents, "StatefulSet")
    if kept:
        (server,) = templates(documents)["mlflow"]["spec"]["containers"]
        assert "MLFLOW_BACKEND_STORE_URI" in {entry["name"] for entry in server["env"]}
        assert '"$(MLFLOW_BACKEND_STORE_URI)"' in guide


def test_jobs_alone_reach_an_object_store_where_that_is_switched_on(documents: Documents) -> None:
    opened = [*documents, *build(DEPLOY / "object-store")]
    assert allowed(opened, named("lorot-job"), OUTSIDE, 443)
    assert not allowed(opened, named("lorot-job"), OUTSIDE, 80)
    for name in templates(documents):
        assert not allowed(opened, named(name), OUTSIDE, 443) or name == "lorot", name
    for inside in ("10.0.0.1", "169.254.169.254", "172.20.0.1", "192.168.1.1", "100.64.0.7"):
        assert not allowed(opened, named("lorot-job"), inside, 443), inside
    assert not allowed(opened, named("lorot-job"), named("lorot"), 8080)


def test_a_store_of_ones_own_is_reached_at_its_address_alone(tmp_path: Path) -> None:
    folder = tmp_path / "deploy"
    shutil.copytree(DEPLOY, folder)
    path = folder / "object-store/network.yaml"
    path.write_text(
        re.sub(r"^    # (- to:|    - ipBlock|  ports:|    - \{protocol)", r"    \1", path.read_text(), flags=re.M)
    )
    opened = [*build(folder / "overlays/gpu-cluster"), *build(folder / "object-store")]
    validate(opened[-1])
    assert allowed(opened, named("lorot-job"), "10.0.0.9", 9000)
    assert not allowed(opened, named("lorot-job"), "10.0.0.8", 9000)


def test_jobs_carry_the_labels_that_the_policies_speak_of(documents: Documents, tmp_path: Path) -> None:
    settings = told(documents, tmp_path)
    found = jobs_of(settings, tmp_path)
    labels = found[0]["spec"]["template"]["metadata"]["labels"]
    assert named("lorot-job").items() <= labels.items()


def test_the_settings_name_what_the_overlay_makes(documents: Documents, tmp_path: Path) -> None:
    settings = told(documents, tmp_path)
    place = settings.backends.kubernetes
    assert (place.enabled, place.namespace, settings.backends.local.enabled) == (True, "lorot", False)
    assert {place.results_claim, place.data_claim} <= set(of_kind(documents, "PersistentVolumeClaim"))
    assert place.service_account in of_kind(documents, "ServiceAccount")
    classes = {name: document["value"] for name, document in of_kind(documents, "PriorityClass").items()}
    ordered = sorted({0: place.priority_class, **place.priority_classes}.items())
    assert [name for _, name in ordered if name] == sorted(classes, key=classes.__getitem__)
    assert (place.queue is None) or place.queue in of_kind(documents, "LocalQueue")
    host, _, port = str(settings.tracking_uri).removeprefix("http://").partition(":")
    assert int(port) in {entry["port"] for entry in of_kind(documents, "Service")[host]["spec"]["ports"]}
    (container,) = templates(documents)["lorot"]["spec"]["containers"]
    mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in templates(documents)["lorot"]["spec"]["volumes"]}
    assert mounted[str(settings.state)] == "state"
    results = volumes[mounted[str(settings.results)]]["persistentVolumeClaim"]["claimName"]
    assert results == place.results_claim, "the service sees what its jobs write"
    line = container["args"]
    assert Path(line[line.index("--settings") + 1]).parent.as_posix() in mounted
    (wait,) = templates(documents)["lorot"]["spec"]["initContainers"]
    assert wait["command"][-1] == f"{settings.state}/tokens.json"


def test_the_pods_of_jobs_come_from_what_the_overlay_makes(documents: Documents, tmp_path: Path) -> None:
    spec = jobs_of(told(documents, tmp_path), tmp_path)[0]["spec"]["template"]["spec"]
    claims = {
        volume["persistentVolumeClaim"]["claimName"] for volume in spec["volumes"] if "persistentVolumeClaim" in volume
    }
    assert claims <= set(of_kind(documents, "PersistentVolumeClaim"))
    assert spec["serviceAccountName"] == "lorot-job"


def test_the_record_is_backed_up_each_night_from_where_the_service_and_mlflow_keep_it(
    documents: Documents, tmp_path: Path
) -> None:
    if "postgres" not in templates(documents):
        assert "backup" not in templates(documents)
        return
    (container,) = templates(documents)["backup"]["spec"]["containers"]
    (server,) = templates(documents)["mlflow"]["spec"]["containers"]
    own, its = ({entry["name"]: entry for entry in one["env"]} for one in (container, server))
    for name in ("MLFLOW_S3_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        assert own[name] == its[name]
    assert own["PGPASSWORD"]["valueFrom"] == its["POSTGRES_PASSWORD"]["valueFrom"]
    line = container["args"]
    said = {name: line[line.index(name) + 1] for name in ("--settings", "--database", "--artifacts")}
    assert said["--artifacts"] == its["MLFLOW_ARTIFACTS_DESTINATION"]["value"]
    assert said["--database"] == its["MLFLOW_BACKEND_STORE_URI"]["value"].replace(":$(POSTGRES_PASSWORD)", "").replace(
        "+psycopg2", ""
    )
    mounted = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    settings = told(documents, tmp_path)
    assert mounted[str(settings.state)]["readOnly"] is True
    assert Path(said["--settings"]).parent.as_posix() in mounted
    assert "readOnly" not in mounted[line[1]]
    assert templates(documents)["backup"]["spec"]["restartPolicy"] == "Never"


def test_a_backup_runs_where_the_service_has_its_volume_and_a_restore_needs_none_to_run(documents: Documents) -> None:
    if "backup" not in templates(documents):
        return
    claim = of_kind(documents, "PersistentVolumeClaim")["lorot-state"]
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]
    (term,) = templates(documents)["backup"]["spec"]["affinity"]["podAffinity"][
        "requiredDuringSchedulingIgnoredDuringExecution"
    ]
    assert matching(documents, term["labelSelector"]["matchLabels"]) == ["lorot"]
    assert term["topologyKey"] == "kubernetes.io/hostname"
    restore = (DEPLOY / "README.md").read_text().partition("create job restore")[2].partition("kubectl create")[0]
    assert "del(.spec.template.spec.affinity)" in restore, "the service is scaled to nothing then"


def test_what_ended_jobs_do_not_need_goes_each_week(documents: Documents, tmp_path: Path) -> None:
    spec = of_kind(documents, "CronJob")["gc"]["spec"]
    assert re.fullmatch(r"\d+ \d+ \* \* [0-6]", spec["schedule"])
    (container,) = templates(documents)["gc"]["spec"]["containers"]
    settings = told(documents, tmp_path)
    line = container["args"]
    mounted = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert Path(line[line.index("--settings") + 1]).parent.as_posix() in mounted
    assert "readOnly" not in mounted[str(settings.results)]
    (volume,) = (one for one in templates(documents)["gc"]["spec"]["volumes"] if one["name"] == "results")
    assert volume["persistentVolumeClaim"]["claimName"] == settings.backends.kubernetes.results_claim
    assert str(settings.state) not in mounted, "it needs no tokens"


def test_what_is_added_to_an_overlay_is_what_the_schemas_demand() -> None:
    for name in ("demo", "object-store"):
        for document in build(DEPLOY / name):
            validate(document)


def test_no_password_lies_in_any_file_and_jobs_cannot_name_the_secret_that_holds_them(documents: Documents) -> None:
    from service.jobs.manifests.pods import SECRET_KEY

    assert not of_kind(documents, "Secret")
    for template in templates(documents).values():
        for container in containers(template):
            for entry in container.get("env", []):
                if re.search("PASSWORD|SECRET|KEY", entry["name"]):
                    assert entry["valueFrom"]["secretKeyRef"]["key"] != SECRET_KEY
                    assert "value" not in entry


def test_the_readme_speaks_of_what_is_there() -> None:
    text = (DEPLOY / "README.md").read_text()
    for path in re.findall(r"kubectl (?:apply|delete|kustomize) (?:--server-side )?-k (deploy/[a-z/-]+)", text):
        assert (DEPLOY.parent / path / "kustomization.yaml").exists(), path
    used = {
        entry["valueFrom"]["secretKeyRef"]["key"]
        for overlay in OVERLAYS
        for template in templates(build(DEPLOY / "overlays" / overlay)).values()
        for container in containers(template)
        for entry in container.get("env", [])
        if "valueFrom" in entry
    }
    assert used == set(re.findall(r"--from-literal=([a-z-]+)=\"\$\(", text))
    assert "run on a real cluster" in text
    for name in OVERLAYS:
        assert f"deploy/overlays/{name}" in text


def test_our_images_have_the_version_of_this_checkout(documents: Documents, tmp_path: Path) -> None:
    project = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())["project"]
    images = {container["image"] for template in templates(documents).values() for container in containers(template)}
    ours = {image for image in images if image.startswith("lorot")} | {
        told(documents, tmp_path).backends.kubernetes.image
    }
    # A tag that moves would be pulled at each start, also where the image was only loaded.
    assert {image.partition(":")[2] for image in ours} == {project["version"]}
    more = {"lorot-backup"} & {f"lorot-{name}" for name in templates(documents)}
    assert {image.partition(":")[0] for image in ours} == {"lorot", "lorot-service", "lorot-record"} | more
    assert not any(image.endswith(":latest") or ":" not in image for image in images)


def test_files_are_yaml_without_surprises() -> None:
    for path in DEPLOY.rglob("*.yaml"):
        text = path.read_text()
        assert "\t" not in text, path
        assert all(len(line) <= 120 for line in text.splitlines()), path
        assert list(yaml.safe_load_all(text))
