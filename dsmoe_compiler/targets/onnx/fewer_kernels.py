"""Standard operators in the spellings that ONNX Runtime's CUDA provider runs in fewer and better kernels.

    y = Add(a, b); n = RMSNormalization(y, w)   ->   n, y = SkipSimplifiedLayerNormalization(a, b, w)
    MatMul(x [B, S, K], Transpose(w))           ->   Gemm(x [B*S, K], w, transB), for which no weight is laid anew

B sequences, S new tokens, K width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dsmoe_compiler.targets.onnx.grouped_attention import ROWS, dims
from dsmoe_compiler.targets.onnx.rewriting import CONTRIB, import_contrib, replace_nodes

if TYPE_CHECKING:
    import onnx

INT64 = 7  # onnx.TensorProto's number


def fewer_kernels(proto: onnx.ModelProto) -> None:
    """Rewrite `proto`, a step with names for its free sizes, in place."""
    graph = proto.graph
    shapes = {value.name: dims(value) for value in graph.value_info}
    makers = {name: node for node in graph.node for name in node.output}
    norms: dict[str, Any] = {}  # by the sum that each reads
    for node in graph.node:
        plain = node.op_type == "RMSNormalization" and node.input[1] not in makers
        if plain and is_sum(makers.get(node.input[0]), shapes):
            norms.setdefault(node.input[0], node)
    gone = {node.output[0] for node in norms.values()}
    nodes: list[Any] = []
    for node in graph.node:
        if node.output[0] in norms:
            nodes.append(skip_norm(norms[node.output[0]], node))
        elif weight := transposed(node, makers, shapes):
            nodes += flat_product(proto, node, weight, shapes)
        elif node.output[0] not in gone:
            nodes.append(node)
    replace_nodes(graph, nodes)
    if norms:
        import_contrib(proto)


def is_sum(node: Any, shapes: dict[str, list[Any]]) -> bool:
    """Whether `node` adds two activations of one shape."""
    if node is None or node.op_type != "Add":
        return False
    one, other = (shapes.get(name, []) for name in node.input)
    return one == other and len(one) == 3 and one[:2] == ROWS


def skip_norm(norm: Any, total: Any) -> Any:
    """The norm of a sum, which gives the sum too."""
    from onnx import helper

    (epsilon,) = (a.f for a in norm.attribute if a.name == "epsilon")
    outputs = [norm.output[0], "", "", total.output[0]]
    return helper.make_node(
        "SkipSimplifiedLayerNormalization", [*total.input, norm.input[1]], outputs, domain=CONTRIB, epsilon=epsilon
    )


def transposed(node: Any, makers: dict[str, Any], shapes: dict[str, list[Any]]) -> str:
    """The weight `[N, K]` that `node` multiplies a step's activations by; empty if it does something else."""
    if node.op_type != "MatMul" or node.domain:
        return ""
    turn, x, y = makers.get(node.input[1]), *(shapes.get(name, []) for name in (node.input[0], node.output[0]))
    if turn is None or turn.op_type != "Transpose" or turn.input[0] in makers or list(turn.attribute[0].ints) != [1, 0]:
        return ""
    return turn.input[0] if x[:2] == y[:2] == ROWS and len(x) == len(y) == 3 and isinstance(x[2], int) else ""


def flat_product(proto: onnx.ModelProto, node: Any, weight: str, shapes: dict[str, list[Any]]) -> list[Any]:
    """`node` over rows."""
    from onnx import helper

    made, y = helper.make_node, node.output[0]
    inner, outer = (shapes[name][2] for name in (node.input[0], y))
    constants = {f"rows/{inner}": [-1, inner], f"width/{outer}": [outer]}
    there = {tensor.name for tensor in proto.graph.initializer}
    for name, value in constants.items():
        if name not in there:
            proto.graph.initializer.append(helper.make_tensor(name, INT64, [len(value)], value))
    return [
        made("Reshape", [node.input[0], f"rows/{inner}"], [f"{y}/rows"]),
        made("Gemm", [f"{y}/rows", weight], [f"{y}/flat"], transB=1),
        made("Shape", [node.input[0]], [f"{y}/sizes"], start=0, end=2),
        made("Concat", [f"{y}/sizes", f"width/{outer}"], [f"{y}/shape"], axis=0),
        made("Reshape", [f"{y}/flat", f"{y}/shape"], [y]),
    ]
