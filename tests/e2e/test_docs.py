"""Every code block of the README, the documentation and the examples runs, page by page, in a folder of its own.

The folder is empty; for an example it holds a copy of the example. A fenced block with a ``title="file"`` is written to
that file. A ``console`` block runs each line that starts with ``$ ``; the other lines are output that must appear, in
order, with ``...`` for whatever varies. A comment before a block changes it: ``<!-- exit: 1 -->`` for a command that
must fail so, ``<!-- not run: why -->`` for what cannot run here.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("README.md")),
]
BLOCK = re.compile(
    r"(?:<!-- (?P<note>[^>]*?) -->\n+)?^(?P<indent> *)```(?P<language>\w+)(?P<info>[^\n]*)\n(?P<body>.*?)^ *```$",
    re.DOTALL | re.MULTILINE,
)
TITLE = re.compile(r'title="([^"]+)"')


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    language: str
    title: str | None
    note: str
    body: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = []
    for match in BLOCK.finditer(text):
        indent = len(match["indent"])
        body = "".join(line[indent:] if line.strip() else line for line in match["body"].splitlines(keepends=True))
        title = TITLE.search(match["info"])
        found.append(
            Block(
                language=match["language"],
                title=title[1] if title else None,
                note=match["note"] or "",
                body=body,
                line=text.count("\n", 0, match.start("body")),
            )
        )
    return found


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    binaries = str(Path(sys.executable).parent)
    env = {**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "120", "NO_COLOR": "1"}
    env["PYTEST_ADDOPTS"] = "-p no:asyncio"  # says at every start that a setting is not set
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=1800,
    )


def expect(output: str, wanted: list[str], where: str) -> None:
    position = 0
    for line in wanted:
        pattern = re.compile(".*?".join(re.escape(part) for part in re.split(r"\.\.\.|…", line.strip())))
        match = pattern.search(output, position)
        assert match, f"{where}: the output lacks {line!r} (in this order). It was:\n{output}"
        position = match.end()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_block_of_the_page_runs(page: Path, tmp_path: Path) -> None:
    if page.parent.parent == ROOT / "examples":
        shutil.copytree(page.parent, tmp_path, dirs_exist_ok=True)
    ran = 0
    for block in blocks(page):
        where = f"{page.relative_to(ROOT)}:{block.line}"
        if block.note.startswith("not run: "):
            continue
        if block.title is not None:
            target = tmp_path / block.title
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(block.body)
        elif block.language == "console":
            wanted_exit = int(block.note.removeprefix("exit: ")) if block.note.startswith("exit: ") else 0
            for part in re.split(r"^\$ ", block.body, flags=re.MULTILINE)[1:]:
                command, *wanted = part.splitlines()
                done = run(command, tmp_path)
                assert done.returncode == wanted_exit, (
                    f"{where}: `{command}` ended with {done.returncode}:\n{done.stdout}"
                )
                expect(done.stdout, [line for line in wanted if line.strip()], where)
        elif block.language == "python":
            done = run(f"{sys.executable} - <<'END_OF_BLOCK'\n{block.body}\nEND_OF_BLOCK", tmp_path)
            assert done.returncode == 0, f"{where}:\n{done.stdout}"
        else:
            assert block.language in {
                "text",
                "tree",
                "mermaid",
            }, f"{where}: a {block.language} block needs a title or a 'not run: why' note"
            continue
        ran += 1
    assert (
        ran or page.name in {"index.md", "limits.md"} or {"explanation", "reference", "other_tools"} & set(page.parts)
    ), f"{page} has no block that runs"
