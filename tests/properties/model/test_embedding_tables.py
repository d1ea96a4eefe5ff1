"""Tables of tokens and positions: sizes as the models themselves have them; rows added, trained and loaded."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from finetune.errors import ConfigError, ExitCode
from finetune.model.embeddings import NEW_TOKENS_ATTRIBUTE, new_token_rows, resize_embeddings, tables_of
from finetune.qlora import main

if TYPE_CHECKING:
    from pathlib import Path

ROOM = 20
SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size",), 64),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "input_size"), 32),
    **dict.fromkeys(("ffn_dim", "intermediate_size", "dff", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention_heads", "num_heads"), 2),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), ROOM),
    "attention_types": [[["global"], 1]],
    "rotary_dim": 4,
    "is_decoder": True,
    "pad_token_id": 1,
}
WITH_TABLE = ["gpt2", "gpt_neo", "gpt_bigcode", "opt", "biogpt", "gptj", "codegen", "ctrl", "openai-gpt", "mpt"]
WITH_TABLE += ["roberta", "bert", "xlm-roberta", "bart", "marian"]
WITHOUT = ["llama", "mistral", "qwen2", "gpt_neox", "bloom", "falcon", "xglm", "gemma"]


def small(kind: str, **changes: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind)
    for name, value in (SMALL | changes).items():
        if hasattr(config, name):
            setattr(config, name, value)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def runs(model: Any, tokens: int) -> bool:
    ids = torch.arange(tokens)[None] % 50 + 4
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.filterwarnings("ignore")  # BERT and its kin advise, at load, on how they are to be used
@pytest.mark.parametrize("kind", WITH_TABLE)
def test_the_longest_row_is_the_longest_that_the_model_runs(kind: str) -> None:
    model = small(kind)
    positions = tables_of(model).positions
    assert positions is not None
    assert runs(model, positions)
    assert not runs(model, positions + 1)


@pytest.mark.parametrize("kind", WITHOUT)
def test_a_model_that_computes_its_positions_has_no_longest_row(kind: str) -> None:
    model = small(kind)
    assert tables_of(model).positions is None
    assert runs(model, ROOM + 1)


@pytest.mark.parametrize("tied", [True, False])
def test_added_rows_begin_as_the_mean_and_the_old_ones_stay(tied: bool) -> None:
    model, before = (small("llama", tie_word_embeddings=tied).requires_grad_(False) for _ in range(2))
    resize_embeddings(model, 67)
    assert tables_of(model).tokens == 67
    for now, old in (
        (model.get_input_embeddings().weight, before.get_input_embeddings().weight),
        (model.get_output_embeddings().weight, before.get_output_embeddings().weight),
    ):
        assert torch.equal(now[:64], old)
        assert torch.equal(now[64:], old.mean(0).expand(3, -1))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    names = ["model.embed_tokens"] if tied else ["model.embed_tokens", "lm_head"]
    assert new_token_rows(model) == {name: [64, 65, 66] for name in names}
    resize_embeddings(before, 10)
    assert tables_of(before).tokens == 64
    assert not hasattr(before, NEW_TOKENS_ATTRIBUTE)


def test_a_head_with_a_bias_gets_no_rows() -> None:
    with pytest.raises(ConfigError, match=r"resize_embeddings.*has a bias"):
        resize_embeddings(small("gptj"), 70)


# Runs of the command line on folders as users have them.


def tokenizer_with(added: list[str], pad: str | None) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*alphabet, "<|end|>"])}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>")
    tokenizer.add_tokens(added)
    tokenizer.add_special_tokens({"pad_token": pad or "<|end|>"})
    return tokenizer


def folder_of(
    path: Path, kind: str = "llama", *, added: tuple[str, ...] = (), pad: str | None = None, **more: Any
) -> str:
    wide = dict.fromkeys(("hidden_size", "n_embd", "word_embed_proj_dim"), 64)
    small(kind, vocab_size=257, bos_token_id=None, eos_token_id=256, pad_token_id=256, **wide, **more).save_pretrained(
        path
    )
    tokenizer_with(list(added), pad).save_pretrained(path)
    return str(path)


def rows_of(path: Path, *completions: str) -> str:
    path.write_text("".join(json.dumps({"prompt": "hi", "completion": text}) + "\n" for text in completions))
    return str(path)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Trains, and returns exit code and what was said."""
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))

    def ran(model: str, data: str, *flags: str, output: str = "out") -> tuple[int, str]:
        arguments = ["--model", model, "--data", data, "--device", "cpu", "--precision", "fp32", "--accumulation", "1"]
        arguments += ["--output", str(tmp_path / output), "--eval-fraction", "0", "--answer-tokens", "0", *flags]
        code = main(arguments)
        captured = capsys.readouterr()
        return code, captured.err + captured.out

    return ran


LOUD = pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*is_gradient_checkpointing:FutureWarning")


@LOUD
def test_a_token_beyond_the_embeddings_is_named_with_its_row(run: Any, tmp_path: Path) -> None:
    model = folder_of(tmp_path / "m", added=("<|call|>", "<|over|>"))
    data = rows_of(tmp_path / "a.jsonl", *["yo"] * 30, "<|call|>f<|over|>", "<|call|>")
    code, said = run(model, data)
    assert code == ExitCode.USAGE
    assert "a.jsonl:31: holds the token '<|call|>' (id 257)" in said
    assert "have 257 rows (such tokens are in 2 rows: '<|call|>' (id 257), '<|over|>' (id 258))" in said
    assert "--resize-embeddings" in said
    fine = rows_of(tmp_path / "b.jsonl", "yo", "yo")
    code, said = run(model, fine, "--eval-data", data, "--overwrite")
    assert (code, "a.jsonl:31: holds the token" in said) == (ExitCode.USAGE, True)
    code, said = run(model, fine, "--overwrite")
    assert code == ExitCode.OK
    assert "2 tokens beyond the model's 257 embedding rows (from '<|call|>' (id 257) on); no row holds one" in said
    code, said = run(model, fine, "--overwrite", "--question", "<|call|>?", "--answer-tokens", "4")
    assert code == ExitCode.USAGE
    assert "question = '<|call|>?': '<|call|>' (id 257) is beyond" in said


