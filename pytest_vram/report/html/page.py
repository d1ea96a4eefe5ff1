"""The page: head, session, table and the rest that is there without JavaScript."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections import Counter
from importlib.resources import files
from typing import TYPE_CHECKING

from pytest_vram.report.html.data import page_data
from pytest_vram.report.rows import Row, rows
from pytest_vram.units import format_bytes

if TYPE_CHECKING:
    from pytest_vram.memory import Report

KINDS = {
    "cuda": "measured on the GPU",
    "dry": "PyTorch's own allocator over a stub driver: exact to the byte, and nothing was computed",
    "host": "traced on the CPU: tensor bytes, rounded as the CUDA allocator rounds them",
    "nvml": "whole device, sampled by NVML",
    "accelerator": "measured on the accelerator",
}
_SCRIPTS = ("chart.js", "treemap.js", "detail.js", "table.js")
_WORDS = {"exceeded": "over budget", "within": "within budget", "unmeasured": "not measured", "none": "no budget"}
_MOST = 50  # rows of a side table


def render(report: Report, before: Report | None = None) -> str:
    """The report as one HTML file.

    Args:
        report: what to show.
        before: an earlier report, to say what grew since.
    """
    table = rows(report)
    style = _resource("style.css")
    script = '"use strict";\n(() => {\n' + "\n".join(_resource(name) for name in _SCRIPTS) + "\n})();\n"
    data = json.dumps(page_data(report, before), ensure_ascii=False, separators=(",", ":"))
    # Neither "</script>" nor "<!--" may end or change the element; JSON reads \u003c as "<".
    data = data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    policy = (
        f"default-src 'none'; style-src 'sha256-{_digest(style)}'; script-src 'sha256-{_digest(script)}';"
        " base-uri 'none'; form-action 'none'"
    )
    body = [_session(report, table), _controls(), _table(table)]
    body += [_compared(report, before)] if before is not None else []
    body += [_bill(table), _leaks(table), _reads(table)]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<meta name="generator" content="pytest-vram">\n'
        f"<title>GPU memory: {len(table)} tests</title>\n<style>{style}</style>\n</head>\n<body>\n"
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
        f'<p class="facts">{" · ".join(_text(fact) for fact in facts)}</p>\n'
        + "".join(f'<p class="kind"><b>{kind}</b> {_text(KINDS[kind])}</p>\n' for kind in kinds)
        + '<ul class="chips">'
        + "".join(f'<li class="{s}"><b>{count}</b> {word}</li>' for word, count, s in chips if count or not s)
        + "</ul>\n</header>"
    )


def _controls() -> str:
    options = "".join(f'<option value="{value}">{word}</option>' for value, word in _WORDS.items())
    return (
        '<form id="controls" hidden><label>Find <input id="find" type="search" placeholder="part of a name"'
        ' autocomplete="off"></label><label>Show <select id="show"><option value="">all</option>'
        f'<option value="failed">failed</option>{options}</select></label><output id="shown"></output></form>'
    )


def _table(table: list[Row]) -> str:
    heads = [("name", "Test", ""), ("peak", "Peak", "n"), ("fixtures", "Fixtures", "n w")]
    heads += [("budget", "Budget", "n"), ("used", "Used", "u"), ("kind", "Kind", "w")]
    head = "".join(f'<th scope="col" class="{style}" data-key="{key}">{word}</th>' for key, word, style in heads)
    body = "\n".join(_row(row, index) for index, row in enumerate(table))
    return (
        f'<div class="scroll"><table id="tests"><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'
    )


def _row(row: Row, index: int) -> str:
    state = "bad" if row.outcome == "failed" or row.verdict == "exceeded" else ""
    state = state or {"within": "good", "unmeasured": "odd"}.get(row.verdict, "")
    title = _WORDS[row.verdict] + (f": {row.reason}" if row.reason else "")
    fixtures = format_bytes(row.fixtures_bytes) if row.fixtures_bytes else ""
    budget = "" if row.budget_bytes is None else format_bytes(row.budget_bytes)
    return (
        f'<tr id="t{index}" class="{state}"><th scope="row"><a href="#t{index}" title="{_text(title)}">'
        f'{_text(row.nodeid)}</a></th><td class="n">{format_bytes(row.peak_bytes)}</td><td class="n w">{fixtures}</td>'
        f'<td class="n">{budget}</td><td class="u">{_bar(row.used)}</td><td class="w">{row.kind or ""}</td></tr>'
    )


def _bar(used: float | None) -> str:
    if used is None:
        return ""
    filled = round(min(1.0, max(0.0, used)) * 100)
    return f'<svg viewBox="0 0 100 9"><rect width="{filled}" height="9"/></svg> {used * 100:.0f}%'


def _side(title: str, heads: list[str], body: list[list[str]], *, opened: bool = False) -> str:
    """A folded table; the first column is text, and the others as they come."""
    if not body:
        return ""
    head = "".join(f"<th>{_text(word)}</th>" for word in heads)
    lines = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in cells)}</tr>" for cells in body[:_MOST])
    more = f"<p>and {len(body) - _MOST} more</p>" if len(body) > _MOST else ""
    return (
        f"<details{' open' if opened else ''}><summary>{_text(title)} ({len(body)})</summary>"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>{more}</details>'
    )


def _bill(table: list[Row]) -> str:
    sizes: dict[tuple[str, str], list[int]] = {}
    for row in table:
        for share in row.fixtures:
            sizes.setdefault((share.name, share.scope), []).append(share.size_bytes)
    found = sorted(sizes.items(), key=lambda item: (-max(item[1]), item[0]))
    body = [[name, scope, format_bytes(max(held)), str(len(held))] for (name, scope), held in found]
    return _side("What fixtures hold", ["fixture", "scope", "holds", "tests"], body)


def _leaks(table: list[Row]) -> str:
    leaking = sorted((row for row in table if row.leaked_bytes), key=lambda row: -(row.leaked_bytes or 0))
    body = [[row.nodeid, format_bytes(row.leaked_bytes)] for row in leaking]
    return _side("Left behind", ["test", "bytes"], body, opened=True)


def _reads(table: list[Row]) -> str:
    counts: Counter[tuple[str, str, str]] = Counter()
    for row in table:
        for read in row.host_reads:
            counts[read.location, read.operation, "answered" if read.answered else "a guess"] += read.count
    body = [[*place, str(count)] for place, count in counts.most_common()]
    return _side("Values read back from the dry GPU", ["line", "operation", "value", "times"], body)


def _compared(report: Report, before: Report | None) -> str:
    from pytest_vram import baseline

    if before is None:
        return ""
    old, new = baseline.peaks(before, failed=True), baseline.peaks(report, failed=True)
    changes = baseline.compare(report, old, 0)
    body = [
        [c.nodeid, format_bytes(c.before_bytes), format_bytes(c.after_bytes), f"{c.percent:+.1f}%"]
        for c in (*changes.regressed, *reversed(changes.improved))
    ]
    body += [[name, "", format_bytes(max(new[name].values())), "new"] for name in sorted(set(new) - set(old))]
    body += [[name, format_bytes(max(old[name].values())), "", "gone"] for name in sorted(set(old) - set(new))]
    heads = ["test", "before", "after", "change"]
    return _side("Against the earlier run", heads, body, opened=True) or "<p>No peak changed since the earlier run.</p>"


def _resource(name: str) -> str:
    return files("pytest_vram.report.html").joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _text(text: object) -> str:
    return html.escape(str(text), quote=True)
