"""Checks the rules of this repository: layers, file lengths, core types, and what an import may load."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("pytest_vram", "finetune")
MAX_LINES = 400

# A module may import from its own layer and from those below it (a smaller number).
LAYERS = {
    "pytest_vram.units": 0,
    "pytest_vram.errors": 0,
    "pytest_vram.torch_private": 1,
    "pytest_vram.code_owner": 1,
    "pytest_vram.process_memory": 1,
    "pytest_vram.process_end": 1,
    "pytest_vram.process_group": 1,
    "pytest_vram.launcher": 1,
    "pytest_vram.shapes": 1,
    "pytest_vram.memory": 1,
    "pytest_vram.probe": 2,
    "pytest_vram.drygpu": 2,
    "pytest_vram.standins": 2,
    "pytest_vram.report": 3,
    "pytest_vram.strategies": 3,
    "pytest_vram.baseline": 4,
    "pytest_vram.trend": 4,
    "pytest_vram.ci": 4,
    "pytest_vram.plugin": 4,
    "pytest_vram.commands": 4,
    "pytest_vram.cli": 5,
    "pytest_vram.notebook": 5,
    "pytest_vram.__main__": 6,
    "pytest_vram": 7,  # re-exports lazily
    "finetune.errors": 0,
    "finetune.launch": 0,
    "finetune.config": 1,
    "finetune.disk": 2,
    "finetune.patches": 2,
    "finetune.data": 3,
    "finetune.model": 4,
    "finetune.kernels": 5,
    "finetune.estimate": 5,
    "finetune.training": 6,
    "finetune.dryrun": 7,
    "finetune.ladder": 8,
    "finetune.cli": 8,
    "finetune.qlora": 9,
}


def modules() -> list[tuple[str, Path]]:
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


def imports(path: Path) -> set[str]:
    """Every module that a file imports, inside functions too, but not in ``if TYPE_CHECKING`` blocks."""
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return names


def layer(module: str) -> int:
    while module:
        if module in LAYERS:
            return LAYERS[module]
        module = module.rpartition(".")[0]
    raise KeyError(module)


@pytest.mark.parametrize(("module", "path"), [m for m in modules() if m[0] != "finetune"], ids=lambda v: str(v)[-60:])
def test_imports_point_down(module: str, path: Path) -> None:
    package = module.partition(".")[0]
    for name in imports(path):
        assert package == "finetune" or not name.startswith("finetune"), f"pytest_vram never imports finetune: {module}"
        if name.startswith(f"{package}.") and name != f"{package}.__version__":
            assert layer(name) <= layer(module), f"{module} imports {name}, which lies above it"


def test_no_imports_run_in_a_circle() -> None:
    names = {module for module, _ in modules()}

    def known(name: str) -> str:
        while name and name not in names:
            name = name.rpartition(".")[0]
        return name

    below = {module: {known(name) for name in imports(path)} - {"", module} for module, path in modules()}
    assert in_circles(below) == {}, "these import each other, or what does"


def in_circles(below: dict[str, set[str]]) -> dict[str, set[str]]:
    """What is in a circle or depends on one, with those of its dependencies that are too."""
    while done := {name for name, rest in below.items() if not rest}:
        below = {name: rest - done for name, rest in below.items() if name not in done}
    return below


def test_no_c_files_call_each_other_in_a_circle() -> None:
    comment = re.compile(r"/\*.*?\*/", re.DOTALL)
    texts = {p.name: comment.sub("", p.read_text()) for p in (ROOT / "pytest_vram/drygpu/native").glob("*.c")}
    definition = re.compile(r"^(?!static)[a-z][\w *]*?\b(dry_\w+|cu\w+)\s*\([^;{]*\)\s*\{", re.MULTILINE)
    home = {name: file for file, text in texts.items() for name in definition.findall(text)}
    assert len(home) > 300
    below = {
        file: {home[name] for name in re.findall(r"\b\w+(?=\()", text) if name in home} - {file}
        for file, text in texts.items()
    }
    assert in_circles(below) == {}, "these call each other, or what does"


def test_only_the_plugin_imports_pytest() -> None:
    guilty = [
        module
        for module, path in modules()
        if not module.startswith("pytest_vram.plugin")
        and any(n.split(".")[0] in {"pytest", "_pytest"} for n in imports(path))
    ]
    assert guilty == []


def test_no_module_imports_relatively() -> None:
    guilty = [
        module
        for module, path in modules()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert guilty == []


def test_no_file_is_too_long() -> None:
    sources = [
        p
        for top in (*PACKAGES, "tests", "examples", "benchmarks")
        for p in (ROOT / top).rglob("*")
        if p.suffix in {".py", ".c", ".h"}
    ]
    assert len(sources) > 40
    long = {str(p.relative_to(ROOT)): n for p in sources if (n := len(p.read_text().splitlines())) > MAX_LINES}
    assert long == {}


_WITHOUT_REASON = re.compile(r"type:\s+ignore(?!\[[a-z, -]+\]  # \S)|#\s+noqa(?!: [A-Z0-9, ]+ - \w)")


def test_every_silenced_warning_says_why() -> None:
    silent = [
        f"{path.relative_to(ROOT)}:{number}"
        for top in (*PACKAGES, "tests", "examples", "benchmarks")
        for path in sorted((ROOT / top).rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if _WITHOUT_REASON.search(line)
    ]
    assert silent == [], "write `# type: ignore[code]  # why` and `# noqa: CODE - why`"


def test_core_types_are_frozen_slotted_and_keyword_only() -> None:
    core = importlib.import_module("pytest_vram.memory")
    types = [t for t in vars(core).values() if dataclasses.is_dataclass(t) and isinstance(t, type)]
    assert len(types) >= 10
    for cls in types:
        parameters = cls.__dataclass_params__  # type: ignore[attr-defined]  # typeshed does not declare it
        assert parameters.frozen, f"{cls.__name__} is not frozen"
        assert "__slots__" in vars(cls), f"{cls.__name__} has no slots"
        assert all(f.kw_only for f in dataclasses.fields(cls)), f"{cls.__name__} takes positional arguments"


def test_configuration_is_frozen_and_documented() -> None:
    config = importlib.import_module("finetune.config.settings")
    tree = ast.parse((ROOT / "finetune/config/settings.py").read_text())
    for node in tree.body:
        if not isinstance(node, ast.ClassDef) or not dataclasses.is_dataclass(getattr(config, node.name)):
            continue
        cls = getattr(config, node.name)
        assert cls.__dataclass_params__.frozen
        assert "__slots__" in vars(cls)
        for here, after in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(here, ast.AnnAssign) and node.name != "RunConfig":
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert documented, f"{node.name}.{ast.unparse(here.target)} has no docstring"


@pytest.mark.parametrize("module", ["pytest_vram", "pytest_vram.plugin", "pytest_vram.cli", "pytest_vram.memory"])
def test_import_brings_in_neither_torch_nor_pynvml(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'pynvml', 'pandas', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_import_brings_in_no_pytest() -> None:
    code = "import sys, pytest_vram, pytest_vram.memory; print('pytest' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def sources() -> list[Path]:
    found = [p for package in PACKAGES for p in (ROOT / package).rglob("*") if p.suffix in {".py", ".c", ".h"}]
    return sorted(found, key=lambda p: (p.parent, p.name))


def summary(path: Path) -> str:
    """First sentence of a file's docstring or opening comment."""
    text = path.read_text()
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    else:
        text = re.sub(r"\n \*", " ", text.partition("*/")[0].removeprefix("/*"))
    first = re.split(r"(?<=\.)\s", " ".join(text.split()), maxsplit=1)[0]
    return first.rstrip(".")


