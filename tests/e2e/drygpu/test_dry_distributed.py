"""Many cards: NCCL's communicators are alone, and a rank holds what that rank would hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pytest_vram.units import MIB

if TYPE_CHECKING:
    from collections.abc import Callable


def test_a_rank_holds_its_shard_and_the_buffers_of_its_connections(run_program: Callable[..., dict[str, Any]]) -> None:
    answers = run_program("distributed.py", gpu="a100-80", count=2)
    # 24 channels, each with 10 MiB at the receiver and 2 MiB at the sender; 32 of them between two ranks.
    rings, peer = 24 * 12 * MIB, 32 * 12 * MIB
    assert answers["links"] == {
        "collectives": rings,
        "no second time": rings,
        "one peer": rings + peer,
        "destroyed": 0,
    }
    assert answers["sharded"] == 8 * 2048 * 2048 * 4 // 8
    assert any("NCCL" in note for note in answers["notes"])
    assert answers["second card"] > 256 * 256 * 4


@pytest.mark.parametrize("program", [("reduced.py",), ("older_torch.py", "reduced.py")], ids=["installed", "older"])
def test_a_reduction_takes_the_other_ranks_as_this_one(
    run_program: Callable[..., dict[str, Any]], program: tuple[str, ...]
) -> None:
    found = run_program(*program, count=2)
    assert found == {"plain": [6, 10], "sum": [6, 10], "largest": [3, 5], "sum again": [6, 10], "several": [2, 4]}
