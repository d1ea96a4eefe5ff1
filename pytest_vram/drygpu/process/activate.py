"""Puts the stub libraries beneath PyTorch, before PyTorch is imported.

A program that is linked against ``libcudart.so.13`` takes whatever library of that name is loaded already. So the stubs
only have to come first: through ``LD_PRELOAD`` for a program that is yet to start, through ``dlopen`` for this one. The
environment names the card, and children inherit both.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_vram.drygpu import driver
from pytest_vram.drygpu.cards import Card, find_card
from pytest_vram.drygpu.driver import is_active
from pytest_vram.drygpu.process import startup
from pytest_vram.drygpu.stub.library import Build, ensure_built
from pytest_vram.errors import DryGpuError, VramUsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

CARD_VARIABLE = "PYTEST_VRAM_DRY_CARD"
COPY_LIMIT_VARIABLE = "PYTEST_VRAM_DRY_COPY_LIMIT"
MOST_DEVICES = 64
LEAST_VARIABLE = "PYTEST_VRAM_DRY_LEAST"
"""How many cards there are at least, whatever is asked for: a test's ranks have a card each."""
CHOSEN_VARIABLE = "PYTEST_VRAM_DRY_CHOSEN"
"""The option with which a user chose the cards, with a ``!`` at the end where it says how many."""


