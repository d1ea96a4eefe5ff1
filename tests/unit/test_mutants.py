"""The planted bugs of ``tests/mutation.py`` fit the code: each module has its share, and each changes the code."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
PLANTED = (ROOT / "finetune", TESTS / "reference")
sys.path.insert(0, str(TESTS))

from mutants import MUTANTS  # noqa: E402 - its folder is put on the path above
from mutants.anchor import Bug, LostAnchorError, plant  # noqa: E402 - as above

MODULES = {
    path.relative_to(ROOT).with_suffix("").as_posix()
    for folder in PLANTED
    for path in folder.rglob("*.py")
    if path.name != "__main__.py" and len(ast.parse(path.read_text()).body) > 1  # a package's docstring has no bugs
}


def test_every_module_has_its_share() -> None:
    """Five bugs, or one for each three statements of a module that has fewer than fifteen of them in its functions.

    Modules of pytest_vram may have bugs too, and need none.
    """
    assert MODULES - set(MUTANTS) == set(), "plant bugs in these, in tests/mutants"
    gone = {module for module in MUTANTS if not (ROOT / f"{module}.py").is_file()}
    assert gone == set(), "these modules are gone: take their bugs out of tests/mutants"
    short = {module for module, (_, bugs) in MUTANTS.items() if len(set(bugs)) < min(5, _statements(module) // 3)}
    assert short == set(), "plant more bugs in these"


def _statements(module: str) -> int:
    tree = ast.parse((ROOT / f"{module}.py").read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return sum(isinstance(node, ast.stmt) for function in functions for node in ast.walk(function))


@pytest.mark.parametrize("module", sorted(MUTANTS))
def test_each_is_one_change_of_code_that_is_there(module: str) -> None:
    tests, bugs = MUTANTS[module]
    source = (ROOT / f"{module}.py").read_text()
    for bug in bugs:
        assert ast.dump(ast.parse(plant(source, bug))) != ast.dump(ast.parse(source)), bug
    for test in tests:
        assert (ROOT / test.partition("::")[0]).is_file(), test


SOURCE = """
class Meter:
    def read(self, wide=False):
        # a comment, and a line that is broken
        if wide:
            return (self.low
                    + self.high)
        return self.low


def read(x):
    return x + x + 1
"""


def test_a_bug_is_found_whatever_the_layout_of_the_code() -> None:
    assert "return self.low - self.high" in plant(
        SOURCE, Bug("Meter.read", "self.low + self.high", "self.low - self.high")
    )


def test_a_statement_is_changed_by_its_first_line_and_keeps_what_it_holds() -> None:
    planted = plant(SOURCE, Bug("Meter.read", "if wide:", "if not wide:"))
    assert "if not wide:\n            return self.low + self.high" in planted


def test_a_default_is_changed_in_its_signature() -> None:
    assert "def read(self, wide=True)" in plant(SOURCE, Bug("Meter.read", "self, wide=False", "self, wide=True"))


@pytest.mark.parametrize(
    "bug", [Bug("read", "x", "y"), Bug("Meter.read", "self.middle", "0"), Bug("Meter.write", "self.low", "0")]
)
def test_a_bug_without_its_own_place_is_told(bug: Bug) -> None:
    with pytest.raises(LostAnchorError, match="times, not once"):
        plant(SOURCE, bug)
