"""Files, folders, modules, functions and links that a page names exist: a rename that forgets the pages fails here."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "docs"
PACKAGES = ("pytest_vram", "finetune")
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
CODE = re.compile(r"`([^`\n]+)`")
FILE = re.compile(r"(?:pytest_vram|finetune|tests|examples|benchmarks|docs)/[\w./-]*")
PLACE = re.compile(r"`([\w/]+\.py)`: `([\w.]+)`")
"""A file, and what is defined in it: `finetune/cli.py`: `parse`."""
MODULE = re.compile(r"(?:pytest_vram|finetune)(?:\.\w+)+")
REFERENCE = re.compile(r"^::: (\S+)$", re.MULTILINE)
"""A module or what it defines, whose docstring the reference shows."""
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")


def definitions(path: Path) -> set[str]:
    """Names that a module binds or defines at its top, and ``Class.name`` for what its classes define."""
    tree = ast.parse(path.read_text())
    found = {
        alias.asname or alias.name.partition(".")[0]
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
            if isinstance(node.value, ast.Dict):  # names that a package imports lazily
                found |= {key.value for key in node.value.keys if isinstance(key, ast.Constant)}
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


def module_exists(name: str) -> bool:
    """Whether the dotted name is a module, or something that one defines."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        for root in (ROOT, ROOT / "tests"):  # the reference codec is a package of the tests
            folder = root.joinpath(*parts[:length])
            path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
            if path.is_file():
                return length == len(parts) or ".".join(parts[length:]) in definitions(path)
    return False


def prose(page: Path) -> str:
    """The page's text without its fenced blocks, which the tests of the documentation run."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_a_page_names_exists(page: Path) -> None:
    text = prose(page)
    wrong = []
    for words in CODE.findall(text):
        wrong += [path for path in FILE.findall(words) if not (ROOT / path.rstrip(".")).exists()]
        wrong += [name for name in MODULE.findall(words) if not module_exists(name) and not name.endswith(".py")]
    for path, name in PLACE.findall(text):
        if (ROOT / path).is_file() and name not in definitions(ROOT / path):
            wrong.append(f"{path}: {name}")
    wrong += [name for name in REFERENCE.findall(text) if not module_exists(name)]
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    wrong = []
    for target, anchor in LINK.findall(prose(page)):
        other = page.parent / target if target else page
        if not other.exists() or (SITE in page.parents and SITE not in other.resolve().parents):
            wrong.append(target)  # the built documentation holds docs/ alone
        elif anchor and anchor not in anchors(other):
            wrong.append(f"{target}#{anchor}")
    assert wrong == []


def test_the_built_pages_show_roles_of_sphinx_as_plain_names() -> None:
    page = "<p>see :func:<code>load</code> and :class:<code>~pytest_vram.memory.Peak</code></p>"
    hooks = runpy.run_path(str(SITE / "hooks.py"))
    assert hooks["on_page_content"](page, page=None) == "<p>see <code>load</code> and <code>Peak</code></p>"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_table_has_a_bar_in_code(page: Path) -> None:
    """GitHub shows it as a bar, and the built pages as a backslash and a bar."""
    assert [line for line in prose(page).splitlines() if re.search(r"`[^`]*\\\|[^`]*`", line)] == []


def test_classes_that_the_architecture_names_have_these_methods() -> None:
    known = {name for package in PACKAGES for path in (ROOT / package).rglob("*.py") for name in definitions(path)}
    named = re.findall(r"`([A-Z]\w+\.\w+)`", prose(ROOT / "ARCHITECTURE.md"))
    assert len(named) >= 5
    assert [name for name in named if name not in known and not (ROOT / name).exists()] == []


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as mkdocs and GitHub write them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
