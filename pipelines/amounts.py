"""Amounts of bytes as people read them."""


def shown_bytes(count: float) -> str:
    """`count` bytes for people: 512 B, 1.2 MB, 24.0 GB (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 999.95:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} PB"
