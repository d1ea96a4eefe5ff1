"""The rank of this process in torch's default process group. It is remembered after the group is destroyed."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from pytest_vram import torch_private

if TYPE_CHECKING:
    from collections.abc import Callable

_actions: list[Callable[[], None]] = []
_last: list[tuple[int, int]] = []


def when_joined(action: Callable[[], None]) -> None:
    """Call ``action`` each time this process joins a default process group. torch has to be imported."""
    if not _actions:
        torch_private.when_group_changes(_changed)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=_last.clear)
    _actions.append(action)


def place() -> tuple[int | None, int | None]:
    """Return this process's rank and the number of ranks.

    They are those of the default process group that is there now, or of the last one that was, if :func:`when_joined`
    was called before. Otherwise they are those that a launcher set in the environment; None if there are none.
    """
    found = _now() or (_last[0] if _last else None)
    return (_number("RANK"), _number("WORLD_SIZE")) if found is None else found


def _changed() -> None:
    if (found := _now()) is not None:
        _last[:] = [found]
        for action in _actions:
            action()


def _now() -> tuple[int, int] | None:
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return int(distributed.get_rank()), int(distributed.get_world_size())


def _number(variable: str) -> int | None:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else None
