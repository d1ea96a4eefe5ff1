"""Adapters go on the layers that are meant: by full path and kind, never by a name that means something else too."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from adapted_models import gradients, nonzero_adapter
from every_causal_lm import tiny_model_of

from finetune.config.settings import AdapterConfig, ModelConfig
from finetune.errors import ConfigError
from finetune.model.adapters import load_adapter
from finetune.model.layers import experts_of, why_not_plain
from finetune.model.load import attach_adapter, load_base
from finetune.model.names import matches, names_of
from finetune.model.targets import coverage

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:FutureWarning")


def adapted(model: Any, **changes: Any) -> tuple[str, ...]:
    config = AdapterConfig(rank=4, **changes)
    return coverage(attach_adapter(model, config, seed=0), config).adapted


def saved(kind: str, folder: Path) -> Path:
    tiny_model_of(kind).save_pretrained(folder)
    return folder


def based(folder: Path, precision: str) -> Any:
    return load_base(
        ModelConfig(model=str(folder), precision=precision, compute_dtype="fp32", device="cpu")  # type: ignore[arg-type]  # one of the Literal's values
    )


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe", "qwen3_moe", "hunyuan_v1_moe"])
def test_dense_layers_beside_experts_get_their_adapter(kind: str, precision: str, tmp_path: Path) -> None:
    """peft takes gate_proj, up_proj and down_proj of these for experts, and adapts the fused parameters instead."""
    base = based(saved(kind, tmp_path), precision)
    linear = {name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)} - {"lm_head"}
    config = AdapterConfig(rank=4)
    model: Any = nonzero_adapter(attach_adapter(base, config, seed=0))
    found = coverage(model, config)
    assert set(found.adapted) == linear - set(found.left)
    assert [path for path in found.left if path.endswith(("gate_proj", "up_proj", "down_proj"))] == []
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in trained} == set(found.adapted)
    assert set(gradients(model, checkpointing=False)) == trained
    assert any("experts" in line and "parameters" in line for line in found.lines())


def test_such_an_adapter_is_saved_and_loaded_beside_the_same_layers(tmp_path: Path) -> None:
    folder = saved("deepseek_v3", tmp_path / "base")
    model: Any = nonzero_adapter(attach_adapter(based(folder, "fp32"), AdapterConfig(rank=4), seed=0))
    model.save_pretrained(tmp_path / "adapter")
    again = load_adapter(based(folder, "fp32"), tmp_path / "adapter")
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        expected, bare = model.eval()(input_ids=ids).logits, based(folder, "fp32")(input_ids=ids).logits
        assert torch.equal(again.eval()(input_ids=ids).logits, expected)
    assert not torch.allclose(expected, bare)
    assert not any(parameter.requires_grad for parameter in again.parameters())


@pytest.mark.parametrize("kind", ["zamba2", "ctrl", "gemma3n_text"])
def test_a_number_in_a_list_is_no_name(kind: str) -> None:
    """A list's linear layer is called "0", and so are the first layer of the decoder and much else."""
    model = tiny_model_of(kind)
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    found = adapted(model)
    assert any(path.rpartition(".")[2].isdigit() for path in found) or kind == "gemma3n_text"
    assert set(found) < linear


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "bamba", "falcon_h1", "granitemoehybrid", "nemotron_h"])
def test_a_weight_that_a_fused_kernel_reads_gets_none_and_stays_in_16_bits(kind: str, tmp_path: Path) -> None:
    base = based(saved(kind, tmp_path), "nf4")
    mixers = [name for name, _ in base.named_modules() if name.endswith(("mixer.out_proj", "mamba.out_proj"))]
    assert mixers
    left = coverage(attach_adapter(base, AdapterConfig(rank=4), seed=0), AdapterConfig()).left
    for name in mixers:
        assert type(base.get_submodule(name)) is torch.nn.Linear
        assert "reads its weight without calling it" in left[name]


@pytest.mark.parametrize(("kind", "part"), [("blt", "patcher"), ("deepseek_v32", "indexer")])
def test_what_only_chooses_gets_none_because_no_gradient_reaches_it(kind: str, part: str) -> None:
    left = coverage(attach_adapter(tiny_model_of(kind), AdapterConfig(rank=4), seed=0), AdapterConfig()).left
    inside = {reason for path, reason in left.items() if f".{part}." in path}
    assert inside
    assert all("no gradient goes through a choice" in reason for reason in inside)


@pytest.mark.parametrize(("kind", "router"), [("llama4_text", "router"), ("phimoe", "router")])
def test_a_router_that_is_a_linear_layer_gets_none(kind: str, router: str, tmp_path: Path) -> None:
    model = tiny_model_of(kind)
    left = coverage(attach_adapter(model, AdapterConfig(rank=4), seed=0), AdapterConfig()).left
    assert {left[path] for path in left if path.endswith(router)} == {"a router, which chooses the experts"}
    with pytest.raises(ConfigError, match=r"targets = 'router'.*a router, which chooses the experts"):
        attach_adapter(tiny_model_of(kind), AdapterConfig(targets=("router",)), seed=0)


def test_a_linear_layer_that_returns_more_than_a_product_gets_none() -> None:
    class Pair(torch.nn.Linear):
        __module__ = "transformers.models.of_a_test"

        def forward(self, x: Any) -> Any:
            return super().forward(x), x

    class Twice(Pair):
        __module__ = "transformers.models.of_a_test"

        def forward(self, x: Any) -> Any:
            return 2 * torch.nn.functional.linear(x, self.weight, self.bias)

    class Same(Pair):
        __module__ = "transformers.models.of_a_test"

        def forward(self, x: Any) -> Any:
            return x @ self.weight.T + self.bias

    holder = torch.nn.ModuleDict({"pair": Pair(8, 4), "twice": Twice(8, 4), "same": Same(8, 4)})
    assert set(why_not_plain(holder)) == {"pair", "twice"}


