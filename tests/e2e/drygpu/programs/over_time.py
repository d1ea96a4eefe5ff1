"""Training steps, recorded; what is read from the record beside what torch's counters and the tensors say."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import torch
from checks import Checks

from pytest_vram.probe.cuda import CudaProbe

check = Checks()
MB = 2**20


class Layer(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


class Model(torch.nn.Module):
    def __init__(self, width: int = 256, words: int = 2000, *, checkpointing: bool = False) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer(width) for _ in range(4))
        self.lm_head = torch.nn.Linear(width, words)
        self.checkpointing = checkpointing

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False) if self.checkpointing else layer(x)
        return torch.nn.functional.cross_entropy(self.lm_head(x), torch.zeros(len(x), dtype=torch.long, device="cuda"))


def train(model: Model, steps: int = 2) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(steps):
        model(torch.zeros(1024, 256, device="cuda")).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def recorded(program: Any) -> tuple[Any, Any, Any]:
    """Timeline, holders, and whatever the program returned, which is kept alive until they are read."""
    torch.cuda.empty_cache()
    probe = CudaProbe()
    probe.settle()
    probe.reset_peak()
    probe.begin_test(record=True, timeline=True)
    kept = program()
    timeline, holders = probe.timeline(0), probe.holders(0, 1000)
    probe.end_test()
    return timeline, holders, kept


def rounded(tensors: Any) -> int:
    return sum(-(-t.untyped_storage().nbytes() // 512) * 512 for t in tensors)


@check
def the_peak_is_torchs() -> Any:
    timeline, holders, _ = recorded(lambda: train(Model().cuda()))
    peak = torch.cuda.max_memory_allocated()
    return [
        timeline.peak_bytes == peak,
        sum(h.size_bytes for h in holders) == peak,
        max(timeline.reserved) == torch.cuda.max_memory_reserved(),
    ]


@check
def the_peak_is_torchs_with_a_model_from_before() -> Any:
    model = Model().cuda()
    timeline, _, _ = recorded(lambda: train(model))
    held = timeline.categories[0]
    return [
        timeline.peak_bytes == torch.cuda.max_memory_allocated(),
        held.name,
        min(held.sizes) >= rounded(model.parameters()),
    ]


@check
def categories_are_the_tensors() -> Any:
    def program() -> Any:
        model = Model().cuda()
        optimizer = train(model, steps=1)
        model(torch.zeros(1024, 256, device="cuda")).backward()
        return model, optimizer

    timeline, _, (model, optimizer) = recorded(program)
    last = {series.name: series.sizes[-1] for series in timeline.categories}
    logits = next(series.sizes for series in timeline.categories if series.name == "logits")
    states = [t for s in optimizer.state.values() for t in s.values() if t.is_cuda]
    return {
        "weights": last["weights"] / rounded(model.parameters()),
        "gradients": last["gradients"] / rounded(p.grad for p in model.parameters()),
        "optimizer": last["optimizer"] / rounded(states),
        "activations": last["activations"],
        "logits at most": max(logits) // (1024 * 2000 * 4),
    }


@check
def checkpointing_saves_activations() -> Any:
    def most(checkpointing: bool) -> int:
        timeline, _, _ = recorded(lambda: train(Model(checkpointing=checkpointing).cuda()))
        return max(next(series.sizes for series in timeline.categories if series.name == "activations"))

    plain, checkpointed = most(False), most(True)
    return plain / checkpointed


@check
def adapters_and_quantization_have_their_own() -> Any:
    import bitsandbytes as bnb

    def program() -> Any:
        four_bit = bnb.nn.Linear4bit(512, 512, quant_type="nf4", compute_dtype=torch.bfloat16)
        model = torch.nn.Sequential(four_bit, torch.nn.Linear(512, 8))
        model = model.cuda()
        model[0].weight.requires_grad_(False)
        model(torch.zeros(4, 512, device="cuda", dtype=torch.bfloat16).float())
        return model

    timeline, _, model = recorded(program)
    last = {series.name: series.sizes[-1] for series in timeline.categories}
    state = model[0].weight.quant_state
    constants = rounded([state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code])
    return [last["quantization"] == constants, last["adapters"] >= 512 * 8 * 4, last["weights"] >= 512 * 512 // 2]


@check
def hooks_are_gone_afterwards() -> Any:
    from torch.optim import optimizer

    before, called = torch.autograd.backward, torch.nn.Module.__call__
    recorded(lambda: train(Model().cuda()))
    left = [optimizer._global_optimizer_pre_hooks, optimizer._global_optimizer_post_hooks]
    return [torch.autograd.backward is before, torch.nn.Module.__call__ is called, *map(len, left)]


@check
def the_segments_are_the_allocators() -> Any:
    """Segments at the peak, which comes last, beside the allocator's own list of them."""
    rolls = random.Random(7)

    def program() -> Any:
        held: list[Any] = []
        for _ in range(400):
            if held and rolls.random() < 0.45:
                held.pop(rolls.randrange(len(held)))
            held.append(
                torch.empty(rolls.choice((900, 70_000, MB, 3 * MB, 30 * MB)) + rolls.randrange(2000), device="cuda")
            )
        waiting = torch.empty(5 * MB, device="cuda")
        waiting.record_stream(torch.cuda.Stream())
        held.append(torch.empty(2 * 2**30, dtype=torch.uint8, device="cuda"))
        return held, torch.cuda.memory_snapshot()

    before = torch.empty(2 * MB, device="cuda"), torch.empty(100, device="cuda")
    timeline, _, (_, segments) = recorded(program)
    layout = timeline.layout
    allocator = sorted(
        (
            s["total_size"],
            s["segment_type"],
            s["is_expandable"],
            s["allocated_size"],
            max((b["size"] for b in s["blocks"] if b["state"] == "inactive"), default=0),
            len(s["blocks"]),
        )
        for s in segments
    )
    each = [s for s in layout.segments for _ in range(s.count)]
    ours = sorted((s.size_bytes, s.pool, s.expandable, s.active_bytes, s.largest_free_bytes, s.blocks) for s in each)
    runs = [sum(run.size_bytes for run in s.runs) == s.size_bytes for s in layout.segments if len(s.runs) < 64]
    empty = sum(s["total_size"] for s in segments if not s["active_size"])
    del before
    return [
        ours == allocator,
        layout.reserved_bytes == torch.cuda.memory_reserved() == sum(s.size_bytes for s in each),
        layout.allocated_bytes == timeline.peak_bytes,
        layout.cached_bytes == empty,
        layout.fragmented_bytes > 0,
        all(runs),
    ]


@check
def an_out_of_memory_error_is_no_obstacle() -> Any:
    def program() -> Any:
        held = torch.ones(MB, device="cuda")
        with contextlib.suppress(torch.OutOfMemoryError):
            torch.empty(2**50, dtype=torch.uint8, device="cuda")
        return held

    timeline, _, _ = recorded(program)
    return timeline.peak_bytes == torch.cuda.max_memory_allocated()


check.run()
