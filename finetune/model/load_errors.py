"""Says why transformers could not load a model, and what would work, from the error that it raised."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from finetune.model.whole import UNPICKLED

if TYPE_CHECKING:
    from collections.abc import Callable

_ANOTHER = "name a model that predicts the next token of a text"


def explained(error: Exception, kind: Callable[[], str]) -> tuple[str, str]:
    """Return what went wrong, in one line, and the remedy.

    Args:
        error: what transformers raised.
        kind: returns the model's type, such as ``llama``, where its configuration could be read.
    """
    text = str(error).strip()
    remedy = "name a folder with config.json, tokenizer and *.safetensors, a .gguf file, or a hub name"
    if "trust_remote_code" in text:
        remedy = "models that need their own code to be run are not loaded; name one that transformers knows"
    elif "for this kind of AutoModel" in text:
        return f"a {kind()} model is no causal language model that transformers knows", _ANOTHER
    elif re.match(r"'\w+Config' object has no attribute", text):
        # The configuration is that of several models, and the class that is registered for it takes one of them.
        return f"transformers cannot build a {kind()} model as a causal language model: {text}", _ANOTHER
    elif isinstance(error, ImportError):
        text, remedy = " ".join(text.split()).partition(" Please note")[0], "install what it needs"
    elif type(error).__name__.startswith("StrictDataclass"):
        text, remedy = " ".join(text.split()), "mend the value in its config.json"
    elif "safetensors" in text:
        remedy = UNPICKLED
    said = text.partition("\n")[0].strip() or "no reason is given"
    if not isinstance(error, (OSError, ValueError, RuntimeError, ImportError)):
        said = f"{type(error).__name__}: {said}"
    return said, remedy
