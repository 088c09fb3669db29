"""decode.onnx against the reference model's own step: its two ops, which only GPUs run, have bodies of this test's."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from dsmoe_compiler.config import CompileConfig
from dsmoe_compiler.loading import Loaded
from dsmoe_compiler.targets.onnx.phase import Step
from dsmoe_model.transformer import Transformer
from dsmoe_passes import pipeline
from dsmoe_passes.join_linears import join_linears
from dsmoe_passes.pack_weights import pack_weights
from dsmoe_runtime.agreement import OTHER_KERNELS, within_budget
from dsmoe_runtime.errors import ArtifactError
from tests.compiler.onnx_examples import GATES
from tests.compiler.stand_in import model_of

ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")
from dsmoe_compiler.targets.onnx.decode_ops import check_decode_nodes  # noqa: E402
from dsmoe_compiler.targets.onnx.decode_step import NoDecodeStep, decode_step  # noqa: E402
from dsmoe_compiler.targets.onnx.export import finished, translate  # noqa: E402
from dsmoe_compiler.targets.onnx.external import move_out  # noqa: E402
from dsmoe_compiler.targets.onnx.fewer_kernels import fewer_kernels  # noqa: E402
from dsmoe_compiler.targets.onnx.grouped_attention import group_attention  # noqa: E402
from dsmoe_compiler.targets.onnx.opening import DECODE, MODEL, check_model  # noqa: E402
from dsmoe_compiler.targets.onnx.profiles import lowered  # noqa: E402
from dsmoe_compiler.targets.onnx.source import ReferenceSource, layers_of  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
POSITIONS, SLOTS = 40, 24
PLACES = (0, 1, 7, 16, SLOTS - 1)
HEADS, GROUPS, WIDTH = 4, 2, 16  # of stand_in's models
GARBAGE = 1e4  # in slots that hold no token yet
FORMS: dict[str, dict[str, Any]] = {
    "dense, then experts": {},
    "every head its own": {"num_key_value_heads": 4, "num_hidden_layers": 2},
    "queries, keys and values apart": {"num_hidden_layers": 2},
    "routing in standard operators": {"num_hidden_layers": 2} | GATES["v3"],
}
ATTENTION = """<domain: "dsmoe", opset_import: ["": 23]>
DsDecodeAttention <num_heads, kv_num_heads, scale> (qkv, cos, sin, position, past_key, past_value)
    => (y, present_key, present_value) {
    by_head = Constant <value_ints = [1, -1, %(width)d]> ()
    sizes = Constant <value_ints = [%(heads)d, %(groups)d, %(groups)d]> ()
    all = Reshape (qkv, by_head)
    q, k, v = Split <axis = 1> (all, sizes)
    cos_now = Gather <axis = 0> (cos, position)
    sin_now = Gather <axis = 0> (sin, position)
    turned = Concat <axis = 1> (q, k)
    x1, x2 = Split <axis = 2, num_outputs = 2> (turned)
    a = Mul (x1, cos_now)
    b = Mul (x2, sin_now)
    c = Mul (x2, cos_now)
    d = Mul (x1, sin_now)
    first = Sub (a, b)
    second = Add (c, d)
    whole = Concat <axis = 2> (first, second)
    heads = Constant <value_ints = [%(heads)d, %(groups)d]> ()
    query, key = Split <axis = 1> (whole, heads)
    slots = Shape <start = 2, end = 3> (past_key)
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    end = Squeeze (slots)
    numbers = Range (zero, end, one)
    here = Equal (numbers, position)
    ahead = Greater (numbers, position)
    last = Constant <value_ints = [1]> ()
    here_column = Unsqueeze (here, last)
    as_cache = Constant <value_ints = [1, %(groups)d, 1, %(width)d]> ()
    key_row = Reshape (key, as_cache)
    value_row = Reshape (v, as_cache)
    present_key = Where (here_column, key_row, past_key)
    present_value = Where (here_column, value_row, past_value)
    by_group = Constant <value_ints = [1, %(groups)d, -1, %(width)d]> ()
    grouped = Reshape (query, by_group)
    keys = Transpose <perm = [0, 1, 3, 2]> (present_key)
    products = MatMul (grouped, keys)
    factor = Constant <value_float: float = @scale> ()
    scores = Mul (products, factor)
    least = Constant <value_float = -1e30> ()
    seen = Where (ahead, least, scores)
    weights = Softmax <axis = -1> (seen)
    answer = MatMul (weights, present_value)
    flat = Constant <value_ints = [1, 1, -1]> ()
    y = Reshape (answer, flat)
}"""
GEMV = """<domain: "dsmoe", opset_import: ["": 23]>
DsGemv (x, weight) => (y) {
    turned = Transpose <perm = [1, 0]> (weight)
    y = MatMul (x, turned)
}"""


class Written(NamedTuple):
    folder: Path
    model: Transformer
    proto: Any


def written(folder: Path, form: str) -> Written:
    """model.onnx as `dsmoe compile` writes it for profile ort-cuda, without the library and its kernels."""
    config = CompileConfig(formats=("onnx",), target="cuda", profile="ort-cuda", verify=False)
    model = model_of(torch.float32, **FORMS[form])
    assert (model.config.num_attention_heads, model.config.head_dim) == (HEADS, WIDTH)
    source = ReferenceSource(Loaded(model, model.config, None, "a model", ()), config, lambda _: None)
    layers = layers_of(source.graph, source.explanation())
    pipeline.run(source.graph, passes=() if "apart" in form else (join_linears, pack_weights))
    whole = "standard" not in form
    translated = translate(source.graph, source.inputs, source.free, what="a model", native=True, layers=whole)
    move_out(translated, folder, progress=lambda _: None)
    proto = finished(translated, layers)
    assert group_attention(proto, POSITIONS) == []
    fewer_kernels(proto)
    proto, _, _ = lowered(proto, layers, config)
    (folder / MODEL).write_bytes(proto.SerializeToString())
    return Written(folder, model, proto)


@pytest.fixture(scope="module", params=FORMS)
def case(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Written:
    return written(tmp_path_factory.mktemp("onnx"), request.param)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return written(tmp_path_factory.mktemp("onnx"), "queries, keys and values apart")


def runnable(proto: Any, groups: int) -> Any:
    """With bodies for the ops that a CPU does not have."""
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    sizes = {"heads": HEADS, "groups": groups, "width": WIDTH}
    made.functions.extend(onnx.parser.parse_function(text) for text in (GEMV, ATTENTION % sizes))
    return made


def disagreements(case: Written, proto: Any) -> list[str]:
    """Runs `proto` for several places in the cache: which outputs are further from float64 than eager may be."""
    groups = case.model.config.num_key_value_heads
    path = case.folder / "runnable.onnx"
    path.write_bytes(runnable(proto, groups).SerializeToString())
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    outputs = [value.name for value in session.get_outputs()]
    exact_model = copy.deepcopy(case.model).double()
    judged: dict[str, list[list[torch.Tensor]]] = {}
    wrong: list[str] = []
    for place in PLACES:
        generator = torch.Generator().manual_seed(place)
        ids = torch.randint(3, 90, (1, 1), generator=generator)
        caches = [v for v in session.get_inputs() if v.name.startswith("past")]
        past = [torch.randn(value.shape, generator=generator) for value in caches]
        for tensor in past:
            tensor[:, :, place:] = GARBAGE
        given = {"input_ids": ids.numpy(), "position": torch.tensor([place]).numpy()}
        given |= {value.name: tensor.numpy() for value, tensor in zip(caches, past, strict=True)}
        found = {name: torch.from_numpy(t) for name, t in zip(outputs, session.run(outputs, given), strict=True)}
        with torch.no_grad():
            before = [tensor[:, :, :place] for tensor in past]
            logits, experts, present = Step(case.model)(ids, before)
            exact_logits, _, exact_present = Step(exact_model)(ids, [tensor.double() for tensor in before])
        wrong += [] if torch.equal(found["experts"], experts) else [f"experts at {place}"]
        judged.setdefault("logits", []).append([found["logits"], logits, exact_logits])
        for value, old, eager, exact in zip(caches, past, present, exact_present, strict=True):
            new = found[value.name.replace("past_key_values", "present")]
            kept = torch.arange(SLOTS) != place
            wrong += [] if torch.equal(new[:, :, kept], old[:, :, kept]) else [f"other slots than {place}"]
            sides = [new[0, :, place], eager[0, :, place], exact[0, :, place]]
            judged.setdefault(value.name.split(".")[-1], []).append(sides)
    for name, rows in judged.items():
        actual, eager, exact = (torch.cat(side) for side in zip(*rows, strict=True))
        verdict = within_budget(actual, eager=eager, exact=exact, **OTHER_KERNELS._asdict())
        wrong += [] if verdict.ok else [f"{name}: {verdict}"]
    return wrong


def sizes(values: Any) -> dict[str, list[int]]:
    return {v.name: [dim.dim_value for dim in v.type.tensor_type.shape.dim] for v in values}


def test_a_step_answers_what_the_model_does(case: Written) -> None:
    before = case.proto.SerializeToString()
    proto = decode_step(case.proto, SLOTS)
    assert case.proto.SerializeToString() == before
    assert disagreements(case, proto) == []


def test_every_size_is_known(case: Written) -> None:
    proto = decode_step(case.proto, SLOTS)
    (case.folder / DECODE).write_bytes(proto.SerializeToString())
    onnx.checker.check_model(case.folder / DECODE)
    check_model(case.folder, check_weights=True)
    config, given, result = case.model.config, sizes(proto.graph.input), sizes(proto.graph.output)
    cache = [1, config.num_key_value_heads, SLOTS, WIDTH]
    assert list(given)[:2] == ["input_ids", "position"]
    assert [given["input_ids"], given["position"]] == [[1, 1], [1]]
    assert list(result) == [value.name for value in case.proto.graph.output]
    assert all(given[f"past_key_values.{n}.key"] == cache for n in range(config.num_hidden_layers))
    assert all(result[f"present.{n}.value"] == cache for n in range(config.num_hidden_layers))
    assert result["logits"] == [1, config.vocab_size]
    for value in proto.graph.output:  # found again from the inputs and our schemas
        value.type.tensor_type.ClearField("shape")
    assert sizes(onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph.output) == result
    kinds = Counter(node.op_type for node in proto.graph.node)
    assert not kinds.keys() & {"Shape", "Range", "Gemm", "MatMul", "GroupQueryAttention", "Expand"}
    assert kinds["DsDecodeAttention"] == config.num_hidden_layers
    assert not any(name.startswith("lengths/") for node in proto.graph.node for name in node.output)


def test_weights_stay_where_they_are(case: Written) -> None:
    held = {tensor.name: tensor for tensor in case.proto.graph.initializer}
    outside = [tensor for tensor in decode_step(case.proto, SLOTS).graph.initializer if tensor.external_data]
    assert outside
    assert all(tensor == held[tensor.name] for tensor in outside)


@pytest.mark.parametrize("case", ["dense, then experts"], indirect=True)
def test_few_nodes_are_left(case: Written) -> None:
    kinds = Counter(node.op_type for node in decode_step(case.proto, SLOTS).graph.node)
    assert kinds == {
        "Gather": 1, "RMSNormalization": 1, "SkipSimplifiedLayerNormalization": 8, "DsDecodeAttention": 4,
        "DsGemv": 2 * 4 + 3 + 1, "Sigmoid": 1, "Mul": 2, "DsMoELayer": 3, "Reshape": 10, "Concat": 1,
    }  # fmt: skip


@pytest.mark.parametrize("fault", ["sines for cosines", "gate for up", "no scale", "another token's angle"])
def test_a_wrong_step_is_noticed(small: Written, fault: str) -> None:
    proto = decode_step(small.proto, SLOTS)
    node = {node.op_type: node for node in proto.graph.node}
    attention = node["DsDecodeAttention"]
    if fault == "sines for cosines":
        attention.input[1], attention.input[2] = attention.input[2], attention.input[1]
    elif fault == "gate for up":
        gate, up = (n for n in proto.graph.node if "gate_proj" in n.input[-1] or "up_proj" in n.input[-1])
        gate.input[1], up.input[1] = up.input[1], gate.input[1]
    elif fault == "no scale":
        (scale,) = (a for a in attention.attribute if a.name == "scale")
        scale.f = 1.0
    else:
        proto.graph.initializer.add(name="first", data_type=7, dims=[1], int64_data=[1])
        attention.input[3] = "first"
    assert disagreements(small, proto)


def test_a_bias_is_added(small: Written) -> None:
    """To the first product, of queries, and to the last, the logits; held against model.onnx with the same biases."""
    changed = onnx.ModelProto()
    changed.CopyFrom(small.proto)
    products = [node for node in changed.graph.node if node.op_type == "Gemm"]
    for node, width in ((products[0], HEADS * WIDTH), (products[-1], 97)):
        bias = torch.randn(width, generator=torch.Generator().manual_seed(1)).numpy()
        changed.graph.initializer.append(onnx.numpy_helper.from_array(bias, f"bias/{width}"))
        node.input.append(f"bias/{width}")
    proto = decode_step(changed, SLOTS)
    assert [node.op_type for node in proto.graph.node].count("Add") == 2
    logits, generator = [], torch.Generator().manual_seed(1)
    cache = [torch.randn(1, GROUPS, SLOTS, WIDTH, generator=generator).numpy() for _ in range(4)]
    for model, slots in ((changed, 5), (runnable(proto, GROUPS), SLOTS)):
        path = small.folder / "biased.onnx"
        path.write_bytes(model.SerializeToString())
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        given = {"input_ids": torch.tensor([[7]]).numpy(), "position": torch.tensor([5]).numpy()}
        names = [value.name for value in session.get_inputs()]
        given |= dict(zip((name for name in names if name.startswith("past")), cache, strict=True))
        given = {name: given[name][:, :, :slots] if name.startswith("past") else given[name] for name in names}
        logits += session.run(["logits"], given)
    assert logits[0].std() > 0.1
    torch.testing.assert_close(*map(torch.from_numpy, logits), rtol=1e-5, atol=1e-5)


def test_a_model_of_another_attention_is_refused(small: Written) -> None:
    changed = onnx.ModelProto()
    changed.CopyFrom(small.proto)
    node = next(node for node in changed.graph.node if node.op_type == "GroupQueryAttention")
    node.attribute.append(onnx.helper.make_attribute("local_window_size", 8))
    with pytest.raises(NoDecodeStep, match="other inputs or attributes"):
        decode_step(changed, SLOTS)
    node.op_type, node.domain = "Attention", ""
    with pytest.raises(NoDecodeStep, match="1 of its attentions are in standard operators, 1 are not"):
        decode_step(changed, SLOTS)


def test_more_slots_than_positions_are_refused(small: Written) -> None:
    decode_step(small.proto, POSITIONS)
    with pytest.raises(NoDecodeStep, match="41 slots, and angles of 40 positions"):
        decode_step(small.proto, POSITIONS + 1)


def test_what_depends_on_the_length_of_the_cache_is_refused(small: Written) -> None:
    """How many slots there are is not how many tokens came before."""
    changed, made = onnx.ModelProto(), onnx.helper.make_node
    changed.CopyFrom(small.proto)
    (logits,) = (node for node in changed.graph.node if node.output[0] == "logits")
    logits.output[0] = "almost"
    changed.graph.node.extend(
        [
            made("Shape", ["past_key_values.0.key"], ["length"], start=2, end=3),
            made("Cast", ["length"], ["real"], to=1),
            made("Add", ["almost", "real"], ["logits"]),
        ]
    )
    with pytest.raises(NoDecodeStep, match=r"past_key_values\.0\.key is read or made by Shape, too"):
        decode_step(changed, SLOTS)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("unknown", "attribute 'softcap' is unknown"),
        ("missing", "attribute 'scale' is missing"),
        ("type", "attribute 'num_heads' is 4.0; it must be a int"),
        ("heads", "it has 3 query heads for 2"),
        ("input", r"its inputs .* are not qkv, cos, sin, position, past_key, past_value"),
        ("gemv", r"DsGemv .*: its inputs .* are not x, weight"),
        ("weight", "its weight is no matrix of the file"),
    ],
)
def test_nodes_of_another_meaning_are_refused(small: Written, change: str, reason: str) -> None:
    proto = decode_step(small.proto, SLOTS)
    check_decode_nodes(proto)
    node = {node.op_type: node for node in proto.graph.node}
    attributes = node["DsDecodeAttention"].attribute
    at = {attribute.name: place for place, attribute in enumerate(attributes)}
    if change == "unknown":
        attributes.append(onnx.helper.make_attribute("softcap", 1.0))
    elif change == "missing":
        del attributes[at["scale"]]
    elif change in ("type", "heads"):
        wrong = onnx.helper.make_attribute("num_heads", 4.0 if change == "type" else 3)
        attributes[at["num_heads"]].CopyFrom(wrong)
    elif change == "input":
        del node["DsDecodeAttention"].input[5]
    elif change == "gemv":
        node["DsGemv"].input.append("input_ids")
    else:
        node["DsGemv"].input[1] = node["DsGemv"].input[0]
    with pytest.raises(ArtifactError, match=reason):
        check_decode_nodes(proto)
    (small.folder / DECODE).write_bytes(proto.SerializeToString())
    with pytest.raises(ArtifactError, match=reason):
        check_model(small.folder, check_weights=False)
