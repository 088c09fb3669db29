"""Steps of a model in ONNX Runtime on one H200: four layers of deepseek-moe-16b, random weights.

    python -m benchmarks.onnx_model
    python -m benchmarks.onnx_model --dtypes bfloat16 --tokens 1 4096 --profiles ort-cuda

One token behind --context positions, or a prompt. Ours is what `dsmoe compile --format onnx --profile ort-cuda`
writes, decode.onnx for the one token; beside it the profile ort-contrib (com.microsoft.MoE), and the compiler's own
graphs through Inductor, all in CUDA graphs where they can be captured. Logits are judged against float32 with the
candidate's own experts. Results: benchmarks/results/onnx_model_h200.json.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import gpu_model_candidates as candidates
from benchmarks.gpu_model import decode_bytes, prefill_flop
from benchmarks.gpu_timing import (
    BANDWIDTH,
    MATRIX_RATE,
    Replay,
    Session,
    failure,
    interleave,
    parsed,
    parser,
    release,
    summary,
    tell,
    told,
)
from benchmarks.onnx_binding import replay
from dsmoe_compiler import CompileConfig
from dsmoe_compiler.api import compile as compile_model
from dsmoe_compiler.targets.onnx.opening import DECODE, MODEL
from dsmoe_compiler.targets.onnx.runner import library_of
from dsmoe_compiler.targets.onnx.session import open_session
from dsmoe_model.presets import PRESETS
from dsmoe_model.transformer import Transformer, build
from dsmoe_runtime.agreement import within_budget

LAYERS = 4
OURS, CONTRIB, TORCH = "ort-cuda onnxruntime", "ort-contrib onnxruntime", "dsmoe torch"
Made = tuple[Replay, candidates.Answer]


def step(folder: Path, problem: candidates.Problem, model: Transformer, *, context: int, graph: bool) -> Made:
    """One step over memory of torch's; captured ones are replayed from now on.

    One token goes through decode.onnx, if there is one: keys and values are written in place, into one of all the slots
    that the model knows. Those of model.onnx grow by a copy.
    """
    config, device, (batch, length) = model.config, problem.ids.device, problem.ids.shape
    past = context if problem.position is not None else 0
    one = problem.position is not None and (folder / DECODE).is_file()
    given, taken = {"input_ids": problem.ids}, dict[str, Tensor]()
    given |= {"position": problem.position} if one else {}
    for number, (key, value) in enumerate(zip(problem.cache.key, problem.cache.value, strict=True)):
        for side, tensor in (("key", key), ("value", value)):
            held = tensor[:, :, :past].contiguous()
            now = held.new_empty(batch, held.shape[1], past + length, held.shape[3])
            if one:
                now = held = F.pad(held, (0, 0, 0, config.max_position_embeddings - past))
            given[f"past_key_values.{number}.{side}"] = held
            taken[f"present.{number}.{side}"] = now
    logits = torch.full((batch, config.vocab_size), torch.nan, device=device)
    layers = sum(config.is_moe_layer(i) for i in range(config.num_hidden_layers))
    experts = torch.empty(layers, batch * length, config.num_experts_per_tok, dtype=torch.int64, device=device)
    taken |= {"logits": logits, "experts": experts}
    file, library = folder / (DECODE if one else MODEL), library_of(folder, False)
    session = open_session(file, device, library=library, graph=graph)
    return replay(session, given, taken, device), (logits, experts)


def export(model: Transformer, profile: str, folder: Path, device: torch.device) -> Path:
    """As `dsmoe compile --format onnx` writes it, without its proof: the cells judge."""
    options: dict[str, Any] = {"profile": profile, "functions": profile != "ort-cuda"}
    if device.type == "cpu":
        options = {}
    config = CompileConfig(target=device.type, formats=("onnx",), verify=False, **options)
    return compile_model(model, config=config, progress=lambda _: None).save(folder / profile)


def run_cell(
    session: Session, model: Transformer, exact: candidates.Exact, ours: candidates.Ours, folders: dict[str, Path],
    dtype: str, tokens: int,
) -> dict[str, Any]:  # fmt: skip
    """All candidates for one number of tokens: made, judged, then timed in turn."""
    start, arguments, device = time.perf_counter(), session.arguments, session.device
    context, phase = arguments.context, "decode" if tokens == 1 else "prefill"
    problem = candidates.make_problem(model, phase, tokens, context)
    eager, chosen = candidates.reference(model, problem)
    assert chosen is not None
    exact_eager = exact.logits(problem, chosen)
    record: dict[str, Any] = {
        "part": "model",
        "dtype": dtype,
        "tokens": tokens,
        "layers": LAYERS,
        "candidates": {},
    }
    least = decode_bytes(model.config, 1, context, chosen) / BANDWIDTH
    least = least if phase == "decode" else prefill_flop(model.config, tokens) / MATRIX_RATE
    record |= {"context": context if phase == "decode" else 0, "bound_us": 1e6 * least}

    def torch_path() -> Made:
        call = ours.call(problem)
        return Replay([call], device), call()

    def onnx(folder: Path, entry: dict[str, Any]) -> Made:
        try:
            entry["graph"] = True
            return step(folder, problem, model, context=context, graph=True)
        except Exception as error:
            entry |= {"graph": False, "capture_error": failure(error)}
            return step(folder, problem, model, context=context, graph=False)

    makers: dict[str, Callable[[dict[str, Any]], Made]] = {
        f"{profile} onnxruntime": lambda entry, folder=folder: onnx(folder, entry)  # type: ignore[misc]
        for profile, folder in folders.items()
    }
    makers[TORCH] = lambda _: torch_path()
    replays: dict[str, Replay] = {}
    for name, make in makers.items():
        if arguments.candidates and name not in arguments.candidates:
            continue
        entry = record["candidates"][name] = {}
        try:
            replay, (logits, experts) = make(entry)
            assert experts is not None
            truth = exact.logits(problem, experts)
            found = within_budget(logits.float(), eager=eager.float(), exact=truth, exact_eager=exact_eager)
            ok = found.ok and bool(logits.isfinite().all())
            entry["agreement"] = {"ok": ok, "worst": found.worst, "budget": found.budget, "rows": found.rows}
            if ok or arguments.disagreeing:
                replays[name] = replay
        except Exception as error:  # one candidate's failure must not cost the others their measurement
            entry["error"] = failure(error)
    for name, seconds in interleave(replays, arguments.repeats).items():
        entry = record["candidates"][name]
        entry |= summary(seconds)
        entry["share_of_bound"] = record["bound_us"] / entry["median_us"]
    medians = {name: entry.get("median_us") for name, entry in record["candidates"].items()}
    for name, key in ((CONTRIB, "over_contrib"), (TORCH, "over_torch")):
        if (other := medians.get(name)) and (mine := medians.get(OURS)):
            record[key] = mine / other
    record["seconds"] = round(time.perf_counter() - start, 1)
    return record


def run_dtype(session: Session, model: Transformer, dtype: str) -> None:
    """All cells of one dtype: the model is exported once for each profile."""
    arguments, device = session.arguments, session.device
    with tempfile.TemporaryDirectory() as scratch:
        folders = dict[str, Path]()
        for profile in arguments.profiles:
            start = time.perf_counter()
            folders[profile] = export(model, profile, Path(scratch), device)
            tell(f"{dtype} {profile}: exported in {time.perf_counter() - start:.1f} s")
        model = model.to(device)
        exact, ours = candidates.Exact(model), candidates.Ours(model, compiled=arguments.compile)
        for tokens in arguments.tokens:
            if session.deadline.left < 0:
                tell(f"no time left for {dtype} T={tokens}; --update measures it")
                break
            record = run_cell(session, model, exact, ours, folders, dtype, tokens)
            session.keep(record)
            for name, entry in record["candidates"].items():
                tell(f"{dtype} T={tokens:<5} {name:24} {entry.get('median_us', entry)}")
            release(device)


def main() -> int:
    import onnxruntime

    made = parser(__doc__ or "", budget=240)
    made.add_argument("--shape", default="deepseek-moe-16b", choices=PRESETS, help="whose layers")
    made.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16"], help="float32 to try it on a CPU")
    made.add_argument("--tokens", nargs="+", type=int, default=[1, 4096, 16, 256])
    made.add_argument("--profiles", nargs="+", default=["ort-cuda", "ort-contrib"])
    made.add_argument("--context", type=int, default=512, help="positions before the one token")
    arguments = parsed(made)
    torch.set_grad_enabled(False)
    session = Session("onnx_model", arguments, ("part", "dtype", "tokens"))
    session.record["environment"]["onnxruntime"] = onnxruntime.__version__
    session.record |= {"limit_over_contrib": 1.0, "limit_over_torch": 1.1}
    device, config = session.device, replace(PRESETS[arguments.shape], num_hidden_layers=LAYERS)
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream(device))  # ONNX Runtime captures no default stream
    for dtype in arguments.dtypes:
        run_dtype(session, build(config, dtype=getattr(torch, dtype), device=device, seed=0), dtype)
        release(device)
    told(session)
    return 0


if __name__ == "__main__":
    sys.exit(main())
