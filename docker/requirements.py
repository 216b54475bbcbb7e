"""What an image installs, by pyproject.toml: `python requirements.py PYPROJECT service|backup|record|worker`."""

import re
import sys
import tomllib
from pathlib import Path

# What trains and evaluates; the service starts such jobs, and imports none of it.
WORKERS_ONLY = ("deepspeed", "faster-coco-eval", "matplotlib", "numba", "scipy", "torch", "torchvision")
# The service speaks to an MLflow server, for which its client is enough.
CLIENT = {"mlflow": "mlflow-skinny"}
# A tracking server on PostgreSQL, with its artifacts in an object store.
RECORD = ("mlflow", "psycopg2-binary", "boto3")
# On top of the service's: what a backup asks the record's database and store with.
BACKUP = ("sqlalchemy", "psycopg2-binary", "boto3")
# For a GPU: DALI in torch's flavour of CUDA. s3:// as a place of data.
WORKER_EXTRAS = ("cu13", "remote")


def requirements(project: dict, image: str) -> list[str]:
    """Lines for pip; which versions exactly is up to constraints.txt."""
    dependencies = {name_of(line): line for line in project["dependencies"]}
    if missing := [name for name in (*WORKERS_ONLY, *CLIENT) if name not in dependencies]:
        raise SystemExit(f"{', '.join(missing)}: in no line of pyproject.toml's dependencies any more")
    if image == "worker":
        extras = [line for extra in WORKER_EXTRAS for line in project["optional-dependencies"][extra]]
        return [*dependencies.values(), *extras]
    if image in ("record", "backup"):
        return [dependencies.get(name, name) for name in (RECORD if image == "record" else BACKUP)]
    chosen = {name: line for name, line in dependencies.items() if name not in WORKERS_ONLY}
    return [CLIENT[name] + line[len(name) :] if name in CLIENT else line for name, line in chosen.items()]


def name_of(line: str) -> str:
    """Of a requirement, as package indexes compare it."""
    return re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0].lower().replace("_", "-")


if __name__ == "__main__":
    print("\n".join(requirements(tomllib.loads(Path(sys.argv[1]).read_text())["project"], sys.argv[2])))
