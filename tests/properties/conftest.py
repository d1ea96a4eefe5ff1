"""Helpers that several property files import by name, and one thread, so that bytes can be compared."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

sys.path.insert(0, str(Path(__file__).parent / "support"))


@pytest.fixture(autouse=True, scope="module")
def one_thread_and_no_compiler() -> Iterator[None]:
    """Switch compilation and threads off: bitsandbytes compiles its decoder for odd shapes, and threads change sums.

    The settings are restored after each file, because files of other folders compile, in whatever order they run.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")
    torch.set_num_threads(threads)
