"""One training step of GPT-2 at full size, and how many tokens a router gives each of its experts, on a dry GPU."""

from __future__ import annotations

import json

import torch
from transformers import GPT2Config, GPT2LMHeadModel

model = GPT2LMHeadModel(GPT2Config()).cuda()
optimizer = torch.optim.AdamW(model.parameters())
ids = torch.randint(0, 50257, (2, 512), device="cuda")
model(input_ids=ids, labels=ids).loss.backward()
optimizer.step()

chosen = torch.randn(64, 8, device="cuda").softmax(-1).topk(2).indices
print(json.dumps({"tokens": [int((chosen == expert).sum()) for expert in range(8)]}))
