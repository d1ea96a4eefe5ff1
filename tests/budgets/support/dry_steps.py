"""Real training steps on a dry GPU, many configurations in one process: ``python dry_steps.py CARD < cases.json``.

Reads a list of `Case` fields, prints a list of `Figures` fields. Importing torch and transformers takes longer than a
case does, so that a file of tests starts one process for all of its cases.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import sys
import tempfile
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from finetune.config.settings import TrainConfig
    from finetune.data.batches import Batch

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 65536,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    },
    "mixtral": {
        "model_type": "mixtral",
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 65536,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    },
}
"""Small enough for a step in a tenth of a second, large enough that weights, activations and logits all matter."""
NEW_TOKENS = 512
"""Tokens that a made model's tokenizer knows beyond the model's own embeddings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One training configuration, and what is run of it."""

    shape: str = "llama"
    """Name of a `SHAPES` entry."""
    seq: int = 512
    """Tokens of each row."""
    micro_batch: int = 1
    """Rows of a micro-batch."""
    micro_batches: int = 1
    """Micro-batches of a window."""
    steps: int = 2
    """Optimizer steps: the second is the first that holds optimizer states from its beginning."""
    evaluate: bool = False
    """Evaluate before, between and after the steps."""
    save: bool = False
    """Take a checkpoint's state after the first step."""
    resume: bool = False
    """Start from a checkpoint's state instead of afresh."""
    shape_changes: dict[str, Any] = field(default_factory=dict)
    """Fields of the shape's config that differ."""
    packed: bool = False
    """Two rows of half the length in each sequence, instead of one."""
    model: dict[str, Any] = field(default_factory=dict)
    """Fields of ModelConfig."""
    adapter: dict[str, Any] = field(default_factory=dict)
    """Fields of AdapterConfig."""
    train: dict[str, Any] = field(default_factory=dict)
    """Fields of TrainConfig."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What a case needed, in bytes; what was there before it is taken off."""

    loaded_bytes: int
    """After loading and attaching the adapter."""
    peak_bytes: int
    """Peak allocated of the whole case, loading included."""
    load_peak_bytes: int
    """Peak while loading."""
    step_peaks: list[int]
    """Peak of each step."""
    step_requests: list[int]
    """Peak of each step without what the allocator's blocks are larger than what was asked for."""
    after_steps: list[int]
    """Allocated after each step."""
    other_peaks: list[int]
    """Peaks of evaluations, saving and restoring."""
    managed_bytes: int
    """Managed (paged) memory held at the end."""
    reserved_bytes: int
    """Peak reserved of the whole case."""
    left_bytes: int
    """Still allocated after everything was deleted."""


def main() -> None:
    from pytest_vram.drygpu import activate

    activate(sys.argv[1])
    cases = [Case(**fields) for fields in json.load(sys.stdin)]
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        measure(Case(steps=1), Path(folder))  # what the libraries hold for good from their first use on
        gc.freeze()  # a collection then looks at the case's objects alone: half of its time otherwise
        figures = [asdict(measure(case, Path(folder))) for case in cases]
    json.dump(figures, sys.stdout)


def measure(case: Case, folder: Path) -> Figures:
    """Run one case and give everything back."""
    import torch

    from pytest_vram.drygpu.driver import stats

    before, managed_before = torch.cuda.memory_allocated(), stats(0).managed_bytes
    torch.cuda.empty_cache()
    reserved_before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    figures = _run(case, folder, before, reserved_before)
    gc.collect()
    return dataclasses.replace(
        figures,
        left_bytes=torch.cuda.memory_allocated() - before,
        managed_bytes=figures.managed_bytes - managed_before,  # bitsandbytes never gives managed memory back
    )


