"""Loads a checkpoint of zeros with the real ``from_pretrained``: seven billion weights, and their host memory."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from checks import Checks
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, MistralConfig

from finetune.disk.host_memory import peak_resident_bytes
from pytest_vram.drygpu import empty_checkpoint

check = Checks()
FOLDER = Path(sys.argv[1])
SEVEN_BILLION = MistralConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=32000,
    tie_word_embeddings=False,
    dtype="bfloat16",
)


@check
def write() -> Any:
    folder = empty_checkpoint(SEVEN_BILLION, FOLDER)
    files = sorted(path for path in folder.iterdir() if path.suffix == ".safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return {
        "files": len(files),
        "apparent": sum(path.stat().st_size for path in files),
        "on disk": sum(path.stat().st_blocks * 512 for path in files),
        "total": index["metadata"]["total_size"],
    }


@check
def load_in_bfloat16() -> Any:
    model = AutoModelForCausalLM.from_pretrained(FOLDER, device_map={"": 0}, dtype=torch.bfloat16)
    weights = sum(p.nbytes for p in model.parameters())
    return {"weights": weights, "allocated": torch.cuda.memory_allocated(), "host": peak_resident_bytes()}


@check
def load_in_nf4() -> Any:
    how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    quantization = BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.bfloat16, **how)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = AutoModelForCausalLM.from_pretrained(FOLDER, quantization_config=quantization, device_map={"": 0})
    kinds = {type(module).__name__ for module in model.modules()}
    allocated = torch.cuda.memory_allocated() - before
    return {"linear": "Linear4bit" in kinds, "allocated": allocated, "host": peak_resident_bytes()}


check.run()
