"""Explains why memory ran out: how much there was, what held it, and which settings would save most."""

from __future__ import annotations

import contextlib
import re
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from finetune.config import yaml_file
from finetune.config.recompute import inputs_on_host, spelled
from finetune.disk import host_memory
from finetune.disk.resume import check_settings
from finetune.errors import ConfigError, FinetuneError, OutOfMemoryError
from finetune.estimate.arithmetic import estimate
from pytest_vram.probe.quantization import quantization_constants
from pytest_vram.units import GIB

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor, nn

    from finetune.config.settings import RunConfig

_WAITING = "parts of the base on the host"
_HOST_WORDS = ("can't allocate memory", "not enough memory", "bad_alloc", "Cannot allocate memory", "(os error 12)")


class Holdings:
    """The settings, model and optimizer of a run, set when they are known, so that every failure can be explained."""

    def __init__(self) -> None:
        self.config: RunConfig | None = None
        self.model: nn.Module | None = None
        self.optimizer: torch.optim.Optimizer | None = None

    def bytes_by_holder(self) -> dict[str, int]:
        """Return the bytes that are held, by what holds them, without allocating anything on the device.

        Weights of bitsandbytes include their scales and code books. Parts of a base that wait on the host are apart.
        """
        held = {"base weights": 0, _WAITING: 0, "trained weights": 0, "gradients": 0, "optimizer states": 0}
        frozen = _WAITING if self.config is not None and self.config.model.offload_base else "base weights"
        for parameter in self.model.parameters() if self.model is not None else ():
            base = frozen if isinstance(parameter, DTensor) else "base weights"
            held["trained weights" if parameter.requires_grad else base] += _stored(parameter)
            if parameter.grad is not None:
                held["gradients"] += parameter.grad.nbytes
        for state in self.optimizer.state.values() if self.optimizer is not None else ():
            held["optimizer states"] += sum(t.nbytes for t in state.values() if isinstance(t, torch.Tensor))
        return {name: size for name, size in held.items() if size}


@contextlib.contextmanager
def explained(config: RunConfig, holdings: Holdings) -> Iterator[None]:
    """Turn an allocation failure of torch, Python or the system, on device or host, into one message.

    Args:
        config: the settings as they were given; they are explained until the holdings have those that the run uses.
        holdings: what the run holds.

    Raises:
        OutOfMemoryError: with the budget, what was held, and the three settings that would save most.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError, FinetuneError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # their locals are what fills the memory
        raise _explain(error, holdings.config or config, holdings) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether ``error`` says that memory ran out, in any of the ways in which libraries say it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, FinetuneError) and error.__cause__ is not None:
        return is_out_of_memory(error.__cause__)
    return isinstance(error, (RuntimeError, OSError)) and any(word in str(error) for word in _HOST_WORDS)


def _explain(error: BaseException, config: RunConfig, holdings: Holdings) -> OutOfMemoryError:
    if isinstance(error, FinetuneError) and error.__cause__ is not None:
        error = error.__cause__
    on_device = isinstance(error, torch.OutOfMemoryError)
    if on_device:
        _, budget = torch.cuda.mem_get_info()
        held, where = torch.cuda.memory_reserved(), f"the GPU ({torch.cuda.get_device_name()})"
    else:
        budget, held, where = host_memory.limit_bytes(), host_memory.resident_bytes(), "the host"
    parts = holdings.bytes_by_holder()
    if on_device:
        parts.pop(_WAITING, None)
    rest = held - sum(parts.values())
    if rest > 0:
        parts["activations, logits and the libraries" if not on_device else "activations, logits and workspace"] = rest
    savings = largest_savings(config, on_device=on_device)
    lines = [
        f"out of memory on {where}.",
        f"  budget  {_size(budget)}",
        f"  held    {_size(held)}: " + ", ".join(f"{name} {_size(size)}" for name, size in parts.items()),
        f"  asked   {_asked(error)}",
    ]
    if savings:
        lines.append("These settings would save most, by the arithmetic of a full-length row:")
        lines += [
            f"  {s.flags:40} about {_size(s.saved_bytes)} less{'' if s.resumes else ', in a new run'}" for s in savings
        ]
    lines.append(f"What was saved is sound: continue with --output {config.output.output} --resume")
    return OutOfMemoryError(
        "\n".join(lines),
        budget_bytes=budget,
        held_bytes=held,
        savings=tuple((s.flags, s.saved_bytes) for s in savings),
    )


def _size(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def _asked(error: BaseException) -> str:
    """Return what the failed allocation asked for, or its message if that does not say."""
    found = re.search(r"tried to allocate ([\d.]+ [A-Za-z]+)", str(error), re.IGNORECASE)
    return f"{found[1]} more, at once" if found else (str(error).strip().splitlines() or [type(error).__name__])[0]


def _stored(weight: Tensor) -> int:
    """Return the bytes of this rank's part of a weight, and of what bitsandbytes keeps beside it to decode it."""
    if isinstance(weight, DTensor):
        weight = weight.to_local()
    return weight.nbytes + sum(constant.nbytes for constant in quantization_constants(weight))


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """A change of settings that lowers the peak."""

    flags: str
    """The changed settings, as flags of the command line."""
    saved_bytes: int
    """Bytes by which the estimated peak falls."""
    resumes: bool
    """Whether the run can continue with the changed settings; otherwise they need a new run."""


def largest_savings(config: RunConfig, *, on_device: bool, count: int = 3) -> list[Saving]:
    """Return the changes of settings that lower the estimated peak most, largest first; none for an unknown shape."""
    if not on_device:
        config = yaml_file.replace(config, {"device": "cpu"})
    savings = []
    try:
        now = _estimated(config, on_device=on_device)
        for settings in _alternatives(yaml_file.flatten(config)):
            changed = yaml_file.replace(config, settings)
            saved = now - _estimated(changed, on_device=on_device)
            savings.append(
                Saving(flags=yaml_file.as_flags(settings), saved_bytes=saved, resumes=_resumes(config, changed))
            )
    except FinetuneError:
        return []
    return sorted((s for s in savings if s.saved_bytes > 0), key=lambda s: -s.saved_bytes)[:count]


def _estimated(config: RunConfig, *, on_device: bool) -> int:
    found = estimate(config)
    return found.total_bytes + (0 if on_device else found.managed)  # a CPU has nothing to page to


def _resumes(config: RunConfig, changed: RunConfig) -> bool:
    try:
        check_settings(yaml_file.json_values(config), yaml_file.json_values(changed))
    except ConfigError:
        return False
    return True


def _alternatives(now: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    if now["full"]:
        yield {"full": False, "precision": "nf4"}
        if now["precision"] == "fp32":
            yield {"precision": "bf16"}
    elif now["precision"] not in ("nf4", "fp4"):
        yield {"precision": "nf4"}
    if now["micro_batch"] > 1:
        yield {"micro_batch": 1, "accumulation": now["accumulation"] * now["micro_batch"]}
    if spelled(now["checkpointing"]) not in ("auto", "all"):
        yield {"checkpointing": "all"}
    if not inputs_on_host(now["offload_activations"], now["device"], sharded=now["shard"]) and now["device"] != "cpu":
        yield {"checkpointing": "all", "offload_activations": True}
    if now["seq"] > 128:
        yield {"seq": now["seq"] // 2}
    if now["loss_chunk"] > 64:
        yield {"loss_chunk": 64}
    if now["rank"] > 8 and not now["full"]:
        yield {"rank": 8}
    if not now["optimizer"].endswith("8bit"):
        yield {"optimizer": "paged-adamw-8bit"}
