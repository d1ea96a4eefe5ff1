"""A training step of each family: rows of one length, then padded ones; and what decides the path it takes."""

from __future__ import annotations

from typing import Any

import torch
from checks import Checks
from tiny import batch, model, train
from torch.nn.attention import SDPBackend, sdpa_kernel

from pytest_vram.drygpu.values import host_reads

check = Checks()
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {},
    "Mixtral": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Gemma2": {"head_dim": 16},
    "Gemma3Text": {"head_dim": 16},
    "Phi": {},
    "Phi3": {"pad_token_id": 0},
    "GPT2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
}


def _step(family: str, fields: dict[str, Any]) -> Any:
    host_reads.reset()
    made = model(family, **fields)
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-4)
    for padded in (False, True):
        train(made, optimizer, padded=padded)
    gradients = sum(p.numel() for p in made.parameters() if p in optimizer.state)
    unanswered = [read.location for read in host_reads.collect() if not read.answered]
    return {"trained": gradients == sum(p.numel() for p in made.parameters()), "unanswered": unanswered}


for _family, _fields in FAMILIES.items():
    _check = lambda family=_family, fields=_fields: _step(family, fields)  # noqa: E731 - a function a line, with its own defaults
    _check.__name__ = _family
    check(_check)


@check
def mixtral_experts_one_by_one() -> Any:
    """The eager experts ask which of them are hit, and by which tokens."""
    made = model("Mixtral", experts_implementation="eager")
    host_reads.reset()
    train(made)
    return sorted({(read.answered, read.note.split(";")[0]) for read in host_reads.collect()})


def _attention_peak(mask: torch.Tensor | None, dtype: torch.dtype = torch.bfloat16, heads: int = 4) -> int:
    """Bytes that attention takes beyond its output: quadratic in the tokens for the math path, small for flash."""
    q = torch.randn(1, heads, 1024, 64, device="cuda", dtype=dtype)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask, is_causal=mask is None)
    return torch.cuda.max_memory_allocated() - before


@check
def full_mask_keeps_flash() -> Any:
    """A mask of ones takes no more memory than no mask at all; a padded one is built in four dimensions."""
    made = model()
    peaks = {}
    for name, kept in (("none", None), ("ones", False), ("padded", True)):
        inputs = batch(2, 256, padded=bool(kept))
        if kept is None:
            del inputs["attention_mask"]
        made(**inputs).loss.backward()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        made(**inputs).loss.backward()
        peaks[name] = torch.cuda.max_memory_allocated() - before
    return peaks


@check
def packed_positions_are_found() -> Any:
    """Two samples in a row: transformers must see it in the positions, and mask one from the other."""
    made = model()
    ids = torch.randint(1, 500, (1, 64)).cuda()
    positions = {"one": torch.arange(64)[None], "two": torch.arange(32).repeat(2)[None]}
    peaks = {}
    for name, position in positions.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        made(input_ids=ids, position_ids=position.cuda(), labels=ids, use_cache=False).loss.backward()
        made.zero_grad()
        peaks[name] = torch.cuda.max_memory_allocated() - before
    return peaks


@check
def attention_backends() -> Any:
    causal, masked = (
        _attention_peak(None),
        _attention_peak(torch.ones(1, 1, 1024, 1024, dtype=torch.bool, device="cuda")),
    )
    return {"causal": causal, "masked": masked, "fp32": _attention_peak(None, torch.float32)}


@check
def chosen_backends() -> Any:
    q = torch.randn(1, 4, 128, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    worked = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH):
        with sdpa_kernel(backend):
            torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
        worked.append(backend.name)
    return worked


@check
def generation() -> Any:
    made = model().eval()
    prompt = torch.ones(2, 8, dtype=torch.long, device="cuda")
    kinds: tuple[dict[str, Any], ...] = ({"do_sample": False}, {"do_sample": True, "top_k": 5, "top_p": 0.9})
    return [list(made.generate(prompt, max_new_tokens=5, **kind).shape) for kind in kinds]


check.run()
