"""A Docker engine for tests, with an image that jobs run in: a running one, or one of the tests' own.

No image is fetched. The base is Debian's, made by debootstrap and imported; the worker's image is that with a `lorot`
command which runs this checkout by this interpreter, both mounted read-only, so nothing of the 7 GB is copied.
"""

import atexit
import contextlib
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest
from docker.errors import APIError, BuildError, DockerException, ImageNotFound

import docker
from service.jobs.settings import ServiceSettings
from tests.integration import debian
from tests.integration.debian import RefusedError
from tests.integration.processes import await_

ROOT = Path(__file__).resolve().parents[2]
BASE = "lorot-test-base"
WORKER = "lorot-test-worker"
PROGRAMS = {"dockerd": "docker.io", "debootstrap": "debootstrap", "curl": "curl"}
# The release of Debian that the base is made of; LOROT_SUITE=trixie for the one after.
SUITE = os.environ.get("LOROT_SUITE", "bookworm")
# What the host's Python and its packages are linked against, and what a build needs.
LIBRARIES = (
    *("libffi8", "libsqlite3-0", "libbz2-1.0", "liblzma5", "libncursesw6", "zlib1g"),
    *("python3", "python3-venv", "ca-certificates", "libgomp1"),
    # Releases after bookworm name those apart whose interface changed with the size of time_t.
    *(("libssl3", "libreadline8", "python3-distutils") if SUITE == "bookworm" else ("libssl3t64", "libreadline8t64")),
)
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
_START_S = 60


