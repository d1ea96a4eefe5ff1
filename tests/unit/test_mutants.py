"""The planted bugs of ``tests/mutation.py`` still fit the code: each module has five, and each changes what it says."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
PLANTED = (ROOT / "finetune", TESTS / "reference")
sys.path.insert(0, str(TESTS))

from mutants import MUTANTS  # noqa: E402

MODULES = {
    path.relative_to(ROOT).with_suffix("").as_posix()
    for folder in PLANTED
    for path in folder.rglob("*.py")
    if path.name != "__main__.py" and len(ast.parse(path.read_text()).body) > 1  # a package's docstring has no bugs
}


def test_every_module_has_five() -> None:
    assert MODULES - set(MUTANTS) == set(), "plant five bugs in these, in tests/mutants"
    assert set(MUTANTS) - MODULES == set(), "these modules are gone: take their bugs out of tests/mutants"
    assert {module for module, (_, bugs) in MUTANTS.items() if len(dict(bugs)) < 5} == set()


@pytest.mark.parametrize("module", sorted(MUTANTS))
def test_each_is_one_change_of_code_that_is_there(module: str) -> None:
    tests, bugs = MUTANTS[module]
    source = (ROOT / f"{module}.py").read_text()
    for old, new in bugs:
        assert source.count(old) == 1, (
            f"{module}.py holds {old!r} {source.count(old)} times: bring tests/mutants up to date"
        )
        assert ast.dump(ast.parse(source.replace(old, new))) != ast.dump(ast.parse(source)), new
    for test in tests:
        assert (ROOT / test.partition("::")[0]).is_file(), test
