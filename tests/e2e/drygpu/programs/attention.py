"""Which attention PyTorch picks on this card, and what it costs at two lengths."""

from __future__ import annotations

import json

import torch
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention

BACKENDS = {
    int(getattr(SDPBackend, name)): name
    for name in ("MATH", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION")
}
chosen, bytes_by_length = {}, {}
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    for masked in (False, True):
        q = torch.empty(1, 8, 512, 128, device="cuda", dtype=dtype, requires_grad=True)
        mask = torch.ones(1, 1, 512, 512, dtype=torch.bool, device="cuda") if masked else None
        choice = torch._fused_sdp_choice(q, q, q, attn_mask=mask, is_causal=not masked)
        chosen[f"{str(dtype).removeprefix('torch.')} {'masked' if masked else 'causal'}"] = BACKENDS[choice]
        scaled_dot_product_attention(q, q, q, attn_mask=mask, is_causal=not masked).sum().backward()
for length in (2048, 4096):
    q = torch.empty(1, 8, length, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
    bytes_by_length[length] = torch.cuda.max_memory_allocated() - held
    q.grad = None
print(json.dumps({"chosen": chosen, "growth": bytes_by_length[4096] / bytes_by_length[2048]}))
