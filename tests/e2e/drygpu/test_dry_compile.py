"""torch.compile and Triton on a dry GPU: real kernels are made and launched, and fusion's saving shows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def test_compiled_code_runs_and_needs_less(run_program: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    answers = run_program(
        "compiled.py", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor"), TRITON_CACHE_DIR=str(tmp_path / "triton")
    )
    assert answers["triton launches"] == 1
    assert answers["missing"] == []
    assert answers["compiled"] < answers["eager"]
