"""What only a real card can show; skipped, saying so, where there is none, or rehearsed: see conftest.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MB = 2**20


@pytest.fixture
def report(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run a test file on the card, and return its JSON report's tests by name."""

    def run(source: str, *arguments: str) -> dict[str, Any]:
        (tmp_path / "test_it.py").write_text("import pytest, torch\n" + source)
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--vram-output=r.json", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=dict(os.environ))
        assert (tmp_path / "r.json").exists(), done.stdout + done.stderr
        data = json.loads((tmp_path / "r.json").read_text())
        return {test["nodeid"].partition("::")[2]: test for test in data["tests"]}

    return run


def test_values_are_computed_and_the_figure_is_the_allocators(report) -> None:
    """A sum of whole numbers of 64 bits makes no copy of them: narrower ones are cast first."""
    tests = report("""
@pytest.mark.vram(max_mb=33)
def test_sum(gpu):
    total = torch.ones(4 << 20, dtype=torch.int64, device=gpu.device).sum()
    assert gpu.computes == (gpu.kind == "cuda")
    assert not gpu.computes or total.item() == 4 << 20
""")
    assert tests["test_sum"]["outcome"] == "passed"
    assert 32 * MB < tests["test_sum"]["measurements"][0]["peak"]["allocated_bytes"] <= 33 * MB


def test_device_bytes_hold_the_context_and_what_is_reserved(report) -> None:
    pytest.importorskip("pynvml")
    tests = report("""
def test_held(vram):
    torch.empty(100 << 20, dtype=torch.uint8, device="cuda")
""")
    peak = tests["test_held"]["measurements"][0]["peak"]
    if peak.get("device_bytes") is None:
        pytest.skip("NVML does not tell processes apart here, as in most containers")
    assert peak["device_bytes"] > peak["reserved_bytes"]


def test_the_capped_allocator_raises_on_the_line_and_works_again_afterwards(report) -> None:
    tests = report("""
@pytest.mark.vram(max_mb=100, enforce=True)
@pytest.mark.xfail(raises=torch.cuda.OutOfMemoryError, strict=True)
def test_capped():
    torch.empty(200 << 20, dtype=torch.uint8, device="cuda")

def test_lifted():
    torch.empty(200 << 20, dtype=torch.uint8, device="cuda")
""")
    assert tests["test_lifted"]["outcome"] == "passed"


