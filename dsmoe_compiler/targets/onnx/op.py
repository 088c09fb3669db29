"""The op DsMoE: its schema for onnx's checker and shape inference, and the checks of nodes that onnx does not make.

`onnx.checker` accepts any value of an attribute, and in a domain that it does not know any attribute: it lets edited
files pass, `check_nodes` does not. T tokens, H hidden size, E experts, I expert width, K experts a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from dsmoe_runtime.errors import ArtifactError, ConfigError
from dsmoe_runtime.ops.activation import check_activation, has_gate
from dsmoe_runtime.ops.experts import LAYOUTS

if TYPE_CHECKING:
    import onnx

OPSET = 23  # of the models that we write: the first with Attention, RMSNormalization and RotaryEmbedding
DOMAIN, OP_TYPE, VERSION = "dsmoe", "DsMoE", 1
TYPES = ("tensor(float)", "tensor(float16)", "tensor(bfloat16)")
INPUTS = (  # name, type, description; those after `down` are given both or not at all
    ("x", "T", "[T, H], the tokens"),
    ("experts", "tensor(int64)", "[T, K], the experts of each token; a slot whose id is outside [0, E) is skipped"),
    ("weights", "tensor(float)", "[T, K], the weight of each slot"),
    ("gate_up", "T", "[E, 2I, H], or as `layout` says"),
    ("down", "T", "[E, H, I], or [E, I, H] for the transposed layouts"),
    ("gate_up_bias", "T", "[E, 2I], in the order of gate_up's rows; [E, I] without a gate"),
    ("down_bias", "T", "[E, H]"),
)
REQUIRED = tuple(name for name, _, _ in INPUTS[:5])
TYPE_VARIABLES = [("T", list(TYPES), "The tokens, the weights of the experts and the result.")]
DOC = """The routed experts of a mixture-of-experts layer, given their routing:
y[t] = sum over k of weights[t, k] * expert(experts[t, k])(x[t]), slots summed in float32 in the order of k and rounded
once. The same input gives the same bits on every run. docs/onnx-op.md of dsmoe-compiler is the specification."""

Shape = Sequence[int | str | None]  # of a dimension its size, its name or nothing


class Attributes(NamedTuple):
    """What a node says beside its inputs, with the defaults of those that it leaves out."""

    activation: str = "silu"
    alpha: float = 1.0
    limit: float = 0.0
    layout: str = "concat"

    def check(self) -> None:
        """Refuse attributes without a meaning; ConfigError."""
        if self.layout not in LAYOUTS:
            raise ConfigError(f"layout is {self.layout!r}; it must be one of {', '.join(LAYOUTS)}")
        check_activation(self.activation, self.layout)
        for name in ("alpha", "limit"):
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be finite")


DEFAULTS = Attributes()._asdict()


def register_schema() -> None:
    """Make the op known to onnx in this process (checker, shape inference, onnxscript); any number of times."""
    from onnx import defs

    attributes = [defs.OpSchema.Attribute(name, _attribute(name, default), "") for name, default in DEFAULTS.items()]
    register(OP_TYPE, DOC, INPUTS, REQUIRED, [("y", "T", "[T, H]")], TYPE_VARIABLES, attributes, _infer)


def register(
    op_type: str,
    doc: str,
    inputs: Sequence[tuple[str, str, str]],
    required: Collection[str],
    outputs: Sequence[tuple[str, str, str]],
    variables: Sequence[tuple[str, list[str], str]],
    attributes: Sequence[Any],
    infer: Callable[[Any], None],
) -> None:
    """Make an op of our domain known to onnx, unless it is. Inputs and outputs are names, types, descriptions."""
    from onnx import defs

    try:
        defs.get_schema(op_type, VERSION, DOMAIN)
        return
    except defs.SchemaError:
        pass
    parameter, option = defs.OpSchema.FormalParameter, defs.OpSchema.FormalParameterOption
    schema = defs.OpSchema(
        op_type,
        DOMAIN,
        VERSION,
        doc=doc,
        inputs=[
            parameter(*each, param_option=option.Single if each[0] in required else option.Optional) for each in inputs
        ],
        outputs=[parameter(*each) for each in outputs],
        type_constraints=list(variables),
        attributes=list(attributes),
    )
    schema.set_type_and_shape_inference_function(infer)
    defs.register_schema(schema)


def nodes_of(model: onnx.ModelProto, op_type: str = OP_TYPE) -> Iterator[onnx.NodeProto]:
    """Every node of a type of ours: of a model's graph, of the graphs inside its nodes, and of its functions."""
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        yield from (node for node in _flat(nodes) if (node.domain, node.op_type) == (DOMAIN, op_type))


def attributes_of(node: onnx.NodeProto) -> Attributes:
    """The attributes of a DsMoE node; ArtifactError for one that is unknown, of another type or without a meaning."""
    types = {name: type(default) for name, default in DEFAULTS.items()}
    attributes = Attributes(**attribute_values(node, types, label(node)))
    try:
        attributes.check()
    except ConfigError as error:
        raise ArtifactError(f"{label(node)}: {error}") from error
    return attributes


def attribute_values(node: onnx.NodeProto, types: dict[str, type], what: str) -> dict[str, Any]:
    """A node's attributes by name; ArtifactError that begins with `what` for one that is not in `types`."""
    from onnx import helper

    given: dict[str, Any] = {}
    for attribute in node.attribute:
        wanted = types.get(attribute.name)
        if wanted is None:
            raise ArtifactError(
                f"{what}: attribute {attribute.name!r} is unknown to version {VERSION} of the op, which has "
                f"{', '.join(types)}; export the model again"
            )
        value = helper.get_attribute_value(attribute)
        value = value.decode(errors="replace") if isinstance(value, bytes) else value
        if type(value) is not wanted or attribute.ref_attr_name:
            raise ArtifactError(f"{what}: attribute {attribute.name!r} is {value!r}; it must be a {wanted.__name__}")
        given[attribute.name] = value
    return given


