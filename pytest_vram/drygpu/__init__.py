"""The dry GPU: stub CUDA libraries with which PyTorch allocates memory as on a real card, and computes nothing."""

from pytest_vram.drygpu.cards import CARDS, Card, find_card
from pytest_vram.drygpu.checkpoint import empty_checkpoint
from pytest_vram.drygpu.driver import is_active
from pytest_vram.drygpu.process.activate import activate, environment, real_gpu_present

__all__ = [
    "CARDS",
    "Card",
    "activate",
    "empty_checkpoint",
    "environment",
    "find_card",
    "is_active",
    "real_gpu_present",
]
