"""Render host memory for reports: one line or a few for each test that has a budget for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_vram.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pytest_vram.memory import HostPeak
    from pytest_vram.report.rows import Row

_SHOWN = 200  # the most tests in a Markdown report


def summary(host: HostPeak) -> str:
    """Return a text such as ``2.50 GiB of 2.00 GiB, 512 MiB over; pinned 1.00 GiB``."""
    if host.peak_bytes is None:
        return f"not measured: {host.missing}"
    over = f", {format_bytes(host.over_bytes)} over" if host.over_bytes else ""
    pinned = f"; pinned {format_bytes(host.pinned_bytes)}" if host.pinned_bytes else ""
    below = f"; {_below(host)}" if host.children_bytes else ""
    return f"{format_bytes(host.peak_bytes)} of {format_bytes(host.limit_bytes)}{over}{below}{pinned}"


def details(host: HostPeak) -> list[str]:
    """Return the parts of a measured peak, one line each."""
    how = f"sampled every {host.interval_seconds * 1000:.0f} ms" if host.sampled else "the kernel's maximum"
    lines = [
        f"this process  {format_bytes(host.own_bytes)} ({how}), above the {format_bytes(host.start_bytes)} that it"
        " held when the test began"
    ]
    if host.children_bytes:
        lines.append(f"{_below(host)} (sampled every {host.interval_seconds * 1000:.0f} ms)")
    if host.files_bytes or host.shared_bytes:
        lines.append(f"of it  mapped files {format_bytes(host.files_bytes)}, shared {format_bytes(host.shared_bytes)}")
    if host.pinned_bytes is not None:
        lines.append(f"pinned  {format_bytes(host.pinned_bytes)}, counted by PyTorch")
    if host.holders:
        lines.append("CPU tensors at their own peak, by the line that allocated them:")
        lines += [f"  {format_bytes(holder.size_bytes):>9}  {holder.location}" for holder in host.holders]
    return lines


def terminal_lines(table: Iterable[Row], top: int) -> list[str]:
    """Return the lines of the terminal's section; empty if no test has a budget of host memory."""
    found = _largest_first(table)
    if not found:
        return []
    lines = ["host memory:", *(f"  {nodeid}: {summary(host)}" for nodeid, host in found[: max(top, 10)])]
    return lines + ([f"  and {len(found) - max(top, 10)} more tests"] if len(found) > max(top, 10) else [])


def markdown_lines(table: Iterable[Row]) -> list[tuple[str, str]]:
    """Return each test that has a budget of host memory, with its summary."""
    return [(nodeid, summary(host)) for nodeid, host in _largest_first(table)[:_SHOWN]]


def _largest_first(table: Iterable[Row]) -> list[tuple[str, HostPeak]]:
    found = [(row.nodeid, row.host) for row in table if row.host is not None]
    return sorted(found, key=lambda pair: (-pair[1].over_bytes, -(pair[1].peak_bytes or 0), pair[0]))


def _below(host: HostPeak) -> str:
    processes = "1 process" if host.children == 1 else f"{host.children} processes"
    return f"{processes} below it {format_bytes(host.children_bytes)}"
