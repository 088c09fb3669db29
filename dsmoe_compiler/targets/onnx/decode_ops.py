"""The ops of decode.onnx, which adds one token to one sequence: DsGemv and DsDecodeAttention.

Neither has a function body: CUDA kernels of our library run them, and nothing else does. `decode_step` writes them.

K, N sizes of a weight `[N, K]`, A query heads, G key and value heads, D head width, C slots of the cache, P positions.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from dsmoe_compiler.targets.onnx.op import TYPE_VARIABLES, all_attributes, nodes_of, register
from dsmoe_runtime.errors import ArtifactError

if TYPE_CHECKING:
    import onnx

GEMV, ATTENTION = "DsGemv", "DsDecodeAttention"
GEMV_INPUTS = (
    ("x", "T", "[..., K], one row: all sizes but the last are 1"),
    ("weight", "T", "[N, K]"),
)
ATTENTION_INPUTS = (
    ("qkv", "T", "[1, 1, (A + 2G) D], queries, keys and values of one token, before their rotation"),
    ("cos", "T", "[P, D / 2], by position"),
    ("sin", "T", "[P, D / 2], by position"),
    ("position", "tensor(int64)", "[1], of the token; its slot in the cache"),
    ("past_key", "T", "[1, G, C, D], rotated; what slots from `position` on hold is not read"),
    ("past_value", "T", "[1, G, C, D]"),
)
GEMV_OUTPUTS = (("y", "T", "[..., N], the sizes of x but the last"),)
ATTENTION_OUTPUTS = (
    ("y", "T", "[1, 1, A D]"),
    ("present_key", "T", "[1, G, C, D], past_key with the new key; its memory may be that of past_key"),
    ("present_value", "T", "[1, G, C, D], past_value with the new value"),
)
FIELDS: dict[str, type] = {"num_heads": int, "kv_num_heads": int, "scale": float}  # of DsDecodeAttention
GEMV_DOC = "A row of activations by a weight: y = x weight^T, summed in float32 and rounded once."
ATTENTION_DOC = """Causal attention of one new token over a cache of fixed slots: its query and key are turned by the
angles of its position (halves of a head: x1 cos - x2 sin, x2 cos + x1 sin), key and value go to slot `position`, and
the query sees the slots up to this one."""


def register_decode_ops() -> None:
    """Make both ops known to onnx in this process, as `op.register_schema` does."""
    from onnx import defs

    kinds = {int: defs.OpSchema.AttrType.INT, float: defs.OpSchema.AttrType.FLOAT}
    wanted = {name: getattr(kinds[kind], "value", kinds[kind]) for name, kind in FIELDS.items()}
    attributes = [defs.OpSchema.Attribute(name, kind, "", required=True) for name, kind in wanted.items()]
    names = [name for name, _, _ in (*GEMV_INPUTS, *ATTENTION_INPUTS)]
    register(GEMV, GEMV_DOC, GEMV_INPUTS, names, GEMV_OUTPUTS, TYPE_VARIABLES, [], _infer_gemv)
    register(
        ATTENTION, ATTENTION_DOC, ATTENTION_INPUTS, names, ATTENTION_OUTPUTS, TYPE_VARIABLES, attributes,
        _infer_attention,
    )  # fmt: skip


def check_decode_nodes(model: onnx.ModelProto) -> None:
    """Hold every node of both ops against our schemas. Raises: ArtifactError with what is wrong, by name."""
    dims = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    for node in nodes_of(model, GEMV):
        check_node(node, {}, GEMV_INPUTS, GEMV_OUTPUTS)
        if len(dims.get(node.input[1], ())) != 2:
            raise ArtifactError(f"{GEMV} {node.name!r}: its weight is no matrix of the file; export the model again")
    for node in nodes_of(model, ATTENTION):
        values = check_node(node, FIELDS, ATTENTION_INPUTS, ATTENTION_OUTPUTS)
        heads, groups = values["num_heads"], values["kv_num_heads"]
        if groups < 1 or heads < 1 or heads % groups:
            raise ArtifactError(f"{ATTENTION} {node.name!r}: it has {heads} query heads for {groups}")
        cos, sin = (dims.get(name, []) for name in node.input[1:3])
        if len(cos) != 2 or cos != sin:
            raise ArtifactError(f"{ATTENTION} {node.name!r}: its cosines are {cos} and its sines {sin}")


def check_node(
    node: onnx.NodeProto, types: dict[str, type], inputs: Collection[Any], outputs: Collection[Any]
) -> dict[str, Any]:
    """A node's attributes, of which all are there, as are its inputs and outputs. Raises: ArtifactError."""
    name = f"{node.op_type} {node.name!r}"
    values = all_attributes(node, types, name)
    for what, found, wanted in (("inputs", node.input, inputs), ("outputs", node.output, outputs)):
        if len(found) != len(wanted) or not all(found):
            raise ArtifactError(f"{name}: its {what} {list(found)} are not {', '.join(n for n, _, _ in wanted)}")
    return values


def _infer_gemv(context: Any) -> None:
    from onnx import TypeProto, shape_inference

    x, weight = (context.get_input_type(at) for at in (0, 1))
    row, sizes = _dims(x), _dims(weight)
    y = TypeProto()
    y.CopyFrom(x)
    if row is None or sizes is None:
        y.tensor_type.ClearField("shape")
    else:
        if not row or len(sizes) != 2 or len({row[-1], sizes[1]} - {None}) > 1:
            raise shape_inference.InferenceError(f"{GEMV}: x is {row} and weight {sizes}")
        y.tensor_type.shape.dim[-1].CopyFrom(weight.tensor_type.shape.dim[0])
    context.set_output_type(0, y)


def _infer_attention(context: Any) -> None:
    from onnx import TypeProto, shape_inference

    qkv, past = context.get_input_type(0), [context.get_input_type(at) for at in (4, 5)]
    heads, groups = (context.get_attribute(name).i for name in ("num_heads", "kv_num_heads"))
    sizes, wide = _dims(past[0]), (_dims(qkv) or [None])[-1]
    y = TypeProto()
    y.tensor_type.elem_type = qkv.tensor_type.elem_type
    if sizes and sizes[-1] is not None:
        if len(sizes) != 4 or sizes[1] not in (None, groups) or wide not in (None, (heads + 2 * groups) * sizes[3]):
            raise shape_inference.InferenceError(f"{ATTENTION}: qkv is {_dims(qkv)} and past_key {sizes}")
        for size in (1, 1, heads * sizes[3]):
            y.tensor_type.shape.dim.add().dim_value = size
    for at, kind in enumerate([y, *past]):
        context.set_output_type(at, kind)


def _dims(kind: Any) -> list[Any] | None:
    """Sizes, None for each that is free; None if even their number is."""
    if not kind.tensor_type.HasField("shape"):
        return None
    return [dim.dim_value if dim.HasField("dim_value") else None for dim in kind.tensor_type.shape.dim]
