"""Every patch of another library is in the table, its target exists, and its library has not reached the next look."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import pkgutil
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from finetune.patches.table import PATCHES, Patch

ROOT = Path(__file__).parents[4]
LIBRARIES = {
    "bitsandbytes": "bitsandbytes",
    "liger-kernel": "liger_kernel",
    "peft": "peft",
    "transformers": "transformers",
}
"""The package that each distribution contains."""
FILES = {"liger-kernel": "liger"}
"""Modules of finetune.patches that are not named as their library is."""


def problem(patch: Patch, installed: str) -> str | None:
    """Return why somebody has to look at a patch, or None."""
    if Version(installed) >= Version(patch.look_again_at):
        return (
            f"{patch.library} {installed} is installed: try whether {patch.where} may go, which it may when "
            f"{patch.may_go_when}. If it may not, raise its look_again_at"
        )
    if Version(installed) < Version(patch.since):
        return None
    place, _, attribute = patch.what.partition(":")
    try:
        found: Any = pkgutil.resolve_name(place)
    except (ImportError, AttributeError):
        return f"{patch.library} {installed} has no {place} any more: see whether {patch.where} may go"
    if attribute and attribute not in inspect.getsource(found):
        return f"{patch.library} {installed} has no {attribute} in {place} any more: see whether {patch.where} may go"
    return None


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: f"{patch.where}-{patch.what}"[-70:])
def test_each_patch_is_still_needed_and_still_fits(patch: Patch) -> None:
    pytest.importorskip(LIBRARIES[patch.library])
    if patch.library == "liger-kernel":
        try:
            importlib.import_module("liger_kernel.transformers")
        except RuntimeError as error:  # the Triton of torch 2.6 asks for a GPU as it is imported
            pytest.skip(f"liger-kernel cannot be imported: {error}")
    assert problem(patch, metadata.version(patch.library)) is None
    assert pkgutil.resolve_name(patch.where)


@pytest.mark.parametrize(
    ("changes", "installed", "expected"),
    [
        ({"look_again_at": "0.21"}, "0.21.2", "may go when it looks at the model"),
        ({"what": "peft.gone"}, "0.20", "has no peft.gone any more"),
        ({"what": "peft.nowhere.gone"}, "0.20", "has no peft.nowhere.gone any more"),
        ({"what": "peft.PeftModel:gone_attribute"}, "0.20", "has no gone_attribute in peft.PeftModel"),
    ],
)
def test_a_patch_whose_time_has_come_is_told(changes: dict[str, str], installed: str, expected: str) -> None:
    patch = next(patch for patch in PATCHES if patch.where.endswith("as_named"))
    found = problem(dataclasses.replace(patch, **changes), installed)  # type: ignore[arg-type]  # fields by name
    assert found is not None
    assert expected in found.replace("which it may when", "may go when")
    assert "finetune.patches.peft.as_named" in found


def test_what_a_library_has_not_yet_needs_no_look() -> None:
    patch = next(patch for patch in PATCHES if patch.where.endswith("as_named"))
    newer = dataclasses.replace(patch, what="peft.not_yet", since="0.19")
    assert problem(newer, "0.18.0") is None
    assert problem(newer, "0.19.0") is not None


@pytest.mark.parametrize("library", LIBRARIES)
def test_each_public_function_of_the_package_is_in_the_table(library: str) -> None:
    tree = ast.parse((ROOT / "finetune/patches" / f"{FILES.get(library, library)}.py").read_text())
    named = {patch.where.rpartition(".")[2] for patch in PATCHES if patch.library == library}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and node.name not in named:
            # These two use what another row of the table patches.
            assert node.name in {"start_magnitudes", "is_expert_parallel"}, f"{node.name} has no row in PATCHES"


def test_no_other_module_patches_these_libraries() -> None:
    """Classes are swapped, and private names of transformers' quantizers and experts are used, in one package only."""
    waiting = {"finetune/training/optim.py", "finetune/training/masters.py"}  # their rows are in the table
    private = {"_apply_gate", "_is_expert_parallel", "_process_model_before_weight_loading"}
    assigned = {"__class__", "support_avx512bf16_for_cpu", "threshold", "CB", "hf_quantizer", "is_quantized"}
    guilty: list[str] = []
    for path in sorted((ROOT / "finetune").rglob("*.py")):
        name = str(path.relative_to(ROOT))
        if name.startswith("finetune/patches/") or name in waiting:
            continue
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
        guilty += [
            f"{name}:{node.lineno} {node.attr}"
            for node in nodes
            if node.attr in private or (node.attr in assigned and isinstance(node.ctx, ast.Store))
        ]
    assert guilty == []
