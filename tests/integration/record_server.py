"""A real `mlflow server` on SQLite or on PostgreSQL. Both can be killed, and started again at the same address."""

import contextlib
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import psycopg2
import pytest

from service import store
from service.errors import TrackingError
from tests.integration import debian
from tests.integration.debian import RefusedError
from tests.integration.processes import await_, lives


class PostgreSQL:
    """A cluster of its own in a temporary folder, run by a user without privileges; no other one is touched."""

    def __init__(self) -> None:
        self._programs = _postgresql_programs()
        self._folder = Path(tempfile.mkdtemp(prefix="lorot-postgresql-"))
        self._user = "nobody" if os.geteuid() == 0 else None
        if self._user is not None:
            os.chown(self._folder, pwd.getpwnam(self._user).pw_uid, -1)
        self.port = free_port()
        data = self._folder / "data"
        self._run("initdb", "-D", str(data), "-U", "lorot", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
        self.start()

    def start(self) -> None:
        """On what it left; returns when it answers."""
        options = f"-F -p {self.port} -c listen_addresses=127.0.0.1 -k {self._folder}"
        data, log = str(self._folder / "data"), self._folder / "log"
        try:
            self._run("pg_ctl", "-D", data, "-l", str(log), "-w", "-o", options, "start")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{log.read_text()[-2000:]}") from None

    def kill(self) -> None:
        """All of its processes at once."""
        note = self._folder / "data" / "postmaster.pid"
        first = psutil.Process(int(note.read_text().split()[0]))
        # Lest it bears another one that nobody has counted.
        first.suspend()
        family = [first, *first.children(recursive=True)]
        for process in family:
            process.kill()
        await_(lambda: not any(map(lives, family)), "PostgreSQL is dead", 20)
        # Its number may be a dead process's for ever where nobody looks after orphans.
        for left in (note, self._folder / f".s.PGSQL.{self.port}.lock"):
            left.unlink(missing_ok=True)

    def database(self, name: str) -> str:
        """The address of a new database."""
        self._run("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", "lorot", name)
        return f"postgresql+psycopg2://lorot@127.0.0.1:{self.port}/{name}"

    @contextlib.contextmanager
    def holding(self, database: str, table: str) -> Iterator[Callable[[], bool]]:
        """Whoever writes to the table waits, until the block or the cluster has ended; yields whether anybody does."""
        place = {"host": "127.0.0.1", "port": self.port, "user": "lorot", "dbname": database}
        with contextlib.closing(psycopg2.connect(**place)) as connection, connection.cursor() as cursor:
            cursor.execute(f"LOCK TABLE {table} IN EXCLUSIVE MODE")

            def is_awaited() -> bool:
                cursor.execute("SELECT FROM pg_locks WHERE relation = %s::regclass AND NOT granted", (table,))
                return cursor.rowcount > 0

            yield is_awaited

    def stop(self) -> None:
        """End the cluster and remove it."""
        if (self._folder / "data" / "postmaster.pid").exists():
            self._run("pg_ctl", "-D", str(self._folder / "data"), "-m", "immediate", "-w", "stop")
        shutil.rmtree(self._folder, ignore_errors=True)

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(self._programs / program), *arguments],
            cwd=self._folder,
            user=self._user,
            stdin=subprocess.DEVNULL,
            stdout=(self._folder.parent / f"{self._folder.name}.out").open("ab"),
            stderr=subprocess.STDOUT,
            timeout=120,
        )
        said = self._folder.parent / f"{self._folder.name}.out"
        assert done.returncode == 0, said.read_text(errors="replace")[-3000:]
        said.unlink()


class Server:
    """An `mlflow server`. Its address stays the same over `kill` and `start`."""

    def __init__(self, folder: Path, database: str | None = None, host: str = "127.0.0.1") -> None:
        self._host, self.port = host, free_port()
        self.uri = f"http://{host}:{self.port}"
        self._folder = folder
        self._database = database or f"sqlite:///{folder / 'server.db'}"
        self._process: subprocess.Popen[bytes] | None = None
        if database is None:
            store.ensure_ready(self._database)

    def start(self) -> None:
        """Start it unless it runs, and wait until it answers."""
        if self._process is not None:
            return
        environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
        environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
        command = [sys.executable, "-m", "mlflow", "server", "--host", self._host, "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", self._database]
        command += ["--artifacts-destination", str(self._folder / "server-artifacts")]
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=self._folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        for _ in range(1800):
            try:
                store.ensure_ready(self.uri)
                return
            except TrackingError:
                assert self._process.poll() is None, (self._folder / "server.log").read_text()[-3000:]
                time.sleep(0.1)
        raise AssertionError("the server did not start within three minutes")

    def kill(self) -> None:
        """At once, its worker processes included."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@contextlib.contextmanager
def answering(folder: Path, database: str) -> Iterator[Server]:
    """A server with a new record, on "sqlite" or on "postgresql"."""
    cluster = PostgreSQL() if database == "postgresql" else None
    try:
        made = Server(folder, None if cluster is None else cluster.database("mlflow"))
        made.start()
        yield made
        made.kill()
    finally:
        if cluster is not None:
            cluster.stop()


def free_port() -> int:
    """A port nobody listens on.

    Of a range of this test process's own, below those that the kernel gives away: it may take a while to be taken.
    """
    process = int(os.environ.get("PYTEST_XDIST_WORKER", "gw3")[2:])
    first = 20_000 + 3_000 * (process % 4)
    for port in random.SystemRandom().sample(range(first, first + 3_000), 500):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no port is free")


def _postgresql_programs() -> Path:
    """The folder of initdb and the rest; installed if it is missing, or the test is left out with the reason."""
    if (found := _installed()) is not None:
        return found
    try:
        debian.install({"initdb": "postgresql"})
    except RefusedError as error:
        pytest.skip(str(error))
    found = _installed()
    assert found is not None, "apt-get has installed no initdb"
    return found


def _installed() -> Path | None:
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    beside = shutil.which("initdb")
    return places[-1].parent if places else Path(beside).parent if beside else None
