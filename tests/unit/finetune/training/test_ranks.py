"""What ranks compare and deal out, one process playing each of them; the e2e tests have real ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from finetune.config.settings import RunConfig
from finetune.errors import ConfigError
from finetune.training import ranks

if TYPE_CHECKING:
    from collections.abc import Iterator


def play(monkeypatch: pytest.MonkeyPatch, rank: int, size: int) -> None:
    for name, value in {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setattr(ranks, "together", lambda: True)


def test_every_item_is_in_one_share(monkeypatch: pytest.MonkeyPatch) -> None:
    def items() -> Iterator[int]:
        yield from range(7)

    shares = []
    for rank in range(3):
        play(monkeypatch, rank, 3)
        shares.append(ranks.share(items()))
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]


def test_ranks_with_different_rows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def gathered(mine: Any) -> list[Any]:
        return [mine, mine | {"data": "other"}]

    play(monkeypatch, 0, 2)
    monkeypatch.setattr(ranks, "gathered", gathered)
    with pytest.raises(ConfigError, match="data = 'other': rank 1 has this, and rank 0 has 'mine'"):
        ranks.require_same(model="same", data="mine")


def test_a_new_run_of_rank_0_draws_what_one_process_draws_and_no_two_ranks_draw_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seeds = []
    for rank in range(4):
        play(monkeypatch, rank, 4)
        seeds += [ranks.seed_of(5, done=0), ranks.seed_of(5, done=3)]
    assert seeds[0] == 5
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("other", [None, KeyError("of another rank")])
def test_an_error_is_not_its_own_cause(other: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    own = ValueError("of this rank")

    class Watch:
        def __init__(self, *_: Any) -> None:
            pass

        def settled(self, error: BaseException) -> BaseException:
            return other or error

        def close(self) -> None:
            pass

    play(monkeypatch, 0, 2)
    monkeypatch.setattr(ranks, "_join", lambda _: None)
    monkeypatch.setattr(ranks, "gathered", lambda value: [value, value])
    monkeypatch.setattr(ranks, "_Watch", Watch)
    with pytest.raises((ValueError, KeyError)) as raised, ranks.joined(RunConfig()):
        raise own
    assert raised.value is (other or own)
    assert raised.value.__cause__ is (own if other else None)
