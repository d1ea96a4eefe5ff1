"""What the dry GPU costs, and what it says, beside FakeTensorMode and MemTracker.

    python benchmarks/drygpu_speed.py

Prints: first compilation and start-up of the stubs; then one bf16 training step (AdamW) of a Llama of 1.1 billion
weights, both ways, on the same machine, in the same run; then a QLoRA step of Mistral-7B's shape, which a FakeTensor
cannot hold (bitsandbytes' Params4bit cannot be one). Every measurement is made in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time

LLAMA = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "use_cache": False,
}
STEP = """
import json, resource, sys, time
config, device, batch, length = json.loads(sys.argv[1]), sys.argv[2], 2, 1024
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.set_default_dtype(torch.bfloat16)

def train(model, optimizer, ids):
    start = time.perf_counter()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start

if device == "cuda":
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**config))
    model.to_empty(device="cuda")
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.ones(batch, length, dtype=torch.long).cuda()
    seconds = [train(model, optimizer, ids) for _ in range(3)]
    peak = torch.cuda.max_memory_allocated()
    extra = {"peak reserved": torch.cuda.max_memory_reserved()}
else:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker
    with FakeTensorMode():
        model = LlamaForCausalLM(LlamaConfig(**config))
        optimizer = torch.optim.AdamW(model.parameters())
        ids = torch.ones(batch, length, dtype=torch.long)
        tracker = MemTracker()
        tracker.track_external(model, optimizer, ids)
        with tracker:
            seconds = []
            for _ in range(3):
                seconds.append(train(model, optimizer, ids))
                tracker.reset_mod_stats()
        peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    extra = {}
host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "peak allocated": peak, **extra, "host memory": host}))
"""
QLORA = """
import json, resource, time
import bitsandbytes as bnb, torch
from peft import LoraConfig, get_peft_model
from transformers import MistralConfig, MistralForCausalLM

with torch.device("meta"):
    model = MistralForCausalLM(MistralConfig(use_cache=False, sliding_window=None)).to(torch.bfloat16)
for name, layer in list(model.named_modules()):
    if isinstance(layer, torch.nn.Linear) and name != "lm_head":
        new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16,
                                compress_statistics=True, quant_type="nf4", device="meta")
        weight = torch.empty(layer.out_features, layer.in_features, dtype=torch.bfloat16)
        new.weight = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4")
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new.cuda())
for module in model.modules():
    for name, value in list(module.named_parameters(recurse=False)):
        if value.is_meta:
            setattr(module, name, torch.nn.Parameter(torch.empty_like(value, device="cuda"), requires_grad=False))
    for name, value in list(module.named_buffers(recurse=False)):
        if value.is_meta:
            module.register_buffer(name, torch.empty_like(value, device="cuda"), persistent=False)
model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
model.enable_input_require_grads()
optimizer = bnb.optim.PagedAdamW32bit([p for p in model.parameters() if p.requires_grad])
ids, seconds = torch.ones(1, 2048, dtype=torch.long).cuda(), []
for _ in range(4):
    start = time.perf_counter()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    seconds.append(time.perf_counter() - start)
host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "peak allocated": torch.cuda.max_memory_allocated(),
                  "peak reserved": torch.cuda.max_memory_reserved(), "host memory": host}))
"""
START = """
import time
start = time.perf_counter()
from pytest_vram.drygpu import activate
imported = time.perf_counter()
activate("rtx-4090", replace_real_gpu=True)
print(f"import {1e3 * (imported - start):.0f} ms, activate {1e3 * (time.perf_counter() - imported):.0f} ms")
"""


def run(*arguments: str, env: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", *arguments], env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout.strip().splitlines()[-1]


def show(what: str, text: str) -> None:
    figures = json.loads(text)
    first, *later = figures.pop("seconds")
    sizes = ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in figures.items())
    print(f"{what:32} first step {first:.2f} s, then {min(later):.2f} s; {sizes}")


def main() -> None:
    from pytest_vram.drygpu import environment

    plain = dict(os.environ, OMP_NUM_THREADS="1")
    with tempfile.TemporaryDirectory() as cache:
        fresh = dict(plain, PYTEST_VRAM_CACHE=cache)
        start = time.perf_counter()
        run("from pytest_vram.drygpu.build import ensure_built; print(ensure_built())", env=fresh)
        print(f"first compilation                {time.perf_counter() - start:.1f} s")
        print(f"start from the cache             {run(START, env=fresh)}")
    dry = environment("rtx-4090", replace_real_gpu=True, base=plain)
    show("Llama 1.1B step, dry GPU", run(STEP, json.dumps(LLAMA), "cuda", env=dry))
    show("the same, FakeTensor+MemTracker", run(STEP, json.dumps(LLAMA), "cpu", env=plain))
    show("Mistral-7B QLoRA step, dry GPU", run(QLORA, env=dry))


if __name__ == "__main__":
    main()
