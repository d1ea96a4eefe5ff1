"""Replace operators whose libraries a dry GPU lacks: the decompositions of cuSOLVER and the transforms of cuFFT.

A substitute allocates the results that the operator's shape function describes. It does not allocate the library's
workspace, because only the library knows its size. Each call adds a note (see :mod:`pytest_vram.drygpu.notes`) with the
size of its largest tensor, from which the bounds of a figure follow.

Most decompositions of one matrix need no substitute: torch's own code runs, makes its copies, and asks the stub of
cuSOLVER (``native/solver.c``) for the workspace.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_flatten, tree_map

from pytest_vram import torch_private
from pytest_vram.drygpu import notes
from pytest_vram.drygpu.values import guesses, host_reads, kernels, known_values

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch._ops import OpOverload

OPERATORS = {
    "cuSOLVER": (
        "_linalg_svd",
        "linalg_qr",
        "_linalg_eigh",
        "linalg_eig",
        "linalg_eigvals",
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
        "_cholesky_solve_helper",
        "cholesky_inverse",
        "linalg_ldl_factor_ex",
        "linalg_ldl_solve",
        "geqrf",
        "ormqr",
    ),
    "cuFFT": ("_fft_r2c", "_fft_c2r", "_fft_c2c"),
}

OWN_CODE = frozenset(
    {
        *("_linalg_svd", "linalg_qr", "_linalg_eigh", "_linalg_det", "_linalg_slogdet", "linalg_lu", "linalg_lu_solve"),
        *(
            "linalg_cholesky_ex",
            "linalg_inv_ex",
            "linalg_lu_factor_ex",
            "_linalg_solve_ex",
            "linalg_householder_product",
        ),
        *("_cholesky_solve_helper", "geqrf", "ormqr"),
    }
)
"""For one matrix, torch's own code for these runs on the stub of cuSOLVER. A batch may use other libraries."""

NOT_COUNTED = "its workspace is not known and counted as 0 bytes"


def install(library: torch.library.Library) -> None:
    """Register the substitutes in ``library``, a fragment of the namespace ``aten``."""
    for owner, names in OPERATORS.items():
        for name in names:
            for overload in _with_cuda_kernel(name):
                substitute = _allocate(overload, f"{owner} ({name})")
                if name in OWN_CODE:
                    kernels.put_in_front(library, overload, partial(_own_code_for_one_matrix, overload, substitute))
                else:
                    kernels.replace(library, overload, substitute)
    kernels.replace(library, torch.ops.aten._linalg_check_errors.default, _find_no_error)


def _own_code_for_one_matrix(
    overload: OpOverload, substitute: Callable[..., Any], call: Callable[..., Any]
) -> Callable[..., Any]:
    """Return a kernel that runs torch's own code for one matrix, and ``substitute`` for a batch."""

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(value, torch.Tensor) and value.dim() > 2 for value in args):
            return substitute(*args, **kwargs)
        result = call(keyset, *args, **kwargs)
        _know_error_codes_only(overload, result)
        return result

    return kernel


def _know_error_codes_only(overload: OpOverload, result: Any) -> None:
    """Take a solver's error codes as 0, and forget its other results: torch copies the matrix into one of them."""
    results = result if isinstance(result, tuple) else (result,)
    for returned, part in zip(overload._schema.returns, results, strict=True):
        known_values.forget(part)
        if returned.name == "info":
            known_values.learn(part, guesses.SOLVED)


def _find_no_error(infos: torch.Tensor, api_name: str, *, is_matrix: bool) -> None:
    """Report no error for the error codes of a solver, with the allocation and the read of torch's own function."""
    del is_matrix
    # The answer is not used, so the read is no guess, and is not listed.
    with host_reads.reading(host_reads.Announced(operation=api_name, count=0, whole=True)):
        infos.any().item()


