"""Find how many elements a sparse tensor has once those with the same indices are added up.

``Tensor.coalesce`` counts the indices on the device. Where the indices are known, they are counted here. Where they are
not, they are taken as all distinct, which gives the largest possible result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pytest_vram.drygpu.values import guesses, host_reads, kernels, known_values

if TYPE_CHECKING:
    from collections.abc import Callable


def install(library: torch.library.Library) -> None:
    """Put the kernel in front of torch's own; ``library`` is a fragment of the namespace ``aten``."""
    kernels.put_in_front(library, torch.ops.aten._coalesce.default, _counting, key="SparseCUDA")


def _counting(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return the kernel that runs ``call``, which is torch's own, with the count that it reads from the device."""

    def kernel(keyset: Any, tensor: torch.Tensor) -> torch.Tensor:
        indices = tensor._indices()
        known, guess = known_values.vouch((indices,))
        distinct = torch.unique(known_values.on_cpu(indices), dim=1) if known and indices.numel() else None
        count, guess = (tensor._nnz(), guesses.ALL_DISTINCT) if distinct is None else (distinct.shape[1], guess)
        with host_reads.reading(host_reads.Announced(operation="coalesce", count=count, whole=True)):
            result: torch.Tensor = call(keyset, tensor)
        host_reads.note("coalesce", answered=True, remark=guess)
        summed = result._indices()
        if distinct is not None and known_values.is_carried(summed) and summed.shape == distinct.shape:
            known_values.on_cpu(summed).copy_(distinct)
            known_values.learn(summed, guess)
        return result

    return kernel
