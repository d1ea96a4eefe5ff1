"""Tells which rank this process is. ``torchrun`` says so in the environment, before anything heavy is imported."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


def size() -> int:
    """Return the number of ranks of this run; 1 for a process that no launcher started."""
    return int(os.environ["WORLD_SIZE"]) if {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys() else 1


def rank() -> int:
    """Return the number of this rank, from 0."""
    return int(os.environ["RANK"]) if size() > 1 else 0


def local_rank() -> int:
    """Return the number of this rank among those of this machine, which is the number of its card."""
    return int(os.environ.get("LOCAL_RANK", rank())) if size() > 1 else 0


def local_size() -> int:
    """Return the number of ranks on this machine; all of them if the launcher does not say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", size())) if size() > 1 else 1


def is_first() -> bool:
    """Return whether this is rank 0, which prints and writes. This is also true for a run of one process."""
    return rank() == 0


def who() -> str:
    """Return the text that a message of this rank has after the program's name: nothing for rank 0."""
    return "" if is_first() else f", rank {rank()}"


@contextlib.contextmanager
def said_once() -> Iterator[None]:
    """Suppress the output of ranks other than 0 inside the block, in which all ranks would print the same."""
    if is_first():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield
