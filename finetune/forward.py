"""From a batch to the last hidden states, for any causal language model of transformers, head left out."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import nn
from transformers import masking_utils

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from transformers import PreTrainedModel

    from finetune.data import Batch

COMPUTE_DTYPE_ATTRIBUTE = "finetune_compute_dtype"
"""Set on a model whose weights are stored in another dtype than it computes in: it then runs under autocast."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hidden:
    """What the decoder returns for a batch."""

    states: torch.Tensor
    """[b, t, h] last hidden states, normalised, ready for the head."""
    router_loss: torch.Tensor | None
    """Load-balancing loss of a mixture of experts, already weighted; None where the model has none or it is off."""


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a peft model, or the model itself."""
    inner: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    return inner


def hidden_states(model: nn.Module, batch: Batch, *, offload: bool = False) -> Hidden:
    """Run the decoder on a batch that lies on the model's device.

    Padding on the right needs no mask: a causal model's real tokens never look at what comes after them, and no
    target lies on padding. Without a mask the fast attention kernels stay available.

    Args:
        model: a causal language model, with or without adapter.
        batch: token ids [b, t]; packed rows have positions that restart, which keeps their attention apart.
        offload: keep what the layers save for backward in host memory.
    """
    base = base_model(model)
    arguments: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False, "return_dict": True}
    if batch.attention_mask is not None and not batch.padded_right:
        arguments["attention_mask"] = batch.attention_mask
    if batch.position_ids is not None:
        arguments["position_ids"] = batch.position_ids
    routed = bool(getattr(base.config, "output_router_logits", False))
    if routed:
        arguments["output_router_logits"] = True
    with computing(model), _saving_on_host(offload), _known_to_be_apart(batch):
        out = base.get_decoder()(**arguments)
        router_loss = _router_loss(base, out.router_logits, batch) if routed else None
    return Hidden(states=out.last_hidden_state, router_loss=router_loss)


def computing(model: nn.Module) -> AbstractContextManager[object]:
    """Autocast to the compute dtype, where the weights are stored in another."""
    dtype = getattr(base_model(model), COMPUTE_DTYPE_ATTRIBUTE, None)
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(next(model.parameters()).device.type, dtype=dtype)


def set_checkpointing(model: nn.Module, *, enabled: bool) -> None:
    """Recompute each layer in backward, or keep its activations.

    Non-reentrant: over a frozen base the reentrant kind gives the first layers no gradient, without a word
    (transformers#42489). Nothing needs to make the embeddings' output require a gradient for it.
    """
    base = base_model(model)
    if bool(base.is_activation_checkpointing) == enabled:
        return
    if enabled:
        base.activation_checkpointing_enable({"use_reentrant": False})
    else:
        base.activation_checkpointing_disable()


@contextlib.contextmanager
def _known_to_be_apart(batch: Batch) -> Iterator[None]:
    """Spare transformers a question whose answer is known: whether a batch without positions is packed.

    It looks for it in positions that it has just made itself, on the device, and waits for the answer: once a
    micro-batch the card runs dry. A patch for transformers 5.24; to go when that does not ask any more.
    """
    own = getattr(masking_utils, "find_packed_sequence_indices", None)
    if own is None or batch.position_ids is not None:
        yield
        return
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = own


def _saving_on_host(offload: bool) -> AbstractContextManager[object]:
    if not offload:
        return contextlib.nullcontext()
    return torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available())


def _router_loss(base: PreTrainedModel, router_logits: Any, batch: Batch) -> torch.Tensor:
    """The router's load-balancing loss times its coefficient, as the model's own forward computes it.

    It is a product of two means over a batch's tokens, so it does not decompose: with it on, accumulated gradients
    are those of the mean over micro-batches, not those of one large batch (https://arxiv.org/abs/2101.03961, equation
    4).
    """
    import importlib

    module = importlib.import_module(type(base).__module__)
    experts = getattr(base.config, "num_local_experts", None) or base.config.num_experts
    loss: torch.Tensor = module.load_balancing_loss_func(
        router_logits, experts, base.config.num_experts_per_tok, batch.attention_mask
    )
    return loss * float(base.config.router_aux_loss_coef)
