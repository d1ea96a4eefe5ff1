"""The card table: the figures that the driver reports for each card, and their sources.

``total_bytes`` is what ``cudaMemGetInfo`` and ``torch.cuda.get_device_properties().total_memory`` report on Linux. It
is less than the advertised size, because the driver keeps some memory for itself, and differs by some 100 MiB between
driver branches. The table has the figure of the latest branch that a public log shows.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from pytest_vram.errors import VramUsageError
from pytest_vram.memory.note import Note
from pytest_vram.units import KIB, MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The limits that depend only on the compute capability.

    Source: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".

    Attributes:
        shared_multiprocessor_bytes: shared memory of one multiprocessor.
        shared_block_optin_bytes: the most shared memory that one block may request.
        max_threads: the most resident threads of one multiprocessor.
        max_blocks: the most resident blocks of one multiprocessor.
    """

    shared_multiprocessor_bytes: int
    shared_block_optin_bytes: int
    max_threads: int
    max_blocks: int


_ARCHITECTURES = {
    (7, 5): Architecture(
        shared_multiprocessor_bytes=64 * KIB, shared_block_optin_bytes=64 * KIB, max_threads=1024, max_blocks=16
    ),
    (8, 0): Architecture(
        shared_multiprocessor_bytes=164 * KIB, shared_block_optin_bytes=163 * KIB, max_threads=2048, max_blocks=32
    ),
    (8, 6): Architecture(
        shared_multiprocessor_bytes=100 * KIB, shared_block_optin_bytes=99 * KIB, max_threads=1536, max_blocks=16
    ),
    (8, 9): Architecture(
        shared_multiprocessor_bytes=100 * KIB, shared_block_optin_bytes=99 * KIB, max_threads=1536, max_blocks=24
    ),
    (9, 0): Architecture(
        shared_multiprocessor_bytes=228 * KIB, shared_block_optin_bytes=227 * KIB, max_threads=2048, max_blocks=32
    ),
    (10, 0): Architecture(
        shared_multiprocessor_bytes=228 * KIB, shared_block_optin_bytes=227 * KIB, max_threads=2048, max_blocks=32
    ),
    (12, 0): Architecture(
        shared_multiprocessor_bytes=100 * KIB, shared_block_optin_bytes=99 * KIB, max_threads=1536, max_blocks=24
    ),
}

IDLE_CONTEXT = (
    "approximate, and that of an idle process: loaded kernels add to it, in a QLoRA step on an H200 some 350 MiB"
)
CONTEXT_SOURCE = (
    "100 MiB + 2.9 MiB per multiprocessor: the line through two idle PyTorch processes in public out-of-memory reports,"
    " 414 MiB on an A100 (108 multiprocessors) and 470.64 MiB on an RTX 4090 (128;"
    " github.com/3DTopia/Phidias-Diffusion/issues/8); kernels loaded later add to it"
)

MEASURED_CONTEXT_SOURCE = (
    "measured on such a card (driver 580.159.04, CUDA 13.0), idle; it grows by what is loaded later, as measured there"
)

SPEED_SOURCE = (
    "entered by hand from what is generally published of the product, and not read off a card: boost clock, memory"
    " clock and bus width; they rank kernels and never change a size that torch itself asks for"
)

CHANNELS_SOURCE = (
    "NCCL's own line in public logs: '24 coll channels, ... 32 p2p channels' on machines with NVSwitch (A100, H100;"
    " github.com/NVIDIA/nccl/issues/1781), '2 coll channels, ... 2 p2p channels' over PCIe"
    " (github.com/tinygrad/open-gpu-kernel-modules/issues/17); GeForce cards use the host's memory"
    " (github.com/NVIDIA/nccl-tests/issues/307)"
)

# Channels of NCCL between cards of one machine: for collectives, and for send and recv. A card that is not listed goes
# through the host's memory.
_SWITCHED, _OVER_PCIE = (24, 32), (2, 2)
_CHANNELS = {
    "t4": _OVER_PCIE,
    "l4": _OVER_PCIE,
    "a10g": _OVER_PCIE,
    "l40s": _OVER_PCIE,
    "a100-40": _SWITCHED,
    "a100-80": _SWITCHED,
    "h100-80": _SWITCHED,
    "h200": _SWITCHED,
    "b200": _SWITCHED,
}

