"""Many cards: NCCL's communicators are alone, and a rank holds what that rank would hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


def test_a_rank_holds_its_shard_and_says_what_is_not_counted(run_program: Callable[..., dict[str, Any]]) -> None:
    answers = run_program("distributed.py", gpu="a100-80", count=2)
    assert answers["sharded"] == 8 * 2048 * 2048 * 4 // 8
    assert any("NCCL" in note for note in answers["notes"])
    assert answers["second card"] > 256 * 256 * 4
