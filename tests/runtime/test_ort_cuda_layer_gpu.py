"""dsmoe::DsMoELayer on ONNX Runtime's CUDA provider: torch's experts and answers, shared experts by our own kernels."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmoe_runtime.agreement import within_budget
from dsmoe_runtime.ops.moe import moe as rule
from dsmoe_runtime.ort_library.layer import Layer, MoELayer
from tests.kernels.test_moe import forced
from tests.runtime import ort_cases
from tests.runtime.op_cases import GATES, layer_of, moe_arguments, normal, small_config
from tests.runtime.test_ort_cuda_gpu import library, stream

__all__ = ["library", "stream"]
pytestmark = pytest.mark.gpu
MOST = 300
TOKENS = (1, 7, 64, MOST)
SIZES = {"hidden_size": 264, "moe_intermediate_size": 176}
CASES: dict[str, tuple[torch.dtype, str, dict[str, Any]]] = {
    "v1, bfloat16": (torch.bfloat16, "concat", GATES["v1"]),
    "V3, float16": (torch.float16, "concat", GATES["V3"]),
    "gpt-oss, float32": (torch.float32, "interleaved", GATES["gpt-oss"] | {"n_shared_experts": 0}),
}
GATE = ("top_k", "score", "n_group", "topk_group", "group_score", "renormalize", "eps", "scale", "router_dtype")
EXPERTS = ("activation", "alpha", "limit", "layout")


def arguments_of(name: str) -> tuple[Any, ...]:
    """What torch.ops.dsmoe.moe takes after x; the selection bias is float32 as in V3, the router has x's dtype."""
    dtype, layout, changes = CASES[name]
    layer = layer_of(small_config(**(SIZES | changes)), dtype).requires_grad_(False)
    return tuple(a.cuda() if isinstance(a, Tensor) else a for a in moe_arguments(layer, layout))


def made(name: str, tokens: int, seed: int = 0) -> tuple[dict[str, Any], dict[str, Any], tuple[Any, ...]]:
    """The node's inputs and attributes, and the arguments that torch takes after x."""
    arguments = arguments_of(name)
    x = normal(tokens, SIZES["hidden_size"], seed=seed, dtype=CASES[name][0]).cuda()
    case = dict(zip(MoELayer.inputs, (x, *arguments[:3], *arguments[12:16], *arguments[20:22]), strict=True))
    attributes = dict(zip((*GATE, *EXPERTS), (*arguments[3:12], *arguments[16:20]), strict=True))
    attributes = {key: int(value) if isinstance(value, bool) else value for key, value in attributes.items()}
    return case, attributes, arguments


