"""The arithmetic: bytes by category, from a config alone. Nothing is loaded, nothing is run, and torch is not needed.

What a step holds is the sum of what lives through it (weights, constants, adapters, optimizer state, and gradients
once there are any) and of what is largest meanwhile: the loss, one layer's backward pass, or the update. The dry GPU
measures the same step; ``python -m finetune.ladder`` puts the two side by side.

Simplifications, and what they leave out when held against a measurement:

* Sizes are exact, but the allocator's rounding of blocks below 1 MiB and its fragmentation are not counted.
* Of a layer's temporaries the largest is counted, the dequantized weight; several small ones may be alive beside it.
* A mixture's tokens spread evenly over its experts. A packed batch is counted as one of full rows.
* DoRA's norms are taken a weight at a time, and that weight in fp32 is not counted.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.dimensions import Dimensions, Linear
from finetune.shapes import find_shape

if TYPE_CHECKING:
    from collections.abc import Mapping

    from finetune.config import RunConfig

FLOAT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
QUANTIZED = ("int8", "fp4", "nf4")
BLOCK = 64
"""Weights that share one scale in 4 bits (https://arxiv.org/abs/2305.14314, section 2)."""
NESTED_BLOCK = 256
"""Scales that share one scale under double quantization (the same paper, section 3)."""
WORKSPACE = {7: 8_519_680, 8: 8_519_680, 9: 33_554_432}
"""cuBLAS workspace of one thread by the capability's first number: ``getChosenWorkspaceSize`` in PyTorch's
``aten/src/ATen/cuda/CublasHandlePool.cpp``."""
PAGED_FROM = 4096
"""Elements from which a state is paged, as in ``optim.py``, which imports torch; bitsandbytes does from 1e5 on."""
QUANTIZING = 7
"""Bytes an element that bitsandbytes takes to quantize an 8-bit layer's input: in fp16, its size, int8, outliers."""
_READERS = (
    {"q_proj", "k_proj", "v_proj", "qkv_proj"},
    {"gate_proj", "up_proj", "gate_up_proj"},
)
"""The linear layers that read a norm's result."""
EIGHT_BIT_FROM = 4096
"""Elements from which bitsandbytes keeps a state in 8 bits (``min_8bit_size``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Bytes at the peak of a training step, by category. Sizes are those at the moment that :attr:`moment` names."""

    weights: int
    constants: int
    """Scales of quantized weights."""
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    """What the forward pass keeps for backward, and the layer at work."""
    logits: int
    workspace: int
    """Temporaries of the update or of loading, and cuBLAS' workspace."""
    context: int
    """The CUDA context; 0 where no card is named."""
    moment: str
    """``loading``, ``loss``, ``backward`` or ``update``: which is the largest."""
    managed: int
    """Paged optimizer state. It lives on the card while there is room, and on the host otherwise: not in the total."""
    parameters: int
    """Of the base."""
    trainable: int
    """Parameters that are trained."""

    @property
    def allocated_bytes(self) -> int:
        """What PyTorch's allocator has to hand out at the peak."""
        return sum(self.by_category().values()) - self.context

    @property
    def total_bytes(self) -> int:
        """The same and the context."""
        return self.allocated_bytes + self.context

    def by_category(self) -> dict[str, int]:
        """Bytes by category, in the order in which they are drawn."""
        return {name: getattr(self, name) for name in CATEGORIES}


_NOT_CATEGORIES = ("moment", "managed", "parameters", "trainable")
CATEGORIES: tuple[str, ...] = tuple(f.name for f in fields(Estimate) if f.name not in _NOT_CATEGORIES)


def article_figures(parameters: float = 7e9) -> dict[str, float]:
    """The figures of "The Art of Fine-tuning", in its GB of 1e9 bytes.

    The article counts every parameter as a weight of one size, gradients of the weights' size, and two Adam moments
    (https://arxiv.org/abs/1412.6980) of 4 bytes each. It leaves out what this module adds: norms and embeddings that
    stay unquantized, the scales of quantized weights, activations, logits, workspace, the context, and the copy that
    PyTorch's AdamW makes while it updates.
    """
    gb = parameters / 1e9
    weights = {"fp32": 4 * gb, "fp16": 2 * gb, "int8": gb, "nf4": gb / 2}
    full = weights["fp32"] + 4 * gb + 2 * 4 * gb
    return {**weights, "gradients": 4 * gb, "optimizer": 8 * gb, "full": full, "over_16": full - 16}


def estimate(
    config: RunConfig,
    shape: Mapping[str, Any] | None = None,
    *,
    capability: tuple[int, int] = (8, 9),
    context_bytes: int = 0,
) -> Estimate:
    """Bytes of one optimizer step of ``config``, every row as long as ``--seq`` allows.

    Args:
        config: the run.
        shape: fields of the model's ``config.json``; by default those of ``config.model.model``.
        capability: of the card, which decides the half-precision dtype and the workspace.
        context_bytes: what the CUDA context takes.

    Raises:
        ConfigError: the model is unknown, or of a family that the arithmetic does not know.
    """
    dims = Dimensions.of(model_fields(config.model.model) if shape is None else shape)
    stored, compute, adapter = element_bytes(config, capability)
    weights, constants = base_bytes(dims, config, stored, compute)
    trained = trained_tensors(dims, config)
    trainable = sum(trained)
    train_bytes = stored if config.adapter.full else adapter
    gradients = round(trainable * train_bytes)
    masters = not config.adapter.full and adapter == 2 and config.adapter.adapter_dtype != "fp16"
    ordinary, managed = optimizer_bytes(trained, config.train.optimizer, train_bytes, masters=masters)
    adapters = 0 if config.adapter.full else trainable * adapter
    workspace = 2 * WORKSPACE.get(capability[0], WORKSPACE[9])

    tokens = config.train.micro_batch * config.data.seq
    saved, working = activation_bytes(dims, config, compute, adapter)
    logits = logit_bytes(dims, config, tokens, compute)
    update = gradients if config.train.optimizer == "adamw" else 0
    # Of the micro-batches before this one: an adapter's wait in host memory under a paged optimizer.
    on_host = config.train.optimizer.startswith("paged") and not config.adapter.full and config.model.device != "cpu"
    earlier = gradients if config.train.accumulation > 1 and not on_host else 0
    moments = {
        "loss": (earlier, saved, logits, workspace // 2),
        "backward": (earlier, saved + working, 0, workspace),
        # The first layer's backward pass comes when all the others' gradients are there.
        "last layer": (gradients, working, 0, workspace),
        "update": (gradients, 0, 0, update + workspace),
    }
    moment = max(moments, key=lambda name: sum(moments[name]))
    there, activations, at_loss, rest = moments[moment]
    loading = loading_bytes(dims, config, stored, compute)
    if loading > adapters + ordinary + sum(moments[moment]):
        moment, adapters, ordinary, there, activations, at_loss, rest = "loading", 0, 0, 0, 0, 0, loading
    return Estimate(
        weights=weights,
        constants=constants,
        adapters=adapters,
        gradients=there,
        optimizer=ordinary,
        activations=activations,
        logits=at_loss,
        workspace=rest,
        context=context_bytes,
        moment="backward" if moment == "last layer" else moment,
        managed=managed,
        parameters=dims.parameters,
        trainable=trainable,
    )


def model_fields(name: str) -> dict[str, Any]:
    """The fields of a model's ``config.json``: a folder's, a shape's that comes with finetune, or the hub's.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    file = Path(name).expanduser() / "config.json"
    if file.is_file():
        found: dict[str, Any] = json.loads(file.read_text())
        return found
    shape = find_shape(name)
    if shape is not None:
        return shape.fields()
    from finetune.config import ModelConfig
    from finetune.model import load_config

    settings: dict[str, Any] = load_config(ModelConfig(model=name)).to_dict()
    return settings


def element_bytes(config: RunConfig, capability: tuple[int, int]) -> tuple[float, int, int]:
    """Bytes of an element of: the base's linear layers, activations, the adapter. 4 bits are half a byte."""
    precision, compute = config.model.precision, config.model.compute_dtype
    if compute == "auto":
        best = "fp32" if config.model.device == "cpu" else "bf16" if capability >= (8, 0) else "fp16"
        compute = best if precision in QUANTIZED else precision  # type: ignore[assignment]
    stored = {"int8": 1.0, "fp4": 0.5, "nf4": 0.5}.get(precision) or float(FLOAT_BYTES[precision])
    adapter = config.adapter.adapter_dtype
    if adapter == "auto":
        adapter = "bf16" if compute == "bf16" else "fp32"
    return stored, FLOAT_BYTES[compute], FLOAT_BYTES[adapter]


def base_bytes(dims: Dimensions, config: RunConfig, stored: float, compute: int) -> tuple[int, int]:
    """Weights, and the constants that belong to quantized ones."""
    quantized = config.model.precision in QUANTIZED
    linear = sum(part.elements for part in dims.stored_linears)
    rest = (dims.parameters - linear) * (compute if quantized else stored)
    constants = sum(
        part.count * constant_bytes(part, config.model.precision, config.model.double_quant)
        for part in dims.stored_linears
    )
    return round(linear * stored + rest), constants


def loading_bytes(dims: Dimensions, config: RunConfig, stored: float, compute: int) -> int:
    """What loading a mixture in 4 bits adds to its weights, counted off transformers' loading code.

    The last layer's gates and ups are there twice in the compute dtype, expert by expert as they were read and joined
    into one tensor, and that layer's experts not yet in 4 bits.
    """
    if not dims.fused or config.model.precision not in ("fp4", "nf4"):
        return 0
    layer = [part.elements // dims.layers for part in dims.fused]
    return round(2 * layer[0] * compute - sum(layer) * stored)


def constant_bytes(part: Linear, precision: str, double_quant: bool) -> int:
    """Scales of one quantized matrix, each tensor in the allocator's blocks of 512 bytes.

    int8 has one fp32 scale an output row (https://arxiv.org/abs/2208.07339). 4 bits have one fp32 scale for each 64
    weights and a code book of 16 fp32; double quantization makes the scales 8-bit, with an fp32 scale for each 256 of
    them, a code book of 256 fp32 and an fp32 mean (https://arxiv.org/abs/2305.14314, sections 2 and 3).
    """
    if precision == "int8":
        return _blocks(4 * part.outputs)
    if precision not in ("fp4", "nf4"):
        return 0
    scales = -(-part.inputs * part.outputs // BLOCK)
    if not double_quant:
        return _blocks(4 * scales) + _blocks(64)
    return _blocks(scales) + _blocks(4 * -(-scales // NESTED_BLOCK)) + _blocks(1024) + _blocks(4) + _blocks(64)


def trained_tensors(dims: Dimensions, config: RunConfig) -> list[int]:
    """Elements of each tensor that is trained: A [r, in] and B [out, r] of each target (https://arxiv.org/abs/2106.09685).

    DoRA adds a magnitude an output (https://arxiv.org/abs/2402.09353).
    """
    if config.adapter.full:
        return dims.tensors
    found: list[int] = []
    for part in targets(dims, config):
        tensors = [config.adapter.rank * part.inputs, part.outputs * config.adapter.rank]
        found += (tensors + ([part.outputs] if config.adapter.dora else [])) * part.count
    return found


def targets(dims: Dimensions, config: RunConfig) -> list[Linear]:
    """The linear layers that get an adapter."""
    wanted = set(config.adapter.targets)
    if wanted == {"all-linear"}:
        return list(dims.linears)
    return [part for part in dims.linears if part.name in {name.rpartition(".")[2] for name in wanted}]


def optimizer_bytes(trained: list[int], optimizer: str, element: float, *, masters: bool = False) -> tuple[int, int]:
    """Adam's two moments, as (ordinary memory, managed memory).

    PyTorch keeps them in the parameter's dtype; bitsandbytes in fp32, or in 8 bits with an fp32 scale for each 256
    (https://arxiv.org/abs/2110.02861). With ``masters`` the 16 bits that a bf16 adapter drops are kept beside them.
    """
    if optimizer == "adamw":
        return round(2 * element * sum(trained)), 0
    ordinary = managed = 0
    for count in trained:
        eight = optimizer.endswith("8bit") and count >= EIGHT_BIT_FROM
        scales = 2 * 4 * -(-count // 256) if eight else 0
        size = 2 * count * (1 if eight else 4) + (2 * count if masters else 0)
        if optimizer.startswith("paged") and count >= PAGED_FROM:
            managed += size
            ordinary += scales
        else:
            ordinary += size + scales
    return ordinary, managed


def activation_bytes(dims: Dimensions, config: RunConfig, compute: int, adapter: int) -> tuple[int, int]:
    """What the forward pass keeps for backward, and what one layer's backward pass adds.

    With checkpointing (https://arxiv.org/abs/1604.06174) a layer keeps its input alone, and what it would have kept is
    the working set of its own backward pass.
    """
    tokens = config.train.micro_batch * config.data.seq
    kept = layer_bytes(dims, config, compute, adapter)
    # The product's second operand, in the compute dtype; nothing where the weight is stored in it.
    dequantized = dims.largest_matrix * compute if config.model.precision in QUANTIZED else 0
    one_gradient = tokens * dims.intermediate * compute
    # Behind the down projection one gradient of the MLP's width beside the weight; behind the product two, which it
    # has split into, where what the projection had saved is gone already.
    # liger-kernel writes the two into gate and up themselves.
    working = one_gradient + (dequantized if _liger_gates(dims, config) else max(dequantized, one_gradient))
    if config.model.precision == "int8":  # the down projection again, before backward: its input is quantized there
        working = max(working, tokens * (QUANTIZING * dims.intermediate + dims.hidden * compute))
    mask = tokens * config.data.seq if _windowed(dims, config) else 0  # of booleans, one for all layers
    if not config.train.checkpointing:
        return dims.layers * kept + mask, working
    inputs = 0 if config.train.offload_activations else dims.layers * tokens * dims.hidden * compute
    if _liger(config) and inputs:
        kept -= tokens * dims.hidden * compute  # the first norm keeps the layer's input, which is there already
    return inputs + mask, kept + working


def _liger(config: RunConfig) -> bool:
    """Whether liger-kernel runs the norms: on a card, where it is installed and not declined."""
    declined = config.train.kernels == "torch" or config.model.device == "cpu"
    return not declined and importlib.util.find_spec("liger_kernel") is not None


def _liger_gates(dims: Dimensions, config: RunConfig) -> bool:
    """Whether it runs the MLP's gates too; a mixture's are its experts' own."""
    return _liger(config) and not dims.experts


def _windowed(dims: Dimensions, config: RunConfig) -> bool:
    """Whether rows are longer than attention looks back: that takes a mask, which flash attention has no room for."""
    return dims.window is not None and config.data.seq > dims.window


def layer_bytes(dims: Dimensions, config: RunConfig, compute: int, adapter: int) -> int:
    """What one layer of a Llama-like decoder saves for its backward pass, counted off transformers' code.

    A token: each norm keeps its input in fp32; attention keeps queries, keys, values, its result and an fp32 log-sum a
    head (https://arxiv.org/abs/2205.14135); the MLP keeps gate, up and act(gate), once for each expert that the token
    goes to. With liger-kernel norms keep their inputs in the compute dtype, and the MLP gate and up alone. A linear
    layer keeps its input where its own weight is trained, or its adapter's: the frozen product needs none.
    """
    tokens = config.train.micro_batch * config.data.seq
    full = config.adapter.full
    chosen = [part for part in targets(dims, config) for _ in range(part.count // dims.layers)]
    # Dropout makes an input of its own for each adapter.
    keeping = {part.name for part in chosen} if full or not config.adapter.dropout else set()
    kept = dims.norms * dims.hidden * (compute if _liger(config) else 4 + (compute if full else 0))
    kept += compute * dims.hidden * sum(bool(keeping & names) for names in _READERS)
    kept += compute * (2 * dims.queries + 2 * dims.keys) + 4 * dims.heads
    kept += dims.experts_per_token * (2 if _liger_gates(dims, config) else 3) * dims.intermediate * compute
    if dims.experts:
        kept += dims.experts_per_token * dims.hidden * compute + 8 * dims.experts
    elif "down_proj" in keeping:
        kept += dims.intermediate * compute
    if not full:
        kept += len(chosen) * config.adapter.rank * adapter
        if config.adapter.dropout:  # a mask and a product
            kept += sum(part.inputs for part in chosen) * (1 + adapter)
        if adapter != compute:
            kept += sum(part.inputs for part in chosen) * adapter
        if config.adapter.dora:  # the base's output and the adapter's, for the magnitude's gradient
            kept += 2 * compute * sum(part.outputs for part in chosen)
    kept *= tokens
    if config.model.attention == "eager":
        kept += config.train.micro_batch * dims.heads * config.data.seq**2 * (compute + 4)
    elif _windowed(dims, config):  # the mask as numbers, keys and values a copy for each head, and what is padded
        kept += tokens * compute * (config.data.seq + 2 * (dims.queries - dims.keys) + dims.queries)
    return kept


def logit_bytes(dims: Dimensions, config: RunConfig, tokens: int, compute: int) -> int:
    """The loss' logits of one chunk: the head's product and its fp32 copy, and the hidden states' gradient.

    A head that is trained adds its gradient's fp32 sum over the chunks, and one chunk's part of it.
    """
    chunk = min(tokens, config.train.loss_chunk)
    logits = chunk * dims.vocabulary * (compute + 4 if compute < 4 else 4)
    if config.adapter.full:
        head = dims.vocabulary * dims.hidden
        logits = 4 * head + max(logits, (head + chunk * dims.vocabulary) * compute)
    return logits + 2 * tokens * dims.hidden * compute


def _blocks(size: int) -> int:
    return -(-size // 512) * 512
