"""Replay torch's memory history with the program's events, to find memory over time and the holders of the peak."""

from __future__ import annotations

import bisect
import itertools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_vram.memory import Holder, Series, Timeline
from pytest_vram.memory.timeline import CATEGORIES
from pytest_vram.probe.arena import Arena
from pytest_vram.probe.history import BACKWARD, user_line
from pytest_vram.probe.program_events import module_group

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from pytest_vram.memory.timeline import Category
    from pytest_vram.probe.program_events import Label, Marks, Step

POINTS = 240
_MODULES = 7
_OUTSIDE = "outside modules"
HELD_BEFORE = "held before the test"
"""The location shown for blocks that were allocated before the recording."""
_MODULE_CALL = "torch/nn/modules/module.py"
_LOSS = re.compile(r"loss|cross_entropy", re.IGNORECASE)


@dataclass(slots=True)
class Block:
    """One allocation. ``born``, ``died`` and ``gone`` are positions in the list of events; -1 is before the first.

    A block dies when the program frees it, and is gone when no other stream uses it any more.
    """

    size: int
    born: int
    address: int = 0
    died: int | None = None
    gone: int | None = None
    category: Category | None = None
    module: str = ""
    frames: Sequence[Mapping[str, Any]] = ()

    def alive(self, at: int) -> bool:
        """Return whether a tensor used the block after the first ``at`` events."""
        return self.born < at and (self.died is None or self.died >= at)


class _State:
    """What the program is doing at the current event of the replay."""

    def __init__(self) -> None:
        self.stack: list[Step] = []
        self.doing: list[str] = []
        self.past_head = False
        self.call: list[Block] = []  # blocks allocated in the outermost module call that is in progress
        self.saved: list[Block] = []  # blocks that outlived such a call: saved for the backward pass

    def pass_by(self, step: Step) -> None:
        _, kind, _, head = step
        if kind == "enter":
            self.past_head = head or (self.past_head and bool(self.stack))
            self.stack.append(step)
        elif kind == "leave":
            if self.stack:
                self.stack.pop()
            if not self.stack:
                self._call_over()
        elif kind == "end":
            if self.doing and self.doing.pop() == "backward":
                self._backward_over()
        else:
            self.doing.append(kind)
            self.past_head = False
            if kind == "optimizer":  # an exception may have left modules open
                self.stack.clear()

    def name(self, block: Block) -> None:
        """Set a new block's module, and the category that it has if nothing later corrects it."""
        if self.stack:
            block.module = self.stack[-1][2]
        doing = self.doing[-1] if self.doing else ""
        if doing == "optimizer" or (doing == "backward" and not self.stack):
            block.category = "temporary"
        elif not doing and (self.past_head or _in_loss(block.frames)):
            block.category = "logits"
        elif self.stack:
            block.category = "temporary"
            self.call.append(block)
        else:
            block.category = "other"

    def _call_over(self) -> None:
        for block in self.call:
            if block.died is None and block.category == "temporary":
                block.category = "activations"
                self.saved.append(block)
        self.call.clear()

    def _backward_over(self) -> None:
        # A block that outlives the backward pass was not saved for it. It is a BLAS workspace, or a kept output.
        for block in self.saved:
            if block.died is None and block.category == "activations":
                block.category = "other"
        self.saved.clear()


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """The result of replaying a history.

    Attributes:
        events: the events as they were recorded.
        blocks: every block that was live at some time.
        totals: allocated bytes before the first event, and after each event.
        peak: position of the first maximum in ``totals``.
    """

    events: Sequence[Mapping[str, Any]]
    blocks: Sequence[Block]
    totals: Sequence[int]
    peak: int


