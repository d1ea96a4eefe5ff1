"""Makes the model that the end-to-end tests train: a Llama of a few thousand weights, with a tokenizer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

sys.path.insert(0, str(Path(__file__).parent / "support"))

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tiny_llama(folder: Path, *, seed: int = 0) -> Path:
    """Write a random Llama (2 layers, hidden 64) with a byte-level tokenizer and a chat template into ``folder``."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    vocabulary = {token: index for index, token in enumerate([*alphabet, *special])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|end|>", pad_token="<|end|>", additional_special_tokens=special[1:]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=vocabulary["<|end|>"],
        pad_token_id=vocabulary["<|end|>"],
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_rows(path: Path, count: int) -> Path:
    """Write ``count`` prompt/completion rows of different lengths."""
    rows = [{"prompt": f"add {i} and {i % 7}", "completion": str(i + i % 7) * (1 + i % 5)} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer Llama with its tokenizer."""
    return make_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl file of 44 prompt/completion rows."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 44)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run in a forked child ended."""

    code: int
    """Exit code, or minus the signal that killed it."""
    out: str
    err: str
    moments: int


class Forked:
    """Runs ``finetune.qlora`` in children of one process that has imported everything; see forked.py."""

    def __init__(self, tiny_llama: Path, rows: Path) -> None:
        self.base = ["--model", str(tiny_llama), "--data", str(rows), "--device", "cpu"]
        self.base += ["--seq", "64", "--accumulation", "4", "--epochs", "1"]
        self.base += ["--save-every", "2", "--eval-every", "3", "--answer-tokens", "4"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "random"}
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("forked.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._answer() == "ready"

    def __call__(self, output: Path, *flags: str, fault: dict[str, Any] | None = None) -> Outcome:
        """Run with the tests' own settings, and ``flags`` after them."""
        arguments = [*self.base, "--output", str(output), *flags]
        return self.raw(arguments, output=output, fault=fault)

    def ranks(self, count: int, output: Path, *flags: str, fault: dict[str, Any] | None = None) -> list[Outcome]:
        """Run in ``count`` processes, as a launcher starts them; the outcome of each rank."""
        arguments = [*self.base, "--output", str(output), *flags]
        found = self._ask({"flags": arguments, "output": str(output), "fault": fault, "ranks": count})
        return [Outcome(**outcome) for outcome in found]

    def raw(self, arguments: list[str], *, output: Path, fault: dict[str, Any] | None = None) -> Outcome:
        """Run with these arguments and no others."""
        return Outcome(**self._ask({"flags": arguments, "output": str(output), "fault": fault}))

    def close(self) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.wait()

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._server.stdout is not None
        return json.loads(self._server.stdout.readline())


@pytest.fixture(scope="session")
def qlora(tiny_llama: Path, rows: Path) -> Iterator[Forked]:
    """Runs the command line on the tiny model; a run costs about a second."""
    forked = Forked(tiny_llama, rows)
    yield forked
    forked.close()


@pytest.fixture(scope="session")
def finished(qlora: Forked, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A run that succeeded, and its folder, which tests must not change."""
    output = tmp_path_factory.mktemp("runs") / "finished"
    outcome = qlora(output)
    assert outcome.code == 0, outcome.err
    return output, outcome