@dataclass
class Engine:
    """A Docker engine.

    Attributes:
        url: where it listens.
        folder: its state; None: it is not the tests' own, and may not be ended.
    """

    url: str
    folder: Path | None = None
    process: "subprocess.Popen[bytes] | None" = None
    options: tuple[str, ...] = ("--live-restore",)
    images: set[str] = field(default_factory=set)

    @property
    def client(self) -> Any:
        return docker.DockerClient(base_url=self.url, version="auto", timeout=1800)

    @property
    def gateway(self) -> str:
        """This machine's address as containers reach it."""
        # The engine itself does not tell it of a bridge that it has only now made.
        bridge = self.client.api.inspect_network("bridge")["Options"]["com.docker.network.bridge.name"]
        return next(one.address for one in psutil.net_if_addrs()[bridge] if one.family == socket.AF_INET)

    def start(self, *options: str) -> None:
        """Start it, with these options in the place of live-restore; returns when it answers."""
        assert self.folder is not None
        self.options = options or self.options
        line = [
            *("dockerd", "--host", self.url, "--data-root", str(self.folder / "data")),
            *("--exec-root", str(self.folder / "exec"), "--pidfile", str(self.folder / "pid")),
            *("--storage-driver", _storage(self.folder), "--log-level", "warn", *self.options),
        ]
        # One that was killed leaves this file, and its number may have been given again.
        (self.folder / "pid").unlink(missing_ok=True)
        with (self.folder / "dockerd.log").open("ab") as log:
            self.process = subprocess.Popen(line, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + _START_S
        while not answers(self.url):
            if self.process.poll() is not None or time.monotonic() > deadline:
                said = (self.folder / "dockerd.log").read_text(errors="replace")
                raise RefusedError(f"dockerd does not start here: {said[-1500:]}")
            time.sleep(0.1)

    def kill(self) -> None:
        """End it at once, as a crash would, and its containerd with it."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        assert self.folder is not None
        note = self.folder / "exec/containerd/containerd.pid"
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(note.read_text()), signal.SIGKILL)
        # Where nobody waits for orphans its number stays taken, and the next engine would take it for alive.
        note.unlink(missing_ok=True)

    def stop(self) -> None:
        """End it and everything in it."""
        if self.process is None:
            return
        with contextlib.suppress(DockerException, OSError):
            client = self.client
            for container in client.api.containers(all=True):
                client.api.remove_container(container["Id"], force=True, v=True)
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.kill()
        self.process = None

    def jobs(self) -> list[str]:
        """The containers that there are of jobs."""
        return [one["Id"] for one in self.client.api.containers(all=True, filters={"label": "lorot.job"})]

    def remove_jobs(self) -> None:
        """End what is left of jobs."""
        for container in self.jobs():
            # A service that was killed may have begun with it.
            with contextlib.suppress(APIError):
                self.client.api.remove_container(container, force=True)
        await_(lambda: not self.jobs(), "no container is left of jobs", 60)

    def load_base(self) -> str:
        """The base image: Debian with Python, made once for each engine."""
        client = self.client
        with contextlib.suppress(ImageNotFound):
            client.api.inspect_image(BASE)
            return BASE
        with base_archive().open("rb") as archive:
            client.api.import_image_from_data(archive, repository=BASE, tag="latest")
        return BASE

    def load_worker(self) -> str:
        """The image that jobs run in."""
        self.load_base()
        script = f'#!/bin/sh\nPYTHONPATH={ROOT} PYTHONUNBUFFERED=1 exec {sys.executable} -m service.cli "$@"\n'
        # Beside the interpreter lies a `lorot` too, which may be another checkout's.
        path = f"/usr/local/bin:{Path(sys.executable).parent}:$PATH"
        recipe = f"FROM {BASE}\nCOPY lorot /usr/local/bin/lorot\nENV PATH={path}\n"
        self.build(WORKER, {"Dockerfile": recipe.encode(), "lorot": script.encode()})
        return WORKER

    def build(self, tag: str, files: Mapping[str, bytes], **options: Any) -> str:
        """Build an image from these files, by the classic builder; what it said."""
        context = io.BytesIO()
        with tarfile.open(fileobj=context, mode="w") as archive:
            for name, content in files.items():
                entry = tarfile.TarInfo(name)
                entry.size, entry.mode = len(content), 0o755
                archive.addfile(entry, io.BytesIO(content))
        context.seek(0)
        try:
            _, lines = self.client.images.build(
                fileobj=context, custom_context=True, tag=tag, network_mode="host", rm=True, **options
            )
        except BuildError as error:
            said = "".join(str(line.get("stream") or line.get("error") or "") for line in error.build_log)
            raise AssertionError(f"{tag} was not built: {error.msg}\n{said[-6000:]}") from None
        return "".join(str(line.get("stream", "")) for line in lines)

    def size_bytes(self, image: str) -> int:
        return int(self.client.api.inspect_image(image)["Size"])


def settings(engine: Engine, folder: Path, **docker_settings: Any) -> ServiceSettings:
    """A service whose jobs run on this engine in the worker's image, with all of its folders below `folder`."""
    for name in ("results", "data", "state"):
        (folder / name).mkdir(exist_ok=True)
    return ServiceSettings.model_validate(
        {
            "state": folder / "state",
            "results": folder / "results",
            "data_roots": [folder / "data"],
            "mounts": mounts(),
            "backends": {"docker": {"enabled": True, "url": engine.url, "image": WORKER, **docker_settings}},
        }
    )


@cache
def mounts() -> tuple[str, ...]:
    """The folders of the host that the worker's image takes its program from."""
    places = {ROOT, Path(sys.prefix).absolute(), Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()}
    places |= {Path(sysconfig.get_path("purelib")).resolve().parents[2]}
    return tuple(
        str(place) for place in sorted(places) if not any(place != one and place.is_relative_to(one) for one in places)
    )


def answers(url: str) -> bool:
    """Whether an engine listens there."""
    try:
        client = docker.DockerClient(base_url=url, version="auto", timeout=5)
    except (DockerException, OSError):
        return False
    client.close()
    return True


def skip_unless_own(engine: Engine) -> None:
    """For tests that kill it: one that other programs use is left alone."""
    if engine.folder is None:
        pytest.skip(f"the engine at {engine.url} is not the tests' own, and may not be killed")


def running() -> Engine:
    """An engine with the worker's image: the one at DOCKER_HOST, or the tests' own, which ends with this process.

    Raises:
        RefusedError: none runs, and none can be started here; why.
    """
    engine = _existing() or own()
    if WORKER not in engine.images:
        engine.load_worker()
        engine.images.add(WORKER)
    return engine


def _existing() -> Engine | None:
    url = os.environ.get("DOCKER_HOST")
    return Engine(url) if url and answers(url) else None


@cache
def own() -> Engine:
    """The tests' own engine, started; raises RefusedError."""
    if os.getuid() != 0:
        raise RefusedError("no engine at DOCKER_HOST, and only root can start one")
    debian.install(PROGRAMS, "tini", "iptables")
    folder = Path(tempfile.mkdtemp(prefix="lorot-engine-"))
    engine = Engine(f"unix://{folder}/docker.sock", folder)
    atexit.register(_end, engine)
    # Without this a run that is terminated would leave its engine behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    engine.start()
    return engine


def _end(engine: Engine) -> None:
    # A second one would leave the engine behind after all.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    engine.stop()
    assert engine.folder is not None
    _end_shims(engine.folder)
    for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
        # What a killed engine has left mounted.
        if line.split()[1].startswith(str(engine.folder)):
            subprocess.run(["umount", "--lazy", line.split()[1]], check=False, capture_output=True)
    shutil.rmtree(engine.folder, ignore_errors=True)


def _end_shims(folder: Path) -> None:
    """End what an engine that was killed while it started a container knows nothing of any more."""
    for process in psutil.process_iter(["name", "cmdline"]):
        line = process.info["cmdline"] or []
        if process.info["name"].startswith("containerd-shim") and any(part.startswith(f"{folder}/") for part in line):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@cache
def base_archive() -> Path:
    """Debian with Python as a tar file, made once for this process (a minute); raises RefusedError.

    One that was kept is used instead if LOROT_BASE_ARCHIVE names it.
    """
    if kept := os.environ.get("LOROT_BASE_ARCHIVE"):
        return Path(kept)
    debian.install(PROGRAMS, "tini", "iptables")
    folder = Path(tempfile.mkdtemp(prefix="lorot-base-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tree = folder / "tree"
    line = ["debootstrap", "--variant=minbase", f"--include={','.join(LIBRARIES)}", SUITE, str(tree), _mirror()]
    # Nothing of it has to survive a crash, and waiting for the disk is half of the time.
    environment = os.environ | {"DPKG_FORCE": "unsafe-io"}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RefusedError(f"debootstrap failed: {done.stdout[-1000:]}")
    for path in ("var/cache/apt/archives", "var/lib/apt/lists", "usr/share/doc", "usr/share/locale", "usr/share/man"):
        shutil.rmtree(tree / path, ignore_errors=True)
    _adapt(tree)
    archive = folder / "base.tar"
    subprocess.run(["tar", "-C", str(tree), "-cf", str(archive), "."], check=True, timeout=120)
    shutil.rmtree(tree)
    return archive


def _adapt(tree: Path) -> None:
    """Let what is built on it reach packages as this machine does."""
    for source in (CERTIFICATES, Path("/etc/apt/sources.list"), Path("/etc/apt/sources.list.d/debian.sources")):
        if source.exists():
            copy = tree / source.relative_to("/")
            copy.parent.mkdir(parents=True, exist_ok=True)
            # Of lists of packages: those of the release that it is.
            copy.write_text(source.read_text().replace("bookworm", SUITE))
    (tree / "etc/pip.conf").write_text(_pip_settings())
    # The host's Python may lie below it, and is used by others than root.
    (tree / "root").chmod(0o755)


def _mirror() -> str:
    """Where this machine gets Debian's packages from."""
    line = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Codename: bookworm"]
    found = subprocess.run(line, capture_output=True, text=True, timeout=60).stdout.split()
    if not found:
        raise RefusedError("apt knows no place of Debian bookworm that a base image could be made from")
    return found[0]


def _pip_settings() -> str:
    """This machine's settings of pip, without those that name its files."""
    line = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(line, capture_output=True, text=True, timeout=60).stdout.splitlines()
    chosen = []
    for entry in listed:
        name, _, value = entry.partition("=")
        key = name.rpartition(".")[2]
        if key in ("index-url", "extra-index-url", "trusted-host", "timeout"):
            kept = [part for part in value.strip("'\"").replace("\\n", " ").split() if not part.startswith("file:")]
            chosen += [f"{key} = {' '.join(kept)}"] if kept else []
    certificate = [f"cert = {CERTIFICATES}"] if CERTIFICATES.exists() else []
    return "\n".join(["[global]", *dict.fromkeys(chosen), *certificate, ""])


def _storage(folder: Path) -> str:
    """overlay2 where the disk below takes it, else vfs, which copies whole images."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        parts = {name: Path(place) / name for name in ("lower", "upper", "work", "merged")}
        for part in parts.values():
            part.mkdir()
        options = f"lowerdir={parts['lower']},upperdir={parts['upper']},workdir={parts['work']}"
        line = ["mount", "-t", "overlay", "overlay", "-o", options, str(parts["merged"])]
        if subprocess.run(line, capture_output=True).returncode:
            return "vfs"
        subprocess.run(["umount", str(parts["merged"])], check=True)
    return "overlay2"


@contextlib.contextmanager
def without_live_restore(engine: Engine) -> Iterator[None]:
    """The engine started anew without live-restore, and as it was afterwards."""
    engine.kill()
    engine.start("--max-concurrent-downloads=3")
    try:
        yield
    finally:
        engine.kill()
        engine.start("--live-restore")


__all__ = ["APIError", "Engine", "base_archive", "running", "settings"]
