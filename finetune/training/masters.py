"""Keeps an exact fp32 master of each bf16 weight in two more bytes, which hold the bits that bf16 drops.

A step of AdamW changes a weight by about the learning rate. In bf16, the neighbours of a weight w are w / 256 to
w / 128 away from it, and a step of less than half that distance is rounded away completely. At a learning rate of 1e-5,
no weight above 0.005 ever changes, whatever the number of steps (https://arxiv.org/abs/2010.06192). So the optimizer
updates the master, while the forward and backward passes still use the bf16 weight.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

DROPPED = "dropped"
"""Name of the dropped bits in a parameter's optimizer state, int16."""


def keep_masters(optimizer: Any) -> None:
    """Make an optimizer of bitsandbytes update fp32 masters of its bf16 parameters, from its first step on.

    The dropped bits are one more state of the parameter. They are saved, loaded and paged as its other states are.
    """
    optimizer.init_state = functools.partial(_init_state, optimizer, optimizer.init_state)
    optimizer.update_step = functools.partial(_update_step, optimizer, optimizer.update_step)


def joined(weight: Tensor, dropped: Tensor) -> Tensor:
    """Return the fp32 master that a bf16 weight and its dropped bits make up together."""
    high = weight.view(torch.int16).to(torch.int32).bitwise_left_shift_(16)
    return high.add_(dropped.to(weight.device)).view(torch.float32)


def split(master: Tensor, weight: Tensor, dropped: Tensor) -> None:
    """Round ``master`` to the nearest bf16 and write that into ``weight``; write the remainder into ``dropped``.

    ``master`` is overwritten. On a tie the remainder may be +32,768, which overflows int16 to -32,768. The bf16 is then
    rounded up by one, and with this larger bf16 a remainder of -32,768 is right.
    """
    weight.copy_(master)
    bits = weight.view(torch.int16)
    left = master.view(torch.int32).sub_(bits.to(torch.int32).bitwise_left_shift_(16))
    bits.add_(left == 2**15)
    dropped.copy_(left)


def _init_state(optimizer: Any, own: Callable[..., None], group: Any, parameter: nn.Parameter, *place: int) -> None:
    own(group, parameter, *place)
    if parameter.dtype == torch.bfloat16:
        optimizer.state[parameter][DROPPED] = optimizer.get_state_buffer(parameter, dtype=torch.int16)


def _update_step(optimizer: Any, own: Callable[..., None], group: Any, parameter: Any, *place: int) -> None:
    if parameter.dtype != torch.bfloat16:
        own(group, parameter, *place)
        return
    weight, gradient, dropped = parameter.data, parameter.grad, optimizer.state[parameter][DROPPED]
    # Parameters are updated one at a time, so that the copies in fp32 never take more than the largest parameter.
    parameter.grad = None
    parameter.data = joined(weight, dropped)
    parameter.grad = gradient.float()
    own(group, parameter, *place)
    parameter.grad = None
    split(parameter.data, weight, dropped)
    parameter.data, parameter.grad = weight, gradient
