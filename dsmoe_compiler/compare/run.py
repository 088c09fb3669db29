"""`compare`: the same model four or five ways, first whether it is the same, then how fast.

Order of things: build the candidates, run each twice on fixed inputs and judge it, measure the machine's roof, then
time those that agree in turn, prefill and decode apart. A candidate that disagrees is reported and never timed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from dsmoe_compiler.compare.agree import Impossible, Judge, Trace, batch_effect, run_trace
from dsmoe_compiler.compare.candidates import TITLES, Absent, Candidate, Compiled, HuggingFace, Reference, stock_dynamo
from dsmoe_compiler.compare.conditions import conditions
from dsmoe_compiler.compare.inputs import fixed_inputs
from dsmoe_compiler.compare.load import expert_load, routed_layers
from dsmoe_compiler.compare.measure import Plan, least_work, measure
from dsmoe_compiler.compare.ours import compiled, facts_of, through_mlir
from dsmoe_compiler.compare.result import CandidateAgreement, CandidateReport, Comparison, Measurement
from dsmoe_compiler.compare.roofline import measure_roof
from dsmoe_compiler.compare.timing import Samples
from dsmoe_compiler.loading import Loaded
from dsmoe_model.transformer import Transformer

AGAINST = ("eager", "inductor", "mlir", "hf-grouped", "hf-batched")
_HF = {"hf-grouped": "grouped_mm", "hf-batched": "batched_mm"}
_log = logging.getLogger(__name__)


def compare(
    loaded: Loaded,
    *,
    against: tuple[str, ...] = AGAINST,
    tokens: tuple[int, ...] = (1, 16, 256),
    decode_steps: int = 32,
    dtype: str | None = None,
    target: str | None = None,
    repeats: int = 7,
    runner: Any = None,
    compile_seconds: float | None = None,
    progress: Callable[[str], None] | None = None,
) -> Comparison:
    """Compare `loaded` as compiled by dsmoe with the candidates in `against` (eager always takes part: it is the unit).

    tokens           prefill lengths per sequence
    decode_steps     tokens decoded one by one after a prompt of the longest of `tokens`, cut to what the cache holds
    dtype, target    what the model must have been loaded as ("bfloat16", "cuda", ...); None: whatever it is
    repeats          timed rounds, after one that is not kept
    runner           the compiled model; None: compile it here, with `compile_seconds` measured
    progress         called with one line per step

    "hf" in `against` stands for both of transformers' implementations. Raises ValueError for names that do not exist,
    lengths that do not fit, or a dtype or target that is not the model's.
    """
    model, tell = loaded.model, progress or _log.info
    names = _names(against)
    _check(model, tokens, decode_steps, dtype, target, repeats)
    device, longest = model.norm.weight.device, max(tokens)
    capacity = min(loaded.config.max_position_embeddings, longest + decode_steps)
    fresh = compiled(loaded, capacity=capacity, tell=tell) if runner is None else nullcontext((runner, compile_seconds))
    with torch.no_grad(), fresh as (runner, compile_seconds), stock_dynamo():
        batch, capacity = runner.batch_size, runner.capacity
        context = min(longest, capacity - decode_steps)
        if longest > capacity or context < 1:
            raise ValueError(
                f"prefill of {longest} tokens and {decode_steps} decode steps do not fit into a cache of {capacity} "
                "positions: ask for fewer, or compile with a larger max_seq_len"
            )
        ids_BS, inputs = fixed_inputs(loaded, batch=batch, length=max(longest, context + decode_steps))
        plan = Plan(ids_BS, tokens, context, decode_steps, repeats)
        reports: dict[str, CandidateReport] = {}
        agreeing: list[Candidate] = []
        judge, reference = Judge(model), None
        for name in (*names, "dsmoe"):
            tell(f"checking {TITLES[name]}")
            try:
                candidate = _build(name, model, runner, batch=batch, capacity=capacity)
                report, trace = _examine(candidate, judge, plan)
            except Absent as absent:
                reports[name] = CandidateReport(name=name, title=TITLES[name], state="absent", reason=str(absent))
                continue
            except Impossible as wrong:
                reports[name] = CandidateReport(name=name, title=TITLES[name], state="disagrees", reason=str(wrong))
                continue
            except Exception as error:  # somebody else's code, compiled by somebody else's compiler: its row says so
                _log.debug("%s failed", name, exc_info=True)
                reports[name] = CandidateReport(
                    name=name, title=TITLES[name], state="failed", reason=_first_line(error)
                )
                continue
            reports[name] = report
            if report.state == "measured":
                agreeing.append(candidate)
            if name == "eager":
                reference = trace
        if reference is None:
            raise ValueError(f"the eager reference itself does not run: {reports['eager'].reason}")
        tell("measuring bandwidth and GEMM rate")
        roof = measure_roof(device, model.norm.weight.dtype)
        works = least_work(model, roof, plan, reference)
        measurements = measure(agreeing, plan, works, tell)
    seconds = {"dsmoe": compile_seconds} if compile_seconds is not None else {}
    layers, verification = facts_of(runner)
    routed = list(routed_layers(model))
    chosen_LBSK = reference.calls[-1][3]
    assert chosen_LBSK is not None
    return Comparison(
        model=loaded.source,
        dtype=str(model.norm.weight.dtype).removeprefix("torch."),
        target=device.type,
        batch_size=batch,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        tokens=tokens,
        decode_context=context,
        decode_steps=decode_steps,
        repeats=repeats,
        inputs=inputs,
        candidates=tuple(_with_measurements(report, measurements, seconds) for report in reports.values()),
        roof=roof,
        work=tuple(works.values()),
        load=expert_load(chosen_LBSK.flatten(1, 2), routed, n_experts=loaded.config.n_routed_experts) if routed else (),
        layers=layers,
        verification=verification,
        environment=conditions(device),
    )


def _names(against: tuple[str, ...]) -> tuple[str, ...]:
    names: list[str] = ["eager"]
    for name in against:
        if name not in (*AGAINST, "hf"):
            raise ValueError(f"nothing to compare with is called {name!r}; there are hf, {', '.join(AGAINST)}")
        names += _HF if name == "hf" else [name]
    return tuple(dict.fromkeys(names))


def _check(
    model: Transformer, tokens: tuple[int, ...], steps: int, dtype: str | None, target: str | None, repeats: int
) -> None:
    weight = model.norm.weight
    if not tokens or min(tokens) < 1 or steps < 1 or repeats < 1:
        raise ValueError(f"tokens {tokens}, decode_steps {steps} and repeats {repeats} must all be at least 1")
    if dtype is not None and f"torch.{dtype}" != str(weight.dtype):
        raise ValueError(f"dtype {dtype} was asked for, the model is {weight.dtype}: load it in the dtype to compare")
    if target is not None and target != weight.device.type:
        raise ValueError(f"target {target} was asked for, the model is on {weight.device}: load it there")


def _build(name: str, model: Transformer, runner: Any, *, batch: int, capacity: int) -> Candidate:
    if name == "dsmoe":
        return Compiled(runner)
    if name in _HF:
        return HuggingFace(model, _HF[name])
    if name == "mlir":
        return through_mlir(model, batch=batch, capacity=capacity)
    return Reference(model, batch=batch, capacity=capacity, compiled=name == "inductor")


def _examine(candidate: Candidate, judge: Judge, plan: Plan) -> tuple[CandidateReport, Trace]:
    """Run twice, judge, and take the first run's extra time for compilation where the candidate compiles as it goes."""
    if (refusal := candidate.refuses(plan.batch * plan.context)) is not None:
        raise Absent(refusal)
    graphs = _dynamo_counts()
    first, second = (
        run_trace(candidate, plan.ids_BS, tokens=plan.tokens, context=plan.context, steps=plan.steps) for _ in range(2)
    )
    effect = batch_effect(candidate, plan.ids_BS[:, : plan.context + plan.steps], second)
    agreement = judge.judge(first, second, effect)
    note, lazy = None, candidate.name == "inductor"
    if lazy:
        made, broken = (after - before for after, before in zip(_dynamo_counts(), graphs, strict=True))
        note = f"{made} graphs, {broken} graph breaks"
    report = CandidateReport(
        name=candidate.name,
        title=TITLES[candidate.name],
        state="measured" if agreement.ok else "disagrees",
        reason=None if agreement.ok else _disagreement(agreement),
        note=note,
        compile_seconds=max(0.0, first.seconds - second.seconds) if lazy else made_in(candidate),
        agreement=agreement,
    )
    return report, first