def activate(
    card: str | Card,
    *,
    count: int = 1,
    total_bytes: int | None = None,
    context_bytes: int | None = None,
    copy_limit_bytes: int | None = None,
    replace_real_gpu: bool = False,
) -> None:
    """Give this process, and those it starts, dry GPUs. To be called before ``import torch``.

    Calling it again with the same arguments does nothing. Until torch looks at the cards they may be exchanged for
    others, unless the user chose them: so a ``conftest.py`` may say how many it needs.

    Args:
        card: a name from the card table (``"rtx-4080"``) or a :class:`Card`.
        count: how many such cards.
        total_bytes: device memory in bytes, in place of the card's.
        context_bytes: what the CUDA context takes of it, in bytes, in place of the card's.
        copy_limit_bytes: copies to and from the device above this size carry no values (default 1 MiB).
        replace_real_gpu: stand in even where the machine has a real GPU.

    Raises:
        DryGpuError: PyTorch is imported already, other dry GPUs are active, the machine has a real GPU, or the stubs
            cannot be built.
        VramUsageError: an argument is out of range, or no card has that name.
    """
    variables = _variables(card, count, total_bytes, context_bytes, copy_limit_bytes)
    if is_active():
        if os.environ.get(CARD_VARIABLE) == variables[CARD_VARIABLE]:
            startup.watch()
            return
        _exchange(variables)
        startup.watch()
        return
    if "torch" in sys.modules:
        name = card if isinstance(card, str) else card.name
        raise DryGpuError(
            "the dry GPU must be put in place before torch is imported, and torch is imported already. Either call "
            f"pytest_vram.drygpu.activate({name!r}) first, or start the program with: "
            f"python -m pytest_vram run --gpu {name} your_program.py"
        )
    _refuse_real_gpu(replace_real_gpu)
    build = ensure_built()
    os.environ.update(variables)
    try:
        ctypes.CDLL(str(build.core), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        for name in variables:
            os.environ.pop(name, None)
        raise DryGpuError(f"the dry GPU's library cannot be loaded: {error}") from error
    os.environ.update(_inherited(build, os.environ))
    startup.watch()


def _exchange(variables: Mapping[str, str]) -> None:
    """Put other cards in the place of those that are there, as long as nobody has seen them.

    Raises:
        DryGpuError: they have been seen, or the user chose them.
    """
    here, wanted = os.environ.get(CARD_VARIABLE, ""), variables[CARD_VARIABLE]
    option = os.environ.get(CHOSEN_VARIABLE, "")
    if option and (option.endswith("!") or _without_count(here) != _without_count(wanted)):
        raise DryGpuError(
            f"the dry GPUs were chosen with {option.removesuffix('!')} ({_plain(here)}), and activate() asks for"
            f" {_plain(wanted)}: choose these with the option, or leave it out"
        )
    if driver.cards_are_known():
        raise DryGpuError(
            f"this process has dry GPUs already ({_plain(here)}), and torch has seen them, so that they cannot be "
            f"exchanged for {_plain(wanted)}: call activate() before anything looks at the GPU, or start another "
            "process"
        )
    os.environ.update(variables)


def _without_count(text: str) -> list[str]:
    parts = text.split("|")
    return [*parts[:5], *parts[6:]]


def _plain(text: str) -> str:
    """``2 x NVIDIA L4`` out of the variable's text."""
    parts = text.split("|")
    return f"{parts[5]} x {parts[6]}" if len(parts) == 7 else text or "none"


def environment(
    card: str | Card,
    *,
    count: int = 1,
    total_bytes: int | None = None,
    context_bytes: int | None = None,
    copy_limit_bytes: int | None = None,
    replace_real_gpu: bool = False,
    base: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return an environment for a subprocess that has dry GPUs. Arguments and errors are those of :func:`activate`.

    Args:
        base: the environment to extend, by default this process's.

    Returns:
        ``base`` with ``LD_PRELOAD`` and the card added.
    """
    variables = _variables(card, count, total_bytes, context_bytes, copy_limit_bytes)
    _refuse_real_gpu(replace_real_gpu)
    build = ensure_built()
    result = dict(os.environ if base is None else base)
    result.pop(COPY_LIMIT_VARIABLE, None)
    result.update(variables)
    result.update(_inherited(build, result))
    return result


def real_gpu_present() -> bool:
    """Whether an NVIDIA GPU's device file is on this machine."""
    return any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg"))


def _refuse_real_gpu(allowed: bool) -> None:
    if not allowed and real_gpu_present():
        raise DryGpuError(
            "this machine has a real GPU, whose place the dry GPU does not take by itself: pass replace_real_gpu=True "
            "to measure dry all the same"
        )


def _variables(
    card: str | Card, count: int, total_bytes: int | None, context_bytes: int | None, copy_limit_bytes: int | None
) -> dict[str, str]:
    found = find_card(card) if isinstance(card, str) else card
    if count >= 1:
        count = max(count, int(os.environ.get(LEAST_VARIABLE, "1")))
    total = found.total_bytes if total_bytes is None else total_bytes
    context = found.context_bytes if context_bytes is None else context_bytes
    if not 1 <= count <= MOST_DEVICES:
        raise VramUsageError(f"count={count}: there can be 1 to {MOST_DEVICES} dry GPUs")
    if not 0 <= context < total:
        raise VramUsageError(f"context_bytes={context} does not fit into total_bytes={total}")
    major, minor = found.capability
    text = f"{total}|{context}|{major}.{minor}|{found.multiprocessors}|{found.l2_bytes}|{count}|{found.product}"
    variables = {CARD_VARIABLE: text}
    if copy_limit_bytes is not None:
        if copy_limit_bytes < 0:
            raise VramUsageError(f"copy_limit_bytes={copy_limit_bytes}: a size cannot be negative")
        variables[COPY_LIMIT_VARIABLE] = str(copy_limit_bytes)
    return variables


def _inherited(build: Build, base: Mapping[str, str]) -> dict[str, str]:
    before = [
        path for path in base.get("LD_PRELOAD", "").replace(":", " ").split() if Path(path).name != build.core.name
    ]
    return {
        **startup.inherited(base),
        "LD_PRELOAD": ":".join([str(build.core), *before]),
        # Triton links its launcher against libcuda and asks ldconfig where that is, which knows nothing of the stubs.
        "TRITON_LIBCUDA_PATH": str(build.folder),
        # How long PyTorch waits at exit for autograd threads, of which one may sleep for good: see native/exit.c.
        "TORCH_AUTOGRAD_SHUTDOWN_WAIT_LIMIT": base.get("TORCH_AUTOGRAD_SHUTDOWN_WAIT_LIMIT", "1.0"),
    }
