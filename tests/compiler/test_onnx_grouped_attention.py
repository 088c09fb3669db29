"""Attention as ONNX Runtime's own operator: the same answers, and left alone where it is not the causal one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from dsmoe_compiler.targets.onnx.phase import Step
from dsmoe_runtime.agreement import OTHER_KERNELS, within_budget

ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")
from dsmoe_compiler.targets.onnx.grouped_attention import group_attention  # noqa: E402
from tests.compiler.onnx_examples import exported, gate_model  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
POSITIONS = 40
SIZES = [(1, 5, 0), (2, 5, 0), (2, 1, 7), (1, 4, 3), (1, 1, 38)]  # B, S, P


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(gate_model("v1"), max_seq_len=POSITIONS).save(tmp_path_factory.mktemp("onnx") / "out")


def load(folder: Path) -> Any:
    return onnx.load(folder / "model.onnx", load_external_data=False)


def step(model: Any, ids: Any, past: list[Any], dtype: torch.dtype) -> list[Any]:
    """Logits, chosen experts, and keys and values, by the reference model."""
    with torch.no_grad():
        logits, experts, present = Step(model)(ids, [tensor.to(dtype) for tensor in past])
    return [logits, experts, *present]


def test_a_model_for_cuda_answers_what_the_model_does(tmp_path: Path) -> None:
    """Written for a GPU, in operators that ONNX Runtime has for a CPU too."""
    options: dict[str, Any] = {"target": "cuda", "verify": False, "max_seq_len": POSITIONS}
    folder = exported(gate_model("v1"), **options).save(tmp_path / "out")
    proto = load(folder)
    onnx.checker.check_model(folder / "model.onnx")
    outputs = [value.name for value in proto.graph.output]
    kinds = Counter(node.op_type for node in proto.graph.node)
    assert kinds["GroupQueryAttention"] == 2
    assert kinds["Split"] == 1  # of the shared experts; not of queries, keys and values
    assert kinds["SkipSimplifiedLayerNormalization"] == 3
    assert kinds["Gemm"] == 2 * 2 + 3 + 3 + 1  # attention, a dense MLP, a gate with shared experts, the vocabulary
    assert not {"Attention", "RotaryEmbedding", "Cos", "LessOrEqual", "MatMul"} & set(kinds)
    session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    model, exact_model = gate_model("v1"), gate_model("v1").double()
    judged: dict[str, list[list[torch.Tensor]]] = {}
    for batch, new, before in SIZES:
        generator = torch.Generator().manual_seed(batch + 10 * new + 100 * before)
        ids = torch.randint(3, 90, (batch, new), generator=generator)
        sizes = [(batch, value.shape[1], before, value.shape[3]) for value in session.get_inputs()[1:]]
        past = [torch.randn(size, generator=generator) for size in sizes]
        given = dict(zip((v.name for v in session.get_inputs()), (t.numpy() for t in (ids, *past)), strict=True))
        found = dict(zip(outputs, session.run(outputs, given), strict=True))
        names = ["logits", "experts", *(name for name in outputs if name.startswith("present"))]
        eager, exact = step(model, ids, past, torch.float32), step(exact_model, ids, past, torch.float64)
        for name, one, other in zip(names, eager, exact, strict=True):
            if name == "experts":
                assert torch.equal(torch.from_numpy(found[name]), one)
                continue
            rows = [t.reshape(-1, t.shape[-1]) for t in (torch.from_numpy(found[name]), one, other)]
            judged.setdefault(name, []).append(rows)
    for rows in judged.values():
        actual, eager_rows, exact_rows = (torch.cat(each) for each in zip(*rows, strict=True))
        verdict = within_budget(actual, eager=eager_rows, exact=exact_rows, **OTHER_KERNELS._asdict())
        assert verdict.ok, str(verdict)


def edited(folder: Path, change: str) -> Any:
    """The model with another meaning."""
    proto = load(folder)
    node = {n.op_type: n for n in proto.graph.node}
    if change == "every token sees all":
        node["LessOrEqual"].op_type = "GreaterOrEqual"
    elif change == "a window":
        mask = node["LessOrEqual"]
        near = [
            onnx.helper.make_node("Sub", [mask.input[1], mask.input[0]], ["distance"]),
            onnx.helper.make_node("Constant", [], ["window"], value_int=30),
            onnx.helper.make_node("Less", ["distance", "window"], ["near"]),
            onnx.helper.make_node("And", ["near", "all"], [mask.output[0]]),
        ]
        mask.output[0] = "all"
        at = [n.op_type for n in proto.graph.node].index("LessOrEqual")
        nodes = [*proto.graph.node[: at + 1], *near, *proto.graph.node[at + 1 :]]
        kept = onnx.GraphProto(node=nodes)
        proto.graph.ClearField("node")
        proto.graph.node.extend(kept.node)
    elif change == "angles by length":
        node["Cos"].input[0], node["Sin"].input[0] = (f"{node[kind].input[0]}/scaled" for kind in ("Cos", "Sin"))
        made = onnx.helper.make_node
        length = [made("Shape", ["past_key_values.0.key"], ["length"], start=2, end=3)]
        length += [made("Cast", ["length"], ["real"], to=1), made("Exp", ["real"], ["grown"])]
        length += [made("Mul", ["cat", "grown"], ["cat/scaled"])]
        at = [n.op_type for n in proto.graph.node].index("Cos")
        kept = onnx.GraphProto(node=[*proto.graph.node[:at], *length, *proto.graph.node[at:]])
        proto.graph.ClearField("node")
        proto.graph.node.extend(kept.node)
    elif change == "pairs":
        node["RotaryEmbedding"].attribute.append(onnx.helper.make_attribute("interleaved", 1))
    return proto


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("every token sees all", "mask is not the causal one"),
        ("a window", "mask is not the causal one"),
        ("angles by length", "depends on more than its position"),
        ("pairs", "turned in pairs"),
    ],
)
def test_another_attention_is_left_alone(folder: Path, change: str, reason: str) -> None:
    proto = edited(folder, change)
    before = [node.op_type for node in proto.graph.node]
    left = group_attention(proto, POSITIONS)
    assert left
    assert reason in left[-1]
    if len(left) == 2:
        assert [node.op_type for node in proto.graph.node] == before
