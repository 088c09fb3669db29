"""An ONNX artifact's file, held against what it may contain before ONNX Runtime opens it.

onnx's own checker does not look at attributes of foreign operators, and runtimes follow names of external data: what a
file says is data from strangers until here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dsmoe_compiler.targets.onnx.decode_ops import check_decode_nodes
from dsmoe_compiler.targets.onnx.layer import kind_of, layers_of
from dsmoe_compiler.targets.onnx.op import DOMAIN, OPSET, VERSION, check_nodes
from dsmoe_compiler.targets.weights import WEIGHTS
from dsmoe_model.checkpoint.shards import DTYPES, read_header, read_tensor
from dsmoe_runtime.errors import ArtifactError

if TYPE_CHECKING:
    import onnx

MODEL, DECODE = "model.onnx", "decode.onnx"
LIMIT = 2**31 - 1  # bytes; what a protobuf can hold
DOMAINS = {"": OPSET, DOMAIN: VERSION, "com.microsoft": 1}
ITEM_SIZES = {1: 4, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 16: 2}  # bytes, by the number that onnx gives a type
PLAIN = re.compile(rf"{WEIGHTS}/[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")


def check_model(folder: Path, *, check_weights: bool) -> None:
    """The model, and its decode step if it has one, each as `check_file` does it, and with `check_weights` the weights.

    Raises: ArtifactError that names what is wrong.
    """
    check_file(folder / MODEL)
    if (folder / DECODE).exists():
        check_file(folder / DECODE)
    if check_weights:
        check_numbers(folder)


def check_file(path: Path) -> None:
    """Raises: ArtifactError that names what is wrong, for a file that `dsmoe compile` did not write so."""
    import onnx

    if path.stat().st_size > LIMIT:
        raise ArtifactError(f"{path} has {path.stat().st_size:,} bytes; a protobuf holds at most {LIMIT:,}: refused")
    try:
        proto = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's own DecodeError, which lives in a package of its own
        raise ArtifactError(f"{path} is no ONNX model: {str(error)[:200]}") from None
    check_runtime(path, proto)
    check_operators(path, proto)
    for owner, tensor in external(proto):
        check_reference(path, owner, tensor)


def check_runtime(path: Path, proto: onnx.ModelProto) -> None:
    """The ONNX Runtime that is here is at least the one that the file asks for."""
    import onnxruntime

    said = {entry.key: entry.value for entry in proto.metadata_props}
    least, here = said.get("dsmoe.minimum_onnxruntime"), onnxruntime.__version__
    if least is None:
        raise ArtifactError(f"{path} says no minimum version of ONNX Runtime: dsmoe compile did not write it")
    if numbers(here) < numbers(least):
        raise ArtifactError(
            f'{path} needs ONNX Runtime {least} or newer, this is {here}: pip install "onnxruntime>={least}"'
        )


def check_operators(path: Path, proto: onnx.ModelProto) -> None:
    """Versions of operators are ours, and each node of our own has the attributes that it may have."""
    for entry in proto.opset_import:
        wanted = DOMAINS.get(entry.domain)
        if wanted != entry.version:
            due = f"version {wanted}" if wanted else f"one of {', '.join(repr(d) for d in DOMAINS)}"
            raise ArtifactError(f"{path} imports opset {entry.domain!r} in version {entry.version}, not {due}: refused")
    try:
        check_nodes(proto)
        check_decode_nodes(proto)
        for node in layers_of(proto):
            kind_of(node, proto)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from None


def check_reference(model: Path, owner: str, tensor: onnx.TensorProto) -> None:
    """External data lies in the artifact's own weights, beside `model`, with the size that the tensor takes."""
    said = {entry.key: entry.value for entry in tensor.external_data}
    where, name = said.get("location", ""), f"{model}: {owner} {tensor.name[:200]!r}"
    if not PLAIN.fullmatch(where):
        raise ArtifactError(f"{name} lies in {where[:200]!r}: only files in {WEIGHTS}/ are accepted")
    path = model.parent / where
    if path.is_symlink() or path.parent.is_symlink() or not path.is_file():
        raise ArtifactError(f"{name} lies in {where!r}, which is a link or missing: refused")
    try:
        offset, length = int(said["offset"]), int(said["length"])
    except (KeyError, ValueError):
        raise ArtifactError(f"{name} has no offset and length in {where!r}: refused") from None
    size = math.prod(tensor.dims) * ITEM_SIZES.get(tensor.data_type, 0)
    there = path.stat().st_size
    if length != size or offset < 0 or offset + length > there or size <= 0:
        raise ArtifactError(
            f"{name} of shape {list(tensor.dims)} takes {size:,} bytes; it names {length:,} from {offset:,} on of "
            f"{where!r}, which has {there:,}: refused"
        )


def check_numbers(folder: Path) -> None:
    """No weight holds NaN."""
    for file in sorted((folder / WEIGHTS).glob("*.safetensors")):
        for entry in read_header(file).values():
            dtype = DTYPES[entry.dtype]
            if not dtype.is_floating_point:
                continue
            tensor = torch.empty(entry.shape, dtype=dtype)
            for _ in read_tensor(entry, tensor):
                pass
            if bool(torch.isnan(tensor).any()):
                raise ArtifactError(f"{file}: the weight {entry.name!r} holds NaN: refused")


def external(proto: onnx.ModelProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """Every tensor of the file whose data lies elsewhere, in graphs, functions and attributes."""
    for tensor in proto.graph.initializer:
        if tensor.data_location == tensor.EXTERNAL:
            yield "the initializer", tensor
    nodes = [*proto.graph.node, *(node for function in proto.functions for node in function.node)]
    while nodes:
        node = nodes.pop()
        for attribute in node.attribute:
            graphs = [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]
            tensors = [*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors]
            tensors += [tensor for graph in graphs for tensor in graph.initializer]
            nodes += [inner for graph in graphs for inner in graph.node]
            for tensor in tensors:
                if tensor.data_location == tensor.EXTERNAL:
                    yield f"a constant of {node.name or node.op_type}", tensor


def numbers(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with."""
    return tuple(int(n) for n in re.findall(r"\d+", version)[:3])
