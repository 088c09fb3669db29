"""A shared library's wish for an executable stack, taken back.

Inductor puts the constants of a package into an assembly file without the note that says what the stack needs, so the
linker assumes the worst. From glibc 2.41 on such a library cannot be loaded; before, it made the stacks of the whole
process executable.
"""

from __future__ import annotations

import struct
from pathlib import Path

from dsmoe_runtime.errors import TargetError

GNU_STACK, EXECUTABLE = 0x6474E551, 1


def stack_flags(file: Path) -> tuple[int, int] | None:
    """Of a 64-bit little-endian ELF file: where the flags of its stack stand, and the flags; None: it says nothing."""
    with file.open("rb") as library:
        head = library.read(64)
        if len(head) < 64 or head[:6] != b"\x7fELF\x02\x01":
            raise TargetError(f"{file.name} is no 64-bit ELF file, as the C++ compiler should have made")
        (start,) = struct.unpack_from("<Q", head, 32)
        size, count = struct.unpack_from("<HH", head, 54)
        for index in range(count):
            library.seek(start + index * size)
            kind, flags = struct.unpack("<II", library.read(8))
            if kind == GNU_STACK:
                return start + index * size + 4, flags
    return None


def plain_stack(file: Path) -> None:
    """Make the library ask for a stack that is not executable; nothing generated here needs one."""
    found = stack_flags(file)
    if found is None or not found[1] & EXECUTABLE:
        return
    place, flags = found
    with file.open("r+b") as library:
        library.seek(place)
        library.write(struct.pack("<I", flags & ~EXECUTABLE))
