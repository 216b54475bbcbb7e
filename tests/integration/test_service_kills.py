"""The service, MLflow, PostgreSQL and the engine are killed at random moments while jobs run and clients submit.

Jobs run here and in containers, and one of them trains all the while. LOROT_ROUNDS says how many kills (default 6),
LOROT_SEED which: the seed of a failure is in its message.
"""

import json
import os
import random
import signal
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest
import yaml
from processes import await_
from record_server import PostgreSQL, Server, free_port

from service import store
from service.jobs.job import Attempt
from tests.integration.debian import RefusedError
from tests.integration.engine import BASE, Engine, answers, own
from tests.integration.service_process import CONFIG
from tests.integration.tiny_service import DATA, TinyService, container_spec, spec
from tests.soak import checks

pytestmark = pytest.mark.integration

ROUNDS = int(os.environ.get("LOROT_ROUNDS", "6"))
SEED = int(os.environ.get("LOROT_SEED", random.SystemRandom().randrange(10**6)))
CLIENTS = 4
# Enough that there is work at every kill.
JOBS = 4 + 4 * ROUNDS
# Of the training: as many as it makes while everything is killed, more or less.
STEPS, LOG_EVERY = 100 * ROUNDS, 5
_PATIENCE_S = 600.0 + 60 * ROUNDS


class Mortal(Protocol):
    """What can be killed, and started again on what it left."""

    def kill(self) -> None: ...
    def start(self) -> None: ...


class Everything:
    """The service and all that it stands on.

    Attributes:
        engine: one of the tests' own, which may be killed; its containers outlive it. None: no job is a container.
    """

    def __init__(self, folder: Path, engine: Engine | None) -> None:
        self.engine = engine
        self.postgresql = PostgreSQL()
        self.server = Server(folder, self.postgresql.database("killed"))
        self.service = TinyService(folder, free_port())
        # In the order that they are brought back in: MLflow does not start without its database.
        self._mortals: dict[str, Mortal] = {"postgresql": self.postgresql, "server": self.server}
        backends = {}
        if engine is not None:
            self._mortals["engine"] = engine
            backends["docker"] = {"enabled": True, "url": engine.url, "image": BASE}
        self._mortals["service"] = self.service
        roots = [str(DATA), str(folder / "data")]
        self.service.configure(tracking_uri=self.server.uri, cpus=4, backends=backends, data_roots=roots)

    @property
    def deck(self) -> list[str]:
        """What may be struck, each as often as it is to be."""
        return [*self._mortals, "service", "all"]

    def is_contained(self, key: str) -> bool:
        """Whether the job of a key is a container: two of five are, and not the one that trains."""
        number = key.rpartition("-")[2]
        return self.engine is not None and number.isdigit() and int(number) % 5 in (1, 3)

    def start(self) -> None:
        self.server.start()
        self.service.start()
        await_(self.service.is_ready, "the service is ready", 120, self.service.told)

    def strike(self, what: str, dice: random.Random) -> None:
        """Kill it, and bring it back a moment later."""
        struck = list(self._mortals) if what == "all" else [what]
        for one in dice.sample(struck, len(struck)):
            self._mortals[one].kill()
        time.sleep(dice.uniform(0, 1))
        for one in struck:
            self._mortals[one].start()

    def containers(self) -> list[str]:
        """What is left of jobs on the engine."""
        return [] if self.engine is None else self.engine.jobs()

    def stop(self) -> None:
        self.service.kill()
        self.server.kill()
        self.postgresql.stop()
        if self.engine is not None:
            if not answers(self.engine.url):
                self.engine.start()
            self.engine.remove_jobs()


@pytest.fixture
def everything(tmp_path: Path) -> Iterator[Everything]:
    engine: Engine | None = None
    try:
        engine = own()
        engine.load_base()
    except RefusedError as error:
        if os.environ.get("LOROT_NO_SKIPS"):
            raise
        warnings.warn(f"without containers: {error}", stacklevel=1)
    made = Everything(tmp_path, engine)
    try:
        yield made
    finally:
        made.stop()


class Training:
    """The one job that trains."""

    key = "training"

    def __init__(self, service: TinyService) -> None:
        self._service = service
        config = yaml.safe_load(CONFIG.format(root=service.folder, steps=STEPS, model="kept"))
        self._body = {"spec": {"kind": "train", "name": "trained", "config": config}, "key": self.key}
        self.id = ""

    @property
    def run(self) -> Path:
        return self._service.folder / "jobs" / self.id / "run"

    def begin(self) -> None:
        """Hand it in, and wait until it trains."""
        self.id = str(self._service.ask("/v1/jobs", self._body)["id"])
        await_(lambda: self.step() > 0, "it trains", 180, self.told)

    def step(self) -> int:
        """The last one of its own record."""
        lines = self._lines()
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def told(self) -> str:
        logs = [path.read_text(errors="replace")[-2000:] for path in sorted(self.run.parent.rglob("*log*.txt"))]
        return "\n---\n".join([self._service.told(), *logs])

    def _lines(self) -> list[str]:
        path = self.run / "metrics.jsonl"
        # The last one may be half written.
        return path.read_text().split("\n")[:-1] if path.exists() else []


