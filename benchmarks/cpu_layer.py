"""One MoE layer on a CPU: the eager oracle, stock torch.compile of it, torch._grouped_mm, and dsmoe::moe, interleaved.

    python -m benchmarks.cpu_layer --preset deepseek-moe-16b --dtype float32 bfloat16 --tokens 1 16 256 --threads 2

Agreement with float64 is checked before anything is timed. Each repeat times every candidate once, in turn, so that
what else the machine does hits all of them; judge by the ratios of medians. The roof of a call is the larger of its
bytes (weights of the experts really hit, read once) at the read bandwidth and its products at the float32 GEMM rate,
both measured in the same run. Results go to benchmarks/results/cpu_layer_*.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import dsmoe_runtime.ops  # noqa: F401  (registers torch.ops.dsmoe)
from dsmoe_model.config import ModelConfig
from dsmoe_model.moe import MoE
from dsmoe_model.presets import PRESETS, preset
from dsmoe_runtime.agreement import within_budget

Call = Callable[[Tensor], Tensor]


def build_layer(config: ModelConfig, dtype: torch.dtype) -> MoE:
    """The oracle's layer with random weights at the scale at which its output is about 1."""
    with torch.device("meta"):
        layer = MoE(config)
    layer = layer.to(dtype).to_empty(device="cpu").requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        matrices = parameter.data if parameter.dim() == 3 else parameter.data[None]
        for matrix in matrices:
            matrix.copy_(torch.randn(matrix.shape, generator=generator) * matrix.shape[-1] ** -0.5)
    if layer.router.e_score_correction_bias is not None:
        layer.router.e_score_correction_bias.zero_()
    return layer


def operator_call(layer: MoE) -> Call:
    """dsmoe::moe on the layer's weights; the shared gate and up joined once, as the packing pass does."""
    c, mlp = layer.router.config, layer.shared_experts
    joined = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)) if mlp is not None else None
    down = mlp.down_proj.weight if mlp is not None else None
    arguments = (
        *(layer.router.weight, None, layer.router.e_score_correction_bias, c.num_experts_per_tok, c.scoring_func),
        *(c.n_group, c.topk_group, c.group_score, c.norm_topk_prob, c.norm_eps, c.routed_scaling_factor),
        *(c.router_dtype, layer.experts.gate_up_proj, layer.experts.down_proj, None, None),
        *(c.hidden_act, c.swiglu_alpha, c.swiglu_limit, "concat", joined, down, None),
    )
    return lambda x: torch.ops.dsmoe.moe(x, *arguments)[0]


