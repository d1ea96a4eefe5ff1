"""Convert bytes to text and GB to bytes. No other module knows the factor 1024.

1 GB means 2**30 bytes in every ``*_gb`` argument, as card makers count memory; text prints "GiB" so that nobody has
to guess.
"""

from __future__ import annotations

KIB = 1024
MIB = 1024**2
GIB = 1024**3
TIB = 1024**4


def gb_to_bytes(gb: float) -> int:
    """Return ``gb`` * 2**30 as whole bytes, rounded to nearest."""
    return round(gb * GIB)


def format_bytes(size: int | None) -> str:
    """Write ``size`` bytes with three significant digits.

    ``14.2 GiB``, ``512 MiB``, ``-3 B``; ``None`` is ``"n/a"``.
    """
    if size is None:
        return "n/a"
    sign, magnitude = ("-" if size < 0 else ""), abs(size)
    for unit, factor in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        # Half a unit in the last digit below the next factor would print as "1024 MiB": step up first.
        if magnitude >= factor * (1 - 0.0005) and magnitude >= 1000:
            value = magnitude / factor
            # 9.995 and 99.95 are written with a digit more before the point than they have.
            digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
            return f"{sign}{value:.{digits}f} {unit}"
    return f"{sign}{magnitude} B"
