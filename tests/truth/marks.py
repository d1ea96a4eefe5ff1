"""What a case is: a function that trains something and marks its phases, whose memory can then be compared.

A mark is what PyTorch's own counters say after a phase. The measured marks of a real card were taken by the same calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

Case = Callable[["Marks"], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Registered:
    """One case.

    Attributes:
        run: the function that runs it.
        packages: the packages whose versions decide what it allocates; torch always does.
        conf: the allocator's settings, as in ``PYTORCH_ALLOC_CONF``.
        finetune: the commit whose fine-tuner was measured, which has needed less since; ``""`` if the case uses none.
    """

    run: Case
    packages: tuple[str, ...]
    conf: str
    finetune: str


CASES: dict[str, Registered] = {}


def case(*packages: str, conf: str = "", finetune: str = "") -> Callable[[Case], Case]:
    """Register the decorated function as the case of its name."""

    def register(function: Case) -> Case:
        CASES[function.__name__] = Registered(run=function, packages=("torch", *packages), conf=conf, finetune=finetune)
        return function

    return register


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """Torch's counters after one phase; sizes in bytes, ``allocations`` counted since the process began."""

    phase: str
    peak_allocated: int
    peak_reserved: int
    allocated: int
    reserved: int
    retries: int
    allocations: int


class Marks:
    """The marks of one run, in order."""

    def __init__(self) -> None:
        self.taken: list[Mark] = []
        self.context: dict[str, int] = {}

    def mark(self, phase: str) -> None:
        """Wait for the card, and note what torch's counters say."""
        torch.cuda.synchronize()
        stats = torch.cuda.memory_stats()
        self.taken.append(
            Mark(
                phase=phase,
                peak_allocated=stats["allocated_bytes.all.peak"],
                peak_reserved=stats["reserved_bytes.all.peak"],
                allocated=stats["allocated_bytes.all.current"],
                reserved=stats["reserved_bytes.all.current"],
                retries=stats["num_alloc_retries"],
                allocations=stats["allocation.all.allocated"],
            )
        )

    def outside_the_allocator(self, name: str) -> None:
        """Note how many bytes of the card are taken beyond what torch reserved: context, kernels, libraries."""
        free, total = torch.cuda.mem_get_info()
        self.context["total"] = total
        self.context[name] = total - free - torch.cuda.memory_reserved()

    def as_json(self) -> dict[str, Any]:
        """The marks as plain data."""
        return {"marks": [asdict(mark) for mark in self.taken], "context": self.context}


def train(
    marks: Marks,
    model: torch.nn.Module,
    loss_of: Callable[[int], torch.Tensor],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    steps: int = 3,
    scaler: torch.amp.GradScaler | None = None,
    autocast: torch.dtype | None = None,
) -> None:
    """Train ``model`` for some steps, with a mark before the first, after its forward pass, and after each."""
    if optimizer is None:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    marks.mark("built")
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype=autocast, enabled=autocast is not None):
            loss = loss_of(step)
        if step == 0:
            marks.mark("forward0")
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        del loss
        marks.mark(f"step{step}")
