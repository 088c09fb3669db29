"""One layer's routed experts in ONNX Runtime on a CPU: our library, the function body, contrib MoE, and torch.

    python -m benchmarks.onnx_cpu_layer --out benchmarks/results/onnx_cpu_layer.json

float32, deepseek-moe-16b's sizes, precomputed routing whose weights sum to 1 (contrib MoE gets it as logits: the
logarithm of each weight, -1e30 elsewhere). Agreement with float64 is checked before anything is timed, and what does
not agree is not timed. Each repeat times every candidate once, in turn: a pause for the threads of the last one to fall
asleep, a call that wakes its own, the call that counts. Judge by the ratios of medians. Repeats take one routing after
the other: contrib MoE gives each thread a fixed range of experts, so its time for few tokens depends on their choice.
`cpu_ms` is the time of all threads, which other users of the machine disturb less.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cpu_layer import cpu_name
from dsmoe_compiler.targets.onnx.function import function
from dsmoe_model.experts import RoutedExperts
from dsmoe_model.presets import PRESETS, preset
from dsmoe_runtime.agreement import within_budget
from dsmoe_runtime.ort_library.build import library

if TYPE_CHECKING:
    import onnx
    import onnxruntime

Routing = tuple[Tensor, Tensor, Tensor]  # x [T, H], experts [T, K], weights [T, K]
Call = Callable[[], Tensor]
Prepared = Callable[[Routing], Call]  # everything but the call itself happens before the clock runs

ATTRIBUTES: dict[str, Any] = {"activation": "silu", "alpha": 1.0, "limit": 0.0, "layout": "concat"}
CONTRIB: dict[str, Any] = {
    "activation_type": "swiglu",
    "swiglu_fusion": 1,
    "activation_alpha": 1.0,
    "activation_beta": 0.0,
    "normalize_routing_weights": 0,
}
OPSET, NEVER = 23, -1e30
PAUSE = 0.1  # seconds; ONNX Runtime's idle threads spin for some 30 ms, and would take a core from the next candidate
ROUTINGS = 8  # for each number of tokens
MANY = 64  # tokens; calls with fewer take milliseconds, which other users of the machine disturb more


def build_experts(name: str) -> RoutedExperts:
    """Random weights at the scale at which outputs are about 1."""
    experts = RoutedExperts(preset(name)).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        for matrix in parameter.data:
            matrix.copy_(torch.randn(matrix.shape, generator=generator) * matrix.shape[-1] ** -0.5)
    return experts


def route(experts: RoutedExperts, tokens: int, seed: int) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    config = experts.config
    x = torch.randn(tokens, config.hidden_size, generator=generator)
    scores = torch.randn(tokens, config.n_routed_experts, generator=generator).softmax(-1)
    weights, chosen = scores.topk(config.num_experts_per_tok, dim=-1)
    return x, chosen.contiguous(), weights / weights.sum(-1, keepdim=True)


def opened(
    node: onnx.NodeProto,
    weights: dict[str, Tensor],
    threads: int,
    *,
    functions: Sequence[onnx.FunctionProto] = (),
    with_library: bool = False,
) -> onnxruntime.InferenceSession:
    """A session of one node; its weights are initializers that share torch's memory."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if with_library:
        options.register_custom_ops_library(str(library()))
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(weight.numpy()) for name, weight in weights.items()}
    initializers = []
    for name, weight in weights.items():
        options.add_initializer(name, values[name])
        placeholder = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=weight.shape)
        placeholder.data_location = TensorProto.EXTERNAL
        placeholder.external_data.add(key="location", value="weights.bin")
        initializers.append(placeholder)
    kinds = {"experts": TensorProto.INT64}
    inputs = [
        helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), [None, None])
        for name in node.input
        if name and name not in weights
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, None])
    graph = helper.make_graph([node], "layer", inputs, [output], initializer=initializers)
    opsets = [helper.make_opsetid(domain, v) for domain, v in (("", OPSET), ("dsmoe", 1), ("com.microsoft", 1))]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "weights.bin").touch()  # what it would hold is given by add_initializer
        path = Path(folder, "model.onnx")
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=list(functions)), path)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    session.kept_alive = values
    return session


