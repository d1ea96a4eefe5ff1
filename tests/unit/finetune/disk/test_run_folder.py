"""The names of a run's files, which users, --resume and other programs depend on."""

from __future__ import annotations

from pathlib import Path

from finetune.disk.run_folder import RunFolder

RUN = RunFolder(Path("runs/x"))


def test_the_names_are_the_documented_ones() -> None:
    assert RUN.config == Path("runs/x/config.yaml")
    assert RUN.summary == Path("runs/x/summary.json")
    assert RUN.train_rows == Path("runs/x/train.jsonl")
    assert RUN.eval_rows == Path("runs/x/eval.jsonl")
    assert RUN.checkpoints == Path("runs/x/checkpoints")
    assert RUN.trained(full=False) == Path("runs/x/adapter")
    assert RUN.trained(full=True) == Path("runs/x/model")


def test_everything_that_a_run_writes_is_listed_but_its_settings() -> None:
    """The settings are written first, by every start: they are no sign of an earlier run."""
    names = {path.name for path in RUN.written()}
    results = {"adapter", "model", "merged", "summary.json"}
    assert names == results | {"checkpoints", "tensorboard", "train.jsonl", "eval.jsonl"}
