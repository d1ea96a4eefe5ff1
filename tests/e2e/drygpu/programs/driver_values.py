"""Copies and fills against a model of memory, through the CUDA runtime itself: no PyTorch, so thousands a second.

The model: bytes that were sent can be read back until a larger copy than the limit, or a free, takes them away; and
what was never sent reads as zeros.
"""

from __future__ import annotations

import ctypes
import json
import random
import sys

from pytest_vram.drygpu import driver

GRAIN = 512
LIMIT = 1 << 20  # DRY_COPY_LIMIT of native/dry.h
cuda = ctypes.CDLL(None)
chance = random.Random(int(sys.argv[1]))


class Buffer:
    """One allocation, and what is believed to be in it. ``known`` holds whole grains, as the driver does."""

    def __init__(self, size: int) -> None:
        pointer = ctypes.c_void_p()
        assert cuda.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(size)) == 0
        self.address, self.size = pointer.value, size
        self.content = bytearray(size)
        self.known: set[int] = set()

    def grains(self, start: int, size: int) -> set[int]:
        return set(range(start // GRAIN, (start + size - 1) // GRAIN + 1))

    def write(self, start: int, data: bytes) -> None:
        self.content[start : start + len(data)] = data
        self.known |= self.grains(start, len(data))

    def forget(self, start: int, size: int) -> None:
        self.content[start : start + size] = bytes(size)
        self.known -= self.grains(start, size)


def pick_range(buffer: Buffer) -> tuple[int, int]:
    if buffer.size > 256 * GRAIN and chance.random() < 0.3:  # near the 64 grains that the driver marks at one go
        size = chance.choice([62, 63, 64, 65, 127, 128]) * GRAIN
        return chance.randrange((buffer.size - size) // (64 * GRAIN) + 1) * 64 * GRAIN, size
    size = min(buffer.size, int(2 ** chance.uniform(0, 22)))
    start = chance.randrange(buffer.size - size + 1)
    if chance.random() < 0.7:  # as tensors lie: at the start of a grain
        start = start // GRAIN * GRAIN
    return start, size


def copy(destination: int, source: int | bytes, size: int) -> int:
    to = ctypes.c_void_p(destination)
    from_ = source if isinstance(source, bytes) else ctypes.c_void_p(source)
    return int(cuda.cudaMemcpy(to, from_, ctypes.c_size_t(size), ctypes.c_int(4)))


def forgettable(buffer: Buffer, start: int, size: int) -> bool:
    """Forgetting part of a grain would leave the rest of it unmarked: tensors never do that to each other."""
    return start % GRAIN == 0 and (size % GRAIN == 0 or start + size == buffer.size)


buffers = [Buffer(chance.choice([3000, 70_000, 3 << 20, 5 << 20])) for _ in range(4)]
wrong: list[str] = []
for step in range(int(sys.argv[2])):
    buffer = chance.choice(buffers)
    start, size = pick_range(buffer)
    at = buffer.address + start
    action = chance.choice(["send", "send", "fill", "zero", "within", "read", "read", "known", "renew"])
    if action == "send":
        data = chance.randbytes(size)
        if size > LIMIT and not forgettable(buffer, start, size):
            continue
        assert copy(at, data, size) == 0
        buffer.write(start, data) if size <= LIMIT else buffer.forget(start, size)
    elif action in ("fill", "zero"):
        value = chance.randrange(1, 256) if action == "fill" else 0
        if value and size > LIMIT and not forgettable(buffer, start, size):
            continue
        assert cuda.cudaMemset(ctypes.c_void_p(at), ctypes.c_int(value), ctypes.c_size_t(size)) == 0
        buffer.write(start, bytes([value]) * size) if value == 0 or size <= LIMIT else buffer.forget(start, size)
    elif action == "within":
        other = chance.choice(buffers)
        if other is buffer or other.size < size or not forgettable(buffer, start, size):
            continue
        there = chance.randrange(other.size - size + 1) // GRAIN * GRAIN
        assert copy(at, other.address + there, size) == 0
        if size <= LIMIT and other.grains(there, size) <= other.known:
            buffer.write(start, bytes(other.content[there : there + size]))
        else:
            buffer.forget(start, size)
    elif action == "read":
        host = ctypes.create_string_buffer(b"\xaa" * size, size)
        assert copy(ctypes.addressof(host), at, size) == 0
        if host.raw != bytes(buffer.content[start : start + size]):
            wrong.append(f"step {step}: read of {size} bytes at {start}")
    elif action == "known":
        if driver.is_known(at, size) != (buffer.grains(start, size) <= buffer.known):
            wrong.append(f"step {step}: known, {size} bytes at {start}")
    else:
        assert cuda.cudaFree(ctypes.c_void_p(buffer.address)) == 0
        assert copy(at, b"x", 1) != 0, "freed memory is nobody's"
        buffers[buffers.index(buffer)] = Buffer(buffer.size)
print(json.dumps({"wrong": wrong[:5]}))
