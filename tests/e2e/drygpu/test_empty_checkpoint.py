"""A checkpoint from a configuration alone, which the real loading code takes for a downloaded one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from pytest_vram.drygpu import empty_checkpoint
from pytest_vram.errors import VramUsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PARAMETERS = 7_241_732_096  # Mistral-7B-v0.1, as its model card's safetensors index says
GIB = 1 << 30
SHAPE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def loaded(run_program: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    results = run_program("load.py", str(tmp_path_factory.mktemp("seven")))
    for result in results.values():
        assert "error" not in result, result["error"]
    return {name: result["value"] for name, result in results.items()}


def test_fourteen_gigabytes_take_no_disk(loaded: dict[str, Any]) -> None:
    found = loaded["write"]
    assert found["total"] == 2 * PARAMETERS
    assert found["apparent"] >= found["total"]
    assert found["on disk"] < 1 << 20
    assert found["files"] == 3


def test_loading_fills_the_card_and_not_the_host(loaded: dict[str, Any]) -> None:
    found = loaded["load_in_bfloat16"]
    assert found["weights"] == 2 * PARAMETERS
    assert 0 <= found["allocated"] - found["weights"] < 0.001 * found["weights"]
    assert found["host"] < 2 * GIB


def test_loading_quantizes_on_the_card(loaded: dict[str, Any]) -> None:
    """NF4 with double quantization: 4.127 bits for each weight of a linear layer, 16 for the rest."""
    embedded = 2 * 32000 * 4096
    expected = (PARAMETERS - embedded) * 4.127 / 8 + 2 * embedded
    found = loaded["load_in_nf4"]
    assert found["linear"]
    assert found["allocated"] == pytest.approx(expected, rel=0.005)
    assert found["host"] < 2 * GIB


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("mixtral", {"num_local_experts": 4}),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}),
        ("gemma2", {"head_dim": 16}),
        ("phi3", {"pad_token_id": 0}),
        ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4}),
    ],
)
def test_every_weight_is_found_when_loading(tmp_path: Path, family: str, fields: dict[str, Any]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = empty_checkpoint({"model_type": family, **SHAPE, **fields}, tmp_path, dtype="bfloat16")
    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    assert all(not parameter.any() for parameter in model.parameters())


def test_experts_are_written_one_by_one_as_the_hub_has_them(tmp_path: Path) -> None:
    from safetensors import safe_open

    empty_checkpoint({"model_type": "mixtral", **SHAPE, "num_local_experts": 4}, tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in names


def test_the_type_has_its_older_name_in_older_transformers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import transformers  # loading a model may put another module object in the place of the one at the top

    make = transformers.AutoModelForCausalLM.from_config
    asked = []

    def from_config(config: Any, *, torch_dtype: torch.dtype) -> Any:
        asked.append(torch_dtype)
        return make(config, dtype=torch_dtype)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_config", from_config)
    monkeypatch.setattr(transformers, "__version__", "4.55.4")
    empty_checkpoint({"model_type": "llama", **SHAPE}, tmp_path, dtype="bfloat16")
    assert asked == [torch.bfloat16]


def test_a_checkpoint_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    fields = {"model_type": "llama", **SHAPE}
    empty_checkpoint(fields, tmp_path, shard_bytes=100_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    empty_checkpoint(fields, tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]


def test_a_folder_or_file_serves_as_configuration(tmp_path: Path) -> None:
    first = empty_checkpoint({"model_type": "llama", **SHAPE}, tmp_path / "first")
    second = empty_checkpoint(first, tmp_path / "second")
    third = empty_checkpoint(first / "config.json", tmp_path / "third")
    assert json.loads((second / "config.json").read_text()) == json.loads((third / "config.json").read_text())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 64}, "no model_type; its fields are hidden_size"),
        ({"model_type": "lama"}, "lama"),
        ("nowhere", "'nowhere' is neither a config.json nor a folder with one"),
        ({"model_type": "llama", **SHAPE, "quantization_config": {"load_in_4bit": True}}, "is quantized already"),
    ],
)
def test_wrong_configurations_are_named(tmp_path: Path, config: Any, message: str) -> None:
    with pytest.raises(VramUsageError, match=message):
        empty_checkpoint(config, tmp_path)
