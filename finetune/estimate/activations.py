"""Computes the bytes of activations that layers keep for their backward pass, and which layers get an adapter."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from finetune.config.recompute import inputs_on_host, layers_recomputed
from finetune.config.settings import KERNEL_CHUNKS, QUANTIZED
from finetune.kernels.available import can_launch, liger_is_installed, triton_is_installed
from finetune.model.names import wanted

if TYPE_CHECKING:
    from finetune.config.settings import RunConfig
    from finetune.estimate.dimensions import Dimensions, Linear

QUANTIZING = 7
"""Bytes per element that bitsandbytes takes to quantize the input of an int8 layer: an fp16 copy, its magnitudes, the
int8 result and the outliers."""
_READERS = (
    {"q_proj", "k_proj", "v_proj", "qkv_proj"},
    {"gate_proj", "up_proj", "gate_up_proj"},
)
"""The linear layers whose input is the output of a norm, in groups that share one input."""
_IN_MLP = {"gate_proj", "up_proj", "gate_up_proj", "down_proj"}


def targets(dims: Dimensions, config: RunConfig) -> list[Linear]:
    """Return the linear layers that get an adapter. ``count`` is the number of layers in which they get one."""
    adapter = config.adapter
    found = []
    for part in dims.linears:
        block = "mlp" if part.name in _IN_MLP else "self_attn"
        paths = (f"model.layers.{number}.{block}.{part.name}" for number in range(part.count))
        count = sum(wanted(path, adapter.targets, adapter.exclude) for path in paths)
        found += [dataclasses.replace(part, count=count)] if count else []
    return found


def activation_bytes(dims: Dimensions, config: RunConfig, compute: int, adapter: int) -> tuple[int, int, int]:
    """Return the bytes that the forward pass keeps, that one layer recomputes, and that its temporaries take.

    With checkpointing (https://arxiv.org/abs/1604.06174) a layer keeps only its input. Its backward pass recomputes the
    tensors that it would have kept. The other layers, if there are any, are the last ones and keep their activations.
    Of inputs that wait on the host, the last one is on the card, and the next one while a layer goes backward.
    """
    tokens = config.train.micro_batch * config.data.seq
    kept = layer_bytes(dims, config, compute, adapter)
    # A product needs the weight in the compute dtype. Only for a quantized weight that takes a copy.
    dequantized = dims.largest_matrix * compute if config.model.precision in QUANTIZED else 0
    one_gradient = tokens * dims.intermediate * compute
    # The backward pass of the down projection makes one gradient of the MLP's width, and holds the weight beside it.
    # The backward pass of the product act(gate) * up then turns that gradient into two, when the weight is freed
    # already. liger-kernel writes these two over gate and up.
    working = one_gradient + (dequantized if liger_gates(dims, config) else max(dequantized, one_gradient))
    if config.model.precision == "int8":  # recomputing the down projection quantizes its input
        working = max(working, tokens * (QUANTIZING * dims.intermediate + dims.hidden * compute))
    mask = tokens * config.data.seq if _windowed(dims, config) else 0  # one mask of booleans for all layers
    recomputed = layers_recomputed(config.train.checkpointing, dims.layers)
    held = (dims.layers - recomputed) * kept + mask
    if not recomputed:
        return held, 0, working
    one = tokens * dims.hidden * compute
    # The first norm of liger-kernel keeps the layer's input, which is there already.
    shared = one if liger_norms(config) else 0
    if inputs_on_host(config.train.offload_activations, config.model.device, sharded=config.model.shard):
        return held + one - shared, kept + (one if recomputed > 1 else 0), working
    return held + recomputed * one, kept - shared, working


def runs_kernels(config: RunConfig) -> bool:
    """Return whether this program's Triton kernels run: on a GPU, if they can, and if the settings allow it."""
    declined = config.train.kernels == "torch" or config.model.device == "cpu"
    return not declined and triton_is_installed() and can_launch()


def loss_chunk(config: RunConfig, compute: int) -> int:
    """Return the tokens whose logits, of ``compute`` bytes each, exist at a time."""
    return config.train.loss_chunk * (KERNEL_CHUNKS if compute < 4 and runs_kernels(config) else 1)


def liger_norms(config: RunConfig) -> bool:
    """Return whether liger-kernel runs the norms: on a GPU, if it is installed, can run, and the settings allow it."""
    return liger_is_installed() and runs_kernels(config)


def liger_gates(dims: Dimensions, config: RunConfig) -> bool:
    """Return whether liger-kernel also runs the gates of the MLP. The experts of a mixture have gates of their own."""
    return liger_norms(config) and not dims.experts


def _windowed(dims: Dimensions, config: RunConfig) -> bool:
    """Return whether rows are longer than the attention window. They need a mask, which flash attention cannot use."""
    return dims.window is not None and config.data.seq > dims.window


def layer_bytes(dims: Dimensions, config: RunConfig, compute: int, adapter: int) -> int:
    """Return the bytes that one layer keeps for its backward pass, counted from transformers' code.

    For each token:

    * a norm keeps its input in fp32, and a norm of liger-kernel keeps it in the compute dtype;
    * attention keeps queries, keys, values, its result, and one fp32 log-sum per head
      (https://arxiv.org/abs/2205.14135);
    * the MLP keeps gate, up and, without liger-kernel, act(gate), once for each expert that the token goes to;
    * a linear layer keeps its input if its own weight or its adapter is trained: the gradient of a frozen layer's input
      does not depend on it.
    """
    tokens = config.train.micro_batch * config.data.seq
    full = config.adapter.full
    chosen = [part for part in targets(dims, config) for _ in range(-(-part.count // dims.layers))]
    # With dropout, each adapter has an input of its own, which is counted below.
    keeping = {part.name for part in chosen} if full or not config.adapter.dropout else set()
    kept = dims.norms * dims.hidden * (compute if liger_norms(config) else 4 + (compute if full else 0))
    kept += compute * dims.hidden * sum(bool(keeping & names) for names in _READERS)
    kept += compute * (2 * dims.queries + 2 * dims.keys) + 4 * dims.heads
    kept += dims.experts_per_token * (2 if liger_gates(dims, config) else 3) * dims.intermediate * compute
    if dims.experts:
        kept += dims.experts_per_token * dims.hidden * compute + 8 * dims.experts
    elif "down_proj" in keeping:
        kept += dims.intermediate * compute
    if not full:
        kept += len(chosen) * config.adapter.rank * adapter
        if config.adapter.dropout:  # the mask of dropout, and its result
            kept += sum(part.inputs for part in chosen) * (1 + adapter)
        if adapter != compute:
            kept += sum(part.inputs for part in chosen) * adapter
        if config.adapter.dora:  # the gradient of the magnitude needs the outputs of base and adapter
            kept += 2 * compute * sum(part.outputs for part in chosen)
    kept *= tokens
    if config.model.attention == "eager":
        kept += config.train.micro_batch * dims.heads * config.data.seq**2 * (compute + 4)
    elif _windowed(dims, config):  # the mask as numbers, keys and values repeated for each head, and padding
        kept += tokens * compute * (config.data.seq + 2 * (dims.queries - dims.keys) + dims.queries)
    return kept
