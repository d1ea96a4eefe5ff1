"""Tells what kind a layer of a model is: a product with its weight, a router, or the experts of a mixture.

The kind decides whether a layer can be stored in 4 or 8 bits and whether it can have an adapter. The name does not tell
the kind: "0" may be a linear layer or a whole decoder layer, and "experts" may be anything.
"""

from __future__ import annotations

import inspect
import re
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator

_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""The fields in which configurations of transformers say how many experts a layer has."""
_READS = re.compile(r"(?<!isinstance\()\bself\.(\w+)\.weight\b(?!\[|\.(?:dtype|device|shape|size|numel)\b)")
"""Finds ``self.CHILD.weight`` in the source of a class, but no slice of it: BLOOM slices a weight to add up the shards
of its training."""


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every linear layer of ``model`` with its path, also subclasses of ``nn.Linear`` and GPT-2's ``Conv1D``.

    A layer that has an adapter comes under its own path. The linear layers inside it do not come.
    """
    from transformers.pytorch_utils import Conv1D

    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        if has_adapter(module):
            inside += (f"{name}.",)
            yield name, module
        elif isinstance(module, (nn.Linear, Conv1D)):
            yield name, module


def has_adapter(module: nn.Module) -> bool:
    """Return whether this layer has a LoRA adapter."""
    return bool(getattr(module, "lora_A", None))


def why_not_plain(model: nn.Module) -> dict[str, str]:
    """Return the linear layers that have to stay as they are, with the reason.

    They can be neither quantized nor adapted, because they compute something beside ``x W^T + b``, or because their
    weight is read without calling them.

    Args:
        model: a transformers model, with its weights loaded or still on the meta device.

    Returns:
        The reason by the layer's path. A layer that is not named is a plain product.
    """
    modules = dict(model.named_modules())
    counts = expert_counts(model)
    found = {}
    for name, module in linear_layers(model):
        path, _, leaf = name.rpartition(".")
        parent = modules[path]
        if _is_router(leaf, module, parent, counts):
            found[name] = "a router, which chooses the experts"
        elif not has_adapter(module) and not _is_product(module):
            found[name] = f"not a plain product: {type(module).__name__} computes something else"
        elif leaf in _read_by(type(parent)):  # type: ignore[arg-type]  # mypy takes no class for Hashable
            found[name] = (
                f"{type(parent).__name__} reads its weight without calling it, so an adapter would be passed by"
            )
    return found


def expert_counts(model: Any) -> frozenset[int]:
    """Return the numbers of experts per layer that the configuration names; none for a model without experts."""
    config = getattr(model, "config", None)
    text: Any = config
    if hasattr(text, "get_text_config"):
        text = text.get_text_config()
    counts = (getattr(text, name, None) for name in _EXPERT_COUNTS)
    return frozenset(count for count in counts if isinstance(count, int) and count > 1)


def experts_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module that holds the weights of a mixture's experts as its own parameters, with its path.

    These are the classes that transformers declares with ``@use_experts_implementation``, and others that are called
    experts and have a parameter of two or three dimensions. Convolutions and state-space layers are not among them,
    whatever the shape of their parameters. Experts that are a list of linear layers count as linear layers.
    """
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)) or not any(
            p.dim() > 1 for p in module._parameters.values() if p is not None
        ):
            continue
        if declared_experts(module) or "Expert" in type(module).__name__:
            yield name, module


def declared_experts(module: nn.Module) -> bool:
    """Return whether the module has the attributes with which ``@use_experts_implementation`` says what it computes."""
    return all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "is_concatenated"))


def _is_router(leaf: str, module: nn.Module, parent: nn.Module, counts: frozenset[int]) -> bool:
    """Return whether a linear layer has one output for each expert, and is called a router or a gate."""
    called = leaf in ("gate", "router") or re.search(
        r"Router|TopK|Gating", type(parent).__name__ + type(module).__name__
    )
    return bool(called) and getattr(module, "out_features", getattr(module, "nf", 0)) in counts


@torch.no_grad()
def _is_product(module: Any) -> bool:
    """Return whether the layer computes only ``x W^T + b``. To find out, run a subclass of ``nn.Linear`` on one row."""
    overridden = type(module).forward is not nn.Linear.forward and type(module).__module__.startswith(
        "transformers.models"
    )
    if not (isinstance(module, nn.Linear) and overridden):
        return True  # the linear layers of torch and bitsandbytes, and GPT-2's Conv1D
    weight, bias = module.weight, module.bias
    row = torch.linspace(-1, 1, module.in_features, device=weight.device, dtype=weight.dtype)[None]
    try:
        result = module(row)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    if not isinstance(result, torch.Tensor) or result.shape != (1, module.out_features):
        return False
    return result.is_meta or torch.allclose(result.float(), F.linear(row, weight, bias).float(), rtol=1e-2, atol=1e-2)


@cache
def _read_by(kind: type[nn.Module]) -> frozenset[str]:
    """Return the children whose weight a class of transformers reads without calling them.

    Mamba's fused kernels, for example, take the weight of the output projection as an argument.
    """
    if issubclass(kind, nn.MultiheadAttention):
        return frozenset({"out_proj"})
    if not kind.__module__.startswith("transformers.models"):
        return frozenset()
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):
        return frozenset()
    return frozenset(_READS.findall(source))
