"""Where a planted bug goes: an expression or statement of one function, found in the syntax tree.

Comments, line breaks and other functions may change without a bug losing its place.
"""

from __future__ import annotations

import ast
import textwrap
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Bug:
    """One planted bug."""

    place: str
    """Qualified name of the function or class that the code stands in; empty for the module itself."""
    right: str
    """The code as it is: an expression, a statement, a signature or a keyword, as ``ast.unparse`` writes it.

    A statement that holds others may be named by its first line, such as ``if wrong:``; what it holds then stays.
    """
    wrong: str
    """What takes its place."""

    def __str__(self) -> str:
        return f"{self.place or 'module'}: {self.right!r} -> {self.wrong!r}"


class LostAnchorError(Exception):
    """The code of a bug is not there exactly once."""


def plant(source: str, bug: Bug) -> str:
    """Return a module's source with the bug in it, without comments.

    Raises:
        LostAnchorError: the place is not there, or the right code is not in it exactly once.
    """
    tree = ast.parse(source)
    spots = [spot for scope in scopes(tree, bug.place) for spot in spots_of(scope, bug.right)]
    if len(spots) != 1:
        raise LostAnchorError(f"{bug.place or 'the module'} has {bug.right!r} {len(spots)} times, not once")
    parent, name, index, node = spots[0]
    replaced = _with_body_of(node, bug.wrong) if bug.right.endswith(":") else _parsed(bug.wrong, node)
    if index is None:
        setattr(parent, name, replaced[0])
    else:
        getattr(parent, name)[index : index + 1] = replaced
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n"


def scopes(tree: ast.Module, place: str) -> list[ast.AST]:
    """Every function or class of that qualified name; the module for an empty one."""
    found: list[ast.AST] = [tree]
    for name in place.split(".") if place else ():
        found = [
            node
            for scope in found
            for node in _own_nodes(scope)
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.name == name
        ]
    return found


Spot = tuple[ast.AST, str, "int | None", ast.AST]
"""A node with its parent: parent, field, position in the field where that is a list, node."""


def spots_of(scope: ast.AST, text: str) -> list[Spot]:
    """Every node of a scope that reads as ``text``, with its parent; functions inside of the scope included."""
    wanted = textwrap.dedent(text).strip()
    found: list[Spot] = []
    for parent in ast.walk(scope):
        for name, value in ast.iter_fields(parent):
            items = list(enumerate(value)) if isinstance(value, list) else [(None, value)]
            for index, node in items:
                if isinstance(node, ast.AST) and not isinstance(node, ast.expr_context) and _reads_as(node, wanted):
                    found.append((parent, name, index, node))
    return [spot for spot in found if not _only_wraps(spot, found)]


def _reads_as(node: ast.AST, wanted: str) -> bool:
    text = ast.unparse(node)
    return text == wanted or (wanted.endswith(":") and hasattr(node, "body") and text.startswith(f"{wanted}\n"))


def _with_body_of(node: ast.AST, header: str) -> list[ast.AST]:
    """A statement with another first line, and the body of the one that is there."""
    if isinstance(node, ast.ExceptHandler):
        changed: ast.AST = ast.parse(f"try:\n    pass\n{header}\n    pass").body[0].handlers[0]  # type: ignore[attr-defined]  # the text says which node it is
    else:
        (changed,) = ast.parse(f"{header}\n    pass").body
    for name in ("body", "orelse"):
        if hasattr(node, name):
            setattr(changed, name, getattr(node, name))
    return [changed]


def _only_wraps(spot: Spot, found: list[Spot]) -> bool:
    """An expression statement reads as its expression does: the statement counts, and not both."""
    return isinstance(spot[0], ast.Expr) and any(other[3] is spot[0] for other in found)


def _own_nodes(scope: ast.AST) -> list[ast.AST]:
    """Nodes below a scope, but not those inside of the functions and classes in it."""
    found, todo = [], list(ast.iter_child_nodes(scope))
    while todo:
        node = todo.pop(0)
        found.append(node)
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            todo += ast.iter_child_nodes(node)
    return found


def _parsed(text: str, kind: ast.AST) -> list[ast.AST]:
    if isinstance(kind, ast.stmt):
        return list(ast.parse(textwrap.dedent(text)).body)
    if isinstance(kind, ast.expr):
        return [ast.parse(text.strip(), mode="eval").body]
    if isinstance(kind, ast.arguments):
        return [ast.parse(f"def f({text}): ...").body[0].args]  # type: ignore[attr-defined]  # the text says which node it is
    if isinstance(kind, ast.keyword):
        return [ast.parse(f"f({text})", mode="eval").body.keywords[0]]  # type: ignore[attr-defined]  # the text says which node it is
    if isinstance(kind, ast.comprehension):
        return [ast.parse(f"[0 {text}]", mode="eval").body.generators[0]]  # type: ignore[attr-defined]  # the text says which node it is
    raise LostAnchorError(f"a {type(kind).__name__} cannot be replaced")
