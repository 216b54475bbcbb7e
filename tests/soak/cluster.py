"""Two machines, a rendezvous, a tracking server and a disk, and what keeps a job running on them: its scheduler."""

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from service import store
from service.run_folder import RunFolder
from tests.integration.machines import Machine, Network, network
from tests.integration.processes import await_
from tests.integration.sample_logs import lines_of
from tests.soak import checks, worker

SAMPLES = 203
GLOBAL_BATCH = 64
LOG_EVERY = 50
TIMEOUT_S = 15
PORT = 5000
# Of the server behind what makes it slow, and of the rendezvous.
_HIDDEN_PORT = 5001
_MEETING_PORT = 29400
DISK_MB = 300
# More than a line of the sample log.
_LINE_BYTES = 1 << 14
JOB = f"""
name: job
output: disk
duration: {{steps}} steps
evaluate_every: 200 steps
global_batch: {GLOBAL_BATCH}
micro_batch: 8
device: cpu
timeout_s: {TIMEOUT_S}
log_samples: true
on_nonfinite: skip
nonfinite_limit: 1000
data: {{{{name: prepared, root: data, size: 32}}}}
pretext: {{{{name: lorot_e}}}}
objective: {{{{name: multi_task}}}}
model: {{{{name: resnet_small, width: 16}}}}
optimizer: {{{{lr: 0.01}}}}
schedule: {{{{warmup: 100 steps}}}}
ema: {{{{decay: 0.99}}}}
checkpoint: {{{{every: 50 steps}}}}
tracking: {{{{uri: "http://10.77.0.1:{PORT}", log_every: {LOG_EVERY} steps, system_metrics: false}}}}
registry: {{{{name: soaked}}}}
"""


class Moment(NamedTuple):
    """When the attempt began, in nanoseconds since the epoch, and the step it is at."""

    attempt_ns: int
    step: int


