"""Every Triton kernel of a step compiles for real cards, spills no register, and reads and writes in wide pieces.

Nothing runs: Triton compiles for a card that is only named, what its callers ask for. The interpreter, under which the
other tests run the kernels, accepts more than the compiler does.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

triton = pytest.importorskip("triton")
KERNELS = ("finetune.kernels.nf4", "finetune.kernels.cross_entropy", "finetune.training.adamw_kernel")
CARDS = [(75, torch.float16), (90, torch.bfloat16)]
"""Capabilities, and what a step computes in there. The adapter is in fp32 where that is fp16."""


def test_no_kernel_is_forgotten() -> None:
    sources = [path for path in Path("finetune").rglob("*.py") if "@triton.jit" in path.read_text()]
    assert sorted(".".join(path.with_suffix("").parts) for path in sources) == sorted(KERNELS)


@pytest.fixture(params=CARDS, ids=lambda card: f"sm_{card[0]}")
def compiled(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[tuple[Callable[..., Any], torch.dtype]]:
    """Yield a function that returns what a caller compiles, and the dtype that the card's step computes in."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    capability, dtype = request.param
    if not (Path(triton.__file__).parent / "backends/nvidia/bin/ptxas").is_file():
        pytest.skip("this Triton brings no compiler for NVIDIA's cards")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name in KERNELS:  # another test may have imported them under the interpreter
        monkeypatch.delitem(sys.modules, name, raising=False)
    card = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 0,
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
    )
    found: list[Any] = []
    run = JITFunction.run

    def compile_only(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(run(kernel, *args, **kwargs | {"warmup": True}))
        return found[-1]

    monkeypatch.setattr(JITFunction, "run", compile_only)

    def compiled_by(name: str, call: Callable[[Any], object]) -> Any:
        call(importlib.import_module(name))
        (kernel,) = found
        return kernel

    # Triton 3.6 and later look there; to ask for the driver itself would raise without a card.
    monkeypatch.setattr(driver, "_active" if hasattr(driver, "_active") else "active", card)
    yield compiled_by, dtype
    for name in KERNELS:
        sys.modules.pop(name, None)


def require_lean(kernel: Any, tmp_path: Path, *wide: str) -> None:
    """Check that no register is spilled, and that the assembly has these instructions, the widest that a card has."""
    program = tmp_path / "kernel.cubin"
    program.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [str(tool), "--dump-resource-usage", str(program)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "STACK:0 " in usage, usage
    assert "LOCAL:0 " in usage, usage
    for instruction in wide:
        assert instruction in kernel.asm["ptx"], instruction


def test_decoding_a_weight(compiled: Any, tmp_path: Path) -> None:
    if not hasattr(triton.language, "gather"):
        pytest.skip("bitsandbytes decodes the weights with this Triton, which has no gather")
    functional = pytest.importorskip("bitsandbytes.functional")
    compiled_by, dtype = compiled
    weight = torch.randn(64, 128).to(dtype)
    packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    kernel = compiled_by(KERNELS[0], lambda module: module.decode(packed, state, dtype))
    require_lean(kernel, tmp_path, "st.global.v4")
    assert "ld.shared" in kernel.asm["ptx"]  # the codes


def test_the_loss(compiled: Any, tmp_path: Path) -> None:
    from finetune.model.loss import LogitRule

    compiled_by, dtype = compiled
    logits, targets = torch.zeros(4, 32000, dtype=dtype), torch.zeros(4, dtype=torch.int64)
    kernel = compiled_by(
        KERNELS[1],
        lambda module: module.losses_and_gradient(logits, targets, 1.0, LogitRule(), wants_gradient=True),
    )
    require_lean(kernel, tmp_path, "ld.global.v4", "st.global.v4")


def test_the_update(compiled: Any, tmp_path: Path) -> None:
    from finetune.training.adamw import Coefficients, Updated

    compiled_by, dtype = compiled
    weight = torch.zeros(16, 64, dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    moment = torch.zeros(16, 64)
    dropped = torch.zeros(16, 64, dtype=torch.int16) if dtype == torch.bfloat16 else None
    of = Updated(weight=weight, gradient=weight.clone(), first=moment, second=moment.clone(), dropped=dropped)
    numbers = Coefficients.of(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, step=1)
    kernel = compiled_by(KERNELS[2], lambda module: module.update_in_one_launch([of] * 3, numbers))
    require_lean(kernel, tmp_path, "ld.global.v4", "st.global.v4")
