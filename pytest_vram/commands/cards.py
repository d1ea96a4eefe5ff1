"""The command ``python -m pytest_vram cards``: print the card table with its sources."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from pytest_vram.drygpu.cards import (
    CARDS,
    CHANNELS_SOURCE,
    CONTEXT_SOURCE,
    SPEED_SOURCE,
    Card,
    context_source,
    find_card,
)
from pytest_vram.units import GIB, format_bytes

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``cards`` to the command line."""
    parser = subparsers.add_parser(
        "cards", help="list the cards that a dry GPU can be", description="List the cards that a dry GPU can be."
    )
    parser.add_argument("names", nargs="*", metavar="CARD", help="show only these cards, with all details")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Print the table, or the details of the named cards; return 0."""
    cards = [find_card(name) for name in args.names] or list(CARDS)
    if args.json:
        print(json.dumps([asdict(card) for card in cards], indent=2))
    elif args.names:
        print("\n\n".join(_details(card) for card in cards))
    else:
        print(render(cards))
    return 0


def render(cards: Sequence[Card]) -> str:
    """Return the table as text: one line per card, then the sources."""
    lines = [
        f"{'card':<14} {'memory':>10} {'bytes':>14} {'cc':>5} {'SMs':>4} {'context':>8}  source of the memory figure"
    ]
    for card in cards:
        about = " ~" if card.approximate else "  "
        lines.append(
            f"{card.name:<14} {card.total_bytes / GIB:>6.2f} GiB{about[1]}{card.total_bytes:>13} "
            f"{card.capability[0]}.{card.capability[1]:<3} {card.multiprocessors:>4} "
            f"{format_bytes(card.context_bytes):>8}  {card.source}"
        )
    lines += [
        "",
        "~: deduced, not read from such a card. Other drivers report some 100 MiB more or less: --total-gb sets it.",
    ]
    lines.append(f"context: {CONTEXT_SOURCE}.")
    return "\n".join(lines)


def _channels(card: Card) -> str:
    if not card.ring_channels:
        return "none on the card"
    return f"{card.ring_channels} for collectives, {card.peer_channels} between two ranks"


def _details(card: Card) -> str:
    limits = card.architecture
    return "\n".join(
        [
            f"{card.name}: {card.product}",
            f"  memory          {card.total_bytes} bytes ({format_bytes(card.total_bytes)})"
            f"{', deduced' if card.approximate else ''}",
            f"                  {card.source}",
            f"  context         {card.context_bytes} bytes ({format_bytes(card.context_bytes)})",
            f"                  {context_source(card)}",
            f"  capability      {card.capability[0]}.{card.capability[1]}",
            f"  multiprocessors {card.multiprocessors}, each with {format_bytes(limits.shared_multiprocessor_bytes)}"
            f" of shared memory and up to {limits.max_threads} threads",
            f"  L2 cache        {format_bytes(card.l2_bytes)}",
            f"  clocks          {card.clock_mhz} MHz, memory {card.memory_clock_mhz} MHz over {card.bus_bits} bits",
            f"                  {SPEED_SOURCE}",
            f"  NCCL's channels {_channels(card)}",
            f"                  {CHANNELS_SOURCE}",
        ]
    )
