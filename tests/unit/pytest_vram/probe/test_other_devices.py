"""Probes for GPUs that are not NVIDIA's, with made-up devices: none of them is at hand here."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from pytest_vram.drygpu import driver
from pytest_vram.errors import ProbeUnavailable
from pytest_vram.memory import Device, Peak
from pytest_vram.probe import cuda, nvml, select
from pytest_vram.probe.accelerator import AcceleratorProbe
from pytest_vram.probe.intervals import Intervals
from pytest_vram.probe.mps import BETWEEN, MpsProbe
from pytest_vram.probe.protocol import Counters, Probe

if TYPE_CHECKING:
    from pathlib import Path


class Metal:
    """``torch.mps``: what CPU tensors stand for is counted by hand."""

    def __init__(self) -> None:
        self.now = self.cache = 0

    def recommended_max_memory(self) -> int:
        return 1000

    def current_allocated_memory(self) -> int:
        return self.now

    def driver_allocated_memory(self) -> int:
        return self.now + self.cache

    def empty_cache(self) -> None:
        self.cache = 0


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch) -> Metal:
    found = Metal()
    for name in ("recommended_max_memory", "current_allocated_memory", "driver_allocated_memory", "empty_cache"):
        monkeypatch.setattr(torch.mps, name, getattr(found, name))
    return found


class Grows(torch.autograd.Function):
    """Takes memory in its backward pass, and gives it back in a later operator."""

    metal: Metal

    @staticmethod
    def forward(context: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        Grows.metal.now += 300
        gradient = gradient * 2
        Grows.metal.now -= 300
        return gradient


def test_mps_is_sampled_after_each_operator_backward_included(metal: Metal) -> None:
    probe = MpsProbe()
    assert isinstance(probe, Probe)
    assert probe.devices() == (Device(kind="accelerator", index=0, name="mps", total_bytes=1000),)
    metal.now, metal.cache = 100, 50
    probe.reset_peak()
    probe.begin_test(record=True)
    metal.now = 400
    x = torch.ones(3, requires_grad=True)
    metal.now = 100
    torch.ones(3)
    assert probe.peak() == (Peak(allocated_bytes=400, device_bytes=450),)
    assert probe.allocated() == (100,)
    Grows.metal, metal.now = metal, 200
    Grows.apply(x).sum().backward()
    assert probe.peak() == (Peak(allocated_bytes=500, device_bytes=550),)
    probe.end_test()
    metal.now = 900
    torch.ones(3)
    metal.now = 100
    assert probe.peak()[0].allocated_bytes == 500, "nothing is sampled after the test"
    assert probe.free_bytes(0) == 850
    probe.reset_peak()
    metal.now = 0
    assert probe.peak()[0].allocated_bytes == 100, "what was there at the reset counts"
    probe.release()
    assert metal.cache == 0


def test_mps_says_that_it_does_not_see_what_happens_within_an_operator(metal: Metal) -> None:
    assert MpsProbe().notes() == (BETWEEN,)
    assert BETWEEN.figures


def test_mps_has_nested_intervals(metal: Metal) -> None:
    probe = MpsProbe()
    intervals = Intervals(probe)
    outer = intervals.begin()
    probe.begin_test(record=False)
    metal.now = 70
    torch.ones(1)
    metal.now = 10
    inner = intervals.begin()
    metal.now = 30
    torch.ones(1)
    metal.now = 0
    assert intervals.end(inner)[0].allocated_bytes == 30
    assert intervals.end(outer)[0].allocated_bytes == 70
    probe.end_test()


def xpu(counters: bool = True, **more: Any) -> SimpleNamespace:
    found = SimpleNamespace(resets=[], **more)
    if counters:
        found.memory_allocated = lambda index: 10 + index
        found.max_memory_allocated = lambda index: 20 + index
        found.max_memory_reserved = lambda index: 30 + index
        found.reset_peak_memory_stats = found.resets.append
        found.memory_stats = lambda index: {"num_ooms": index}
    return found


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Any:
    def use(accelerator: SimpleNamespace, own: SimpleNamespace) -> None:
        accelerator.current_accelerator = lambda: SimpleNamespace(type="xpu")
        accelerator.device_count = lambda: 2
        monkeypatch.setattr(torch, "accelerator", accelerator)
        monkeypatch.setattr(torch, "xpu", own)

    return use


def test_xpu_before_torch_2_9_is_read_through_its_own_module(use: Any) -> None:
    own = xpu(get_device_name=lambda index: f"Arc {index}", mem_get_info=lambda index: (5, 50))
    use(xpu(counters=False), own)
    probe = AcceleratorProbe()
    assert isinstance(probe, Probe)
    assert [device.name for device in probe.devices()] == ["Arc 0", "Arc 1"]
    assert (probe.devices()[1].total_bytes, probe.free_bytes(1)) == (50, 5)
    assert probe.allocated() == (10, 11)
    assert probe.peak()[1] == Peak(allocated_bytes=21, reserved_bytes=31)
    assert probe.counters() == (Counters(), Counters(ooms=1))
    probe.reset_peak()
    assert own.resets == [0, 1]


def test_torch_accelerator_is_asked_first(use: Any) -> None:
    newer = xpu(get_memory_info=lambda index: (7, 70))
    use(newer, xpu())
    probe = AcceleratorProbe()
    probe.reset_peak()
    assert newer.resets == [0, 1]
    assert probe.devices()[0] == Device(kind="accelerator", index=0, name="xpu", total_bytes=70)


def test_a_device_that_does_not_tell_what_is_free_has_its_total_at_least(use: Any) -> None:
    def refuses(index: int) -> tuple[int, int]:
        raise RuntimeError("The device doesn't support querying the available free memory")

    properties = SimpleNamespace(total_memory=64)
    use(xpu(get_memory_info=refuses), xpu(mem_get_info=refuses, get_device_properties=lambda index: properties))
    probe = AcceleratorProbe()
    assert (probe.devices()[0].total_bytes, probe.free_bytes(0)) == (64, None)


def test_a_device_whose_memory_torch_does_not_count_is_refused_by_name(use: Any) -> None:
    use(xpu(counters=False), xpu(counters=False))
    with pytest.raises(ProbeUnavailable, match="counts no memory of xpu devices"):
        AcceleratorProbe()


def test_an_apple_gpu_gets_its_own_probe(monkeypatch: pytest.MonkeyPatch, metal: Metal) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert isinstance(select.choose(select.Choice(kind="auto")), MpsProbe)


@pytest.mark.parametrize(
    ("version", "build"),
    [
        ("cuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n", "cuda"),
        ("cuda: Optional[str] = None\nhip: Optional[str] = '7.1.25'\n", "rocm"),
        ("cuda: Optional[str] = None\nhip: Optional[str] = None\nxpu: Optional[str] = '2025'\n", "cpu"),
    ],
)
def test_the_build_is_read_without_importing_torch(
    version: str, build: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "version.py").write_text(version)
    monkeypatch.delitem(sys.modules, "torch")
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(select.importlib.util, "find_spec", lambda name: spec)
    select.torch_build.cache_clear()
    try:
        assert select.torch_build() == build
    finally:
        select.torch_build.cache_clear()


def test_rocm_is_measured_as_cuda_and_nvml_is_not_asked_about_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.1.25")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(driver, "is_active", lambda: False)
    monkeypatch.setattr(nvml, "process_bytes", lambda uuid, index: 10**9)
    assert isinstance(select.choose(select.Choice(kind="cuda")), cuda.CudaProbe)
    card = Device(kind="cuda", index=0, name="AMD Instinct MI300X")
    assert cuda._beside_the_allocator(0, card, reserved=100) is None
    assert select.torch_build.__wrapped__() == "rocm", "so that no dry GPU is put in its place"
