"""Checks every setting, alone and in combination, and reports all problems at once, each with its remedy."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from finetune import launch
from finetune.config.cards import count_problems
from finetune.config.recompute import spelled
from finetune.config.settings import QUANTIZED, AdapterConfig
from finetune.errors import ConfigError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from finetune.config.settings import RunConfig

MAX_SEED = 2**32 - 1  # the largest seed that numpy's legacy generator accepts


def validate(config: RunConfig) -> None:
    """Check every value and every combination of values.

    Raises:
        ConfigError: some settings cannot be used; ``problems`` has one entry for each.
    """
    problems = [*_ranges(config), *_full(config), *_adapted(config), *_step(config), *_sharded(config)]
    problems += [*count_problems(config), *_dry(config)]
    if problems:
        raise ConfigError(*problems)


def _ranges(config: RunConfig) -> Iterator[Problem]:
    adapter, data, train, output = config.adapter, config.data, config.train, config.output
    yield from _at_least("rank", adapter.rank, 1)
    yield from _above_zero("alpha", adapter.alpha, "twice the rank is usual")
    yield from _share("dropout", adapter.dropout, usual="0.05 is usual")
    yield from _filled("model", config.model.model, "name a folder, a hub model or a .gguf file")
    yield from _filled("data", data.data, "name a file or a hub data set")
    if not adapter.targets or not all(adapter.targets):
        yield Problem(
            field="targets",
            value=adapter.targets,
            why="no module would be adapted",
            remedy="use all-linear, or module names such as q_proj v_proj",
        )
    if not all(adapter.exclude):
        remedy = "name a layer such as o_proj, or leave --exclude out"
        yield Problem(field="exclude", value=adapter.exclude, why="an empty name names no layer", remedy=remedy)
    if data.eval_data is not None:
        remedy = "name a file, or leave --eval-data out: --eval-fraction of the rows is held out then"
        yield from _filled("eval_data", data.eval_data, remedy)
    yield from _share("eval_fraction", data.eval_fraction, usual="0.1 is usual")
    yield from _at_least("seq", data.seq, 2)
    if train.max_steps is not None:
        yield from _at_least("max_steps", train.max_steps, 1)
    yield from _above_zero("epochs", train.epochs, "1 is one pass over the rows")
    if train.batch is not None:
        yield from _at_least("batch", train.batch, 1)
    yield from _at_least("micro_batch", train.micro_batch, 1)
    yield from _at_least("accumulation", train.accumulation, 1)
    if not isinstance(train.checkpointing, str):
        yield from _at_least("checkpointing", train.checkpointing, 0)
    yield from _above_zero("learning_rate", train.learning_rate, "2e-4 is usual for LoRA")
    yield from _at_least("warmup_steps", train.warmup_steps, 0)
    yield from _zero_or_more("weight_decay", train.weight_decay)
    yield from _zero_or_more("clip", train.clip)
    yield from _at_least("loss_chunk", train.loss_chunk, 1)
    yield from _at_least("threads", train.threads, 0)
    if not 0 <= train.seed <= MAX_SEED:
        yield Problem(
            field="seed", value=train.seed, why="seeds are 32 bits wide", remedy=f"use a number from 0 to {MAX_SEED}"
        )
    yield from _at_least("save_every", output.save_every, 0)
    yield from _at_least("keep", output.keep, 1)
    yield from _at_least("eval_every", output.eval_every, 0)
    yield from _at_least("answer_tokens", output.answer_tokens, 0)
    if output.question is not None:
        yield from _filled("question", output.question, "ask something, or --answer-tokens 0 to ask nothing")


def _full(config: RunConfig) -> Iterator[Problem]:
    """Yield what does not go together with training all weights."""
    model, adapter, output = config.model, config.adapter, config.output
    if not adapter.full:
        return
    if model.precision in QUANTIZED:
        yield Problem(
            field="full",
            value=True,
            why=f"{model.precision} weights cannot be trained",
            remedy="use --precision bf16 (or fp32), or train an adapter with --no-full",
        )
    if output.merge != "none":
        yield Problem(
            field="merge",
            value=output.merge,
            why="--full trains the model's own weights, so there is no adapter to merge",
            remedy="use --merge none; the run writes the whole trained model anyway",
        )
    for name in ("rslora", "dora", "targets", "exclude"):
        asked = getattr(adapter, name)
        if asked != getattr(AdapterConfig(), name):
            why = f"--full trains {'no adapter' if asked is True else 'every weight of every layer'}"
            yield Problem(field=name, value=asked, why=why, remedy=f"drop --{name}, or use --no-full")


def _adapted(config: RunConfig) -> Iterator[Problem]:
    """Yield settings of the adapter that do not go together with others."""
    model, adapter, output = config.model, config.adapter, config.output
    if adapter.init == "orthogonal" and adapter.rank % 2:
        yield Problem(
            field="rank",
            value=adapter.rank,
            why="--init orthogonal gives half of the rank to A and half to B",
            remedy=f"use --rank {adapter.rank + 1}, or --init default",
        )
    if output.merge == "quantized-base" and model.precision not in QUANTIZED:
        yield Problem(
            field="merge",
            value=output.merge,
            why=f"the base is not quantized (--precision {model.precision})",
            remedy="use --merge full-base",
        )


def _step(config: RunConfig) -> Iterator[Problem]:
    """Yield settings of a step that do not go together."""
    model, train = config.model, config.train
    if train.batch is not None and train.split == "given" and train.micro_batch > 0 and train.batch % train.micro_batch:
        yield Problem(
            field="micro_batch",
            value=train.micro_batch,
            why=f"--batch {train.batch} is not a multiple of it",
            remedy="use --micro-batch auto, or a number that divides the batch",
        )
    if train.offload_activations is True and spelled(train.checkpointing) in ("none", 0):
        yield Problem(
            field="offload_activations",
            value=True,
            why="it moves the inputs of the layers that recompute to the host, and with this --checkpointing none does",
            remedy="use --checkpointing all, or --no-offload-activations",
        )
    if model.device == "cpu" and model.attention == "flash_attention_2":
        yield Problem(
            field="attention",
            value=model.attention,
            why="flash-attention has no CPU kernels",
            remedy="use --attention sdpa, or --device cuda",
        )


def _sharded(config: RunConfig) -> Iterator[Problem]:
    if config.model.offload_base and (not config.model.shard or config.adapter.full):
        why = "it keeps the ranks' parts of a quantized base on the host, and this run has no such parts"
        remedy = "add --shard and leave --full out, or use --no-offload-base"
        yield Problem(field="offload_base", value=True, why=why, remedy=remedy)
    if not config.model.shard:
        return
    model, adapter, output, dry = config.model, config.adapter, config.output, config.dry
    whys: list[tuple[str, str]] = []
    if launch.size() == 1 and not (dry.print_config or dry.dry_run or dry.fit):
        remedy = "start one process for each card: torchrun --nproc-per-node N -m finetune.qlora ..., or use --no-shard"
        whys.append(("it spreads the base over several ranks, and this run has one", remedy))
    if adapter.full and config.train.optimizer.endswith("8bit"):
        why = f"--optimizer {config.train.optimizer} quantizes its states in blocks, which a part of a weight would cut"
        whys.append((why, "use --optimizer paged-adamw or adamw, or --no-shard"))
    elif not adapter.full and model.precision not in ("nf4", "fp4"):
        why = f"only 4-bit layers are sharded, and this base is in {model.precision}"
        whys.append((why, "use --precision nf4 or fp4, or --full, or --no-shard"))
    if adapter.dora:
        whys.append(("--dora reads whole weights outside their layers", "use --no-dora, or --no-shard"))
    if output.merge != "none":
        remedy = "use --merge none, and merge afterwards in one process: the same command with --no-shard --resume"
        whys.append((f"--merge {output.merge} needs the whole base in one process", remedy))
    for why, remedy in whys:
        yield Problem(field="shard", value=True, why=why, remedy=remedy)


def _dry(config: RunConfig) -> Iterator[Problem]:
    dry = config.dry
    if dry.gpu is not None and not (dry.dry_run or dry.fit):
        yield Problem(
            field="gpu",
            value=dry.gpu,
            why="it names the card of a dry run, and this is not a dry run",
            remedy="add --dry-run or --fit; to choose where to train, use --device",
        )
    for name in ("html", "json"):
        file: Path | None = getattr(dry, name)
        if file is None:
            continue
        if not (dry.dry_run or dry.fit):
            yield Problem(
                field=name,
                value=str(file),
                why="it names an output file of a dry run, and this is not a dry run",
                remedy="add --dry-run or --fit",
            )
        elif file.suffix != f".{name}":
            yield Problem(
                field=name,
                value=str(file),
                why=f"it is not the name of a .{name} file",
                remedy=f"use --{name} {file.with_suffix(f'.{name}')}",
            )


def _at_least(field: str, value: int, lowest: int) -> Iterator[Problem]:
    if value < lowest:
        yield Problem(field=field, value=value, why="too small", remedy=f"use {lowest} or more")


def _above_zero(field: str, value: float, usual: str) -> Iterator[Problem]:
    if not (value > 0 and math.isfinite(value)):
        yield Problem(field=field, value=value, why="not a number above 0", remedy=usual)


def _zero_or_more(field: str, value: float) -> Iterator[Problem]:
    if not (value >= 0 and math.isfinite(value)):
        yield Problem(field=field, value=value, why="not a number of 0 or more", remedy="use 0 to turn it off")


def _share(field: str, value: float, usual: str) -> Iterator[Problem]:
    if not 0 <= value < 1:
        yield Problem(field=field, value=value, why="not a number from 0 to below 1", remedy=usual)


def _filled(field: str, value: str, remedy: str) -> Iterator[Problem]:
    if not value.strip():
        yield Problem(field=field, value=value, why="empty", remedy=remedy)
