"""Loads an object file into this process: sections into memory, relocations, and the address of an entry point.

LLVM's engine cannot take an object back that it wrote, so a cached kernel would have to be compiled again. What LLVM
writes for position-independent x86-64 code is little, and all of it is here:

    PC64, PC32, PLT32     a distance          GOTPC64    the distance to the table of addresses
    64                    an address          GOTOFF64   a distance from that table;  GOT64  a place in it

Anything else is refused by name. Memory is never writable and executable at the same time.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dsmoe_runtime.errors import TargetError

_ALLOCATED, _NO_BITS, _RELOCATIONS, _SYMBOLS = 0x2, 8, 4, 2
_WIDE = {1: "64", 24: "PC64", 25: "GOTOFF64", 27: "GOT64", 29: "GOTPC64"}  # eight bytes are patched
_NARROW = {2: "PC32", 4: "PLT32"}  # four
_TABLE = "_GLOBAL_OFFSET_TABLE_"


@dataclass(frozen=True)
class _Section:
    name: str
    kind: int
    flags: int
    offset: int
    size: int
    link: int
    info: int
    alignment: int


class LoadedObject:
    """Code in memory; `address` of a function is valid as long as this lives.

    `known` are addresses of functions that the object calls and others define; those live as long, too.
    """

    def __init__(self, image: bytes, known: Mapping[str, int] | None = None) -> None:
        self._known = known or {}
        self._symbols: dict[str, int] = {}
        sections = _sections(image)
        kept = [n for n, s in enumerate(sections) if s.flags & _ALLOCATED and not s.name.startswith(".eh_frame")]
        places, end = {}, 0
        for number in kept:
            alignment = max(sections[number].alignment, 1)
            places[number] = end = -(-end // alignment) * alignment
            end += sections[number].size
        names = _symbols(image, sections)
        table = -(-end // 16) * 16
        self._memory = mmap.mmap(-1, max(table + 8 * len(names), 1))
        self._view = (ctypes.c_char * len(self._memory)).from_buffer(self._memory)
        base = ctypes.addressof(self._view)
        for number, place in places.items():
            section = sections[number]
            if section.kind != _NO_BITS:
                self._memory[place : place + section.size] = image[section.offset : section.offset + section.size]
        values = []
        for name, number, value in names:
            if number in places:
                values.append(base + places[number] + value)
                if name:
                    self._symbols[name] = values[-1]
            else:
                values.append(base + table if name == _TABLE else self._outside(name) if name and number == 0 else 0)
        for n, value in enumerate(values):
            struct.pack_into("<Q", self._memory, table + 8 * n, value)
        for section in sections:
            if section.kind == _RELOCATIONS and section.info in places:
                for entry in range(section.offset, section.offset + section.size, 24):
                    where, info, addend = struct.unpack_from("<QQq", image, entry)
                    kind, symbol = info & 0xFFFFFFFF, info >> 32
                    spot = places[section.info] + where
                    target = values[symbol] + addend
                    distance = {
                        "64": target, "PC64": target - base - spot, "PC32": target - base - spot,
                        "PLT32": target - base - spot, "GOTPC64": base + table + addend - base - spot,
                        "GOTOFF64": target - base - table, "GOT64": 8 * symbol + addend,
                    }.get(_WIDE.get(kind) or _NARROW.get(kind, ""))  # fmt: skip
                    if distance is None:
                        raise TargetError(f"the object holds a relocation of type {kind}, which is not known here")
                    if kind in _NARROW and not -(1 << 31) <= distance < 1 << 31:
                        raise TargetError(f"{names[symbol][0]} is out of reach for a relocation of type {kind}")
                    struct.pack_into("<Q" if kind in _WIDE else "<i", self._memory, spot, distance & _mask(kind))
        _protect(base, len(self._memory))

    def _outside(self, name: str) -> int:
        return self._known[name] if name in self._known else _outside(name)

    def address(self, name: str) -> int:
        """Of a function that the object defines."""
        if name not in self._symbols:
            raise TargetError(f"the object defines {', '.join(self._symbols) or 'nothing'}, and no {name}")
        return self._symbols[name]


def _mask(kind: int) -> int:
    return 0xFFFFFFFFFFFFFFFF if kind in _WIDE else -1


def _sections(image: bytes) -> list[_Section]:
    if image[:6] != b"\x7fELF\x02\x01" or struct.unpack_from("<HH", image, 16) != (1, 62):
        raise TargetError(
            "the kernel's object is not an ELF relocatable for x86-64; delete the cache and compile again"
        )
    (start,) = struct.unpack_from("<Q", image, 40)
    size, count, names = struct.unpack_from("<HHH", image, 58)
    raw = [struct.unpack_from("<IIQQQQIIQQ", image, start + size * n) for n in range(count)]
    strings = raw[names][4]
    return [_Section(_text(image, strings + r[0]), r[1], r[2], r[4], r[5], r[6], r[7], r[8]) for r in raw]


def _symbols(image: bytes, sections: list[_Section]) -> list[tuple[str, int, int]]:
    """Name, section and value of each symbol."""
    table = next(s for s in sections if s.kind == _SYMBOLS)
    strings = sections[table.link].offset
    found = []
    for at in range(table.offset, table.offset + table.size, 24):
        name, _, _, section, value, _ = struct.unpack_from("<IBBHQQ", image, at)
        found.append((_text(image, strings + name), section, value))
    return found


def _text(image: bytes, at: int) -> str:
    return image[at : image.index(b"\0", at)].decode()


def _outside(name: str) -> int:
    """The address of a function of torch's own OpenMP, libm or libc: what libtorch_cpu sees under that name."""
    import torch

    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    try:
        return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
    except AttributeError:
        raise TargetError(
            f"this torch ({torch.__version__}) has no {name}; the mlir-cpu kernels share the OpenMP threads (libgomp) "
            "of a Linux build of torch"
        ) from None


def _protect(address: int, size: int) -> None:
    mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if mprotect(address, size, mmap.PROT_READ | mmap.PROT_EXEC):
        raise TargetError(f"this system lets no process make code of its own (mprotect: errno {ctypes.get_errno()})")
