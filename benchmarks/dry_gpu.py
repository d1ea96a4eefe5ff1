"""How fast the dry GPU is, and what it costs the host: the figures of docs/explanation/figures.md.

    python benchmarks/dry_gpu.py            all
    python benchmarks/dry_gpu.py step       a QLoRA step of Mistral-7B after the first, and the host's memory
    python benchmarks/dry_gpu.py start      what the stub adds to the start of a process
    python benchmarks/dry_gpu.py build      the first compilation, in an empty cache
    python benchmarks/dry_gpu.py tracker    against FakeTensorMode and torch's MemTracker, on the same plain model

Each part runs in a process of its own, on whatever else this machine is doing: a busy one is slower.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

from pytest_vram.drygpu import environment

SHAPE = """
from transformers import MistralConfig
SHAPE = MistralConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                      num_key_value_heads=8, vocab_size=32000, tie_word_embeddings=False, dtype="bfloat16")
"""

STEP = (
    SHAPE
    + """
import json, resource, sys, tempfile, time
import bitsandbytes, torch
from peft import LoraConfig, get_peft_model
from pytest_vram.drygpu import empty_checkpoint
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

with tempfile.TemporaryDirectory() as folder:
    empty_checkpoint(SHAPE, folder)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                      bnb_4bit_compute_dtype=torch.bfloat16)
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, device_map={"": 0})
    loading = time.perf_counter() - began
model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
model.enable_input_require_grads()
model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")).train()
optimizer = bitsandbytes.optim.PagedAdamW32bit([p for p in model.parameters() if p.requires_grad])
ids = torch.randint(0, 32000, (1, 2048))
steps = []
for _ in range(6):
    began = time.perf_counter()
    batch = {"input_ids": ids.cuda(), "attention_mask": torch.ones_like(ids).cuda(), "labels": ids.cuda()}
    model(**batch).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    steps.append(time.perf_counter() - began)
host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"load": loading, "first": steps[0], "steps": steps[1:], "host": host,
                  "allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}))
"""
)

PLAIN = (
    SHAPE
    + """
import json, resource, sys, time
import torch
from transformers import AutoModelForCausalLM

def build(device):
    with torch.device(device):
        return AutoModelForCausalLM.from_config(SHAPE, dtype=torch.bfloat16).train()

def train(model, device):
    ids = torch.zeros(1, 512, dtype=torch.long, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
"""
)

FAKE = (
    PLAIN
    + """
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
with FakeTensorMode():
    model = build("cpu")
    tracker = MemTracker()
    tracker.track_external(model)
    with tracker:
        train(model, "cpu")
    tracker.reset_mod_stats()
    began = time.perf_counter()
    with tracker:
        train(model, "cpu")
    step = time.perf_counter() - began
    peak = sum(snapshot["Total"] for snapshot in tracker.get_tracker_snapshot("peak").values())
print(json.dumps({"step": step, "peak": peak, "host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""
)

DRY = (
    PLAIN
    + """
model = build("cuda")
train(model, "cuda")
began = time.perf_counter()
train(model, "cuda")
step = time.perf_counter() - began
print(json.dumps({"step": step, "peak": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved(),
                  "host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""
)


def python(code, variables):
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def step():
    found = python(STEP, environment("rtx-4080"))
    print("Mistral-7B on an rtx-4080: NF4, LoRA r=16 all-linear, paged AdamW, checkpointed, 1 x 2048 tokens")
    print(f"  loading               {found['load']:.1f} s")
    print(f"  first step            {found['first']:.2f} s")
    print(f"  later steps (median)  {statistics.median(found['steps']):.2f} s")
    print(f"  host memory (peak)    {found['host'] / 2**30:.2f} GiB")
    print(f"  peak allocated        {found['allocated'] / 2**30:.2f} GiB, reserved {found['reserved'] / 2**30:.2f} GiB")


def start():
    code = "import json, time; began = time.perf_counter(); {}; print(json.dumps(time.perf_counter() - began))"
    activation = "import pytest_vram.drygpu as d; began = time.perf_counter(); d.activate('rtx-4080')"
    bare = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    took = statistics.median(python(code.format(activation), bare) for _ in range(7))
    preloaded, plain = (
        statistics.median(_seconds([sys.executable, "-S", "-c", "pass"], variables) for _ in range(9))
        for variables in (environment("rtx-4080"), bare)
    )
    print(f"activate() in a running process     {took * 1e3:.0f} ms")
    print(f"added to the start of a process     {(preloaded - plain) * 1e3:.0f} ms")


def build():
    with tempfile.TemporaryDirectory() as cache:
        code = (
            "import json, time; from pytest_vram.drygpu.stub.library import ensure_built; began = time.perf_counter();"
            "ensure_built(); print(json.dumps(time.perf_counter() - began))"
        )
        took = python(code, {**os.environ, "PYTEST_VRAM_CACHE": cache})
    print(f"first compilation                   {took:.1f} s")


def tracker():
    dry, fake = python(DRY, environment("a100-80")), python(FAKE, dict(os.environ))
    print("Mistral-7B, bfloat16, SGD, 1 x 512 tokens: a training step after the first")
    print(
        f"  dry GPU                     {dry['step']:.2f} s, {dry['peak'] / 2**30:.2f} GiB allocated,"
        f" {dry['reserved'] / 2**30:.2f} GiB reserved, host {dry['host'] / 2**30:.2f} GiB"
    )
    print(
        f"  FakeTensorMode, MemTracker  {fake['step']:.2f} s, {fake['peak'] / 2**30:.2f} GiB, no allocator,"
        f" host {fake['host'] / 2**30:.2f} GiB"
    )


def _seconds(command, variables):
    began = time.perf_counter()
    subprocess.run(command, env=variables, check=True)
    return time.perf_counter() - began


PARTS = {"step": step, "start": start, "build": build, "tracker": tracker}

if __name__ == "__main__":
    for name in sys.argv[1:] or PARTS:
        PARTS[name]()
