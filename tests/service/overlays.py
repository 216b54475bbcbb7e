"""The kustomizations of deploy/ as their tests look at them: documents by kind, pods, settings, what policies allow."""

import ipaddress
from pathlib import Path
from typing import Any

from service.jobs import orders, settings_file
from service.jobs.manifests import workloads
from service.jobs.settings import ServiceSettings
from tests.service.kubernetes_orders import SHAPES, job

DEPLOY = Path(__file__).parents[2] / "deploy"
OVERLAYS = sorted(path.name for path in (DEPLOY / "overlays").iterdir())

Documents = list[dict[str, Any]]


def of_kind(documents: Documents, kind: str) -> dict[str, dict[str, Any]]:
    return {document["metadata"]["name"]: document for document in documents if document["kind"] == kind}


def templates(documents: Documents) -> dict[str, dict[str, Any]]:
    """The pod template of everything that makes pods."""
    found = {
        name: document["spec"]["template"]
        for kind in ("Deployment", "StatefulSet")
        for name, document in of_kind(documents, kind).items()
    }
    found |= {name: document["spec"]["template"] for name, document in of_kind(documents, "Job").items()}
    timed = of_kind(documents, "CronJob").items()
    return found | {name: document["spec"]["jobTemplate"]["spec"]["template"] for name, document in timed}


def containers(template: dict[str, Any]) -> list[dict[str, Any]]:
    return [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]


def told(documents: Documents, tmp_path: Path) -> ServiceSettings:
    """The service's settings of an overlay, as the service reads them."""
    path = tmp_path / "service.yaml"
    path.write_text(of_kind(documents, "ConfigMap")["lorot-settings"]["data"]["service.yaml"])
    return settings_file.load(path)


def jobs_of(settings: ServiceSettings, tmp_path: Path) -> Documents:
    """A job of two to four nodes as this service would make it."""
    settings = settings.model_copy(update={"results": tmp_path / "results"})
    own = job(**SHAPES["elastic"])
    assert own.attempt is not None
    order = orders.order(own, own.attempt, settings, {})
    return workloads.objects(order, settings.backends.kubernetes, "", jobsets=False)


def named(name: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": name}


def allowed(documents: Documents, source: dict[str, str], target: dict[str, str] | str, port: int) -> bool:
    """Whether policies let pods of these labels speak: both ends have to, once any policy selects them.

    Args:
        target: labels, or an address that is no pod's.
    """
    policies = of_kind(documents, "NetworkPolicy").values()

    def passes(direction: str, side: str, own: dict[str, str], other: dict[str, str] | str) -> bool:
        bound = [
            policy["spec"]
            for policy in policies
            if direction in policy["spec"]["policyTypes"] and _selects(policy["spec"]["podSelector"], own)
        ]
        assert bound, "the policy for all pods is missing"
        for spec in bound:
            for rule in spec.get(direction.lower(), []):
                ports = [entry["port"] for entry in rule.get("ports", [])]
                peers = rule.get(side)
                near = peers is None or any(_is(peer, other) for peer in peers)
                if near and (not ports or port in ports):
                    return True
        return False

    there = passes("Egress", "to", source, target)
    return there and (isinstance(target, str) or passes("Ingress", "from", target, source))


def _is(peer: dict[str, Any], other: dict[str, str] | str) -> bool:
    if isinstance(other, str):
        block, address = peer.get("ipBlock"), ipaddress.ip_address(other)
        return block is not None and (
            address in ipaddress.ip_network(block["cidr"])
            and not any(address in ipaddress.ip_network(part) for part in block.get("except", ()))
        )
    return "podSelector" in peer and _selects(peer["podSelector"], other)


def _selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    listed = all(labels.get(entry["key"]) in entry["values"] for entry in selector.get("matchExpressions", ()) if entry)
    return listed and selector.get("matchLabels", {}).items() <= labels.items()
