"""The op DsMoELayer: gate, routed and shared experts in one node, which GPUs run in the launches of `dsmoe::moe`.

    x, router_weight, gate_up, down, shared_gate_up, shared_down, ... -> DsMoELayer -> y [T, H], experts [T, K]

The portable spelling, routing and shared experts in standard operators around a DsMoE node, is its body: it says what
the op means, and runs where our library does not. On an H200 that spelling takes 1.2 to 1.8 times as long: a dozen
small kernels and passes in float32.

T tokens, H hidden size, E experts, I expert width, S shared width, K experts a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from dsmoe_compiler.targets.onnx.op import TYPE_VARIABLES, TYPES, Attributes, all_attributes, nodes_of, register
from dsmoe_runtime.errors import ArtifactError, ConfigError
from dsmoe_runtime.ops.moe import ROUTER_DTYPES
from dsmoe_runtime.ops.route import check_routing

if TYPE_CHECKING:
    import onnx

LAYER_TYPE = "DsMoELayer"
INPUTS = (  # name, type, description; R: of the gate, whatever T is
    ("x", "T", "[T, H], the tokens"),
    ("router_weight", "R", "[E, H]"),
    ("router_bias", "R2", "[E], added to the logits"),
    ("selection_bias", "R3", "[E], added to the scores that select, not to the weights"),
    ("gate_up", "T", "[E, 2I, H], or as `layout` says"),
    ("down", "T", "[E, H, I], or [E, I, H] for the transposed layouts"),
    ("gate_up_bias", "T", "[E, 2I], in the order of gate_up's rows; [E, I] without a gate"),
    ("down_bias", "T", "[E, H]"),
    ("shared_gate_up", "T", "[2S, H], the gate's rows first; [S, H] without a gate"),
    ("shared_down", "T", "[H, S]"),
)
REQUIRED = ("x", "router_weight", "gate_up", "down")
PAIRS = (("gate_up_bias", "down_bias"), ("shared_gate_up", "shared_down"))  # both or neither
DOC = """A whole mixture-of-experts layer: the gate chooses K experts a token, their weighted answers and that of the
shared experts add up. docs/onnx-op.md of dsmoe-compiler is the specification."""


class Gate(NamedTuple):
    """What a node says of its gate, as `dsmoe_runtime.ops.route.route` takes it. All of it is always written."""

    top_k: int
    score: str
    n_group: int
    topk_group: int
    group_score: str
    renormalize: int
    eps: float
    scale: float
    router_dtype: str


class Kind(NamedTuple):
    """What decides a node's body: nodes of one kind share it."""

    gate: Gate
    experts: Attributes
    num_experts: int
    dtype: int  # of x, in onnx's numbers
    router_dtypes: tuple[int, ...]  # of router_weight and the two biases; 0: not given
    given: tuple[bool, ...]  # which inputs there are


def register_layer() -> None:
    """Make the op known to onnx in this process, as `op.register_schema` does."""
    from onnx import defs

    types = {int: defs.OpSchema.AttrType.INT, float: defs.OpSchema.AttrType.FLOAT, str: defs.OpSchema.AttrType.STRING}
    wanted = {name: getattr(types[kind], "value", types[kind]) for name, kind in fields().items()}
    attributes = [defs.OpSchema.Attribute(name, kind, "", required=True) for name, kind in wanted.items()]
    outputs = [("y", "T", "[T, H]"), ("experts", "tensor(int64)", "[T, K], the experts that made it")]
    variables = [*TYPE_VARIABLES, *((name, list(TYPES), "Of the gate.") for name in ("R", "R2", "R3"))]
    register(LAYER_TYPE, DOC, INPUTS, REQUIRED, outputs, variables, attributes, _infer)


def fields() -> dict[str, type]:
    """Every attribute of a node with its type."""
    gate = dict(zip(Gate._fields, (int, str, int, int, str, int, float, float, str), strict=True))
    return gate | {"activation": str, "alpha": float, "limit": float, "layout": str}


def why_not(
    num_experts: int, top_k: int, width: int, layout: str, shared_down: Any | None, shared_gate: Any | None
) -> str | None:
    """Why a layer stays in the portable spelling, or None: what the kernels of one call cannot do."""
    if num_experts > 512 or top_k > 16:
        return f"{num_experts} experts, {top_k} a token: the gate's kernel takes 512 and 16"
    if shared_gate is not None:
        return "its shared experts have a gate of their own"
    if shared_down is not None and shared_down.shape[1] % width:
        return f"its shared experts, {shared_down.shape[1]} wide, are no whole number of experts, {width} wide"
    if shared_down is not None and layout not in ("concat", "ungated"):
        return f"its experts are in layout {layout!r}, its shared experts are not"
    return None


def layers_of(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Every DsMoELayer node of a model."""
    return nodes_of(model, LAYER_TYPE)


def kind_of(node: onnx.NodeProto, model: onnx.ModelProto) -> Kind:
    """A node's kind. Raises: ArtifactError for attributes or inputs that the op does not have, by name."""
    name = f"{LAYER_TYPE} {node.name!r}"
    values = all_attributes(node, fields(), name)
    gate = Gate(**{key: values[key] for key in Gate._fields})
    experts = Attributes(**{key: values[key] for key in Attributes._fields})
    present = [bool(given) for given in [*node.input, *[""] * len(INPUTS)][: len(INPUTS)]]
    given = dict(zip((name for name, _, _ in INPUTS), present, strict=True))
    lacking = [each for each in REQUIRED if not given[each]]
    if lacking or len(node.input) > len(INPUTS) or any(given[one] != given[two] for one, two in PAIRS):
        raise ArtifactError(f"{name}: its inputs {list(node.input)} are not {', '.join(n for n, _, _ in INPUTS)}")
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    tensors = [held.get(each) for each in [*node.input, *[""] * len(INPUTS)][: len(INPUTS)]]
    router, gate_up = tensors[1], tensors[4]
    if router is None or gate_up is None or len(router.dims) != 2:
        raise ArtifactError(f"{name}: its router_weight and gate_up are no weights of the file; export the model again")
    try:
        experts.check()
        sizes = (gate.top_k, gate.score, gate.n_group, gate.topk_group, gate.group_score)
        check_routing(router.dims[0], *sizes)
        if gate.router_dtype not in ROUTER_DTYPES or gate.renormalize not in (0, 1):
            raise ConfigError(f"router_dtype is {gate.router_dtype!r} and renormalize {gate.renormalize}")
    except ConfigError as error:
        raise ArtifactError(f"{name}: {error}") from error
    types = tuple(0 if tensor is None else tensor.data_type for tensor in tensors[1:4])
    return Kind(gate, experts, router.dims[0], gate_up.data_type, types, tuple(present))


def _infer(context: Any) -> None:
    from onnx import TensorProto, TypeProto

    tokens = context.get_input_type(0)
    context.set_output_type(0, tokens)
    chosen = TypeProto()
    chosen.tensor_type.elem_type = TensorProto.INT64
    if tokens.tensor_type.HasField("shape") and tokens.tensor_type.shape.dim:
        chosen.tensor_type.shape.dim.add().CopyFrom(tokens.tensor_type.shape.dim[0])
        chosen.tensor_type.shape.dim.add().dim_value = context.get_attribute("top_k").i
    context.set_output_type(1, chosen)
