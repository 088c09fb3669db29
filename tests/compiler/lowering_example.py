"""Operators on a GPU that is not there, lowered and traced as AOTInductor does it: what is in the graph, as JSON.

Run by test_lower.py in a process of its own, since a process that runs kernels in Triton's interpreter cannot trace.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, fx, nn
from torch._export.utils import _compiling_state_context
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode

import dsmoe_runtime.ops  # noqa: F401  registers the operators
from dsmoe_compiler.targets.lower import copied, lower
from dsmoe_runtime.kernels.launch import launch
from dsmoe_runtime.ops import cuda

HIDDEN, WIDTH, EXPERTS, CHOSEN, SHARED = 64, 32, 6, 2, 32
GATE = (CHOSEN, "softmax", 1, 1, "max", True, 0.0, 1.0)
HOPPER = SimpleNamespace(multi_processor_count=132, major=9, minor=0, name="H200", L2_cache_size=50 * 2**20,
                         total_memory=140 * 2**30, shared_memory_per_block_optin=232448)  # fmt: skip


class NoGpu:
    """What Triton asks its driver while a launch is traced: what to compile for."""

    binary_ext = "cubin"

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


@triton.jit
def fill(logits_ptr, weights_ptr, experts_ptr, n, K: tl.constexpr, BLOCK: tl.constexpr):
    """Not a router: something to launch."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(weights_ptr + i, tl.load(logits_ptr + i, mask=i < n), mask=i < n)
    tl.store(experts_ptr + i, i % K, mask=i < n)


def stand_in(logits: Tensor, bias: Tensor | None, top_k: int, *_: Any) -> tuple[Tensor, Tensor]:
    weights = logits.new_empty((logits.shape[0], top_k), dtype=torch.float32)
    experts = logits.new_empty((logits.shape[0], top_k), dtype=torch.int64)
    n = weights.numel()
    launch(fill, (triton.cdiv(n, 128),), logits, weights, experts, n, K=top_k, BLOCK=128)
    return weights, experts


def cut(logits: Tensor, bias: Tensor | None, top_k: int, *_: Any) -> tuple[Tensor, Tensor]:
    """As above, with a block as large as this number of tokens wants it."""
    weights = logits.new_empty((logits.shape[0], top_k), dtype=torch.float32)
    experts = logits.new_empty((logits.shape[0], top_k), dtype=torch.int64)
    n = weights.numel()
    launch(fill, (1,), logits, weights, experts, n, K=top_k, BLOCK=triton.next_power_of_2(int(n)))
    return weights, experts


STAND_INS = {"toy": stand_in, "cut": cut}