# Highest clock of the multiprocessors in MHz, clock of the memory in MHz, width of its bus in bits.
_SPEEDS = {
    "t4": (1590, 5001, 256),
    "rtx-3060": (1777, 7501, 192),
    "rtx-3080": (1710, 9501, 320),
    "rtx-3090": (1695, 9751, 384),
    "rtx-4060": (2460, 8501, 128),
    "rtx-4060ti-16": (2535, 9001, 128),
    "rtx-4070": (2475, 10501, 192),
    "rtx-4080": (2505, 11201, 256),
    "rtx-4090": (2520, 10501, 384),
    "rtx-5080": (2617, 15001, 256),
    "rtx-5090": (2407, 14001, 512),
    "l4": (2040, 6251, 192),
    "a10g": (1710, 6251, 384),
    "l40s": (2520, 9001, 384),
    "a100-40": (1410, 1215, 5120),
    "a100-80": (1410, 1593, 5120),
    "h100-80": (1980, 2619, 5120),
    "h200": (1980, 3201, 6144),
    "b200": (1965, 3996, 7680),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextGrowth:
    """What a driver loads onto a card when it is first needed, on top of an idle context. Sizes in bytes.

    Attributes:
        first_kernel_bytes: at the first kernel of all.
        products_bytes: at the first matrix product: the library's kernels.
        plans_bytes: at the first plan of cuDNN.
        module_bytes: with each module of PyTorch's or bitsandbytes', at the first of its kernels.
    """

    first_kernel_bytes: int = 0
    products_bytes: int = 0
    plans_bytes: int = 0
    module_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One card as its driver reports it.

    Attributes:
        name: what a user types, for example ``rtx-4080``.
        product: the name that the driver reports.
        total_bytes: device memory that the driver reports.
        capability: compute capability (major, minor).
        multiprocessors: number of streaming multiprocessors.
        l2_bytes: size of the L2 cache.
        context_bytes: what a process holds before its first tensor (CUDA context); see :func:`context_source`.
        growth: what the driver loads later; ``None`` for a card that was not measured: its context keeps its size.
        clock_mhz: highest clock of the multiprocessors, in MHz; see ``SPEED_SOURCE``.
        memory_clock_mhz: clock of the memory, in MHz; each line of the bus moves two bits in a clock.
        bus_bits: width of the memory bus, in bits.
        ring_channels: channels of NCCL between such cards of one machine, for collectives; 0 if they do not reach each
            other's memory; see ``CHANNELS_SOURCE``.
        peer_channels: the same for send and recv.
        source: the source of ``total_bytes``.
        approximate: ``total_bytes`` was deduced rather than read off this card.
    """

    name: str
    product: str
    total_bytes: int
    capability: tuple[int, int]
    multiprocessors: int
    l2_bytes: int
    context_bytes: int
    growth: ContextGrowth | None
    clock_mhz: int
    memory_clock_mhz: int
    bus_bits: int
    ring_channels: int
    peer_channels: int
    source: str
    approximate: bool = False

    @property
    def architecture(self) -> Architecture:
        """Return the limits of the card's compute capability."""
        return _ARCHITECTURES[self.capability]


# Measured: an idle context in bytes, and what it grows by. H200 (driver 580.159.04, CUDA 13.0): 526.8 MiB idle, 618.8
# after the first elementwise kernels, 684.8 after the first bf16 matrix product, 692.8 after the first attention, some
# 880 in a QLoRA step, which launches kernels of 30 modules: the last is what the size of a module was taken from.
_CONTEXTS = {
    "h200": (
        552402944,
        ContextGrowth(first_kernel_bytes=78 * MIB, products_bytes=52 * MIB, plans_bytes=8 * MIB, module_bytes=7 * MIB),
    ),
}


def _card(
    name: str,
    product: str,
    capability: tuple[int, int],
    multiprocessors: int,
    l2_mib: int,
    total_mib: float,
    source: str,
    *,
    approximate: bool = False,
) -> Card:
    return Card(
        name=name,
        product=product,
        total_bytes=round(total_mib * MIB),
        capability=capability,
        multiprocessors=multiprocessors,
        l2_bytes=l2_mib * MIB,
        context_bytes=_CONTEXTS[name][0] if name in _CONTEXTS else 100 * MIB + round(multiprocessors * 2.9) * MIB,
        growth=_CONTEXTS[name][1] if name in _CONTEXTS else None,
        clock_mhz=_SPEEDS[name][0],
        memory_clock_mhz=_SPEEDS[name][1],
        bus_bits=_SPEEDS[name][2],
        ring_channels=_CHANNELS.get(name, (0, 0))[0],
        peer_channels=_CHANNELS.get(name, (0, 0))[1],
        source=source,
        approximate=approximate,
    )


_LLAMA = "llama.cpp start-up log, 'VRAM: {} MiB'"
_TORCH = "torch.cuda.get_device_properties printed in a public log, {} MB"

CARDS: tuple[Card, ...] = (
    _card("t4", "Tesla T4", (7, 5), 40, 4, 14912, _LLAMA.format(14912)),
    _card("rtx-3060", "NVIDIA GeForce RTX 3060", (8, 6), 28, 3, 11906, _LLAMA.format(11906)),
    _card(
        "rtx-3080",
        "NVIDIA GeForce RTX 3080",
        (8, 6),
        68,
        5,
        9882,
        "9.78 GiB on an older driver (github.com/zai-org/CogVideo/issues/34), less the 133 MiB that newer drivers"
        " keep of an RTX 3090; newer reports of 10 GB cards say 9.65 GiB",
        approximate=True,
    ),
    _card("rtx-3090", "NVIDIA GeForce RTX 3090", (8, 6), 82, 6, 24123, _LLAMA.format(24123)),
    _card(
        "rtx-4060",
        "NVIDIA GeForce RTX 4060",
        (8, 9),
        24,
        24,
        7936,
        "PyTorch out-of-memory message, 7.75 GiB (github.com/ESRSchao/EdgeRegNet/issues/2)",
    ),
    _card("rtx-4060ti-16", "NVIDIA GeForce RTX 4060 Ti", (8, 9), 34, 32, 15944, _LLAMA.format(15944)),
    _card("rtx-4070", "NVIDIA GeForce RTX 4070", (8, 9), 46, 36, 11866, _LLAMA.format(11866)),
    _card("rtx-4080", "NVIDIA GeForce RTX 4080", (8, 9), 76, 64, 16049, _TORCH.format(16049)),
    _card("rtx-4090", "NVIDIA GeForce RTX 4090", (8, 9), 128, 72, 24080, _LLAMA.format(24080)),
    _card("rtx-5080", "NVIDIA GeForce RTX 5080", (12, 0), 84, 64, 15880, _LLAMA.format(15880)),
    _card(
        "rtx-5090",
        "NVIDIA GeForce RTX 5090",
        (12, 0),
        170,
        96,
        32109,
        _LLAMA.format(32109) + "; PyTorch says 31.36 GiB (github.com/TrajectoryCrafter/TrajectoryCrafter/issues/20)",
    ),
    _card(
        "l4",
        "NVIDIA L4",
        (8, 9),
        58,
        48,
        22559,
        "PyTorch out-of-memory messages on Google Cloud g2 machines, 22.03 GiB",
    ),
    _card("a10g", "NVIDIA A10G", (8, 6), 80, 6, 22587, _TORCH.format(22587)),
    _card("l40s", "NVIDIA L40S", (8, 9), 142, 96, 45589, _TORCH.format(45589)),
    _card(
        "a100-40",
        "NVIDIA A100-SXM4-40GB",
        (8, 0),
        108,
        40,
        40339.3125,
        "deviceQuery, 42298834944 bytes (github.com/bottlerocket-os/bottlerocket/pull/3873)",
    ),
    _card("a100-80", "NVIDIA A100-SXM4-80GB", (8, 0), 108, 40, 81151, _LLAMA.format(81151)),
    _card("h100-80", "NVIDIA H100 80GB HBM3", (9, 0), 132, 50, 81089, _TORCH.format(81089) + " (torch 2.7, CUDA 12.8)"),
    _card(
        "h200",
        "NVIDIA H200",
        (9, 0),
        132,
        60,
        150109880320 / MIB,
        "torch.cuda.mem_get_info on such a card, 150109880320 bytes (driver 580.159.04, CUDA 13.0)",
    ),
    _card("b200", "NVIDIA B200", (10, 0), 148, 126, 182631, _TORCH.format(182631)),
)

_BY_NAME = {card.name: card for card in CARDS}


def _key(name: str) -> str:
    return name.lower().replace("_", "-").replace(" ", "-")


def find_card(name: str) -> Card:
    """Return the card called ``name``. Case is ignored, and ``_`` and blanks may stand for ``-``.

    Raises:
        VramUsageError: no card has that name; the message suggests similar names.
    """
    key = _key(name)
    for prefix in ("dry:", "nvidia-", "geforce-", "tesla-"):
        key = key.removeprefix(prefix)
    card = _BY_NAME.get(key) or _BY_NAME.get(key.replace("rtx", "rtx-", 1)) or _BY_NAME.get(f"rtx-{key}")
    if card is not None:
        return card
    near = difflib.get_close_matches(key, list(_BY_NAME), n=3, cutoff=0.5)
    near += [known for known in _BY_NAME if key and key in known and known not in near]
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise VramUsageError(f"there is no card {name!r} in the table: {hint}known cards are {', '.join(_BY_NAME)}")


def context_source(card: Card) -> str:
    """Say where the figure of a card's context is from."""
    return CONTEXT_SOURCE if card.growth is None else MEASURED_CONTEXT_SOURCE


def context_caveat(card: Card) -> str:
    """Say how far a card's context can be trusted, wherever it is shown; empty if it was measured on such a card."""
    return IDLE_CONTEXT if card.growth is None else ""


def context_notes(product: str) -> tuple[Note, ...]:
    """Return the caveat of a context for reports that show all that a dry card holds.

    Args:
        product: the name that the driver reports.

    Returns:
        One note, or none if the context was measured on such a card or the table has no card of that name.
    """
    caveats = {context_caveat(card) for card in CARDS if card.product == product} - {""}
    return tuple(Note(name="CUDA context", text=text, source="driver") for text in sorted(caveats))
