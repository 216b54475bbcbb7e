"""The service's errors and the exit codes of the `lorot` command.

0 success, 1 an unexpected failure, 2 bad input, 3 bad data, 4 training stopped on a non-finite loss, 5 no usable
checkpoint or model, 6 the tracking server does not answer, 7 the disk is full or cannot be written.
"""

from pipelines.errors import DataError, LorotError


class ConfigError(LorotError):
    """The configuration is wrong: which key, what it holds, what would work."""


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


__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "LorotError",
    "NonFiniteLossError",
    "StorageError",
    "TrackingError",
]
