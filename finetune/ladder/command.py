"""Measure how each technique lowers the memory of fine-tuning, from a full fine-tune down to one consumer card.

``python -m finetune.ladder --model mistral-7b --gpu rtx-4080`` takes a real training step at full size on a dry GPU for
every rung of the ladder, and compares it with the arithmetic. A rung that does not fit the card is measured on a card
of the same kind with enough memory.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.config import yaml_file
from finetune.config.settings import RunConfig
from finetune.dryrun.card import named_card
from finetune.dryrun.command import ROOMY_BYTES, trials
from finetune.errors import FinetuneError
from finetune.estimate.arithmetic import Estimate, estimate, model_fields
from finetune.ladder.results import CACHED, PARTS, Ladder, Rung, as_json
from pytest_vram.drygpu.cards import context_caveat
from pytest_vram.memory.timeline import CATEGORIES
from pytest_vram.units import GIB

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from finetune.dryrun.messages import Trial
    from pytest_vram.drygpu import Card

_PLAIN = {"optimizer": "adamw", "checkpointing": False, "offload_activations": False, "accumulation": 1}
_FULL = _PLAIN | {"full": True}
_NF4 = _PLAIN | {"precision": "nf4", "double_quant": False}
RUNGS: dict[str, dict[str, Any]] = {
    "full fine-tune, fp32": _FULL | {"precision": "fp32"},
    "full fine-tune, bf16": _FULL | {"precision": "bf16"},
    "LoRA on bf16": _PLAIN | {"precision": "bf16"},
    "LoRA on int8": _PLAIN | {"precision": "int8"},
    "QLoRA: NF4": _NF4,
    "+ double quantization": _NF4 | {"double_quant": True},
    "+ paged optimizer": _NF4 | {"double_quant": True, "optimizer": "paged-adamw"},
    "+ checkpointing": _NF4 | {"double_quant": True, "optimizer": "paged-adamw", "checkpointing": True},
    "+ accumulation 16": _NF4
    | {"double_quant": True, "optimizer": "paged-adamw", "checkpointing": True, "accumulation": 16},
}
"""The settings of each rung. A rung whose name begins with ``+`` adds one setting to the rung before it."""


def measure(base: RunConfig, card: Card, told: Callable[[str], None] = lambda _: None) -> Ladder:
    """Measure every rung.

    Args:
        base: has the model, sequence length, micro-batch and rank; the rungs set the rest.
        card: the card that the rungs should fit.
        told: is called with the names of the rungs that are measured next, to show progress.

    Raises:
        ConfigError: the arithmetic does not know the model.
        DryRunError: a trial failed for another reason than memory.
    """
    shape = model_fields(base.model.model)
    configs = {name: yaml_file.replace(base, settings) for name, settings in RUNGS.items()}
    expected = {
        name: estimate(config, shape, capability=card.capability, context_bytes=card.context_bytes)
        for name, config in configs.items()
    }
    found: dict[str, Trial] = {}
    for names in _same_base(configs):
        told(", ".join(names))
        changes = [_step_settings(configs[name]) for name in names]
        results = trials(configs[names[0]], changes, card.name, total_bytes=ROOMY_BYTES)
        found |= dict(zip(names, results, strict=True))
    rungs = []
    for name, trial in found.items():
        fits = trial.peak_device <= card.total_bytes
        if not fits and trial.peak_allocated + trial.context <= card.total_bytes:
            # Before it fails, the allocator frees the memory that it caches. Only a trial on the card shows if that is
            # enough.
            told(f"{name}, on the card itself")
            fits = trials(configs[name], [{}], card.name)[0].fits
        rungs.append(_rung(name, expected[name], trial, fits=fits))
    return Ladder(
        model=base.model.model,
        card=card.name,
        total_bytes=card.total_bytes,
        seq=base.data.seq,
        micro_batch=base.train.micro_batch,
        rank=base.adapter.rank,
        context_caveat=context_caveat(card),
        rungs=tuple(rungs),
    )


def _same_base(configs: dict[str, RunConfig]) -> list[list[str]]:
    """Group the names of rungs that store the base model in the same way, so that it is loaded once for each group."""
    groups: dict[Any, list[str]] = {}
    for name, config in configs.items():
        groups.setdefault(config.model, []).append(name)
    return list(groups.values())


def _step_settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings of a rung that do not change how the base is loaded."""
    settings = yaml_file.flatten(config)
    return {name: settings[name] for name in ("full", *_PLAIN)}


