"""The router's kernels against the rule: every gate and size, ties, NaN, and planted faults."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch

from dsmoe_runtime.agreement import routing_agreement, within_budget
from dsmoe_runtime.kernels import route as kernels
from dsmoe_runtime.kernels.launch import INTERPRETED
from dsmoe_runtime.ops.moe import router_logits
from dsmoe_runtime.ops.route import SCORES, _scores, weights_of

NAN, INF = float("nan"), float("inf")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
GROUPS = [(1, 1, "max"), (8, 3, "max"), (8, 3, "top2")]


def gate_of(top_k=6, score="softmax", groups=GROUPS[0], renormalize=False, scale=1.0):
    return (top_k, score, *groups, renormalize, 1e-20, scale)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rule(logits, bias, gate):
    return torch.ops.dsmoe.route(logits, bias, *gate)


def on(device, function, *arguments):
    """`function` with its tensors on `device`; its answer on the CPU."""
    moved = [a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments]
    return tuple(t.cpu() for t in function(*moved))


def complaint(answer, logits, bias, gate, exact_logits=None):
    """What is wrong with `answer` = weights, experts, if the rule in `logits`' dtype is allowed its rounding."""
    score, n_group, topk_group, group_score, renormalize, eps, scale = gate[1:]
    weights, experts = answer
    eager_weights, eager_experts = rule(logits, bias, gate)
    if (weights.shape, weights.dtype) != (eager_weights.shape, torch.float32) or experts.dtype != torch.int64:
        return f"{tuple(weights.shape)} {weights.dtype}, {experts.dtype}"
    exact_logits = logits.double() if exact_logits is None else exact_logits
    added = logits.new_zeros(logits.shape[1]) if bias is None else bias  # a sum of two rounds to the scores' dtype
    routing = routing_agreement(
        experts,
        eager_experts,
        exact_TE=_scores(exact_logits, score) + added.double(),
        eager_TE=_scores(logits, score) + added,
        n_group=1 if topk_group == n_group else n_group,
        topk_group=1 if topk_group == n_group else topk_group,
        group_score=group_score,
    )
    if not routing.ok:
        return str(routing)
    values = within_budget(
        weights,
        eager=eager_weights,
        exact=weights_of(exact_logits, experts, score, renormalize, eps, scale),
        exact_eager=weights_of(exact_logits, eager_experts, score, renormalize, eps, scale),
        factor=2.0 if INTERPRETED else 4.0,  # a GPU's fast exp is off by two units in the last place
    )
    return None if values.ok else str(values)


@pytest.fixture
def wide_programs(monkeypatch):
    """Many tokens a program where each operation of a program costs as much as its tokens: in the interpreter."""
    if INTERPRETED:
        monkeypatch.setattr(kernels, "tokens_a_program", lambda tokens, parts: 16)


@pytest.mark.parametrize("groups", GROUPS, ids=str)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_gate(dtype, score, groups, device, wide_programs):
    logits = normal(7 if INTERPRETED else 300, 64, seed=1, dtype=dtype)
    biases = (None, normal(64, seed=2) * 0.3, (normal(64, seed=3) * 0.3).to(dtype))
    for bias, (renormalize, scale) in zip(biases, [(True, 2.5), (False, 1.0), (True, 1.0)], strict=True):
        gate = gate_of(6, score, groups, renormalize, scale)
        weights, experts = on(device, kernels.route, logits, bias, *gate)
        assert not complaint((weights, experts), logits, bias, gate)
        if dtype != torch.float32:  # more exact than the rule is not the rule: it rounds after each operation
            expected_weights, expected = rule(logits, bias, gate)
            assert torch.equal(weights, weights.to(dtype).float())
            assert (weights == expected_weights).float().mean() > 0.9
            assert (experts == expected).float().mean() > 0.9


