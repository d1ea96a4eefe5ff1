"""A device for tests of the plugin: allocates what it is told to, to the byte, and remembers who asked."""

import os
import sys

from pytest_vram.memory import Device, Holder, Peak
from pytest_vram.probe.base import PlainProbe

MB = 2**20


class MadeUpProbe(PlainProbe):
    kind = "cuda"

    def __init__(self):
        self.count = int(os.environ.get("MADE_UP_DEVICES", "1"))
        self.now, self.high = [0] * self.count, [0] * self.count
        self.held = {}
        self.limit = None
        self.hear = []
        self.caps = []
        self.foreign = False

    def devices(self):
        return tuple(
            Device(kind="cuda", index=index, name="Made-up 9000", total_bytes=16 * 2**30, capability=(8, 9))
            for index in range(self.count)
        )

    def allocated(self):
        return tuple(self.now)

    def peak(self):
        return tuple(Peak(requested_bytes=h, allocated_bytes=h, reserved_bytes=2 * h) for h in self.high)

    def reset_peak(self):
        self.high = list(self.now)

    def on_reset(self, before):
        self.hear.append(before)

    def free_bytes(self, index):
        return 2**30

    def contaminated(self):
        return (self.foreign,) * self.count

    def begin_test(self, *, record, timeline=False):
        self.foreign = False
        self.before = set(self.held)

    def left(self, index, top):
        found = [
            Holder(size_bytes=size, count=1, location=where)
            for handle, (size, where, on) in self.held.items()
            if on == index and handle not in self.before
        ]
        return tuple(sorted(found, key=lambda holder: -holder.size_bytes)[:top])

    def holders(self, index, top):
        found = [
            Holder(size_bytes=size, count=1, location=where) for size, where, on in self.held.values() if on == index
        ]
        return tuple(sorted(found, key=lambda holder: -holder.size_bytes)[:top])

    def cap(self, index, limit_bytes):
        self.limit = limit_bytes
        self.caps.append(limit_bytes)
        return True


PROBE = MadeUpProbe()


def alloc(size, device=0):
    if PROBE.limit is not None and PROBE.now[device] + size > PROBE.limit:
        raise MemoryError("CUDA out of memory")
    frame = sys._getframe(1)
    handle = object()
    where = f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno} in {frame.f_code.co_name}"
    PROBE.held[handle] = (size, where, device)
    PROBE.now[device] += size
    PROBE.high[device] = max(PROBE.high[device], PROBE.now[device])
    return handle


def free(handle):
    size, _, device = PROBE.held.pop(handle)
    PROBE.now[device] -= size


class Tensor:
    """Memory that goes when nobody refers to it any longer."""

    def __init__(self, size, device=0):
        self.handle = alloc(size, device)

    def __del__(self):
        free(self.handle)


def reset_as_the_program_would():
    for hear in PROBE.hear:
        hear()
    PROBE.high = list(PROBE.now)
