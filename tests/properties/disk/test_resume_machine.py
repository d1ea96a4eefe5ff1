"""Train, be killed, be stopped, lose the newest checkpoint, resume, split the window another way: in any order, the
adapter is the one of the straight run.

Drives the real command's ``run``. A kill is an exception that nothing handles, at any point of any step; the end-to-end
tests do the same with SIGKILL.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from safetensors.torch import load_file
from tiny_models import relative_l2, tiny_model
from tiny_tokenizers import tiny_tokenizer

from finetune import qlora
from finetune.config.settings import (
    AdapterConfig,
    ComputeDtype,
    DataConfig,
    ModelConfig,
    OutputConfig,
    RunConfig,
    TrainConfig,
)
from finetune.disk import checkpoint
from finetune.errors import ConfigError, RunInterruptedError
from finetune.training import loop

if TYPE_CHECKING:
    from collections.abc import Iterator

STEPS = 5
WINDOW = 4
SPLITS = ((1, 4), (2, 2), (4, 1))
KINDS: dict[str, tuple[ComputeDtype, AdapterConfig]] = {
    "small": ("fp32", AdapterConfig(rank=2, alpha=4.0)),
    "with 8-bit states": ("fp32", AdapterConfig(rank=64, alpha=64.0)),  # 4,096 elements and more
    "in bf16": ("bf16", AdapterConfig(rank=64, alpha=64.0)),
    "DoRA in bf16": ("bf16", AdapterConfig(rank=2, alpha=4.0, dora=True)),
}
"""What the optimizer's states may be: in 32 and 8 bits, with the bits that bf16 drops, of two dtypes."""
ROOT = Path(tempfile.mkdtemp(prefix="resume-machine-"))
STRAIGHT: dict[tuple[Any, ...], dict[str, torch.Tensor]] = {}


class Killed(BaseException):
    """The process is gone."""


