"""Functions known by name only: each reports its own library's "not supported", and never success."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_vram.drygpu.stub.fallback import not_supported_status, write_fallbacks


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("cudaMalloc3DArray", 801),
        ("__cudaRegisterSurface", 801),
        ("cuArrayCreate_v2", 801),
        ("cublasSgelsBatched", 15),
        ("cublasLtMatmulDescGetAttribute", 15),
        ("cudnnRNNForward", 3000),
        ("cusparseSpMM", 10),
        ("cusolverDnXgeqrf", 9),
        ("cufftExecC2C", 16),
        ("ncclAllReduce", 5),
        ("pncclAllReduce", 5),
        ("cuFileRead", 5001),
    ],
)
def test_the_status_is_the_librarys_own(name: str, status: int) -> None:
    assert not_supported_status(name) == status


def test_other_names_are_refused() -> None:
    with pytest.raises(ValueError, match="printf belongs to no CUDA library"):
        not_supported_status("printf")


def test_each_function_is_written_once_and_texts_stay_texts(tmp_path: Path) -> None:
    target = tmp_path / "fallbacks.c"
    write_fallbacks(target, {"cusparseGetErrorString", "cusparseSpMM", "cudaArrayGetInfo"}, header=Path("dry.h"))
    lines = target.read_text().splitlines()
    assert 'int cusparseSpMM(void) { return dry_not_implemented("cusparseSpMM", 10); }' in lines
    assert any(line.startswith("const char *cusparseGetErrorString(void)") for line in lines)
    assert sum("cudaArrayGetInfo(void)" in line for line in lines) == 1
