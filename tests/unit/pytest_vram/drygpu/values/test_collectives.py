"""Which collectives get a kernel of the dry GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed

from pytest_vram.drygpu.values import collectives

if TYPE_CHECKING:
    import pytest


def test_a_collective_that_only_another_torch_has_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "_COLLECTIVES", {"of_a_torch_to_come_": (0, None)})
    monkeypatch.setattr(collectives.buckets, "install", lambda: None)
    monkeypatch.setattr(collectives.reductions, "install", lambda: None)
    collectives.install(torch.library.Library("c10d", "FRAGMENT"))
