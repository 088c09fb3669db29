"""A model to ONNX and back: what the file holds, and that it computes the model at every shape."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import dsmoe_compiler as dsmoe
from dsmoe_model.attention import KVCache
from dsmoe_runtime.agreement import OTHER_KERNELS, assert_within_budget
from dsmoe_runtime.errors import InputError

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("onnx")
import onnx

from tests.compiler.onnx_examples import GATES, exported, gate_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
CHEAP = {("v1", torch.float32), ("v3", torch.float16)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(gate_model("v3"), max_seq_len=100).save(tmp_path_factory.mktemp("onnx") / "out")


@pytest.fixture(scope="module")
def runner(folder: Path) -> Any:
    return dsmoe.load(folder, threads=1)


@pytest.fixture(scope="module")
def proto(folder: Path) -> Any:
    return onnx.load(folder / "model.onnx", load_external_data=False)


def test_every_layer_is_one_node_and_the_rest_are_opset_23s(folder: Path, proto: Any) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["onnx"]["nodes"] == {"layers.1.mlp": "layers.1.mlp/DsMoE"}
    assert [layer["operator"] for layer in manifest["layers"]] == ["dsmoe::moe"]
    operators = Counter(node.op_type for node in proto.graph.node)
    assert operators["DsMoE"] == 1
    assert operators["Attention"] == 2
    assert operators["RMSNormalization"] == 5
    assert operators["RotaryEmbedding"] == 4
    assert operators["Expand"] == 2  # tables of the rotation for all rows, and no copies of heads
    assert {entry.domain: entry.version for entry in proto.opset_import} == {"": 23, "dsmoe": 1}


def test_inputs_and_outputs_are_named_for_people(proto: Any) -> None:
    def described(values: Any) -> dict[str, list[Any]]:
        return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}

    past, present = (["batch", 2, length, 16] for length in ("past", "past + sequence"))
    names = [f"{layer}.{side}" for layer in (0, 1) for side in ("key", "value")]
    assert described(proto.graph.input) == {
        "input_ids": ["batch", "sequence"],
        **{f"past_key_values.{name}": past for name in names},
    }
    outputs = described(proto.graph.output)
    assert list(outputs) == ["logits", *(f"present.{name}" for name in names), "experts"]
    assert outputs["logits"] == ["batch", 97]
    assert all(outputs[f"present.{name}"] == present for name in names)
    assert outputs["experts"][::2] == [1, 3]


def test_weights_are_outside_and_there_once(folder: Path, proto: Any) -> None:
    shards = list((folder / "weights").iterdir())
    outside = {i.name: {e.key: e.value for e in i.external_data} for i in proto.graph.initializer if i.data_location}
    assert {said["location"] for said in outside.values()} == {f"weights/{s.name}" for s in shards}
    spans = [(int(said["offset"]), int(said["length"])) for said in outside.values()]
    assert len(set(spans)) == len(spans)
    parameters = sum(p.nbytes for p in gate_model("v3").parameters() if p.nbytes > 1024)
    assert sum(length for _, length in spans) == parameters
    assert all(len(i.raw_data) <= 1024 for i in proto.graph.initializer)


def test_nothing_of_the_machine_is_in_the_file(folder: Path) -> None:
    text = (folder / "model.onnx").read_bytes()
    assert b".py" not in text
    assert str(Path.home()).encode() not in text
    assert b"torch" not in text


def test_prefill_parts_and_single_tokens_agree_with_the_model(runner: Any) -> None:
    model = gate_model("v3")
    ids = torch.randint(97, (4, 23), generator=torch.Generator().manual_seed(5))
    cache = runner.new_cache()
    rows = [runner.prefill(ids[:, :1], cache)[0], runner.extend(ids[:, 1:10], cache)[0]]
    rows += [runner.decode(ids[:, at : at + 1], at, cache)[0] for at in range(10, 23)]
    whole, filled = runner.new_cache(), {}
    rows.append(runner.prefill(ids, whole)[0])
    with torch.no_grad():
        for dtype in (torch.float32, torch.float64):
            eager = model.to(dtype)
            slots = KVCache.zeros(model.config, 4, 23, dtype)
            logits = eager(ids, slots).logits_BSV
            filled[dtype] = torch.stack([logits[:, at] for at in (0, *range(9, 23), 22)]), slots
    exact, eager_rows = filled[torch.float64][0], filled[torch.float32][0]
    allowed = {"factor": OTHER_KERNELS.factor}
    assert_within_budget(torch.stack(rows), eager=eager_rows, exact=exact, **allowed)
    for side in ("key", "value"):
        for layer in (0, 1):
            for held in (cache, whole):
                true, rounded = (getattr(filled[d][1], side)[layer] for d in (torch.float64, torch.float32))
                ours = getattr(held, side)[layer]
                assert ours.shape == true.shape
                assert_within_budget(ours, eager=rounded, exact=true, **allowed)


def test_generated_tokens_are_the_models(runner: Any) -> None:
    from dsmoe_model.generation import generate

    ids = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    expected = generate(gate_model("v3"), ids, max_new_tokens=20, temperature=0.0)
    assert torch.equal(runner.generate(ids, max_new_tokens=20), expected)


def test_what_does_not_fit_is_refused(runner: Any) -> None:
    ids, cache = torch.tensor([[3, 1, 4]]), runner.new_cache()
    with pytest.raises(InputError, match="the prompt is empty"):
        runner.prefill(ids[:, :0], cache)
    with pytest.raises(InputError, match=r"ids span \[3, 97\], vocab_size = 97"):
        runner.prefill(torch.tensor([[3, 97]]), cache)
    with pytest.raises(InputError, match="no rows"):
        runner.prefill(ids[:0], cache)
    with pytest.raises(InputError, match="101 tokens exceed the 100"):
        runner.prefill(torch.zeros(1, 101, dtype=torch.int64), cache)
    runner.prefill(ids, cache)
    with pytest.raises(InputError, match="position is 7, but the cache holds 3"):
        runner.decode(ids[:, :1], 7, cache)
    with pytest.raises(InputError, match=r"this call wants \[2, 2, 3, 16\]"):
        runner.decode(torch.tensor([[1], [2]]), 3, cache)
    cache.value[1] = cache.value[1].half()
    with pytest.raises(InputError, match=r"torch\.float16"):
        runner.decode(ids[:, :1], 3, cache)


@pytest.mark.parametrize(
    ("gate", "dtype"),
    [
        pytest.param(gate, dtype, marks=() if (gate, dtype) in CHEAP else pytest.mark.slow, id=f"{gate}-{dtype}")
        for gate in GATES
        for dtype in (torch.float32, torch.float16)
    ],
)
def test_every_gate_is_exported_and_proved(gate: str, dtype: torch.dtype) -> None:
    artifact = exported(gate_model(gate, dtype))
    names = [check["name"] for check in artifact.manifest["verification"]["checks"]]
    for place in ("1 thread, 1 row", "2 threads, 3 rows"):
        for check in ("keys and values", "logits", "routing", "greedy tokens", "repeat"):
            assert f"{check} ({place})" in names
    assert len(artifact.manifest["onnx"]["nodes"]) == {"dense": 0, "switch": 2}.get(gate, 1)


@pytest.mark.slow
def test_the_program_in_the_documentation_runs_as_it_is_printed(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    dsmoe.export_onnx("deepseek-moe-tiny", tmp_path / "out" / "tiny", progress=lambda _: None)
    page = (Path(__file__).parents[2] / "docs" / "onnx.md").read_text()
    program = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert program is not None
    assert len(program[1].splitlines()) <= 20
    monkeypatch.chdir(tmp_path)
    exec(program[1], {})
    tokens = json.loads(capsys.readouterr().out)
    runner = dsmoe.load("out/tiny")
    assert tokens == runner.generate(torch.tensor([tokens[:17]]), max_new_tokens=32)[0].tolist()
