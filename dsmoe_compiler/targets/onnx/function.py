"""The bodies of a model's DsMoE nodes: one function for each kind of node."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsmoe_compiler.targets.onnx.body import body
from dsmoe_compiler.targets.onnx.op import DOMAIN, OP_TYPE, Attributes, check_nodes
from dsmoe_runtime.errors import TargetError

if TYPE_CHECKING:
    import onnx

LEAST_OPSET = 21  # below, operators that the body names (Gelu, Split, Cast) are others or know fewer types
OVERLOAD_IR = 10  # the first version of the file format with overloads
LEAST_ONNXRUNTIME = "1.23"  # the oldest that the body was run in
OVERLOADS_SINCE = "1.27"  # ONNX Runtime before it takes one function for all nodes, without a word


def function(
    activation: str, alpha: float, limit: float, layout: str, *, biases: bool, opset: int, overload: str = ""
) -> onnx.FunctionProto:
    """The body for nodes with these attributes, with both biases or neither; `opset` is that of the model."""
    import onnx.parser

    attributes = Attributes(activation, alpha, limit, layout)
    attributes.check()
    made = onnx.parser.parse_function(body(attributes, biases, opset))
    made.overload = overload
    return made


def add_functions(model: onnx.ModelProto) -> None:
    """Give every DsMoE node of a model its body, in place; bodies that are there already are made anew.

    Where nodes differ in their attributes or in having biases, each kind gets a function of its own, told apart by
    `overload`: ONNX Runtime since 1.27 and onnx's inliner read it, onnx's ReferenceEvaluator (1.23) does not.
    """
    found = check_nodes(model, functions=False)
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if found and opset < LEAST_OPSET:
        raise TargetError(f"the model has opset {opset}; the body of {OP_TYPE} needs {LEAST_OPSET}: export with that")
    kinds = list(dict.fromkeys((attributes, biases) for _, attributes, biases in found))
    others = [made for made in model.functions if (made.domain, made.name) != (DOMAIN, OP_TYPE)]
    names = {kind: "" if len(kinds) == 1 else _overload(*kind) for kind in kinds}
    for node, attributes, biases in found:
        node.overload = names[attributes, biases]
    del model.functions[:]
    model.functions.extend(others)
    for attributes, biases in kinds:
        overload = names[attributes, biases]
        model.functions.append(function(*attributes, biases=biases, opset=opset, overload=overload))
    if len(kinds) > 1:
        model.ir_version = max(model.ir_version, OVERLOAD_IR)


def minimum_onnxruntime(model: onnx.ModelProto) -> str:
    """The oldest version that runs the bodies in a model right, for its metadata."""
    several = len({made.overload for made in model.functions if made.domain == DOMAIN}) > 1
    return OVERLOADS_SINCE if several else LEAST_ONNXRUNTIME


def _overload(attributes: Attributes, biases: bool) -> str:
    return "-".join((*map(str, attributes), "biases" if biases else "plain"))
