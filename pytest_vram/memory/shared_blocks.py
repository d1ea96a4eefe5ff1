"""Memory blocks that streams share, and how many bytes of them depend on how far the streams are."""

from __future__ import annotations

NAME = "blocks shared between streams"


def text(size: int) -> str:
    """Return the text of the note: a card may need ``size`` bytes more or less."""
    return (
        "each is reused when the streams that use it have come past it, by a made-up time; a card whose streams are "
        f"slower or faster reserves up to {size:,} bytes more or less"
    )