@pytest.fixture(autouse=True, scope="module")
def world() -> Iterator[None]:
    """A model, a tokenizer, twenty rows, and a cache, all of this module's own."""
    patch = pytest.MonkeyPatch()
    patch.setenv("FINETUNE_CACHE", str(ROOT / "cache"))
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(ROOT / "model")
    tiny_model(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id).save_pretrained(ROOT / "model")
    rows = [{"prompt": f"say {i}", "completion": str(i) * (1 + 7 * i % 5)} for i in range(20)]
    (ROOT / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    yield
    patch.undo()
    shutil.rmtree(ROOT)


def config(
    output: Path, *, kind: str, optimizer: str, dropout: float, packing: bool, split: tuple[int, int], **changes: Any
) -> RunConfig:
    compute, shape = KINDS[kind]
    return RunConfig(
        model=ModelConfig(model=str(ROOT / "model"), device="cpu", compute_dtype=compute),
        adapter=replace(shape, dropout=dropout),
        data=DataConfig(data=str(ROOT / "rows.jsonl"), seq=64, packing=packing),
        train=TrainConfig(
            max_steps=STEPS,
            micro_batch=split[0],
            accumulation=split[1],
            split="given",
            optimizer=optimizer,  # type: ignore[arg-type]  # drawn from the Literal's values
            learning_rate=1e-3,
            checkpointing=changes.get("checkpointing", True),
            threads=1,
        ),
        output=OutputConfig(
            output=output,
            resume=changes.get("resume", False),
            save_every=changes.get("save_every", 2),
            eval_every=changes.get("eval_every", 2),
            answer_tokens=0,
            keep=3,
        ),
    )


def run(settings_of_run: RunConfig) -> None:
    with warnings.catch_warnings(), Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated")  # asked by peft 0.21
        qlora.run(settings_of_run)


def adapter(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / "adapter_model.safetensors")


def dying_in(real: Any, *, step: int, after: bool = False) -> Any:
    """``train_step`` in a process that is gone before, or after, the given step."""
    last = step

    def dying(*args: Any, step: int, **kwargs: Any) -> Any:
        if step == last and not after:
            raise Killed
        stats = real(*args, step=step, **kwargs)
        if step == last:
            raise Killed
        return stats

    return dying


def test_killed_and_resumed_is_the_straight_run_and_another_seed_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shortest of the machine's runs, and its control: the comparison tells one run from another."""
    choices: dict[str, Any] = {
        "kind": "small",
        "optimizer": "adamw-8bit",
        "dropout": 0.2,
        "packing": False,
        "split": (2, 2),
    }
    straight, other, killed = (config(ROOT / name, **choices) for name in ("first", "second", "third"))
    object.__setattr__(other.train, "seed", 1)
    run(straight)
    run(other)
    monkeypatch.setattr(loop, "train_step", dying_in(loop.train_step, step=3))
    with pytest.raises(Killed):
        run(killed)
    monkeypatch.undo()
    run(config(ROOT / "third", **choices, resume=True, save_every=1, eval_every=3))
    one, two, three = (adapter(made.output.output) for made in (straight, other, killed))
    assert relative_l2([two[n] for n in one], list(one.values())) > 0.1
    assert all(torch.equal(three[n], one[n]) for n in one)
    rows = [json.loads(line)["step"] for line in (ROOT / "third" / "train.jsonl").read_text().splitlines()]
    assert rows == list(range(1, STEPS + 1))


def test_a_base_with_dropout_resumes_exactly_and_keeps_its_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its draws go on where they stood; a window split another way would draw others, which is not rounding."""
    choices: dict[str, Any] = {"kind": "small", "optimizer": "adamw-8bit", "dropout": 0.0, "packing": False}
    original = (ROOT / "model" / "config.json").read_text()
    monkeypatch.setattr(loop, "train_step", dying_in(loop.train_step, step=3))
    try:
        (ROOT / "model" / "config.json").write_text(json.dumps(json.loads(original) | {"attention_dropout": 0.2}))
        with pytest.raises(Killed):
            run(config(ROOT / "dropout killed", **choices, split=(2, 2)))
        monkeypatch.undo()
        with pytest.raises(ConfigError, match=r"micro_batch = 1: .*this llama model has dropout of its own"):
            run(config(ROOT / "dropout killed", **choices, split=(1, 4), resume=True))
        run(config(ROOT / "dropout killed", **choices, split=(2, 2), resume=True))
        run(config(ROOT / "dropout", **choices, split=(2, 2)))
    finally:
        (ROOT / "model" / "config.json").write_text(original)
    resumed, straight = adapter(ROOT / "dropout killed"), adapter(ROOT / "dropout")
    assert all(torch.equal(resumed[n], straight[n]) for n in straight)


class Resume(RuleBasedStateMachine):
    """One run, interrupted in every way."""

    @initialize(
        kind=st.sampled_from(list(KINDS)),
        optimizer=st.sampled_from(["adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit"]),
        dropout=st.sampled_from([0.0, 0.0, 0.2]),
        packing=st.sampled_from([False, False, True]),
        split=st.sampled_from(SPLITS),
    )
    def begin(self, **choices: Any) -> None:
        self.choices = choices
        self.output = Path(tempfile.mkdtemp(dir=ROOT)) / "run"
        self.begun = self.split_changed = False

    def resumed(self, split: tuple[int, int] | None = None, **changes: Any) -> RunConfig:
        """The run's config; where the step's result does not depend on it, with its window split another way."""
        exact = self.choices["kind"] == "small" and self.choices["dropout"] == 0 and not self.choices["packing"]
        if split is not None and self.begun and exact:
            self.split_changed |= split != self.choices["split"]
            self.choices["split"] = split
        made = config(self.output, **self.choices, resume=self.begun, **changes)
        self.begun = True
        return made

    @rule(
        after=st.integers(0, STEPS),
        within=st.sampled_from(["before", "after"]),
        save_every=st.integers(0, 3),
        eval_every=st.integers(0, 3),
        checkpointing=st.booleans(),
        split=st.sampled_from([None, *SPLITS]),
    )
    def train_and_be_killed(self, after: int, within: str, **changes: Any) -> None:
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(loop, "train_step", dying_in(loop.train_step, step=after, after=within == "after"))
            run(self.resumed(**changes))

    @rule(after=st.integers(0, STEPS - 1), checkpointing=st.booleans())
    def train_and_be_stopped(self, after: int, checkpointing: bool) -> None:
        real = loop.train_step

        def interrupted(*args: Any, step: int, **kwargs: Any) -> Any:
            if step == after:
                os.kill(os.getpid(), signal.SIGINT)
            return real(*args, step=step, **kwargs)

        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(RunInterruptedError):
            patch.setattr(loop, "train_step", interrupted)
            run(self.resumed(checkpointing=checkpointing))

    @precondition(lambda self: len(checkpoint.paths(self.output / "checkpoints")) > 1)
    @rule(
        file=st.sampled_from(["state.safetensors", "state.json", "manifest.json"]), how=st.sampled_from(["cut", "flip"])
    )
    def the_newest_checkpoint_is_damaged(self, file: str, how: str) -> None:
        damaged = checkpoint.paths(self.output / "checkpoints")[0] / file
        held = damaged.read_bytes()
        middle = len(held) // 2
        damaged.write_bytes(
            held[:-3] if how == "cut" else held[:middle] + bytes([held[middle] ^ 1]) + held[middle + 1 :]
        )

    def teardown(self) -> None:
        if not hasattr(self, "choices"):
            return
        run(self.resumed())
        reached = adapter(self.output)
        key = tuple(sorted(self.choices.items()))
        if key not in STRAIGHT:
            output = Path(tempfile.mkdtemp(dir=ROOT)) / "straight"
            run(config(output, **self.choices))
            STRAIGHT[key] = adapter(output)
        straight = STRAIGHT[key]
        assert reached.keys() == straight.keys()
        if self.split_changed:
            assert relative_l2([reached[n] for n in straight], list(straight.values())) <= 1e-5
        else:
            assert all(torch.equal(reached[n], straight[n]) for n in straight)


share = max(4, settings.default.max_examples // 6)
Resume.TestCase.settings = settings(settings.default, max_examples=share, stateful_step_count=5)
TestResume = Resume.TestCase
