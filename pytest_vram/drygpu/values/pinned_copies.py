"""Keep pinned copies of weights that are not there from taking host memory.

What a dry GPU has not computed is copied to the host as zeros, which take no memory until something writes them. FSDP
with ``CPUOffload`` then copies each part of a model into pinned memory, and so do other libraries that keep weights on
the host. Such a copy would fill memory with zeros, in each rank. So the pages that hold nothing else are given back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pytest_vram.drygpu import driver
from pytest_vram.drygpu.values import kernels
from pytest_vram.units import MIB

if TYPE_CHECKING:
    from collections.abc import Callable

SMALLEST = MIB
"""Smaller copies are left as they are: the values of so small a tensor may have been carried."""


def install(library: torch.library.Library) -> None:
    """Watch ``Tensor.pin_memory`` from now on; ``library`` is a fragment of the namespace ``aten``."""
    kernels.put_in_front(library, torch.ops.aten._pin_memory.default, _released, key="CPU")


def _released(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return the kernel that runs ``call``, which is torch's own, and gives zeros back before anybody has the copy."""

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        copy: torch.Tensor = call(keyset, *args, **kwargs)
        size = copy.untyped_storage().nbytes()
        if size >= SMALLEST:
            driver.release_zeros(copy.untyped_storage().data_ptr(), size)
        return copy

    return kernel
