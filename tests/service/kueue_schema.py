"""What Kueue takes: the specs of its objects as its API publishes them, refusing whatever is not in there.

From apis/kueue/v1beta2/{resourceflavor,clusterqueue,localqueue}_types.go of github.com/kubernetes-sigs/kueue: fields,
markers of validation, and the rules among fields. What of it the overlay has no use for is left out.
"""

from collections.abc import Iterator
from typing import Any

import jsonschema

VERSION = "kueue.x-k8s.io/v1beta2"
_NAME = {
    "type": "string",
    "maxLength": 253,
    "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$",
}
_RESOURCE = {
    "type": "string",
    "pattern": r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$",
}
# Of numbers the API server makes texts; a quota is never negative.
_QUANTITY = {"type": ["string", "integer"], "minimum": 0, "pattern": r"^\d+(\.\d+)?(m|k|[MGTPE]|[KMGTPE]i)?$"}
_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_EFFECT = {"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]}


def _object(*required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def _list(items: Any, most: int, least: int = 0) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


_STOP = {"enum": ["None", "Hold", "HoldAndDrain"]}
_QUOTA = _object(
    "name", "nominalQuota", name=_RESOURCE, nominalQuota=_QUANTITY, borrowingLimit=_QUANTITY, lendingLimit=_QUANTITY
)
_FLAVOR = _object("name", "resources", name=_NAME, resources=_list(_QUOTA, 64, 1))
_SPECS: dict[str, dict[str, Any]] = {
    "ResourceFlavor": _object(
        nodeLabels={**_TEXTS, "maxProperties": 8},
        nodeTaints=_list(_object("key", "effect", key={"type": "string"}, value={"type": "string"}, effect=_EFFECT), 8),
        tolerations=_list(
            _object(
                key={"type": "string"},
                operator={"enum": ["Equal", "Exists"]},
                value={"type": "string"},
                effect=_EFFECT,
                tolerationSeconds={"type": "integer"},
            ),
            8,
        ),
        topologyName=_NAME,
    ),
    "ClusterQueue": _object(
        cohortName=_NAME,
        queueingStrategy={"enum": ["StrictFIFO", "BestEffortFIFO"]},
        namespaceSelector=_object(matchLabels=_TEXTS),
        preemption=_object(
            reclaimWithinCohort={"enum": ["Never", "LowerPriority", "Any"]},
            withinClusterQueue={"enum": ["Never", "LowerPriority", "LowerOrNewerEqualPriority"]},
        ),
        resourceGroups=_list(
            _object(
                "coveredResources",
                "flavors",
                coveredResources=_list(_RESOURCE, 64, 1),
                flavors=_list(_FLAVOR, 64, 1),
            ),
            16,
        ),
        stopPolicy=_STOP,
    ),
    "LocalQueue": _object(clusterQueue=_NAME, stopPolicy=_STOP),
}
# Of no namespace.
WIDE = ("ResourceFlavor", "ClusterQueue")
KINDS = tuple(_SPECS)


def problems(document: dict[str, Any]) -> list[str]:
    """What Kueue would refuse of one of its objects, or its API server drop in silence."""
    kind = document["kind"]
    metadata = _object("name", name=_NAME, labels=_TEXTS, annotations=_TEXTS)
    if kind not in WIDE:
        metadata = _object("name", "namespace", name=_NAME, namespace=_NAME, labels=_TEXTS, annotations=_TEXTS)
    about = _object(
        *("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": VERSION},
        kind={"const": kind},
        metadata=metadata,
        spec=_SPECS[kind],
    )
    found = [
        f"{error.json_path}: {error.message}" for error in jsonschema.Draft202012Validator(about).iter_errors(document)
    ]
    return found or [*_broken_rules(kind, document["spec"])]


def _broken_rules(kind: str, spec: dict[str, Any]) -> Iterator[str]:
    for toleration in spec.get("tolerations", ()) if kind == "ResourceFlavor" else ():
        if "key" not in toleration and toleration.get("operator") != "Exists":
            yield "a toleration of all keys has the operator Exists"
        if toleration.get("operator") == "Exists" and "value" in toleration:
            yield "a toleration with the operator Exists has no value"
        if "tolerationSeconds" in toleration and toleration.get("effect") != "NoExecute":
            yield "tolerationSeconds is for the effect NoExecute"
    if kind == "ResourceFlavor" and "topologyName" in spec and not spec.get("nodeLabels"):
        yield "a topology needs a label of its nodes"
    seen: set[str] = set()
    for group in spec.get("resourceGroups", ()):
        for covered in group["coveredResources"]:
            if covered in seen:
                yield f"{covered} is in two groups"
            seen.add(covered)
        for flavor in group["flavors"]:
            if [quota["name"] for quota in flavor["resources"]] != group["coveredResources"]:
                yield f"flavor {flavor['name']} does not list the covered resources, in their order"
            if "cohortName" not in spec and any(
                quota.keys() & {"borrowingLimit", "lendingLimit"} for quota in flavor["resources"]
            ):
                yield f"flavor {flavor['name']} borrows or lends without a cohort"
