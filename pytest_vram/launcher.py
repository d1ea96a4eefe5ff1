"""The environment of processes that are the ranks of one group on this machine, as ``torchrun`` sets it."""

from __future__ import annotations

import socket

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""The variables that tell a process its place."""


def places(count: int) -> list[dict[str, str]]:
    """Return the variables of each of ``count`` ranks. They meet at a port that is free now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    return [
        dict(zip(VARIABLES, map(str, (rank, rank, count, count, "127.0.0.1", port)), strict=True))
        for rank in range(count)
    ]
