"""The ELF reader, held against a library of known symbols and against files that are none."""

from __future__ import annotations

import shutil
import struct
import subprocess
from typing import TYPE_CHECKING

import pytest

from pytest_vram.drygpu.stub.elf import ElfError, read_dynamic_symbols

if TYPE_CHECKING:
    from pathlib import Path

SOURCE = """
int imported(int);
int variable = 1;
static int hidden(void) { return 3; }
int offered(void) { return imported(hidden()); }
__attribute__((weak)) int offered_weakly(void) { return 2; }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to make a library of known symbols with")
    folder = tmp_path_factory.mktemp("elf")
    (folder / "source.c").write_text(SOURCE)
    target = folder / "libsample.so"
    flags = ["-shared", "-fPIC", "-Wl,-soname,libsample.so.3", "-Wl,--no-as-needed"]
    subprocess.run([compiler, *flags, str(folder / "source.c"), "-o", str(target), "-lm"], check=True)
    return target


def test_what_a_library_takes_and_offers(library: Path) -> None:
    symbols = read_dynamic_symbols(library)
    assert "imported" in symbols.undefined
    assert {"offered", "offered_weakly"} <= symbols.functions
    assert not {"hidden", "variable", "imported"} & symbols.functions


def test_names_of_the_library_and_of_those_it_needs(library: Path) -> None:
    symbols = read_dynamic_symbols(library)
    assert symbols.soname == "libsample.so.3"
    assert "libm.so.6" in symbols.needed


def test_agrees_with_readelf(library: Path) -> None:
    if shutil.which("readelf") is None:
        pytest.skip("no readelf to compare with")
    done = subprocess.run(["readelf", "-W", "--dyn-syms", str(library)], capture_output=True, text=True, check=True)
    rows = [line.split() for line in done.stdout.splitlines() if line.strip()[:1].isdigit()]
    named = [row for row in rows if len(row) > 7]
    undefined = {row[7].split("@")[0] for row in named if row[6] == "UND"}
    functions = {row[7].split("@")[0] for row in named if row[6] != "UND" and row[3] == "FUNC"}
    symbols = read_dynamic_symbols(library)
    assert symbols.undefined == undefined
    assert symbols.functions == functions


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a 64-bit"),
        (b"#!/bin/sh\n" * 20, "not a 64-bit"),
        (b"\x7fELF\x01\x01" + bytes(100), "not a 64-bit"),
        (
            b"\x7fELF\x02\x01" + bytes(34) + struct.pack("<Q", 4096) + bytes(10) + struct.pack("<HH", 64, 3) + bytes(4),
            "trunc",
        ),
        (b"\x7fELF\x02\x01" + bytes(58), "no dynamic section"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "other.so"
    path.write_bytes(content)
    with pytest.raises(ElfError, match=reason) as caught:
        read_dynamic_symbols(path)
    assert str(path) in str(caught.value)


def test_a_truncated_library_is_refused(tmp_path: Path, library: Path) -> None:
    path = tmp_path / "half.so"
    whole = library.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ElfError, match="truncated"):
        read_dynamic_symbols(path)
