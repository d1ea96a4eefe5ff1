"""What a base is when it is loaded, and what an adapter starts from: a function of the seed, and of nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import bitsandbytes
import pytest
import torch
from tiny_models import save_tiny

from finetune.config.settings import AdapterConfig, ModelConfig
from finetune.model.load import attach_adapter, load_base

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def base_of(folder: Path, precision: str = "nf4") -> Any:
    return load_base(ModelConfig(model=str(folder), precision=precision, device="cpu"))  # type: ignore[arg-type]  # one of the Literal's values


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
def test_a_base_is_frozen_and_evaluating(folder: Path, precision: str) -> None:
    base = base_of(folder, precision)
    assert [name for name, p in base.named_parameters() if p.requires_grad] == []
    assert not base.training


def test_no_layer_repacks_its_weights_where_the_cpu_could(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes rounds the scales to bf16 on the way, on CPUs with AVX512_BF16, in the first evaluation."""
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    layers = [m for m in base_of(folder).modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 14
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


def started(folder: Path, seed: int, **changes: Any) -> dict[str, torch.Tensor]:
    adapter = AdapterConfig(rank=4, **changes)
    model: Any = attach_adapter(base_of(folder), adapter, seed=seed)
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def test_an_adapter_starts_from_its_seed_and_moves_no_generator(folder: Path) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = started(folder, 7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = started(folder, 7), started(folder, 8)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert [name for name in first if torch.equal(first[name], other[name])] == [n for n in first if "lora_B" in n]


@pytest.mark.parametrize(("rslora", "scale"), [(False, 32 / 4), (True, 32 / 4**0.5)])
def test_the_update_is_scaled_by_the_rank_or_its_root(folder: Path, rslora: bool, scale: float) -> None:
    model: Any = attach_adapter(base_of(folder), AdapterConfig(rank=4, alpha=32.0, rslora=rslora), seed=0)
    scales = [m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")]
    assert len(scales) == 14
    assert set(scales) == {scale}


def test_targets_are_all_linear_layers_or_those_named(folder: Path) -> None:
    def adapted(*targets: str) -> set[str]:
        return {name.split(".lora_")[0].rpartition(".")[2] for name in started(folder, 0, targets=targets)}

    every = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert adapted("all-linear") == every
    assert adapted("q_proj", "v_proj") == {"q_proj", "v_proj"}
