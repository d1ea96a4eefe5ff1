"""Checkpointing is turned on and off by the names that the installed transformers has for it."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("peft")
from torch import nn

from finetune.model.forward import set_checkpointing


class Base(nn.Module):
    """A model with transformers' names of one time: ``gradient`` before 5.23, ``activation`` since."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.calls: list[tuple[bool, Any]] = []
        self.inputs_require_gradients = False
        setattr(self, f"is_{name}_checkpointing", False)
        setattr(self, f"{name}_checkpointing_enable", lambda how: self.turn(True, how))
        setattr(self, f"{name}_checkpointing_disable", lambda: self.turn(False, None))

    def disable_input_require_grads(self) -> None:
        self.inputs_require_gradients = False

    def turn(self, on: bool, how: Any) -> None:
        self.inputs_require_gradients |= on  # as enabling does where the base is frozen
        setattr(self, f"is_{self.name}_checkpointing", on)
        self.calls.append((on, how))


@pytest.mark.parametrize("name", ["gradient", "activation"])
def test_checkpointing_is_turned_once_and_not_reentrant(name: str) -> None:
    base = Base(name)
    for enabled in (False, True, True, False):
        set_checkpointing(base, enabled=enabled)
    assert base.calls == [(True, {"use_reentrant": False}), (False, None)]
    assert not base.inputs_require_gradients
