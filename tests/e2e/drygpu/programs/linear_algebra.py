"""Every function of torch.linalg and torch.fft, on one device, with ``out=`` and backward where there is such a form.

Prints as JSON: what failed and why, and the functions of both namespaces that nothing here calls.
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

warnings.simplefilter("ignore")
DEVICE = sys.argv[1] if len(sys.argv) > 1 else "cuda"
linalg, fft = torch.linalg, torch.fft
called: set[str] = set()
failed: dict[str, str] = {}


def make(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, device=DEVICE)


def attempt(name: str, call: Callable[[], Any]) -> None:
    try:
        call()
    except Exception as error:
        failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"


def run(name: str, *args: Any, **kwargs: Any) -> None:
    """Call a function by its dotted name, as is, with results to write to, and backward."""
    owner, _, short = name.rpartition(".")
    function = getattr({"linalg": linalg, "fft": fft, "": torch}[owner], short, None)
    if function is None:
        return  # not in this torch
    called.add(name)
    kept: list[Any] = []
    attempt(name, lambda: kept.append(function(*args, **kwargs)))
    if not kept:
        return
    results = kept[0] if isinstance(kept[0], tuple) else (kept[0],)
    if name not in NO_OUT:
        empty = [torch.empty(0, dtype=r.dtype, device=DEVICE) for r in results]
        attempt(f"{name}(out=)", lambda: function(*args, **kwargs, out=empty[0] if len(empty) == 1 else tuple(empty)))
        for mine, theirs in zip(empty, results, strict=True):
            if mine.shape != theirs.shape:
                failed[f"{name}(out=)"] = f"{tuple(mine.shape)} in place of {tuple(theirs.shape)}"
    if name not in NO_BACKWARD:
        attempt(f"{name} backward", lambda: backward(function, args, kwargs))


def backward(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    def leaf(value: Any) -> Any:
        floating = isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())
        return value.detach().clone().requires_grad_() if floating else value

    results = function(*(leaf(value) for value in args), **kwargs)
    total = sum(r.abs().sum() for r in (results if isinstance(results, tuple) else (results,)) if r.requires_grad)
    total.backward()


NO_OUT = {
    *("linalg.matrix_exp", "linalg.diagonal", "linalg.vander"),
    *("fft.fftshift", "fft.ifftshift", "pca_lowrank", "svd_lowrank", "stft", "istft", "logdet", "cdist"),
    *("linalg.norm", "linalg.matrix_rank", "linalg.ldl_factor", "linalg.lu_factor", "linalg.polar"),
    *("linalg.matrix_sqrth", "cov", "corrcoef", "triangular_solve", "det", "pinverse", "slogdet"),
}
NO_BACKWARD = {
    *("linalg.matrix_rank", "linalg.ldl_factor", "linalg.ldl_factor_ex", "linalg.ldl_solve", "geqrf", "lu_unpack"),
    *("fft.fftfreq", "fft.rfftfreq", "pca_lowrank", "svd_lowrank", "linalg.multi_dot", "linalg.cond", "linalg.qr"),
}

square, tall, wide, right = make(8, 8), make(8, 4), make(4, 8), make(8, 3)
many, vector, cube = make(2, 8, 8), make(8), make(2, 4, 8)
for matrix in (square, many, make(8, 8, dtype=torch.float64), make(8, 8, dtype=torch.complex64)):
    for name in ("cholesky", "cholesky_ex", "cond", "det", "eig", "eigh", "eigvals", "eigvalsh", "inv", "inv_ex", "lu"):
        run(f"linalg.{name}", matrix)
    for name in ("lu_factor", "lu_factor_ex", "ldl_factor", "ldl_factor_ex", "matrix_exp", "matrix_norm", "diagonal"):
        run(f"linalg.{name}", matrix)
    for name in ("qr", "slogdet", "svd", "svdvals", "pinv", "matrix_rank", "matrix_sqrth", "polar"):
        run(f"linalg.{name}", matrix)
    run("linalg.solve", matrix, matrix)
    run("linalg.solve_ex", matrix, matrix)
for matrix, columns in ((tall, right), (wide, make(4, 3)), (make(2, 8, 4), make(2, 8, 3)), (make(2, 8, 4), make(2, 8))):
    run("linalg.lstsq", matrix, columns)
    run("linalg.lstsq", matrix, columns, driver="gels")
for name in ("qr", "svd", "svdvals", "pinv", "matrix_rank"):
    run(f"linalg.{name}", tall)
    run(f"linalg.{name}", wide)
for mode in ("reduced", "complete", "r"):
    run("linalg.qr", tall if mode == "complete" else wide, mode)
for driver in ("gesvd", "gesvdj", "gesvda"):
    run("linalg.svd", tall, full_matrices=False, driver=driver)
for kind in ("nuc", 2, -2, "fro"):
    run("linalg.matrix_norm", square, kind)
    run("linalg.norm", square, kind)
    run("linalg.cond", square, kind)
run("linalg.lu", square, pivot=False)
run("linalg.lu_factor", square, pivot=False)
run("linalg.lu_solve", square, make(8, dtype=torch.int32), right)
run("linalg.ldl_solve", square, make(8, dtype=torch.int32), right)
run("linalg.solve", square, make(3, 8), left=False)
run("linalg.solve_triangular", square, right, upper=True)
run("linalg.householder_product", tall, make(4))
run("linalg.matrix_power", square, 3)
run("linalg.matrix_power", square, -2)
run("linalg.matmul", square, square)
run("linalg.multi_dot", [square, square, square])
run("linalg.tensorinv", make(2, 4, 8), 2)
run("linalg.tensorsolve", make(2, 4, 8), make(2, 4))
run("linalg.cross", make(4, 3), make(4, 3))
run("linalg.vecdot", square, square)
run("linalg.vector_norm", vector)
run("linalg.vander", vector)
for name in ("cholesky_inverse", "logdet", "det", "slogdet", "pinverse", "geqrf", "svd", "cov", "corrcoef", "inverse"):
    run(name, square)
run("cholesky_solve", right, square)
run("triangular_solve", right, square)
run("orgqr", tall, make(4))
run("ormqr", tall, make(4), right)
run("ormqr", tall, make(4), make(3, 8), left=False, transpose=True)
run("lu_solve", right, square, make(8, dtype=torch.int32))
run("lu_unpack", square, make(8, dtype=torch.int32))
run("pca_lowrank", tall, q=2)
run("svd_lowrank", tall, q=2)
run("cdist", tall, tall)

for real, whole in (
    (torch.float32, torch.complex64),
    (torch.float64, torch.complex128),
    (torch.float16, torch.complex32),
):
    for name in ("rfft", "rfft2", "rfftn", "ihfft", "ihfft2", "ihfftn"):
        run(f"fft.{name}", make(8, 16, dtype=real))
    for name in (
        "fft",
        "fft2",
        "fftn",
        "ifft",
        "ifft2",
        "ifftn",
        "irfft",
        "irfft2",
        "irfftn",
        "hfft",
        "hfft2",
        "hfftn",
    ):
        run(f"fft.{name}", make(8, 16, dtype=whole), norm="ortho")
run("fft.fftfreq", 8, device=DEVICE)
run("fft.rfftfreq", 8, device=DEVICE)
run("fft.fftshift", square)
run("fft.ifftshift", square)
window = make(16)
run("stft", make(128), 16, window=window, return_complex=True)
run("istft", make(9, 33, dtype=torch.complex64), 16, window=window)

# These have no shape function in torch: ours must say what the CPU says, strides included.
for name, operands in (
    ("linalg.lstsq", (tall, right)),
    ("linalg.lstsq", (wide, make(4, 3))),
    ("linalg.lstsq", (make(2, 8, 4), make(2, 8))),
    ("linalg.lstsq", (make(2, 8, 4), make(2, 8, 3))),
    ("geqrf", (tall,)),
    ("geqrf", (make(2, 4, 8),)),
):
    function = getattr(linalg if name.startswith("linalg") else torch, name.rpartition(".")[2])
    options = {"driver": "gels"} if "lstsq" in name else {}
    for mine, theirs in zip(
        function(*operands, **options), function(*(o.cpu() for o in operands), **options), strict=True
    ):
        if (mine.shape, mine.stride(), mine.dtype) != (theirs.shape, theirs.stride(), theirs.dtype):
            failed[f"{name} as on the CPU"] = (
                f"{mine.shape} {mine.stride()} in place of {theirs.shape} {theirs.stride()}"
            )

ours = {"linalg": linalg, "fft": fft}
public = {
    f"{owner}.{name}"
    for owner, module in ours.items()
    for name in dir(module)
    if not name.startswith("_") and type(getattr(module, name)).__name__ == "builtin_function_or_method"
}
print(json.dumps({"failed": failed, "not called": sorted(public - called), "called": len(called)}))
