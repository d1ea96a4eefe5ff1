"""Estimates the time of an optimizer step on a card, from what it computes, moves and launches.

The device and the host work at the same time, so a micro-batch takes as long as the slower of the two. Copies of the
layers' inputs run beside both, and cost time where one of them takes longer than its layer. The operations of products
and the bytes are counted; the speeds are those of :mod:`finetune.estimate.card_speed`, and the kernels of a layer were
counted on a dry GPU. So an estimate ranks settings, and is no promise of a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.config.recompute import inputs_on_host, layers_recomputed
from finetune.config.settings import QUANTIZED
from finetune.estimate.activations import liger_gates, loss_chunk, runs_kernels, targets
from finetune.estimate.arithmetic import element_bytes, trained_tensors
from finetune.estimate.card_speed import (
    ATTENTION_SHARE,
    BUS_BYTES,
    LAUNCH_SECONDS,
    MEMORY_SHARE,
    PRODUCTS_SHARE,
)
from finetune.estimate.dimensions import Dimensions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from finetune.config.settings import RunConfig
    from finetune.estimate.card_speed import CardSpeed

_BOTH_WAYS, _AGAIN, _CHUNK, _FUSED_CHUNK = 78, 31, 19, 3
"""Kernels of a layer forward and backward, of its recomputation, and of one chunk of the loss, with operators and in a
kernel of its own; counted on a dry GPU in a step of Llama-3.2-1B with fused kernels."""
_UNFUSED = 2.5
"""Factor of a layer's kernels with ``--kernels torch``, counted on the same step."""
_MOVED = 4
"""Launches for a layer's input that goes to the host and comes back: two copies, and the events around them."""
_PER_TENSOR = 12  # kernels of an optimizer of bitsandbytes for one tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Estimated seconds of one optimizer step, by what they are for."""

    products: float
    """Products of matrices, with what is recomputed and the adapter."""
    attention: float
    memory: float
    """Elementwise kernels, and decoding quantized weights: reading and writing memory."""
    bus: float
    """What copies of the layers' inputs, to the host and back, take longer than the layers that run beside them."""
    launches: float
    """Time of the host, which launches the kernels while the device works."""
    update: float
    """The optimizer."""
    tokens: int
    """Tokens of the step."""

    @property
    def seconds(self) -> float:
        """Estimated seconds of the step."""
        return max(self.products + self.attention + self.memory, self.launches) + self.bus + self.update

    @property
    def tokens_per_second(self) -> float:
        """Estimated tokens per second."""
        return self.tokens / self.seconds