class Client(threading.Thread):
    """Hands in jobs with keys, each again and again until it has an answer; now and then once more after that."""

    def __init__(self, everything: Everything, number: int, ended: threading.Event) -> None:
        super().__init__(daemon=True)
        self._everything, self._service, self._ended = everything, everything.service, ended
        self._dice = random.Random(f"{SEED}/{number}")
        self._keys = [f"key-{index}" for index in range(JOBS) if index % CLIENTS == number]
        self.ids: dict[str, set[str]] = {}
        self.failure = ""

    def run(self) -> None:
        try:
            for key in self._keys:
                answers = [self._submit(key) for _ in range(1 + (self._dice.random() < 0.3))]
                self.ids[key] = set(answers)
                self._ended.wait(self._dice.uniform(0, 1))
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"

    def _submit(self, key: str) -> str:
        # Of one key always the same: another spec with it would be refused.
        seconds = random.Random(f"{SEED}/{key}").uniform(0, 3)
        made = container_spec if self._everything.is_contained(key) else spec
        body = {"spec": made(key, lines=5, seconds=round(seconds, 2)), "key": key}
        while not self._ended.is_set():
            try:
                return str(self._service.ask("/v1/jobs", body)["id"])
            except OSError as error:
                code = getattr(error, "code", 503)
                if code not in (429, 500, 502, 503, 504):
                    raise AssertionError(f"{key}: {code}: {error.read().decode()}") from None  # type: ignore[attr-defined]
            self._ended.wait(self._dice.uniform(0.05, 0.3))
        raise AssertionError(f"{key}: never answered")


def test_whatever_is_killed_each_key_has_one_job_that_ran_once_and_finished(
    everything: Everything, tmp_path: Path
) -> None:
    print(f"LOROT_SEED={SEED} LOROT_ROUNDS={ROUNDS}")
    dice = random.Random(SEED)
    service = everything.service
    everything.start()
    training = Training(service)
    training.begin()
    ended = threading.Event()
    clients = [Client(everything, number, ended) for number in range(CLIENTS)]
    for client in clients:
        client.start()
    struck: list[str] = []
    reached: list[int] = []
    # When there was no engine, seconds since the epoch.
    outages: list[tuple[float, float]] = []
    deck: list[str] = []
    try:
        for _ in range(ROUNDS):
            # Each of them as often as the others, in a new order each time.
            deck = deck or dice.sample(everything.deck, len(everything.deck))
            struck.append(deck.pop())
            time.sleep(dice.uniform(0.2, 3))
            reached.append(training.step())
            began_s = time.time()
            everything.strike(struck[-1], dice)
            if struck[-1] in ("engine", "all"):
                outages.append((began_s, time.time()))
        await_(lambda: not any(client.is_alive() for client in clients), "every submission is answered", _PATIENCE_S)
        await_(service.is_ready, "the service is ready", 120, service.told)
        await_(
            lambda: set(states(service)) == {"finished"} and states(service).total() == JOBS + 1,
            "every job has finished",
            _PATIENCE_S,
            lambda: f"seed {SEED}, struck {struck}: {states(service)}\n{service.told()}",
        )
        await_(lambda: not everything.containers(), "no container is left", 60, service.told)
    finally:
        ended.set()
    told = f"seed {SEED}, struck {struck} at steps {reached} of {STEPS}"
    assert [client.failure for client in clients] == [""] * CLIENTS, told
    answered = {key: ids for client in clients for key, ids in client.ids.items()} | {training.key: {training.id}}
    assert all(len(ids) == 1 for ids in answered.values()), (told, answered)

    # By a signal it ends in order, and the record alone, without it, says the same.
    assert service.process is not None
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(60) == 0, service.told()
    api = store.client(everything.server.uri)
    experiments = [one.experiment_id for one in api.search_experiments()]
    runs = list(store.pages(api.search_runs, experiment_ids=experiments, filter_string="tags.`lorot.job` = '1'"))
    by_key = Counter(run.data.tags["lorot.key"].rpartition("/")[2] for run in runs)
    assert by_key == Counter(answered.keys()), told
    assert {run.info.run_id for run in runs} == {next(iter(ids)) for ids in answered.values()}, told
    assert {run.info.status for run in runs} == {"FINISHED"}, told
    attempts = {run.info.run_id: json.loads(run.data.tags["lorot.job.attempts"]) for run in runs}
    contained = {
        run.info.run_id for run in runs if everything.is_contained(run.data.tags["lorot.key"].rpartition("/")[2])
    }
    # Nobody has killed a job, so each needed one start, which every new service took over. A container may have been
    # lost with the engine that just started or ended it: then the record says so, and it ran once more.
    lost = {(job, str(one["number"])): Attempt(**one) for job, own in attempts.items() for one in own[:-1]}
    assert {job for job, _ in lost} <= contained, (told, attempts)
    for one in lost.values():
        assert one.reason, (told, one)
        assert one.exit_code != 0, (told, one)
        assert any(began_s <= one.ended_s and one.started_s <= ended_s for began_s, ended_s in outages), (told, one)
    print(f"{told}: {len(contained)} of {len(attempts)} jobs in containers, {len(lost)} attempts lost with the engine")
    # The one that trains keeps no ledger; its own record says what it did.
    last = Counter((job, str(own[-1]["number"])) for job, own in attempts.items() if job != training.id)
    begun, done = service.noted()
    assert begun - Counter(lost.keys()) == last, told
    assert done - Counter(lost.keys()) == last, told
    for job in contained:
        kept = Path(api.download_artifacts(job, "outputs/ledger", str(tmp_path))).read_text()
        assert kept == (service.folder / "jobs" / job / "outputs" / "ledger").read_text(), told
    assert checks.tracked(everything.server.uri, STEPS, training.run, LOG_EVERY, "trained") == [], told
    assert reached[0] < STEPS, told


def states(service: TinyService) -> Counter[str]:
    """How many jobs stand where, as the service says; none while it does not answer."""
    found: Counter[str] = Counter()
    cursor: str | None = ""
    try:
        while cursor is not None:
            page = service.ask(f"/v1/jobs?limit=200&cursor={cursor}" if cursor else "/v1/jobs?limit=200")
            found.update(job["state"] for job in page["jobs"])
            cursor = page["next"]
    except OSError:
        return Counter()
    return found