@LOUD
def test_a_padding_token_beyond_the_embeddings_changes_nothing(run: Any, tmp_path: Path) -> None:
    data = rows_of(tmp_path / "a.jsonl", "yo", "longer", "much longer", "yes")
    flags = ["--micro-batch", "4", "--threads", "1"]
    code, said = run(folder_of(tmp_path / "m", pad="<pad>"), data, *flags)
    assert code == ExitCode.OK
    assert "the padding token, '<pad>' (id 257), is beyond the model's 257 embedding rows" in said
    assert run(folder_of(tmp_path / "n"), data, *flags, output="same")[0] == ExitCode.OK
    one, other = (tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("out", "same"))
    assert one.read_bytes() == other.read_bytes()


@LOUD
@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_a_row_beyond_the_position_table_is_named(run: Any, tmp_path: Path, kind: str) -> None:
    model = folder_of(tmp_path / "m", kind)
    data = rows_of(tmp_path / "a.jsonl", "yo", "w" * 30, "w" * 50)
    code, said = run(model, data)
    assert code == ExitCode.USAGE
    assert f"a.jsonl:2: 33 tokens, and the position table of {model} has {ROOM} rows (2 rows are too long)" in said
    assert f"--seq {ROOM}" in said
    flags = ["--overwrite", "--seq", str(ROOM), "--max-steps", "2"]
    assert run(model, data, *flags)[0] == ExitCode.OK
    # An answer stops where the table does.
    assert run(model, data, *flags, "--eval-fraction", "0.5", "--answer-tokens", "48")[0] == ExitCode.OK
    code, said = run(model, data, *flags, "--question", "w" * ROOM, "--answer-tokens", "1")
    assert (code, f"it is {ROOM} tokens long" in said) == (ExitCode.USAGE, True)


@LOUD
@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("llama", False), ("gpt2", True)])
@pytest.mark.parametrize("precision", ["fp32", "nf4"])
def test_added_rows_are_trained_and_load_again(run: Any, tmp_path: Path, kind: str, tied: bool, precision: str) -> None:
    from peft import AutoPeftModelForCausalLM, PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = folder_of(tmp_path / "m", kind, added=("<|call|>", "<|over|>"), tie_word_embeddings=tied)
    data = rows_of(tmp_path / "a.jsonl", *["<|call|>f<|over|>"] * 3)
    flags = ["--resize-embeddings", "--precision", precision, "--max-steps", "3", "--seq", str(ROOM)]
    flags += ["--learning-rate", "0.01", "--warmup-steps", "0", "--merge", "full-base", "--threads", "1"]
    code, said = run(model, data, *flags)
    assert code == ExitCode.OK, said
    assert (
        f"2 embedding rows added (ids 257 to 258), trained and saved with the adapter: {128 if tied else 256}" in said
    )
    saved = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    rows = [tensor for name, tensor in saved.items() if "token" in name]
    assert [tuple(tensor.shape) for tensor in rows] == [(2, 64)] * (1 if tied else 2)
    assert all(not torch.equal(tensor[0], tensor[1]) for tensor in rows)  # equal before they were trained
    # The adapter, on a base that is enlarged by hand, by peft, and merged: the same logits.
    ids = torch.tensor([[104, 257, 102, 258]])
    base = AutoModelForCausalLM.from_pretrained(model)
    base.resize_token_embeddings(259, mean_resizing=False)
    adapter = str(tmp_path / "out" / "adapter")
    with torch.no_grad():
        by_hand = PeftModel.from_pretrained(base, adapter).eval()(ids).logits
        by_peft = AutoPeftModelForCausalLM.from_pretrained(adapter).eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged").eval()(ids).logits
    assert by_hand.shape[-1] == 259
    assert torch.equal(by_hand, by_peft)
    assert torch.allclose(by_hand, merged, atol=1e-5)


@LOUD
def test_a_run_with_added_rows_resumes_exactly(run: Any, tmp_path: Path) -> None:
    model = folder_of(tmp_path / "m", added=("<|call|>",), tie_word_embeddings=False)
    data = rows_of(tmp_path / "a.jsonl", *["<|call|>", "yo", "<|call|>yo"] * 2)
    flags = ["--resize-embeddings", "--schedule", "constant", "--threads", "1", "--save-every", "2"]
    assert run(model, data, *flags, "--max-steps", "4")[0] == ExitCode.OK
    assert run(model, data, *flags, "--max-steps", "2", output="two")[0] == ExitCode.OK
    assert run(model, data, *flags, "--max-steps", "4", "--resume", output="two")[0] == ExitCode.OK
    one, other = (tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("out", "two"))
    assert one.read_bytes() == other.read_bytes()


@LOUD
def test_a_full_fine_tune_with_added_rows(run: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = folder_of(tmp_path / "m", added=("<|call|>",))
    data = rows_of(tmp_path / "a.jsonl", "<|call|>")
    assert run(model, data, "--resize-embeddings", "--full", "--max-steps", "1")[0] == ExitCode.OK
    assert tables_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")).tokens == 258
