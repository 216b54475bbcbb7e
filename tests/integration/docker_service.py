"""`lorot serve` with a Docker engine, over an MLflow server that containers reach."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tests.integration import engine as engines
from tests.integration.engine import Engine
from tests.integration.record_server import Server
from tests.integration.service_process import Service

# Of a node that trains.
LIMITS = {"memory": "4GiB", "shm": "256MiB"}


@contextlib.contextmanager
def prepared(engine: Engine, folder: Path) -> Iterator[Service]:
    """One that is yet to be started; of its jobs nothing is left on the engine after the block."""
    record = Server(folder, host=engine.gateway)
    try:
        record.start()
        made = Service(
            folder,
            tracking_uri=record.uri,
            mounts=list(engines.mounts()),
            cpus=2,
            gpus=0,
            limits={"requests_per_minute": 10**6},
            backends={"docker": {"enabled": True, "url": engine.url, "image": engines.WORKER}},
        )
        try:
            yield made
        finally:
            made.close()
            engine.remove_jobs()
    finally:
        record.kill()
