"""Draws the ladder: two bars for each rung, arithmetic and measurement, and a line at the memory of the card."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.ladder.results import CACHED, PARTS
from pytest_vram.units import GIB

if TYPE_CHECKING:
    from pathlib import Path

    from finetune.ladder.results import Ladder, Rung

# Okabe and Ito's colours, which colour-blind people can tell apart as well (https://jfly.uni-koeln.de/color/).
COLOURS = {
    "weights": "#0072B2",
    "quantization": "#56B4E9",
    "adapters": "#CC79A7",
    "gradients": "#E69F00",
    "optimizer": "#D55E00",
    "activations": "#009E73",
    "logits": "#F0E442",
    "temporary": "#A6761D",
    "other": "#999999",
    "context": "#555555",
    CACHED: "#DDDDDD",
}
LABELS = {
    "quantization": "quantization constants",
    "optimizer": "optimizer state",
    "temporary": "temporaries",
    "other": "workspace, other",
    "context": "CUDA context",
    CACHED: "cached, not in use",
}
_HEIGHT = 0.36
_WIDTH = 0.08  # width of a label, as a share of the axis
_DARK, _GREY, _GREEN, _RED, _CARD = "#222222", "#555555", "#00694F", "#B03A00", "#C00000"


def draw(ladder: Ladder, file: Path) -> None:
    """Draw the ladder into ``file``, as PNG or SVG according to its suffix."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings: dict[str, Any] = {"font.size": 10, "svg.hashsalt": "ladder", "svg.fonttype": "none"}
    with pyplot.rc_context(settings):
        figure, (whole, near) = pyplot.subplots(
            1, 2, sharey=True, figsize=(13, 1.9 + 0.62 * len(ladder.rungs)), width_ratios=(1, 1.25)
        )
        card = ladder.total_bytes / GIB
        _bars(whole, ladder, limit=1.25 * max(max(r.needed, r.expected) for r in ladder.rungs) / GIB, told=False)
        _bars(near, ladder, limit=1.5 * card, told=True)
        whole.set_yticks(range(len(ladder.rungs)), [rung.name for rung in ladder.rungs])
        whole.invert_yaxis()
        figure.text(0.012, 0.955, _title(ladder), fontsize=15, fontweight="bold", color=_DARK)
        figure.text(0.012, 0.918, _subtitle(ladder), fontsize=10.5, color=_GREY)
        if ladder.context_caveat:
            figure.text(0.012, 0.012, f"CUDA context: {ladder.context_caveat}.", fontsize=9.5, color=_GREY)
        handles = [pyplot.Rectangle((0, 0), 1, 1, color=COLOURS[name], label=LABELS.get(name, name)) for name in PARTS]
        handles += [
            pyplot.Rectangle((0, 0), 1, 1, facecolor="#FFFFFF", edgecolor=_GREY, hatch="///", label="arithmetic"),
            pyplot.Rectangle((0, 0), 1, 1, facecolor="#FFFFFF", edgecolor=_GREY, label="measured (dry GPU)"),
        ]
        columns = (len(handles) + 1) // 2
        place = (0.5, 0.03 if ladder.context_caveat else 0)
        figure.legend(
            handles=handles,
            loc="lower center",
            bbox_to_anchor=place,
            ncols=columns,
            frameon=False,
            fontsize=9.5,
            columnspacing=1.5,
        )
        figure.tight_layout(rect=(0.004, 0.1, 0.996, 0.915), w_pad=2)
        # Without a date, so that the same figures give the same file.
        metadata: dict[str, Any] = {"Date": None} if file.suffix == ".svg" else {"Software": None}
        figure.savefig(file, dpi=130, metadata=metadata)
        pyplot.close(figure)


def _title(ladder: Ladder) -> str:
    return f"What a training step of {ladder.model} needs, and what fits the {ladder.card}"


def _subtitle(ladder: Ladder) -> str:
    return (
        f"Peak on the card, context included; {ladder.seq} tokens a row, micro-batch {ladder.micro_batch}, rank"
        f" {ladder.rank}. Left: all of it. Right: the same, up to {1.5 * ladder.total_bytes / GIB:.0f} GiB."
    )


def _bars(axes: Any, ladder: Ladder, *, limit: float, told: bool) -> None:
    card = ladder.total_bytes / GIB
    for row, rung in enumerate(ladder.rungs):
        _bar(axes, row - _HEIGHT / 2, rung.arithmetic, hatched=True)
        _bar(axes, row + _HEIGHT / 2, rung.measured, hatched=False)
        _figure(axes, row - _HEIGHT / 2, rung.expected / GIB, limit, "", _GREY, card)
        note = _note(rung) if told else ""
        _figure(axes, row + _HEIGHT / 2, rung.needed / GIB, limit, note, _GREEN if rung.fits else _RED, card)
    axes.axvline(card, color=_CARD, linewidth=1.4, zorder=4)
    label = f" {ladder.card}: {card:.1f} GiB" if told else f" {ladder.card}"
    axes.text(card, -0.62, label, color=_CARD, fontsize=9.5, va="bottom")
    axes.set_xlim(0, limit)
    axes.set_ylim(-0.7, len(ladder.rungs) - 0.4)
    axes.set_xlabel("GiB")
    axes.xaxis.grid(visible=True, color="#E8E8E8", zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _bar(axes: Any, y: float, sizes: dict[str, int], *, hatched: bool) -> None:
    left = 0.0
    for name, size in sizes.items():
        if size:
            style: dict[str, Any] = {"hatch": "////", "alpha": 0.55} if hatched else {}
            axes.barh(
                y, size / GIB, _HEIGHT * 0.94, left, color=COLOURS[name], edgecolor="white", linewidth=0.4, **style
            )
        left += size / GIB


def _figure(axes: Any, y: float, size: float, limit: float, note: str, colour: str, line: float) -> None:
    """Write a bar's total at its end: inside the bar if it nearly fills the axis, else after it and after the line."""
    inside = size > 0.88 * limit
    beyond = line if size < line < size + _WIDTH * limit else size
    x = min(size, limit) - limit * 0.005 if inside else beyond + limit * 0.008
    text = f"{size:.1f}{note}" + (" ▸" if size > limit else "")
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85}
    axes.text(x, y, text, va="center", ha="right" if inside else "left", fontsize=9, color=colour, bbox=box, zorder=5)


def _note(rung: Rung) -> str:
    return "  fits" if rung.fits else "  does not fit"
