"""Load the stub libraries before PyTorch is imported, so that PyTorch uses them in place of CUDA.

If a library named ``libcudart.so.13`` is already loaded, the loader uses it for every program that needs one. So the
stub libraries only have to be loaded first: through ``LD_PRELOAD`` in a new process, through ``dlopen`` in this one. An
environment variable names the card. Child processes inherit both variables.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_vram.drygpu import driver
from pytest_vram.drygpu.cards import Card, ContextGrowth, find_card
from pytest_vram.drygpu.driver import is_active
from pytest_vram.drygpu.process import startup
from pytest_vram.drygpu.stub.library import Build, cache_folder, ensure_built
from pytest_vram.errors import DryGpuError, VramUsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

CARD_VARIABLE = "PYTEST_VRAM_DRY_CARD"
MOST_DEVICES = 64
LEAST_VARIABLE = "PYTEST_VRAM_DRY_LEAST"
"""How many cards there are at least, whatever is asked for: a test's ranks have a card each."""
CHOSEN_VARIABLE = "PYTEST_VRAM_DRY_CHOSEN"
"""The option with which a user chose the cards, with a ``!`` at the end where it says how many."""
INDUCTOR_FOLDER = "pytest-vram-dry"


def activate(
    card: str | Card,
    *,
    count: int = 1,
    total_bytes: int | None = None,
    context_bytes: int | None = None,
    replace_real_gpu: bool = False,
) -> None:
    """Give dry GPUs to this process and the processes that it starts. Call it before ``import torch``.

    A second call with the same arguments does nothing. Until torch looks at the cards they may be exchanged for others,
    unless the user chose them: so a ``conftest.py`` may say how many it needs.

    Args:
        card: a name from the card table (``"rtx-4080"``) or a :class:`Card`.
        count: the number of cards.
        total_bytes: device memory in bytes; ``None`` takes the card's.
        context_bytes: size of the CUDA context in bytes; ``None`` takes the card's.
        replace_real_gpu: use dry GPUs even if the machine has a real one.

    Raises:
        DryGpuError: PyTorch is already imported, other dry GPUs are active, the machine has a real GPU, or the stubs
            cannot be built.
        VramUsageError: an argument is out of range, or no card has that name.
    """
    variables = _variables(card, count, total_bytes, context_bytes)
    if is_active():
        if os.environ.get(CARD_VARIABLE) != variables[CARD_VARIABLE]:
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
    if option and (option.endswith("!") or with_count(here, 0) != with_count(wanted, 0)):
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


def count_of(text: str) -> int:
    """Return the number of cards in the text of ``CARD_VARIABLE``, whose last two fields are count and product name."""
    parts = text.split("|")
    return int(parts[-2]) if len(parts) > 1 else 0


def with_count(text: str, count: int) -> str:
    """Return the text of ``CARD_VARIABLE`` with another number of cards."""
    parts = text.split("|")
    return "|".join([*parts[:-2], str(count), parts[-1]])


def _plain(text: str) -> str:
    """Return the variable's text as ``2 x NVIDIA L4``."""
    return f"{count_of(text)} x {text.rpartition('|')[2]}" if count_of(text) else "none"


def environment(
    card: str | Card,
    *,
    count: int = 1,
    total_bytes: int | None = None,
    context_bytes: int | None = None,
    replace_real_gpu: bool = False,
    base: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return an environment for a subprocess that has dry GPUs. Arguments and errors are those of :func:`activate`.

    Args:
        base: the environment to extend; ``None`` takes that of this process.

    Returns:
        ``base`` with ``LD_PRELOAD`` and the card added.
    """
    variables = _variables(card, count, total_bytes, context_bytes)
    _refuse_real_gpu(replace_real_gpu)
    build = ensure_built()
    result = dict(os.environ if base is None else base)
    result.update(variables)
    result.update(_inherited(build, result))
    return result


def real_gpu_present() -> bool:
    """Whether this machine has the device file of an NVIDIA GPU."""
    return any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg"))


def _refuse_real_gpu(allowed: bool) -> None:
    if not allowed and real_gpu_present():
        raise DryGpuError(
            "this machine has a real GPU, which the dry GPU does not replace by default: pass replace_real_gpu=True to "
            "use the dry GPU in its place"
        )


def _variables(card: str | Card, count: int, total_bytes: int | None, context_bytes: int | None) -> dict[str, str]:
    found = find_card(card) if isinstance(card, str) else card
    if count >= 1:
        count = max(count, int(os.environ.get(LEAST_VARIABLE, "1")))
    total = found.total_bytes if total_bytes is None else total_bytes
    context = found.context_bytes if context_bytes is None else context_bytes
    # A size that the caller gives is the whole context's.
    growth = found.growth if context_bytes is None and found.growth is not None else ContextGrowth()
    if not 1 <= count <= MOST_DEVICES:
        raise VramUsageError(f"count={count}: there can be 1 to {MOST_DEVICES} dry GPUs")
    if not 0 <= context < total:
        raise VramUsageError(f"context_bytes={context} does not fit into total_bytes={total}")
    major, minor = found.capability
    speeds = f"{found.clock_mhz * 1000}|{found.memory_clock_mhz * 1000}|{found.bus_bits}"
    channels = f"{found.ring_channels}+{found.peer_channels}"
    loaded = f"{growth.first_kernel_bytes}+{growth.products_bytes}+{growth.plans_bytes}+{growth.module_bytes}"
    sizes = f"{total}|{context}+{loaded}|{major}.{minor}|{found.multiprocessors}|{found.l2_bytes}"
    return {CARD_VARIABLE: f"{sizes}|{speeds}|{channels}|{count}|{found.product}"}


def _inherited(build: Build, base: Mapping[str, str]) -> dict[str, str]:
    before = [
        path for path in base.get("LD_PRELOAD", "").replace(":", " ").split() if Path(path).name != build.core.name
    ]
    return {
        **startup.inherited(base),
        "LD_PRELOAD": ":".join([str(build.core), *before]),
        # Triton links its launcher against libcuda. It asks ldconfig for the path, which does not know the stubs.
        "TRITON_LIBCUDA_PATH": str(build.folder),
        # So do AOTInductor and Inductor's C++ wrapper, which leave it to the linker to find it: the driver installs it.
        "LIBRARY_PATH": _with_folder(base.get("LIBRARY_PATH", ""), build.folder),
        # Inductor remembers its decisions by the card's name: a real card of that name must not find them.
        "TORCHINDUCTOR_CACHE_DIR": _inductor_folder(base.get("TORCHINDUCTOR_CACHE_DIR")),
        # Seconds that PyTorch waits at exit for autograd threads; one of them may never end: see native/exit.c.
        "TORCH_AUTOGRAD_SHUTDOWN_WAIT_LIMIT": base.get("TORCH_AUTOGRAD_SHUTDOWN_WAIT_LIMIT", "1.0"),
    }


def _with_folder(folders: str, last: Path) -> str:
    """Return a list of folders for the linker with one more at its end. An empty name would be the current folder."""
    before = [folder for folder in folders.split(":") if folder and folder != str(last)]
    return ":".join([*before, str(last)])


def _inductor_folder(chosen: str | None) -> str:
    """Return Inductor's cache folder for dry GPUs: within the one that the user chose, else in this package's cache."""
    if not chosen:
        return str(cache_folder() / "inductor")
    folder = Path(chosen)
    return str(folder if folder.name == INDUCTOR_FOLDER else folder / INDUCTOR_FOLDER)
