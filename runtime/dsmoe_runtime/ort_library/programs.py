"""The folder `kernels/`: machine code for a GPU, and one text that says how our operators launch it.

    programs.txt        below
    up_pairs-0f3a.cubin, ...

programs.txt has one statement a line, words apart by one blank, and `#` begins a remark. EXPR is a number that depends
on the number of tokens T (`expressions.py`); sizes and offsets are in bytes.

    dsmoe-programs 2                                the format
    capability 9 0                                  of the GPU
    kernel FILE ENTRY THREADS SHARED EARLY          kernel 0, 1, ...; SHARED memory; EARLY 1: may start before its turn
    program INPUTS OUTPUTS KEY                      what follows serves nodes with this key (`layer.py`), the rest of
                                                    the line; names of what they take and give, with commas, in order
    tokens FIRST LAST                               and so many tokens
    room EXPR                                       room 0, 1, ...: workspace
    launch KERNEL EXPR EXPR EXPR                    a grid; then the entry's arguments in their order:
    pointer BUFFER EXPR                             an offset into BUFFER: an input, an output, room0, room1, ...;
                                                    or `pointer none 0`
    int EXPR | long EXPR | float BITS               of 32 bits, 64 bits, 32 bits; BITS in hexadecimal
    map BUFFER EXPR TYPE SWIZZLE RANK SIZES STRIDES BOX    a tensor map, CUDA's numbers for type and swizzle; RANK
                                                    EXPRs, RANK EXPRs and RANK numbers, the outermost dimension first
    end                                             nothing is missing

Rooms begin at multiples of 256 bytes in one allocation.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dsmoe_runtime.errors import TargetError
from dsmoe_runtime.ort_library.expressions import text
from dsmoe_runtime.ort_library.layer import DecodeAttention, Gemv, Layer, MoELayer, OneToken

if TYPE_CHECKING:  # they need Triton
    from dsmoe_runtime.ort_library.binaries import Argument, Binary, Pointer
    from dsmoe_runtime.ort_library.record import Record

__all__ = ["TEXT", "DecodeAttention", "Gemv", "Layer", "MoELayer", "write"]

TEXT, FORMAT = "programs.txt", 2
CAPABILITIES = ((9, 0),)
DTYPES = ("float16", "bfloat16", "float32")
Progress = Callable[[str], None]


def write(
    layers: Sequence[Layer | MoELayer | OneToken],
    folder: Path,
    *,
    capability: tuple[int, int] = (9, 0),
    progress: Progress | None = None,
) -> None:
    """Kernels for nodes of these kinds, in a folder that is there and empty; whoever calls makes it appear at once.

    progress: called with a line for each range of tokens. Raises: TargetError, OSError.
    """
    if capability not in CAPABILITIES:
        wanted, known = (".".join(map(str, c)) for c in (capability, CAPABILITIES[0]))
        raise TargetError(
            f"there are kernels for compute capability {known}, none for {wanted}; use --profile portable"
        )
    if find_spec("triton") is None:
        raise TargetError("kernels for GPUs are compiled by Triton, which is not installed: pip install triton")
    from dsmoe_runtime.ort_library.record import records

    kernels: dict[str, str] = {}
    programs: list[str] = []
    for layer in dict.fromkeys(layers):
        if layer.dtype not in DTYPES:
            raise TargetError(f"there are no kernels for {layer.dtype}; there are for {', '.join(DTYPES)}")
        programs.append(program(layer))
        for record in records(layer):
            if progress is not None and record.plans is not None:
                regime = record.plans.routed.regime
                progress(f"{layer.key().split()[0]} {layer.dtype}, {record.first} to {record.last} tokens: {regime}")
            programs += ranged(record, folder, kernels, capability)
    head = [
        f"dsmoe-programs {FORMAT}",
        f"# made by Triton {triton_version()}",
        f"capability {capability[0]} {capability[1]}",
    ]
    body = "\n".join([*head, *(f"kernel {line}" for line in kernels.values()), *programs, "end"])
    (folder / TEXT).write_text(body + "\n", encoding="utf-8")


def program(layer: Layer | MoELayer | OneToken) -> str:
    """The statement that begins a program."""
    return f"program {','.join(layer.inputs)} {','.join(layer.outputs)} {layer.key()}"


def ranged(record: Record, folder: Path, kernels: dict[str, str], capability: tuple[int, int]) -> list[str]:
    """The statements for one range of T; new machine code goes into the folder, and its statement into `kernels`."""
    from dsmoe_runtime.ort_library.binaries import build

    lines = [f"tokens {record.first} {record.last}", *(f"room {text(room)}" for room in record.rooms)]
    for note in record.notes:
        binary, arguments = build(note, record, capability)
        file = named(binary)
        if file not in kernels:
            (folder / file).write_bytes(binary.cubin)
        words = f"{file} {binary.entry} {binary.threads} {binary.shared} {int(note.early)}"
        assert kernels.setdefault(file, words) == words, (kernels[file], words)
        grid = [text(size) for size in (*note.grid, 1, 1)[:3]]
        lines.append(f"launch {list(kernels).index(file)} {' '.join(grid)}")
        lines += [line(argument) for argument in arguments]
    return lines


def named(binary: Binary) -> str:
    """A file's name, the same for the same machine code."""
    return f"{binary.entry}-{hashlib.sha256(binary.cubin).hexdigest()[:16]}.cubin"


def line(argument: Argument) -> str:
    """The statement of one argument."""
    from dsmoe_runtime.ort_library.binaries import Integer, Pointer, Real

    if isinstance(argument, Pointer):
        return f"pointer {place(argument)}"
    if isinstance(argument, Integer):
        return f"{'int' if argument.kind == 'u32' else 'long'} {text(argument.value)}"
    if isinstance(argument, Real):
        return f"float {struct.pack('>f', argument.value).hex()}"
    dimensions = [*map(text, argument.sizes), *map(text, argument.strides), *map(str, argument.box)]
    words = (place(argument.pointer), argument.element, argument.swizzle, len(argument.box), *dimensions)
    return " ".join(map(str, ("map", *words)))


def place(pointer: Pointer) -> str:
    """A buffer and an offset into it."""
    return f"{pointer.buffer or 'none'} {text(pointer.offset)}"


def triton_version() -> str:
    import triton

    return f"{triton.__version__}, torch {torch.__version__}"
