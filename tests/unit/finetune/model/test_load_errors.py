"""What is said of a model that transformers cannot load names the reason and what to do."""

from __future__ import annotations

import re

import pytest

from finetune.model.load_errors import explained

TIMM = """
TimmWrapperModel requires the timm library but it was not found in your environment. You can install it with pip:
`pip install timm`. Please note that you may need to restart your runtime after installation.
"""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            ImportError(TIMM),
            ("timm library.*You can install it with pip: `pip install timm`.$", "install what it needs"),
        ),
        (
            AttributeError("'MusicgenConfig' object has no attribute 'dropout'"),
            ("cannot build a llama model as a causal language model: 'MusicgenConfig'", "predicts the next token"),
        ),
        (AttributeError("'NoneType' object has no attribute 'x'"), ("^AttributeError: 'NoneType'", "a hub name")),
        (ValueError("Unrecognized ... for this kind of AutoModel: X"), ("a llama model is no causal", "next token")),
        (ValueError("set trust_remote_code=True"), ("^set trust", "models that need their own code")),
        (KeyError("a\nb"), ("^KeyError: ", "a hub name")),
        (OSError(""), ("^no reason is given$", "a hub name")),
        (OSError("no file model.safetensors"), ("^no file", "safetensors")),
    ],
)
def test_each_error_has_its_reason_and_remedy(error: Exception, expected: tuple[str, str]) -> None:
    said, remedy = explained(error, lambda: "llama")
    for text, pattern in zip((said, remedy), expected, strict=True):
        assert re.search(pattern, text), text
        assert "\n" not in text
