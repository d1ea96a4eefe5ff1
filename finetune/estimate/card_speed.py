"""The speed of a card, from published figures: products of matrices, memory, the bus, and launches of kernels.

The figures are peaks, and a step reaches a share of them. The shares are fitted to one profile of a Llama-3.1-8B step
of 4 x 2,048 tokens on an H200 (matrix products 0.49 s); on other cards, and for other steps, they are estimates. So
they rank settings, and tokens per second that are computed with them are estimates too.
"""

from __future__ import annotations

from dataclasses import dataclass

from pytest_vram.drygpu.cards import CARDS, Card

PRODUCTS_SHARE = 0.7
"""Share of the peak that products of matrices reach."""
ATTENTION_SHARE = 0.35
"""Share of the peak that fused attention reaches, forward and backward together."""
MEMORY_SHARE = 0.6
"""Share of the published bandwidth that elementwise kernels reach."""
BUS_BYTES = 20e9
"""Bytes that cross a PCIe 4.0 x16 bus in a second, of 32e9 that are published."""
LAUNCH_SECONDS = 12e-6
"""Time of the host for one kernel, with the Python code around it. A guess."""

_PER_CLOCK = {(7, 5): 1024, (8, 0): 2048, (8, 6): 512, (8, 9): 1024, (9, 0): 4096, (10, 0): 8192, (12, 0): 512}
"""Operations of one multiprocessor's tensor cores in a clock, in fp16 or bf16 with sums in fp32, from the data sheets:
989e12 in a second on an H100, 312e12 on an A100, 121e12 on an L4, 65e12 on a T4, 71e12 on an RTX 3090."""
_GEFORCE_ADA = 512  # a GeForce card of capability 8.9 sums in fp32 at half of the speed: 165e12 on an RTX 4090
_SINGLE_PER_CLOCK = {(7, 5): 128, (8, 0): 128}  # fp32 without tensor cores; 256 elsewhere


@dataclass(frozen=True, slots=True, kw_only=True)
class CardSpeed:
    """What a card does in a second, at its published peaks."""

    half: float
    """Operations of products in fp16 and bf16."""
    single: float
    """Operations of products in fp32."""
    bandwidth: float
    """Bytes that its memory reads or writes."""


def speed_of(product: str, capability: tuple[int, int], multiprocessors: int) -> CardSpeed:
    """Return the speed of a card by the name that its driver reports.

    A card that the card table does not have gets the clock and the bandwidth per multiprocessor of one that is like it:
    of the same capability if there is one, and with the nearest number of multiprocessors.
    """
    found = next((card for card in CARDS if card.product == product), None)
    if found is None:
        like = [card for card in CARDS if card.capability == capability] or list(CARDS)
        found = min(like, key=lambda card: abs(card.multiprocessors - multiprocessors))
    clocks = multiprocessors * found.clock_mhz * 1e6
    per_clock = _GEFORCE_ADA if capability == (8, 9) and "GeForce" in product else _PER_CLOCK.get(capability, 1024)
    return CardSpeed(
        half=clocks * per_clock,
        single=clocks * _SINGLE_PER_CLOCK.get(capability, 256),
        bandwidth=_bandwidth(found) * multiprocessors / found.multiprocessors,
    )


def _bandwidth(card: Card) -> float:
    return card.memory_clock_mhz * 1e6 * 2 * card.bus_bits / 8
