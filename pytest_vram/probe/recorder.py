"""Record the allocations of one test with the program's events, and find memory over time and the peak's holders."""

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


_EVER = ("allocated", "freed")  # these counts only grow: if they are unchanged, nothing was allocated or freed


class Source(Protocol):
    """The history of allocations that a recorder reads."""

    reserves: bool
    """Whether there is an allocator that reserves segments."""

    def before(self) -> Sequence[Mapping[str, Any]]:
        """Return the current segments, as in ``torch.cuda.memory._snapshot()["segments"]``."""

    def events(self, index: int) -> tuple[Sequence[Mapping[str, Any]], Mapping[str, Any] | None]:
        """Return the events of device ``index``, as in a snapshot's ``"device_traces"``, and the allocator settings."""

    def address(self, tensor: Tensor) -> tuple[int, int] | None:
        """Return a tensor's device and address; see :class:`pytest_vram.probe.program_events.Notes`."""


class Recorder:
    """Evaluates a history of allocations: memory over time, and who held the peak.

    With ``marks``, it also records the program's events, which tell the category and module of each allocation. Without
    them, recording costs nothing beyond the history; a failing budget shows such a curve, without categories.

    Args:
        marks: whether to record the program's events.
        source: the history; ``None`` takes torch's history of CUDA devices.
    """

    def __init__(self, *, marks: bool = True, source: Source | None = None) -> None:
        self._source = source or TorchHistory()
        self._notes = Notes(self._source.address)
        self._marks = marks
        self._start_us = 0
        self._before: Sequence[Mapping[str, Any]] = ()
        self._read: dict[int, tuple[Replay, bool]] = {}

    def start(self) -> None:
        """Start to record; the history must be running."""
        self._before = self._source.before()
        self._start_us = time.time_ns() // 1000
        if self._marks:
            self._notes.start()

    def meet(self, module: nn.Module) -> None:
        """Label the tensors of a module before its first call; see :meth:`Notes.meet`."""
        self._notes.meet(module)

    def stop(self) -> None:
        """Stop recording the program's events."""
        self._notes.stop()

    def timeline(self, index: int) -> Timeline:
        """Return the memory of device ``index`` over time until now, with the segments at the peak."""
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
        """Return the ``top`` places in the code that held most at the recorded peak, with category and module.

        With ``left``, return the places whose allocations since the start are still live.
        """
        played, _ = self._replay(index)
        found = replay.holders(played, top if self._marks else len(played.blocks), left=left)
        return found if self._marks else _by_line(found, top)

    def _tell(self, block: Block) -> tuple[str, str | None]:
        """Return a block's line of code and its category, which is None without marks."""
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
    """Torch's own memory history of CUDA devices."""

    reserves = True

    def before(self) -> Sequence[Mapping[str, Any]]:
        """Return the current segments; none before CUDA is initialized."""
        import torch

        return _segments_now() if torch.cuda.is_initialized() else ()

    def events(self, index: int) -> tuple[Sequence[Mapping[str, Any]], Mapping[str, Any] | None]:
        """Return the events of device ``index``, and the allocator settings if this version of torch reports them."""
        snapshot = torch_private.memory_snapshot()
        traces = snapshot["device_traces"]
        return traces[index] if index < len(traces) else [], snapshot.get("allocator_settings")

    def address(self, tensor: Tensor) -> tuple[int, int] | None:
        """Return the device and address of a CUDA tensor's block; None for other tensors."""
        return on_card(tensor)


_seen: tuple[object, list[Mapping[str, Any]]] = (None, [])


def _segments_now() -> list[Mapping[str, Any]]:
    """Return the allocator's segments. Listing takes a microsecond per block, so it is repeated only after a change."""
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
    """Return the holders summed by line of code, because without marks their categories are guesses."""
    lines: dict[str, list[Holder]] = {}
    for holder in found:
        lines.setdefault(holder.location, []).append(holder)
    merged = [
        Holder(size_bytes=sum(h.size_bytes for h in same), count=sum(h.count for h in same), location=line)
        for line, same in lines.items()
    ]
    return tuple(sorted(merged, key=lambda holder: (-holder.size_bytes, holder.location))[:top])
