"""Jobs as processes of this machine, under the service's user. They outlive the service. Imports no torch.

An attempt is a `service.jobs.runner` with the command below it. Whether it lives is told by a lock that the kernel
takes from it when it dies, and how it ended by a file: nothing of it is kept in the service's memory.

A job gets the GPUs that the queue gave it and no others, and as many threads as its `resources.cpus`. More than its
`resources.memory` it may not use: where a part of the tree of cgroups was handed over to the service the kernel sees to
that, else its runner, which looks once a second and kills it; use docker for a hard limit in any case.
`resources.shm` is not limited by itself, what of it is used counts as memory.
"""

import contextlib
import fcntl
import fnmatch
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

import service
from service import holder
from service.errors import BackendError, ConfigError
from service.jobs import log_file, memory_group, orders, runner
from service.jobs.backends import Handle, Order, Status
from service.jobs.job import Job
from service.jobs.places import PlaceLostError
from service.jobs.process_family import marked, signal_family
from service.jobs.settings import ServiceSettings
from service.jobs.spec import num_bytes
from service.whole_file import write_json

_log = logging.getLogger(__name__)

_NAME = re.compile(r"lorot-([0-9a-f]{12})-([1-9][0-9]*)")
# How much later than its grace an attempt is killed from here, if its runner has not done it.
_SLACK_S = 5.0
# What the owner of a local job may set. One by one, since beside most of them are others that make a library load a
# file or write one, as OMP_TOOL_LIBRARIES, MKL_VERBOSE_OUTPUT_FILE, NCCL_NET_PLUGIN and TORCH_LOGS_OUT do.
_MAY_SET = (
    *("OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_PLACES", "OMP_SCHEDULE", "OMP_DYNAMIC", "OMP_WAIT_POLICY"),
    *("KMP_AFFINITY", "KMP_BLOCKTIME", "MKL_NUM_THREADS", "MKL_DYNAMIC", "MKL_CBWR", "OPENBLAS_NUM_THREADS"),
    *("NUMBA_NUM_THREADS", "TOKENIZERS_PARALLELISM", "TZ", "NO_COLOR"),
    *("NCCL_DEBUG", "NCCL_DEBUG_SUBSYS", "NCCL_ALGO", "NCCL_PROTO", "NCCL_BUFFSIZE", "NCCL_NTHREADS"),
    *("NCCL_MIN_NCHANNELS", "NCCL_MAX_NCHANNELS", "NCCL_P2P_DISABLE", "NCCL_P2P_LEVEL", "NCCL_SHM_DISABLE"),
    *("NCCL_IB_DISABLE", "NCCL_IB_HCA", "NCCL_IB_TIMEOUT", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"),
    *("TORCH_CPP_LOG_LEVEL", "TORCH_DISTRIBUTED_DEBUG", "TORCH_LOGS", "TORCH_SHOW_CPP_STACKTRACES"),
    *("TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_BLOCKING_WAIT", "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"),
    *("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"),
    *("PYTORCH_NO_CUDA_MEMORY_CACHING", "CUDA_LAUNCH_BLOCKING", "CUDA_DEVICE_MAX_CONNECTIONS"),
    *("CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"),
)
_SECRETS = ("HF_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
# What else a job has of the service's own environment: its places, and how the record and its stores are reached.
_INHERITED = (
    *("PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "LC_*", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH"),
    *("VIRTUAL_ENV", "XDG_CACHE_HOME", "CUDA_HOME", "HF_HOME", "TORCH_HOME", "LOROT_*", "MLFLOW_*", "AWS_*"),
    *("AZURE_*", "GOOGLE_APPLICATION_CREDENTIALS", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"),
    *("CURL_CA_BUNDLE", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),
)
_NOT_PASSED = (
    "LOROT_TOKEN",
    "LOROT_DATABASE",
    "LOROT_RUN_ID",
    "LOROT_JOB_*",
    "LOROT_LAUNCHED",
    "LOROT_RENDEZVOUS",
    "LOROT_RUNNER_LOCK",
)
_UNWRITTEN = {"MLFLOW_TRACKING_URI"}


class Local:
    """See `service.jobs.backends.Backend`."""

    name = "local"

    def __init__(self, settings: ServiceSettings) -> None:
        self._settings = settings
        self._results = settings.results.absolute()
        # The runners that this very process has started, to be waited for when they have ended.
        self._started: dict[str, subprocess.Popen[bytes]] = {}
        # When what a killed runner has left was first seen, by the monotonic clock.
        self._left: dict[str, float] = {}

    def check(self, job: Job) -> None:
        """Refuse a container; see `Backend.check`."""
        if job.spec.kind == "container":
            raise ConfigError("backend: the local one runs no containers; use docker or kubernetes")
        more = self._settings.backends.local.environment
        for given, allowed in (("environment", _MAY_SET), ("secrets", (*_MAY_SET, *_SECRETS))):
            for name in getattr(job.spec, given):
                if not _matches(name, (*allowed, *more)):
                    raise ConfigError(
                        f"{given}.{name}: local jobs run as the service's user and may not set it; the operator "
                        "allows more in backends.local.environment, and containers take any"
                    )

    def start(self, order: Order) -> Handle:
        """Start the attempt's runner, unless one lives or has lived."""
        self.check(order.job)
        folder = order.folder / orders.ATTEMPTS / str(order.number)
        handle = {"folder": str(folder)}
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(folder / runner.LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise BackendError(f"{folder}: cannot be written ({error.strerror})") from None
        try:
            try:
                # Handed over to the runner: it is held without a gap, and is free again should this process die first.
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return handle
            if (folder / runner.BEGUN).exists() or (folder / runner.EXIT).exists():
                return handle
            told: dict[str, Any] = {"name": order.name, "job": order.job.id, "command": list(order.command)}
            variables = self._environment(order)
            # Addresses may hold a password: never in a file.
            unwritten = {name: variables.pop(name) for name in _UNWRITTEN & variables.keys()}
            told |= {"environment": variables, "grace_s": order.job.spec.grace_s}
            if most := order.job.spec.resources.memory:
                told["memory_bytes"] = num_bytes(most)
            # It has what the job was given, which is nobody else's.
            write_json(folder / runner.ORDER, told)
            self._started[order.name] = subprocess.Popen(
                [sys.executable, "-m", "service.jobs.runner", str(folder)],
                env={
                    **_inherited(self._settings.backends.local.environment),
                    **orders.secret_values(order.job.spec, self._settings),
                    **unwritten,
                    runner.LOCK_VARIABLE: str(lock),
                },
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(lock,),
                start_new_session=True,
            )
        except OSError as error:
            raise BackendError(f"{order.name}: cannot be started ({error.strerror})") from None
        finally:
            os.close(lock)
        return handle

    def status(self, name: str, handle: Handle) -> Status:
        """See `Backend.status`."""
        folder = self._folder(name, handle)
        if folder is None:
            return Status("gone")
        begun = runner.read(folder / runner.BEGUN)
        started_s = float(begun.get("started_s", 0.0))
        if holder.is_held(folder / runner.LOCK):
            return Status("running", started_s=started_s, nodes=("node 0: running",))
        if name in self._started:
            # The lock goes with the process; what is left of it in the kernel's table goes here.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._started.pop(name).wait(timeout=5)
        # It was written before the lock was let go.
        ended = runner.read(folder / runner.EXIT)
        if ended:
            return Status(
                "ended",
                exit_code=ended.get("exit_code"),
                reason=_reason(ended),
                out_of_memory=bool(ended.get("out_of_memory")),
                started_s=started_s,
                ended_s=float(ended.get("ended_s", 0.0)),
                nodes=(f"node 0: exit code {ended.get('exit_code')}",),
            )
        if holder.is_launched(folder.parents[1] / orders.RUN):
            # The runner and the launcher were killed; the workers see that and end by themselves.
            return Status("running", started_s=started_s, nodes=("node 0: left alone, about to end",))
        if self._end_what_is_left(name, folder):
            return Status("running", started_s=started_s, nodes=("node 0: its runner is gone, what is left is ended",))
        return Status("gone", reason="its processes are gone, and none of them said why", started_s=started_s)

    def logs(
        self,
        name: str,
        handle: Handle,
        *,
        node: int = 0,
        tail: int | None = None,
        follow: Callable[[], bool] | None = None,
        since: str = "",
    ) -> Iterator[bytes]:
        """See `Backend.logs`; there is one node, and no place but the bytes of its file."""
        if since:
            raise PlaceLostError("a log in a file is counted in bytes")
        folder = self._folder(name, handle)
        if folder is None or node:
            return iter(())
        lives = (lambda: holder.is_held(folder / runner.LOCK)) if follow is not None else None
        return log_file.read(folder / runner.LOG, tail=tail, follow=follow, lives=lives)

    def cancel(self, name: str, handle: Handle, grace_s: float) -> None:
        """See `Backend.cancel`. The runner kills after the grace; if it was killed itself, a later call does."""
        folder = self._folder(name, handle)
        if folder is None or not holder.is_held(folder / runner.LOCK):
            return
        asked = runner.read(folder / runner.STOP)
        if not asked:
            asked = {"asked_s": time.time(), "grace_s": grace_s}
            try:
                # The runner looks there: a signal could come before it listens.
                write_json(folder / runner.STOP, asked)
            except OSError as error:
                raise BackendError(f"{name}: cannot be asked to stop ({error.strerror})") from None
        begun = runner.read(folder / runner.BEGUN)
        if _process(begun.get("runner")) is not None:
            return
        command = _process(begun.get("command"))
        is_late = time.time() > float(asked.get("asked_s", 0.0)) + float(asked.get("grace_s", grace_s)) + _SLACK_S
        if command is not None:
            signal_family(command, signal.SIGKILL if is_late else signal.SIGTERM)

    def remove(self, name: str, handle: Handle) -> None:
        """Let go of the group of processes that a killed runner has left; an attempt's files stay."""
        if _NAME.fullmatch(name):
            # Found by its name, not noted in a file: the job could write there whatever it likes.
            memory_group.let_go(name)

    def reconcile(self) -> dict[str, str]:
        """Those that live."""
        found = {}
        for lock in self._results.glob(f"*/{orders.ATTEMPTS}/*/{runner.LOCK}"):
            if not (lock.parent / runner.EXIT).exists() and holder.is_held(lock):
                told = runner.read(lock.parent / runner.ORDER)
                if "name" in told and "job" in told:
                    found[str(told["name"])] = str(told["job"])
        return found

    def close(self) -> None:
        """Nothing to let go of."""

    def _environment(self, order: Order) -> dict[str, str]:
        """The order's variables, with those that hold the job to what it was given of this machine."""
        spec = order.job.spec
        threads = max(1, int(spec.resources.cpus / (spec.workers or max(1, spec.resources.gpus))))
        # "" hides all of them.
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible is not None else None
        gpus = ",".join(str(index) if names is None else names[index].strip() for index in order.gpus)
        last = {"CUDA_VISIBLE_DEVICES": gpus, "NVIDIA_VISIBLE_DEVICES": gpus or "void"}
        return {"OMP_NUM_THREADS": str(threads), **order.environment, **last}

    def _end_what_is_left(self, name: str, folder: Path) -> bool:
        """Ask what has outlived the runner and its command to end, and kill it after the grace; whether there is any.

        It would be in the next attempt's way.
        """
        left = marked(runner.NAME_VARIABLE, name)
        if not left:
            self._left.pop(name, None)
            return False
        is_new = name not in self._left
        since = self._left.setdefault(name, time.monotonic())
        grace_s = float(runner.read(folder / runner.ORDER).get("grace_s", 0.0))
        is_late = time.monotonic() > since + grace_s
        for process in left if is_new or is_late else ():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL if is_late else signal.SIGTERM)
        return True

    def _folder(self, name: str, handle: Mapping[str, Any]) -> Path | None:
        """The attempt's; None if there is none."""
        if folder := handle.get("folder"):
            return Path(folder) if Path(folder).is_dir() else None
        parts = _NAME.fullmatch(name)
        if parts is None:
            return None
        return next(self._results.glob(f"{parts[1]}*/{orders.ATTEMPTS}/{parts[2]}"), None)


def _inherited(more: Sequence[str]) -> dict[str, str]:
    """What a job needs of the service's environment, and nothing that says what somebody else's is to do."""
    allowed = (*_INHERITED, *_MAY_SET, *more)
    kept = {
        name: value for name, value in os.environ.items() if _matches(name, allowed) and not _matches(name, _NOT_PASSED)
    }
    # The runner is this very program, wherever the service was started from.
    root = str(Path(service.__file__).parents[1])
    return kept | {"PYTHONPATH": os.pathsep.join([root, *filter(None, [kept.get("PYTHONPATH")])])}


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _reason(ended: Mapping[str, Any]) -> str:
    if told := str(ended.get("reason", "")):
        return told
    if ended.get("killed_after_grace"):
        return "it did not stop within its grace and was killed"
    return ""


def _process(told: Any) -> psutil.Process | None:
    """The process that was noted, if it lives; not another one that has its number by now."""
    with contextlib.suppress(psutil.NoSuchProcess, KeyError, TypeError, ValueError):
        process = psutil.Process(int(told["pid"]))
        if holder.began(process, float(told["started_s"])) and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None
