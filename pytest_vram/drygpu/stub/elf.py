"""Read the dynamic symbols of a shared library: those that it needs from others, and those that it exports.

The module reads the sections that the loader reads (System V ABI, "Dynamic Linking") in 64-bit little-endian ELF files.
All Linux machines for which PyTorch has CUDA wheels use that format.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_DYNAMIC = struct.Struct("<qQ")
_SHT_DYNAMIC, _SHT_DYNSYM = 6, 11
_DT_NEEDED, _DT_SONAME = 1, 14
_FUNCTION = 2
_LOCAL = 0


class ElfError(ValueError):
    """The file is not a shared library that this module can read; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicSymbols:
    """The dynamic symbols of one shared library.

    Attributes:
        needed: names of the libraries that it is linked against.
        soname: its own name; ``None`` if it has none.
        undefined: symbols that it needs from other libraries.
        functions: functions that it exports.
    """

    needed: tuple[str, ...]
    soname: str | None
    undefined: frozenset[str]
    functions: frozenset[str]


def read_dynamic_symbols(path: Path) -> DynamicSymbols:
    """Read the dynamic symbol table of the shared library at ``path``.

    Raises:
        ElfError: the file is not a 64-bit little-endian ELF file, or has no dynamic section.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(64)
        if len(head) < 64 or head[:6] != b"\x7fELF\x02\x01":
            raise ElfError(f"{path}: not a 64-bit little-endian ELF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(path, data)


def _read(path: Path, data: mmap.mmap) -> DynamicSymbols:
    (table_offset,) = struct.unpack_from("<Q", data, 40)
    entry_size, count = struct.unpack_from("<HH", data, 58)
    try:
        sections = [_SECTION.unpack_from(data, table_offset + i * entry_size) for i in range(count)]
    except struct.error:
        raise ElfError(f"{path}: its section table lies outside the file; is the file truncated?") from None
    needed: list[str] = []
    soname: str | None = None
    undefined: set[str] = set()
    functions: set[str] = set()
    found = False
    for _, kind, _, _, offset, size, link, _, _, _ in sections:
        if kind not in (_SHT_DYNAMIC, _SHT_DYNSYM):
            continue
        if offset + size > len(data) or link >= count:
            raise ElfError(f"{path}: a section lies outside the file; is the file truncated?")
        found = True
        strings_offset, strings_size = sections[link][4], sections[link][5]
        strings = data[strings_offset : strings_offset + strings_size]
        if kind == _SHT_DYNAMIC:
            for tag, value in _DYNAMIC.iter_unpack(data[offset : offset + size]):
                if tag == _DT_NEEDED:
                    needed.append(_text(strings, value))
                elif tag == _DT_SONAME:
                    soname = _text(strings, value)
        else:
            for name, info, _, index, _, _ in _SYMBOL.iter_unpack(data[offset : offset + size]):
                if name == 0 or info >> 4 == _LOCAL:
                    continue
                if index == 0:
                    undefined.add(_text(strings, name))
                elif info & 15 == _FUNCTION:
                    functions.add(_text(strings, name))
    if not found:
        raise ElfError(f"{path}: it has no dynamic section: not a shared library")
    return DynamicSymbols(
        needed=tuple(needed), soname=soname, undefined=frozenset(undefined), functions=frozenset(functions)
    )


def _text(strings: bytes, offset: int) -> str:
    return strings[offset : strings.index(b"\0", offset)].decode()