def all_attributes(node: onnx.NodeProto, types: dict[str, type], what: str) -> dict[str, Any]:
    """As `attribute_values`, of an op whose attributes are always written: ArtifactError for one that is not there."""
    values = attribute_values(node, types, what)
    missing = sorted(types.keys() - values.keys())
    if missing:
        raise ArtifactError(f"{what}: attribute {missing[0]!r} is missing; export the model again")
    return values


def has_biases(node: onnx.NodeProto) -> bool:
    """Whether a DsMoE node has its biases; ArtifactError if its inputs and outputs are not those of the op."""
    present = [bool(name) for name in node.input]
    biases = sum(present[len(REQUIRED) :])
    if len(present) > len(INPUTS) or present[: len(REQUIRED)] != [True] * len(REQUIRED) or len(node.output) != 1:
        raise ArtifactError(
            f"{label(node)}: it has inputs {list(node.input)} and outputs {list(node.output)}; the op takes "
            f"{', '.join(name for name, _, _ in INPUTS)} (the last two may be missing) and gives y"
        )
    if biases == 1:
        raise ArtifactError(f"{label(node)}: one bias is given and the other is not; give zeros for it, or neither")
    return biases == 2


def check_nodes(model: onnx.ModelProto, *, functions: bool = True) -> list[tuple[onnx.NodeProto, Attributes, bool]]:
    """Hold every DsMoE node against our schema: its attributes and whether it has biases, or ArtifactError by name.

    With `functions`, also that nodes which share a body share a meaning.
    """
    found = [(node, attributes_of(node), has_biases(node)) for node in nodes_of(model)]
    imports = {opset.domain: opset.version for opset in model.opset_import}
    if found and imports.get(DOMAIN) != VERSION:
        have = "does not import it" if DOMAIN not in imports else f"imports version {imports[DOMAIN]}"
        raise ArtifactError(
            f"the model uses {DOMAIN}::{OP_TYPE} and {have}; this tool knows version {VERSION} of the domain "
            f"{DOMAIN!r}: export the model again, or use the version of the tool that wrote it"
        )
    shapes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    meanings: dict[str, tuple[Attributes, bool]] = {}
    in_graph = sum((node.domain, node.op_type) == (DOMAIN, OP_TYPE) for node in _flat(model.graph.node))
    for place, (node, attributes, biases) in enumerate(found):
        names = [*node.input, "", ""][: len(INPUTS)] if place < in_graph else []  # a function has names of its own
        wrong = disagreement([shapes.get(name) for name in names], attributes.layout)
        kinds = {types[name] for name in names[3:] if name in types}
        if wrong or len(kinds) > 1:
            raise ArtifactError(f"{label(node)}: {wrong or f'its weights have {len(kinds)} types; they must have one'}")
        if (
            functions
            and model.functions
            and meanings.setdefault(node.overload, (attributes, biases)) != (attributes, biases)
        ):
            raise ArtifactError(
                f"{label(node)}: its function is that of a node with other attributes: {attributes} and "
                f"{meanings[node.overload][0]}; give each its own (`overload`), or export the model again"
            )
    return found


def disagreement(shapes: Sequence[Shape | None], layout: str) -> str | None:
    """What is wrong with the shapes of a node's inputs as far as they are known, in a sentence; None if nothing is."""
    parts, sizes = 2 if has_gate(layout) else 1, dict[str, int]()
    wide = "2I" if parts == 2 else "I"
    two, one = ((wide, "H"), ("H", "I")) if not layout.endswith("_transposed") else (("H", wide), ("I", "H"))
    wanted = (("T", "H"), ("T", "K"), ("T", "K"), ("E", *two), ("E", *one), ("E", wide), ("E", "H"))
    for (name, _, _), shape, letters in zip(INPUTS, shapes, wanted, strict=False):
        if shape is None:
            continue
        for size, letter in zip(shape, letters, strict=False):
            factor, key = (2, "I") if letter == "2I" else (1, letter)
            if isinstance(size, int) and sizes.setdefault(key, size // factor) * factor != size:
                return (
                    f"{name} is {list(shape)}, and {letter} of its [{', '.join(letters)}] should be "
                    f"{sizes[key] * factor} in layout {layout!r}"
                )
        if len(shape) != len(letters):
            return f"{name} is {list(shape)}; in layout {layout!r} it must be [{', '.join(letters)}]"
    return None


def label(node: onnx.NodeProto) -> str:
    """The node by its name, or by its first output where it has none."""
    return f"{OP_TYPE} {node.name!r}" if node.name else f"{OP_TYPE} that gives {[*node.output][:1]}"


def _flat(nodes: Sequence[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _flat(graph.node)


def _attribute(name: str, value: Any) -> onnx.AttributeProto:
    from onnx import helper

    return helper.make_attribute(name, value)


def _infer(context: Any) -> None:
    """y is as x; shapes that contradict each other are refused where shape inference is strict."""
    from onnx import shape_inference

    shapes: list[Shape | None] = []
    for index in range(context.get_num_inputs()):
        kind = context.get_input_type(index) if context.has_input(index) else None
        tensor = kind.tensor_type if kind is not None and kind.tensor_type.HasField("shape") else None
        sizes = [] if tensor is None else [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
        shapes.append(sizes if tensor is not None else None)
    layout = context.get_attribute("layout")
    wrong = disagreement(shapes, layout.s.decode() if layout is not None else Attributes().layout)
    if wrong:
        raise shape_inference.InferenceError(f"{OP_TYPE}: {wrong}")
    context.set_output_type(0, context.get_input_type(0))
