"""What device memory carries, against a model of it."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MODE_2 = """
#define _GNU_SOURCE
#include <errno.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
/* As vm.overcommit_memory=2 does: private writable memory is counted, reserved or not. */
void *mmap(void *address, size_t size, int protection, int flags, int file, off_t offset) {
    int counted = (flags & MAP_PRIVATE) && (protection & PROT_WRITE);
    if (counted && size > (size_t)24 << 30) return errno = ENOMEM, MAP_FAILED;
    return (void *)syscall(SYS_mmap, address, size, protection, flags, file, offset);
}
"""


@pytest.mark.parametrize("seed", range(5))
def test_copies_and_fills_follow_the_model(run_program: Callable[..., dict[str, Any]], seed: int) -> None:
    assert run_program("driver_values.py", str(seed), "2000") == {"wrong": []}


def test_the_same_where_the_system_does_not_overcommit(
    run_program: Callable[..., dict[str, Any]], dry_python: Callable[..., Any], tmp_path: Path
) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to make a strict mmap with")
    (tmp_path / "strict.c").write_text(MODE_2)
    strict = tmp_path / "strict.so"
    subprocess.run([compiler, "-shared", "-fPIC", str(tmp_path / "strict.c"), "-o", str(strict)], check=True)
    preloaded = dry_python("-c", "import os; print(os.environ['LD_PRELOAD'])").stdout.strip()
    both = f"{strict}:{preloaded}"
    assert run_program("driver_values.py", "1", "2000", LD_PRELOAD=both) == {"wrong": []}


def test_a_limit_on_address_space_is_named(dry_python: Callable[..., Any]) -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (30 << 30, 30 << 30))\n"
        "import ctypes; pointer = ctypes.c_void_p()\n"
        "print(ctypes.CDLL(None).cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(1)))"
    )
    done = dry_python("-c", code)
    assert int(done.stdout) != 0
    assert "ulimit -v" in done.stderr
