"""Model and adapter folders that are damaged, or whose files do not belong together, are named with a remedy."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from adapted_models import adapted, gradients
from tiny_models import save_tiny
from tiny_tokenizers import tiny_tokenizer

from finetune.config import yaml_file
from finetune.config.settings import AdapterConfig, ModelConfig, RunConfig
from finetune.data.encode import told_of_no_end
from finetune.errors import FinetuneError, ModelError
from finetune.model.load import attach_adapter, load_base, load_config, load_tokenizer
from finetune.model.settle import settled
from finetune.model.targets import coverage
from finetune.model.whole import not_finite, told_of_unused_weights

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:FutureWarning")
PRECISIONS = pytest.mark.parametrize("precision", ["nf4", "int8", "bf16"])
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model and tokenizer in which nothing is wrong."""
    folder = save_tiny(tmp_path_factory.mktemp("whole") / "model", vocab_size=261)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, to be broken."""
    return shutil.copytree(whole, tmp_path / "model")


def load(folder: Path, precision: str = "bf16") -> Any:
    """What a run loads, in its order."""
    config = settled(yaml_file.replace(RunConfig(), {"model": str(folder), "precision": precision, "device": "cpu"}))
    load_tokenizer(config.model)
    return load_base(config.model)


def changed(folder: Path, name: str = "config.json", **fields: Any) -> None:
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def cut(file: Path) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])


def test_a_models_own_code_is_refused_without_a_question(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answer(text: str = "") -> str:
        asked.append(text)
        return "y"

    monkeypatch.setattr("builtins.input", answer)
    changed(folder, model_type="of_their_own", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"})
    (folder / "own.py").write_text("raise SystemExit('the code ran')")
    config = ModelConfig(model=str(folder), precision="bf16", device="cpu")
    load_tokenizer(config)  # which needs no code
    for loading in (load_config, load_base):
        with pytest.raises(ModelError, match="need their own code"):
            loading(config)
    assert asked == []


@pytest.mark.parametrize(
    ("said", "stored"),
    [({"load_in_8bit": True}, "int8"), ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4")],
)
def test_plain_weights_that_config_json_calls_quantized_are_refused(
    folder: Path, said: dict[str, Any], stored: str
) -> None:
    changed(folder, quantization_config={"quant_method": "bitsandbytes", **said})
    with pytest.raises(ModelError, match=rf"stored in {stored}, and its files hold.*Remove quantization_config"):
        load(folder, "nf4")


def test_a_file_of_a_model_is_told_from_a_folder_that_is_not_there(folder: Path) -> None:
    for name, said in (("model.safetensors", "a file. A model is a folder"), ("gone", "no such folder. A model is")):
        with pytest.raises(ModelError, match=said):
            load_config(ModelConfig(model=str(folder / name)))


def sharded(folder: Path) -> Path:
    """The same weights in several files; the first of them."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    return min(folder.glob("model-*.safetensors"))


@PRECISIONS
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": 3}, "do not hold model.layers.2.input_layernorm.weight and 8 more weights"),
        ({"attention_bias": True}, "do not hold model.layers.0.self_attn.k_proj.bias and 7 more weights"),
        ({"intermediate_size": 192}, "and config.json asks for ["),
        ({"vocab_size": 300}, "and config.json asks for [300, 64]"),
    ],
)
def test_weights_that_the_files_lack_are_never_random(
    folder: Path, precision: str, change: dict[str, Any], said: str
) -> None:
    changed(folder, **change)
    with pytest.raises(ModelError, match=r"files and config\.json belong together") as caught:
        load(folder, precision)
    assert said in str(caught.value)


@PRECISIONS
def test_a_model_without_its_head_is_refused(folder: Path, precision: str) -> None:
    def headless(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value for name, value in found.items() if name != "lm_head.weight"}

    weights(folder, headless)
    with pytest.raises(ModelError, match=r"lm_head\.weight, and they are those of a model without a language model's"):
        load(folder, precision)
    changed(folder, tie_word_embeddings=True)  # then it has no head of its own
    assert load(folder, precision) is not None


def test_weights_under_other_names_are_named(folder: Path) -> None:
    weights(folder, lambda found: {f"base_model.{name}": value for name, value in found.items()})
    with pytest.raises(ModelError, match=r"they hold base_model\.lm_head\.weight, which the model does not use"):
        load(folder)


def test_weights_that_are_left_over_are_told_once(folder: Path, whole: Path) -> None:
    assert told_of_unused_weights(load(whole)) is None
    weights(folder, lambda found: found | {"vision.weight": torch.zeros(3)})
    told = told_of_unused_weights(load(folder))
    assert told == "the files hold vision.weight, which this llama model does not use"
    changed(folder, num_hidden_layers=1, layer_types=None)
    assert "and 9 more weights" in (told_of_unused_weights(load(folder)) or "")


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "the folder has no config.json"),
    "in a folder below": (lambda f: _deeper(f), "did you mean its folder inner?"),
    "broken config": (lambda f: (f / "config.json").write_text('{"model_type": '), "its config.json is not JSON"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "its config.json holds no JSON object"),
    "a wrong type": (lambda f: changed(f, hidden_size="64"), "mend the value in its config.json"),
    "a wrong count": (lambda f: changed(f, num_attention_heads=5, head_dim=None), "config.json"),
    "an unknown type": (lambda f: changed(f, model_type="quux"), "`quux`"),
    "a model of another kind": (lambda f: changed(f, model_type="t5"), "a t5 model is no causal language model"),
    "an odd quantization": (lambda f: changed(f, quantization_config="nf4"), "is 'nf4' and no object"),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "its tokenizer.json is not JSON"),
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "the folder has no tokenizer"),
    "cut weights": (lambda f: cut(f / "model.safetensors"), "its model.safetensors is damaged"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "the folder has no weights"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "its model.safetensors is damaged"),
    "a pointer": (lambda f: (f / "model.safetensors").write_text(LFS), "git lfs pull"),
    "a lost shard": (lambda f: sharded(f).unlink(), "names model-00001-of-0000"),
    "a cut shard": (lambda f: cut(sharded(f)), "is damaged"),
    "a lost index": (
        lambda f: (sharded(f), (f / "model.safetensors.index.json").unlink()),
        "and neither model.safetensors nor model.safetensors.index.json",
    ),
    "pickled": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "its weights are pickled"),
}


