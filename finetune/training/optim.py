"""Makes optimizers, computes the learning rate of a step, and restores states into the right kind of memory."""

from __future__ import annotations

import functools
import math
import warnings
from typing import TYPE_CHECKING, Any, cast

import torch

from finetune.errors import CheckpointError
from finetune.estimate.arithmetic import PAGED_FROM
from finetune.model.installed import require_bitsandbytes
from finetune.training.masters import keep_masters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import nn

    from finetune.config.settings import TrainConfig

BETAS = (0.9, 0.999)
EPS = 1e-8


def make_optimizer(parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """Make an AdamW (https://arxiv.org/abs/1711.05101) over ``parameters``, with the states as configured.

    ``paged-adamw`` has 8 bytes of state per element. The 8-bit kinds have 2 bytes per element and 8 bytes per block of
    256 elements (https://arxiv.org/abs/2110.02861), but 32-bit states for parameters below 4,096 elements. torch's
    ``adamw`` keeps two numbers of the parameter's own dtype. If the base is frozen, all optimizers except torch's
    update bf16 parameters in fp32, which takes 2 bytes more per element (:mod:`finetune.training.masters`). On a GPU,
    the paged states of parameters with ``PAGED_FROM`` elements or more are in managed memory, which the driver moves to
    the host when the card is full.

    Args:
        parameters: all parameters of the model. The frozen ones are not updated.
        config: which optimizer, and its settings.

    Raises:
        ConfigError: bitsandbytes is needed and not installed.
    """
    everything = list(parameters)
    chosen = [p for p in everything if p.requires_grad]
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": BETAS,
        "eps": EPS,
        "weight_decay": config.weight_decay,
    }
    if config.optimizer == "adamw":
        return torch.optim.AdamW(chosen, **settings)
    require_bitsandbytes("optimizer", config.optimizer, instead="adamw")
    import bitsandbytes as bnb

    masters = len(chosen) < len(everything)
    if config.optimizer == "paged-adamw":
        from finetune.training.paged_adamw import PagedAdamW

        return PagedAdamW(chosen, masters=masters, kernel=config.kernels != "torch", paged_from=PAGED_FROM, **settings)
    kinds = {"adamw-8bit": bnb.optim.AdamW8bit, "paged-adamw-8bit": bnb.optim.PagedAdamW8bit}
    optimizer: Any = kinds[config.optimizer](chosen, **settings)
    if optimizer.is_paged:
        optimizer.get_state_buffer = functools.partial(_paged_buffer, optimizer, optimizer.get_state_buffer)
    if masters:
        keep_masters(optimizer)
    return cast("torch.optim.Optimizer", optimizer)


def rounded_away(parameters: Iterable[nn.Parameter], config: TrainConfig) -> str | None:
    """Return a note for the user if bf16 weights are updated in bf16; None if they have fp32 masters or are not bf16.

    The neighbours of a bf16 number w are at least w / 256 away, so that a change below w / 512 is rounded away.

    Args:
        parameters: all parameters of the model, including the frozen ones.
        config: which optimizer, and its learning rate.
    """
    everything = list(parameters)
    chosen = [p for p in everything if p.requires_grad]
    if not any(p.dtype == torch.bfloat16 for p in chosen):
        return None
    full = len(chosen) == len(everything)
    if not full and config.optimizer != "adamw":
        return None
    remedy = (
        "--precision fp32 --compute-dtype bf16 keeps them in fp32"
        if full
        else "--optimizer paged-adamw or adamw-8bit keeps fp32 masters, and --adapter-dtype fp32 fp32 weights"
    )
    return (
        f"the trained weights are bf16, and {config.optimizer} updates them in bf16: a step of AdamW moves a weight by "
        f"about the learning rate, and at {config.learning_rate:g} nothing above {512 * config.learning_rate:.2g} "
        f"moves; {remedy}"
    )