def grouped_mm_call(layer: MoE) -> Call:
    """The layer as transformers' `grouped_mm` experts spell it: sort, two grouped products, weigh, sum over k."""

    def call(x: Tensor) -> Tensor:
        weights, experts, _ = layer.router(x)
        top_k = experts.shape[1]
        order = experts.flatten().argsort(stable=True)
        counts = torch.bincount(experts.flatten(), minlength=layer.experts.n_routed_experts)
        offsets = counts.cumsum(0).to(torch.int32)
        joint = torch._grouped_mm(x[order // top_k], layer.experts.gate_up_proj.mT, offs=offsets)
        gate, up = joint.chunk(2, dim=-1)
        answers = torch._grouped_mm(F.silu(gate) * up, layer.experts.down_proj.mT, offs=offsets)
        y = torch.empty_like(answers)
        y[order] = answers
        y = (y.view(-1, top_k, x.shape[1]) * weights[..., None]).sum(1).to(x.dtype)
        return y if layer.shared_experts is None else y + layer.shared_experts(x)

    return call


def compiled_calls(layer: MoE, tokens: list[int], limit: int) -> tuple[dict[str, Call], dict[str, Any]]:
    """Stock torch.compile of the oracle: default options, and fullgraph if that compiles within `limit` seconds."""
    calls: dict[str, Call] = {}
    notes: dict[str, Any] = {}
    hidden = layer.router.config.hidden_size
    for name, fullgraph in (("compiled", False), ("compiled fullgraph", True)):
        if fullgraph and not limit:
            notes[name] = "not tried (--fullgraph-limit 0)"
            continue
        torch._dynamo.reset()
        # Without this the loop over experts cannot be one graph at all: torch.where has a data-dependent shape.
        torch._dynamo.config.capture_dynamic_output_shape_ops = fullgraph
        function = torch.compile(layer, fullgraph=fullgraph)
        start = time.perf_counter()
        try:
            with time_limit(limit if fullgraph else 0):
                for count in tokens:
                    for _ in range(2):
                        function(torch.randn(1, count, hidden).to(layer.router.weight.dtype))
        except Exception as error:  # whatever the compiler throws is the result: it does not compile
            notes[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            continue
        notes[name] = {"compile_seconds": round(time.perf_counter() - start, 1)}
        calls[name] = lambda x, function=function: function(x[None])[0][0]
    torch._dynamo.config.capture_dynamic_output_shape_ops = False
    return calls, notes


class time_limit:
    """Raise TimeoutError in the body after so many seconds; 0 is no limit."""

    def __init__(self, seconds: int) -> None:
        self.seconds = seconds

    def __enter__(self) -> None:
        def stop(*_: object) -> None:
            raise TimeoutError(f"not compiled within {self.seconds} s")

        self.previous = signal.signal(signal.SIGALRM, stop)
        signal.alarm(self.seconds)

    def __exit__(self, *_: object) -> None:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, self.previous)


def agreement(layer: MoE, config: ModelConfig, calls: dict[str, Call], inputs: dict[int, Tensor]) -> dict[str, Any]:
    """Each candidate against float64 within twice eager's error, with eager's choice of experts; candidates that are
    not within it are not timed."""
    exact_layer = build_layer(config, torch.float64)
    for ours, theirs in zip(exact_layer.parameters(), layer.parameters(), strict=True):
        ours.copy_(theirs)
    verdicts: dict[str, Any] = {name: {} for name in calls}
    for tokens, x in inputs.items():
        eager, routing = layer(x[None])
        exact, _ = exact_layer(x.double()[None], experts_TK=routing.experts_TK)
        for name, call in calls.items():
            verdict = within_budget(call(x), eager=eager[0], exact=exact[0])
            verdicts[name][tokens] = {"ok": verdict.ok, "worst": verdict.worst, "budget": verdict.budget}
    return verdicts


def roof() -> dict[str, float]:
    """Read bandwidth (GB/s) and float32 GEMM rate (GFLOP/s) of this machine with these threads: the best of five."""
    block = torch.ones(1 << 27)  # 512 MiB
    square = torch.randn(2048, 2048)
    read = min(_seconds(block.sum) for _ in range(5))
    product = min(_seconds(lambda: square @ square) for _ in range(5))
    return {"read_gb_s": block.numel() * 4 / read / 1e9, "gemm_gflop_s": 2 * 2048**3 / product / 1e9}


def roof_seconds(config: ModelConfig, experts: Tensor, dtype: torch.dtype, machine: dict[str, float]) -> float:
    """The least time of the layer for this routing: its weights read once, or its products, whichever takes longer."""
    of_expert = 3 * config.hidden_size * config.moe_intermediate_size
    always = of_expert * config.n_shared_experts + config.hidden_size * config.n_routed_experts
    size = torch.finfo(dtype).bits // 8 * (of_expert * experts.unique().numel() + always)
    flop = 2 * (of_expert * experts.numel() + always * experts.shape[0])
    return max(size / machine["read_gb_s"], flop / machine["gemm_gflop_s"]) / 1e9


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleaved(calls: dict[str, Call], x: Tensor, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each call, in turn; two rounds are thrown away first."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 2):
        for name, call in calls.items():
            milliseconds = 1e3 * _seconds(lambda call=call: call(x))
            if turn >= 2:
                samples[name].append(milliseconds)
    return samples


def measure(config: ModelConfig, dtype: torch.dtype, options: argparse.Namespace) -> dict[str, Any]:
    """All candidates for all numbers of tokens in one dtype."""
    layer = build_layer(config, dtype)
    generator = torch.Generator().manual_seed(1)
    inputs = {t: torch.randn(t, config.hidden_size, generator=generator).to(dtype) for t in options.tokens}
    calls: dict[str, Call] = {"eager": lambda x: layer(x[None])[0][0]}
    compiled, notes = compiled_calls(layer, options.tokens, options.fullgraph_limit)
    calls |= compiled
    if dtype != torch.float64 and config.hidden_act == "silu":
        calls["grouped_mm"] = grouped_mm_call(layer)
    calls["dsmoe"] = operator_call(layer)

    agreed = agreement(layer, config, calls, inputs)
    gc.collect()
    calls = {name: call for name, call in calls.items() if all(v["ok"] for v in agreed[name].values())}
    machine = roof()
    rows = []
    for tokens, x in inputs.items():
        least = roof_seconds(config, layer.router(x).experts_TK, dtype, machine)
        samples = interleaved(calls, x, options.repeats)
        ours = statistics.median(samples["dsmoe"])
        for name, values in samples.items():
            median = statistics.median(values)
            row = {
                "tokens": tokens,
                "candidate": name,
                "median_ms": median,
                "mean_ms": statistics.fmean(values),
                "sd_ms": statistics.stdev(values) if len(values) > 1 else 0.0,
                "share_of_roof": 1e3 * least / median,
                "dsmoe_is_faster_by": median / ours,
                "samples_ms": values,
            }
            rows.append(row)
            print(
                f"{str(dtype)[6:]:9} T={tokens:<5} {name:19} {median:10.3f} ms  mean {row['mean_ms']:10.3f} "
                f"± {row['sd_ms']:8.3f}  {row['share_of_roof']:6.1%} of roof  {row['dsmoe_is_faster_by']:6.2f}x",
                flush=True,
            )
    return {"dtype": str(dtype)[6:], "roof": machine, "compile": notes, "agreement": agreed, "rows": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", default="deepseek-moe-16b", choices=PRESETS)
    parser.add_argument(
        "--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16", "float16"]
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 256])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument(
        "--fullgraph-limit", type=int, default=0, help="seconds for torch.compile(fullgraph=True); 0: skip"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    config = preset(options.preset)
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.cpu_layer", *sys.argv[1:]]),
        "machine": {
            "cpu": cpu_name(),
            "threads": options.threads,
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "layer": {
            name: getattr(config, name)
            for name in (
                *("hidden_size", "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok"),
                *("n_shared_experts", "scoring_func"),
            )
        },
        "dtypes": [measure(config, getattr(torch, dtype), options) for dtype in options.dtype],
    }
    path = Path(__file__).parent / "results" / f"cpu_layer_{options.preset}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path}", file=sys.stderr)
    disagreeing = [
        n for d in result["dtypes"] for n, v in d["agreement"].items() if not all(r["ok"] for r in v.values())
    ]
    if disagreeing:
        print(f"not timed, as not within the budget: {', '.join(disagreeing)}", file=sys.stderr)
    return int("dsmoe" in disagreeing)


def cpu_name() -> str:
    """The processor's model, family and stepping as Linux has them, or what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return (
        f"{fields.get('model name', platform.machine())}, family {fields.get('cpu family')} model {fields.get('model')}"
    )


if __name__ == "__main__":
    sys.exit(main())
