"""An exact fp32 master of each bf16 weight, in two bytes: the bits that bf16 drops.

A step of AdamW moves a weight by about the learning rate. In bf16, the neighbours of w are some w / 128 away, and a
step of less than half of that is rounded away as a whole: at 1e-5, nothing above 0.005 moves, in any number of steps
(https://arxiv.org/abs/2010.06192). Forward and backward go on with bf16; the optimizer updates the master.
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
    """Have an optimizer of bitsandbytes update fp32 masters of its bf16 parameters, from its first step on.

    The dropped bits are one more state of the parameter, saved and loaded as the others are, and paged where they are.
    """
    optimizer.init_state = functools.partial(_init_state, optimizer, optimizer.init_state)
    optimizer.update_step = functools.partial(_update_step, optimizer, optimizer.update_step)


def joined(weight: Tensor, dropped: Tensor) -> Tensor:
    """The fp32 master of a bf16 weight and the bits it dropped."""
    high = weight.view(torch.int16).to(torch.int32).bitwise_left_shift_(16)
    return high.add_(dropped.to(weight.device)).view(torch.float32)


def split(master: Tensor, weight: Tensor, dropped: Tensor) -> None:
    """Round ``master`` to the nearest bf16, into ``weight``, and put what that leaves out into ``dropped``.

    ``master`` is used up. A tie may leave 32,768 out, one more than int16 holds: it is rounded up instead, which leaves
    -32,768 out, and that is what int16 makes of it.
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
    # One parameter at a time: the copies in fp32 are as large as the largest of them.
    parameter.grad = None
    parameter.data = joined(weight, dropped)
    parameter.grad = gradient.float()
    own(group, parameter, *place)
    parameter.grad = None
    split(parameter.data, weight, dropped)
    parameter.data, parameter.grad = weight, gradient
