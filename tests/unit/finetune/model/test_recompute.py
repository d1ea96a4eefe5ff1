"""Which layers of a model recompute: the first ones, as many as the setting says, or what the model can do."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from finetune.errors import ConfigError
from finetune.model import recompute
from finetune.model.recompute import layers_of, set_recompute, usable

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def model_of(kind: str, **sizes: Any) -> Any:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes), dtype=torch.float32)


@pytest.fixture(scope="module")
def llama() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return model_of("llama", vocab_size=64, num_hidden_layers=4, **sizes)


@pytest.fixture(scope="module")
def openai_gpt() -> Any:
    """A model that transformers has no checkpointing for."""
    return model_of("openai-gpt", vocab_size=64, n_embd=32, n_head=2, n_layer=2, n_positions=32)


def recomputing(model: Any) -> list[bool]:
    return [layer.gradient_checkpointing for layer in layers_of(model)]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [("all", 4), ("none", 0), (3, 3), (1, 1), (0, 0), ("auto", 4), (4, 4), (True, 4), (False, 0), (2, 2)],
)
def test_the_first_layers_recompute(llama: Any, setting: Any, expected: int) -> None:
    """One model for all, so that each setting follows another one."""
    set_recompute(llama, setting)
    assert recomputing(llama) == [number < expected for number in range(4)]


def test_a_layer_inside_a_layer_is_none_of_its_own() -> None:
    class Layer(GradientCheckpointingLayer):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Layer(Layer(nn.Identity())), Layer(nn.Identity())])

        def get_decoder(self) -> nn.Module:
            return self

        def get_output_embeddings(self) -> None:
            return None

    model = Model()
    assert layers_of(model) == list(model.layers)
    assert len(layers_of(Model())) == 2  # of this one, and not of the first
    for change in (
        lambda: model.layers.append(Layer(nn.Identity())),
        lambda: model.layers.__setitem__(1, Layer(nn.Identity())),
        lambda: model.layers.__delitem__(0),
        lambda: setattr(model, "layers", nn.ModuleList([Layer(nn.Identity())])),
    ):
        change()
        assert layers_of(model) == list(model.layers)


def test_the_modules_are_searched_once_and_keep_no_model_alive(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = layers_of(llama)
    with monkeypatch.context() as without:
        without.setattr(recompute, "_search", None)
        without.setattr(nn.Module, "modules", None)
        assert layers_of(llama) == layers
    model = model_of("llama", vocab_size=8, num_hidden_layers=1, hidden_size=32, intermediate_size=8)
    assert len(layers_of(model)) == 1
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_more_layers_than_there_are_is_refused_with_the_number(llama: Any) -> None:
    for check in (set_recompute, usable):
        with pytest.raises(ConfigError, match="checkpointing = 5: this llama model has 4 layers; use all, or a number"):
            check(llama, 5)


def test_what_a_model_can_is_left_as_it_is_and_turned_off(llama: Any) -> None:
    for setting in ("auto", "all", "none", 3):
        assert usable(llama, setting) == (setting, None)
        assert not any(recomputing(llama))


def test_a_model_that_cannot_recompute_does_without_under_auto_alone(openai_gpt: Any) -> None:
    found, note = usable(openai_gpt, "auto")
    assert found == "none"
    assert note is not None
    assert "no layer recomputes its activations: transformers has no checkpointing for this openai-gpt model" in note
    assert usable(openai_gpt, "none") == ("none", None)
    for setting in ("all", 1):
        with pytest.raises(ConfigError, match="use --no-checkpointing"):
            usable(openai_gpt, setting)