class Cluster:
    """What a job needs, in one folder. While it is open, a launcher that ends is started again, as a scheduler would.

    Attributes:
        folder: of everything. run: of the job.
        ends: how often launchers ended, by exit code.
        options: overrides for the launchers that are started from now on.
        left_out: images of the evaluation that were unreadable while such ones might be left out.
        is_limited: whether the run folder lies on a disk of its own, which can be filled.
        steps: of the job.
    """

    def __init__(self, folder: Path, net: Network, is_limited: bool) -> None:
        self.folder, self.hub, self.machines, self.is_limited = folder, net.hub, net.machines, is_limited
        self.ends: Counter[int] = Counter()
        self.options: list[str] = []
        self.left_out: set[str] = set()
        self._name = ""
        self._held: set[str] = set()
        self._jobs: dict[str, subprocess.Popen[str]] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self.steps = 0
        self._servers: list[subprocess.Popen[str]] = []
        self._rendezvous: subprocess.Popen[str] | None = None

    @property
    def run(self) -> Path:
        """The job's folder."""
        return self.folder / "disk" / self._name

    @property
    def line(self) -> list[str]:
        """What starts the job, or goes on with it, on one machine or as one of several."""
        return ["-m", "tests.soak.launcher", "train", "job.yaml", f"name={self._name}", "--resume"]

    @property
    def disk(self) -> Path:
        """Where the run folders lie."""
        return self.folder / "disk"

    def open(self) -> None:
        """Prepare the data, start the tracking server and the rendezvous."""
        options = [f"train_count={SAMPLES}", "val_count=30", "size=40", "--size", "40", "--shard-size", "100kB"]
        drawn = self.hub.start("-m", "service.cli", "data", "prepare", "demo", "data", "--name", "demo", *options)
        assert drawn.wait(300) == 0, self.told()
        store.ensure_ready(self.database)
        self.start_server()
        self.start_rendezvous()

    @property
    def data(self) -> Path:
        """Where the shards lie."""
        return self.folder / "data"

    def start_rendezvous(self) -> None:
        """Start the place where the machines meet, at its address, which is always the same."""
        before = self.hub.said.read_text().count("ready at") if self.hub.said.exists() else 0
        # A place without a run's name in it: nothing of the job lies on that machine.
        where = ["--host", self.hub.address, "--port", str(_MEETING_PORT)]
        self._rendezvous = self.hub.start("-m", "service.cli", "rendezvous", *where)
        await_(lambda: self.hub.said.read_text().count("ready at") > before, "the rendezvous is ready", 120, self.told)

    def kill_rendezvous(self) -> None:
        """Let it be gone."""
        assert self._rendezvous is not None
        self._rendezvous.kill()
        self._rendezvous.wait()

    @property
    def database(self) -> str:
        """Of the tracking server."""
        return f"sqlite:///{self.folder / 'server.db'}"

    def start_server(self) -> None:
        """Start the tracking server at its address, which is always the same, in the place of what is there."""
        self.kill_server()
        self._servers = [self._start_server(self.hub.address, PORT)]

    def start_failing_server(self) -> None:
        """Start one at the same address that answers all requests with errors of servers, in its place."""
        self.kill_server()
        self._servers = [self._start_proxy("0", "0", "--status", "500", "503", "429")]

    def slow_server_down(self, delay_s: float) -> None:
        """Let another take the tracking server's place, whose every answer comes so much later."""
        hidden = self._start_server("127.0.0.1", _HIDDEN_PORT)
        ask = f"import urllib.request as r; r.urlopen('http://127.0.0.1:{_HIDDEN_PORT}/health', timeout=5)"
        await_(lambda: self.hub.start("-c", ask).wait() == 0, "a second server answers", 120, self.told)
        self.kill_server()
        self._servers = [hidden, self._start_proxy(str(_HIDDEN_PORT), str(delay_s))]

    def signal_server(self, number: int) -> None:
        """Send all of the tracking server's processes a signal."""
        for server in self._servers:
            os.killpg(server.pid, number)

    def kill_server(self) -> None:
        """End what is at its address, if anything is."""
        self.signal_server(signal.SIGKILL)
        for server in self._servers:
            server.wait()
        self._servers = []

    def _start_server(self, host: str, port: int) -> subprocess.Popen[str]:
        line = ["-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
        line += ["--backend-store-uri", self.database, "--artifacts-destination", str(self.folder / "artifacts")]
        return self.hub.start(*line, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")

    def _start_proxy(self, *arguments: str) -> subprocess.Popen[str]:
        where = ["--host", self.hub.address, "--port", str(PORT)]
        return self.hub.start("-m", "tests.integration.fault_proxy", *arguments, *where)

    def begin(self, name: str, steps: int) -> None:
        """Let both machines train a job of this name, until `end`."""
        self._name, self.steps = name, steps
        (self.folder / "job.yaml").write_text(JOB.format(steps=steps))
        self._closed.clear()
        self.ends.clear()
        threading.Thread(target=self._keep_running, name="scheduler", daemon=True).start()

    def end(self) -> None:
        """Stop the job in order, if it runs."""
        self._closed.set()
        with self._lock:
            for job in self._jobs.values():
                with contextlib.suppress(ProcessLookupError):
                    job.send_signal(signal.SIGTERM)
            for job in self._jobs.values():
                job.wait(180)
            self._jobs.clear()

    def stop_all(self, numbers: Iterable[signal.Signals], pause_s: float = 0.0) -> list[int]:
        """Send all launchers these signals, one after the other; their exit codes."""
        jobs = [job for machine in self.machines if (job := self.job_on(machine))]
        for number in numbers:
            for job in jobs:
                job.send_signal(number)
            time.sleep(pause_s)
        return [job.wait(180) for job in jobs]

    def go_on_with(self, options: list[str], change: Callable[[], object] = lambda: None) -> None:
        """Stop the job in order, change something, and let it go on with these overrides."""
        with self.away(self.machines):
            self.stop_all([signal.SIGTERM])
            change()
            self.options = options
        stopped_ns = time.time_ns()
        await_(lambda: self.latest().attempt_ns > stopped_ns or self.is_done(), "the job goes on", 300, self.told)

    def settle(self) -> None:
        """Let the tracking server have what still waits for it, as `lorot sync` does for a user."""
        # The server may have been started only now.
        await_(
            lambda: self.hub.start("-m", "service.cli", "sync", str(self.run)).wait(300) == 0,
            "the tracking server has it",
            120,
            self.told,
        )

    def is_done(self) -> bool:
        """Whether the job has come to its end, and left its last word."""
        with self._lock:
            running = [job for job in self._jobs.values() if job.poll() is None]
        return self.has_ended() and not running

    def has_ended(self) -> bool:
        """Whether the job has done all of its work."""
        return bool(RunFolder(self.run).end)

    def job_on(self, machine: Machine) -> "subprocess.Popen[str] | None":
        """The launcher there, if it runs."""
        job = self._jobs.get(machine.address)
        return job if job is not None and job.poll() is None else None

    @contextlib.contextmanager
    def away(self, machines: list[Machine]) -> Iterator[None]:
        """Nothing is started on these machines within the block."""
        addresses = {machine.address for machine in machines}
        with self._lock:
            self._held |= addresses
        try:
            yield
        finally:
            self._held -= addresses

    def evaluated(self) -> int:
        """The last step whose evaluation is in the record."""
        return last_step(self.run, "val/")

    def farthest(self) -> int:
        """The last step that any attempt came to."""
        return max((line["step"] for rank in range(len(self.machines)) for line in lines_of(self.run, rank)), default=0)

    def bad_steps(self) -> set[int]:
        """Those whose losses are not finite."""
        return worker.named(self.folder)

    def spoil(self, steps: Iterable[int]) -> None:
        """Let the losses of these not be finite, from now on."""
        path = self.folder / worker.STEPS
        path.with_suffix(".new").write_text(json.dumps(sorted({*self.bad_steps(), *steps})))
        path.with_suffix(".new").replace(path)

    def bad_losses(self) -> list[dict[str, Any]]:
        """Step and samples of each that was computed, in order."""
        path = self.folder / worker.LOSSES
        return checks.read_lines(path) if path.exists() else []

    def steps_begun(self) -> int:
        """Step attempts that workers of rank 0 have written down."""
        return len(lines_of(self.run, 0))

    def latest(self, rank: int = 0) -> Moment:
        """Where the job is, by the newest line of a rank's samples; it is asked often, so only the end is read."""
        path = self.run / f"samples-rank{rank}.jsonl"
        try:
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - _LINE_BYTES))
                lines = file.read().split(b"\n")[:-1]
            told = json.loads(lines[-1])
        except (OSError, ValueError, IndexError):
            # None yet, or one that was cut short.
            return Moment(0, 0)
        return Moment(int(told["attempt"]), told["step"])

    def is_complete(self) -> bool:
        """Whether all machines train together, and none of them is on its way back."""
        attempts = {self.latest(rank).attempt_ns for rank in range(len(self.machines))}
        return len(attempts) == 1 and 0 not in attempts and all(machine.workers() for machine in self.machines)

    def checkpoints(self) -> list[Path]:
        """The newest first."""
        return sorted((self.run / "checkpoints").glob("step-????????"), reverse=True)

    def told(self) -> str:
        """What there is to read when something fails."""
        logs = [*self.folder.glob("said-*.txt"), *self.run.glob("*.log"), *self.run.glob("log-*.txt")]
        logs += self.run.glob("error.json")
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in logs)

    def _keep_running(self) -> None:
        while not self._closed.wait(0.5):
            with self._lock:
                for machine in self.machines:
                    self._look_after(machine)

    def _look_after(self, machine: Machine) -> None:
        """Start the launcher there, unless it runs, or the job is done; under the lock."""
        job = self._jobs.get(machine.address)
        if job is not None and job.poll() is None:
            return
        if job is not None:
            self.ends[job.returncode] += 1
            if checks.ends({job.returncode: 1}):
                said = machine.said.read_text(errors="replace")[-1000:]
                print(f"a launcher on {machine.address} has ended with {job.returncode}:\n{said}", flush=True)
            del self._jobs[machine.address]
        if self.has_ended() or machine.address in self._held or self._closed.is_set():
            return
        where = ["--nnodes", "1:2", "--nproc", "1", "--rdzv", f"{self.hub.address}:{_MEETING_PORT}"]
        self._jobs[machine.address] = machine.start(*self.line, *self.options, *where)


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Machines, server and disk; all of them are gone after the block. Raises RefusedError where they cannot be."""
    disk = folder / "disk"
    disk.mkdir()
    line = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "lorot-soak", str(disk)]
    is_limited = subprocess.run(line, capture_output=True).returncode == 0
    try:
        with network(2, folder) as net:
            made = Cluster(folder, net, is_limited)
            made.open()
            try:
                yield made
            finally:
                made.end()
    finally:
        if is_limited:
            subprocess.run(["umount", "-l", str(disk)], check=True)


def last_step(run: Path, figures: str = "train/") -> int:
    """The last step whose figures of this kind are in the record."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return max((int(json.loads(line)["step"]) for line in lines if f'"{figures}' in line), default=0)


def rate(made: Cluster, seconds: float) -> float:
    """Steps a second that the job makes undisturbed, measured between two of its records."""
    await_(lambda: last_step(made.run) > 2 * LOG_EVERY, "both machines train", 300, made.told)
    first, began = last_step(made.run), time.monotonic()
    await_(lambda: time.monotonic() > began + seconds, "time passes", seconds + 60)
    last = last_step(made.run)
    # To the next record, so that whole stretches between two of them are measured.
    ended = await_(lambda: last_step(made.run) > last, "a record", 120, made.told)
    return (last_step(made.run) - first) / (ended - began)
