"""The values of an ONNX graph for one token: which are known, which are views of others, and nodes that read them.

Sizes become numbers, and integers that follow from sizes are computed here. What moves no number (Reshape, Transpose of
sizes of 1, Gather of the only one) is a view: whoever reads it reads what it views, through a Reshape only where it
must see that shape.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from dsmoe_compiler.targets.onnx.export import INLINE
from dsmoe_compiler.targets.onnx.op import DOMAIN, VERSION
from dsmoe_compiler.targets.onnx.rewriting import CONTRIB

if TYPE_CHECKING:
    import onnx

SKIP_NORM = (CONTRIB, "SkipSimplifiedLayerNormalization")
VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity")
INTEGERS = (6, 7, 9)  # onnx.TensorProto's numbers of int32, int64 and bool


class OneToken:
    """What is known of a model's values when its inputs are one token, and the new nodes; `proto` gets constants.

    weights: initializers by name. types: of values, with sizes where they are known. known: integers as arrays. views:
    the value whose numbers a value has in another shape. nodes: what is written in the place of the model's.
    """

    def __init__(self, proto: onnx.ModelProto) -> None:
        from onnx import helper, numpy_helper

        self.proto, self.graph = proto, proto.graph
        self.weights = {tensor.name: tensor for tensor in self.graph.initializer}
        self.outputs = {value.name for value in self.graph.output}
        self.said = {value.name: of_one(value.type) for value in (*self.graph.value_info, *self.graph.input)}
        self.types = {value.name: self.said[value.name] for value in self.graph.input}  # a cache's length stays free
        self.types |= {t.name: helper.make_tensor_type_proto(t.data_type, t.dims) for t in self.weights.values()}
        small = [t for t in self.weights.values() if not t.external_data and t.data_type in INTEGERS]
        self.known = {t.name: numpy_helper.to_array(t) for t in small if t.ByteSize() <= INLINE}
        self.views: dict[str, str] = {}
        self.nodes: list[Any] = []
        self.there = set(self.weights)  # constants and reshaped values that exist

    def shape(self, name: str) -> list[int] | None:
        """Sizes of a value; None where one of them is not known."""
        return sizes_of(self.types[name]) if name in self.types else None

    def infer(self, node: onnx.NodeProto) -> None:
        """Types of what `node` gives: by its schema, or as the model says."""
        from onnx import defs, numpy_helper, shape_inference

        found: dict[str, Any] = {}
        given = {name: self.types[name] for name in node.input if name in self.types}
        if len(given) != len({*node.input} - {""}):
            pass
        elif (node.domain, node.op_type) == SKIP_NORM:  # onnx knows none of ONNX Runtime's own
            found = dict.fromkeys(node.output, given[node.input[0]])
        elif defs.has(node.op_type, node.domain):
            versions = {entry.domain: entry.version for entry in self.proto.opset_import} | {DOMAIN: VERSION}
            schema = defs.get_schema(node.op_type, versions[node.domain], node.domain)
            data = {name: numpy_helper.from_array(self.known[name]) for name in given if name in self.known}
            imports = list(self.proto.opset_import)
            with suppress(shape_inference.InferenceError):  # then they stay unknown, which matters if they are read
                found = shape_inference.infer_node_outputs(schema, node, given, data, opset_imports=imports)
        for name in filter(None, node.output):
            kind = found.get(name) or self.said.get(name)
            if kind is not None:
                self.types[name] = kind

    def folded(self, node: onnx.NodeProto) -> bool:
        """Whether what `node` gives is known now: sizes, and integers that are computed from them.

        How long a cache is says nothing of how many tokens it holds: that size is never known.
        """
        from onnx import helper, numpy_helper
        from onnx.reference import ReferenceEvaluator

        y, given = node.output[0], {name for name in node.input if name}
        if node.domain or y in self.outputs or len(node.output) != 1 or y not in self.types:
            return False
        if node.op_type == "Shape" and node.input[0] in self.types:
            said = {a.name: a.i for a in node.attribute}
            dims = self.types[node.input[0]].tensor_type.shape.dim
            dims = list(dims)[said.get("start", 0) : said.get("end", len(dims))]
            if not all(dim.HasField("dim_value") for dim in dims):
                return False
            self.known[y] = np.array([dim.dim_value for dim in dims], np.int64)
        elif given <= self.known.keys() and self.types[y].tensor_type.elem_type in INTEGERS:
            constants = [numpy_helper.from_array(self.known[name], name) for name in given]
            result = helper.make_value_info(y, self.types[y])
            part = helper.make_graph([node], "part", [], [result], constants)
            evaluator: Any = ReferenceEvaluator(helper.make_model(part, opset_imports=self.proto.opset_import))
            self.known[y] = np.asarray(evaluator.run(None, {})[0])
        else:
            return False
        self.types[y] = helper.make_tensor_type_proto(self.types[y].tensor_type.elem_type, self.known[y].shape)
        return True

    def source(self, node: onnx.NodeProto) -> str:
        """The value that `node` gives in another shape and nothing else; empty if it does more."""
        given, y = self.shape([*node.input, ""][0]), self.shape(node.output[0])
        if node.domain or given is None or y is None or node.input[0] in self.weights:
            return ""
        same, said = node.op_type in VIEWS, {a.name: a for a in node.attribute}
        if node.op_type == "Transpose":
            order = said["perm"].ints if "perm" in said else range(len(given))[::-1]
            moved = [at for at in order if given[at] != 1]
            same = moved == sorted(moved)
        elif node.op_type == "Gather":
            axis = said["axis"].i if "axis" in said else 0
            same = given[axis] == 1 and self.shape(node.input[1]) in ([], [1]) and node.input[1] in self.known
        elif node.op_type in ("Slice", "Expand"):
            steps = self.known.get(node.input[4]) if len(node.input) > 4 else np.ones(1)
            same = given == y and steps is not None and bool((steps > 0).all())
        return str(node.input[0]) if same else ""

    def read(self, name: str) -> str:
        """A name by which a value can be read that has its shape."""
        from onnx import numpy_helper

        root = self.views.get(name, name)
        if root != name and self.shape(root) == self.shape(name):
            return root
        if name not in self.there:
            if name in self.known:
                self.graph.initializer.append(numpy_helper.from_array(self.known[name], name))
            elif root != name:
                self.reshape(root, name)
            self.there.add(name)
        return name

    def reshape(self, value: str, name: str) -> None:
        """A node that gives `name`, of a shape that is known, from `value`."""
        sizes = self.shape(name)
        assert sizes is not None
        constant = f"shape/of/{'x'.join(map(str, sizes))}"
        self.known[constant] = np.array(sizes, np.int64)
        self.emit("Reshape", [value, self.read(constant)], [name])

    def emit(self, op_type: str, inputs: list[str], outputs: list[str], **options: Any) -> None:
        from onnx import helper

        self.nodes.append(helper.make_node(op_type, inputs, outputs, **options))

    def row(self, op_type: str, x: str, weight: str, y: str, **options: Any) -> None:
        """An operator on a row, in whatever shape that is at hand: `y` is a view of the answer then."""
        from onnx import helper

        root, name = self.views.get(x, x), y
        there, wanted, sizes = self.shape(root), self.shape(x), self.shape(y)
        assert there
        assert wanted
        assert sizes
        if y in self.outputs or there[-1] != wanted[-1]:
            root = self.read(x)  # an output in its own shape: nothing has to be copied into it
        elif there != wanted:
            name = f"{y}/row"
            kind = self.types[y].tensor_type.elem_type
            self.types[name] = helper.make_tensor_type_proto(kind, [*there[:-1], sizes[-1]])
            self.views[y] = name
        self.emit(op_type, [root, self.read(weight)], [name], **options)


def of_one(kind: onnx.TypeProto) -> onnx.TypeProto:
    """A type with sizes for one token; a cache's stay free."""
    import onnx

    made = onnx.TypeProto()
    made.CopyFrom(kind)
    for dim in made.tensor_type.shape.dim:
        if dim.dim_param in ("batch", "sequence", "batch*sequence"):
            dim.dim_value = 1
    return made


def sizes_of(kind: onnx.TypeProto) -> list[int] | None:
    """A type's sizes if all of them are known."""
    dims = kind.tensor_type.shape.dim
    known = kind.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dims)
    return [dim.dim_value for dim in dims] if known else None
