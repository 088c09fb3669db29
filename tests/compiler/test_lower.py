"""dsmoe:: operators become launches of their kernels in the graph that AOTInductor gets; no GPU is needed to see it."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

import dsmoe_runtime.ops  # noqa: F401  registers the operators
from dsmoe_compiler.capture import kernel_of
from dsmoe_compiler.targets.lower import Kept, analysed, check_lowered, operator_name, positional, values
from dsmoe_runtime.errors import TargetError
from dsmoe_runtime.ops import cuda

pytest.importorskip("triton")
LONG = 6000  # tokens whose slots are sorted in two launches
GATE = (2, "softmax", 1, 1, "max", True, 0.0, 1.0)


@pytest.fixture(scope="module")
def traced() -> Any:
    """case "NAME:TOKENS:DTYPE" -> what the lowered and traced graph holds; all cases share one process."""
    cases = [
        *("toy:96:bfloat16", "toy:1:float32", "toy:96:float64"),
        *("cut:96:bfloat16", "cut:1:bfloat16"),
        *(f"{name}:{tokens}:bfloat16" for name in ("route", "experts", "moe") for tokens in (1, 96, LONG)),
        *("attend:1:bfloat16", "gemv:1:bfloat16"),
    ]
    clean = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.compiler.lowering_example", *cases],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=clean | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("tokens", [1, 96])
def test_a_call_becomes_its_kernels(traced: Any, tokens: int) -> None:
    """The stand-in's one kernel instead of the operator; shapes and dtypes are the operator's."""
    result = traced[f"toy:{tokens}:{'float32' if tokens == 1 else 'bfloat16'}"]
    assert result["before"] == ["dsmoe.route.default"]
    assert (result["operators"], result["kernels"], result["kept"]) == ([], ["fill"], [])
    assert result["functional"], "a kernel that writes its inputs could be reordered"
    size = result["tokens"]
    assert result["outputs"] == [[[str(size), "2"], "torch.float32"], [[str(size), "2"], "torch.int64"]]


def test_the_number_of_tokens_stays_free(traced: Any) -> None:
    """A grid that was fixed while tracing would leave the tokens of longer prompts out."""
    result = traced["toy:96:bfloat16"]
    assert isinstance(result["tokens"], str)
    assert result["range"] == "VR[2, int_oo]"
    assert result["grids"] == ["[(floordiv, 1, 1)]"]
    assert traced["toy:1:float32"]["grids"] == ["[(1, 1, 1)]"]


def test_a_kernel_that_is_cut_for_the_traced_size_is_refused(traced: Any) -> None:
    """The stand-in with a constant that follows from the number of tokens; other prompts would overrun it."""
    assert "TargetError: cut: a kernel is cut for Eq(" in traced["cut:96:bfloat16"]["error"]
    assert traced["cut:1:bfloat16"]["kernels"] == ["fill"]


def test_what_the_kernels_refuse_stays_a_call_with_its_reason(traced: Any) -> None:
    result = traced["toy:96:float64"]
    assert result["kept"] == [["dsmoe::route", "float64 has no kernels"]]
    assert (result["operators"], result["kernels"]) == (["dsmoe.route.default"], [])


OUTPUTS = {"route": 2, "experts": 1, "moe": 2, "attend": 1, "gemv": 1}


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("attend", 1), ("gemv", 1), *((n, t) for n in ("route", "experts", "moe") for t in (1, 96, LONG))],
)
def test_our_kernels_can_be_recorded(traced: Any, name: str, tokens: int) -> None:
    """For one token and for a free number: no look at values, no address, no size fixed on the way."""
    result = traced[f"{name}:{tokens}:bfloat16"]
    assert "error" not in result, result["error"]
    assert result["kernels"]
    assert (result["operators"], result["kept"], result["functional"]) == ([], [], True)
    written = {argument for launch in result["written"] for argument in launch}
    assert not any("gate_up" in argument or "weight" in argument for argument in written - {"weights_ptr"}), written
    assert len(result["outputs"]) == OUTPUTS[name], "more outputs are inputs that a kernel seems to write: copies"
    if tokens > 1:
        assert isinstance(result["tokens"], str), "tracing fixed the number of tokens"
        assert result["range"] == "VR[2, int_oo]", "Inductor would optimise for the branches that were taken"


def route_node(dtype: torch.dtype, experts: int = 8) -> fx.Node:
    """A call of dsmoe::route on a GPU, with its last argument by name."""
    graph = fx.Graph()
    with FakeTensorMode():
        logits = torch.empty(4, experts, dtype=dtype, device="cuda")
        value = torch.empty(4, 2, device="cuda"), torch.empty(4, 2, dtype=torch.int64, device="cuda")
    place = graph.placeholder("logits")
    place.meta["val"] = logits
    node = graph.call_function(torch.ops.dsmoe.route.default, (place, None, *GATE[:-1]), {"scale": GATE[-1]})
    node.meta["val"] = value
    return node


def test_arguments_are_in_the_order_of_the_schema() -> None:
    node = route_node(torch.bfloat16)
    assert operator_name(node) == "route"
    assert positional(node)[1:] == (None, *GATE)
    assert values(node)[0] is node.args[0].meta["val"]  # type: ignore[union-attr]


def test_explain_says_what_runs_on_a_gpu_and_why_not_the_kernels() -> None:
    assert kernel_of(route_node(torch.bfloat16)).startswith("Triton kernels")
    assert kernel_of(route_node(torch.float64)) == "torch rule on cuda: float64 has no kernels"
    assert kernel_of(route_node(torch.bfloat16, experts=513)).startswith("torch rule on cuda: 513 experts")


def test_without_triton_the_rule_runs_and_the_log_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """`_say` and `_unable` are cached: once a reason, not once a call."""
    monkeypatch.setattr(cuda, "find_spec", lambda _: None)
    cuda._unable.cache_clear()
    cuda._say.cache_clear()
    try:
        reason = cuda.why_not("route", values(route_node(torch.bfloat16)))
        assert reason == "Triton is not installed"
        for _ in range(3):
            cuda._say("route", reason)
    finally:
        cuda._unable.cache_clear()
    assert [r.message for r in caplog.records] == [
        "dsmoe::route runs as plain torch on the GPU, which is slow: Triton is not installed"
    ]


def test_a_kernel_of_which_torch_cannot_tell_what_it_writes_is_refused() -> None:
    """It would copy all weights at each call: found when the waits for an earlier kernel were left in."""
    log = logging.getLogger("torch._higher_order_ops.triton_kernel_wrap")
    with pytest.raises(TargetError, match="copy all weights"), analysed():
        log.warning("Encountered an exception in identify_mutated_tensors, assuming every input is mutated")
    with analysed():
        log.warning("something else")


def test_a_package_that_still_calls_our_operator_is_refused() -> None:
    """It would load and then fail where there is no Python. Operators of torch are no matter: C++ has them."""
    check_lowered("decode.pt2", {"aten::sort": 2}, [])
    check_lowered("decode.pt2", {"dsmoe::moe": 2}, [Kept("moe", "dsmoe::moe", "float64 has no kernels")])
    with pytest.raises(TargetError, match=r"decode\.pt2 still calls dsmoe::moe"):
        check_lowered("decode.pt2", {"dsmoe::moe": 2, "aten::sort": 1}, [])