@pytest.mark.real_card
def test_a_dry_gpu_does_not_take_the_cards_place(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_it(gpu): assert gpu.kind == 'cuda'\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    assert subprocess.run(command, cwd=tmp_path, check=False).returncode == 0


@pytest.mark.vram_values
def test_gradients_that_waited_in_host_memory_are_the_same_bits() -> None:
    """The copies are in order with the card's other work, without a wait in between."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")
    from finetune.training import host_gradients

    parameters = [torch.nn.Parameter(torch.zeros(1024, 1024, device="cuda", dtype=torch.bfloat16)) for _ in range(64)]
    drawn = [[torch.randn_like(p) for p in parameters] for _ in range(3)]
    earlier: dict[Any, Any] = {}
    for number, gradients in enumerate(drawn):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        if number < 2:
            host_gradients.put_away(parameters, earlier)
    host_gradients.bring_back(earlier)
    for parameter, one, two, three in zip(parameters, *drawn, strict=True):
        assert torch.equal(parameter.grad, (one + two) + three)


@pytest.mark.vram_values
def test_inputs_that_waited_in_host_memory_are_the_same_bits() -> None:
    """Copies on a stream of their own, ordered by events alone, over micro-batches of several lengths."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    from finetune.config.settings import TrainConfig
    from finetune.data.batches import Batch
    from finetune.training.accumulate import window_gradients

    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8, "vocab_size": 1024}
    shape = transformers.LlamaConfig(num_hidden_layers=8, attn_implementation="eager", **sizes)
    model = transformers.LlamaForCausalLM(shape).to("cuda", torch.bfloat16)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    window = []
    for length in (512, 64, 256, 512):
        ids = torch.randint(1024, (2, length), generator=torch.Generator().manual_seed(length))
        window.append(Batch(input_ids=ids, labels=ids.clone()))
    results = []
    for on_host in (False, True, True):
        model.zero_grad(set_to_none=True)
        window_gradients(model, window, TrainConfig(checkpointing="all", offload_activations=on_host))
        results.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(results[0]) == 8 * 7 * 2
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.vram_values
@pytest.mark.parametrize(("dtype", "masters"), [("bfloat16", True), ("bfloat16", False), ("float32", False)])
def test_the_optimizers_kernel_comes_to_the_bits_of_its_readable_form(dtype: str, masters: bool) -> None:
    """States in managed memory, read and written where they are, over three steps."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    pytest.importorskip("bitsandbytes")
    from finetune.config.settings import TrainConfig
    from finetune.training.optim import make_optimizer, optimizer_step

    frozen = torch.nn.Parameter(torch.zeros(1, device="cuda"), requires_grad=False)
    results = []
    for kernels in ("auto", "torch"):
        generator = torch.Generator("cuda").manual_seed(1)
        shapes = [(16, 4096), (14336, 16), (7,), (100_003,)]
        drawn = [torch.randn(shape, generator=generator, device="cuda").to(getattr(torch, dtype)) for shape in shapes]
        parameters = [torch.nn.Parameter(values) for values in drawn]
        config = TrainConfig(optimizer="paged-adamw", kernels=kernels, weight_decay=0.1)  # type: ignore[arg-type]  # one of the Literal's values
        optimizer = make_optimizer([*parameters, *([frozen] if masters else [])], config)
        for _ in range(3):
            for parameter in parameters:
                gradient = torch.randn(parameter.shape, generator=generator, device="cuda")
                parameter.grad = gradient.to(parameter.dtype)
            optimizer_step(optimizer)
        torch.cuda.synchronize()
        states = [optimizer.state[p] for p in parameters]
        tensors = [t.clone() for s in states for key, t in sorted(s.items()) if isinstance(t, torch.Tensor)]
        results.append([*(p.detach().clone() for p in parameters), *tensors])
    assert len(results[0]) == len(results[1]) == 4 * (4 if masters else 3)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_fused_layers_are_pefts_up_to_rounding() -> None:
    torch = pytest.importorskip("torch")
    bnb = pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    from finetune.kernels.fused_adapter import fuse

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("q_proj", "k_proj", "v_proj"):
                setattr(self, name, bnb.nn.Linear4bit(1024, 512, bias=False, compute_dtype=torch.bfloat16))

        def forward(self, x: Any) -> Any:
            return self.q_proj(x) * self.k_proj(x) + self.v_proj(x)

    results = []
    for fused in (False, True):
        torch.manual_seed(0)
        lora = peft.LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
        model = peft.get_peft_model(Block().cuda(), lora, autocast_adapter_dtype=False)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
        if fused:
            assert fuse(model).fused == 3
        x = torch.randn(4, 300, 1024, device="cuda", dtype=torch.bfloat16).requires_grad_()
        model(x).float().square().mean().backward()
        results.append([x.grad.float(), *(p.grad.float() for p in model.parameters() if p.grad is not None)])
    for plain, found in zip(*results, strict=True):
        assert float((plain - found).norm() / plain.norm()) < 2e-2


@pytest.mark.vram_values
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_nf4_decoded_in_one_launch_is_bitsandbytes_own(dtype: str, double_quant: bool) -> None:
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    pytest.importorskip("triton")
    from finetune.kernels.nf4 import can_decode, decode

    for shape in ((14336, 4096), (100, 328), (1, 64)):  # the second ends inside a block
        weight = torch.randn(shape, device="cuda").to(getattr(torch, dtype))
        packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=double_quant)
        assert can_decode(state)
        assert torch.equal(decode(packed, state, weight.dtype), functional.dequantize_4bit(packed, state))


@pytest.mark.vram_values
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("rule", [{}, {"scale": 0.5, "softcap": 30.0}, {"words": 32_000}], ids=str)
def test_the_loss_in_one_launch_is_that_of_the_operators(dtype: str, rule: dict[str, Any]) -> None:
    """At a size where a row takes several rounds, and its last one is not full."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    from finetune.kernels.cross_entropy import losses_and_gradient
    from finetune.model.loss import KERNEL, LogitRule, chunked_cross_entropy

    torch.manual_seed(0)
    head = torch.nn.Linear(256, 32_011, device="cuda", dtype=getattr(torch, dtype)).requires_grad_(False)
    hidden = torch.randn(300, 256, device="cuda").to(head.weight.dtype)
    targets = torch.randint(32_000, (300,), device="cuda")
    results = []
    for kernel in (None, losses_and_gradient):
        setattr(head, KERNEL, kernel)
        leaf = hidden.clone().requires_grad_()
        loss = chunked_cross_entropy(leaf, head, targets, unit=1 / 300, rule=LogitRule(**rule))
        loss.backward()
        results.append((float(loss), leaf.grad.float()))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    error = (results[1][1] - results[0][1]).norm() / results[0][1].norm()
    assert float(error) < {"bfloat16": 4e-3, "float16": 1e-3, "float32": 1e-5}[dtype]


@pytest.mark.vram_values
@pytest.mark.parametrize("window", [None, 40])
def test_packed_rows_are_what_they_are_alone(window: int | None) -> None:
    """In one kernel, over several sequences, with grouped keys, and with a window that rows are longer than."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from finetune.data.batches import Batch
    from finetune.kernels.packed_attention import keep_rows_apart
    from finetune.model.forward import hidden_states

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": window}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.MistralConfig(**sizes, **heads), dtype=torch.bfloat16
    ).cuda()
    assert "in one kernel" in keep_rows_apart(model)
    rows = [torch.randint(128, (length,)) for length in (50, 14, 40, 24)]
    found = []
    for lines in ([rows[:2], rows[2:]], *([[row]] for row in rows)):
        ids = torch.stack([torch.cat(line) for line in lines])
        positions = torch.stack([torch.cat([torch.arange(len(row)) for row in line]) for line in lines])
        states = hidden_states(model, Batch(input_ids=ids, labels=ids, position_ids=positions).to("cuda")).states
        model.zero_grad()
        states.float().square().sum().backward()
        found.append((states.flatten(0, 1).float(), model.get_input_embeddings().weight.grad.float()))
    (packed, grad), alone = found[0], found[1:]
    expected = torch.cat([states for states, _ in alone])
    assert float((packed - expected).norm() / expected.norm()) < 2e-2
    total = sum(each for _, each in alone)
    assert float((grad - total).norm() / total.norm()) < 5e-2
