"""One safetensors file: its header read and checked to the last byte, its tensors read by offset, and written.

Written here rather than taken from `safetensors`, for two reasons: every header is validated before any tensor is
allocated, and weights are read with plain file reads, which do not count as memory of the process as mapped pages do.
Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data.
"""

import json
import math
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsmoe_model.checkpoint.json_files import parse_json
from dsmoe_model.errors import CheckpointError

HEADER_LIMIT = 32 * 2**20  # bytes; the official 16B checkpoint's headers are under 1 MB together
CHUNK = 16 * 2**20  # bytes read at a time
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ITEM_SIZES = {
    **{name: dtype.itemsize for name, dtype in DTYPES.items()},
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16"), 2),
    **dict.fromkeys(("U32", "I32"), 4),
    **dict.fromkeys(("U64", "C64"), 8),
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies: `nbytes` bytes from `offset` (counted from the start of the file)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one file by name. Raises CheckpointError unless header and file agree byte for byte."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if len(prefix) < 8 or length > size - 8:
            raise CheckpointError(
                f"{str(path)!r} is truncated or not safetensors: its header claims {length:,} bytes, the file has "
                f"{size:,}. Download it again."
            )
        if length > HEADER_LIMIT:
            raise CheckpointError(
                f"{str(path)!r} claims a header of {length:,} bytes; at most {HEADER_LIMIT:,} are read."
            )
        header = parse_json(file.read(length), where=f"{path} (header)")

    start = 8 + length
    header.pop("__metadata__", None)
    entries = [_entry(path, name, fields, start) for name, fields in header.items()]
    at = start
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != at:
            what = "overlaps the tensor before it" if entry.offset < at else "leaves a gap before it"
            raise CheckpointError(
                f"tensor {entry.name[:99]!r} in {str(path)!r} {what} (byte {entry.offset:,}, expected {at:,}): refused."
            )
        at += entry.nbytes
    if at != size:
        raise CheckpointError(
            f"{str(path)!r} has {size:,} bytes but its header describes {at:,}: truncated or padded. Download it again."
        )
    return {entry.name: entry for entry in entries}


def _entry(path: Path, name: str, fields: Any, start: int) -> TensorEntry:
    """One line of the header, checked on its own."""

    def bad(why: str) -> CheckpointError:
        return CheckpointError(f"tensor {name[:200]!r} in {str(path)!r}: {why}")

    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise bad("its header entry must have exactly dtype, shape and data_offsets.")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise bad(f"dtype {str(dtype)[:40]!r} is not known here ({', '.join(ITEM_SIZES)}).")
    for label, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise bad(f"{label} {str(numbers)[:80]} is not a list of sizes.")
    if len(shape) > 8 or len(offsets) != 2:
        raise bad(f"shape {str(shape)[:80]} or data_offsets {str(offsets)[:80]} has the wrong length.")
    begin, end = offsets
    need = math.prod(shape) * ITEM_SIZES[dtype]
    if end - begin != need:
        raise bad(f"{dtype} {shape} needs {need:,} bytes, its offsets {offsets} span {end - begin:,}: refused.")
    return TensorEntry(name, dtype, tuple(shape), path, start + begin, need)


def read_tensor(entry: TensorEntry, into: Tensor) -> Iterator[int]:
    """Read one tensor into `into` (contiguous, as many elements, any dtype and device), a chunk at a time.

    Yields the number of bytes after each chunk. They go straight to their place if dtype and device allow, else
    through one chunk of scratch memory.
    """
    flat, source = into.view(-1), DTYPES[entry.dtype]
    direct = flat.dtype == source and flat.device.type == "cpu"
    step = CHUNK // source.itemsize
    scratch = flat if direct else torch.empty(min(step, flat.numel()), dtype=source)
    with entry.path.open("rb", buffering=0) as file:
        file.seek(entry.offset)
        for first in range(0, flat.numel(), step):
            part = flat[first : first + step]
            values = part if direct else scratch[: part.numel()]
            view, filled = values.view(torch.uint8).numpy().data, 0
            while filled < len(view):
                got = file.readinto(view[filled:])
                if not got:
                    raise CheckpointError(f"{str(entry.path)!r} ended while {entry.name!r} was being read.")
                filled += got
            if not direct:
                part.copy_(values)
            yield filled


def write_shard(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write a safetensors file, one tensor in host memory at a time, and fsync it."""
    tensors = list(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, tensor in tensors:
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
