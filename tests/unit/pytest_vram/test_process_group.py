"""The rank of a process: before, during and after its time in a process group."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d

from pytest_vram import process_group

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def follow(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[tuple[int | None, int | None]]]:
    """Begin to follow the process group as a new process does; returns the places of which it was told."""
    for variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(distributed_c10d, "_update_default_pg", distributed_c10d._update_default_pg)
    monkeypatch.setattr(process_group, "_actions", [])
    monkeypatch.setattr(process_group, "_last", [])

    def begin() -> list[tuple[int | None, int | None]]:
        told: list[tuple[int | None, int | None]] = []
        process_group.when_joined(lambda: told.append(process_group.place()))
        return told

    return begin


def test_the_rank_is_told_when_the_group_is_made_and_kept_when_it_is_gone(
    follow: Callable[[], list[tuple[int | None, int | None]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that calls ``init_process_group`` under a name of its own is followed too."""
    monkeypatch.setenv("RANK", "5")
    destroy, init = dist.destroy_process_group, dist.init_process_group
    told = follow()
    assert process_group.place() == (5, None)
    init("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert told == [(0, 1)]
    finally:
        destroy()
    assert told == [(0, 1)]
    assert process_group.place() == (0, 1)


def test_a_process_outside_of_any_group_has_the_place_that_a_launcher_gave_it(
    follow: Callable[[], list[tuple[int | None, int | None]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    follow()
    assert process_group.place() == (None, None)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "four")
    assert process_group.place() == (3, None)