def replay(
    events: Sequence[Mapping[str, Any]],
    before: Sequence[Mapping[str, Any]],
    marks: Marks,
    device: int,
    settings: Mapping[str, Any] | None = None,
) -> Replay:
    """Replay a history to find every block, what it is used for, and the allocated bytes over time.

    Args:
        events: the events of one device, as in ``torch.cuda.memory._snapshot()["device_traces"]``.
        before: the segments of that device as they were before the first event, as in the same function's
            ``"segments"``.
        marks: the program's events and labels.
        device: index of the device; only its labels are used.
        settings: the allocator's settings, as in the same function's ``"allocator_settings"``.
    """
    blocks = _blocks(events, before, marks, device, Arena(settings))
    change = [0] * (len(events) + 2)
    for block in blocks:
        change[block.born + 1] += block.size
        if block.died is not None:
            change[block.died + 1] -= block.size
    totals = list(itertools.accumulate(change[: len(events) + 1]))
    return Replay(events=events, blocks=blocks, totals=totals, peak=totals.index(max(totals)))


def _blocks(
    events: Sequence[Mapping[str, Any]],
    before: Sequence[Mapping[str, Any]],
    marks: Marks,
    device: int,
    arena: Arena,
) -> list[Block]:
    live = {
        address: Block(size=size, born=-1, address=address, category="other")
        for segment in before
        for address, size in arena.take_segment(segment).items()
    }
    blocks, state = list(live.values()), _State()
    labels = [label for label in marks.labels if label[1] == device]
    dying: dict[int, Block] = {}
    at_step = at_label = 0
    for position, event in enumerate(events):
        now = event["time_us"] * 1000
        while at_step < len(marks.steps) and marks.steps[at_step][0] <= now:
            state.pass_by(marks.steps[at_step])
            at_step += 1
        while at_label < len(labels) and labels[at_label][0] <= now:
            _stick(labels[at_label], live)
            at_label += 1
        size = arena.see(event)
        action = event["action"]
        if action == "alloc":
            block = Block(size=size, born=position, address=event["addr"], frames=event.get("frames", ()))
            state.name(block)
            live[block.address] = block
            blocks.append(block)
        elif action == "free_requested" and (freed := live.pop(event["addr"], None)) is not None:
            freed.died = position
            dying[freed.address] = freed
        elif action == "free_completed" and (freed := dying.pop(event["addr"], None)) is not None:
            freed.gone = position
    for step in marks.steps[at_step:]:
        state.pass_by(step)
    for label in labels[at_label:]:
        _stick(label, live)
    return blocks


def timeline(
    played: Replay, *, start_us: int, reserved_before: int, cut: bool = False, points: int = POINTS
) -> Timeline:
    """Reduce a replay to a curve of at most ``points`` + 2 points, by category and module. The peak stays exact.

    Args:
        played: the result of :func:`replay`.
        start_us: when the measurement began, in microseconds of the Unix clock.
        reserved_before: bytes that the allocator held before the first event.
        cut: whether the oldest events were lost.
        points: the number of points, without the first, the last and the peak.
    """
    events, blocks, totals = played.events, played.blocks, played.totals
    chosen = _chosen(totals, played.peak, points)
    categories = _series(blocks, chosen, {name: name for name in CATEGORIES}, lambda block: block.category or "other")
    named = _largest_modules(blocks, played.peak)
    modules = _series(blocks, chosen, {name: name for name in (*named, "other")}, module_of)
    reserved = _reserved(events, reserved_before)
    times = [max(0.0, (events[max(0, at - 1)]["time_us"] - start_us) / 1e6) if events else 0.0 for at in chosen]
    return Timeline(
        times=tuple(round(seconds, 6) for seconds in times),
        allocated=tuple(totals[at] for at in chosen),
        reserved=tuple(reserved[at] for at in chosen),
        categories=tuple(series for series in categories if any(series.sizes)),
        modules=tuple(series for series in modules if any(series.sizes)),
        peak_index=chosen.index(played.peak),
        events=len(events),
        cut=cut,
    )


