"""ONNX Runtime on one H200: a layer of deepseek-moe-16b by dsmoe::DsMoE, cold, in ONNX Runtime's own CUDA graphs.

    python -m benchmarks.onnx_gpu
    python -m benchmarks.onnx_gpu --parts experts --dtypes bfloat16 --tokens 1 16 --kernels FOLDER

"experts" is DsMoE alone, beside ONNX Runtime's com.microsoft::MoE, whose log weights are made beforehand, and beside
torch.ops.dsmoe.experts in torch's CUDA graphs. "layer" is the whole layer: as one DsMoELayer node; as DsMoE, with the
gate and the shared experts in standard operators; as MoE, which routes from logits in its own dtype, with the shared
experts in standard operators; and as torch.ops.dsmoe.moe. Wanted: no slower than MoE, and at most 1.1 times torch. What
is timed agreed with float64 on 32 rows (MoE's layer: on those whose choice no rounding turns), in memory that held NaN.
--kernels: machine code made elsewhere. Results: benchmarks/results/onnx_gpu_h200.json.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import gpu_candidates as candidates
from benchmarks import onnx_graphs as graphs
from benchmarks.gpu_shapes import SHAPES, Shape
from benchmarks.gpu_timing import (
    COLD_BYTES,
    Replay,
    Session,
    alive,
    failure,
    interleave,
    parsed,
    parser,
    release,
    roofline_seconds,
    summary,
    tell,
    told,
)
from dsmoe_runtime.agreement import within_budget
from dsmoe_runtime.ort_library.build import library

ROWS = 32  # sampled for agreement
SHARED = 2  # shared experts, as wide as a routed one each
HIDDEN_LOG = -1e4  # the log weight of an expert that was not chosen
DTYPES = ("bfloat16", "float16")
OURS, LAYER, CONTRIB, TORCH = "dsmoe onnxruntime", "DsMoELayer onnxruntime", "MoE onnxruntime", "dsmoe torch"


class Runtime:
    """Sessions on one device, in torch's stream; on a GPU with CUDA graphs."""

    def __init__(self, device: torch.device, kernels: Path) -> None:
        self.device, self.kernels, self.library = device, kernels, library()
        if device.type == "cuda":
            torch.cuda.set_stream(torch.cuda.Stream(device))  # ONNX Runtime captures no default stream

    def replay(self, model: Any, given: dict[str, Tensor], taken: dict[str, Tensor]) -> Replay:
        """One run of the model over memory of torch's; on a GPU it has been captured, and is replayed from now on."""
        import onnxruntime

        options, provider = onnxruntime.SessionOptions(), ("CPUExecutionProvider", dict[str, str]())
        options.log_severity_level = 3
        options.add_session_config_entry("dsmoe.kernels", str(self.kernels))
        options.register_custom_ops_library(str(self.library))
        run = onnxruntime.RunOptions()
        if self.device.type == "cuda":
            stream = str(torch.cuda.current_stream(self.device).cuda_stream)
            settings = {"user_compute_stream": stream, "enable_cuda_graph": "1", "use_tf32": "0"}
            provider = ("CUDAExecutionProvider", settings)
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            run.add_run_config_entry("disable_synchronize_execution_providers", "1")
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[provider])
        binding = session.io_binding()
        for bind, tensors in ((binding.bind_input, given), (binding.bind_output, taken)):
            for name, tensor in tensors.items():
                place = (self.device.type, self.device.index or 0, graphs.TYPES[tensor.dtype])
                bind(name, *place, list(tensor.shape), tensor.data_ptr())

        def once(held: tuple[Any, ...] = (given, taken)) -> None:  # a binding keeps no tensor alive
            session.run_with_iobinding(binding, run)

        made = Replay([once], self.device, graph=False)
        for _ in range(3):  # the first runs allocate, then one is captured
            made.run()
        return made


