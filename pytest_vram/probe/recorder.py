"""Records one test: allocations, and what the program did meanwhile; tells memory over time and who held the peak."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from pytest_vram import torch_private
from pytest_vram.memory import Holder
from pytest_vram.probe import replay
from pytest_vram.probe.history import MAX_EVENTS
from pytest_vram.probe.program_events import Notes, on_card
from pytest_vram.probe.segment_layout import layout

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor, nn

    from pytest_vram.memory import Timeline
    from pytest_vram.probe.replay import Block, Replay


_EVER = ("allocated", "freed")  # counts that only grow: the same ones mean that nothing happened


class Source(Protocol):
    """Where a recorder reads the history."""

    reserves: bool
    """Whether there is an allocator, with segments that are reserved."""

    def before(self) -> Sequence[Mapping[str, Any]]:
        """The segments now, as in ``torch.cuda.memory._snapshot()["segments"]``."""

    def events(self, index: int) -> tuple[Sequence[Mapping[str, Any]], Mapping[str, Any] | None]:
        """What device ``index`` recorded, as in the snapshot's ``"device_traces"``; and the allocator's settings."""

    def address(self, tensor: Tensor) -> tuple[int, int] | None:
        """See :class:`pytest_vram.probe.program_events.Notes`."""


class Recorder:
    """While a history runs: what was held before it, and the program's marks.

    Without ``marks`` there is the curve, and no categories: what a failing budget shows, at no cost while it runs.

    Args:
        marks: whether to listen to the program.
        source: the history; torch's of CUDA devices without one.
    """

    def __init__(self, *, marks: bool = True, source: Source | None = None) -> None:
        self._source = source or TorchHistory()
        self._notes = Notes(self._source.address)
        self._marks = marks
        self._start_us = 0
        self._before: Sequence[Mapping[str, Any]] = ()
        self._read: dict[int, tuple[Replay, bool]] = {}

    def start(self) -> None:
        """Begin, after the history."""
        self._before = self._source.before()
        self._start_us = time.time_ns() // 1000
        if self._marks:
            self._notes.start()

    def meet(self, module: nn.Module) -> None:
        """Tell whose the tensors of a module are before its first call; see :meth:`Notes.meet`."""
        self._notes.meet(module)

    def stop(self) -> None:
        """Remove the hooks."""
        self._notes.stop()

    def timeline(self, index: int) -> Timeline:
        """Memory over time of device ``index`` until now, and its segments at the peak."""
        played, cut = self._replay(index)
        segments = self._segments(index)
        before = sum(segment["total_size"] for segment in segments)
        found = replay.timeline(played, start_us=self._start_us, reserved_before=before, cut=cut)
        if not self._marks:
            found = replace(found, categories=(), modules=())
        if not self._source.reserves:
            return replace(found, reserved=())
        return replace(found, layout=layout(played, segments, self._tell))

    def holders(self, index: int, top: int, *, left: bool = False) -> tuple[Holder, ...]:
        """The ``top`` places that held most at the recorded peak, with category and module; with ``left``, what was
        allocated since the start and is there now."""
        played, _ = self._replay(index)
        found = replay.holders(played, top if self._marks else len(played.blocks), left=left)
        return found if self._marks else _by_line(found, top)

    def _tell(self, block: Block) -> tuple[str, str | None]:
        """Line and category; without marks the category is a guess."""
        return replay.place(block), (block.category or "other") if self._marks else None

    def _replay(self, index: int) -> tuple[Replay, bool]:
        recorded, settings = self._source.events(index)
        known = self._read.get(index)
        events = [event for event in recorded if event["time_us"] >= self._start_us]
        if known is None or len(known[0].events) != len(events):
            played = replay.replay(events, self._segments(index), self._notes.marks, index, settings)
            self._read[index] = known = (played, len(recorded) >= MAX_EVENTS)
        return known

    def _segments(self, index: int) -> list[Mapping[str, Any]]:
        return [segment for segment in self._before if segment["device"] == index]


class TorchHistory:
    """Torch's own, of CUDA devices."""

    reserves = True

    def before(self) -> Sequence[Mapping[str, Any]]:
        """See :class:`Source`."""
        import torch

        return _segments_now() if torch.cuda.is_initialized() else ()

    def events(self, index: int) -> tuple[Sequence[Mapping[str, Any]], Mapping[str, Any] | None]:
        """See :class:`Source`."""
        snapshot = torch_private.memory_snapshot()
        traces = snapshot["device_traces"]
        # Not every torch tells its settings.
        return traces[index] if index < len(traces) else [], snapshot.get("allocator_settings")

    def address(self, tensor: Tensor) -> tuple[int, int] | None:
        """See :class:`Source`."""
        return on_card(tensor)


_seen: tuple[object, list[Mapping[str, Any]]] = (None, [])


def _segments_now() -> list[Mapping[str, Any]]:
    """The allocator's segments. To list them takes a microsecond a block, so it is done again only after a change."""
    import torch

    global _seen
    state = tuple(
        tuple(stats[name]["all"][which] for name in ("active", "allocation", "segment") for which in _EVER)
        for stats in (torch_private.memory_stats(index) for index in range(torch.cuda.device_count()))
    )
    if state != _seen[0]:
        _seen = (state, list(torch_private.memory_snapshot()["segments"]))
    return _seen[1]


def _by_line(found: Iterable[Holder], top: int) -> tuple[Holder, ...]:
    """Without marks, categories are guesses: by line alone."""
    lines: dict[str, list[Holder]] = {}
    for holder in found:
        lines.setdefault(holder.location, []).append(holder)
    merged = [
        Holder(size_bytes=sum(h.size_bytes for h in same), count=sum(h.count for h in same), location=line)
        for line, same in lines.items()
    ]
    return tuple(sorted(merged, key=lambda holder: (-holder.size_bytes, holder.location))[:top])