def step_time(
    config: RunConfig,
    shape: Mapping[str, Any],
    speed: CardSpeed,
    *,
    capability: tuple[int, int] = (8, 9),
    ranks: int = 1,
) -> StepTime:
    """Estimate the time of one optimizer step, in which every row has ``--seq`` tokens.

    Args:
        config: the run.
        shape: fields of the model's ``config.json``.
        speed: the card's.
        capability: compute capability of the card, which decides the half-precision dtype.
        ranks: processes that share the micro-batches of a step.

    Raises:
        ConfigError: the model is of a family that the arithmetic does not know.
    """
    dims = Dimensions.of(shape)
    stored, compute, _ = element_bytes(config, capability)
    micro_batches = -(-config.train.accumulation // ranks)
    tokens = config.train.micro_batch * config.data.seq
    recomputed = layers_recomputed(config.train.checkpointing, dims.layers)
    share = recomputed / dims.layers
    products, attention = _operations(dims, config, tokens, share)
    peak = speed.single if compute == 4 else speed.half
    per_micro_batch = _bytes(dims, config, tokens, compute, stored, share)
    on_host = inputs_on_host(config.train.offload_activations, config.model.device, sharded=config.model.shard)
    moved = max(0, recomputed - 1) if on_host else 0  # the last one's input stays on the card
    device = (
        products / (PRODUCTS_SHARE * peak),
        attention / (ATTENTION_SHARE * peak),
        per_micro_batch / (MEMORY_SHARE * speed.bandwidth),
    )
    launches = LAUNCH_SECONDS * (_kernels(dims, config, tokens, compute, recomputed) + _MOVED * moved)
    # A layer that recomputes goes forward twice, and backward in about twice the time of that.
    forward = max(sum(device), launches) / (3 + share) / dims.layers
    copied = tokens * dims.hidden * compute / BUS_BYTES
    waits = moved * (max(0.0, copied - forward) + max(0.0, copied - 3 * forward))
    trained = trained_tensors(dims, config)
    return StepTime(
        products=micro_batches * device[0],
        attention=micro_batches * device[1],
        memory=micro_batches * device[2],
        bus=micro_batches * waits,
        launches=micro_batches * launches,
        update=_update_seconds(trained, config, speed),
        tokens=tokens * config.train.accumulation,
    )


def _operations(dims: Dimensions, config: RunConfig, tokens: int, share: float) -> tuple[float, float]:
    """Return the operations of products and of attention in one micro-batch. A product of N weights takes 2 N a token.

    A frozen weight takes part forward and in the gradient of its input; a trained one in its own gradient as well. A
    recomputed layer goes forward twice.
    """
    full = config.adapter.full
    base = sum(part.elements for part in dims.linears)
    base += sum(part.elements for part in dims.fused) * dims.experts_per_token // max(1, dims.experts)
    head = dims.vocabulary * dims.hidden
    passes = 2 + share + full
    products = 2 * tokens * (base * passes - _left_out(dims, config) * share + head * (2 + full))
    if not full:
        added = sum(part.count * (part.outputs + part.inputs) for part in targets(dims, config))
        products += 2 * tokens * config.adapter.rank * added * (3 + share)
    seen = min(config.data.seq, dims.window or config.data.seq)
    pairs = config.data.seq * seen - seen * seen / 2  # a token attends to itself and those before
    forward = 4 * config.train.micro_batch * pairs * dims.queries * dims.layers
    return products, forward * (1 + 2.5 + share)


def _bytes(dims: Dimensions, config: RunConfig, tokens: int, compute: int, stored: float, share: float) -> float:
    """Return the bytes that elementwise kernels and decoding read and write in one micro-batch."""
    fused = liger_gates(dims, config)
    norms = dims.norms * dims.hidden * (2 if fused else 8)
    added = 2 * 3 * dims.hidden
    turned = 2 * (dims.queries + dims.keys) * (1 if fused else 3)
    gates = dims.experts_per_token * dims.intermediate * (3 if fused else 5)
    adapters = 0.0
    if not config.adapter.full:
        apart = 1 if config.train.kernels != "torch" and not config.adapter.dropout else 3
        adapters = sum(p.count * (p.inputs + 2 * p.outputs) for p in targets(dims, config)) / dims.layers * apart
    forward = tokens * compute * dims.layers * (norms + added + turned + gates + adapters)
    decoded = 0.0
    if config.model.precision in QUANTIZED:
        weights = sum(part.elements for part in dims.stored_linears)
        decoded = (weights * (2 + share) - _left_out(dims, config) * share) * (stored + compute)
    # PyTorch's operators read or write each logit ten times in fp32, and cast it twice.
    passes = 3 * compute if runs_kernels(config) else 40 + (2 * (compute + 4) if compute < 4 else 0)
    return forward * (3 + share) + decoded + tokens * dims.vocabulary * passes


def _left_out(dims: Dimensions, config: RunConfig) -> int:
    """Return the weights of the products that a recomputed layer leaves out: its last one, if that runs fused."""
    if config.adapter.full or dims.experts or _runs_plain(config):
        return 0
    return sum(part.elements for part in targets(dims, config) if part.name == "down_proj")


def _runs_plain(config: RunConfig) -> bool:
    """Return whether adapters run as peft runs them."""
    return config.train.kernels == "torch" or config.adapter.dropout > 0 or config.adapter.dora


def _kernels(dims: Dimensions, config: RunConfig, tokens: int, compute: int, recomputed: int) -> float:
    """Return the kernels that one micro-batch launches."""
    experts = 1 + 3 * dims.experts / 8  # each expert has products of its own
    layers = (dims.layers * _BOTH_WAYS + recomputed * _AGAIN) * experts * (_UNFUSED if _runs_plain(config) else 1)
    return layers + (_FUSED_CHUNK if runs_kernels(config) else _CHUNK) * -(-tokens // loss_chunk(config, compute))


def _update_seconds(trained: list[int], config: RunConfig, speed: CardSpeed) -> float:
    """Return the time of the optimizer: it reads and writes weights, gradients and states."""
    moved = sum(trained) * (4 if config.train.optimizer.endswith("8bit") else 24)
    fused = config.train.optimizer == "paged-adamw" and config.train.kernels != "torch"
    launched = LAUNCH_SECONDS * (20 if fused else _PER_TENSOR * len(trained))
    return max(moved / (MEMORY_SHARE * speed.bandwidth), launched)