def tree() -> str:
    lines: list[str] = []
    shown: set[Path] = set()

    def show(folder: Path) -> None:
        depth = len(folder.relative_to(ROOT).parts) - 1
        lines.append(f"{'  ' * depth}{folder.name}/")
        shown.add(folder)
        entries = [p for p in sources() if folder in p.parents]
        for child in sorted(
            {folder / p.relative_to(folder).parts[0] for p in entries}, key=lambda p: (p.is_dir(), p.name)
        ):
            if child.is_dir():
                show(child)
            else:
                lines.append(f"{'  ' * (depth + 1)}{child.name:<18} {summary(child)}".rstrip())

    for package in PACKAGES:
        show(ROOT / package)
    return "\n".join(lines) + "\n"


TREE = re.compile(r"(?<=```tree\n).*?(?=```)", re.DOTALL)


def test_tree_in_architecture_is_the_tree_on_disk() -> None:
    block = TREE.search((ROOT / "ARCHITECTURE.md").read_text())
    assert block, "ARCHITECTURE.md has no ```tree block"
    assert block[0] == tree(), "the tree is out of date: python tests/test_architecture.py writes it anew"


def test_layers_in_architecture_are_the_layers_that_are_checked() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    found = {}
    for package in PACKAGES:
        table = text.partition(f"| layer | `{package}` |\n")[2].partition("\n\n")[0]
        for number, names in re.findall(r"^\| (\d+) \| (.*) \|$", table, re.MULTILINE):
            for name in re.findall(r"`(\w+)/?`", names):
                found[name if name == package else f"{package}.{name}"] = int(number)
    assert found == LAYERS


if __name__ == "__main__":
    page = ROOT / "ARCHITECTURE.md"
    page.write_text(TREE.sub(lambda _: tree(), page.read_text()))
