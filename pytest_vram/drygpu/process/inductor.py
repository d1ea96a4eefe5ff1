"""``torch.compile`` on a dry GPU: what it decides by timing is answered as a card would most likely answer.

On a dry GPU nothing takes time, so a choice by timing would be a choice by accident. Each function of Inductor that
decides so is put in a wrapper as soon as its module is imported, and each choice is recorded as a note. Private API of
torch, as of 2.6 to 2.14: a wrapper whose function is not there is left out.

The dry GPU's own kernels in Python are kept out of what is compiled.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from pytest_vram.drygpu import driver
from pytest_vram.drygpu.process.torch_import import after_import

if TYPE_CHECKING:
    from collections.abc import Callable

PADDING = (
    "torch.compile pads matrix products whose sizes are not aligned, as a card most likely would: 16-bit ones, and"
    " fp32 ones where TF32 is allowed"
)
AUTOTUNING = (
    "torch.compile chose among kernels by timing (max-autotune): the library's kernel, else the first template, is"
    " taken"
)
FUSION = "torch.compile decided by timing whether to fuse kernels: they are fused"


_KERNELS = (
    *("pytest_vram.drygpu.values", "pytest_vram.drygpu.driver", "pytest_vram.drygpu.notes"),
    "pytest_vram.torch_private",
)
"""The package and modules whose functions run within torch's operators."""


def install() -> None:
    """Wrap the decisions of Inductor, and leave the dry GPU's kernels out, each when its module is imported."""
    after_import("torch._dynamo.trace_rules", _leave_out)
    after_import("torch._inductor.fx_passes.pad_mm", _pad)
    after_import("torch._inductor.select_algorithm", _select)
    after_import("torch._inductor.scheduler", _fuse)
    after_import("torch._utils_internal", _clock)


def _wrapped(owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    """Replace ``owner.name``, if it is there, by what ``wrap`` makes of it."""
    function = getattr(owner, name, None)
    if function is not None:
        setattr(owner, name, wrap(function))


def _leave_out() -> None:
    """Keep ``torch.compile`` from compiling the dry GPU's kernels, which operators between two graphs call."""
    from torch._dynamo import trace_rules

    for name in _KERNELS:
        trace_rules.add(name)


def _pad() -> None:
    from torch._inductor.fx_passes import pad_mm

    def wrap(original: Callable[..., bool]) -> Callable[..., bool]:
        @functools.wraps(original)
        def is_padded_faster(key: str, ori_time: float, pad_time: float) -> bool:
            driver.add_note(PADDING)
            faster = "float16" in str(key) or torch.backends.cuda.matmul.allow_tf32
            # The original compares the times, and remembers its answer.
            return original(key, float(faster), 0.0)

        return is_padded_faster

    _wrapped(pad_mm, "is_padded_faster", wrap)


def _select() -> None:
    from torch._inductor import select_algorithm

    library = getattr(select_algorithm, "ExternKernelCaller", ())

    def wrap(original: Callable[..., dict[Any, float]]) -> Any:
        @functools.wraps(original)
        def benchmark_choices(*args: Any, **kwargs: Any) -> dict[Any, float]:
            timings = original(*args, **kwargs)
            usable = [choice for choice, time in timings.items() if time != float("inf")]
            if len(usable) > 1:
                driver.add_note(AUTOTUNING)
            usable.sort(key=lambda choice: not isinstance(choice, library))
            order = {choice: float(number + 1) for number, choice in enumerate(usable)}
            return {choice: order.get(choice, time) for choice, time in timings.items()}

        return staticmethod(benchmark_choices)  # the original is bound to its class

    _wrapped(select_algorithm.AlgorithmSelectorCache, "benchmark_choices", wrap)


def _fuse() -> None:
    from torch._inductor import scheduler

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def benchmark(*args: Any, **kwargs: Any) -> Any:
            driver.add_note(FUSION)
            return original(*args, **kwargs)

        return benchmark

    # One kernel takes less of a dry GPU's time than two, whatever they do: see native/event.c.
    for name in ("benchmark_fused_nodes", "benchmark_combo_kernel"):
        _wrapped(scheduler.Scheduler, name, wrap)


def _clock() -> None:
    from torch import _utils_internal

    # The original asks the program nvidia-smi, which a machine without a card has not got.
    _wrapped(_utils_internal, "max_clock_rate", lambda _original: lambda: driver.clock_mhz())
