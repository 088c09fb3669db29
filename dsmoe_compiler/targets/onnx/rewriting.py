"""New nodes for a graph, and operators of ONNX Runtime's own for a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

CONTRIB = "com.microsoft"


def replace_nodes(graph: onnx.GraphProto, nodes: Sequence[Any]) -> None:
    """Let the graph have `nodes`, in their order, and of these and of its constants only what leads to its outputs."""
    import onnx

    read, live = {value.name for value in graph.output}, list[Any]()
    for node in reversed(nodes):
        if read & set(node.output):
            read |= set(node.input)
            live.insert(0, node)
    made = {name for node in live for name in node.output}
    new = onnx.GraphProto(
        node=live,
        initializer=[tensor for tensor in graph.initializer if tensor.name in read],
        value_info=[value for value in graph.value_info if value.name in made],
    )
    for field in ("node", "initializer", "value_info"):
        graph.ClearField(field)
        getattr(graph, field).extend(getattr(new, field))


def import_contrib(proto: onnx.ModelProto) -> None:
    """Let the model use operators of ONNX Runtime's own."""
    from onnx import helper

    if all(entry.domain != CONTRIB for entry in proto.opset_import):
        proto.opset_import.append(helper.make_opsetid(CONTRIB, 1))