def holders(played: Replay, top: int, *, left: bool = False) -> tuple[Holder, ...]:
    """Return the ``top`` largest holders at the peak, by line of code, category and module.

    With ``left``, return the holders of what was allocated since the first event and is live after the last one.
    """
    at = len(played.events) if left else played.peak
    groups: dict[tuple[str, str, str], list[int]] = {}
    for block in played.blocks:
        if block.alive(at) and not (left and block.born < 0):
            key = (place(block), block.category or "other", module_of(block))
            groups.setdefault(key, []).append(block.size)
    found = [
        Holder(
            size_bytes=sum(sizes),
            count=len(sizes),
            location=line,
            category=category,
            module=None if module == _OUTSIDE else module,
        )
        for (line, category, module), sizes in groups.items()
    ]
    return tuple(sorted(found, key=lambda h: (-h.size_bytes, h.location, h.category or "", h.module or ""))[:top])


def place(block: Block) -> str:
    """Return the line of code that is shown for a block."""
    if block.frames:
        return user_line(block.frames)
    if block.born < 0:
        return HELD_BEFORE
    return BACKWARD if not block.module else f"in {module_of(block)}"


def module_of(block: Block) -> str:
    """Return the group of modules that a block belongs to."""
    return module_group(block.module) if block.module else _OUTSIDE


def _stick(label: Label, live: Mapping[int, Block]) -> None:
    _, _, address, category, module = label
    block = live.get(address)
    if block is not None and block.category not in ("weights", "adapters", "quantization"):
        block.category = category
        block.module = module or block.module


def _chosen(totals: Sequence[int], peak: int, points: int) -> list[int]:
    """Return the positions of the first, the last and the peak, and of the maximum of each of ``points`` intervals."""
    count = len(totals)
    if count <= points:
        return list(range(count))
    edges = [count * i // points for i in range(points + 1)]
    best = {max(range(a, b), key=totals.__getitem__) for a, b in itertools.pairwise(edges)}
    return sorted(best | {0, peak, count - 1})


def _series(blocks: Iterable[Block], chosen: Sequence[int], names: Mapping[str, str], key: Any) -> list[Series]:
    """Return the bytes of each group at the chosen positions."""
    sums = {name: [0] * (len(chosen) + 1) for name in names}
    for block in blocks:
        name = key(block)
        change = sums[name if name in sums else "other"]
        change[bisect.bisect_left(chosen, block.born + 1)] += block.size
        if block.died is not None:
            change[bisect.bisect_left(chosen, block.died + 1)] -= block.size
    result = []
    for name, changes in sums.items():
        total, sizes = 0, []
        for change_here in changes[: len(chosen)]:
            total += change_here
            sizes.append(total)
        result.append(Series(name=name, sizes=tuple(sizes)))
    return result


def _largest_modules(blocks: Iterable[Block], peak: int) -> list[str]:
    sizes: dict[str, int] = {}
    for block in blocks:
        if block.alive(peak):
            group = module_of(block)
            sizes[group] = sizes.get(group, 0) + block.size
    return sorted(sizes, key=lambda name: (-sizes[name], name))[:_MODULES]


def _reserved(events: Sequence[Mapping[str, Any]], before: int) -> list[int]:
    signs = {"segment_alloc": 1, "segment_map": 1, "segment_free": -1, "segment_unmap": -1}
    found, total = [before], before
    for event in events:
        total += signs.get(event["action"], 0) * event["size"]
        found.append(total)
    return found


def _in_loss(frames: Iterable[Mapping[str, Any]]) -> bool:
    """Return whether a loss allocated a block: a function or file in its stack is named "loss" or "cross_entropy".

    A part of the name is enough. Only frames within the innermost module call count, because a ``compute_loss`` that
    calls the model contains the whole forward pass.
    """
    for frame in frames:
        if frame["name"] == "_call_impl" and frame["filename"].endswith(_MODULE_CALL):
            return False
        if _LOSS.search(frame["name"]) or _LOSS.search(frame["filename"].rpartition("/")[2]):
            return True
    return False
