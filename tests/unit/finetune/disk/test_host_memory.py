"""Host memory in bytes: what this process holds, and the limits of the machine, a control group and a ulimit."""

from __future__ import annotations

import resource
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from finetune.disk import host_memory

if TYPE_CHECKING:
    from pathlib import Path

MIB = 2**20


def test_a_large_array_is_seen_in_bytes_and_its_peak_stays() -> None:
    code = (
        "from finetune.disk.host_memory import peak_resident_bytes as peak, resident_bytes as now\n"
        "before = now(); held = bytearray(256 * 2**20); during = now(); del held\n"
        "print(during - before, peak() - before, peak() - now())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    during, peak, fallen = (int(word) / MIB for word in done.stdout.split())
    assert during == pytest.approx(256, rel=0.02)
    assert peak == pytest.approx(256, rel=0.02)
    assert fallen == pytest.approx(256, rel=0.02)


def test_where_the_kernel_does_not_say_the_system_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_STATUS", tmp_path / "nothing")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert host_memory.peak_resident_bytes() == pytest.approx(peak, rel=0.01)
    assert host_memory.resident_bytes() == pytest.approx(peak, rel=0.01)


@pytest.mark.parametrize("name", ["memory.max", "memory/memory.limit_in_bytes"])
def test_a_control_groups_limit_counts_where_it_is_lower(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_memory, "_CGROUP", tmp_path)
    machine = host_memory.limit_bytes()
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    for text, limit in (("268435456\n", 256 * MIB), ("max\n", machine), (f"{2**63 - 4096}\n", machine)):
        file.write_text(text)
        assert host_memory.limit_bytes() == limit


def test_a_ulimit_counts_where_it_is_lower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_CGROUP", tmp_path)
    machine = host_memory.limit_bytes()
    for asked, limit in ((300 * MIB, 300 * MIB), (resource.RLIM_INFINITY, machine)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, asked=asked: (asked, asked))
        assert host_memory.limit_bytes() == limit


def test_what_is_available_is_what_the_machine_and_the_control_group_have_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 0 < host_memory.available_bytes() < host_memory.limit_bytes()
    monkeypatch.setattr(host_memory, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("268435456\n")
    (tmp_path / "memory.current").write_text("67108864\n")
    assert host_memory.available_bytes() == 192 * MIB
    (tmp_path / "memory.max").write_text("max\n")
    monkeypatch.setattr(host_memory, "_MACHINE", tmp_path / "nothing")
    assert host_memory.available_bytes() == host_memory.limit_bytes()
