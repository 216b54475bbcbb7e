"""Errors for people: each says what was wrong, where, and what would work."""


class LorotError(ValueError):
    """A mistake that the user can mend; the command prints its text alone and ends with `exit_code`."""

    exit_code = 2


class DataError(LorotError):
    """Missing, unreadable or inconsistent data."""

    exit_code = 3


class UnreachableError(DataError):
    """The storage does not answer, fails or holds other data than before: no sample is to blame, none is left out."""


class FullDiskError(DataError):
    """Data could not be written for want of room; what was finished before stays."""

    exit_code = 7
