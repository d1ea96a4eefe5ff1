"""The search for the largest settings that fit, on a bench whose memory follows a formula."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import pytest

from finetune.config import yaml_file
from finetune.config.settings import RunConfig
from finetune.dryrun.messages import Found, Trial
from finetune.dryrun.search import search
from finetune.model.shapes import SHAPES

if TYPE_CHECKING:
    from collections.abc import Callable

GIB = 2**30
TOTAL = 16 * GIB
LIMIT = 15 * GIB


class FakeBench:
    """Needs ``bytes_for(config)``; refuses what is more than the card has, as a card does."""

    capability = (8, 9)
    context_bytes = 0

    def __init__(self, bytes_for: Callable[[RunConfig], int], family: str = "mistral") -> None:
        fields = SHAPES["mistral-7b"].fields() | {"model_type": family}
        text = types.SimpleNamespace(max_position_embeddings=32768)
        config = types.SimpleNamespace(to_dict=lambda: fields, get_text_config=lambda: text)
        self.base = types.SimpleNamespace(config=config)
        self.bytes_for = bytes_for
        self.tried: list[tuple[int, int, int]] = []

    def run(self, config: RunConfig, *, attributed: bool = True) -> Trial:
        size = self.bytes_for(config)
        self.tried.append((config.train.micro_batch, config.data.seq, config.adapter.rank))
        fits = size <= TOTAL
        return Trial(
            fits=fits,
            message="" if fits else "CUDA out of memory",
            phases={},
            categories={},
            peak_allocated=size,
            peak_reserved=size,
            peak_device=size if fits else TOTAL,
            context=0,
            total=TOTAL,
            managed=0,
            seconds=0.0,
        )


def needs(config: RunConfig, *, fixed: int = 4 * GIB, token: int = 500_000) -> int:
    return fixed + config.train.micro_batch * config.data.seq * token + config.adapter.rank * 2**20


def found(bench: FakeBench, opened: list[str], **settings: Any) -> Found:
    config = yaml_file.replace(RunConfig(), {"model": "mistral-7b"} | settings)
    return search(bench, config, open_settings=opened, limit_bytes=LIMIT)  # type: ignore[arg-type]  # a stand-in


@pytest.mark.parametrize("family", ["mistral", "a-family-without-arithmetic"])
@pytest.mark.parametrize("token", [20_000, 90_000, 500_000, 3_000_000])
@pytest.mark.parametrize("opened", ["micro_batch", "seq"])
def test_the_largest_that_fits_and_the_next_that_does_not(opened: str, token: int, family: str) -> None:
    bench = FakeBench(lambda config: needs(config, token=token), family)
    result = found(bench, [opened])
    assert result.best is not None
    best, larger = result.best.settings, result.next
    changed = yaml_file.replace(RunConfig(), best)
    assert needs(changed, token=token) <= LIMIT
    if larger is None:  # the model's own longest sequence
        assert best["seq"] == 32768
        return
    step = larger.settings[opened] - best[opened]
    assert (result.direction, result.step) == (opened, step)
    assert step == (256 if opened == "seq" else 1)
    assert needs(yaml_file.replace(RunConfig(), larger.settings), token=token) > LIMIT
    assert len(bench.tried) == len(set(bench.tried)) == result.trials
    assert result.trials <= 12


def test_more_tokens_win() -> None:
    # Attention that is quadratic: many short rows go further than one long one.
    bench = FakeBench(lambda c: needs(c) + c.train.micro_batch * c.data.seq**2 * 30)
    result = found(bench, ["micro_batch", "seq"])
    best = result.best
    assert best is not None
    assert best.tokens == best.micro_batch * best.seq
    assert best.seq == 512


def test_a_rank_that_is_open_is_halved_where_nothing_fits() -> None:
    bench = FakeBench(lambda c: 14 * GIB + c.adapter.rank * GIB // 4)
    best = found(bench, ["rank"]).best
    assert best is not None
    assert best.rank == 4


def test_nothing_fits() -> None:
    bench = FakeBench(lambda _: 40 * GIB)
    assert found(bench, ["micro_batch", "rank"]).best is None


def test_what_the_user_set_stays() -> None:
    bench = FakeBench(needs)
    found(bench, ["micro_batch"], seq=1024, rank=8)
    assert {(seq, rank) for _, seq, rank in bench.tried} == {(1024, 8)}


def test_checkpointing_is_turned_on_where_it_is_open() -> None:
    bench = FakeBench(needs)
    best = found(bench, ["checkpointing"], checkpointing=False).best
    assert best is not None
    assert best.checkpointing is True
