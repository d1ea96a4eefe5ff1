"""Choose the probe of a session, or say why there is none. The choice does not import torch."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_vram.drygpu import driver
from pytest_vram.drygpu.process.activate import CHOSEN_VARIABLE, MOST_DEVICES, activate, real_gpu_present
from pytest_vram.errors import DryGpuError, ProbeUnavailable, VramUsageError

if TYPE_CHECKING:
    from pytest_vram.probe.protocol import Probe

DEFAULT_CARD = "rtx-4080"
KINDS = ("auto", "cuda", "dry", "host", "nvml", "off")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What ``--vram-gpu`` asks for."""

    kind: str
    card: str = DEFAULT_CARD
    count: int | None = None
    """The number of dry GPUs; ``None`` if the choice does not name one."""


def parse_choice(text: str) -> Choice:
    """Read ``auto``, ``cuda``, ``dry``, ``dry:CARD``, ``dry:CARDx2``, ``host``, ``nvml`` or ``off``.

    Raises:
        VramUsageError: if the text is none of them, no card has that name, or the number of cards is too large.
    """
    kind, colon, card = text.partition(":")
    if kind not in KINDS or (colon and kind != "dry") or (colon and not card):
        raise VramUsageError(
            f"vram_gpu = {text!r}: choose auto, cuda, dry, dry:CARD, dry:CARDx2 for two of them, host, nvml or "
            "off (`python -m pytest_vram cards` lists the cards)"
        )
    if kind == "dry":
        return _dry_choice(text, card or DEFAULT_CARD)
    return Choice(kind=kind)


def _dry_choice(text: str, card: str) -> Choice:
    from pytest_vram.drygpu.cards import find_card

    several = re.fullmatch(r"(.+?) ?x ?(\d+)", card)
    if several is None:
        return Choice(kind="dry", card=find_card(card).name)
    try:
        return Choice(kind="dry", card=find_card(card).name)  # a card's name may end that way, such as rtx4080
    except VramUsageError:
        name, count = find_card(several[1]).name, int(several[2])
    if not 1 <= count <= MOST_DEVICES:
        raise VramUsageError(f"vram_gpu = {text!r}: there can be 1 to {MOST_DEVICES} dry GPUs")
    return Choice(kind="dry", card=name, count=count)


@lru_cache(maxsize=1)
def torch_build() -> str | None:
    """Return the build of the installed torch without importing it: ``"cuda"``, ``"rocm"`` or ``"cpu"``.

    It is None without torch. Builds for other devices, such as XPU, are ``"cpu"`` here.
    """
    loaded = sys.modules.get("torch")
    if loaded is not None:
        return "cuda" if loaded.version.cuda else "rocm" if getattr(loaded.version, "hip", None) else "cpu"
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.origin:
        return None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text()
    except OSError:
        return "cpu"
    names = (("cuda", "cuda"), ("hip", "rocm"))
    found = (build for name, build in names if re.search(rf"^{name}\b[^=\n]*= *['\"]", text, re.MULTILINE))
    return next(found, "cpu")


def can_run_dry() -> bool:
    """Return whether ``auto`` may choose the dry GPU.

    It may on Linux if there is no real GPU, torch is a CUDA build, and the stub libraries are loaded or can be built.
    """
    if sys.platform != "linux" or real_gpu_present() or torch_build() != "cuda":
        return False
    return driver.is_active() or bool(shutil.which("cc") or shutil.which("gcc") or importlib.util.find_spec("ziglang"))


def go_dry(card: str, count: int | None = None, *, chosen: str = "") -> None:
    """Give dry GPUs to this process and to those that it starts.

    Args:
        card: the name of the card.
        count: the number of cards; ``None`` for one, or for as many as a conftest asks for with ``activate``.
        chosen: the option that named the cards; the error for a conftest that names other cards quotes it.

    Raises:
        DryGpuError: if the dry GPU cannot be put in place; see :func:`pytest_vram.drygpu.process.activate`.
    """
    import os

    from pytest_vram.drygpu.process import startup

    activate(card, count=count or 1)
    if chosen:
        os.environ[CHOSEN_VARIABLE] = f"{chosen}{'' if count is None else '!'}"
    os.environ.update(startup.inherited(os.environ))
    startup.watch()


def choose(choice: Choice) -> Probe:
    """Return the probe for a choice; for ``auto``, the best one. It imports torch, so call it when a test needs it.

    Raises:
        ProbeUnavailable: if there is no such probe here; the message says why, and what to do.
    """
    if choice.kind == "off":
        raise ProbeUnavailable("measuring is switched off (vram_gpu = off)")
    if choice.kind == "nvml":
        from pytest_vram.probe.nvml import NvmlProbe

        return NvmlProbe()
    if torch_build() is None:
        raise ProbeUnavailable("torch is not installed, so there is no memory to measure: pip install torch")
    if choice.kind == "host":
        return _host()
    import torch

    if _torch_sees_a_gpu() and not (choice.kind == "cuda" and driver.is_active()):
        from pytest_vram.probe.cuda import CudaProbe

        return CudaProbe()
    if choice.kind == "cuda":
        raise ProbeUnavailable(
            "vram_gpu = cuda, and PyTorch sees no GPU here: look at `python -m pytest_vram doctor`, or use"
            " --vram-gpu=dry"
        )
    if choice.kind == "dry":
        raise ProbeUnavailable(
            "vram_gpu = dry, and the dry GPU is not beneath torch: look at `python -m pytest_vram doctor`"
        )
    if torch.backends.mps.is_available():
        from pytest_vram.probe.mps import MpsProbe

        return MpsProbe()
    if hasattr(torch, "accelerator") and torch.accelerator.is_available():
        from pytest_vram.probe.accelerator import AcceleratorProbe

        return AcceleratorProbe()
    return _host()


def _torch_sees_a_gpu() -> bool:
    """Return whether torch sees a real or a dry GPU.

    With dry GPUs the stub driver is asked: once torch has been asked, the children that this process forks cannot use
    a GPU, as those of ``accelerate.notebook_launcher`` do.
    """
    import torch

    if driver.is_active():
        return torch.backends.cuda.is_built() and driver.device_count() > 0
    return torch.cuda.is_available()


def _host() -> Probe:
    from pytest_vram.probe.host import HostProbe

    return HostProbe()


__all__ = [
    "DEFAULT_CARD",
    "KINDS",
    "Choice",
    "DryGpuError",
    "ProbeUnavailable",
    "can_run_dry",
    "choose",
    "go_dry",
    "parse_choice",
    "torch_build",
]
