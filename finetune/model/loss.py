"""Computes the token-weighted cross-entropy in chunks, so that the logits of a whole window never exist at one time.

With a vocabulary of 128k words, 8,192 tokens have 2 GiB of bf16 logits, 4 GiB more in fp32, and as much again for their
gradient. Here the logits of one chunk exist at a time, and their gradient is computed in place. Only the gradient with
respect to the hidden states is kept, which is as large as these. Positions without a target cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from finetune.config.settings import KERNEL_CHUNKS
from finetune.data.encode import IGNORED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PretrainedConfig


OWN_LOSS = "finetune_chunked_loss"
"""Name of the method that a sharded head has: it gathers the head's weight, and calls :func:`linear_cross_entropy`."""
KERNEL = "finetune_loss_kernel"
"""Name of the attribute of a head whose loss a fused kernel computes. It is a function like
:func:`finetune.kernels.cross_entropy.losses_and_gradient`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitRule:
    """How a model changes its logits after the head: ``softcap * tanh(scale * x / softcap)``, of its first words."""

    scale: float = 1.0
    """The factor (Cohere's ``logit_scale``, Falcon-H1's ``lm_head_multiplier``, the inverse of Granite's
    ``logits_scaling`` and of Inkling's ``logits_mup_width_multiplier``)."""
    softcap: float | None = None
    """The bound (Gemma 2's ``final_logit_softcapping``, RecurrentGemma's ``logits_soft_cap``); None for no bound."""
    words: int | None = None
    """Number of words that have a logit, where the head has more rows (Inkling's ``unpadded_vocab_size``); None for
    as many as the head has rows."""

    @classmethod
    def of(cls, config: PretrainedConfig) -> LogitRule:
        """Return the rule of a model's configuration."""
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale *= float(getattr(config, "lm_head_multiplier", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        # Inkling divides the input of its head. The head has no bias, so that dividing the logits is the same.
        scale /= float(getattr(config, "logits_mup_width_multiplier", None) or 1.0)
        softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
        return cls(scale=scale, softcap=softcap, words=getattr(config, "unpadded_vocab_size", None))

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the model's logits [..., words], given the head's output [..., rows]."""
        logits = logits[..., : self.words]
        if self.scale != 1.0:
            logits = logits * self.scale
        return torch.tanh(logits / self.softcap) * self.softcap if self.softcap else logits


def target_positions(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the positions that the loss is taken on, and their targets. Only this function shifts labels by one.

    Args:
        labels: [b, t] int64, on the CPU, because finding positions on a GPU would make the host wait; -100 means no
            target. The token at position i is the target of the hidden state at i - 1.

    Returns:
        ``positions`` [n] into the flattened [b * t] hidden states, and ``targets`` [n] token ids, in reading order.
    """
    shifted = labels[:, 1:]
    row, column = torch.nonzero(shifted != IGNORED, as_tuple=True)
    return row * labels.shape[1] + column, shifted[row, column]


def chunked_cross_entropy(
    hidden: torch.Tensor,
    head: nn.Module,
    targets: torch.Tensor,
    *,
    unit: float = 1.0,
    chunk: int = 1024,
    rule: LogitRule | None = None,
) -> torch.Tensor:
    """Return the sum of the tokens' cross-entropies (natural logarithm) times ``unit``. It is differentiable once.

    Args:
        hidden: [n, h] the last hidden states of the positions that have a target.
        head: maps [n, h] to logits [n, vocabulary]. A plain ``nn.Linear`` takes the fast path; any other module is
            recomputed chunk by chunk in the backward pass.
        targets: [n] int64 token ids.
        unit: weight of one token; 1 / N gives the window's mean. It is applied to loss and gradient before any rounding
            to a 16-bit type.
        chunk: number of positions whose logits exist at one time; ``KERNEL_CHUNKS`` times as many where a kernel
            computes the loss of logits in 16 bits.
        rule: how the model changes its logits; by default it does not.

    Returns:
        A scalar in fp32, or in fp64 if ``hidden`` is. Logits are computed in the head's dtype and reduced in fp32, as
        in transformers.
    """
    rule = rule or LogitRule()
    own = getattr(head, OWN_LOSS, None)
    if own is not None:
        gathered: torch.Tensor = own(hidden, targets, unit, chunk, rule)
        return gathered
    if type(head) is nn.Linear:
        return linear_cross_entropy(head, hidden, targets, unit, chunk, rule)
    total = hidden.new_zeros((), dtype=_reduction_dtype(hidden))
    for begin, end in _chunks(len(targets), chunk):
        part = checkpoint(_plain, hidden[begin:end], head, targets[begin:end], rule, use_reentrant=False)
        total = total + part * unit
    return total


def linear_cross_entropy(
    head: nn.Linear, hidden: torch.Tensor, targets: torch.Tensor, unit: float, chunk: int, rule: LogitRule
) -> torch.Tensor:
    """Return what :func:`chunked_cross_entropy` returns, for a head whose whole weight is there."""
    kernel = getattr(head, KERNEL, None)
    loss: torch.Tensor = _ChunkedCrossEntropy.apply(hidden, head.weight, head.bias, targets, unit, chunk, rule, kernel)
    return loss


def _plain(hidden: torch.Tensor, head: nn.Module, targets: torch.Tensor, rule: LogitRule) -> torch.Tensor:
    logits = rule.apply(head(hidden).to(_reduction_dtype(hidden)))
    return F.cross_entropy(logits, targets, reduction="sum")


def _reduction_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _chunks(count: int, chunk: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, count, chunk):
        yield begin, min(begin + chunk, count)


def _product_dtype(hidden: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """Return the dtype in which the head's product is computed: that of autocast if it is on, else the weight's."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradient together with the loss, while the chunk's logits exist."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        unit: float,
        chunk: int,
        rule: LogitRule,
        kernel: Callable[..., torch.Tensor] | None,
    ) -> torch.Tensor:
        compute = _product_dtype(hidden, weight)
        hidden_used, weight_used = hidden.to(compute), weight.to(compute)
        bias_used = None if bias is None else bias.to(compute)
        if kernel is not None and weight_used.element_size() < 4:  # there is no copy of the logits in fp32
            chunk *= KERNEL_CHUNKS
        needed = need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        # The sum over all chunks is kept in fp32 until the end, so that chunking costs no precision.
        grad_weight = torch.zeros_like(weight, dtype=_reduction_dtype(weight)) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=_reduction_dtype(weight)) if need_bias and bias is not None else None
        losses = []
        with torch.autocast(hidden.device.type, enabled=False):
            for begin, end in _chunks(len(targets), chunk):
                part = hidden_used[begin:end]
                logits = F.linear(part, weight_used, bias_used)
                if kernel is not None:
                    loss = kernel(logits, targets[begin:end], unit, rule, wants_gradient=any(needed))
                    grad = logits
                else:
                    logits = logits.to(_reduction_dtype(hidden))
                    loss, grad = _loss_and_grad(logits, targets[begin:end], unit, rule)
                del logits
                losses.append(loss.view(-1))
                if not any(needed):
                    del grad  # otherwise it exists beside the next chunk's logits, and evaluation needs more memory
                    continue
                grad = grad.to(weight_used.dtype)
                if grad_hidden is not None:
                    grad_hidden[begin:end] = grad @ weight_used
                if grad_weight is not None:
                    grad_weight += grad.T @ part
                if grad_bias is not None:
                    grad_bias += grad.sum(0)
                del grad
        ctx.save_for_backward(
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        if not losses:
            return hidden.new_zeros((), dtype=_reduction_dtype(hidden))
        return torch.cat(losses).sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grad_outputs
        # In place: these buffers belong to the function, and each is read only once.
        scaled = [None if part is None else part.mul_(grad.to(part.dtype)) for part in ctx.saved_tensors]
        return (*scaled, None, None, None, None, None)


def _loss_and_grad(
    logits: torch.Tensor, targets: torch.Tensor, unit: float, rule: LogitRule
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of one chunk, and its gradient with respect to the head's output, in the memory of the logits.

    With p = softmax(z) and y the target, d loss / d z = p - onehot(y). With z = c tanh(s x / c), d z / d x =
    s (1 - (z / c)^2).

    Args:
        logits: [n, vocabulary] the head's output, which is overwritten.
    """
    rows = torch.arange(len(targets), device=logits.device)
    if rule.scale != 1.0:
        logits.mul_(rule.scale)
    slope = None
    if rule.softcap:
        logits.div_(rule.softcap).tanh_()
        slope = logits.square().neg_().add_(1.0)
        logits.mul_(rule.softcap)
    if rule.words is not None:
        logits[:, rule.words :] = -torch.inf  # a probability of 0, and so no gradient
    logits.sub_(logits.amax(dim=-1, keepdim=True))
    at_target = logits[rows, targets]
    total = logits.exp_().sum(dim=-1)
    loss = (total.log() - at_target).sum() * unit
    grad = logits.div_(total.unsqueeze(-1))
    grad[rows, targets] -= 1.0
    grad.mul_(unit * rule.scale)
    return loss, grad if slope is None else grad.mul_(slope)