def made_in(candidate: Candidate) -> float | None:
    """The seconds that it took to compile a candidate that was compiled before it ran, where they were measured."""
    return candidate.compile_seconds if isinstance(candidate, Compiled) else None


def _disagreement(agreement: CandidateAgreement) -> str:
    if not agreement.values.ok:
        return f"logits: {agreement.values}"
    layer = next(index for index, verdict in enumerate(agreement.routing) if not verdict.ok)
    return f"routing of MoE layer {layer}: {agreement.routing[layer]}"


def _with_measurements(
    report: CandidateReport, measurements: dict[str, tuple[Measurement, ...]], seconds: dict[str, float]
) -> CandidateReport:
    report = replace(
        report,
        measurements=measurements.get(report.name, ()),
        compile_seconds=seconds.get(report.name, report.compile_seconds),
    )
    eager, mine = (_decode_samples(measurements.get(name, ())) for name in ("eager", report.name))
    if report.compile_seconds is None or eager is None or mine is None:
        return report
    saved = eager.median - mine.median
    pays = saved > max(eager.sd, mine.sd)
    return replace(report, break_even_tokens=math.ceil(report.compile_seconds / saved) if pays else None)


def _decode_samples(measurements: tuple[Measurement, ...]) -> Samples | None:
    return next((m.samples for m in measurements if m.phase == "decode"), None)


def _dynamo_counts() -> tuple[int, int]:
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__
