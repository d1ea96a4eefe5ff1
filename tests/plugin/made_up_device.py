"""A device for tests of the plugin: allocates what it is told to, to the byte, and remembers who asked."""

import sys

from pytest_vram.memory import Device, Holder, Peak
from pytest_vram.probe.protocol import Counters

MB = 2**20


class MadeUpProbe:
    kind = "cuda"

    def __init__(self):
        self.now = self.high = 0
        self.held = {}
        self.limit = None
        self.hear = []
        self.caps = []
        self.foreign = False

    def devices(self):
        return (Device(kind="cuda", index=0, name="Made-up 9000", total_bytes=16 * 2**30, capability=(8, 9)),)

    def allocated(self):
        return (self.now,)

    def peak(self):
        return (Peak(requested_bytes=self.high, allocated_bytes=self.high, reserved_bytes=2 * self.high),)

    def reset_peak(self):
        self.high = self.now

    def on_reset(self, before):
        self.hear.append(before)

    def counters(self):
        return (Counters(),)

    def free_bytes(self, index):
        return 2**30

    def contaminated(self):
        return (self.foreign,)

    def begin_test(self, *, record, timeline=False):
        self.foreign = False

    def end_test(self):
        pass

    def holders(self, index, top):
        found = [Holder(size_bytes=size, count=1, location=where) for size, where in self.held.values()]
        return tuple(sorted(found, key=lambda holder: -holder.size_bytes)[:top])

    def timeline(self, index):
        return None

    def host_reads(self):
        return ()

    def settle(self):
        pass

    def release(self):
        pass

    def cap(self, index, limit_bytes):
        self.limit = limit_bytes
        self.caps.append(limit_bytes)
        return True


PROBE = MadeUpProbe()


def alloc(size):
    if PROBE.limit is not None and PROBE.now + size > PROBE.limit:
        raise MemoryError("CUDA out of memory")
    frame = sys._getframe(1)
    handle = object()
    PROBE.held[handle] = (
        size,
        f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno} in {frame.f_code.co_name}",
    )
    PROBE.now += size
    PROBE.high = max(PROBE.high, PROBE.now)
    return handle


def free(handle):
    PROBE.now -= PROBE.held.pop(handle)[0]


def reset_as_the_program_would():
    for hear in PROBE.hear:
        hear()
    PROBE.high = PROBE.now