class Call(nn.Module):
    """An operator's call between two pointwise operations, with these weights."""

    def __init__(self, operator: Callable[..., Any], after: Callable[..., Any]) -> None:
        super().__init__()
        self.operator, self.after = operator, after

    def forward(self, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        x, *rest = tensors
        result = self.after(self.operator, x * 2, *rest)
        return tuple(r + 1 for r in (result if isinstance(result, tuple) else (result,)))


def routed(op: Any, x: Tensor) -> Any:
    return op(x, None, *GATE)


def answered(op: Any, x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Any:
    return op(x, ids, weights, gate_up, down, None, None, "silu", 1.0, 0.0, "concat")


def whole(op: Any, x: Tensor, gate: Tensor, gate_up: Tensor, down: Tensor, shared_up: Tensor, shared: Tensor) -> Any:
    routed_experts = (gate_up, down, None, None, "silu", 1.0, 0.0, "concat")
    return op(x, gate, None, None, *GATE, "float32", *routed_experts, shared_up, shared, None)


def attended(op: Any, query: Tensor, key: Tensor, value: Tensor) -> Any:
    return op(query, key, value, torch.arange(key.shape[2], device=key.device) < 5, 0.25)


def multiplied(op: Any, x: Tensor, *weights: Tensor) -> Any:
    return op(x, list(weights))


def inputs_of(name: str, tokens: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    def made(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda")

    experts = (made(EXPERTS, 2 * WIDTH, HIDDEN), made(EXPERTS, HIDDEN, WIDTH))
    if name == "attend":
        return (made(1, CHOSEN, 1, HIDDEN), *(made(1, CHOSEN, 40, HIDDEN) for _ in range(2)))
    if name == "gemv":
        return (made(1, HIDDEN), made(WIDTH, HIDDEN), made(3, HIDDEN))
    if name == "route":
        return (made(tokens, EXPERTS),)
    if name == "experts":
        ids, weights = made(tokens, CHOSEN, dtype=torch.int64), made(tokens, CHOSEN, dtype=torch.float32)
        return (made(tokens, HIDDEN), ids, weights, *experts)
    shared = (made(2 * SHARED, HIDDEN), made(HIDDEN, SHARED))
    return (made(tokens, HIDDEN), made(EXPERTS, HIDDEN), *experts, *shared)


def exported(name: str, tokens: int, dtype: torch.dtype) -> fx.GraphModule:
    after = {"route": routed, "experts": answered, "moe": whole, "attend": attended, "gemv": multiplied}[name]
    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs = inputs_of(name, tokens, dtype)
    free: Any = None
    if tokens > 1:
        per_token = {"route": 1, "experts": 3, "moe": 1}[name]
        dims = [{0: torch.export.Dim.DYNAMIC} if i < per_token else None for i in range(len(inputs))]
        free = (dims,)
    module = Call(getattr(torch.ops.dsmoe, name), after)
    program = torch.export.export(module, (list(inputs),), dynamic_shapes=free, strict=False)
    return program.module(check_guards=False)  # type: ignore[return-value]


def traced(graph: fx.GraphModule) -> dict[str, Any]:
    """Lower, trace as AOTInductor does, and tell what came out."""
    lowered = copied(graph)
    kept = lower(lowered)
    before = [str(node.target) for node in graph.graph.nodes if "dsmoe" in str(node.target)]
    lowered.graph.set_codegen(fx.graph.CodeGen())
    lowered.recompile()
    inputs = tuple(node.meta["val"] for node in lowered.graph.find_nodes(op="placeholder"))
    with _compiling_state_context(), torch.no_grad():
        final, _ = aot_export_module(lowered, inputs, trace_joint=False)
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    launches = [n for n in final.graph.nodes if "triton_kernel_wrapper" in str(n.target)]
    tokens = inputs[0].shape[0]
    return {
        "before": before,
        "kept": [[call.operator, call.reason] for call in kept],
        "operators": [str(n.target) for n in final.graph.nodes if str(n.target).startswith("dsmoe")],
        "kernels": [name_of(kernel_side_table.get_kernel(n.kwargs["kernel_idx"])) for n in launches],
        "functional": all(str(n.target).endswith("functional") for n in launches),
        "written": [sorted(n.kwargs["tensors_to_clone"]) for n in launches],
        "grids": [str(n.kwargs["grid"]) for n in launches],
        "tokens": str(tokens.node.expr) if isinstance(tokens, torch.SymInt) else tokens,
        "range": str(bounds(tokens)),
        "outputs": [[list(map(str, v.shape)), str(v.dtype)] for v in outputs(final)],
    }


def name_of(kernel: Any) -> str:
    """A kernel with warps or stages given comes wrapped, as one with a single configuration."""
    while hasattr(kernel, "fn") and not hasattr(kernel, "__name__"):
        kernel = kernel.fn
    return str(kernel.__name__)


def bounds(tokens: Any) -> Any:
    return None if isinstance(tokens, int) else tokens.node.shape_env.bound_sympy(tokens.node.expr)


def outputs(graph: fx.GraphModule) -> list[Tensor]:
    return [node.meta["val"] for node in graph.graph.output_node().args[0]]


def main(cases: list[str]) -> None:
    triton.runtime.driver.set_active(NoGpu())
    torch.cuda.get_device_capability = lambda device=None: (9, 0)  # type: ignore[assignment]
    torch.cuda.get_device_properties = lambda device=None: HOPPER  # type: ignore[assignment]
    results: dict[str, Any] = {}
    for case in cases:
        name, tokens, dtype = case.split(":")
        real = cuda.kernels
        if name in STAND_INS:
            cuda.kernels = lambda _, name=name: STAND_INS[name]  # type: ignore[assignment,misc]
            name = "route"
        try:
            results[case] = traced(exported(name, int(tokens), getattr(torch, dtype)))
        except Exception as error:
            if len(cases) == 1:
                raise
            results[case] = {"error": f"{type(error).__name__}: {error}"[:2000]}
        finally:
            cuda.kernels = real  # type: ignore[assignment]
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
