"""Whose line of code this is: the user's, a library's, torch's, or this package's own."""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_vram import code_owner
from pytest_vram.code_owner import Frame, frames, innermost, owner, shown
from pytest_vram.probe.history import BACKWARD, user_line

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGES = sysconfig.get_path("purelib")
USER = Frame("/home/me/train.py", 3, "main")
LIBRARY = Frame(f"{PACKAGES}/peft/model.py", 5, "forward")
TORCH = Frame(f"{PACKAGES}/torch/nn/modules/linear.py", 7, "forward")
OWN = Frame(code_owner.__file__, 9, "owner")


@pytest.mark.parametrize(
    ("filename", "expected"),
    [
        ("/home/me/train.py", "user"),
        ("<stdin>", "user"),
        ("<string>", "user"),
        ("<ipython-input-3-0>", "user"),
        ("<frozen importlib._bootstrap>", "torch"),
        (json.__file__, "torch"),
        (f"{PACKAGES}/torch/nn/modules/linear.py", "torch"),
        (f"{PACKAGES}/torchvision/ops.py", "library"),
        (f"{PACKAGES}/peft/model.py", "library"),
        ("/home/me/.local/lib/python3.11/site-packages/peft/model.py", "library"),
        ("/usr/lib/python3/dist-packages/torch/nn/functional.py", "torch"),
        (code_owner.__file__, "own"),
    ],
)
def test_each_file_has_an_owner(filename: str, expected: str) -> None:
    assert owner(filename) == expected


def test_a_path_is_shown_below_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shown(str(tmp_path / "train.py")) == "train.py"
    assert shown(LIBRARY.filename) == "peft/model.py"
    assert shown("/usr/lib/python3/dist-packages/torch/nn/functional.py") == "torch/nn/functional.py"
    assert shown("/elsewhere/train.py") == "/elsewhere/train.py"
    assert shown("<stdin>") == "<stdin>"


def test_a_file_reached_through_a_link_is_the_same_file(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(os.path.dirname(json.__file__))
    assert owner(str(tmp_path / "link" / "decoder.py")) == "torch"


def test_a_stack_is_read_as_far_as_the_users_innermost_frame() -> None:
    def stack() -> Iterator[Frame]:
        yield from (OWN, TORCH, LIBRARY, USER)
        raise AssertionError("read on")

    assert innermost(stack()) == (USER, LIBRARY, TORCH)


@pytest.mark.parametrize(
    ("stack", "expected"),
    [
        ([OWN, TORCH, LIBRARY, USER], "/home/me/train.py:3 in main"),
        ([OWN, TORCH, LIBRARY], "peft/model.py:5 in forward"),
        ([OWN, TORCH], "torch/nn/modules/linear.py:7 in forward"),
        ([OWN], BACKWARD),
        ([], BACKWARD),
    ],
)
def test_the_line_of_an_allocation_is_the_nearest_to_the_user(stack: list[Frame], expected: str) -> None:
    recorded = [{"filename": frame.filename, "line": frame.line, "name": frame.function} for frame in stack]
    assert user_line(recorded) == expected


def test_a_running_stack_begins_with_its_innermost_frame() -> None:
    found = list(frames(sys._getframe()))
    assert (Path(found[0].filename).name, found[0].function) == (Path(__file__).name, sys._getframe().f_code.co_name)
    assert len(found) > 1
    assert list(frames(None)) == []
