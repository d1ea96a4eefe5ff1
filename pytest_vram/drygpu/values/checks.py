"""Let an operator's check of values pass where a dry GPU has not computed them: the zeros in their place would fail."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from pytest_vram import torch_private
from pytest_vram.drygpu.values import guesses, host_reads, kernels, known_values

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch._ops import OpOverload


def install(library: torch.library.Library) -> None:
    """Put a kernel in front of ``torch.normal``, which refuses negative standard deviations.

    ``library`` is a fragment of the namespace ``aten``.
    """
    for name in torch.ops.aten.normal.overloads():
        overload = getattr(torch.ops.aten.normal, name)
        deviations = next((a for a in overload._schema.arguments if a.name == "std"), None)
        if deviations is None or str(deviations.type) != "Tensor":
            continue
        if torch_private.has_kernel(kernels.label(overload), "CUDA"):
            kernels.put_in_front(library, overload, functools.partial(_passing, overload))


def _passing(overload: OpOverload, call: Callable[..., Any]) -> Callable[..., Any]:
    """Return the kernel that runs ``call``, which is torch's own, and answers its check unless the values are known."""
    position = next(i for i, a in enumerate(overload._schema.arguments) if a.name == "std")

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        deviations = args[position] if position < len(args) else kwargs["std"]
        if known_values.vouch((deviations,))[0]:
            return call(keyset, *args, **kwargs)
        with host_reads.reading(host_reads.Announced(operation="normal", count=1, whole=True)):
            result = call(keyset, *args, **kwargs)
        host_reads.note("normal", answered=True, remark=guesses.PASSED)
        return result

    return kernel
