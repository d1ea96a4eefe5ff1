"""Fuses LoRA layers with their frozen base layers, and with the layers that read the same input.

peft adds the adapter's output to the base's with separate operators. For each layer it copies the base's output, casts
the input, multiplies by the scale and computes the sum, and each of these results is as large as the activations. Here
one autograd function runs all layers of a group (q, k and v; gate and up). It computes x A once for the group, and adds
each adapter's output in the epilogue of its last product. For the backward pass it saves x, once for all layers, and
x A, whose width is the rank. A 4-bit weight is decoded once in each direction, and is freed when its product is done.

A decoder layer that recomputes its activations stops as soon as it has everything that its backward pass needs. The
result of the layer's last product is not among that. So a linear layer that runs by itself saves x and x A before its
product begins (:class:`_Kept`), and the last product does not run again. In a Llama it has a quarter of the layer's
weights.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from finetune.kernels.available import kernel_runs_on
from pytest_vram.torch_private import plain_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

GROUPS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
"""Names of layers that read the same input in the architectures of transformers. If a layer gets another input than the
first of its group, each layer of that group runs by itself from then on."""

_FUSED = "finetune_fused"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fusion:
    """The result of :func:`fuse`."""

    fused: int
    """Number of LoRA layers that run fused."""
    left: dict[str, int]
    """Number of LoRA layers that run as peft runs them, by the reason."""

    def __str__(self) -> str:
        reasons = "; ".join(f"{count} are not, because {reason}" for reason, count in self.left.items())
        total = self.fused + sum(self.left.values())
        return f"{self.fused} of {total} adapted layers are fused with their base" + (f"; {reasons}" if reasons else "")


def fuse(model: nn.Module) -> Fusion:
    """Make the LoRA layers of a peft model run fused where they can, in place. A second call changes nothing.

    Outputs and gradients equal those of peft's layers up to rounding: a result is rounded once, where peft rounds it
    three times.

    Returns:
        How many layers are fused, and why the others are not.
    """
    from peft.tuners.lora import LoraLayer

    fused = 0
    left: dict[str, int] = {}
    for parent in list(model.modules()):
        own = {name: m for name, m in parent.named_children() if isinstance(m, LoraLayer)}
        for names in _grouped(list(own)):
            chosen = []
            for name in names:
                reason = _obstacle(own[name])
                if reason is None:
                    chosen.append(own[name])
                else:
                    left[reason] = left.get(reason, 0) + 1
            fused += len(chosen)
            if chosen and not hasattr(chosen[0], _FUSED):
                _Group(chosen)
    return Fusion(fused=fused, left=left)


def forget(model: nn.Module) -> None:
    """Free the outputs that fused layers hold after a forward pass that was interrupted."""
    for module in model.modules():
        group = getattr(module, _FUSED, None)
        if group is not None:
            group.forget()


def _grouped(names: Sequence[str]) -> Iterator[list[str]]:
    """Yield the names of one parent's layers, in lists: one for each group, and one for each other layer."""
    rest = list(names)
    for group in GROUPS:
        found = [name for name in group if name in rest]
        if found:
            yield found
            rest = [name for name in rest if name not in found]
    for name in rest:
        yield [name]


def _obstacle(layer: Any) -> str | None:
    """Return the reason why a LoRA layer cannot be fused; None if it can."""
    base = layer.get_base_layer()
    if len(layer.lora_A) != 1:
        return "they have no adapter of two matrices, or several adapters"
    (name,) = layer.lora_A
    if getattr(layer, "use_dora", {}).get(name) or name in getattr(layer, "lora_variant", {}):
        return "the adapter is a variant (DoRA)"
    if not isinstance(layer.lora_dropout[name], nn.Identity):
        return "the adapter has dropout"
    a, b = layer.lora_A[name], layer.lora_B[name]
    if type(a) is not nn.Linear or type(b) is not nn.Linear or a.bias is not None or b.bias is not None:
        return "their matrices are not plain ones"
    if _is_four_bit(base):
        from finetune.patches.bitsandbytes import GatheredLinear4bit

        if isinstance(base, GatheredLinear4bit):
            return "their base is sharded over the ranks"
        dtype = base.compute_dtype if base.compute_dtype is not None else base.weight.quant_state.dtype
    elif type(base) is nn.Linear and not base.weight.requires_grad:
        dtype = base.weight.dtype
    else:
        return f"their base is a {type(base).__name__}"
    if not a.weight.dtype == b.weight.dtype == dtype:
        return f"the adapter is in {str(a.weight.dtype)[6:]} and the base computes in {str(dtype)[6:]}"
    return None


