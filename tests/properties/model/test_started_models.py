"""What --model may name beside a plain model: an adapter, trained further, and a base that is quantized already."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from adapted_models import gradients, nonzero_adapter
from tiny_models import save_tiny

from finetune.config import yaml_file
from finetune.config.settings import AdapterConfig, ModelConfig, RunConfig
from finetune.errors import ConfigError, FinetuneError, MissingModelError, ModelError
from finetune.model.adapters import is_adapter
from finetune.model.load import attach_adapter, load_base
from finetune.model.settle import settled, stored_precision

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:FutureWarning")


def run(model: Path | str, **settings: Any) -> RunConfig:
    return yaml_file.replace(RunConfig(), {"model": str(model), "device": "cpu", "compute_dtype": "fp32"} | settings)


def values(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "base")


def trained(base: Path, folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """Save an adapter whose every matrix matters; returns its values."""
    settings = {"rank": 4, "alpha": 8.0} | changes
    model = nonzero_adapter(attach_adapter(load_base(run(base).model), AdapterConfig(**settings), seed=3))
    model.save_pretrained(folder)
    return values(model)


@pytest.mark.parametrize(
    "changes",
    [{}, {"targets": ("q_proj", "down_proj")}, {"rslora": True, "rank": 8}, {"dora": True}, {"exclude": ("layers.0",)}],
)
def test_an_adapter_goes_on_as_it_was_saved(base: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    expected = trained(base, tmp_path / "adapter", **changes)
    config = settled(run(tmp_path / "adapter"))
    assert (config.adapter.rank, config.adapter.alpha) == (changes.get("rank", 4), 8.0)
    assert (config.adapter.rslora, config.adapter.dora) == (changes.get("rslora", False), changes.get("dora", False))
    model = attach_adapter(load_base(config.model), config.adapter, seed=0, saved=config.model.model)
    found = values(model)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert set(gradients(model)) == set(expected)
    assert settled(config) == config


def test_what_the_adapter_is_not_is_refused(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path / "adapter")
    for field, value in {"rank": 8, "alpha": 5.0, "targets": ("q_proj",), "dora": True, "full": True}.items():
        with pytest.raises(ConfigError, match=rf"{field} = .*adapter.*leave --{field} out"):
            settled(run(tmp_path / "adapter", **{field: value}))
    assert settled(run(tmp_path / "adapter", rank=4)).adapter.rank == 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base_model_name_or_path": None}, "names no base"),
        ({"peft_type": "IA3"}, "of kind IA3, and only LORA.*Merge it into its base"),
        ({"peft_type": "PREFIX_TUNING"}, "of kind PREFIX_TUNING, and only LORA.*cannot be merged: name its base"),
        (
            {"base_model_name_or_path": "/nowhere/base"},
            "adapter': the base '/nowhere/base' that its adapter_config.json names is not here .*no such folder",
        ),
    ],
)
def test_an_adapter_that_cannot_go_on_says_why(base: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    trained(base, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(FinetuneError, match=said):
        load_base(settled(run(tmp_path / "adapter")).model)


def test_pickled_adapters_and_broken_ones_are_refused(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"without adapter_model\.safetensors"):
        settled(run(tmp_path / "adapter"))
    (tmp_path / "adapter" / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"adapter_config\.json cannot be read"):
        settled(run(tmp_path / "adapter"))


def test_an_adapter_of_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path / "adapter")
    wider, shorter = save_tiny(tmp_path / "wider", hidden=128), save_tiny(tmp_path / "shorter", layers=1)
    for other in (wider, shorter):
        with pytest.raises(ModelError, match="not one of this base"):
            attach_adapter(load_base(run(other).model), AdapterConfig(), seed=0, saved=str(tmp_path / "adapter"))


def test_a_whole_model_with_an_adapter_beside_it_is_a_model(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path / "adapter")
    assert is_adapter(str(tmp_path / "adapter"))
    (tmp_path / "adapter" / "config.json").write_text("{}")
    assert not is_adapter(str(tmp_path / "adapter"))
    assert not is_adapter("mistralai/Mistral-7B-v0.1")


def quantized(base: Path, folder: Path, **settings: Any) -> Path:
    """A folder as bitsandbytes and transformers write it."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(**settings)
    model: Any = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, device_map={"": "cpu"})
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("settings", "precision"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, "nf4"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": torch.bfloat16}, "fp4"),
        ({"load_in_8bit": True}, "int8"),
    ],
)
def test_a_quantized_folder_is_loaded_as_it_is(
    base: Path, tmp_path: Path, settings: dict[str, Any], precision: str
) -> None:
    folder = quantized(base, tmp_path / "stored", **settings)
    config = settled(run(folder))
    assert config.model.precision == precision
    model: Any = load_base(config.model)
    name = "model.layers.0.mlp.down_proj.weight"
    assert type(model.get_parameter(name)).__name__ == ("Int8Params" if precision == "int8" else "Params4bit")
    if precision != "int8":
        fresh: Any = load_base(run(base, precision=precision, double_quant=precision == "nf4").model)
        ids = torch.arange(1, 13)[None]
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, fresh(input_ids=ids).logits)
    adapter = nonzero_adapter(attach_adapter(model, AdapterConfig(rank=4), seed=0))
    assert len(gradients(adapter)) == 28
    assert settled(run(folder, precision=precision)).model.precision == precision
    other = "fp32"
    with pytest.raises(ConfigError, match=rf"precision = '{other}'.*stored in {precision} already"):
        settled(run(folder, precision=other))
    with pytest.raises(ConfigError, match=r"merge = 'full-base'.*original weights are not there"):
        settled(run(folder, merge="full-base"))


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "mxfp4"])
def test_what_another_method_has_quantized_is_refused_by_its_name(base: Path, method: str) -> None:
    file = base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": method}}))
    with pytest.raises(ModelError, match=rf"quantized already, by {method}.*--precision nf4"):
        load_base(run(base).model)


def test_a_plain_folder_a_shape_and_the_embedded_model_are_left_alone(base: Path) -> None:
    for name in (str(base), "smollm2-135m", "mistral-7b", "some.gguf", "/nowhere"):
        assert stored_precision(ModelConfig(model=name)) is None
        assert settled(run(name)) == run(name)
    with pytest.raises(MissingModelError, match="no such folder"):
        load_base(run("/nowhere").model)
