"""Convert bytes to text and GB to bytes. No other module knows the factor 1024.

In every ``*_gb`` argument, 1 GB is 2**30 bytes, as card makers count memory. Printed text says "GiB", which is
unambiguous.
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
    """Return ``size`` bytes as text with three significant digits.

    Examples: ``14.2 GiB``, ``512 MiB``, ``-3 B``. ``None`` gives ``"n/a"``.
    """
    if size is None:
        return "n/a"
    sign, magnitude = ("-" if size < 0 else ""), abs(size)
    for unit, factor in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        # A size that would round up to "1024 MiB" is written in the next unit instead.
        if magnitude >= factor * (1 - 0.0005) and magnitude >= 1000:
            value = magnitude / factor
            # From 9.995 and 99.95 on, rounding adds a digit before the point, so one digit after it is dropped.
            digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
            return f"{sign}{value:.{digits}f} {unit}"
    return f"{sign}{magnitude} B"