class _Member:
    """A LoRA layer of a group, with the modules that each call reads. Finding them each time takes longer."""

    __slots__ = ("_first", "base", "down", "layer", "name", "plain", "up")

    def __init__(self, layer: Any) -> None:
        (self.name,) = layer.lora_A
        self.layer, self.plain = layer, layer.forward
        self.base, self._first = layer.get_base_layer(), layer.base_layer
        self.down, self.up = layer.lora_A[self.name], layer.lora_B[self.name]

    def is_ready(self, dtype: torch.dtype) -> bool:
        """Return whether the layer is in the state in which it was fused, and computes in ``dtype``."""
        layer = self.layer
        if layer.disable_adapters or layer.merged or list(layer.active_adapters) != [self.name]:
            return False
        parts = layer._modules
        downs, ups = parts["lora_A"]._modules, parts["lora_B"]._modules
        same = (
            downs.get(self.name) is self.down and ups.get(self.name) is self.up and parts["base_layer"] is self._first
        )
        return same and len(downs) == 1 and self.down.weight.dtype == dtype


class _Group:
    """Layers that read the same input. The call of the first one computes the outputs of all."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self.members = [_Member(layer) for layer in layers]
        self.source: Tensor | None = None
        self.waiting: dict[int, Tensor] = {}
        self.apart = len(self.members) == 1
        for index, layer in enumerate(layers):
            setattr(layer, _FUSED, self)
            layer.forward = functools.partial(self.call, index)

    def forget(self) -> None:
        """Free the outputs that no layer has asked for yet, and their input."""
        self.source = None
        self.waiting.clear()

    def call(self, index: int, x: Tensor, *more: Any, **named: Any) -> Tensor:
        """Return the output of layer ``index`` for ``x`` [..., in]."""
        first = index == 0 and not self.apart
        wanted = self.members if first else [self.members[index]]
        if more or named or not _runs_fused(x) or not all(member.is_ready(x.dtype) for member in wanted):
            plain: Callable[..., Tensor] = self.members[index].plain
            return plain(x, *more, **named)
        if index in self.waiting:
            found = self.waiting.pop(index)
            same = self.source is x
            if not self.waiting or not same:
                self.source = None
            if same:
                return found
            self.apart = True  # this layer reads another input than the first
            self.waiting.clear()
        outputs = _run(wanted, x)
        if first:
            self.source, self.waiting = x, dict(enumerate(outputs[1:], start=1))
        return outputs[0]


def _is_four_bit(base: Any) -> bool:
    """Return whether a layer is one of bitsandbytes with 4-bit weights. A base in bf16 needs no bitsandbytes."""
    if not _bitsandbytes_is_installed():
        return False
    from bitsandbytes.nn import Linear4bit

    return isinstance(base, Linear4bit)


@functools.cache
def _bitsandbytes_is_installed() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


def _runs_fused(x: Tensor) -> bool:
    if torch.is_autocast_enabled(x.device.type):
        return False
    # For a single token, bitsandbytes has a kernel that does not write the decoded weight to memory.
    return torch.is_grad_enabled() or x.numel() > x.shape[-1]


def _run(members: Sequence[_Member], x: Tensor) -> tuple[Tensor, ...]:
    matrices = [member.down.weight for member in members] + [member.up.weight for member in members]
    bases = [member.base for member in members]
    scales = [float(member.layer.scaling[member.name]) for member in members]
    with torch.no_grad():
        inner = x.reshape(-1, x.shape[-1]) @ _stacked(matrices[: len(members)]).t()
    kept = None
    if len(members) == 1 and torch.is_grad_enabled():
        x = _Kept.apply(x, inner)
        kept = x.grad_fn  # None if x needs no gradient
    outputs: tuple[Tensor, ...] = _FusedLora.apply(x, inner, kept, bases, scales, *matrices)
    return outputs


def _weight(base: Any, dtype: torch.dtype) -> Tensor:
    """Return the base's weight [out, in], decoded if it is quantized."""
    if not _is_four_bit(base):
        return base.weight  # type: ignore[no-any-return]  # `base` is Any
    with plain_tensors():  # without this, each access to the weight would run a method of bitsandbytes
        state, packed = base.weight.quant_state, base.weight.data
    if kernel_runs_on(packed.device):
        from finetune.kernels.nf4 import can_decode, decode

        if can_decode(state):
            return decode(packed, state, dtype)
    from bitsandbytes.functional import dequantize_4bit

    weight: Tensor = dequantize_4bit(packed.view(-1, 1), state).to(dtype)
    return weight


