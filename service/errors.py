"""The service's errors and the exit codes of the `lorot` command."""

import signal

from pipelines.errors import DataError, LorotError

EXIT_CODES = {
    0: "success",
    1: "unexpected failure",
    2: "bad input",
    3: "bad data",
    4: "non-finite loss",
    5: "no usable checkpoint or model",
    6: "tracking server does not answer",
    7: "disk full or not writable",
    8: "a worker was lost or stopped answering",
    9: "the engine, cluster or service does not answer",
    75: "stopped early by SIGTERM, SIGUSR1 or SIGHUP; requeue it, --resume goes on",
    130: "stopped by Ctrl-C",
}
# sysexits.h's EX_TEMPFAIL: not failed, but to be started again.
REQUEUE = 75


def stop_code(number: int) -> int:
    """The exit code of a job that signal `number` has stopped."""
    return 130 if number == signal.SIGINT else REQUEUE


class ConfigError(LorotError):
    """The configuration is wrong: which key, what it holds, what would work."""


class TakenError(ConfigError):
    """The run folder is another living job's. Nothing of it may be changed, not even by saying so there."""


class NonFiniteLossError(LorotError):
    """A loss became NaN or infinite."""

    exit_code = 4


class CheckpointError(LorotError):
    """A checkpoint or a registered model is missing, damaged or does not fit."""

    exit_code = 5


class TrackingError(LorotError):
    """The tracking server cannot be reached or refuses."""

    exit_code = 6


class StorageError(LorotError):
    """A file could not be written: the disk is full, or the folder is read-only."""

    exit_code = 7


class SucceededError(StorageError):
    """The run folder was this job's, and is another's now. Nothing more may be written there."""


class LostPeerError(LorotError):
    """Another worker of the job died, froze or cannot be reached."""

    exit_code = 8


class BackendError(LorotError):
    """The place where jobs run, or the job service, does not answer or refuses."""

    exit_code = 9


class UnknownJobError(ConfigError):
    """There is no such job, run or model; which there are."""


class StateError(ConfigError):
    """A job is in no state for what is asked of it."""


class JobError(LorotError):
    """A job ended badly; `exit_code` is what its worker reported, or 1."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


__all__ = [
    "EXIT_CODES",
    "REQUEUE",
    "BackendError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "JobError",
    "LorotError",
    "LostPeerError",
    "NonFiniteLossError",
    "StateError",
    "StorageError",
    "SucceededError",
    "TakenError",
    "TrackingError",
    "UnknownJobError",
    "stop_code",
]
