"""Render the HTML page, and those of its parts that do not need JavaScript."""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from importlib.resources import files
from typing import TYPE_CHECKING

from pytest_vram.report.html.data import page_data
from pytest_vram.report.html.sections import tables_below, text
from pytest_vram.report.rows import Row, change_text, row_change, rows
from pytest_vram.units import format_bytes

if TYPE_CHECKING:
    from pytest_vram.memory import Report

KINDS = {
    "cuda": "measured on the GPU",
    "dry": "PyTorch's own allocator over a stub driver; nothing was computed",
    "host": "traced on the CPU: tensor bytes, rounded as the CUDA allocator rounds them",
    "nvml": "whole device, sampled by NVML",
    "accelerator": "measured on the accelerator",
}
_SCRIPTS = ("chart.js", "treemap.js", "segments.js", "detail.js", "table.js")
_WORDS = {"exceeded": "over budget", "within": "within budget", "unmeasured": "not measured", "none": "no budget"}
_NOTICED = 5  # the most tests that the notice at the top names


def render(report: Report, before: Report | None = None) -> str:
    """Return the report as one HTML file.

    Args:
        report: the report to show.
        before: an earlier report, to show the growth since then.
    """
    table = rows(report)
    title = text(table[0].nodeid) if len(table) == 1 else f"{len(table):,} tests"
    style = _resource("style.css") + _lengths() + _labels(_heads(report, table))
    script = '"use strict";\n(() => {\n' + "\n".join(_resource(name) for name in _SCRIPTS) + "\n})();\n"
    data = json.dumps(page_data(report, before), ensure_ascii=False, separators=(",", ":"))
    # Neither "</script>" nor "<!--" may end or change the element; JSON reads \u003c as "<".
    data = data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    policy = (
        f"default-src 'none'; style-src 'sha256-{_digest(style)}'; script-src 'sha256-{_digest(script)}';"
        " base-uri 'none'; form-action 'none'"
    )
    body = [_session(report, table), _notice(report, table), _controls(), _table(report, table)]
    body += tables_below(report, before, table)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<meta name="generator" content="pytest-vram">\n'
        f"<title>GPU memory: {title}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + f'\n<script type="application/json" id="data">{data}</script>\n<script>{script}</script>\n</body>\n</html>\n'
    )


def _session(report: Report, table: list[Row]) -> str:
    counts = Counter(row.verdict for row in table)
    failed = sum(row.outcome == "failed" for row in table)
    environment = report.environment
    devices = Counter(f"{d.name}, {format_bytes(d.total_bytes)}" for d in environment.devices)
    names = [f"{count} x {name}" if count > 1 else name for name, count in devices.items()]
    versions = [("Python", environment.python), ("torch", environment.torch), ("CUDA", environment.cuda)]
    versions += [("driver", environment.driver), ("allocator", environment.allocator_conf)]
    facts = [*names, *(f"{name} {value}" for name, value in versions if value)]
    kinds = list(dict.fromkeys(row.kind for row in table if row.kind))
    chips = [("test" if len(table) == 1 else "tests", len(table), ""), ("failed", failed, "bad" if failed else "")]
    chips += [(_WORDS[v], counts[v], s) for v, s in (("exceeded", "bad"), ("within", "good"), ("unmeasured", "odd"))]
    return (
        "<header>\n<h1>GPU memory</h1>\n"
        f'<p class="facts">{" · ".join(text(fact) for fact in facts)}</p>\n'
        + "".join(f'<p class="kind"><b>{kind}</b> {text(KINDS[kind])}</p>\n' for kind in kinds)
        + '<ul class="chips">'
        + "".join(f'<li class="{s}"><b>{count:,}</b> {word}</li>' for word, count, s in chips if count or not s)
        + "</ul>\n</header>"
    )


def _notice(report: Report, table: list[Row]) -> str:
    """Render a notice of the tests that grew since the baseline."""
    if report.baseline is None:
        return ""
    source, tolerance = text(report.baseline.source), f"{report.baseline.tolerance_percent:g}%"
    grown = sorted((i for i, row in enumerate(table) if row.regressed), key=lambda i: -(table[i].change_bytes or 0))
    known = sum(row.change_bytes is not None for row in table)
    if not grown:
        words = f"No test grew by more than {tolerance} over {source}" if known else f"No test has an entry in {source}"
        return f'<p class="notice">{words}{f": {known:,} compared" if known else ""}.</p>'
    links = "".join(
        f'<li><b class="grew">{change_text(table[i].change_bytes)}</b> <a href="#t{i}">{text(table[i].nodeid)}</a></li>'
        for i in grown[:_NOTICED]
    )
    more = f"<li>and {len(grown) - _NOTICED} more: sort by change</li>" if len(grown) > _NOTICED else ""
    noun = "test needs" if len(grown) == 1 else "tests need"
    return (
        f'<div class="notice bad"><p><b>{len(grown):,} {noun} over {tolerance} more</b> than in {source}</p>'
        f"<ul>{links}{more}</ul></div>"
    )


