"""finetune: trains LoRA and QLoRA adapters, with gradients that are exact under accumulation and checkpointing."""

import sys
from importlib.util import find_spec

# `pip install pytest-vram` brings this package without what it needs, which is several gigabytes.
_NEEDED = ("accelerate", "datasets", "docstring_parser", "peft", "safetensors", "torch", "transformers", "tyro", "yaml")
_missing = [name for name in _NEEDED if find_spec(name) is None]
if _missing:
    _text = f"finetune needs {', '.join(_missing)}, not installed here: pip install 'pytest-vram[finetune]'"
    # This is the first argument while Python looks for the module of `python -m finetune.qlora`: a line says enough.
    raise SystemExit(_text) if sys.argv[:1] == ["-m"] else ImportError(_text)