@pytest.mark.parametrize("tokens", [0, 1, 7, 63, pytest.param(300, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("num_experts", [5, 63, 64, 256])
def test_every_size(num_experts, tokens, device, wide_programs):
    if tokens == 300 and INTERPRETED:
        pytest.skip("for the GPU")
    logits = normal(tokens, num_experts, seed=4)
    for top_k in {1, 6, 7, 8, 16} if tokens != 7 else {5}:
        gate = gate_of(top_k, renormalize=True)
        if top_k <= num_experts:
            assert not complaint(on(device, kernels.route, logits, None, *gate), logits, None, gate)


def test_a_program_a_token_and_groups_of_no_power_of_two(device):
    logits, gate = normal(3, 63, seed=5), gate_of(7, "sigmoid", (9, 4, "top2"), True)
    assert not complaint(on(device, kernels.route, logits, None, *gate), logits, None, gate)
    logits, gate = normal(3, 160, seed=6), gate_of(6, "softmax", (8, 3, "max"))
    assert not complaint(on(device, kernels.route, logits, None, *gate), logits, None, gate)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ties_go_to_the_lowest_index(dtype, score, device, wide_programs):
    """Logits of four values: equal scores are equal on both sides, so the experts must be the rule's."""
    logits = torch.randint(-1, 3, (16, 64), generator=torch.Generator().manual_seed(7)).to(dtype)
    logits[0], logits[1, ::2], logits[1, 1::2] = 0.0, -0.0, 0.0
    for groups in GROUPS:
        gate = gate_of(8, score, groups)
        assert torch.equal(on(device, kernels.route, logits, None, *gate)[1], rule(logits, None, gate)[1])


@pytest.mark.parametrize("groups", GROUPS, ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_rows_of_nan_and_infinity(score, groups, device, wide_programs):
    """Experts stay distinct and in range, NaN comes first, and reaches the weights of its own token alone."""
    logits = normal(9, 64, seed=8)
    logits[0], logits[1], logits[2], logits[3, 40] = NAN, -INF, INF, NAN
    logits[4, 8:], logits[5, 60], logits[6, ::2] = -INF, INF, -INF
    logits[7], logits[7, [41, 42, 50, 51, 60, 61]] = -INF, 1.0  # the best groups hold -inf too, like those dropped
    logits[8, 3], logits[8, 40] = INF, NAN
    for bias in (None, normal(64, seed=9)):
        gate = gate_of(12, score, groups, True)
        weights, experts = on(device, kernels.route, logits, bias, *gate)
        expected_weights, expected = rule(logits, bias, gate)
        assert torch.equal(experts, expected)
        torch.testing.assert_close(weights, expected_weights, equal_nan=True)


def test_the_judge_sees_planted_faults(device, wide_programs):
    """What `complaint` and the test of ties let through would prove nothing."""
    logits, bias = normal(16, 64, seed=10), normal(64, seed=11)
    gate = gate_of(6, "sigmoid", (8, 3, "top2"), True)
    weights, experts = on(device, kernels.route, logits, bias, *gate)
    assert not complaint((weights, experts), logits, bias, gate)
    wrong_groups = on(device, kernels.route, logits, bias, *gate_of(6, "sigmoid", (8, 3, "max"), True))
    assert "left out" in complaint(wrong_groups, logits, bias, gate)
    assert "left out" in complaint(on(device, kernels.route, logits, None, *gate), logits, bias, gate)
    biased = (logits.sigmoid() + bias).gather(1, experts)
    assert "off by" in complaint((biased / biased.sum(-1, keepdim=True), experts), logits, bias, gate)
    assert "off by" in complaint((weights * (1 + 1e-6), experts), logits, bias, gate)
    assert "off by" in complaint((weights.roll(1, 1), experts), logits, bias, gate)
    tied = logits.round()
    _, last = on(device, kernels.route, tied.flip(1), None, *gate_of(6))  # a kernel that prefers the highest index
    assert not torch.equal(63 - last, rule(tied, None, gate_of(6))[1])


OPERANDS = [
    (torch.float32, torch.float32, "float32"),
    (torch.bfloat16, torch.bfloat16, "float32"),
    (torch.bfloat16, torch.float32, "float32"),
    (torch.bfloat16, torch.float32, "activation"),
    (torch.float16, torch.float16, "activation"),
    (torch.float16, torch.float32, "float32"),
]


@pytest.mark.parametrize("parts", [False, True], ids=["one launch", "parts"])
@pytest.mark.parametrize(("x_dtype", "weight_dtype", "router_dtype"), OPERANDS, ids=str)
def test_gate(x_dtype, weight_dtype, router_dtype, parts, device, monkeypatch, wide_programs):
    """The last step over H is ragged, the last part shorter than the others, the last block of tokens not full."""
    monkeypatch.setattr(kernels, "ONE_PROGRAM", 0 if parts else 2**40)
    monkeypatch.setattr(kernels, "PART", 8192)
    shapes = [(5, 63, (9, 4, "top2"), 180), (17 if INTERPRETED else 300, 64, (1, 1, "max"), 336)]
    for (tokens, num_experts, groups, hidden), biased in itertools.product(shapes, [False, True]):
        x = normal(tokens, hidden, seed=12, dtype=x_dtype)
        weight = (normal(num_experts, hidden, seed=13) / hidden**0.5).to(weight_dtype)
        router_bias, bias = (normal(num_experts, seed=14), normal(num_experts, seed=15)) if biased else (None, None)
        item = weight.element_size()
        assert (kernels.gate_cut(tokens, hidden, num_experts, 64, item, False).parts > 1) == parts
        gate = gate_of(7, "softmax", groups, True, 2.0)
        answer = on(device, kernels.gate, x, weight, router_bias, bias, *gate, router_dtype)
        if router_dtype == "activation":
            weight, router_bias = weight.to(x_dtype), router_bias if router_bias is None else router_bias.to(x_dtype)
        exact = router_logits(x.double(), weight, router_bias, "float32")
        logits = router_logits(x, weight, router_bias, router_dtype)
        assert not complaint(answer, logits, bias, gate, exact)
        weight[:, -4:] = 0
        short = on(device, kernels.gate, x, weight, router_bias, bias, *gate, router_dtype)
        assert complaint(short, logits, bias, gate, exact), "a gate that skips the end of H must be seen"


def test_a_real_gate_is_as_accurate_as_float32(device):
    """H = 7168: a tensor core's own running sum would be ten times as far off as the rule's float32."""
    if INTERPRETED:
        pytest.skip("the interpreter has no tensor cores")
    weight = (normal(256, 7168, seed=16) / 7168**0.5).bfloat16()
    gate = gate_of(8, "sigmoid", (8, 4, "top2"), True, 2.5)
    for tokens, dtype in itertools.product([1, 63, 300, 3000], [torch.bfloat16, torch.float32]):
        x, router_weight = normal(tokens, 7168, seed=17, dtype=torch.bfloat16), weight.to(dtype) * 1.0009765625
        answer = on(device, kernels.gate, x, router_weight, None, None, *gate, "float32")
        exact = router_logits(x.double(), router_weight, None, "float32")
        assert not complaint(answer, router_logits(x, router_weight, None, "float32"), None, gate, exact)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="no GPU here")
def test_replays_of_a_graph_follow_their_inputs(monkeypatch):
    monkeypatch.setattr(kernels, "ONE_PROGRAM", 0)
    x, weight, gate = normal(9, 2048, seed=18).cuda(), normal(64, 2048, seed=19).cuda() / 45, gate_of(6)
    kernels.gate(x, weight, None, None, *gate, "float32")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weights, experts = kernels.gate(x, weight, None, None, *gate, "float32")
    for seed in range(3):
        x.copy_(normal(9, 2048, seed=20 + seed))
        graph.replay()
        logits = router_logits(x.cpu(), weight.cpu(), None, "float32")
        exact = router_logits(x.cpu().double(), weight.cpu(), None, "float32")
        assert not complaint((weights.cpu(), experts.cpu()), logits, None, gate, exact)


def test_what_the_kernels_cannot_do_is_said():
    logits = normal(2, 64)
    assert kernels.refusal(64, 6, logits, None) is None
    assert "float64" in kernels.refusal(64, 6, logits, logits[0].double())
    assert "513" in kernels.refusal(513, 6, logits)
    assert "17" in kernels.refusal(64, 17, logits)
    with pytest.raises(AssertionError, match="float64"):
        kernels.route(logits.double(), None, *gate_of())


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dsmoe_runtime.kernels import route
from dsmoe_runtime.kernels.device.gate import gate_kernel
meta = route._meta(256, 8, "sigmoid", 8, 4, "top2", True) | dict(
    H=7168, ACTIVATION=False, SPAN=7168, BLOCK_T=64, BLOCK_H=64, UP=False, PDL=True, ROUTER_BIASED=False, BIASED=True)
types = dict(x_ptr="*bf16", w_ptr="*bf16", router_bias_ptr="*fp32", bias_ptr="*fp32", weights_ptr="*fp32",
             experts_ptr="*i64", T="i32", eps="fp32", scale="fp32")
names = gate_kernel.arg_names
signature = {n: types.get(n, "constexpr") for n in names}
constants = {(i,): meta[n] for i, n in enumerate(names) if n in meta}
aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if types.get(n, "").startswith("*")}
kernel = triton.compile(ASTSource(gate_kernel, signature, constants, aligned), target=GPUTarget("cuda", 90, 32),
                        options=dict(num_warps=8, num_stages=4, launch_pdl=True))
print(kernel.asm["ptx"])
print("FMA" if "math.fma" in kernel.asm["ttgir"] else "FOLDED")
"""


def test_compiles_for_hopper_with_a_sum_of_its_own():
    """Without a GPU: the largest gate builds for sm_90, pipelined, chained, and its steps are added outside the dot."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.rstrip().endswith("FMA")
    assert all(word in done.stdout for word in ("wgmma.mma_async", "cp.async", "griddepcontrol.wait"))
