"""The CUDA operators of the library where there is no GPU: they register, and nothing else asks for a driver."""

from __future__ import annotations

import subprocess

import pytest
import torch

from dsmoe_runtime.errors import TargetError
from tests.runtime import ort_cases
from tests.runtime.op_cases import expert_case

ATTRIBUTES = {"activation": "silu", "alpha": 1.0, "limit": 0.0, "layout": "concat"}

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def library():
    from dsmoe_runtime.ort_library.build import library

    try:
        return library()
    except TargetError as error:
        pytest.skip(str(error))


def test_they_register_without_cuda(library, tmp_path):
    """With an entry for a folder that is not there, with another, and with none: the CPU's kernel runs."""
    case = expert_case(7)
    made = ort_cases.model(case, ATTRIBUTES)
    wanted = torch.ops.dsmoe.experts(**case, **ATTRIBUTES)
    for kernels in (tmp_path / "nowhere", None, tmp_path, tmp_path / "nowhere"):
        y = ort_cases.run(ort_cases.session(made, library, kernels=kernels), case)
        assert torch.allclose(y, wanted, rtol=1e-4, atol=1e-5)


def layer_with_a_body() -> bytes:
    """A DsMoELayer node whose function's body gives x back, and as experts the shape of the router's weight."""
    from onnx import helper

    sizes = {"x": (3, 8), "router_weight": (4, 8), "gate_up": (4, 8, 8), "down": (4, 8, 4)}
    nodes = [helper.make_node("Identity", ["x"], ["y"]), helper.make_node("Shape", ["router_weight"], ["chosen"])]
    standard, own = helper.make_opsetid("", 23), helper.make_opsetid("dsmoe", 1)
    body = helper.make_function("dsmoe", "DsMoELayer", [*sizes], ["y", "chosen"], nodes, [standard], ["top_k"])
    node = helper.make_node("DsMoELayer", [*sizes], ["y", "chosen"], domain="dsmoe", top_k=2)
    inputs = [helper.make_tensor_value_info(name, 1, shape) for name, shape in sizes.items()]
    outputs = [helper.make_tensor_value_info("y", 1, None), helper.make_tensor_value_info("chosen", 7, None)]
    graph = helper.make_graph([node], "one layer", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[standard, own], ir_version=10, functions=[body])
    return model.SerializeToString()


def test_a_layer_runs_by_its_body_where_there_are_no_kernels(library, tmp_path):
    """ONNX Runtime refuses a node that is registered for another provider alone, body or not: it is not registered."""
    given = {
        name: torch.ones(size).numpy()
        for name, size in {"x": (3, 8), "router_weight": (4, 8), "gate_up": (4, 8, 8), "down": (4, 8, 4)}.items()
    }
    made = layer_with_a_body()
    for _ in range(2):  # a folder that comes later is seen
        (tmp_path / "programs.txt").unlink(missing_ok=True)
        for kernels in (None, tmp_path / "nowhere", tmp_path, ""):
            y, chosen = ort_cases.session(made, library, kernels=kernels).run(None, given)
            assert (y.tolist(), chosen.tolist()) == (given["x"].tolist(), [4, 8])
        (tmp_path / "programs.txt").write_text("")
        with pytest.raises(Exception, match="DsMoELayer"):
            ort_cases.session(made, library, kernels=tmp_path)
        y, _ = ort_cases.session(made, library, kernels="").run(None, given)


def test_the_library_needs_no_driver(library):
    """libcuda is looked for when a node is made, not when the library is loaded."""
    needed = subprocess.run(["ldd", str(library)], capture_output=True, text=True, check=True).stdout
    assert "libcuda" not in needed
    assert "libcudart" not in needed