class Problem:
    """One cell's data: as many inputs and routings as a graph has calls, and copies of the weights to rotate over."""

    def __init__(self, shape: Shape, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.tokens, self.dtype, self.device = shape, tokens, dtype, device
        cpu, self.generator = device.type == "cpu", torch.Generator(device).manual_seed(tokens)
        self.calls = 2 if cpu else 64 if tokens == 1 else 24 if tokens <= 64 else 8
        self.xs = [self.normal(tokens, shape.hidden) for _ in range(self.calls)]
        self.router = self.normal(shape.experts, shape.hidden) * shape.hidden**-0.5
        self.ids = [candidates.uniform(tokens, shape.experts, shape.top_k, self.generator) for _ in self.xs]
        self.weights = [candidates.routing_weights(ids, self.generator) for ids in self.ids]
        self.distinct = sum(ids.unique().numel() for ids in self.ids) / self.calls
        count = 1 if cpu else max(1, math.ceil(COLD_BYTES / (self.distinct * shape.expert_bytes)))
        self.stacks = [
            candidates.weight_stacks(shape.experts, shape.hidden, shape.width, dtype=dtype, generator=self.generator)
            for _ in range(count)
        ]
        wide = SHARED * shape.width
        self.shared = [
            (self.normal(2 * wide, shape.hidden) * shape.hidden**-0.5, self.normal(shape.hidden, wide) * wide**-0.5)
            for _ in range(count)
        ]
        self.rows = torch.linspace(0, tokens - 1, min(tokens, ROWS), device=device).long()

    def normal(self, *sizes: int) -> Tensor:
        return torch.randn(sizes, generator=self.generator, device=self.device).to(self.dtype)

    def outputs(self) -> list[Tensor]:
        """Where answers go: NaN, until they are written."""
        return [torch.full_like(x, torch.nan) for x in self.xs]

    def copies(self, index: int) -> tuple[Tensor, ...]:
        """gate_up, down, and the shared experts' two weights, for a call."""
        return (*self.stacks[index % len(self.stacks)], *self.shared[index % len(self.shared)])

    def bound(self, tensors: dict[str, list[Tensor]], weights: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        """Under the names that a repeated graph has for them."""
        of_call = {f"{name}/{i}": tensor for name, each in tensors.items() for i, tensor in enumerate(each)}
        return of_call | {f"{name}.{i}": tensor for name, each in weights.items() for i, tensor in enumerate(each)}


def experts_candidates(problem: Problem, runtime: Runtime) -> dict[str, Callable[[], tuple[Replay, Tensor, int]]]:
    """How each candidate is made: what to replay, the answer of its first call, and its number of calls."""
    shape, dtype, calls, count = problem.shape, problem.dtype, problem.calls, len(problem.stacks)
    stacks = {"gate_up": [a for a, _ in problem.stacks], "down": [b for _, b in problem.stacks]}

    def onnx() -> tuple[Replay, Tensor, int]:
        model = graphs.repeated(graphs.ours(shape, dtype), calls, count, {"x", "experts", "weights"})
        routing = {"x": problem.xs, "experts": problem.ids, "weights": problem.weights}
        ys = problem.outputs()
        replay = runtime.replay(model, problem.bound(routing, stacks), problem.bound({"y": ys}, {}))
        return replay, ys[0], calls

    def contrib() -> tuple[Replay, Tensor, int]:
        model = graphs.repeated(graphs.contrib(shape, dtype), calls, count, {"x", "row"})
        inter = [torch.stack(a.chunk(2, dim=1), dim=2).flatten(1, 2) for a in stacks["gate_up"]]
        rows, ys = [log_weights(problem, i) for i in range(calls)], problem.outputs()
        given = problem.bound({"x": problem.xs, "row": rows}, stacks | {"gate_up": inter})
        replay = runtime.replay(model, given, problem.bound({"y": ys}, {}))
        return replay, (ys[0].float() * problem.weights[0].sum(-1, keepdim=True)).to(dtype), calls

    def torch_path() -> tuple[Replay, Tensor, int]:
        def call(i: int) -> Tensor:
            return candidates.dsmoe(problem.xs[i], problem.ids[i], problem.weights[i], *problem.copies(i)[:2])

        replay = Replay([lambda i=i: call(i) for i in range(calls)], problem.device)
        return replay, call(0), 1

    return {OURS: onnx, CONTRIB: contrib, TORCH: torch_path}


def layer_candidates(problem: Problem, runtime: Runtime) -> dict[str, Callable[[], tuple[Replay, Tensor, int]]]:
    """The whole layer: one node, or several, and in torch."""
    shape, dtype, calls, count = problem.shape, problem.dtype, problem.calls, len(problem.stacks)
    names, wide = ("gate_up", "down", "joined", "last"), SHARED * problem.shape.width
    weights = {name: [problem.copies(i)[at] for i in range(count)] for at, name in enumerate(names)}

    def onnx(model: Any, given: dict[str, list[Tensor]], outputs: int = 2) -> tuple[Replay, Tensor, int]:
        ys, chosen = problem.outputs(), [torch.empty_like(ids) for ids in problem.ids]
        taken = problem.bound(dict(list({"y": ys, "chosen": chosen}.items())[:outputs]), {})
        repeated = graphs.repeated(model, calls, count, {"x"})
        replay = runtime.replay(repeated, problem.bound({"x": problem.xs}, given), taken)
        return replay, ys[0], calls

    def contrib() -> tuple[Replay, Tensor, int]:
        inter = [torch.stack(a.chunk(2, dim=1), dim=2).flatten(1, 2) for a in weights["gate_up"]]
        given = weights | {"router": [problem.router] * count, "gate_up": inter}
        return onnx(graphs.contrib_layer(shape, dtype, wide), given, outputs=1)

    def torch_path() -> tuple[Replay, Tensor, int]:
        gate = (problem.router, None, None, *graphs.gate_of(shape))

        def call(i: int) -> Tensor:
            gate_up, down, joined, last = problem.copies(i)
            experts = (gate_up, down, None, None, *graphs.SILU.values())
            return torch.ops.dsmoe.moe(problem.xs[i], *gate, *experts, joined, last, None)[0]

        return Replay([lambda i=i: call(i) for i in range(calls)], problem.device), call(0), 1

    same, float32 = ({"router": [router] * count} for router in (problem.router, problem.router.float()))
    return {
        LAYER: lambda: onnx(graphs.whole(shape, dtype, wide), weights | same),
        OURS: lambda: onnx(graphs.layer(shape, dtype, wide), weights | float32),
        CONTRIB: contrib,
        TORCH: torch_path,
    }


def log_weights(problem: Problem, call: int) -> Tensor:
    """What MoE takes in place of weights: its softmax over the chosen gives them back, divided by their sum."""
    ids, weights = problem.ids[call], problem.weights[call]
    row = torch.full((problem.tokens, problem.shape.experts), HIDDEN_LOG, device=problem.device)
    return row.scatter(1, ids, (weights / weights.amax(-1, keepdim=True)).log()).to(problem.dtype)


def clear(problem: Problem) -> Tensor:
    """Which of the sampled rows choose the same experts, in a layer, when their logits are rounded to the dtype."""
    logits = F.linear(problem.xs[0][problem.rows].float(), problem.router.float())
    last, first = logits.topk(problem.shape.top_k + 1, dim=-1).values[:, -2:].unbind(-1)
    return last - first > 4 * torch.finfo(problem.dtype).eps * last.abs()


def references(problem: Problem, part: str) -> tuple[Tensor, Tensor]:
    """The sampled rows of the first call in float64, and eagerly in the dtype itself, which sets the budget."""
    x, rows = problem.xs[0][problem.rows], problem.rows
    gate_up, down, joined, last = problem.copies(0)
    ids, weights = problem.ids[0][rows], problem.weights[0][rows]
    if part == "layer":  # ids by float32 scores, as both candidates choose; the gap to the next is far above rounding
        weights, ids = F.linear(x.float(), problem.router.float()).softmax(-1).topk(problem.shape.top_k, dim=-1)

    def answer(dtype: torch.dtype) -> Tensor:
        routed = candidates.loop(x, ids, weights, gate_up, down, dtype)
        return (
            routed if part == "experts" else routed + candidates.expert(x.to(dtype), joined.to(dtype), last.to(dtype))
        )

    return answer(torch.float64), answer(problem.dtype)


def run_cell(session: Session, runtime: Runtime, part: str, dtype: str, tokens: int) -> dict[str, Any]:
    """All candidates of one part, dtype and number of tokens: prepared, judged, then timed in turn."""
    start, arguments = time.perf_counter(), session.arguments
    shape = SHAPES[arguments.shape]
    problem = Problem(shape, tokens, getattr(torch, dtype), session.device)
    made = (experts_candidates if part == "experts" else layer_candidates)(problem, runtime)
    exact, eager = references(problem, part)
    of_shared = SHARED if part == "layer" else 0
    size = shape.size(problem.distinct, tokens) + of_shared * shape.expert_bytes
    roof = 1e6 * roofline_seconds(size, shape.flop(tokens) * (1 + of_shared / shape.top_k))
    record: dict[str, Any] = {"part": part, "dtype": dtype, "tokens": tokens, "distinct_experts": problem.distinct}
    record |= {"calls": problem.calls, "weight_copies": len(problem.stacks), "roofline_us": roof, "candidates": {}}
    replays: dict[str, Replay] = {}
    calls: dict[str, int] = {}
    for name, make in made.items():
        if arguments.candidates and name not in arguments.candidates:
            continue
        entry: dict[str, Any] = {}
        record["candidates"][name] = entry
        try:
            replay, y, calls[name] = make()
            rows = torch.ones_like(problem.rows, dtype=torch.bool)
            if (part, name) == ("layer", CONTRIB) and bool(clear(problem).any()):
                rows = clear(problem)
            found = within_budget(y[problem.rows][rows], eager=eager[rows], exact=exact[rows])
            ok = found.ok and bool(y.isfinite().all())
            entry["agreement"] = {"ok": ok, "worst": found.worst, "budget": found.budget, "rows": found.rows}
            if ok or arguments.disagreeing:
                replays[name] = replay
        except Exception as error:  # one candidate's failure must not cost the others their measurement
            entry["error"] = failure(error)
        if not alive(session.device):
            return record
    for name, seconds in interleave(replays, arguments.repeats).items():
        entry = record["candidates"][name]
        entry |= summary([s / calls[name] for s in seconds])
        entry["share_of_roofline"] = roof / entry["median_us"]
    medians = {name: entry.get("median_us") for name, entry in record["candidates"].items()}
    ours = medians.get(LAYER if part == "layer" else OURS)
    for name, key in ((CONTRIB, "over_contrib"), (TORCH, "over_torch")):
        if (other := medians.get(name)) and ours:
            record[key] = ours / other
    record["seconds"] = round(time.perf_counter() - start, 1)
    return record


def write_kernels(shape: Shape, dtypes: list[str], folder: Path) -> None:
    """Machine code for the layers that are measured."""
    from dsmoe_runtime.ort_library.layer import Layer, MoELayer
    from dsmoe_runtime.ort_library.programs import write

    layers: list[Layer | MoELayer] = []
    for dtype in dtypes:
        routed = Layer(shape.hidden, shape.width, shape.experts, shape.top_k, dtype, **graphs.SILU)
        layers += [routed, MoELayer(routed, router_weight=dtype, shared_width=SHARED * shape.width)]
    write(layers, folder, progress=tell)


def main() -> int:
    import onnxruntime

    made = parser(__doc__ or "", budget=300)
    made.add_argument("--shape", choices=[*SHAPES], default="16B", help="tiny to try the script")
    made.add_argument("--parts", nargs="+", choices=("experts", "layer"), default=["experts", "layer"])
    made.add_argument("--dtypes", nargs="+", default=list(DTYPES))
    made.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 256, 4096])
    made.add_argument("--kernels", type=Path, help="a folder kernels/ that holds them already")
    arguments = parsed(made)
    torch.set_grad_enabled(False)
    session = Session("onnx_gpu", arguments, ("part", "dtype", "tokens"))
    session.record |= {"shape": arguments.shape, "limit_over_contrib": 1.0, "limit_over_torch": 1.1}
    session.record["environment"]["onnxruntime"] = onnxruntime.__version__
    wanted = [
        (part, dtype, tokens) for part in arguments.parts for dtype in arguments.dtypes for tokens in arguments.tokens
    ]
    with tempfile.TemporaryDirectory() as folder:
        kernels = arguments.kernels or Path(folder)
        if arguments.kernels is None and session.device.type == "cuda":
            write_kernels(SHAPES[arguments.shape], arguments.dtypes, kernels)
        runtime = Runtime(session.device, kernels)
        for cell in (cell for cell in wanted if cell not in session.done):
            if session.deadline.left < 0:
                tell(f"no time left for {cell}; --resume measures it")
                break
            record = run_cell(session, runtime, *cell)
            session.keep(record)
            for name, entry in record["candidates"].items():
                what = f"{entry['median_us']:.1f} us" if "median_us" in entry else str(entry)
                tell(f"{cell[0]:8} {cell[1]:9} T={cell[2]:<5} {name:24} {what}")
            if not alive(session.device):
                return session.restart()
            release(session.device)
    told(session)
    return 0


if __name__ == "__main__":
    sys.exit(main())
