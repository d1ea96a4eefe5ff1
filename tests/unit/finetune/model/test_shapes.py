"""The shapes that come with finetune: found by name, and of the published size."""

from __future__ import annotations

import pytest

from finetune.errors import ConfigError
from finetune.model.shapes import SHAPES, Shape, find_shape, load_shape, near_shapes


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("mistral-7b", "mistral-7b"),
        ("mistralai/Mistral-7B-v0.1", "mistral-7b"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("meta-llama/Meta-Llama-3-8B", "llama-3.1-8b"),
        ("meta-llama/Llama-2-13b-chat-hf", "llama-2-13b"),
        ("google/gemma-2-9b-it", "gemma-2-9b"),
        ("Phi-3-mini-4k-instruct", "phi-3-mini"),
        ("Qwen/Qwen2.5-0.5B-Instruct", "qwen2.5-0.5b"),
    ],
)
def test_names(name: str, found: str) -> None:
    shape = find_shape(name)
    assert shape is not None
    assert shape.name == found


def test_a_misspelt_name_is_told_its_neighbours() -> None:
    with pytest.raises(ConfigError, match=r"mistrl-7b.*did you mean mistral-7b"):
        load_shape("mistrl-7b")


@pytest.mark.parametrize("name", ["llama2-7", "mistrall", "qwen-2.5-7", "phi3"])
def test_neighbours_are_told_by_the_names_that_can_be_given_each_once(name: str) -> None:
    near = near_shapes(name)
    assert near
    assert set(near) <= set(SHAPES)
    assert len(set(near)) == len(near)


@pytest.mark.parametrize("name", ["gpt2", "bert-base-uncased", "pythia-70m"])
def test_what_is_near_to_nothing_may_be_a_model_of_the_hub(name: str) -> None:
    assert near_shapes(name, cutoff=0.75) == []


@pytest.mark.parametrize("name", ["someone/mistral-7b", "./mistral-7b", "mistral-8b", ""])
def test_what_may_be_another_model_is_not_taken_for_one_of_ours(name: str) -> None:
    assert find_shape(name) is None


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_every_shape_has_the_published_number_of_parameters(shape: Shape) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(load_shape(shape.name))
    assert model.num_parameters() == shape.parameters
