"""DsMoE nodes as ONNX Runtime's own `com.microsoft.MoE`, where and only where that runtime computes it right.

That op routes by itself: softmax over all experts, then the K largest. Given our weights w of K distinct experts it is
handed a row that holds log(w / max w) at those experts and -inf elsewhere, whose softmax is w / sum(w):

    DsMoE(x, experts, weights, ..)  ->  MoE(x, ScatterElements(-inf, experts, Log(..)), ..) * ReduceSum(weights)

What stands in the way, and is refused by name or stepped around (onnxruntime 1.23 to 1.32, all measured on its CPU):

    CPU, before 1.32     float16 gives zeros and no error: refused on a CPU, as is bfloat16, which has no kernel
    CPU, before 1.32     the result overwrites an x that nothing reads afterwards: a Where that reads x comes after it
    all                  gate and up only interleaved: weights in "concat" are laid anew when a session starts, a copy.
                         A CPU refuses the other form; an H200 (1.31.1) took it for T = 1, 16, 4096 and was 75 % off
    all                  an expert twice in a token, and gates of other activations than SwiGLU's, cannot be said
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dsmoe_compiler.targets.onnx.op import DOMAIN, OP_TYPE, Attributes, check_nodes, label
from dsmoe_compiler.targets.onnx.rewriting import CONTRIB
from dsmoe_runtime.errors import TargetError
from dsmoe_runtime.ops.activation import has_gate

if TYPE_CHECKING:
    import onnx

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
LEAST_ONNXRUNTIME = {
    CPU: "1.23",
    CUDA: "1.31",
}  # for a model's metadata; CUDA's had alpha and beta fixed until mid 2026
FLOAT, FLOAT16, BFLOAT16 = 1, 10, 16  # onnx.TensorProto's numbers
TYPES = {CPU: {FLOAT: "float32"}, CUDA: {FLOAT: "float32", FLOAT16: "float16", BFLOAT16: "bfloat16"}}
UNLIMITED = 3.0e38  # a clamp that does not cut
GATED: dict[str, Callable[[float, float], tuple[float, float, float]]] = {  # MoE's alpha, beta and limit
    "silu": lambda alpha, limit: (1.0, 0.0, UNLIMITED),
    "silu_clamped": lambda alpha, limit: (1.0, 0.0, limit),
    "swiglu_oai": lambda alpha, limit: (alpha, 1.0, limit),
}
INTERLEAVED = 1  # MoE's swiglu_fusion
UNGATED = ("silu", "relu")
INSTEAD = "use the profile portable, or ort-cuda on a GPU"


def lower_to_contrib(model: onnx.ModelProto, provider: str) -> onnx.ModelProto:
    """A copy of `model` with a MoE for every DsMoE, for one execution provider by its name in ONNX Runtime.

    Weights stay where they are, external data too. Raises: TargetError with the node, the reason and the way out.
    """
    import onnx

    if provider not in TYPES:
        raise TargetError(f"{CONTRIB}.MoE is known to be right on {' and '.join(TYPES)} only, not on {provider}")
    meanings = {node.output[0]: attributes for node, attributes, _ in check_nodes(model)}
    lowered = onnx.ModelProto()
    lowered.CopyFrom(model)
    graph = lowered.graph
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        ours = (node.domain, node.op_type) == (DOMAIN, OP_TYPE)
        nodes.extend(_Lowering(node, meanings.pop(node.output[0]), graph, provider).nodes() if ours else [node])
    if meanings:
        raise TargetError(
            f"the {OP_TYPE} that gives {next(iter(meanings))!r} is inside another node's graph or a function"
        )
    replaced = onnx.GraphProto(node=nodes)
    graph.ClearField("node")
    graph.node.extend(replaced.node)
    functions = [made for made in lowered.functions if made.domain != DOMAIN]
    lowered.ClearField("functions")
    lowered.functions.extend(functions)
    imports = [entry for entry in lowered.opset_import if entry.domain not in (DOMAIN, CONTRIB)]
    lowered.ClearField("opset_import")
    lowered.opset_import.extend([*imports, onnx.helper.make_opsetid(CONTRIB, 1)])
    return lowered


class _Lowering:
    """One node: what MoE cannot say of it is refused when this is made, `nodes` gives what replaces it."""

    def __init__(self, node: onnx.NodeProto, attributes: Attributes, graph: onnx.GraphProto, provider: str) -> None:
        self.node, self.attributes, self.provider = node, attributes, provider
        self.made: list[onnx.NodeProto] = []
        producers = {output: producer for producer in graph.node for output in producer.output}
        tensors = {tensor.name: tensor for tensor in graph.initializer}
        _, self.experts, _, gate_up, down = node.input[:5]
        for name in node.input[3:]:
            if name and name not in tensors:
                self.refuse(f"its weight {name!r} is computed in the graph; it must be an initializer")
        self.dtype = tensors[gate_up].data_type
        self.shape = list(tensors[gate_up].dims)
        self.top_k = self._top_k(producers, tensors)
        self._check(tensors[down].dims)

    def refuse(self, reason: str) -> None:
        raise TargetError(f"{label(self.node)} cannot be a {CONTRIB}.MoE on {self.provider}: {reason}; {INSTEAD}")

    def _check(self, down: Sequence[int]) -> None:
        activation, _, _, layout = self.attributes
        kinds = TYPES[self.provider]
        if self.dtype not in kinds:
            known = {name: number for number, name in TYPES[CUDA].items()}
            mine = next((name for name, number in known.items() if number == self.dtype), f"type {self.dtype}")
            self.refuse(
                f"its weights are {mine}, and there it is right in {', '.join(kinds.values())} only"
                + (" (before onnxruntime 1.32 float16 gives zeros)" if self.dtype == FLOAT16 else "")
            )
        if layout.endswith("_transposed"):
            self.refuse(f"layout {layout!r} has the rows of each weight as columns, and MoE does not")
        if has_gate(layout) and activation not in GATED:
            self.refuse(f"activation {activation!r} behind a gate; it has {', '.join(GATED)}")
        if not has_gate(layout) and activation not in UNGATED:
            self.refuse(f"activation {activation!r} without a gate; it has {', '.join(UNGATED)}")
        if self.provider == CUDA and self.dtype != FLOAT and any(size % 8 or size < 16 for size in down[1:]):
            self.refuse(f"down is {list(down)}; H and I must be multiples of 8, and 16 at least")

    def _top_k(self, producers: dict[str, onnx.NodeProto], tensors: dict[str, onnx.TensorProto]) -> int:
        """K, if the experts of a token are distinct and in [0, E): those that a TopK over E scores gives."""
        from onnx import helper, numpy_helper

        name = self.experts
        while name in producers and producers[name].op_type in ("Identity", "Cast"):
            name = producers[name].input[0]
        source = producers.get(name)
        if (
            source is None
            or source.op_type != "TopK"
            or source.domain not in ("", "ai.onnx")
            or source.output[1] != name
        ):
            self.refuse("its experts are not what a TopK gives, so one may come twice in a token or be a skipped slot")
        assert source is not None
        count = source.input[1]
        if count in tensors:
            return int(numpy_helper.to_array(tensors[count]).reshape(()))
        constant = producers.get(count)
        values = [] if constant is None else [helper.get_attribute_value(a) for a in constant.attribute]
        if constant is None or constant.op_type != "Constant" or len(values) != 1:
            self.refuse("how many experts a token has is not a constant")
        value = numpy_helper.to_array(values[0]) if hasattr(values[0], "dims") else np.array(values[0])
        return int(value.reshape(()))

    def nodes(self) -> list[onnx.NodeProto]:
        """What computes the same output."""
        x, experts, weights, gate_up, down, up_bias, down_bias = [*self.node.input, "", ""][:7]
        emit, number, ints = self._emit, self._number, self._ints
        one_1 = ints(1)
        # Rows of log(w / max w): dividing keeps them accurate where they are cast. Without any weight all is -inf.
        largest = emit("ReduceMax", weights, one_1, keepdims=1)
        ratio = emit("Div", weights, emit("Max", largest, number(float(np.finfo(np.float32).tiny))))
        tokens_1 = emit("Shape", x, start=0, end=1)
        rows_shape = emit("Concat", tokens_1, ints(self.shape[0]), axis=0)
        row = emit("ScatterElements", emit("Expand", number(-np.inf), rows_shape), experts, emit("Log", ratio), axis=1)
        row = row if self.dtype == FLOAT else emit("Cast", row, to=self.dtype)
        said: dict[str, Any] = {"k": self.top_k, "normalize_routing_weights": 0}
        activation, alpha, limit, layout = self.attributes
        if has_gate(layout):
            alpha, beta, limit = GATED[activation](alpha, limit)
            said |= {"activation_type": "swiglu", "swiglu_fusion": INTERLEAVED, "swiglu_limit": limit}
            said |= {"activation_alpha": alpha, "activation_beta": beta}
            if layout == "concat":
                gate_up = self._interleaved(gate_up, self.shape)
                up_bias = self._interleaved(up_bias, self.shape[:2]) if up_bias else ""
        else:
            said["activation_type"] = activation
        moe = emit("MoE", x, row, gate_up, up_bias, down, down_bias, domain=CONTRIB, **said)
        if self.provider == CPU:  # reads x after the MoE: see above
            always = emit("Constant", value=self._tensor(np.array(True)))
            moe = emit("Where", always, moe, x)
        total = emit("ReduceSum", weights, one_1, keepdims=1)
        if self.dtype == FLOAT:
            emit("Mul", moe, total, into=self.node.output[0])
        else:
            wide = emit("Mul", emit("Cast", moe, to=FLOAT), total)
            emit("Cast", wide, to=self.dtype, into=self.node.output[0])
        return self.made

    def _interleaved(self, weight: str, shape: Sequence[int]) -> str:
        """Rows g0, u0, g1, u1, ... of rows g0, g1, ..., u0, u1, ...: folded into a copy when a session starts."""
        experts, rows, *rest = shape
        split = self._emit("Reshape", weight, self._ints(experts, 2, rows // 2, *rest))
        swapped = self._emit("Transpose", split, perm=[0, 2, 1, 3][: len(shape) + 1])
        return self._emit("Reshape", swapped, self._ints(*shape))

    def _emit(self, op_type: str, *inputs: str, into: str | None = None, domain: str = "", **attributes: Any) -> str:
        from onnx import helper

        output = into or f"{self.node.output[0]}/{CONTRIB}/{len(self.made)}"
        while domain and inputs[-1] == "":
            inputs = inputs[:-1]
        name = f"{self.node.name or OP_TYPE}/{op_type}_{len(self.made)}"
        self.made.append(helper.make_node(op_type, inputs, [output], name=name, domain=domain, **attributes))
        return output

    def _number(self, value: float) -> str:
        return self._emit("Constant", value=self._tensor(np.array(value, np.float32)))

    def _ints(self, *values: int) -> str:
        return self._emit("Constant", value=self._tensor(np.array(values, np.int64)))

    def _tensor(self, value: np.ndarray) -> onnx.TensorProto:
        from onnx import numpy_helper

        return numpy_helper.from_array(value)
