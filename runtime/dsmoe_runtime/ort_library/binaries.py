"""A noted launch as machine code, and what its entry takes in which order.

The signature is the one that Triton's own launch would find for the same arguments, so the machine code is the same,
too. Triton's launch flattens a tensor descriptor into its 128 bytes, its sizes (32 bits) and its strides (64 bits), and
adds two pointers at the end, to scratch memory that our kernels do not ask for. What we make of that is compared with
the entry that the compiler wrote, so that another release of Triton cannot change it unnoticed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor

from dsmoe_runtime.errors import TargetError
from dsmoe_runtime.ort_library.record import Note, Record, address

TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"
}  # fmt: skip
MAP_TYPES = {torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}  # as CUDA numbers them
OPTIONS = ("num_warps", "num_stages", "maxnreg")
ENTRY = re.compile(r"\.entry\s+(\w+)\s*\((.*?)\)", re.DOTALL)
THREADS = re.compile(r"\.reqntid\s+(\d+)")
PARAMETERS = {"u64": ".u64", "u32": ".u32", "f32": ".f32", "map": ".b8"}


@dataclass(frozen=True)
class Binary:
    """A kernel's machine code: its entry's name, threads of a block, and bytes of shared memory."""

    cubin: bytes
    entry: str
    threads: int
    shared: int


@dataclass(frozen=True)
class Pointer:
    """`offset` bytes into a buffer of the record; no buffer: the null pointer."""

    buffer: str | None
    offset: int | SymInt = 0
    kind = "u64"


@dataclass(frozen=True)
class Integer:
    """Of 32 or 64 bits."""

    value: int | SymInt
    kind: str = "u32"


@dataclass(frozen=True)
class Real:
    """A float32."""

    value: float
    kind = "f32"


@dataclass(frozen=True)
class Map:
    """How the copy engine sees a buffer: sizes, strides in bytes and a box, the outermost dimension first."""

    pointer: Pointer
    element: int
    swizzle: int
    sizes: tuple[int | SymInt, ...]
    strides: tuple[int | SymInt, ...]
    box: tuple[int, ...]
    kind = "map"


Argument = Pointer | Integer | Real | Map


def build(note: Note, record: Record, capability: tuple[int, int]) -> tuple[Binary, list[Argument]]:
    """Compile one launch for a GPU that need not be here. Raises: TargetError."""
    import triton
    from triton.backends.compiler import GPUTarget

    from dsmoe_runtime.kernels.launch import INTERPRETED

    if INTERPRETED:
        raise TargetError("TRITON_INTERPRET=1 is set, and with it Triton compiles nothing; unset it")
    source, values = source_of(note)
    options = {name: note.named[name] for name in OPTIONS if name in note.named} | {"launch_pdl": note.early}
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True  # names of files of ours are nobody's business
        target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
        compiled = triton.compile(source, target=target, options=options)
    found, threads = ENTRY.search(compiled.asm["ptx"]), THREADS.search(compiled.asm["ptx"])
    assert found is not None, compiled.asm["ptx"][:2000]
    assert threads is not None, compiled.asm["ptx"][:2000]
    for scratch in ("global_scratch_size", "profile_scratch_size"):
        if getattr(compiled.metadata, scratch, 0):
            raise TargetError(
                f"kernel {found[1]} asks for {scratch} {getattr(compiled.metadata, scratch)}; ours ask for 0"
            )
    arguments = arguments_of(values, record, getattr(compiled.metadata, "tensordesc_meta", None) or [])
    wanted = [line.strip() for line in found[2].split(",") if line.strip()]
    if len(wanted) != len(arguments) or any(
        PARAMETERS[a.kind] not in line for a, line in zip(arguments, wanted, strict=True)
    ):
        raise TargetError(
            f"Triton {triton.__version__} makes an entry {found[1]}({found[2]}), and what would be handed to it is "
            f"{', '.join(argument.kind for argument in arguments)}; this release is not supported"
        )
    return Binary(compiled.asm["cubin"], found[1], int(threads[1]), compiled.metadata.shared), arguments


def source_of(note: Note) -> tuple[Any, list[Any]]:
    """The kernel with its types, constants and known multiples of 16; and the arguments that are left to hand over."""
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

    kernel = note.kernel
    values = dict(zip(kernel.arg_names, note.arguments, strict=False)) | note.named
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    multiples: dict[tuple[int], Any] = {}
    handed = []
    for index, parameter in enumerate(kernel.params):
        value, known = values[parameter.name], not parameter.do_not_specialize
        by_sixteen = False
        if isinstance(value, Tensor):
            kind, by_sixteen = f"*{TYPES[value.dtype]}", True
        elif hasattr(value, "block_shape"):
            layout = f",{value.layout!r}" if hasattr(value, "layout") else ""
            kind = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}{layout}>"
        elif parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and known):
            kind, constants[(index,)] = "constexpr", value
        elif isinstance(value, float):
            kind = "fp32"
        elif isinstance(value, SymInt):
            assert not known, f"{parameter.name} of {kernel.__name__} depends on T: it must be in do_not_specialize"
            kind = "i32"
        else:
            kind, by_sixteen = "i32" if value < 1 << 31 else "i64", known and value % 16 == 0
        signature[parameter.name] = kind
        if by_sixteen:
            multiples[(index,)] = [["tt.divisibility", 16]]
        if kind != "constexpr":
            handed.append((kind, value))
    made = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    return made(kernel, signature, constants, multiples), handed


def arguments_of(values: list[Any], record: Record, metas: list[dict[str, Any]]) -> list[Argument]:
    """What the entry takes; `metas`: for each descriptor how the compiler wants it cut into boxes."""
    arguments: list[Argument] = []
    left = iter(metas)
    for kind, value in values:
        if kind.startswith("tensordesc"):
            size, base, meta = value.base.element_size(), value.base, next(left)
            map_ = Map(
                pointer_to(base, record), MAP_TYPES[base.dtype], meta["swizzle"], tuple(value.shape),
                tuple(stride * size for stride in value.strides), tuple(meta["block_size"]),
            )  # fmt: skip
            arguments += [map_, *(Integer(s) for s in value.shape), *(Integer(s, "u64") for s in value.strides)]
        elif kind.startswith("*"):
            arguments.append(pointer_to(value, record))
        elif kind == "fp32":
            arguments.append(Real(value))
        else:
            arguments.append(Integer(value, "u32" if kind == "i32" else "u64"))
    return [*arguments, Pointer(None), Pointer(None)]


def pointer_to(tensor: Tensor, record: Record) -> Pointer:
    """Where the tensor begins."""
    return Pointer(record.buffers[address(tensor)], tensor.storage_offset() * tensor.element_size())
