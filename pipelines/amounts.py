"""Amounts: of bytes as people read them, and whole numbers as people give them."""

from pipelines.errors import DataError


def shown_bytes(count: float) -> str:
    """`count` bytes for people: 512 B, 1.2 MB, 24.0 GB (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 999.95:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} PB"


def check_whole(what: str, value: object, low: int, high: int) -> None:
    """Raise DataError, which begins with `what`, unless the value is a whole number from low to high."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise DataError(f"{what}: {value!r} is not a whole number from {low} to {high}")
