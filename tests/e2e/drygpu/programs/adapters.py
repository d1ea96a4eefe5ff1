"""peft's adapters and bitsandbytes' weights and optimizers, each through a training step."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from checks import Checks
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from tiny import config, model, train
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from pytest_vram.drygpu import driver, empty_checkpoint

check = Checks()
FOLDER = Path(sys.argv[1])
empty_checkpoint(config(dtype="bfloat16"), FOLDER)


def _quantized(**how: Any) -> Any:
    quantization = BitsAndBytesConfig(**how)
    return AutoModelForCausalLM.from_pretrained(FOLDER, quantization_config=quantization, device_map={"": 0})


def _lora(base: Any, **how: Any) -> Any:
    base.enable_input_require_grads()
    return get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **how)).train()


def _trains(adapted: Any) -> Any:
    """Every lora_B has a gradient after a step, and no base weight has one."""
    train(adapted)
    have = [name for name, p in adapted.named_parameters() if p.grad is not None]
    wanted = [name for name, p in adapted.named_parameters() if p.requires_grad]
    return {"all": have == wanted and any("lora_B" in name for name in have), "peak": torch.cuda.max_memory_allocated()}


@check
def lora() -> Any:
    return _trains(_lora(model()))


@check
def dora() -> Any:
    return _trains(_lora(model(), use_dora=True))


@check
def rslora_with_dropout() -> Any:
    return _trains(_lora(model(), use_rslora=True, lora_dropout=0.1))


@check
def pissa() -> Any:
    """Starts from a singular value decomposition of each weight, on the device."""
    return _trains(_lora(model(dtype=torch.float32), init_lora_weights="pissa"))


@check
def nf4() -> Any:
    how = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    return _trains(_lora(_quantized(load_in_4bit=True, **how)))


@check
def fp4() -> Any:
    return _trains(_lora(_quantized(load_in_4bit=True, bnb_4bit_quant_type="fp4")))


@check
def int8() -> Any:
    return _trains(_lora(_quantized(load_in_8bit=True)))


@check
def nf4_the_usual_way() -> Any:
    base = prepare_model_for_kbit_training(_quantized(load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    return _trains(_lora(base))


@check
def checkpointing() -> Any:
    """Fewer bytes are live at the peak, reentrant or not. So many layers that what each saves is most of the peak."""
    peaks = {}
    for name, how in (("off", None), ("reentrant", True), ("not reentrant", False)):
        made = _lora(model(num_hidden_layers=24))
        if how is not None:
            made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": how})
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train(made, rows=4, tokens=128)
        peaks[name] = torch.cuda.max_memory_allocated() - before
        del made
    return peaks


def _state_bytes(kind: str, **how: Any) -> dict[str, int]:
    """What an optimizer's states of a million weights take: of the allocator, and of managed memory."""
    layer = torch.nn.Linear(1024, 1024, bias=False, device="cuda")
    optimizer = getattr(bnb.optim, kind)(layer.parameters(), lr=1e-3, **how)
    layer(torch.randn(1, 1024, device="cuda")).sum().backward()
    before, managed = torch.cuda.memory_allocated(), driver.stats().managed_bytes
    optimizer.step()
    found = {"allocated": torch.cuda.memory_allocated() - before, "managed": driver.stats().managed_bytes - managed}
    optimizer.step()
    return found


for _kind, _how in {
    "AdamW8bit": {},
    "AdamW32bit": {},
    "PagedAdamW8bit": {},
    "PagedAdamW32bit": {},
    "Lion8bit": {},
    "SGD8bit": {"momentum": 0.9},
    "AdEMAMix8bit": {},
}.items():
    _check = lambda kind=_kind, how=_how: _state_bytes(kind, **how)  # noqa: E731 - a function a line, with its own defaults
    _check.__name__ = _kind
    check(_check)

check.run()