def _rung(name: str, expected: Estimate, trial: Trial, *, fits: bool) -> Rung:
    measured: dict[str, int] = {category: trial.categories.get(category, 0) for category in CATEGORIES}
    measured["context"] = trial.context
    measured[CACHED] = max(0, trial.peak_device - sum(measured.values()))
    return Rung(
        name=name,
        arithmetic=expected.by_category(),
        measured=measured,
        managed=trial.managed,
        fits=fits,
        seconds=trial.seconds,
    )


def render(ladder: Ladder) -> str:
    """Return the ladder as a table in GiB. Each rung has two lines: the arithmetic, and below it the measurement."""
    widths = [max(len(part), 7) for part in PARTS]
    width = max(len(text) for rung in ladder.rungs for text in (rung.name, _verdict(rung, ladder)))
    head = " ".join(f"{column:>{w}}" for column, w in zip(PARTS, widths, strict=True))
    lines = [
        f"{ladder.model}, seq {ladder.seq}, micro-batch {ladder.micro_batch}, rank {ladder.rank}; "
        f"{ladder.card} has {ladder.total_bytes / GIB:.2f} GiB. All figures in GiB.",
        "",
        f"{'':{width}} {'':10} {'total':>7} {head}",
    ]
    for rung in ladder.rungs:
        for label, sizes in (("arithmetic", rung.arithmetic), ("measured", rung.measured)):
            cells = " ".join(_cell(sizes.get(column), w) for column, w in zip(PARTS, widths, strict=True))
            title = rung.name if label == "arithmetic" else _verdict(rung, ladder)
            lines.append(f"{title:{width}} {label:10} {sum(sizes.values()) / GIB:7.2f} {cells}")
    lines += ["", "measured: dry GPU, PyTorch's own allocator at full size; no kernel ran."]
    if ladder.context_caveat:
        lines.append(f"context: {ladder.context_caveat}.")
    if any(rung.managed for rung in ladder.rungs):
        paged = max(rung.managed for rung in ladder.rungs)
        lines.append(f"Paged optimizer state ({paged / GIB:.2f} GiB) is managed memory, beside the card's figures.")
    return "\n".join(lines)


def _verdict(rung: Rung, ladder: Ladder) -> str:
    share = rung.needed / ladder.total_bytes
    return f"  fits, {share:.0%} of the card" if rung.fits else f"  does not fit: {share:.1f}x the card"


def _cell(size: int | None, width: int) -> str:
    return f"{'':>{width}}" if not size or size < 0.005 * GIB else f"{size / GIB:>{width}.2f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the ladder, print it, and draw it.

    Returns:
        The exit code: 0, or 2 if an argument cannot be used.
    """
    arguments = _parser().parse_args(argv)
    begin = time.perf_counter()
    try:
        card = named_card(arguments.gpu)
        settings = {name: getattr(arguments, name) for name in ("model", "seq", "micro_batch", "rank")}
        base = yaml_file.replace(RunConfig(), settings | {"device": "cuda"})
        ladder = measure(base, card, told=lambda text: print(f"measuring {text} ...", file=sys.stderr))
    except FinetuneError as error:
        print(f"finetune.ladder: {error}", file=sys.stderr)
        return error.exit_code
    print(render(ladder))
    folder: Path = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"ladder-{Path(ladder.model).name}-{ladder.card}"
    stem.with_name(stem.name + ".json").write_text(as_json(ladder))
    from finetune.ladder.drawing import draw

    for suffix in (".png", ".svg"):
        draw(ladder, stem.with_name(stem.name + suffix))
    print(f"drawn in {stem}.png, .svg; figures in .json; {time.perf_counter() - begin:.0f} s")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m finetune.ladder", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--model", default="mistral-7b", help="a shape that comes with finetune, a folder or a hub name"
    )
    parser.add_argument("--gpu", default="rtx-4080", metavar="CARD", help="one of `python -m pytest_vram cards`")
    parser.add_argument("--seq", type=_count, default=512, metavar="TOKENS", help="tokens of a row (default 512)")
    parser.add_argument("--micro-batch", type=_count, default=1, metavar="ROWS", help="rows in a pass (default 1)")
    parser.add_argument("--rank", type=_count, default=16, help="rank of the adapter (default 16)")
    parser.add_argument("--output", type=Path, default=Path("runs/ladder"), help="folder of the pictures and figures")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)
