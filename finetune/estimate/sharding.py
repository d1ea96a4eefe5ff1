"""Computes how much of a step's peak a rank of ``--shard`` does not hold: other cards or the host hold it.

A rank gathers a layer while it runs, and the next one beside it, so that two layers are whole at the peak. With
``--offload-base`` its own parts of the base are on the host. The copy of such a part on the card, from which a layer is
gathered, is not counted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.estimate.arithmetic import base_bytes, element_bytes
from finetune.estimate.dimensions import Dimensions

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from finetune.config.settings import RunConfig
    from finetune.estimate.arithmetic import Estimate

_GATHERED = 2
"""Layers that are whole on a card at the same time."""


def bytes_elsewhere(
    found: Estimate,
    config: RunConfig,
    shape: Mapping[str, Any],
    *,
    ranks: int,
    capability: tuple[int, int] = (8, 9),
) -> int:
    """Return the bytes of an estimate that are on the cards of other ranks or on the host; 0 without ``--shard``.

    Over a quantized base, embeddings, head and adapter are whole on every card, and the rest of the base is spread.
    With ``--full`` all weights, their gradients and the optimizer's states are spread.

    Args:
        found: the estimate for one card.
        config: the run that it is an estimate of.
        shape: fields of the model's ``config.json``.
        ranks: number of ranks.
        capability: compute capability of the card.
    """
    if not config.model.shard or ranks == 1:
        return 0
    in_layers = _in_layers(config, shape, capability)
    spread = in_layers
    kept = 0 if config.model.offload_base else 1 / ranks
    if config.adapter.full:
        updating = found.temporary if found.moment == "update" else 0
        spread = found.weights + found.gradients + found.optimizer + updating
        in_layers *= 2  # a gathered layer and the whole gradient of another one
    gathered = 0 if found.moment in ("loading", "update") else _GATHERED * in_layers / Dimensions.of(shape).layers
    return round(spread * (1 - kept) - gathered)


def bytes_on_host(
    config: RunConfig, shape: Mapping[str, Any], *, ranks: int, capability: tuple[int, int] = (8, 9)
) -> int:
    """Return the bytes of the base that each rank keeps in host memory; 0 without ``--offload-base``.

    Args:
        config: the run.
        shape: fields of the model's ``config.json``.
        ranks: number of ranks.
        capability: compute capability of the card.

    Raises:
        ConfigError: the arithmetic does not know the model.
    """
    return round(_in_layers(config, shape, capability) / ranks) if config.model.offload_base else 0


def _in_layers(config: RunConfig, shape: Mapping[str, Any], capability: tuple[int, int]) -> float:
    """Return the bytes of the frozen weights that are in layers, and so not whole on every card."""
    dims = Dimensions.of(shape)
    stored, compute, _ = element_bytes(config, capability)
    linear = sum(part.elements for part in dims.stored_linears)
    everywhere = (dims.parameters - linear) * (stored if config.adapter.full else compute)
    return sum(base_bytes(dims, config, stored, compute)) - everywhere
