"""The weights of an ONNX model outside its file: written once as safetensors, named by file, offset and length.

safetensors files are plain bytes after a header, which is what ONNX calls external data; each tensor is in one file of
`weights/` once, and the protobuf holds the graph and constants of a few bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dsmoe_compiler.targets.onnx.export import INLINE
from dsmoe_compiler.targets.weights import WEIGHTS, write_shards
from dsmoe_model.checkpoint.shards import NAMES, read_header
from dsmoe_runtime.errors import TargetError

if TYPE_CHECKING:
    import onnx_ir as ir


def move_out(model: ir.Model, folder: Path, *, progress: Callable[[str], None]) -> None:
    """Write the weights of `model` to `folder/weights/` and let it refer to them there.

    Raises: TargetError for a weight that holds NaN, by name, or one of a type that safetensors files here do not have.
    """
    import onnx_ir as ir

    values = {name: v.const_value for name, v in model.graph.initializers.items() if v.const_value is not None}
    tensors = {name: tensor_of(name, value) for name, value in values.items()}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and bool(torch.isnan(tensor).any()):
            raise TargetError(f"the weight {name!r} holds NaN: nothing was written. Mend the checkpoint")
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.nbytes > INLINE}
    write_shards(tensors, folder / WEIGHTS, progress=progress)
    entries = {
        name: entry for file in sorted((folder / WEIGHTS).iterdir()) for name, entry in read_header(file).items()
    }
    for name, value in model.graph.initializers.items():
        if name not in entries:
            continue
        assert value.const_value is not None
        entry, dtype = entries[name], value.const_value.dtype
        value.const_value = ir.ExternalTensor(
            f"{WEIGHTS}/{entry.path.name}", entry.offset, entry.nbytes, dtype, shape=ir.Shape(entry.shape), name=name,
            base_dir=folder,
        )  # fmt: skip


def tensor_of(name: str, value: Any) -> Tensor:
    """The torch tensor behind an initializer, or one that shares the memory of its array."""
    tensor = value.raw if isinstance(value.raw, Tensor) else None
    if tensor is None:
        array = value.numpy()
        narrow = array.dtype.name == "bfloat16"  # numpy's own types are all that torch takes
        tensor = torch.from_numpy(array.view("int16") if narrow else array)
        tensor = tensor.view(torch.bfloat16) if narrow else tensor
    if tensor.dtype not in NAMES and tensor.nbytes > INLINE:
        raise TargetError(f"the weight {name!r} is {tensor.dtype}: no place for it among {', '.join(map(str, NAMES))}")
    return tensor.detach().contiguous()
