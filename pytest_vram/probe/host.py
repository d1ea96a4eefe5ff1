"""The probe for CPU tensors, used if torch has no CUDA. It observes every operator that runs.

Each storage counts from the operator that creates it until it is freed, with the size of the block that the CUDA
caching allocator would use. This includes saved activations and optimizer state. There is no cache, so the probe
reports no reserved figure.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections import deque
from functools import partial
from time import time_ns
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pytest_vram import torch_private
from pytest_vram.code_owner import frames, innermost
from pytest_vram.memory import Device, Peak
from pytest_vram.probe.base import PlainProbe
from pytest_vram.probe.history import MAX_EVENTS
from pytest_vram.probe.recorder import Recorder

if TYPE_CHECKING:
    from pytest_vram.memory import Holder, Kind, Timeline

_ROUND = 512


class _Follower(TorchDispatchMode):
    """Runs for every operator of the thread, and counts the storages of the tensors that it returns."""

    reserves = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotations here
        self.requested = self.allocated = 0
        self.peak_requested = self.peak_allocated = 0
        self.recording = False
        self.recorded: deque[dict[str, Any]] = deque(maxlen=MAX_EVENTS)
        self._known: dict[int, tuple[weakref.ref[Any], int, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self._see(result)
        elif isinstance(result, (tuple, list)):
            for item in result:
                if isinstance(item, Tensor):
                    self._see(item)
                elif isinstance(item, (tuple, list)):  # the foreach operators return lists
                    for part in item:
                        if isinstance(part, Tensor):
                            self._see(part)
        return result

    def _see(self, tensor: Tensor) -> None:
        if tensor.device.type != "cpu":
            return
        storage = tensor.untyped_storage()
        key, size = torch_private.storage_number(storage), storage.nbytes()
        known = self._known.get(key)
        if known is not None:
            if known[1] == size:
                return
            self._forget(key, known[0])  # the storage was resized in place
        if size == 0:
            return
        reference = weakref.ref(storage, partial(self._forget, key))
        block = -(-size // _ROUND) * _ROUND
        self._known[key] = (reference, size, block)
        self.requested += size
        self.allocated += block
        self.peak_requested = max(self.peak_requested, self.requested)
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        if self.recording:
            self._record({"action": "alloc", "addr": key, "size": size, "frames": _user_frame()})

    def _forget(self, key: int, reference: weakref.ref[Any]) -> None:
        known = self._known.get(key)
        if known is None or known[0] is not reference:  # another storage has this address already
            return
        del self._known[key]
        self.requested -= known[1]
        self.allocated -= known[2]
        if self.recording:
            self._record({"action": "free_requested", "addr": key, "size": known[1]})

    def _record(self, event: dict[str, Any]) -> None:
        event["time_us"] = time_ns() // 1000
        self.recorded.append(event)

    # The methods of pytest_vram.probe.recorder.Source.

    def before(self) -> list[dict[str, Any]]:
        """Return each live storage as a segment with one block."""
        return [
            {
                "device": 0,
                "address": key,
                "total_size": block,
                "blocks": [{"address": key, "size": block, "state": "active_allocated"}],
            }
            for key, (_, _, block) in self._known.items()
        ]

    def events(self, index: int) -> tuple[list[dict[str, Any]], None]:
        """Return the allocations and frees since the recording began."""
        return list(self.recorded), None

    def address(self, tensor: Tensor) -> tuple[int, int] | None:
        """Return device 0 and the address of the storage object; its data may have no address, or share another's."""
        return (0, torch_private.storage_number(tensor.untyped_storage())) if tensor.device.type == "cpu" else None


class HostProbe(PlainProbe):
    """Measures CPU tensors between ``begin_test`` and ``end_test``, in the thread that runs the tests."""

    kind: Kind = "host"

    def __init__(self) -> None:
        self._follower = _Follower()
        self._recorder: Recorder | None = None
        self._entered = False

    def devices(self) -> tuple[Device, ...]:
        """Return the host as one device."""
        return (Device(kind="host", index=0, name="CPU", total_bytes=_pages("SC_PHYS_PAGES")),)

    def allocated(self) -> tuple[int, ...]:
        """Return the bytes of the live storages, rounded up to blocks."""
        return (self._follower.allocated,)

    def peak(self) -> tuple[Peak, ...]:
        """Return the peaks of requested and allocated bytes since the last reset."""
        follower = self._follower
        return (Peak(requested_bytes=follower.peak_requested, allocated_bytes=follower.peak_allocated),)

    def reset_peak(self) -> None:
        """Set the peaks to what is allocated now."""
        follower = self._follower
        follower.peak_requested, follower.peak_allocated = follower.requested, follower.allocated

    def free_bytes(self, index: int) -> int | None:
        """Return the free memory of the host in bytes."""
        return _pages("SC_AVPHYS_PAGES")

    def begin_test(self, *, record: bool, timeline: bool = False) -> None:
        """Observe operators from now on."""
        self._follower.recorded.clear()
        self._follower.recording = record or timeline
        if self._follower.recording:
            self._recorder = Recorder(marks=timeline, source=self._follower)
            self._recorder.start()
        if not self._entered:
            self._follower.__enter__()  # type: ignore[no-untyped-call]  # torch has no annotations here
            self._entered = True

    def end_test(self) -> None:
        """Stop observing operators. Storages that are alive still count until they are freed."""
        if self._entered:
            self._follower.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # torch has no annotations here
            self._entered = False
        if self._recorder is not None:
            self._recorder.stop()
            self._recorder = None
        self._follower.recording = False
        self._follower.recorded.clear()

    def holders(self, index: int, top: int) -> tuple[Holder, ...]:
        """Return the places in the code that held most at the peak."""
        return self._recorder.holders(index, top) if self._recorder is not None else ()

    def left(self, index: int, top: int) -> tuple[Holder, ...]:
        """Return the places in the code whose allocations the test did not free."""
        return self._recorder.holders(index, top, left=True) if self._recorder is not None else ()

    def timeline(self, index: int) -> Timeline | None:
        """Return memory over time; None if it was not recorded."""
        return self._recorder.timeline(index) if self._recorder is not None else None


def _user_frame() -> list[dict[str, Any]]:
    """Return the frame to show for an allocation, in the form of torch's memory history: a list of one or none."""
    user, library, torch = innermost(frames(sys._getframe(2)))
    found = user or library or torch
    return [{"filename": found.filename, "line": found.line, "name": found.function}] if found else []


def _pages(name: str) -> int | None:
    try:
        return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):  # macOS does not know every name, and Windows has no sysconf
        return None
