"""The ladder as a picture: every rung twice, by arithmetic and as measured, with the card's line across."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.estimate import CATEGORIES
from finetune.rungs import CACHED, GIB

if TYPE_CHECKING:
    from pathlib import Path

    from finetune.rungs import Ladder, Rung

# Okabe and Ito's colours, which people with any colour vision tell apart (https://jfly.uni-koeln.de/color/).
COLOURS = {
    "weights": "#0072B2",
    "constants": "#56B4E9",
    "adapters": "#CC79A7",
    "gradients": "#E69F00",
    "optimizer": "#D55E00",
    "activations": "#009E73",
    "logits": "#F0E442",
    "workspace": "#999999",
    "context": "#555555",
    CACHED: "#DDDDDD",
}
LABELS = {
    "constants": "quantization constants",
    "optimizer": "optimizer state",
    "workspace": "workspace, temporaries",
    "context": "CUDA context",
    CACHED: "cached, not in use",
}
_HEIGHT = 0.36


def draw(ladder: Ladder, file: Path) -> None:
    """Draw the ladder into ``file``, PNG or SVG by its suffix."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings: dict[str, Any] = {"font.size": 10, "svg.hashsalt": "ladder", "svg.fonttype": "none"}
    with pyplot.rc_context(settings):
        figure, (whole, near) = pyplot.subplots(
            1, 2, sharey=True, figsize=(13, 1.6 + 0.62 * len(ladder.rungs)), width_ratios=(1.15, 1)
        )
        card = ladder.total_bytes / GIB
        _bars(whole, ladder, limit=1.35 * max(max(r.needed, r.expected) for r in ladder.rungs) / GIB)
        _bars(near, ladder, limit=1.5 * card)
        whole.set_yticks(range(len(ladder.rungs)), [rung.name for rung in ladder.rungs])
        whole.invert_yaxis()
        whole.set_title("whole", loc="left", fontsize=10, color="#555555")
        near.set_title(f"the same, up to {1.5 * card:.0f} GiB", loc="left", fontsize=10, color="#555555")
        figure.suptitle(
            f"What a training step of {ladder.model} needs, and the {ladder.card}'s {card:.1f} GiB"
            f"  (seq {ladder.seq}, micro-batch {ladder.micro_batch})",
            fontsize=13,
            x=0.01,
            ha="left",
        )
        handles = [
            pyplot.Rectangle((0, 0), 1, 1, color=COLOURS[name], label=LABELS.get(name, name))
            for name in (*CATEGORIES, CACHED)
        ]
        handles += [
            pyplot.Rectangle((0, 0), 1, 1, facecolor="#FFFFFF", edgecolor="#555555", hatch="///", label="arithmetic"),
            pyplot.Rectangle((0, 0), 1, 1, facecolor="#FFFFFF", edgecolor="#555555", label="measured (dry GPU)"),
        ]
        figure.legend(handles=handles, loc="lower center", ncols=6, frameon=False, fontsize=9)
        figure.tight_layout(rect=(0, 0.09, 1, 0.97))
        # Without a date, so that the same figures give the same file.
        metadata: dict[str, Any] = {"Date": None} if file.suffix == ".svg" else {"Software": None}
        figure.savefig(file, dpi=130, metadata=metadata)
        pyplot.close(figure)


def _bars(axes: Any, ladder: Ladder, *, limit: float) -> None:
    card = ladder.total_bytes / GIB
    for row, rung in enumerate(ladder.rungs):
        _bar(axes, row - _HEIGHT / 2, rung.arithmetic, hatched=True)
        _bar(axes, row + _HEIGHT / 2, rung.measured, hatched=False)
        _figure(axes, row - _HEIGHT / 2, rung.expected / GIB, limit, "", "#555555")
        _figure(axes, row + _HEIGHT / 2, rung.needed / GIB, limit, _note(rung), "#007755" if rung.fits else "#B03A00")
    axes.axvline(card, color="#C00000", linewidth=1.4, zorder=4)
    axes.text(card, -0.62, f" {ladder.card}", color="#C00000", fontsize=9, va="bottom")
    axes.set_xlim(0, limit)
    axes.set_ylim(-0.7, len(ladder.rungs) - 0.4)
    axes.set_xlabel("GiB")
    axes.xaxis.grid(visible=True, color="#EEEEEE", zorder=0)
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


def _figure(axes: Any, y: float, size: float, limit: float, note: str, colour: str) -> None:
    """The bar's total, at its end or, where the bar nearly leaves the picture, inside it."""
    inside = size > 0.8 * limit
    x = min(size, limit) - limit * 0.005 if inside else size + limit * 0.008
    text = f"{size:.1f}{note}" + (" ▸" if size > limit else "")
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85}
    axes.text(x, y, text, va="center", ha="right" if inside else "left", fontsize=8.5, color=colour, bbox=box, zorder=5)


def _note(rung: Rung) -> str:
    return "  fits" if rung.fits else "  does not fit"
