"""Sparse tensors on a dry GPU: every layout and product, and how many elements their results have. Prints JSON."""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING

import torch

from pytest_vram.drygpu import driver
from pytest_vram.drygpu.values import host_reads

if TYPE_CHECKING:
    from collections.abc import Callable

warnings.simplefilter("ignore")


def dense(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, device="cuda")


# Of its four elements two lie at the same place, so three are left when they are added up.
INDICES = torch.tensor([[0, 1, 1, 5], [2, 0, 0, 3]])
COO = torch.sparse_coo_tensor(INDICES, torch.ones(4), (64, 48), device="cuda")
CSR = COO.coalesce().to_sparse_csr()
SQUARE = torch.sparse_coo_tensor(INDICES, torch.ones(4), (64, 64), device="cuda").coalesce().to_sparse_csr()
UNKNOWN = torch.sparse_coo_tensor((dense(2, 7) @ dense(7, 7)).sigmoid().mul(9).long(), dense(7), (64, 48))
BLOCKS = SQUARE.to_dense().to_sparse_bsr((16, 16))
TWO_IN_FOUR = torch.tensor([0, 0, 1, 1], dtype=torch.half, device="cuda").tile((128, 32))


def backward(make: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], matrix: torch.Tensor) -> None:
    make(matrix.detach().requires_grad_(), dense(48, 4).requires_grad_()).sum().backward()


def structured() -> None:
    from torch.sparse import SparseSemiStructuredTensorCUSPARSELT as Structured

    half = dense(128, 128, dtype=torch.half)
    torch.nn.functional.linear(half, Structured.from_dense(TWO_IN_FOUR))


def embedding() -> None:
    layer = torch.nn.Embedding(1000, 8, sparse=True).cuda()
    layer(torch.tensor([3, 3, 9], device="cuda")).sum().backward()
    torch.optim.SparseAdam(layer.parameters()).step()
    assert layer.weight.grad is not None
    assert layer.weight.grad.coalesce()._nnz() == 2


CALLS: dict[str, Callable[[], object]] = {
    "coo @ dense": lambda: COO @ dense(48, 4),
    "coo @ dense, backward": lambda: backward(torch.sparse.mm, COO),
    "coo @ vector": lambda: COO @ dense(48),
    "coo @ coo": lambda: torch.sparse.mm(COO.coalesce(), COO.t().coalesce()),
    "csr @ dense": lambda: CSR @ dense(48, 4),
    "csr @ dense, backward": lambda: backward(torch.sparse.mm, CSR),
    "csr @ dense in bf16": lambda: CSR.to(torch.bfloat16) @ dense(48, 4, dtype=torch.bfloat16),
    "csr @ dense in fp64": lambda: CSR.to(torch.float64) @ dense(48, 4, dtype=torch.float64),
    "csr @ vector": lambda: CSR @ dense(48),
    "dense @ csr": lambda: dense(4, 64) @ CSR,
    "csr + dense @ dense": lambda: torch.sparse.sampled_addmm(CSR, dense(64, 8), dense(8, 48)),
    "csr solve": lambda: torch.triangular_solve(dense(64, 4), SQUARE, upper=False),
    "csc @ dense": lambda: COO.coalesce().to_sparse_csc() @ dense(48, 4),
    "bsr @ vector": lambda: BLOCKS @ dense(64),
    "two in four": structured,
    "embedding": embedding,
}

failed: dict[str, str] = {}
for name, call in CALLS.items():
    try:
        call()
    except Exception as error:
        failed[name] = f"{type(error).__name__}: {error}"

product = SQUARE @ SQUARE
other = torch.sparse_csr_tensor(SQUARE.crow_indices().clone(), SQUARE.col_indices().clone(), dense(3), (64, 64))
earlier = host_reads.collect()
unknown = UNKNOWN.coalesce()
counts = {
    "coalesced": COO.coalesce()._nnz(),
    "coalesced, of unknown indices": unknown._nnz(),
    "indices": COO.coalesce().indices().tolist(),
    "rows": CSR.crow_indices()[:7].tolist(),
    "product": product._nnz(),
    "sum": (SQUARE + other)._nnz(),
}
reads = [[read.operation, read.note] for read in host_reads.since(earlier)]
print(
    json.dumps(
        {
            "failed": failed,
            "counts": counts,
            "reads": reads,
            "missing": driver.missing_functions(),
            "notes": driver.notes(),
        }
    )
)
