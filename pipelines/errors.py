"""Errors for people: each says what was wrong, where, and what would work."""


class LorotError(ValueError):
    """A mistake that the user can mend; the command prints its text alone and ends with `exit_code`."""

    exit_code = 2


class DataError(LorotError):
    """Missing, unreadable or inconsistent data."""

    exit_code = 3
