"""Operators whose libraries a dry GPU has not got: cuSOLVER's decompositions and cuFFT's transforms.

Their results are allocated as the operator's own shape function says; the library's workspace is not, for only the
library knows its size. What was left out so is listed in the report.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch._ops import OpOverload

OPERATORS = {
    "cuSOLVER": (
        "_linalg_svd",
        "linalg_qr",
        "_linalg_eigh",
        "linalg_eig",
        "_linalg_eigvals",
        "_linalg_det",
        "_linalg_slogdet",
        "linalg_lu",
        "linalg_lu_solve",
        "linalg_lstsq",
        "linalg_cholesky_ex",
        "linalg_inv_ex",
        "linalg_lu_factor_ex",
        "_linalg_solve_ex",
        "linalg_householder_product",
        "cholesky_solve",
        "cholesky_inverse",
        "linalg_ldl_factor_ex",
    ),
    "cuFFT": ("_fft_r2c", "_fft_c2r", "_fft_c2c"),
}

_left_out: dict[str, None] = {}


def install(library: torch.library.Library) -> None:
    """Register the substitutes in ``library``, a fragment of the namespace ``aten``."""
    for owner, names in OPERATORS.items():
        for name in names:
            if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "CUDA"):
                overload = getattr(torch.ops.aten, name).default
                library.impl(name, _allocate(overload, f"{owner} ({name})"), "CUDA", allow_override=True)


def left_out() -> tuple[str, ...]:
    """Library and operator of each workspace that was not counted, in the order of the first call."""
    return tuple(_left_out)


def _allocate(overload: OpOverload, label: str) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        _left_out[label] = None
        device = next(value.device for value in args if isinstance(value, torch.Tensor))
        shapes = overload(*tree_map(_without_memory, args), **tree_map(_without_memory, kwargs))
        return tree_map(lambda shape: _result(shape, device), shapes)

    return kernel


def _without_memory(value: Any) -> Any:
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def _result(shape: Any, device: torch.device) -> Any:
    if not isinstance(shape, torch.Tensor):
        return shape
    result = torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype, device=device)
    # An error code, or pivots: zero is "no error".
    return result if result.is_floating_point() or result.is_complex() else result.zero_()