class _Kept(torch.autograd.Function):
    """Returns x, and saves x and x A for the backward pass of :class:`_FusedLora`, which takes its result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inner: Tensor) -> Tensor:
        ctx.save_for_backward(x, inner)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _FusedLora(torch.autograd.Function):
    """Computes ``y_i = W_i x + bias_i + s_i B_i A_i x`` for the layers i of a group. W and bias are frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, inner: Tensor, kept: Any, bases: list[Any], scales: list[float], *matrices: Tensor
    ) -> tuple[Tensor, ...]:
        """Compute the outputs [..., out] of all layers.

        Args:
            ctx: of autograd.
            x: [..., in]
            inner: [tokens, sum of the ranks], x A of all layers, side by side.
            kept: the node of :class:`_Kept` that has saved x and ``inner``; None to save them here.
            bases: the base layers.
            scales: of each adapter.
            matrices: A [rank, in] of each layer, and then B [out, rank] of each layer.
        """
        count = len(bases)
        downs, ups = matrices[:count], matrices[count:]
        flat = x.reshape(-1, x.shape[-1])
        outputs = []
        for base, up, part, scale in zip(bases, ups, inner.split([a.shape[0] for a in downs], 1), scales, strict=True):
            # The product goes into an output of the final shape, because a model may write into what a layer returns,
            # which autograd forbids for a view.
            y = x.new_empty(*x.shape[:-1], up.shape[0])
            flat_y, weight = y.view(-1, up.shape[0]), _weight(base, x.dtype)
            if base.bias is None:
                torch.mm(flat, weight.t(), out=flat_y)
            else:
                torch.addmm(base.bias.to(x.dtype), flat, weight.t(), out=flat_y)
            del weight
            flat_y.addmm_(part, up.t(), alpha=scale)
            outputs.append(y)
        ctx.bases, ctx.scales, ctx.kept = bases, scales, kept
        # The matrices are parameters. Autograd would call two functions of checkpointing for each that it saves.
        ctx.matrices, ctx.versions = matrices, [matrix._version for matrix in matrices]
        if kept is None:
            ctx.save_for_backward(x, inner)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        x, inner = (ctx if ctx.kept is None else ctx.kept).saved_tensors
        matrices = ctx.matrices
        if [matrix._version for matrix in matrices] != ctx.versions:
            raise RuntimeError("a matrix of an adapter was changed in place between a forward and a backward pass")
        count = len(ctx.bases)
        downs, ups = matrices[:count], matrices[count:]
        flat = x.reshape(-1, x.shape[-1])
        ranks = [a.shape[0] for a in downs]
        # This is the gradient with respect to x A, with all layers side by side, as in ``inner``.
        grad_inner = torch.empty_like(inner)
        grad_ups: list[Tensor | None] = []
        grad_x: Tensor | None = None
        parts = zip(inner.split(ranks, 1), grad_inner.split(ranks, 1), strict=True)
        for grad, base, up, scale, (part, grad_part) in zip(grads, ctx.bases, ups, ctx.scales, parts, strict=True):
            if grad is None:
                grad_part.zero_()
                grad_ups.append(None)
                continue
            of = grad.reshape(-1, grad.shape[-1])
            torch.addmm(grad_part, of, up, beta=0, alpha=scale, out=grad_part)
            grad_up = torch.empty_like(up)
            grad_ups.append(torch.addmm(grad_up, of.t(), part, beta=0, alpha=scale, out=grad_up))
            if ctx.needs_input_grad[0]:
                weight = _weight(base, of.dtype)
                grad_x = of @ weight if grad_x is None else grad_x.addmm_(of, weight)
                del weight
        grad_downs = (grad_inner.t() @ flat).split(ranks)
        if ctx.needs_input_grad[0]:
            stacked = _stacked(downs)
            grad_x = grad_inner @ stacked if grad_x is None else grad_x.addmm_(grad_inner, stacked)
            grad_x = grad_x.view(x.shape)
        wanted = zip((*grad_downs, *grad_ups), ctx.needs_input_grad[5:], strict=True)
        return grad_x, None, None, None, None, *(grad if needed else None for grad, needed in wanted)


def _stacked(downs: Sequence[Tensor]) -> Tensor:
    return downs[0] if len(downs) == 1 else torch.cat(list(downs))
