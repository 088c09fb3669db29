"""Attention over a cache as ONNX Runtime's own `com.microsoft.GroupQueryAttention`, which a GPU runs as FlashAttention.

    Transpose, RotaryEmbedding          of queries and keys
    Concat(past, new)                   keys and values              ->   GroupQueryAttention(q, k, v, past, cos, sin)
    Attention(q, k, v, mask), Transpose

The standard operator on CUDA (ONNX Runtime 1.31) writes a score for every pair of positions. Whether a mask is the
causal one, and an angle that of a position, is not read off the graph but tried: the part of the graph that makes it is
run for several sizes. What is not so (a sliding window, widths of keys and values that differ, positions left out)
stays in standard operators.

B sequences, S new tokens, P past ones, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dsmoe_compiler.targets.onnx.rewriting import CONTRIB, import_contrib, replace_nodes

if TYPE_CHECKING:
    import onnx

HEADS_FIRST = [0, 2, 1, 3]
ROWS = ["batch", "sequence"]  # the first sizes of a step's activations
SIZES = ((2, 3, 5), (1, 1, 4), (1, 4, 0), (2, 7, 2))  # B, S, P that masks and angles are tried for
LARGEST_HEAD = 256
HIDDEN = -1e4  # what is added to a score at most, where a token is not seen
FLOAT, INT32, INT64, BOOL = 1, 6, 7, 9  # onnx.TensorProto's numbers


def group_attention(proto: onnx.ModelProto, positions: int) -> list[str]:
    """Rewrite `proto`, a step, in place; what is left in standard operators, and why.

    `positions`: how far angles are tabled; ONNX Runtime refuses a cache that is longer.
    """
    graph = Graph(proto)
    left = []
    for node in [n for n in proto.graph.node if (n.domain, n.op_type) == ("", "Attention")]:
        try:
            graph.replace(node, positions)
        except Unlike as reason:
            left.append(f"{node.name or node.output[0]}: {reason}")
    if graph.instead:
        graph.finish()
    return left


class Unlike(Exception):
    """Why an attention is not what GroupQueryAttention computes."""


class Graph:
    """A step's graph with what is found and made once for all layers."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.proto = proto
        self.makers = {name: node for node in proto.graph.node for name in node.output}
        values = [*proto.graph.value_info, *proto.graph.input, *proto.graph.output]
        self.shapes = {value.name: dims(value) for value in values}
        self.kinds = {value.name: value.type.tensor_type.elem_type for value in values}
        self.outputs = {value.name for value in proto.graph.output}
        self.tables: dict[str, str] = {}
        self.causal: dict[str, bool] = {}
        self.instead: dict[str, list[Any]] = {}  # nodes for one, by what it gives
        self.lengths: list[Any] = []  # nodes that compute them
        self.gone: set[str] = set()  # given by other nodes now

    def replace(self, node: onnx.NodeProto, positions: int) -> None:
        """One attention. Raises: Unlike, and then nothing is changed."""
        from onnx import helper

        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if len(node.input) != 4 or len(node.output) != 1 or attributes.get("is_causal") or attributes.get("softcap"):
            raise Unlike("it has other inputs, outputs or attributes than q, k, v and a mask")
        query, cos, sin = self.rotated(node.input[0])
        (past_key, new_key), (past_value, new_value) = (self.grown(name) for name in node.input[1:3])
        key, *angles = self.rotated(new_key)
        if angles != [cos, sin]:
            raise Unlike("queries and keys are turned by different angles")
        value = self.heads_last(new_value)
        (_, groups, _, width), (_, value_groups, _, value_width) = self.shapes[past_key], self.shapes[past_value]
        heads = self.shapes.get(query, [None] * 4)[2]
        if (groups, width) != (value_groups, value_width) or width % 8 or width > LARGEST_HEAD:
            raise Unlike(f"its keys are {groups} x {width} wide and its values {value_groups} x {value_width}")
        if not isinstance(heads, int) or heads % groups:
            raise Unlike(f"it has {heads} query heads for {groups}")
        if not self.is_causal(node.input[3], positions):
            raise Unlike("its mask is not the causal one")
        tables = [self.table(name, positions, width) for name in (cos, sin)]
        self.add(node, [query, key, value], [past_key, past_value], tables, (heads, groups, width), attributes)

    def rotated(self, name: str) -> tuple[str, str, str]:
        """What RotaryEmbedding turned into `name`, with heads last, and its cosines and sines."""
        node = self.maker(name, "RotaryEmbedding")
        if len(node.input) != 3 or any(
            a.name in ("interleaved", "rotary_embedding_dim") and a.i for a in node.attribute
        ):
            raise Unlike("its heads are turned in pairs, in part, or by given positions")
        return self.heads_last(node.input[0]), node.input[1], node.input[2]

    def heads_last(self, name: str) -> str:
        """`[B, S, heads, D]` of a value `[B, heads, S, D]`."""
        node = self.maker(name, "Transpose")
        if list(node.attribute[0].ints) != HEADS_FIRST:
            raise Unlike(f"its heads are laid out as {list(node.attribute[0].ints)}")
        return node.input[0]

    def grown(self, name: str) -> tuple[str, str]:
        """The past and the new part of keys or values that a model gives back."""
        node = self.maker(name, "Concat")
        if name not in self.outputs or len(node.input) != 2 or node.attribute[0].i not in (2, -2):
            raise Unlike("its keys or values are not a past one and a new one")
        past, new = node.input
        if past in self.makers or len(self.shapes.get(past, ())) != 4:
            raise Unlike("its past is no input of the model")
        return past, new

    def maker(self, name: str, op_type: str) -> onnx.NodeProto:
        node = self.makers.get(name)
        if node is None or (node.domain, node.op_type) != ("", op_type):
            raise Unlike(f"{name} is made by {node.op_type if node else 'nothing'}, not by {op_type}")
        return node

    def is_causal(self, mask: str, positions: int) -> bool:
        """Whether a mask lets every new token see those before it and itself, near and far."""
        if mask not in self.causal:
            self.causal[mask] = True
            yes_or_no = self.kinds.get(mask) == BOOL
            tried = [*SIZES, (1, 2, positions - 2)]
            for (_, new, past), found in zip(tried, self.run(mask, tried), strict=True):
                wanted = np.arange(past + new)[None, :] <= np.arange(past, past + new)[:, None]
                allowed, hidden = (found == 1, found == 0) if yes_or_no else (found == 0, found < HIDDEN)
                if found.shape[-2:] != wanted.shape or not ((allowed == wanted) & (hidden == ~wanted)).all():
                    self.causal[mask] = False
        return self.causal[mask]

    def table(self, name: str, positions: int, width: int) -> str:
        """An initializer `[positions, D / 2]` with the cosines or sines that `name` holds for new positions."""
        from onnx import helper

        if name not in self.tables:
            whole, *tried = self.run(name, [(1, positions, 0), *SIZES])
            if whole.shape[-2:] != (positions, width // 2):
                raise Unlike(f"its angles are {list(whole.shape)} for {positions} positions of width {width}")
            whole = whole.reshape(-1, positions, width // 2)[0]
            for (_, new, past), found in zip(SIZES, tried, strict=True):
                if not (found == whole[past : past + new]).all():
                    raise Unlike("an angle depends on more than its position")
            kind = self.proto.graph.input[1].type.tensor_type.elem_type  # of keys
            made = helper.make_tensor(f"{name}/table", kind, whole.shape, whole.astype(np.float32).ravel())
            self.proto.graph.initializer.append(made)
            self.tables[name] = made.name
        return self.tables[name]

    def run(self, name: str, sizes: Sequence[tuple[int, int, int]]) -> list[Any]:
        """A value that depends on sizes alone, for each of some. Raises: Unlike if it depends on more."""
        import onnx
        from onnx import helper
        from onnx.reference import ReferenceEvaluator

        wanted, nodes = {name}, []
        for node in reversed(self.proto.graph.node):
            if wanted & set(node.output):
                nodes.append(node)
                wanted |= set(node.input)
        past = [v for v in self.proto.graph.input[1:] if v.name in wanted]
        for node in nodes:
            if node.domain or (node.op_type != "Shape" and set(node.input) & {value.name for value in past}):
                raise Unlike(f"{name} depends on {node.op_type}")
        part = onnx.ModelProto(ir_version=self.proto.ir_version, opset_import=self.proto.opset_import)
        part.graph.name = "part"
        part.graph.node.extend(reversed(nodes))
        part.graph.node.append(helper.make_node("Cast", [name], ["float"], to=FLOAT))
        part.graph.initializer.extend(t for t in self.proto.graph.initializer if t.name in wanted)
        part.graph.input.append(self.proto.graph.input[0])
        part.graph.input.extend(helper.make_tensor_value_info(v.name, FLOAT, dims(v)) for v in past)
        part.graph.output.append(helper.make_tensor_value_info("float", FLOAT, None))
        if any(t.data_location == t.EXTERNAL for t in part.graph.initializer):
            raise Unlike(f"{name} depends on weights")
        try:
            evaluator: Any = ReferenceEvaluator(part)
            return [evaluator.run(None, self.zeros(past, *each))[0] for each in sizes]
        except Exception as error:  # whatever an operator that is given other sizes than it was made for raises
            raise Unlike(f"{name} cannot be computed from sizes: {str(error)[:100]}") from None

    def zeros(self, past: list[Any], batch: int, new: int, before: int) -> dict[str, Any]:
        """A step's inputs of these sizes."""
        given: dict[str, Any] = {"input_ids": np.zeros((batch, new), np.int64)}
        return given | {v.name: np.zeros([batch, dims(v)[1], before, dims(v)[3]], np.float32) for v in past}

    def add(
        self, node: Any, given: list[str], past: list[str], tables: list[str], sizes: tuple[int, int, int],
        attributes: dict[str, Any],
    ) -> None:  # fmt: skip
        """GroupQueryAttention in the place of `node`; keys and values that it gives take the names of the old ones."""
        from onnx import helper

        heads, groups, width = sizes
        name, present = node.output[0], list(node.input[1:3])
        options: dict[str, Any] = {"num_heads": heads, "kv_num_heads": groups, "do_rotary": 1}
        options |= {"scale": attributes["scale"]} if attributes.get("scale") else {}
        answer, joint = f"{name}/answer", self.joint(given)
        flat = [joint, "", ""] if joint else [f"{name}/{side}" for side in ("query", "key", "value")]
        self.instead[name] = [
            *(self.reshape(x, y, [0, 0, -1]) for x, y in zip(given, flat, strict=True) if not joint),
            helper.make_node(
                "GroupQueryAttention", [*flat, *past, *self.totals(past[0]), *tables], [answer, *present],
                name=f"{name}/GroupQueryAttention", domain=CONTRIB, **options,
            ),
            self.reshape(answer, f"{name}/heads_last", [0, 0, heads, width]),
            helper.make_node("Transpose", [f"{name}/heads_last"], [name], perm=HEADS_FIRST),
        ]  # fmt: skip
        self.gone |= set(present)

    def joint(self, given: list[str]) -> str:
        """The one tensor of which queries, keys and values are parts in this order; empty if there is none."""
        parts = [self.makers.get(name) for name in given]
        sources = [part.input[0] for part in parts if part is not None and part.op_type == "Reshape"]
        split = self.makers.get(sources[0]) if sources else None
        if split is None or split.op_type != "Split" or list(split.output) != sources:
            return ""
        return split.input[0] if self.shapes.get(split.input[0], [])[:2] == ROWS else ""

    def reshape(self, value: str, name: str, sizes: list[int]) -> onnx.NodeProto:
        """A node that reshapes; 0 is a size that stays."""
        from onnx import helper

        shape = f"shape/{'x'.join(map(str, sizes))}"
        if all(tensor.name != shape for tensor in self.proto.graph.initializer):
            self.proto.graph.initializer.append(helper.make_tensor(shape, INT64, [len(sizes)], sizes))
        return helper.make_node("Reshape", [value, shape], [name])

    def totals(self, past: str) -> tuple[str, str]:
        """`P + S - 1` of each sequence, int32 `[B]`, and `P + S`, which stays on the CPU."""
        from onnx import helper

        if not self.lengths:
            made = helper.make_node
            one, scalar = "lengths/one", "lengths/scalar"
            self.proto.graph.initializer.extend(
                [helper.make_tensor(one, INT64, [], [1]), helper.make_tensor(scalar, INT64, [0], [])]
            )
            self.lengths = [
                made("Shape", ["input_ids"], ["lengths/batch"], start=0, end=1),
                made("Shape", ["input_ids"], ["lengths/new"], start=1, end=2),
                made("Shape", [past], ["lengths/past"], start=2, end=3),
                made("Add", ["lengths/new", "lengths/past"], ["lengths/both"]),
                made("Reshape", ["lengths/both", scalar], ["lengths/end"]),
                made("Cast", ["lengths/end"], ["lengths/total"], to=INT32),
                made("Sub", ["lengths/end", one], ["lengths/last"]),
                made("Range", ["lengths/last", "lengths/end", one], ["lengths/of_one"]),  # moves it to the GPU
                made("Cast", ["lengths/of_one"], ["lengths/narrow"], to=INT32),
                made("Expand", ["lengths/narrow", "lengths/batch"], ["lengths/of_each"]),
            ]
        return "lengths/of_each", "lengths/total"

    def finish(self) -> None:
        """The new nodes in the places of the old ones, without what nothing reads."""
        graph = self.proto.graph
        kept = [node for node in graph.node if not self.gone & set(node.output)]
        nodes = [*self.lengths, *(new for node in kept for new in self.instead.get(node.output[0], [node]))]
        replace_nodes(graph, nodes)
        import_contrib(self.proto)


def dims(value: onnx.ValueInfoProto) -> list[Any]:
    """Sizes, or names of free ones."""
    return [dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim]
