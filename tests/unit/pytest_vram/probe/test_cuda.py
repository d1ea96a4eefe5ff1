"""Device bytes of the ``cuda`` probe, against what NVML may answer."""

from __future__ import annotations

import pytest

from pytest_vram.memory import Device
from pytest_vram.probe import arena, cuda, nvml

CARD = Device(kind="cuda", index=0, name="card", uuid="GPU-1")


@pytest.mark.parametrize(
    ("nvml_says", "beside"),
    [(500, 400), (100, 0), (0, None), (None, None)],
    ids=["context", "nothing beside", "other process numbers in a container", "not told"],
)
def test_what_the_process_holds_beside_the_allocator(
    monkeypatch: pytest.MonkeyPatch, nvml_says: int | None, beside: int | None
) -> None:
    monkeypatch.setattr(nvml, "process_bytes", lambda uuid, index: nvml_says)
    assert cuda._beside_the_allocator(0, CARD, reserved=100) == beside


def test_without_nvml_device_bytes_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(uuid: str | None, index: int) -> int:
        raise ImportError("no pynvml")

    monkeypatch.setattr(nvml, "process_bytes", missing)
    assert cuda._beside_the_allocator(0, CARD, reserved=100) is None


def test_an_out_of_memory_event_changes_nothing() -> None:
    """Unlike all others it has no address."""
    assert arena.Arena().see({"action": "oom", "device_free": 1, "size": 2**30, "stream": 0}) == 0


@pytest.mark.parametrize(
    ("value", "chosen"),
    [
        (None, ["0", "1"]),
        ("1", ["1"]),
        ("1,0", ["1", "0"]),
        ("GPU-8d6,MIG-4a", ["GPU-8d6", "MIG-4a"]),
        ("1,-1,0", ["1"]),
        ("7", []),
        ("", []),
    ],
)
def test_visible_devices_are_read_as_the_driver_reads_them(value: str | None, chosen: list[str]) -> None:
    assert nvml.visible_selectors(value, 2) == chosen
