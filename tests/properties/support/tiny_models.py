"""Causal language models of a few thousand parameters, and rows to train them on."""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from finetune.data.batches import Batch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

IGNORED = -100
WORDS = 96
PAD = 0
Row = tuple[list[int], list[int]]
"""Token ids and labels of one row."""


def tiny_config(kind: str = "llama", *, hidden: int = 64, layers: int = 2, **changes: Any) -> Any:
    """A transformers config: every linear layer a multiple of 64 wide, so that 4-bit blocks end with its rows."""
    from transformers import LlamaConfig, MixtralConfig

    shared: dict[str, Any] = {
        "vocab_size": WORDS,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": PAD,
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
    }
    if kind == "mixtral":
        return MixtralConfig(**shared | {"num_local_experts": 4, "num_experts_per_tok": 2} | changes)
    return LlamaConfig(**shared | changes)


def tiny_model(kind: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A fresh model, its weights large enough that logits differ.

    In fp64 its norms are fp64 too. transformers takes them in fp32, where a difference in the last of fp64's digits may
    cross a border of rounding and come out a billion times as large.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(kind, **changes), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
    for module in model.modules() if dtype == torch.float64 else ():
        if hasattr(module, "variance_epsilon"):
            module.forward = partial(_norm, module)
    return model


def _norm(module: Any, x: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], module.weight, module.variance_epsilon)


def save_tiny(folder: Path, kind: str = "llama", **changes: Any) -> Path:
    """Write a model folder that ``load_base`` reads."""
    tiny_model(kind, **changes).save_pretrained(folder)
    return folder


def make_rows(lengths: Sequence[int], *, seed: int = 0, supervised: float = 0.7) -> list[Row]:
    """Random rows of the given lengths; each token is a target with the given probability."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        ids = torch.randint(1, WORDS, (length,), generator=generator)
        wanted = torch.rand(length, generator=generator) < supervised
        rows.append((ids.tolist(), torch.where(wanted, ids, IGNORED).tolist()))
    return rows


def targets_of(rows: Sequence[Row]) -> int:
    """Supervised targets after the shift: the first token of a row is never predicted."""
    return sum(label != IGNORED for _, labels in rows for label in labels[1:])


def padded(rows: Sequence[Row], *, side: str = "right", extra: int = 0) -> Batch:
    """Rows as one batch, padded to the longest, plus ``extra``."""
    width = max(len(ids) for ids, _ in rows) + extra
    input_ids = torch.full((len(rows), width), PAD)
    labels = torch.full((len(rows), width), IGNORED)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for index, (ids, wanted) in enumerate(rows):
        place = slice(0, len(ids)) if side == "right" else slice(width - len(ids), width)
        input_ids[index, place] = torch.tensor(ids)
        labels[index, place] = torch.tensor([IGNORED, *wanted[1:]])  # nothing of its row predicts a row's first token
        mask[index, place] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0) if side == "left" else None
    return Batch(input_ids=input_ids, labels=labels, attention_mask=mask, position_ids=positions)


def packed(rows: Sequence[Row]) -> Batch:
    """Rows one after the other in one sequence: positions start anew, and a row's first token is no target."""
    ids = [token for row, _ in rows for token in row]
    labels = [label for _, wanted in rows for label in [IGNORED, *wanted[1:]]]
    positions = [position for row, _ in rows for position in range(len(row))]
    tensors = [torch.tensor([values]) for values in (ids, labels, positions)]
    return Batch(input_ids=tensors[0], labels=tensors[1], attention_mask=None, position_ids=tensors[2])


def row_by_row_gradients(
    model: Any, rows: Sequence[Row], parameters: Sequence[torch.nn.Parameter]
) -> tuple[float, list[Tensor]]:
    """Loss and gradient of the whole window by the book: each row alone and unpadded, summed over tokens, divided by N.

    This is what any batching, padding, packing or splitting must reproduce.
    """
    total = targets_of(rows)
    summed = [torch.zeros_like(p) for p in parameters]
    loss_sum = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for ids, labels in rows:
            if not any(label != IGNORED for label in labels[1:]):
                continue
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
            precise = logits if logits.dtype == torch.float64 else logits.float()
            loss = torch.nn.functional.cross_entropy(
                precise, torch.tensor(labels[1:]), ignore_index=IGNORED, reduction="sum"
            )
            loss_sum += float(loss)
            grads = torch.autograd.grad(loss / total, list(parameters), allow_unused=True)
            for held, grad in zip(summed, grads, strict=True):
                if grad is not None:
                    held += grad
    return loss_sum / max(total, 1), summed


def relative_l2(measured: Sequence[Tensor | None], exact: Sequence[Tensor]) -> float:
    """|measured - exact| / |exact| over all tensors at once, in fp64."""
    filled = [torch.zeros_like(e) if m is None else m for m, e in zip(measured, exact, strict=True)]
    pairs = [(m.double(), e.double()) for m, e in zip(filled, exact, strict=True)]
    difference = sum(float(((m - e) ** 2).sum()) for m, e in pairs)
    norm = sum(float((e**2).sum()) for _, e in pairs)
    return (difference / norm) ** 0.5 if norm else difference**0.5
