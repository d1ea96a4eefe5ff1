"""Writes the result of a run: adapter, tokenizer, model card, summary, and a merged model on request."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from finetune.config import yaml_file
from finetune.disk import durable
from finetune.disk.run_folder import RunFolder
from finetune.disk.run_log import clock, memory_now
from finetune.model.merge import merge
from finetune.training.card import Summary, model_card, one_line
from finetune.training.sharded import trained
from pytest_vram.units import GIB

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from finetune.config.settings import RunConfig
    from finetune.disk.run_log import EvalRow
    from finetune.training.prepare import Setup


def write_result(setup: Setup, evaluations: list[EvalRow], whole: Mapping[str, Any] | None = None) -> Summary:
    """Write adapter, tokenizer, model card, merged model and summary into the output folder.

    Each of them is either complete or absent.

    Args:
        setup: the run.
        evaluations: its evaluations.
        whole: the model's weights by name, if its own are parts of them.

    Raises:
        WriteError: the disk is full; the checkpoints are untouched, and --resume only writes the result again.
    """
    output = setup.config.output
    run = RunFolder(output.output)
    adapter = run.trained(full=setup.config.adapter.full)
    with durable.folder(adapter) as folder:
        _save(setup.model, folder, whole)
        _sort_targets(folder / "adapter_config.json")
        setup.tokenizer.save_pretrained(folder)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        summary = _summarize(setup, evaluations, adapter, size)
        _write_card(folder, summary, setup.config, merged=False)
    if output.merge != "none":
        with durable.folder(run.merged) as folder:
            merge(setup.model, adapter, setup.config, folder)
            setup.tokenizer.save_pretrained(folder)
            _write_card(folder, summary, setup.config, merged=True)
    durable.write_json(run.summary, asdict(summary))
    return summary


def report(summary: Summary) -> str:
    """Return the text that a run prints at its end."""
    lines = [""]
    before, after = summary.held_out_loss_before, summary.held_out_loss_after
    if before and after is not None:
        change = 100 * (after - before) / before
        lines.append(
            f"held-out loss  {before:.4f} before, {after:.4f} after ({change:+.1f} %), "
            f"on {summary.held_out_targets:,} answer tokens"
        )
    if summary.question is not None:
        lines += [
            f"question       {one_line(summary.question)}",
            f"  before       {one_line(summary.answer_before)}",
            f"  after        {one_line(summary.answer_after)}",
        ]
    lines.append(
        f"training       {summary.steps} steps, {summary.tokens:,} tokens in {clock(summary.train_seconds)}: "
        f"{summary.tokens_per_second:,.0f} tokens/s"
    )
    peak = f"{summary.peak_rss_bytes / GIB:.2f} GiB resident"
    if summary.peak_allocated_bytes is not None:
        peak = f"{summary.peak_allocated_bytes / GIB:.2f} GiB allocated on the GPU, {peak}"
    lines.append(f"peak memory    {peak}")
    lines.append(f"adapter        {summary.adapter}  ({summary.adapter_bytes / 2**20:.1f} MiB)")
    if summary.merged is not None:
        lines.append(f"merged model   {summary.merged}  (into the {summary.merged_into})")
    return "\n".join(lines)


def _summarize(setup: Setup, evaluations: list[EvalRow], adapter: Path, size: int) -> Summary:
    output = setup.config.output
    run = RunFolder(output.output)
    rows = durable.read_lines(run.train_rows)
    first = next((row for row in evaluations if row.step == 0), None)
    last = next((row for row in reversed(evaluations) if row.step == setup.total_steps), None)
    memory = memory_now()
    seconds, tokens = sum(row["seconds"] for row in rows), sum(row["tokens"] for row in rows)
    return Summary(
        adapter=str(adapter),
        merged=str(run.merged) if output.merge != "none" else None,
        merged_into=output.merge if output.merge != "none" else None,
        steps=setup.total_steps,
        tokens=tokens,
        targets=sum(row["targets"] for row in rows),
        train_seconds=round(seconds, 3),
        tokens_per_second=round(tokens / seconds, 3) if seconds else 0.0,
        train_loss=rows[-1]["loss"] if rows else None,
        held_out_loss_before=first.loss if first else None,
        held_out_loss_after=last.loss if last else None,
        held_out_targets=last.targets if last else 0,
        question=last.question if last else None,
        answer_before=first.answer if first else None,
        answer_after=last.answer if last else None,
        peak_rss_bytes=memory["peak_rss_bytes"],
        peak_allocated_bytes=memory.get("peak_allocated_bytes"),
        trained_parameters=sum(parameter.numel() for parameter in trained(setup.model).values()),
        adapter_bytes=size,
        device=setup.facts.device,
        threads=setup.facts.threads,
        versions=dict(setup.facts.versions),
        settings=yaml_file.json_values(setup.config),
        layers=setup.layers,
    )


def _save(model: Any, folder: Path, whole: Mapping[str, Any] | None) -> None:
    """Write the adapter, or with ``--full`` the model.

    An adapter of a base with resized embeddings holds the new rows only. By default peft would also write the old rows,
    which belong to the base.
    """
    from peft import PeftModel

    if isinstance(model, PeftModel):
        model.save_pretrained(str(folder), save_embedding_layers=False)
    else:
        model.save_pretrained(folder, state_dict=whole)


def _write_card(folder: Path, summary: Summary, config: RunConfig, *, merged: bool) -> None:
    (folder / "README.md").write_text(model_card(summary, config, merged=merged), encoding="utf-8")


def _sort_targets(path: Path) -> None:
    """Sort the adapted modules in the file, because peft writes a set, whose order differs between processes."""
    if path.is_file():
        settings = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(settings["target_modules"], list):
            settings["target_modules"].sort()
        path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
