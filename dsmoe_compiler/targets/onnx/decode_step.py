"""model.onnx of profile ort-cuda as a step of one token of one sequence, with a cache of fixed slots.

    GroupQueryAttention(qkv, past, lengths)  ->  DsDecodeAttention(qkv, position, past), which writes into its cache
    Gemm(x [1, K], w), MatMul(x, w^T)        ->  DsGemv(x, w)
    Add(a, b), RMSNormalization              ->  SkipSimplifiedLayerNormalization, also where only views lie between

Every size is known (`fixed_sizes`), so that one CUDA graph serves every step. The weights stay where they are: both
files refer to them.

C slots, P positions, G key and value heads, A query heads, D head width.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from dsmoe_compiler.targets.onnx.decode_ops import ATTENTION, GEMV, register_decode_ops
from dsmoe_compiler.targets.onnx.fewer_kernels import skip_norm
from dsmoe_compiler.targets.onnx.fixed_sizes import OneToken, of_one, sizes_of
from dsmoe_compiler.targets.onnx.layer import register_layer
from dsmoe_compiler.targets.onnx.op import DOMAIN, VERSION, register_schema
from dsmoe_compiler.targets.onnx.rewriting import CONTRIB, replace_nodes

if TYPE_CHECKING:
    import onnx

GROUPED = (CONTRIB, "GroupQueryAttention")
FLOATS, INT64 = (1, 10, 16), 7  # onnx.TensorProto's numbers
POSITION = "position"


class NoDecodeStep(Exception):
    """Why a model has no step of this kind."""


def decode_step(proto: onnx.ModelProto, slots: int) -> onnx.ModelProto:
    """The step of `proto`, a finished model.onnx, for one token and a cache of `slots`; `proto` stays as it is.

    input_ids [1, 1], position int64 [1], past_key_values.N.key [1, G, C, D], ... -> logits [1, V], present.N.key as
    past, ..., experts [L, 1, K]. Raises: NoDecodeStep.
    """
    import onnx

    for register in (register_schema, register_layer, register_decode_ops):
        register()
    kinds = Counter((node.domain, node.op_type) for node in proto.graph.node)
    if kinds["", "Attention"] or not kinds[GROUPED]:
        left = kinds["", "Attention"] or "all"
        raise NoDecodeStep(f"{left} of its attentions are in standard operators, {kinds[GROUPED]} are not")
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    Rewriting(made, slots).run()
    return made


class Rewriting(OneToken):
    """A model on its way to a step of one token."""

    def __init__(self, proto: onnx.ModelProto, slots: int) -> None:
        super().__init__(proto)
        self.slots = slots
        self.makers = {name: node for node in self.graph.node for name in node.output}
        self.past = {value.name for value in self.graph.input[1:]}
        self.cache = self.past | {name for name in self.outputs if name.startswith("present.")}

    def run(self) -> None:
        """Raises: NoDecodeStep."""
        from onnx import helper

        for node in list(self.graph.node):
            self.take(node)
        replace_nodes(self.graph, self.nodes)
        self.check()
        made = [name for node in self.graph.node for name in node.output if name and name not in self.outputs]
        self.graph.ClearField("value_info")
        self.graph.value_info.extend(helper.make_value_info(name, self.types[name]) for name in made)
        for value in (*self.graph.input, *self.graph.output):
            value.type.CopyFrom(of_one(value.type))
            if value.name in self.cache:
                value.type.tensor_type.shape.dim[2].dim_value = self.slots
        token, *past = self.graph.input
        self.graph.ClearField("input")
        self.graph.input.extend([token, helper.make_tensor_value_info(POSITION, INT64, [1]), *past])
        if all(entry.domain != DOMAIN for entry in self.proto.opset_import):
            self.proto.opset_import.append(helper.make_opsetid(DOMAIN, VERSION))

    def check(self) -> None:
        """Every size is known, and nothing but attention reads a cache. Raises: NoDecodeStep."""
        for node in self.graph.node:
            if node.op_type == ATTENTION:
                continue
            if cached := self.cache & {*node.input, *node.output}:
                raise NoDecodeStep(f"{min(cached)} is read or made by {node.op_type}, too")
            if free := [name for name in node.output if name and self.shape(name) is None]:
                raise NoDecodeStep(f"{free[0]}, made by {node.op_type}, has sizes that are not known for one token")
        for value in self.graph.output:
            if value.name not in self.cache and self.shape(value.name) != sizes_of(of_one(value.type)):
                raise NoDecodeStep(f"{value.name} is {self.shape(value.name)} for one token")

    def take(self, node: onnx.NodeProto) -> None:
        """One node of the model into what stands for it. Raises: NoDecodeStep."""
        if (node.domain, node.op_type) == GROUPED:
            self.attention(node)
            return
        self.infer(node)
        if self.folded(node):
            return
        y = node.output[0]
        if source := self.source(node):
            root = self.views.get(source, source)
            if y in self.outputs:
                self.reshape(root, y)
            else:
                self.views[y] = root
        elif weight := self.weight_of(node):
            self.product(node, weight)
        elif self.is_row_norm(node):
            self.norm(node)
        else:
            for at, name in enumerate(node.input):
                node.input[at] = self.read(name)
            self.nodes.append(node)

    def weight_of(self, node: onnx.NodeProto) -> str:
        """The weight `[N, K]` of the file that `node` multiplies a row by; empty if it does something else."""
        if node.domain or node.op_type not in ("Gemm", "MatMul"):
            return ""
        name, turn = node.input[1], self.makers.get(node.input[1])
        if node.op_type == "Gemm":
            said = {"alpha": 1.0, "beta": 1.0} | {a.name: a.f or a.i for a in node.attribute}
            turned = bool(said.get("transB")) and not said.get("transA") and said["alpha"] == said["beta"] == 1
        else:
            turned = turn is not None and turn.op_type == "Transpose" and turn.input[0] in self.weights
            name = turn.input[0] if turn is not None and turned else name
        x, weight = self.shape(node.input[0]), self.weights.get(name)
        if not turned or not x or math.prod(x[:-1]) != 1 or weight is None or len(weight.dims) != 2:
            return ""
        turned = weight.data_type in FLOATS and x[-1] == weight.dims[1]  # a Transpose may leave it as it is
        return str(name) if turned else ""

    def product(self, node: onnx.NodeProto, weight: str) -> None:
        """A row by a weight, and a Gemm's bias."""
        (x, y), bias = (node.input[0], node.output[0]), [*node.input, ""][2]
        result = f"{y}/product" if bias else y
        self.types[result] = self.types[y]
        self.row(GEMV, x, weight, result, name=f"{y}/{GEMV}", domain=DOMAIN)
        if bias:
            self.row("Add", result, bias, y)

    def is_row_norm(self, node: onnx.NodeProto) -> bool:
        """Whether `node` is the norm of a row."""
        x, axes = self.shape(node.input[0]) if node.input else None, [a.i for a in node.attribute if a.name == "axis"]
        norm = (node.domain, node.op_type) == ("", "RMSNormalization")
        return bool(norm and x and math.prod(x[:-1]) == 1 and axes in ([], [-1], [len(x) - 1]))

    def norm(self, node: onnx.NodeProto) -> None:
        """The norm of a row, in one kernel with the sum of two activations that it may be of."""
        options = {a.name: a.f if a.name == "epsilon" else a.i for a in node.attribute} | {"axis": -1}
        self.row("RMSNormalization", node.input[0], node.input[1], node.output[0], **options)
        made = self.nodes[-1]
        for at, node in enumerate(self.nodes):
            if (node.domain, node.op_type) != ("", "Add") or node.output[0] != made.input[0]:
                continue
            one, other = (self.shape(name) for name in node.input)
            if one and one == other and len(one) in (2, 3) and made.input[1] in self.weights and "epsilon" in options:
                self.nodes[at] = skip_norm(made, node)
                self.nodes.pop()
            return

    def attention(self, node: onnx.NodeProto) -> None:
        """DsDecodeAttention in the place of GroupQueryAttention. Raises: NoDecodeStep."""
        from onnx import helper

        said = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        heads, groups, rotated = said.pop("num_heads"), said.pop("kv_num_heads"), said.pop("do_rotary", 0)
        scale, name = said.pop("scale", 0.0), node.output[0]
        query, key, value, *past = node.input[:5]
        tables, others = node.input[7:9], node.input[9:]
        if rotated != 1 or any(said.values()) or any(others) or not self.past.issuperset(past):
            raise NoDecodeStep(f"{name}: it has other inputs or attributes than {ATTENTION} knows")
        table = self.shape(tables[0])
        assert table is not None
        if self.slots > table[0]:
            raise NoDecodeStep(f"a cache of {self.slots} slots, and angles of {table[0]} positions")
        if key:
            parts = [self.read(part) for part in (query, key, value)]
            query = f"{name}/qkv"
            self.emit("Concat", parts, [query], axis=-1)
            self.infer(self.nodes[-1])
        width = self.types[past[0]].tensor_type.shape.dim[3].dim_value
        options = {"num_heads": heads, "kv_num_heads": groups, "scale": float(scale or width**-0.5)}
        inputs = [self.read(query), *tables, POSITION, *past]
        self.emit(ATTENTION, inputs, list(node.output), name=f"{name}/{ATTENTION}", domain=DOMAIN, **options)
        self.types[POSITION] = helper.make_tensor_type_proto(INT64, [1])
        self.infer(self.nodes[-1])
