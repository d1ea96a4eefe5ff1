"""Computes what a rank of ``--shard`` does not hold of a step's peak, because the other ranks hold it.

A rank gathers a layer while it runs, and the next one beside it, so that two layers are whole at the peak.
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
    """Return the bytes of an estimate that are on the cards of other ranks; 0 without ``--shard``.

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
    dims = Dimensions.of(shape)
    stored, compute, _ = element_bytes(config, capability)
    linear = sum(part.elements for part in dims.stored_linears)
    everywhere = (dims.parameters - linear) * (stored if config.adapter.full else compute)
    in_layers = sum(base_bytes(dims, config, stored, compute)) - everywhere
    spread = in_layers
    if config.adapter.full:
        updating = found.temporary if found.moment == "update" else 0
        spread = found.weights + found.gradients + found.optimizer + updating
        in_layers *= 2  # a gathered layer and the whole gradient of another one
    gathered = 0 if found.moment in ("loading", "update") else _GATHERED * in_layers / dims.layers
    return round(spread * (1 - 1 / ranks) - gathered)
