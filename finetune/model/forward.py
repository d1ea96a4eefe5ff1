"""Computes the last hidden states of a batch, without the head, for any causal language model of transformers."""

from __future__ import annotations

import contextlib
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import nn

from finetune.errors import ConfigError, ModelError, Problem
from finetune.model.packed_rows import ROWS_ATTRIBUTE, Way, told_of_rows
from finetune.patches.transformers import known_to_be_apart

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from transformers import PreTrainedModel

    from finetune.data.batches import Batch

COMPUTE_DTYPE_ATTRIBUTE = "finetune_compute_dtype"
"""Attribute of a model that computes in another dtype than its weights are stored in. It then runs under autocast."""

_heads_apart: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()
"""Of each decoder that was searched, the head that is not in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hidden:
    """What the decoder returns for a batch."""

    states: torch.Tensor
    """[b, t, h]: the last hidden states, normalised, which are the input of the head."""
    router_loss: torch.Tensor | None
    """Load-balancing loss of a mixture of experts, already weighted; None if the model has none or it is off."""


def base_model(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside a peft model, or the model itself."""
    inner: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    return inner


def hidden_states(model: nn.Module, batch: Batch) -> Hidden:
    """Run the model, except its head, on a batch that is on the same device.

    Padding on the right needs no mask: in a causal model, real tokens never attend to tokens after them, and padding
    has no targets. Without a mask, the fast attention kernels can be used.

    Args:
        model: a causal language model, with or without adapter.
        batch: token ids [b, t]. In packed rows the positions restart, which keeps the attention of the rows apart.
            Where :func:`finetune.kernels.packed_attention.keep_rows_apart` has found a leaner way than a mask of every
            pair of tokens, that way is taken.
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
    way: Way = "mask" if "attention_mask" in arguments else getattr(base, ROWS_ATTRIBUTE, "mask")
    positions = batch.position_ids if way == "mask" else None
    with (
        computing(model),
        known_to_be_apart(positions),
        told_of_rows(way, batch) as more,
    ):
        arguments |= more
        decoder = decoder_of(base)
        if decoder is None:
            if routed:
                raise ModelError(
                    f"output_router_logits: the router's loss of this {base.config.model_type} model cannot be taken "
                    "here. Set output_router_logits to false in its config.json"
                )
            return Hidden(states=_head_input(base, arguments), router_loss=None)
        out = decoder(**arguments)
        router_loss = _router_loss(base, out.router_logits, batch) if routed else None
    return Hidden(states=out.last_hidden_state, router_loss=router_loss)


def decoder_of(base: PreTrainedModel) -> nn.Module | None:
    """Return the part of a model whose last hidden states the head reads; None if no module is that part.

    ``get_decoder`` of transformers guesses by names. For some models it returns the whole model (Llama 4), for some the
    head (ModernBERT's decoder), and for some a part that is followed by more layers before the head (BERT).
    """
    decoder, head = base.get_decoder(), base.get_output_embeddings()
    if decoder is None or not any(child is head for child in base.children()) or _has(decoder, head):
        return None
    found: nn.Module = decoder
    return found


def _has(decoder: nn.Module, head: nn.Module | None) -> bool:
    """Whether ``head`` is a part of ``decoder``. A model has thousands of modules, so they are searched once only."""
    known = _heads_apart.get(decoder)
    if head is not None and known is not None and known() is head:
        return False
    found = any(module is head for module in decoder.modules())
    if not found and head is not None:
        _heads_apart[decoder] = weakref.ref(head)
    return found


class _HeadReachedError(Exception):
    """Raised to end a forward pass before the head runs."""

    def __init__(self, states: torch.Tensor) -> None:
        super().__init__()
        self.states = states


def _head_input(base: PreTrainedModel, arguments: dict[str, Any]) -> torch.Tensor:
    """Run the whole model up to its head, and return the input that the head would get."""

    def end(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        raise _HeadReachedError(inputs[0])

    head = base.get_output_embeddings()
    if head is None:
        raise ModelError(f"this {base.config.model_type} model has no head that transformers can name. Use another")
    handle = head.register_forward_pre_hook(end)
    try:
        base(**arguments)
    except _HeadReachedError as reached:
        return reached.states
    finally:
        handle.remove()
    raise ModelError(
        f"this {base.config.model_type} model computes its logits without calling its head, which the loss in chunks "
        "needs. It cannot be trained here"
    )


def computing(model: nn.Module) -> AbstractContextManager[object]:
    """Return autocast to the compute dtype if the weights are stored in another dtype."""
    dtype = getattr(base_model(model), COMPUTE_DTYPE_ATTRIBUTE, None)
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(next(model.parameters()).device.type, dtype=dtype)


def set_checkpointing(model: nn.Module, *, enabled: bool) -> None:
    """Choose whether the backward pass recomputes each layer, or the layer keeps its activations.

    The non-reentrant kind is used. With the reentrant kind and a frozen base, the first layers silently get no gradient
    (transformers#42489), so transformers lets the output of the embeddings require one. Here nothing needs that
    gradient: the first layer would compute it in vain, and its input would stay on the card.

    Raises:
        ConfigError: the model has no checkpointing.
    """
    base = base_model(model)
    if is_checkpointing(base) == enabled:
        return
    kind = _name_of_checkpointing(base)
    if enabled:
        try:
            getattr(base, f"{kind}_checkpointing_enable")({"use_reentrant": False})
        except ValueError as error:
            raise ConfigError(
                Problem(
                    field="checkpointing",
                    value=True,
                    why=f"transformers has no checkpointing for this {base.config.model_type} model",
                    remedy="use --no-checkpointing",
                )
            ) from error
    else:
        getattr(base, f"{kind}_checkpointing_disable")()
    base.disable_input_require_grads()  # enabling turns this on, and GIT's embeddings do not support it


def is_checkpointing(base: PreTrainedModel) -> bool:
    """Return whether the model recomputes its layers in the backward pass."""
    return bool(getattr(base, f"is_{_name_of_checkpointing(base)}_checkpointing"))


def _name_of_checkpointing(base: PreTrainedModel) -> str:
    """Return the word that transformers' names have for it: "gradient" before 5.23, which deprecates that word."""
    return "activation" if hasattr(base, "is_activation_checkpointing") else "gradient"


def _router_loss(base: PreTrainedModel, router_logits: Any, batch: Batch) -> torch.Tensor:
    """Return the router's load-balancing loss times its coefficient, as the model's own forward computes it.

    It is a product of two means over the tokens of a batch, so it is not a sum over micro-batches. When it is on, the
    accumulated gradients are those of the mean over micro-batches, and not those of one large batch
    (https://arxiv.org/abs/2101.03961, equation 4).
    """
    import importlib

    module = importlib.import_module(type(base).__module__)
    experts = getattr(base.config, "num_local_experts", None) or base.config.num_experts
    loss: torch.Tensor = module.load_balancing_loss_func(
        router_logits, experts, base.config.num_experts_per_tok, batch.attention_mask
    )
    return loss * float(base.config.router_aux_loss_coef)