def test_convolutions_and_state_spaces_are_no_experts() -> None:
    for kind in ("mamba2", "qwen3_next", "lfm2", "recurrent_gemma"):
        found = {type(module).__name__ for _, module in experts_of(tiny_model_of(kind))}
        assert found <= {"Qwen3NextExperts"}, kind


def gemma3_with_vision() -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    text = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0}
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14, "vision_use_head": True}
    ids = {"boi_token_index": 250, "eoi_token_index": 251, "image_token_index": 252}
    config = CONFIG_MAPPING["gemma3"](text_config=text, vision_config=vision, mm_tokens_per_image=4, **ids)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def test_a_model_that_sees_gets_its_adapter_on_the_language_model_alone() -> None:
    model = gemma3_with_vision()
    config = AdapterConfig(rank=4)
    adapter: Any = nonzero_adapter(attach_adapter(model, config, seed=0))
    found = coverage(adapter, config)
    assert len(found.adapted) == 14
    assert all(".language_model." in path for path in found.adapted)
    outside = [path for path, reason in found.left.items() if reason.startswith("outside the language model")]
    assert any("vision_tower" in path for path in outside)
    assert any("no adapter on" in line and "vision_tower" in line for line in found.lines())
    assert len(gradients(adapter, checkpointing=True)) == 28  # every A and every B


def test_what_sees_and_hears_inside_the_language_model_is_no_part_of_it() -> None:
    model = tiny_model_of("phi4_multimodal")
    left = coverage(attach_adapter(model, AdapterConfig(rank=4), seed=0), AdapterConfig()).left
    inside = [path for path in left if "embed_tokens_extend" in path]
    assert len(inside) > 10
    assert {left[path] for path in inside} == {"outside the language model, which is all that text runs through"}


def test_what_carries_images_to_the_text_is_no_part_of_the_language_model_either() -> None:
    config = AdapterConfig(rank=4)
    adapter: Any = nonzero_adapter(attach_adapter(tiny_model_of("git"), config, seed=0))
    found = coverage(adapter, config)
    assert found.left["git.visual_projection.visual_projection.0"].startswith("outside the language model")
    assert not any("image_encoder" in path or "visual" in path for path in found.adapted)
    assert len(gradients(adapter, checkpointing=False)) == 2 * len(found.adapted)


def test_a_name_that_both_have_means_the_language_models_and_one_that_it_has_not_is_refused() -> None:
    found = adapted(gemma3_with_vision(), targets=("q_proj",))
    assert len(found) == 2
    assert all(".language_model." in path for path in found)
    with pytest.raises(ConfigError, match=r"targets = 'vision_tower': .*outside the language model.*use all-linear"):
        attach_adapter(gemma3_with_vision(), AdapterConfig(targets=("vision_tower",)), seed=0)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"exclude": ("mlp",)}, r"self_attn"),
        ({"exclude": ("layers.0",)}, r"layers\.1\."),
        ({"exclude": ("q_proj", "mlp"), "targets": ("all-linear",)}, r"\.[kvo]_proj$"),
        ({"targets": ("self_attn",), "exclude": ("layers.1",)}, r"layers\.0\.self_attn"),
        ({"targets": (r".*\.[qv]_proj",)}, r"\.[qv]_proj$"),
    ],
)
def test_names_are_layers_parts_of_paths_or_patterns(settings: dict[str, Any], kept: str) -> None:
    found = adapted(tiny_model_of("llama"), **settings)
    every = adapted(tiny_model_of("llama"))
    assert set(found) == {path for path in every if re.search(kept, path)}
    assert found


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"targets": ("q_prj",)}, r"targets = 'q_prj'.*no linear layer of that name; did you mean q_proj"),
        ({"exclude": ("q_prj",)}, r"exclude = 'q_prj'.*did you mean q_proj"),
        ({"exclude": ("layers",)}, r"exclude = .*no linear layer is left.*leave fewer"),
        ({"targets": ("lm_head",)}, r"targets = 'lm_head'.*the head"),
        ({"targets": ("Q_PROJ",)}, r"did you mean q_proj, .*\?; use all-linear, or one of (?!.*lm_head).*v_proj"),
        ({"targets": ("q_proj|(",)}, r"targets = 'q_proj\|\('.*no regular expression: .*position"),
    ],
)
def test_a_name_that_means_nothing_is_told(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        attach_adapter(tiny_model_of("llama"), AdapterConfig(**settings), seed=0)


def test_what_is_said_counts_each_layer_once() -> None:
    config = AdapterConfig(rank=4, exclude=("mlp",))
    lines = coverage(attach_adapter(tiny_model_of("llama"), config, seed=0), config).lines()
    assert lines[0].startswith("adapter on model.layers.*.self_attn.q_proj (2), ")
    assert "no adapter on lm_head: the head" in lines
    assert any(line.endswith("left out by --exclude") and "mlp.gate_proj (2)" in line for line in lines)


def test_a_remedy_names_what_has_no_gradient_and_nothing_else() -> None:
    others = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.fc1"]
    without = ["model.layers.0.cross.q_proj", "model.layers.0.cross.k_proj", "model.layers.1.cross.q_proj"]
    assert names_of(without, others) == ["cross"]
    assert names_of(["model.layers.0.mlp.fc2"], others) == ["fc2"]
    assert names_of(["model.layers.1.mlp.fc1"], others) == ["layers.1"]
    assert not matches("fc", "model.fc1")
    assert not matches("(", "model.fc1")
