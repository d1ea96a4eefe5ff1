"""Tiny quantized bases with an adapter, and the gradients that a window of rows leaves in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from tiny_models import make_rows, padded

from finetune.config.settings import AdapterConfig, ModelConfig, TrainConfig
from finetune.model.load import attach_adapter, load_base
from finetune.training.accumulate import window_gradients

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

ADAPTER = AdapterConfig(rank=4, alpha=8.0)
WINDOW = [padded(make_rows([12, 7], seed=1)), padded(make_rows([9, 15, 4], seed=2))]
PRECISIONS = ("fp32", "int8", "fp4", "nf4")


def base_of(folder: Path, precision: str = "nf4", **changes: Any) -> Any:
    """The saved model as a frozen base that computes in fp32."""
    return load_base(
        ModelConfig(model=str(folder), precision=precision, compute_dtype="fp32", device="cpu", **changes)  # type: ignore[arg-type]  # fields by name
    )


def adapted(folder: Path, precision: str = "nf4", adapter: AdapterConfig = ADAPTER, **changes: Any) -> Any:
    """The base with a fresh adapter."""
    return attach_adapter(base_of(folder, precision, **changes), adapter, seed=0)


def nonzero_adapter(model: Any, seed: int = 5) -> Any:
    """B starts at zero; with it drawn at random the adapter matters."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model


def gradients(model: Any, **changes: Any) -> dict[str, Tensor]:
    """The gradients that ``WINDOW`` leaves, by the parameter's name; a parameter without one is left out."""
    model.zero_grad(set_to_none=True)
    window_gradients(model, WINDOW, TrainConfig(**changes))
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
