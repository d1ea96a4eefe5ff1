"""Computes the peak memory of a training step by category. Nothing is loaded or run, and torch is not needed.

Some memory is held for the whole step: weights, quantization constants, adapters, optimizer state, and gradients from
their first backward pass on. The peak is the sum of that and of the largest of: the loss, the backward pass of one
layer, the update. The dry GPU measures the same step; ``python -m finetune.ladder`` compares the two.

The arithmetic is simplified, so it differs from a measurement in these ways:

* Sizes are exact, but fragmentation and the allocator's rounding of blocks below 1 MiB are not counted.
* Of the temporaries of a layer only the largest is counted, the dequantized weight; small ones may exist beside it.
* The tokens of a mixture are assumed to spread evenly over its experts, and a packed batch to be full.
* If only some layers have an adapter, the activations of every layer are counted as if it had one.
* DoRA computes its norms one weight at a time; the fp32 copy of that weight is not counted.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.config.recompute import layers_recomputed
from finetune.config.settings import QUANTIZED
from finetune.estimate.activations import activation_bytes, loss_chunk, runs_kernels, targets
from finetune.estimate.dimensions import Dimensions, Linear
from finetune.model.shapes import find_shape
from pytest_vram.memory.timeline import CATEGORIES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from finetune.config.settings import RunConfig

FLOAT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
BLOCK = 64
"""Number of 4-bit weights that share one scale (https://arxiv.org/abs/2305.14314, section 2)."""
NESTED_BLOCK = 256
"""Number of scales that share one scale under double quantization (the same paper, section 3)."""
WORKSPACE = {7: 8_519_680, 8: 8_519_680, 9: 33_554_432}
"""Bytes of the cuBLAS workspace of one thread, by the first number of the card's compute capability, from
``getChosenWorkspaceSize`` in PyTorch's ``aten/src/ATen/cuda/CublasHandlePool.cpp``."""
PAGED_FROM = 4096
"""Tensors with at least so many elements have paged state under a paged optimizer.

The default of bitsandbytes is 100,000. With it, half the state of a rank-16 adapter on a 7B model stays on the card.
"""
EIGHT_BIT_FROM = 4096
"""Tensors with at least so many elements have 8-bit state with bitsandbytes' 8-bit optimizers (``min_8bit_size``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Bytes at the peak of a training step, by category. :attr:`moment` says when in the step the peak is."""

    weights: int
    quantization: int
    """Scales and code books of quantized weights."""
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    """Tensors that the forward pass keeps for the backward pass, and those that one layer recomputes under
    checkpointing."""
    logits: int
    temporary: int
    """Temporaries of one layer's backward pass, of the update, or of loading."""
    other: int
    """The workspace of cuBLAS."""
    context: int
    """The CUDA context; 0 if no card is named."""
    moment: str
    """When the peak is: ``loading``, ``loss``, ``backward`` or ``update``."""
    managed: int
    """Paged optimizer state. It moves to the host when the card is full, so it is not part of the total."""
    parameters: int
    """Number of parameters of the base model."""
    trainable: int
    """Number of parameters that are trained."""

    @property
    def allocated_bytes(self) -> int:
        """Bytes that PyTorch's allocator has handed out at the peak."""
        return sum(self.by_category().values()) - self.context

    @property
    def total_bytes(self) -> int:
        """Bytes on the card at the peak: :attr:`allocated_bytes` and the CUDA context."""
        return self.allocated_bytes + self.context

    def by_category(self) -> dict[str, int]:
        """Return the bytes of each :data:`pytest_vram.memory.timeline.Category` and of the context, as drawn."""
        return {name: getattr(self, name) for name in (*CATEGORIES, "context")}


def article_figures(parameters: float = 7e9) -> dict[str, float]:
    """Return the figures of the article "The Art of Fine-tuning", in GB of 1e9 bytes as the article has them.

    The article stores every parameter in one precision, and counts gradients of 4 bytes and two Adam moments
    (https://arxiv.org/abs/1412.6980) of 4 bytes each. :func:`estimate` adds what the article leaves out: norms and
    embeddings, which stay unquantized, the scales of quantized weights, activations, logits, workspace, the CUDA
    context, and the copy that PyTorch's AdamW makes during the update.
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
    """Compute the bytes at the peak of one optimizer step, in which every row has ``--seq`` tokens.

    Args:
        config: the run.
        shape: fields of the model's ``config.json``; None reads those of ``config.model.model``.
        capability: compute capability of the card, which decides the half-precision dtype and the workspace.
        context_bytes: bytes of the CUDA context.

    Raises:
        ConfigError: the model is unknown, or of a family that the arithmetic does not know.
    """
    dims = Dimensions.of(model_fields(config.model.model) if shape is None else shape)
    stored, compute, adapter = element_bytes(config, capability)
    weights, quantization = base_bytes(dims, config, stored, compute)
    trained = trained_tensors(dims, config)
    trainable = sum(trained)
    train_bytes = stored if config.adapter.full else adapter
    gradients = round(trainable * train_bytes)
    masters = not config.adapter.full and adapter == 2 and config.adapter.adapter_dtype != "fp16"
    ordinary, managed = optimizer_bytes(trained, config.train.optimizer, train_bytes, masters=masters)
    adapters = 0 if config.adapter.full else trainable * adapter
    workspace = 2 * WORKSPACE.get(capability[0], WORKSPACE[9])
    activation = activation_bytes(dims, config, compute, adapter)
    logits = logit_bytes(dims, config, config.train.micro_batch * config.data.seq, compute)
    moments = _moments(dims, config, gradients=gradients, activation=activation, logits=logits, workspace=workspace)
    moment = max(moments, key=lambda name: sum(moments[name]))
    held_gradients, activations, at_loss, temporary, other = moments[moment]
    loading = loading_bytes(dims, config, stored, compute)
    if loading > adapters + ordinary + sum(moments[moment]):
        moment, adapters, ordinary, held_gradients, activations, at_loss, other = "loading", 0, 0, 0, 0, 0, 0
        temporary = loading
    return Estimate(
        weights=weights,
        quantization=quantization,
        adapters=adapters,
        gradients=held_gradients,
        optimizer=ordinary,
        activations=activations,
        logits=at_loss,
        temporary=temporary,
        other=other,
        context=context_bytes,
        moment="backward" if moment == "last layer" else moment,
        managed=managed,
        parameters=dims.parameters,
        trainable=trainable,
    )


def _moments(
    dims: Dimensions,
    config: RunConfig,
    *,
    gradients: int,
    activation: tuple[int, int, int],
    logits: int,
    workspace: int,
) -> dict[str, tuple[int, int, int, int, int]]:
    """Return the bytes of gradients, activations, logits, temporaries and workspaces at each moment of a step.

    Only bytes that differ between the moments are in them.

    Args:
        dims: the sizes of the model.
        config: the run.
        gradients: bytes of all gradients.
        activation: the result of :func:`finetune.estimate.activations.activation_bytes`.
        logits: bytes of the logits and their gradient in one chunk.
        workspace: bytes of the cuBLAS workspaces of both threads.
    """
    saved, again, working = activation
    update = gradients if config.train.optimizer == "adamw" else 0
    # `earlier`: gradients of the micro-batches before this one. With a paged optimizer, an adapter's are on the host.
    on_host = config.train.optimizer.startswith("paged") and not config.adapter.full and config.model.device != "cpu"
    earlier = gradients if config.train.accumulation > 1 and not on_host else 0
    # Layers that keep their activations come first in the backward pass, and free more than one layer recomputes.
    at_once = again if layers_recomputed(config.train.checkpointing, dims.layers) == dims.layers else 0
    return {
        "loss": (earlier, saved, logits, 0, workspace // 2),
        "backward": (earlier, saved + at_once, 0, working, workspace),
        # The backward pass ends with the first layer, when the gradients of all the other layers exist.
        "last layer": (gradients, again, 0, working, workspace),
        "update": (gradients, 0, 0, update, workspace),
    }


def model_fields(name: str) -> dict[str, Any]:
    """Return the fields of a model's ``config.json``, from a folder, a shape that comes with finetune, or the hub.

    Raises:
        ModelError: there is no such model, or its configuration cannot be read.
    """
    file = Path(name).expanduser() / "config.json"
    if file.is_file():
        found: dict[str, Any] = json.loads(file.read_text())
        return found
    shape = find_shape(name)
    if shape is not None:
        return shape.fields()
    from finetune.config.settings import ModelConfig
    from finetune.model.load import load_config

    settings: dict[str, Any] = load_config(ModelConfig(model=name)).to_dict()
    return settings


def element_bytes(config: RunConfig, capability: tuple[int, int]) -> tuple[float, int, int]:
    """Return the bytes of an element of the base's linear layers (0.5 for 4 bits), of activations, of the adapter."""
    precision, compute = config.model.precision, config.model.compute_dtype
    if compute == "auto":
        best = "fp32" if config.model.device == "cpu" else "bf16" if capability >= (8, 0) else "fp16"
        compute = best if precision in QUANTIZED else precision  # type: ignore[assignment]  # a str for a Literal
    stored = {"int8": 1.0, "fp4": 0.5, "nf4": 0.5}.get(precision) or float(FLOAT_BYTES[precision])
    adapter = config.adapter.adapter_dtype
    if adapter == "auto":
        adapter = "bf16" if compute == "bf16" else "fp32"
    return stored, FLOAT_BYTES[compute], FLOAT_BYTES[adapter]


def base_bytes(dims: Dimensions, config: RunConfig, stored: float, compute: int) -> tuple[int, int]:
    """Return the bytes of the base's weights, and of the constants of those that are quantized."""
    quantized = config.model.precision in QUANTIZED
    linear = sum(part.elements for part in dims.stored_linears)
    rest = (dims.parameters - linear) * (compute if quantized else stored)
    constants = sum(
        part.count * constant_bytes(part, config.model.precision, config.model.double_quant)
        for part in dims.stored_linears
    )
    return round(linear * stored + rest), constants


def loading_bytes(dims: Dimensions, config: RunConfig, stored: float, compute: int) -> int:
    """Return the bytes that loading a mixture in 4 bits needs beside its weights, from transformers' loading code.

    The peak is in the last layer. Its gate and up weights are held twice in the compute dtype, once as they were read,
    one tensor for each expert, and once joined into one tensor. The 4-bit weights of its experts do not exist yet.
    """
    if not dims.fused or config.model.precision not in ("fp4", "nf4"):
        return 0
    layer = [part.elements // dims.layers for part in dims.fused]
    return round(2 * layer[0] * compute - sum(layer) * stored)


def constant_bytes(part: Linear, precision: str, double_quant: bool) -> int:
    """Return the bytes of the constants of one quantized matrix, each tensor rounded up to a block of 512 bytes.

    int8 has one fp32 scale per output row (https://arxiv.org/abs/2208.07339). 4 bits have one fp32 scale for each 64
    weights, and a code book of 16 fp32 values. Double quantization stores these scales in 8 bits, with one fp32 scale
    for each 256 of them, a code book of 256 fp32 values and an fp32 mean (https://arxiv.org/abs/2305.14314, sections 2
    and 3).
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
    """Return the number of elements of each trained tensor.

    LoRA trains A [r, inputs] and B [outputs, r] of each target (https://arxiv.org/abs/2106.09685); DoRA also trains a
    magnitude per output (https://arxiv.org/abs/2402.09353). ``--full`` trains every parameter of the model.
    """
    if config.adapter.full:
        return dims.tensors
    found: list[int] = []
    for part in targets(dims, config):
        tensors = [config.adapter.rank * part.inputs, part.outputs * config.adapter.rank]
        found += (tensors + ([part.outputs] if config.adapter.dora else [])) * part.count
    return found


def optimizer_bytes(trained: list[int], optimizer: str, element: float, *, masters: bool = False) -> tuple[int, int]:
    """Return the bytes of Adam's two moments in ordinary memory, and in managed memory.

    PyTorch keeps the moments in the dtype of the parameter. bitsandbytes keeps them in fp32, or in 8 bits with an fp32
    scale for each 256 values (https://arxiv.org/abs/2110.02861).

    Args:
        trained: elements of each trained tensor.
        optimizer: its name in the settings.
        element: bytes of an element of a trained tensor.
        masters: count 2 more bytes per element, for the low 16 bits of an fp32 master of each bf16 weight.
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


def logit_bytes(dims: Dimensions, config: RunConfig, tokens: int, compute: int) -> int:
    """Return the bytes of the loss: the logits of one chunk, and the hidden states' gradient.

    Where no kernel computes the loss, a chunk has a copy of its logits in fp32 too.
    A trained head adds the fp32 sum of its gradient over the chunks, and the gradient of one chunk.
    """
    chunk = min(tokens, loss_chunk(config, compute))
    copy = 4 if compute < 4 and not runs_kernels(config) else 0
    logits = chunk * dims.vocabulary * (compute + copy)
    if config.adapter.full:
        head = dims.vocabulary * dims.hidden
        logits = 4 * head + max(logits, (head + chunk * dims.vocabulary) * compute)
    return logits + 2 * tokens * dims.hidden * compute


def _blocks(size: int) -> int:
    return -(-size // 512) * 512