def _deeper(folder: Path) -> None:
    (folder / "inner").mkdir()
    for file in folder.glob("*.*"):
        file.rename(folder / "inner" / file.name)


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_in_a_folder_is_named(folder: Path, name: str) -> None:
    spoil, said = BROKEN[name]
    spoil(folder)
    with pytest.raises(ModelError) as caught:
        load(folder)
    assert said in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_gguf_file_that_was_cut_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    for content, said in ((b"GGUF\3\0\0\0" + bytes(9), "Download it again"), (LFS.encode(), "git lfs pull")):
        file.write_bytes(content)
        with pytest.raises(ModelError, match=rf"model\.gguf.*cannot read this GGUF file.*{said}"):
            load_config(ModelConfig(model=str(file)))


@PRECISIONS
def test_values_that_are_no_numbers_are_found_where_they_are(folder: Path, whole: Path, precision: str) -> None:
    assert not_finite(load(whole, precision)) is None
    for name, value in (("model.layers.1.mlp.up_proj.weight", float("nan")), ("model.norm.weight", float("inf"))):
        shutil.copy(whole / "model.safetensors", folder)

        def spoiled(found: dict[str, torch.Tensor], name: str = name, value: float = value) -> dict[str, torch.Tensor]:
            found[name].view(-1)[0] = value
            return found

        weights(folder, spoiled)
        assert not_finite(load(folder, precision)) == name


def saved_adapter(base: Path, folder: Path, **settings: Any) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **settings)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora).save_pretrained(folder)
    return folder


def started(adapter: Path) -> Any:
    """The base of an adapter with that adapter, to be trained further."""
    config = settled(yaml_file.replace(RunConfig(), {"model": str(adapter), "precision": "fp32", "device": "cpu"}))
    return attach_adapter(load_base(config.model), config.adapter, seed=0, saved=config.model.model)


ADAPTERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "it holds no JSON object"),
    "cut": (lambda f: cut(f / "adapter_model.safetensors"), "its adapter_model.safetensors is damaged"),
    "a pointer": (lambda f: (f / "adapter_model.safetensors").write_text(LFS), "git lfs pull"),
    "its own base": (
        lambda f: changed(f, "adapter_config.json", base_model_name_or_path=str(f)),
        "is an adapter too, and an adapter is trained on a model",
    ),
    "no such base": (
        lambda f: changed(f, "adapter_config.json", base_model_name_or_path=str(f / "gone")),
        "gone': no such folder",
    ),
    "an odd rank": (lambda f: changed(f, "adapter_config.json", r="four"), "r in its adapter_config.json is 'four'"),
    "other layers": (
        lambda f: changed(f, "adapter_config.json", target_modules=["c_attn"]),
        "the adapter is not one of this base",
    ),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_what_is_broken_in_an_adapter_is_named(whole: Path, tmp_path: Path, name: str) -> None:
    spoil, said = ADAPTERS[name]
    folder = saved_adapter(whole, tmp_path / "adapter")
    spoil(folder)
    with pytest.raises(FinetuneError) as caught:
        started(folder)
    assert said in str(caught.value)


def test_the_base_of_an_adapter_is_named_when_it_is_what_is_broken(folder: Path, tmp_path: Path) -> None:
    adapter = saved_adapter(folder, tmp_path / "adapter")
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"\(the base of the adapter .*adapter\): its config\.json is not JSON"):
        load(adapter)


def test_a_layer_that_the_adapter_saves_whole_is_said_to_be_trained(whole: Path, tmp_path: Path) -> None:
    adapter = saved_adapter(whole, tmp_path / "adapter", modules_to_save=["lm_head"])
    model = started(adapter)
    assert "base_model.model.lm_head.modules_to_save.default.weight" in gradients(model)
    told = [line for line in coverage(model, AdapterConfig()).lines() if "lm_head" in line]
    assert len(told) == 1
    assert told[0].endswith("trained whole, as modules_to_save of the adapter says")


def test_a_tokenizer_that_ends_no_text_is_told() -> None:
    import copy

    assert told_of_no_end(tiny_tokenizer(chat=False)) is None
    endless = copy.deepcopy(tiny_tokenizer(chat=False))
    endless.eos_token = None
    assert "does not learn where an answer ends" in (told_of_no_end(endless) or "")
    endless.chat_template = "{{ messages }}"
    assert told_of_no_end(endless) is None


def test_a_frozen_weight_alone_is_what_came_broken(whole: Path) -> None:
    model = adapted(whole, "fp32", AdapterConfig(rank=4))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(float("nan"))
    assert not_finite(model) is None