def by_session(session: onnxruntime.InferenceSession, feeds: Callable[[Routing], dict[str, Tensor]]) -> Prepared:
    def prepare(routing: Routing) -> Call:
        given = {name: tensor.contiguous().numpy() for name, tensor in feeds(routing).items()}
        return lambda: torch.from_numpy(session.run(None, given)[0])

    return prepare


def given_routing(routing: Routing) -> dict[str, Tensor]:
    return dict(zip(("x", "experts", "weights"), routing, strict=True))


def as_logits(routing: Routing, num_experts: int) -> dict[str, Tensor]:
    x, chosen, weights = routing
    return {"x": x, "logits": torch.full((len(x), num_experts), NEVER).scatter_(1, chosen, weights.log())}


def grouped_mm(experts: RoutedExperts) -> Prepared:
    """Sort, two grouped products, weigh, sum over k: as transformers' `grouped_mm` experts do."""

    def call(x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        top_k = chosen.shape[1]
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=experts.n_routed_experts)
        offsets = counts.cumsum(0).to(torch.int32)
        joint = torch._grouped_mm(x[order // top_k], experts.gate_up_proj.mT, offs=offsets)
        gate, up = joint.chunk(2, dim=-1)
        answers = torch._grouped_mm(F.silu(gate) * up, experts.down_proj.mT, offs=offsets)
        y = torch.empty_like(answers)
        y[order] = answers
        return (y.view(-1, top_k, x.shape[1]) * weights[..., None]).sum(1)

    return lambda routing: lambda: call(*routing)


def candidates(experts: RoutedExperts, interleaved: Tensor, threads: int) -> dict[str, Prepared]:
    """All that run on `threads` threads, ours first."""
    from onnx import helper

    plain = {"gate_up": experts.gate_up_proj.data, "down": experts.down_proj.data}
    node = helper.make_node(
        "DsMoE", ["x", "experts", "weights", "gate_up", "down"], ["y"], domain="dsmoe", **ATTRIBUTES
    )
    top_k, num_experts = experts.config.num_experts_per_tok, experts.n_routed_experts
    contrib = helper.make_node(
        "MoE", ["x", "logits", "gate_up", "", "down"], ["y"], domain="com.microsoft", k=top_k, **CONTRIB
    )
    body = function(**ATTRIBUTES, biases=False, opset=OPSET)
    return {
        "library": by_session(opened(node, plain, threads, with_library=True), given_routing),
        "function body": by_session(opened(node, plain, threads, functions=[body]), given_routing),
        "contrib MoE": by_session(
            opened(contrib, plain | {"gate_up": interleaved}, threads), lambda r: as_logits(r, num_experts)
        ),
        "torch eager": lambda r: lambda: experts(r[0], r[2], r[1]),
        "torch grouped_mm": grouped_mm(experts),
    }


def exactly(experts: RoutedExperts, routing: Routing) -> Tensor:
    """float64, one expert's weights at a time."""
    x, chosen, weights = (t.double() if t.is_floating_point() else t for t in routing)
    y = torch.zeros_like(x)
    for expert in chosen.unique().tolist():
        token, slot = torch.where(chosen == expert)
        gate, up = F.linear(x[token], experts.gate_up_proj[expert].double()).chunk(2, dim=-1)
        answer = F.linear(F.silu(gate) * up, experts.down_proj[expert].double())
        y.index_add_(0, token, answer * weights[token, slot, None])
    return y


def interleaved_samples(calls: dict[str, list[Call]], repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Milliseconds by the wall clock and of all threads, each repeat with the next of a candidate's calls."""
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(repeats):
        for name, ways in calls.items():
            call = ways[turn % len(ways)]
            time.sleep(PAUSE)
            call()
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            taken = 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)
            samples[name].append(taken)
    return samples


def measure(
    experts: RoutedExperts, routings: dict[int, list[tuple[Routing, Tensor]]], threads: int, repeats: int
) -> dict[str, Any]:
    """All candidates for all numbers of tokens on so many threads; each routing comes with the exact answer."""
    torch.set_num_threads(threads)
    half = experts.gate_up_proj.shape[1] // 2
    interleaved = torch.stack(experts.gate_up_proj.data.split(half, dim=1), dim=2).flatten(1, 2)
    prepared = candidates(experts, interleaved, threads)
    agreement: dict[str, dict[int, Any]] = {name: {} for name in prepared}
    rows = []
    for tokens, given in routings.items():
        calls = {name: [prepare(routing) for routing, _ in given] for name, prepare in prepared.items()}
        eager = [call() for call in calls["torch eager"]]
        for name, ways in list(calls.items()):
            verdicts = [within_budget(ways[i](), eager=eager[i], exact=exact) for i, (_, exact) in enumerate(given)]
            worst = max(verdicts, key=lambda verdict: verdict.worst / verdict.budget)
            agreement[name][tokens] = {"ok": worst.ok, "worst": worst.worst, "budget": worst.budget}
            if not all(verdict.ok for verdict in verdicts):
                del calls[name]
        samples = interleaved_samples(calls, repeats if tokens >= MANY else 4 * repeats)
        ours = statistics.median(wall for wall, _ in samples["library"]) if "library" in samples else np.nan
        for name, taken in samples.items():
            walls, cpus = [wall for wall, _ in taken], [cpu for _, cpu in taken]
            row: dict[str, Any] = {"threads": threads, "tokens": tokens, "candidate": name}
            row |= {"median_ms": statistics.median(walls), "mean_ms": statistics.fmean(walls)}
            row |= {"sd_ms": statistics.stdev(walls), "best_ms": min(walls), "cpu_ms": statistics.median(cpus)}
            row |= {"library_is_faster_by": row["median_ms"] / ours, "samples_ms": walls, "samples_cpu_ms": cpus}
            rows.append(row)
            print(
                f"{threads} threads  T={tokens:<4} {name:16} {row['median_ms']:9.2f} ms  mean {row['mean_ms']:9.2f} ± "
                f"{row['sd_ms']:7.2f}  best {row['best_ms']:9.2f}  cpu {row['cpu_ms']:9.2f}  "
                f"{row['library_is_faster_by']:5.2f}x",
                flush=True,
            )
    return {"threads": threads, "agreement": agreement, "rows": rows}


def main() -> int:
    import onnx
    import onnxruntime

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", default="deepseek-moe-16b", choices=PRESETS)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 64, 512])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=11, help=f"four times as many below {MANY} tokens (11)")
    parser.add_argument(
        "--out", type=Path, help="write machine, versions, agreement and every sample to this JSON file"
    )
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    experts = build_experts(options.preset)
    routings = {}
    for tokens in options.tokens:
        drawn = [route(experts, tokens, seed) for seed in range(ROUTINGS)]
        routings[tokens] = [(routing, exactly(experts, routing)) for routing in drawn]
    runs = []
    for threads in options.threads:
        runs.append(measure(experts, routings, threads, options.repeats))
        gc.collect()
    versions = {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__}
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.onnx_cpu_layer", *sys.argv[1:]]),
        "machine": {"cpu": cpu_name(), "capability": torch.backends.cpu.get_cpu_capability()},
        "versions": versions | {"python": platform.python_version()},
        "layer": {
            name: getattr(experts.config, name)
            for name in ("hidden_size", "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok")
        },
        "dtype": "float32",
        "runs": runs,
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {options.out}", file=sys.stderr)
    wrong = {n for run in runs for n, v in run["agreement"].items() if not all(r["ok"] for r in v.values())}
    if wrong:
        print(f"not timed where not within the budget: {', '.join(sorted(wrong))}", file=sys.stderr)
    return int("library" in wrong)


if __name__ == "__main__":
    sys.exit(main())
