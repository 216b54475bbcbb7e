"""The `MLmodel` file beside a model's files: by it MLflow's own tools load and serve the folder.

It names `service.serving` as the code that loads the folder, so nothing is pickled, and lorot has to be installed where
the model is served (`mlflow models serve --env-manager local`). MLflow is not imported: the file is plain YAML
(mlflow.pyfunc, "Loader module"; mlflow.types.schema for the signature).
"""

import datetime
import importlib.metadata
import json
import platform
from typing import Any

import yaml

MLMODEL = "MLmodel"
LOADER = "service.serving"
# The request's columns, of which it has one; and what an answer has for each image.
IMAGE, PIXELS = "image", "pixels"
LABEL, PROBABILITY, PROBABILITIES = "label", "probability", "probabilities"
# The request's parameter: how many classes an answer names.
TOP = "top"

_INPUTS: list[dict[str, Any]] = [
    {"type": "binary", "name": IMAGE, "required": False},
    {"type": "any", "name": PIXELS, "required": False},
]
_OUTPUTS: list[dict[str, Any]] = [
    {"type": "string", "name": LABEL, "required": True},
    {"type": "double", "name": PROBABILITY, "required": True},
    {"type": "map", "values": {"type": "double"}, "name": PROBABILITIES, "required": True},
]
_PARAMS: list[dict[str, Any]] = [{"name": TOP, "type": "long", "default": 0, "shape": None}]


def mlmodel(weights_sha256: str, run_id: str) -> bytes:
    """The content of `MLmodel` for a folder with these weights; `run_id` may be empty."""
    content: dict[str, Any] = {
        "flavors": {"python_function": {"loader_module": LOADER, "python_version": platform.python_version()}},
        "mlflow_version": _mlflow_version(),
        # The same weights are the same model, however often they are written.
        "model_uuid": weights_sha256[:32],
        "signature": {
            "inputs": json.dumps(_INPUTS),
            "outputs": json.dumps(_OUTPUTS),
            "params": json.dumps(_PARAMS),
        },
        "utc_time_created": str(datetime.datetime.now(datetime.UTC).replace(tzinfo=None)),
    }
    if run_id:
        content["run_id"] = run_id
    return yaml.safe_dump(content, sort_keys=True).encode()


def _mlflow_version() -> str:
    for name in ("mlflow", "mlflow-skinny"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"