def _with_cuda_kernel(name: str) -> Iterator[OpOverload]:
    """Yield the operator's overloads that have a CUDA kernel, including those that write to ``out``."""
    packet = getattr(torch.ops.aten, name, None)
    for overload in packet.overloads() if packet is not None else ():
        label = f"{name}.{overload}".removesuffix(".default")
        if torch_private.has_kernel(f"aten::{label}", "CUDA"):
            yield getattr(packet, overload)


def _allocate(overload: OpOverload, label: str) -> Callable[..., Any]:
    packet = overload.overloadpacket
    written = [a.name for a in overload._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    shapes_of = _SHAPES.get(packet.__name__, packet.default)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        given = [kwargs.pop(name) for name in written]
        device = next(value.device for value in args if isinstance(value, torch.Tensor))
        shapes = shapes_of(*tree_map(_without_memory, args), **tree_map(_without_memory, kwargs))
        notes.assume(label, NOT_COUNTED, size=_largest((args, shapes)))
        if not given:
            result = tree_map(lambda shape: _result(shape, device), shapes)
            _know_error_codes_only(overload, result)
            return result
        for out, shape in zip(given, tree_flatten(shapes)[0], strict=True):
            _resize(out, shape)
        return given[0] if len(given) == 1 else tuple(given)

    return kernel


def _largest(tensors: Any) -> int:
    """Return the bytes of the largest tensor among arguments and results."""
    found = (value for value in tree_flatten(tensors)[0] if isinstance(value, torch.Tensor))
    return max(tensor.numel() * tensor.element_size() for tensor in found)


def _without_memory(value: Any) -> Any:
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def _result(shape: Any, device: torch.device) -> Any:
    if not isinstance(shape, torch.Tensor):
        return shape
    result = torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype, device=device)
    # Integer results are error codes or pivots; an error code of zero means "no error".
    return result if result.is_floating_point() or result.is_complex() else result.zero_()


def _resize(out: torch.Tensor, shape: torch.Tensor) -> None:
    """Resize an ``out`` tensor of the caller to a result's shape; an empty one also gets the result's strides."""
    if out.numel() == 0 and shape.numel():
        out.resize_(shape.untyped_storage().nbytes() // shape.element_size())
        out.as_strided_(shape.shape, shape.stride())
    elif out.shape != shape.shape:
        out.resize_(shape.shape)
    if not (out.is_floating_point() or out.is_complex()):
        out.zero_()


def _columns_first(matrix: torch.Tensor) -> torch.Tensor:
    """Return a new matrix of the same shape with contiguous columns, which LAPACK requires."""
    return torch.empty_like(matrix.mT, memory_format=torch.contiguous_format).mT


def _least_squares(
    a: torch.Tensor, b: torch.Tensor, rcond: float | None = None, *, driver: str | None = None
) -> tuple[torch.Tensor, ...]:
    """Return the results of linalg.lstsq with ``gels``, the only driver on CUDA: without rank and singular values.

    The solution is a view of a copy of the right-hand side, which has as many rows as the larger dimension of ``a``.
    """
    vector = b.dim() == 1 or (a.dim() - 1 == b.dim() and b.shape == a.shape[:-1])
    right = b.unsqueeze(-1) if vector else b
    rows, columns = a.shape[-2:]
    batch = torch.broadcast_shapes(a.shape[:-2], right.shape[:-2])
    whole = _columns_first(a.new_empty((*batch, max(rows, columns), right.shape[-1])))
    solution = whole.narrow(-2, 0, columns)
    residuals = a.new_empty((*batch, right.shape[-1]) if rows > columns else (0,), dtype=a.real.dtype)
    return (
        solution.squeeze(-1) if vector else solution,
        residuals,
        torch.empty(0, dtype=torch.int64, device=a.device),
        a.new_empty(0, dtype=a.real.dtype),
    )


def _householder(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the results of geqrf: the reflectors, in the shape of the matrix, and their factors."""
    return _columns_first(matrix), matrix.new_empty((*matrix.shape[:-2], min(matrix.shape[-2:])))


_SHAPES: dict[str, Callable[..., Any]] = {"linalg_lstsq": _least_squares, "geqrf": _householder}
"""Shape functions for operators that have none in torch 2.14."""