def kind_of(name: str) -> MoELayer:
    """What the kernels of a case are made for."""
    case, attributes, _ = made(name, 1)
    experts, hidden = case["router_weight"].shape
    sizes = (hidden, SIZES["moe_intermediate_size"], experts, attributes["top_k"], str(case["x"].dtype)[6:])
    routed = Layer(*sizes, *(attributes[key] for key in EXPERTS))
    router = (None if case[n] is None else str(case[n].dtype)[6:] for n in MoELayer.inputs[1:4])
    shared = 0 if case["shared_down"] is None else case["shared_down"].shape[1]
    gate = {key: attributes[key] for key in GATE[1:]} | {"renormalize": bool(attributes["renormalize"])}
    return MoELayer(routed, *gate.values(), *router, shared)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """Of all cases, for up to MOST tokens."""
    from dsmoe_runtime.ort_library import record
    from dsmoe_runtime.ort_library.programs import write

    folder = tmp_path_factory.mktemp("kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "MOST_TOKENS", MOST)
        write([kind_of(name) for name in CASES], folder)
    return folder


def session_of(name: str, library: Any, kernels: Any, **options: Any) -> Any:
    case, attributes, _ = made(name, 1)
    beside = options.pop("beside", False)
    model = ort_cases.model(case, attributes, op="DsMoELayer", beside=beside)
    return ort_cases.session(model, library, kernels=kernels, device="cuda", **options)


def run(session: Any, case: dict[str, Any], top_k: int) -> tuple[Tensor, Tensor]:
    """y and the experts, in memory that held nothing of use."""
    y = torch.full_like(case["x"], torch.nan)
    chosen = torch.full((len(y), top_k), -1, dtype=torch.int64, device="cuda")
    session.run_with_iobinding(ort_cases.bound(session, case, y, chosen))
    return y, chosen


@pytest.mark.parametrize("name", CASES)
def test_a_layer_is_that_of_torch(name, kernels, library):
    """The same experts; the same bits where torch asks no other library for the shared experts; the budget always."""
    from dsmoe_runtime.ort_library.record import plans_at

    session, seen = session_of(name, library, kernels), set()
    for tokens in TOKENS:
        case, attributes, arguments = made(name, tokens)
        y, chosen = run(session, case, attributes["top_k"])
        assert all(map(torch.equal, run(session, case, attributes["top_k"]), (y, chosen)))
        by_torch, experts = torch.ops.dsmoe.moe(case["x"], *arguments)
        assert torch.equal(chosen, experts), tokens
        own = plans_at(kind_of(name), tokens).shared is not None
        seen.add(own)
        assert own or torch.equal(y, by_torch), tokens
        eager, eager_experts = rule(case["x"], *arguments)
        found = within_budget(
            y,
            eager=eager,
            exact=forced(case["x"], arguments, chosen),
            exact_eager=forced(case["x"], arguments, eager_experts),
            factor=4.0 if y.dtype == torch.float32 else 2.0,
        )
        assert found.ok, f"{tokens} tokens: {found}"
    assert seen == ({False, True} if case["shared_down"] is not None else {False})


@pytest.mark.parametrize("tokens", [1, MOST])
def test_a_replay_with_other_tokens(tokens, kernels, library):
    """Between other nodes, in ONNX Runtime's CUDA graph, whose replays are the answers that it gives without one."""
    name = "v1, bfloat16"
    session, plain = (session_of(name, library, kernels, beside=True, graph=graph) for graph in (True, False))
    case, attributes, _ = made(name, tokens)
    y, chosen = torch.empty_like(case["x"]), torch.empty(tokens, attributes["top_k"], dtype=torch.int64, device="cuda")
    binding, seen = ort_cases.bound(session, case, y, chosen), []
    for seed in range(4):
        other, _, arguments = made(name, tokens, seed)
        case["x"].copy_(other["x"])
        y.fill_(torch.nan)
        chosen.fill_(-1)
        session.run_with_iobinding(binding)
        wanted, experts = run(plain, case, attributes["top_k"])
        assert torch.equal(y, wanted), seed
        assert torch.equal(chosen, experts), seed
        assert torch.equal(chosen, torch.ops.dsmoe.moe(case["x"] + case["x"], *arguments)[1]), seed
        seen.append(y.clone())
    assert not any(torch.equal(a, b) for a, b in pairwise(seen))


def test_what_does_not_fit_is_refused(kernels, library, tmp_path):
    name = "v1, bfloat16"
    case, attributes, _ = made(name, MOST + 1)
    with pytest.raises(Exception, match=rf"x has {MOST + 1} tokens, and there are kernels for 1 to {MOST}"):
        run(session_of(name, library, kernels), case, attributes["top_k"])
    few, _, _ = made(name, 3)
    few["router_weight"] = few["router_weight"].float()
    model = ort_cases.model(few, attributes, op="DsMoELayer")
    session = ort_cases.session(model, library, kernels=kernels, device="cuda")
    with pytest.raises(Exception, match=r"has no kernels for DsMoELayer hidden=264 .* router_weight=float32"):
        run(session, few, attributes["top_k"])
    with pytest.raises(Exception, match="DsMoELayer"):  # without kernels it is not registered, and has no body here
        session_of(name, library, tmp_path)
