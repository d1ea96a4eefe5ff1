"""What the kernel says of a process, and what glibc gives back."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from pytest_vram import process_memory

if TYPE_CHECKING:
    from pathlib import Path


def test_fields_are_read_in_bytes_and_by_their_whole_names(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_bytes(b"Name:\t\xff: 7\nVmRSS:\t     12 kB\nVmRSSx:\t 5 kB\nVmHWM:\t 20 kB\n")
    assert process_memory.read_fields(status, ("VmRSS", "VmSwap")) == {"VmRSS": 12 * 1024}
    with pytest.raises(OSError, match="No such file"):
        process_memory.read_fields(tmp_path / "gone", ("VmRSS",))


@pytest.mark.parametrize("error", [OSError, TypeError])
def test_a_system_without_glibc_keeps_what_is_freed(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def without(name: str | None) -> ctypes.CDLL:
        raise error(name)

    monkeypatch.setattr(ctypes, "CDLL", without)
    process_memory.give_back_freed()


def test_what_is_freed_is_given_back() -> None:
    code = (
        "from pathlib import Path\n"
        "from pytest_vram.process_memory import give_back_freed, read_fields\n"
        "now = lambda: read_fields(Path('/proc/self/status'), ('VmRSS',))['VmRSS']\n"
        "held = [bytes(1000) for _ in range(200_000)]; last = bytes(1000)\n"
        "full = now(); del held; give_back_freed(); print(full - now())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONMALLOC": "malloc"}
    )
    assert int(done.stdout) > 100 * 2**20
