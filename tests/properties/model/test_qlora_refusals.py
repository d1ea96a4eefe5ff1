"""What bitsandbytes would decode wrongly on a CPU is refused by name: a linear layer, and a mixture's experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tiny_models import save_tiny

from finetune.config.settings import ModelConfig
from finetune.errors import ModelError
from finetune.model.load import load_base

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(("kind", "named"), [("llama", "down_proj"), ("mixtral", "experts")])
def test_a_layer_whose_rows_split_blocks_is_refused(kind: str, named: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, kind, intermediate_size=96)  # 96 inputs of the last product: not a multiple of 64
    with pytest.raises(ModelError, match=rf"{named} with 96 inputs.*--precision bf16 or fp32"):
        load_base(ModelConfig(model=str(folder), precision="nf4", device="cpu"))
    load_base(ModelConfig(model=str(folder), precision="fp32", device="cpu"))


def test_experts_in_8_bits_are_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "mixtral")
    with pytest.raises(ModelError, match=r"experts of this mixtral model cannot be stored in 8 bits.*nf4"):
        load_base(ModelConfig(model=str(folder), precision="int8", device="cpu"))
