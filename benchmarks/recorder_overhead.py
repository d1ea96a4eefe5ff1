"""What recording costs a training step on a dry GPU: with a budget alone, and with memory over time.

    python benchmarks/recorder_overhead.py            both steps
    python benchmarks/recorder_overhead.py small      24 layers of width 256: a step of operators and little else
    python benchmarks/recorder_overhead.py qlora      a QLoRA step of Mistral-7B, 2,048 tokens, checkpointed

The ways take turns, a step each, in one process, which looks at the model anew each time; a step is called from 40
frames deep, as by pytest, for the stack of every allocation is walked. The figures are medians of processor time, which
other programs on the machine disturb less than the time on the clock, and their ratio.
"""

from __future__ import annotations

import gc
import statistics
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any

from pytest_vram.drygpu import environment

if TYPE_CHECKING:
    from collections.abc import Callable

ROUNDS = {"small": 40, "qlora": 12}
FRAMES = 40
WAYS = ("plain", "budget", "timeline")


def small() -> Callable[[], None]:
    """A step of AdamW on a transformer whose operators are all small."""
    import torch
    from torch import nn

    layer = nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True)
    model = nn.TransformerEncoder(layer, 24, enable_nested_tensor=False).cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    rows = torch.empty(8, 128, 256, device="cuda")

    def step() -> None:
        model(rows).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def qlora() -> Callable[[], None]:
    """A step of paged AdamW on Mistral-7B in NF4 with adapters on every linear layer."""
    import bitsandbytes
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, MistralConfig

    from pytest_vram.drygpu import empty_checkpoint

    shape = MistralConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    with tempfile.TemporaryDirectory() as folder:
        empty_checkpoint(shape, folder)
        base: Any = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, device_map={"": 0})
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base.enable_input_require_grads()
    model: Any = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    optimizer = bitsandbytes.optim.PagedAdamW32bit([p for p in model.parameters() if p.requires_grad])
    ids = torch.zeros(1, 2048, dtype=torch.long)

    def step() -> None:
        batch = {"input_ids": ids.cuda(), "attention_mask": torch.ones_like(ids).cuda(), "labels": ids.cuda()}
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(name: str) -> None:
    """Take turns, and print the medians."""
    from pytest_vram.probe.cuda import CudaProbe

    step, probe = {"small": small, "qlora": qlora}[name](), CudaProbe()
    for _ in range(3):
        step()
    gc.collect()
    gc.freeze()
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    asked: list[float] = []
    for turn in range(ROUNDS[name]):
        for way in (*WAYS[turn % 3 :], *WAYS[: turn % 3]):
            if way != "plain":
                probe.begin_test(record=True, timeline=way == "timeline")
            began = time.process_time()
            _deep(step, FRAMES)
            times[way].append(time.process_time() - began)
            if way == "timeline":
                began = time.process_time()
                timeline = probe.timeline(0)
                assert timeline is not None
                asked.append(time.process_time() - began)
            if way != "plain":
                probe.end_test()
    medians = {way: statistics.median(found) for way, found in times.items()}
    print(
        f"{name}: a step takes {medians['plain'] * 1000:.1f} ms plain; recorded for a budget"
        f" {medians['budget'] * 1000:.1f} ms ({_more(times, 'budget')}), over time {medians['timeline'] * 1000:.1f} ms"
        f" ({_more(times, 'timeline')}); reading {timeline.events:,} events afterwards"
        f" {statistics.median(asked) * 1000:.0f} ms"
    )


def _deep(call: Callable[[], None], frames: int) -> None:
    if frames:
        _deep(call, frames - 1)
    else:
        call()


def _more(times: dict[str, list[float]], way: str) -> str:
    """The median of the ratios within a turn: what changes from turn to turn has no part in it."""
    ratios = [a / b for a, b in zip(times[way], times["plain"], strict=True)]
    return f"{(statistics.median(ratios) - 1) * 100:+.1f} %"


def main() -> None:
    """Each step in a process with a dry GPU of its own."""
    if sys.argv[1:2] == ["--here"]:
        measure(sys.argv[2])
        return
    for name in sys.argv[1:] or ("small", "qlora"):
        command = [sys.executable, __file__, "--here", name]
        subprocess.run(command, env=environment("rtx-4090"), check=True)


if __name__ == "__main__":
    main()
