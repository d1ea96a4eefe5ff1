"""The search for the fastest settings that fit, on a bench whose memory follows a formula."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import pytest

from finetune.config import yaml_file
from finetune.config.recompute import inputs_on_host, layers_recomputed
from finetune.config.settings import RunConfig
from finetune.dryrun.messages import Found, Trial
from finetune.dryrun.search import search
from finetune.model.shapes import SHAPES
from pytest_vram.drygpu import find_card

if TYPE_CHECKING:
    from collections.abc import Callable

GIB = 2**30
TOTAL = 16 * GIB
LIMIT = 15 * GIB
LAYERS = 32


class FakeBench:
    """Needs ``bytes_for(config)``; refuses what is more than the card has, as a card does."""

    capability = (8, 9)
    context_bytes = GIB // 4
    layers = LAYERS
    product, multiprocessors = find_card("rtx-4080").product, 76

    def __init__(self, bytes_for: Callable[[RunConfig], int], family: str = "mistral") -> None:
        fields = SHAPES["mistral-7b"].fields() | {"model_type": family}
        self.base = types.SimpleNamespace(config=types.SimpleNamespace(to_dict=lambda: fields))
        self.bytes_for = bytes_for
        self.tried: list[RunConfig] = []

    def run(self, config: RunConfig, *, attributed: bool = True) -> Trial:
        size = self.bytes_for(config)
        self.tried.append(config)
        fits = size <= TOTAL
        return Trial(
            fits=fits,
            message="" if fits else "CUDA out of memory",
            phases={},
            categories={},
            peak_allocated=size,
            peak_reserved=size,
            peak_device=size if fits else TOTAL,
            context=self.context_bytes,
            total=TOTAL,
            managed=0,
            seconds=0.0,
        )


def needs(config: RunConfig, *, fixed: float = 4 * GIB, input_: int = 8192, kept: int = 180_000) -> int:
    """As a 7B model: each layer keeps its input, or everything."""
    recomputed = layers_recomputed(config.train.checkpointing, LAYERS)
    if inputs_on_host(config.train.offload_activations, "cuda", sharded=False):
        input_ = 0
    layers = recomputed * input_ + (LAYERS - recomputed) * kept + (kept if recomputed == LAYERS else 0)
    return int(fixed) + config.train.micro_batch * config.data.seq * layers + config.adapter.rank * 2**20


def found(bench: FakeBench, opened: list[str], *, ranks: int = 1, **settings: Any) -> Found:
    config = yaml_file.replace(RunConfig(), {"model": "mistral-7b", "device": "cuda"} | settings)
    one: Any = bench  # a stand-in
    return search(one, config, open_settings=opened, limit_bytes=LIMIT, ranks=ranks)


@pytest.mark.parametrize("family", ["mistral", "a-family-without-arithmetic"])
@pytest.mark.parametrize("seq", [256, 2048])
def test_it_fits_and_keeps_the_rows_of_a_step(seq: int, family: str) -> None:
    bench = FakeBench(needs, family)
    result = found(bench, ["micro_batch", "checkpointing", "rank"], seq=seq)
    assert result.best is not None
    best = yaml_file.replace(RunConfig(), result.best.settings)
    assert best.train.micro_batch * best.train.accumulation == 16
    assert (best.adapter.rank, best.data.seq) == (16, seq)
    assert needs(best) <= LIMIT
    assert result.trials == len(bench.tried) <= 6
    assert (result.best.tokens_per_second is None) == (family != "mistral")


def test_the_runners_up_come_with_their_estimates_and_are_slower() -> None:
    result = found(FakeBench(needs), ["micro_batch", "checkpointing"])
    assert result.best is not None
    assert len(result.others) == 4
    speeds = [one.tokens_per_second or 0.0 for one in (result.best, *result.others)]
    assert speeds[1:] == sorted(speeds[1:], reverse=True)
    assert speeds[0] >= 0.99 * speeds[1]
    assert result.best.settings not in [one.settings for one in result.others]
    for one in (result.best, *result.others):
        needed = needs(yaml_file.replace(RunConfig(), one.settings))
        assert one.needed == pytest.approx(needed, rel=0.3)  # this bench has a formula of its own
        assert one.needed <= LIMIT
    assert result.best.needed == needs(yaml_file.replace(RunConfig(), result.best.settings))  # as the trial measured


@pytest.mark.parametrize(
    ("more", "offload", "rank", "seq"),
    [(100, True, 16, 512), (165, True, 4, 512), (200, True, 4, 256)],
)
def test_what_is_changed_to_make_it_fit(more: int, offload: bool, rank: int, seq: int) -> None:
    """The inputs wait on the host in any case. First the rank falls (12 MiB less), then the sequence shrinks."""
    bench = FakeBench(lambda c: needs(c, fixed=LIMIT - 260 * 2**20 + more * 2**20))
    best = found(bench, ["micro_batch", "seq", "checkpointing", "rank"]).best
    assert best is not None
    assert (best.settings["offload_activations"], best.settings["rank"], best.settings["seq"]) == (
        offload,
        rank,
        seq,
    )


def test_nothing_fits() -> None:
    bench = FakeBench(lambda _: 40 * GIB)
    assert found(bench, ["micro_batch", "rank"]).best is None


def test_settings_that_cannot_fit_are_not_tried() -> None:
    bench = FakeBench(lambda _: 40 * GIB)
    assert found(bench, ["micro_batch", "checkpointing", "rank"], model="llama-2-70b", precision="bf16").best is None
    bench.base.config.to_dict = SHAPES["llama-2-70b"].fields
    tried = len(bench.tried)
    assert found(bench, ["micro_batch", "checkpointing", "rank"], model="llama-2-70b").best is None
    assert len(bench.tried) == tried


def test_what_the_user_set_stays() -> None:
    bench = FakeBench(needs)
    found(bench, ["micro_batch"], seq=1024, rank=8, checkpointing=20)
    assert {(c.data.seq, c.adapter.rank, c.train.checkpointing) for c in bench.tried} == {(1024, 8, 20)}
    bench = FakeBench(needs)
    found(bench, ["checkpointing"], micro_batch=2)
    assert {(c.train.micro_batch, c.train.accumulation) for c in bench.tried} == {(2, 16)}


@pytest.mark.parametrize("ranks", [2, 3, 16])
def test_every_rank_gets_a_micro_batch(ranks: int) -> None:
    result = found(FakeBench(lambda _: 5 * GIB), ["micro_batch", "checkpointing"], ranks=ranks)
    assert result.best is not None
    assert result.best.settings not in [one.settings for one in result.others]
    for one in (result.best, *result.others):
        assert one.settings["accumulation"] >= ranks
        assert one.settings["micro_batch"] * one.settings["accumulation"] == 16


def test_the_speed_is_that_of_all_ranks() -> None:
    one, two = (found(FakeBench(lambda _: 5 * GIB), [], ranks=ranks).best for ranks in (1, 2))
    assert one is not None
    assert two is not None
    assert two.tokens_per_second == pytest.approx(2 * (one.tokens_per_second or 0), rel=0.1)


@pytest.mark.parametrize(
    ("model", "settings"),
    [("llama-2-70b", {"seq": 128}), ("mistral-7b", {"full": True, "precision": "bf16"})],
)
def test_what_fits_only_in_parts_is_tried_in_parts(model: str, settings: dict[str, Any]) -> None:
    """Whole, neither fits the card; over four ranks each does."""
    for shard, tried in ((False, False), (True, True)):
        bench = FakeBench(lambda _: 13 * GIB)
        bench.base.config.to_dict = SHAPES[model].fields
        best = found(bench, ["micro_batch"], ranks=4, model=model, shard=shard, **settings).best
        assert (best is not None, bool(bench.tried)) == (tried, tried)