def _controls() -> str:
    options = "".join(f'<option value="{value}">{word}</option>' for value, word in _WORDS.items())
    return (
        '<form id="controls" hidden><label>Find <input id="find" type="search" placeholder="part of a name"'
        ' autocomplete="off"></label><label>Show <select id="show"><option value="">all</option>'
        '<option value="failed">failed</option><option value="regressed">grew</option>'
        f'{options}</select></label><output id="shown"></output></form>'
    )


def _table(report: Report, table: list[Row]) -> str:
    if not table:
        return '<p class="empty">No test was measured.</p>'
    heads = _heads(report, table)
    head = "".join(f'<th scope="col" class="{style}" data-key="{key}">{word}</th>' for key, word, style in heads)
    body = "".join(_row(row, index, heads[1:]) for index, row in enumerate(table))
    return (
        f'<div class="scroll"><table id="tests"><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'
        '<p class="empty" id="none" hidden>No test matches.</p>'
    )


def _heads(report: Report, table: list[Row]) -> list[tuple[str, str, str]]:
    """Return key, title and CSS class of each column; a narrow screen leaves out the head of class ``w``."""
    heads = [("name", "Test", ""), ("peak", "Peak", "n")]
    heads += [("before", "Before", "n w"), ("change", "Change", "n")] if report.baseline is not None else []
    heads += [("fixtures", "Fixtures", "n w")] if any(row.fixtures_bytes for row in table) else []
    heads += [("budget", "Budget", "n w"), ("used", "Used", "u")] if any(row.budget_bytes for row in table) else []
    heads += [("kind", "Kind", "w")] if len({row.kind for row in table}) > 1 else []
    return heads


def _labels(heads: list[tuple[str, str, str]]) -> str:
    """Return the style that writes a column's title into its cells where a narrow screen leaves out the head."""
    rules = (
        f'#tests td.w:nth-child({place})::before{{content:"{word} "}}'
        for place, (_, word, style) in enumerate(heads, start=1)
        if "w" in style.split()
    )
    return f"@media (max-width:700px){{{''.join(rules)}}}"


def _row(row: Row, index: int, heads: list[tuple[str, str, str]]) -> str:
    state = "bad" if row.outcome == "failed" or row.verdict == "exceeded" or row.regressed else ""
    state = state or {"within": "good", "unmeasured": "odd"}.get(row.verdict, "")
    title = _WORDS[row.verdict] + (f": {row.reason}" if row.reason else "")
    cells = {
        "peak": format_bytes(row.peak_bytes),
        "before": "" if row.baseline_bytes is None else format_bytes(row.baseline_bytes),
        "change": _changed(row),
        "fixtures": format_bytes(row.fixtures_bytes) if row.fixtures_bytes else "",
        "budget": "" if row.budget_bytes is None else format_bytes(row.budget_bytes),
        "used": _bar(row.used),
        "kind": row.kind or "",
    }
    return (
        f'<tr id="t{index}" class="{state}"><th scope="row"><a href="#t{index}" title="{text(title)}">'
        f"{text(row.nodeid)}</a></th>"
        + "".join(f'<td class="{style}">{cells[key]}</td>' for key, _, style in heads)
        + "</tr>"
    )


def _changed(row: Row) -> str:
    if not (change := row_change(row)):
        return ""
    style = "grew" if row.regressed else "shrank" if (row.change_bytes or 0) < 0 else "soft"
    return f'<span class="{style}">{change}</span>'


def _bar(used: float | None) -> str:
    """Render percent and a bar; its length is a CSS class, because the page's policy forbids style attributes."""
    if used is None:
        return ""
    filled = round(min(1.5, max(0.0, used)) * 50) * 2
    percent = f"{used * 100:.0f}%" if used < 10 else "&gt;999%"
    return f'<span>{percent}</span><i class="p{filled}"></i>'


def _lengths() -> str:
    return "".join(f".p{percent}{{--p:{percent / 1.5:.4g}%}}" for percent in range(0, 152, 2))


def _resource(name: str) -> str:
    return files("pytest_vram.report.html").joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