def _run(case: Case, folder: Path, before: int, reserved_before: int) -> Figures:
    import torch

    from finetune.config.settings import AdapterConfig, ModelConfig, TrainConfig
    from finetune.kernels.packed_attention import keep_rows_apart
    from finetune.model.load import attach_adapter, load_base
    from finetune.training.optim import make_optimizer
    from finetune.training.step import evaluate, train_step
    from pytest_vram.drygpu.driver import stats

    where = {"model": str(_folder(case, folder))}
    model_config = ModelConfig(**{"precision": "nf4", "device": "cuda"} | case.model | where)
    train = TrainConfig(**{"max_steps": case.steps} | case.train)
    load_peak = 0
    requested_before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    marks: dict[str, int] = {}

    @contextlib.contextmanager
    def peak_of(name: str) -> Iterator[None]:
        torch.cuda.reset_peak_memory_stats()
        yield
        marks[name] = torch.cuda.max_memory_allocated() - before

    with peak_of("load"):
        model = attach_adapter(load_base(model_config), AdapterConfig(**case.adapter), seed=0)
        if case.packed:
            keep_rows_apart(model)
    loaded = torch.cuda.memory_allocated() - before
    load_peak = marks["load"]
    optimizer = make_optimizer(model.parameters(), train)
    window = [_batch(case) for _ in range(case.micro_batches)]
    step_peaks, requests, after, others = [], [], [], []
    if case.resume:
        with peak_of("resume"):
            _restore(model, optimizer, train)
        others.append(marks["resume"])
    reserved = torch.cuda.max_memory_reserved()
    for step in range(case.steps):
        if case.evaluate:
            with peak_of("evaluate"):
                evaluate(model, window, train)
            others.append(marks["evaluate"])
        with peak_of("step"):
            train_step(model, window, optimizer, train, step=step, total_steps=case.steps)
        step_peaks.append(marks["step"])
        requests.append(torch.cuda.memory_stats()["requested_bytes.all.peak"] - requested_before)
        after.append(torch.cuda.memory_allocated() - before)
        if case.save and step == 0:
            with peak_of("save"):
                _saved_state(model, optimizer)
            others.append(marks["save"])
        reserved = max(reserved, torch.cuda.max_memory_reserved())
    return Figures(
        loaded_bytes=loaded,
        peak_bytes=max([load_peak, *step_peaks, *others]),
        load_peak_bytes=load_peak,
        step_peaks=step_peaks,
        step_requests=requests,
        after_steps=after,
        other_peaks=others,
        managed_bytes=stats(0).managed_bytes,
        reserved_bytes=reserved - reserved_before,
        left_bytes=0,
    )


def _folder(case: Case, folder: Path) -> Path:
    from pytest_vram.drygpu import empty_checkpoint

    path = folder / "-".join([case.shape, *(f"{name}{value}" for name, value in case.shape_changes.items())])
    config = SHAPES[case.shape] | case.shape_changes
    if not path.is_dir():
        empty_checkpoint(config, path)
        _save_tokenizer(path, config["vocab_size"] + NEW_TOKENS)
    return path


def _save_tokenizer(path: Path, tokens: int) -> None:
    """Put a tokenizer beside the model that knows more tokens than the model does: embeddings are enlarged for it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{index}": index for index in range(tokens)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(path)


def _batch(case: Case) -> Batch:
    import torch

    from finetune.data.batches import Batch

    ids = torch.ones((case.micro_batch, case.seq), dtype=torch.int64)
    positions = None
    if case.packed:
        positions = torch.arange(case.seq // 2).repeat(2)[None].repeat(case.micro_batch, 1)
    return Batch(input_ids=ids, labels=ids.clone(), position_ids=positions)


def _saved_state(model: Any, optimizer: Any) -> Any:
    from finetune.disk.state import pack
    from finetune.training.optim import optimizer_state
    from finetune.training.sharded import trained

    return pack({"weights": trained(model), "optimizer": optimizer_state(optimizer)})


def _restore(model: Any, optimizer: Any, train: TrainConfig) -> None:
    """What a resumed run does: the state of another run, as a checkpoint holds it, into this one."""
    import torch

    from finetune.training.optim import load_optimizer_state, make_optimizer, optimizer_state, optimizer_step
    from finetune.training.sharded import trained

    twins = [torch.nn.Parameter(torch.zeros_like(p, device="cpu")) for p in trained(model).values()]
    for twin in twins:
        twin.grad = torch.zeros_like(twin)
    frozen = [torch.nn.Parameter(torch.zeros(1), requires_grad=False)] * (len(twins) < len(list(model.parameters())))
    donor = make_optimizer([*twins, *frozen], train)
    optimizer_step(donor)
    load_optimizer_state(optimizer, optimizer_state(donor))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
