"""Writes what is kept on purpose and compared by tests: the report's schema, and one report in every format.

    python tests/golden/regenerate.py            write
    python tests/golden/regenerate.py --check    exit 1, with a diff, where a file is not what would be written

Read the diff before committing it: a changed golden file is a change that users see.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import sys
import types
import typing
from pathlib import Path
from typing import Any

from pytest_vram import memory
from pytest_vram.ci import comment
from pytest_vram.report import files, terminal

sys.path.insert(0, str(Path(__file__).parent))
import sample

HERE = Path(__file__).parent
VERDICTS = {"within": memory.Within, "exceeded": memory.Exceeded, "unmeasured": memory.Unmeasured}


def contents() -> dict[Path, str]:
    """What each file should hold."""
    report = sample.report()
    wanted = {files.SCHEMA_FILE: json.dumps(schema(), indent=2) + "\n"}
    for width in (60, 100, 160):
        wanted[HERE / f"terminal_{width}.txt"] = terminal.render(report, width=width) + "\n"
    wanted[HERE / "terminal_verbose_color.txt"] = terminal.render(report, width=100, color=True, verbosity=1) + "\n"
    wanted[HERE / "terminal_quiet.txt"] = terminal.render(sample.many(), width=80, verbosity=-1) + "\n"
    wanted[HERE / "report.json"] = files.to_json(report)
    wanted[HERE / "report.md"] = files.markdown.render(report)
    wanted[HERE / "report.csv"] = files.to_csv(report)
    wanted[HERE / "comment.md"] = comment.render(sample.change())
    wanted[HERE / "comment_first.md"] = comment.render(sample.first_change())
    return wanted


def schema() -> dict[str, Any]:
    """The JSON schema of a report, out of the types and their docstrings."""
    definitions: dict[str, Any] = {}
    top = _hint(memory.Report, definitions)
    definitions["Report"]["properties"]["schema_version"] = {"const": memory.report.SCHEMA_VERSION}
    definitions["Report"]["required"].insert(0, "schema_version")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "pytest-vram report",
        "description": "Sizes are whole bytes. A field that is absent holds its default: null, 0, false or empty.",
        **top,
        "$defs": dict(sorted(definitions.items())),
    }


def _hint(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_hint(argument, definitions) for argument in arguments]}
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return {"type": "array", "items": _hint(arguments[0], definitions)}
        return {
            "type": "array",
            "prefixItems": [_hint(argument, definitions) for argument in arguments],
            "minItems": len(arguments),
            "maxItems": len(arguments),
        }
    if dataclasses.is_dataclass(hint):
        name = hint.__name__
        if name not in definitions:
            definitions[name] = {}
            definitions[name] = _dataclass(hint, definitions)
        return {"$ref": f"#/$defs/{name}"}
    names = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
    return {"type": names[hint]}


def _dataclass(cls: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    hints, fields = typing.get_type_hints(cls), dataclasses.fields(cls)
    documented = _documented(cls)
    properties = {}
    for field in fields:
        properties[field.name] = _hint(hints[field.name], definitions)
        if field.name in documented:
            properties[field.name]["description"] = documented[field.name]
    required = [field.name for field in fields if field.default is dataclasses.MISSING]
    tag = next((name for name, kind in VERDICTS.items() if kind is cls), None)
    if tag is not None:
        properties = {"verdict": {"const": tag}, **properties}
        required.insert(0, "verdict")
    doc = inspect.getdoc(cls) or ""
    return {
        "type": "object",
        "description": " ".join(doc.split("\n\n")[0].split()),
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _documented(cls: type) -> dict[str, str]:
    """Field -> what the ``Attributes`` of the docstring say of it."""
    doc = (inspect.getdoc(cls) or "").partition("Attributes:\n")[2]
    found: dict[str, str] = {}
    name = ""
    for line in doc.splitlines():
        if line.startswith("    ") and not line.startswith("     "):
            name, _, text = line.strip().partition(": ")
            found[name] = text
        elif line.startswith("     ") and name:
            found[name] += " " + line.strip()
    return found


def main() -> int:
    """Write the files, or with ``--check`` say what is different."""
    check, different = "--check" in sys.argv[1:], 0
    for path, wanted in contents().items():
        found = path.read_text(encoding="utf-8") if path.exists() else ""
        if found == wanted:
            continue
        different += 1
        if check:
            lines = difflib.unified_diff(found.splitlines(), wanted.splitlines(), f"{path.name}", "now", lineterm="")
            print("\n".join(list(lines)[:60]))
        else:
            path.write_text(wanted, encoding="utf-8")
            print(f"written: {path}")
    return int(check and different > 0)


if __name__ == "__main__":
    sys.exit(main())
