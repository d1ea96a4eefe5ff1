"""Models of a few thousand weights, in the families' own architectures, and one training step."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

transformers.logging.set_verbosity_error()

SHAPE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def config(family: str = "Llama", **fields: Any) -> Any:
    return getattr(transformers, f"{family}Config")(**{**SHAPE, **fields})


def model(family: str = "Llama", dtype: torch.dtype = torch.bfloat16, **fields: Any) -> Any:
    more = {key: fields.pop(key) for key in ("attn_implementation", "experts_implementation") if key in fields}
    made = AutoModelForCausalLM.from_config(config(family, **fields), dtype=dtype, **more)
    return made.cuda().train()


def batch(rows: int = 2, tokens: int = 64, *, padded: bool = False) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 500, (rows, tokens))
    mask = torch.ones_like(ids)
    if padded:
        mask[-1, tokens // 2 :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids.cuda(), "attention_mask": mask.cuda(), "labels": labels.cuda()}


def train(made: Any, optimizer: Any = None, **shape: Any) -> None:
    made(**batch(**shape)).loss.backward()
    torch.nn.utils.clip_grad_norm_(made.parameters(), 1.0)
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