def state_bytes(parameters: Iterable[nn.Parameter], config: TrainConfig, *, masters: bool) -> int:
    """Return the bytes of device memory that the states take from the first step on, without scales of 8-bit states.

    Args:
        parameters: the trained parameters.
        config: which optimizer.
        masters: whether the base is frozen, so that bf16 parameters get fp32 masters.
    """
    total = 0
    for parameter in parameters:
        if config.optimizer == "adamw":
            each = 2 * parameter.element_size()
        elif config.optimizer.startswith("paged"):
            each = 0
        else:
            each = 2 + (2 if masters and parameter.dtype == torch.bfloat16 else 0)
        total += each * parameter.numel()
    return total


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """Return the learning rate of a step. It has no state, so that a resumed run needs only the step's number.

    The rate rises linearly from 0 over ``warmup_steps``. After that it stays constant, falls linearly to 0, or follows
    half a cosine to 0 (https://arxiv.org/abs/1608.03983 without restarts).

    Args:
        step: counted from 0.
        total_steps: steps of the whole run.
        config: has the peak, the warm-up and the schedule.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.learning_rate
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    done = min(done, 1.0)
    factor = 1.0 - done if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return config.learning_rate * factor


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use ``rate`` for every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def compile_kernels(optimizer: torch.optim.Optimizer) -> None:
    """Compile the kernels of an optimizer that has some of its own, so that the first step does not have to."""
    compiled = getattr(optimizer, "compile_kernel", None)
    if compiled is not None:
        compiled()


def optimizer_step(optimizer: torch.optim.Optimizer) -> None:
    """Apply the gradients. bitsandbytes' warning that a CPU does not page is silenced, because ``--help`` says so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
        optimizer.step()


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """Return the states by the parameter's number, for :func:`load_optimizer_state`. The tensors are not copied."""
    return {i: dict(optimizer.state[p]) for i, p in enumerate(_parameters(optimizer)) if optimizer.state.get(p)}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[int, dict[str, Any]]) -> None:
    """Restore what :func:`optimizer_state` returned, in the kind of memory that the optimizer itself would use.

    ``load_state_dict`` of a paged optimizer puts its state into ordinary device memory, so that a resumed run needs
    more of it than the run that it resumes (bitsandbytes#782). Here the optimizer allocates its state, and the values
    are copied into it.

    Args:
        optimizer: a new optimizer.
        state: the state of an optimizer over the same parameters in the same order.

    Raises:
        CheckpointError: the state belongs to other parameters.
    """
    for index, parameter in enumerate(_parameters(optimizer)):
        saved = state.get(index)
        if saved is None:
            continue
        fresh = _empty_state(optimizer, parameter, index)
        for key, value in saved.items():
            if not isinstance(value, torch.Tensor):
                fresh[key] = value
            elif key in fresh and fresh[key].shape == value.shape and fresh[key].dtype == value.dtype:
                fresh[key].copy_(value)
            else:
                raise CheckpointError(
                    f"the checkpoint's optimizer state {key!r} of parameter {index} has shape {tuple(value.shape)} and "
                    f"type {value.dtype}, which {type(optimizer).__name__} does not have for a parameter of shape "
                    f"{tuple(parameter.shape)}: it was written with another adapter or optimizer"
                )


def _paged_buffer(
    optimizer: Any,
    own: Callable[..., torch.Tensor],
    parameter: nn.Parameter,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return zeros of the parameter's shape, in managed memory if the parameter is large enough and on a GPU."""
    if parameter.device.type != "cuda" or parameter.numel() < PAGED_FROM:
        return own(parameter, dtype=dtype)
    if dtype == torch.int16:  # bitsandbytes can fill only bytes and fp32
        halves = _managed(optimizer, (*parameter.shape[:-1], 2 * parameter.shape[-1]), torch.uint8, parameter.device)
        dropped: Any = halves.view(dtype)
        # Without these attributes bitsandbytes treats the view as an ordinary tensor of the host, and moves it to the
        # card at the first step.
        dropped.is_paged, dropped.page_deviceid = True, parameter.device.index
        return cast("torch.Tensor", dropped)
    return _managed(optimizer, parameter.shape, dtype, parameter.device)


def _managed(optimizer: Any, shape: Iterable[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    import bitsandbytes.functional as F

    buffer: torch.Tensor = F.get_paged(*shape, dtype=dtype, device=device)
    F.fill(buffer, 0)
    optimizer.page_mng.paged_tensors.append(buffer)
    return buffer


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _empty_state(optimizer: Any, parameter: nn.Parameter, index: int) -> dict[str, Any]:
    """Return the state that the optimizer would make at its first step."""
    fresh: dict[str, Any] = optimizer.state[parameter]
    if hasattr(optimizer, "init_state"):  # bitsandbytes
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
            optimizer.init_state(optimizer.param_groups[0], parameter, 0, index)
        # bitsandbytes shares one quantization map between all parameters. Copying a saved map into it changes nothing.
        return fresh
    fresh["step"] = torch.zeros((), dtype=torch.float32)
    fresh["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    fresh["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return fresh
