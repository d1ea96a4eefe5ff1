"""Render a trend as one HTML page that loads nothing and needs no JavaScript."""

from __future__ import annotations

import base64
import hashlib
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING

from pytest_vram.trend.growth import label
from pytest_vram.trend.text import growth_text
from pytest_vram.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_vram.trend.growth import Growth, PeakHistory, Point, Trend

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 900, 150, 90, 14, 24
_MOST_ROWS = 100


def render(trend: Trend, *, between: Callable[[str, str], int | None] = lambda a, b: None) -> str:
    """Return the page: for each test a curve over the commits, the growths, and a table.

    Args:
        trend: what to show.
        between: returns how many commits lie between two; ``None`` if that is unknown.
    """
    style = files("pytest_vram.trend").joinpath("page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    grown = sum(bool(series.growths) for series in trend.series)
    body = [
        "<h1>GPU memory over commits</h1>",
        f"<p>{len(trend.series)} test{'s' * (len(trend.series) != 1)}, of which {grown} grew.</p>",
        *(f'<p class="dim">{escape(remark)}</p>' for remark in trend.remarks),
        *(_section(series, between) for series in trend.series),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'sha256-{digest}'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="generator" content="pytest-vram">\n'
        f"<title>GPU memory over commits</title>\n<style>{style}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _section(series: PeakHistory, between: Callable[[str, str], int | None]) -> str:
    return "\n".join(
        [
            f"<section>\n<h2>{escape(series.nodeid)}</h2>",
            f'<p class="dim">{escape(series.card)}</p>',
            _curve(series),
            *(_growth(growth, between) for growth in series.growths),
            _table(series),
            "</section>",
        ]
    )


def _curve(series: PeakHistory) -> str:
    """Draw the peaks as a line with steps, from 0 to the largest, with a dot and a tooltip for each commit."""
    sizes = [point.entry.peak_bytes for point in series.points]
    top, grown = max(sizes), {id(growth.after) for growth in series.growths}
    width, height = _WIDTH - _LEFT - 10, _HEIGHT - _TOP - _BOTTOM
    xs = [_LEFT + (width * i / (len(sizes) - 1) if len(sizes) > 1 else width / 2) for i in range(len(sizes))]
    ys = [_TOP + height * (1 - size / top) for size in sizes]
    path = f"M{xs[0]:.1f} {ys[0]:.1f}" + "".join(f"H{x:.1f}V{y:.1f}" for x, y in zip(xs[1:], ys[1:], strict=True))
    dots = [
        f'<circle class="{"grown" if id(point) in grown else "point"}" cx="{x:.1f}" cy="{y:.1f}" r="4">'
        f"<title>{escape(_told(point))}</title></circle>"
        for point, x, y in zip(series.points, xs, ys, strict=True)
    ]
    bottom = _TOP + height
    ends = [f'<text class="axis" x="{_LEFT}" y="{_HEIGHT - 6}">{escape(label(series.points[0].session))}</text>']
    if len(sizes) > 1:
        last = escape(label(series.points[-1].session))
        ends.append(f'<text class="axis" x="{_WIDTH - 10}" y="{_HEIGHT - 6}" text-anchor="end">{last}</text>')
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="peak over {len(sizes)} commits">'
        f'<line class="frame" x1="{_LEFT}" x2="{_WIDTH - 10}" y1="{bottom}" y2="{bottom}"/>'
        f'<text class="axis" x="{_LEFT - 12}" y="{_TOP + 4}" text-anchor="end">{format_bytes(top)}</text>'
        f'<text class="axis" x="{_LEFT - 12}" y="{bottom + 4}" text-anchor="end">0</text>'
        f'<path class="step" d="{path}"/>{"".join(dots)}{"".join(ends)}</svg>'
    )


def _growth(growth: Growth, between: Callable[[str, str], int | None]) -> str:
    head, *rest = growth_text(growth, between)
    items = "".join(f"<li>{escape(line)}</li>" for line in rest)
    return f'<div class="growth"><b>{escape(head)}</b><ul>{items}</ul></div>'


def _table(series: PeakHistory) -> str:
    shown = series.points[::-1][:_MOST_ROWS]
    more = len(series.points) - len(shown)
    lines = [
        f'<tr><td>{escape(label(p.session))}</td><td class="size">{format_bytes(p.entry.peak_bytes)}</td>'
        f"<td>{escape((p.session.committed or p.session.at)[:10])}</td><td>{escape(p.session.subject)}</td></tr>"
        for p in shown
    ]
    rest = f'<p class="dim">and {more} earlier commits</p>' if more else ""
    head = "<tr><th>commit</th><th>peak</th><th>date</th><th>subject</th></tr>"
    return f"<details><summary>commits and peaks</summary><table>{head}{''.join(lines)}</table>{rest}</details>"


def _told(point: Point) -> str:
    return f"{label(point.session)} {point.session.subject}\n{format_bytes(point.entry.peak_bytes)}"
