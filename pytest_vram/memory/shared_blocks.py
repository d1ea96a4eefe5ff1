"""Memory blocks that streams share, and how much more of them a card holds whose streams lag behind the program."""

from __future__ import annotations

NAME = "blocks shared between streams"


def text(size: int) -> str:
    """Return the text of the note: a card may need ``size`` bytes more."""
    return (
        "each is reused as soon as the program frees it; a card whose streams lag behind reserves up to "
        f"{size:,} bytes more"
    )
