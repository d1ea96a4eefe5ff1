"""What ``--offload-activations`` moves to the host: each layer's input, once, and nothing that the layers share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny_models import make_rows, padded, save_tiny

from finetune.config.settings import AdapterConfig, ModelConfig
from finetune.model.forward import hidden_states, set_checkpointing
from finetune.model.load import attach_adapter, load_base

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
LAYERS, HIDDEN = 3, 64


def test_layer_inputs_are_moved_and_the_rotary_embedding_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[torch.Tensor] = []

    class Watched(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, *, pin_memory: bool) -> None:
            def pack(tensor: torch.Tensor) -> torch.Tensor:
                moved.append(tensor)
                return tensor

            super().__init__(pack, lambda tensor: tensor)

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Watched)
    folder = save_tiny(tmp_path, layers=LAYERS, hidden=HIDDEN)
    base = load_base(ModelConfig(model=str(folder), precision="nf4", compute_dtype="bf16", device="cpu"))
    model: Any = attach_adapter(base, AdapterConfig(rank=4), seed=0)
    model.train()
    set_checkpointing(model, enabled=True)
    batch = padded(make_rows([20, 31]))
    hidden_states(model, batch, offload=True).states.sum().backward()
    shape = (*batch.input_ids.shape, HIDDEN)
    inputs = [tensor for tensor in moved if tensor.dtype == torch.bfloat16 and tensor.shape == shape]
    assert len({tensor.data_ptr() for tensor in inputs}) == len(inputs) == LAYERS
    # The rest is the last norm's: its input in fp32, which two operators keep, their number a token, and its weight.
    rest = sum(tensor.nbytes for tensor in moved) - LAYERS * inputs[0].nbytes
    assert rest == 4 * inputs[0].nbytes + 2 * 4 * batch.input_ids.numel() + 2 * HIDDEN
    assert not any(tensor.shape[-1] == HIDDEN // 4 for tensor in moved)  # cosines and sines: a head's width
