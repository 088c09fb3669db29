"""Time and memory of the candidates that agree, phase by phase, each phase in turn over all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from dsmoe_compiler.compare.agree import Trace
from dsmoe_compiler.compare.candidates import Candidate
from dsmoe_compiler.compare.load import distinct_experts
from dsmoe_compiler.compare.memory import peak_memory
from dsmoe_compiler.compare.result import Measurement, PhaseWork
from dsmoe_compiler.compare.roofline import Roof, phase_work
from dsmoe_compiler.compare.timing import interleave, stopwatch
from dsmoe_model.transformer import Transformer


@dataclass(frozen=True)
class Plan:
    """The fixed problem: `ids_BS` holds enough tokens for every prefill and for `steps` decoded after `context`."""

    ids_BS: Tensor
    tokens: tuple[int, ...]
    context: int
    steps: int
    repeats: int

    @property
    def batch(self) -> int:
        return self.ids_BS.shape[0]

    @property
    def points(self) -> tuple[tuple[str, int], ...]:
        """(phase, new tokens per sequence and call), in the order of reporting."""
        return (*(("prefill", length) for length in self.tokens), ("decode", 1))


def least_work(model: Transformer, roof: Roof, plan: Plan, reference: Trace) -> dict[tuple[str, int], PhaseWork]:
    """The roofline of every point, with the experts that eager's routing hit; for decode the mean over the steps."""
    n_experts, found = model.config.n_routed_experts, {}
    for (phase, tokens), call in zip(plan.points, reference.calls, strict=True):
        experts_LBSK = call[3]
        assert experts_LBSK is not None
        if phase == "prefill":
            distinct = distinct_experts(experts_LBSK.flatten(1, 2), n_experts=n_experts)
            context = tokens
        else:
            steps = [
                distinct_experts(experts_LBSK[:, :, step], n_experts=n_experts)
                for step in range(plan.context, plan.context + plan.steps)
            ]
            distinct = tuple(round(sum(layer) / plan.steps) for layer in zip(*steps, strict=True))
            context = plan.context + (plan.steps + 1) // 2
        work = phase_work(model, roof, batch=plan.batch, tokens=tokens, context=context, distinct=distinct)
        found[phase, tokens] = PhaseWork(phase=phase, tokens=tokens, context=context, distinct=distinct, work=work)
    return found


def measure(
    candidates: list[Candidate],
    plan: Plan,
    works: dict[tuple[str, int], PhaseWork],
    tell: Callable[[str], None],
) -> dict[str, tuple[Measurement, ...]]:
    """All points of all candidates, by name; a speed-up needs "eager" among them."""
    taken: dict[str, list[Measurement]] = {candidate.name: [] for candidate in candidates}
    for phase, tokens in plan.points:
        tell(f"timing {phase}" + (f" of {tokens} tokens" if phase == "prefill" else f", {plan.steps} steps"))
        prefilled = tokens if phase == "prefill" else plan.context
        refusals = {c.name: c.refuses(plan.batch * prefilled) for c in candidates}
        running = [c for c in candidates if refusals[c.name] is None]
        timed = interleave({c.name: timed_run(c, phase, tokens, plan) for c in running}, repeats=plan.repeats)
        for candidate in candidates:
            work = works[phase, tokens]
            samples = timed.get(candidate.name)
            if samples is None:
                point = Measurement(
                    phase=phase, tokens=tokens, context=work.context, samples=None, skipped=refusals[candidate.name]
                )
            else:
                call = _call(candidate, phase, tokens, plan)
                eager = timed.get("eager")
                point = Measurement(
                    phase=phase,
                    tokens=tokens,
                    context=work.context,
                    samples=samples,
                    tokens_per_second=plan.batch * tokens / samples.median,
                    speedup=eager.median / samples.median if eager else None,
                    roofline_share=work.work.seconds / samples.median,
                    memory=peak_memory(call, plan.ids_BS.device),
                )
            taken[candidate.name].append(point)
    return {name: tuple(points) for name, points in taken.items()}


def _call(candidate: Candidate, phase: str, tokens: int, plan: Plan) -> Callable[[], object]:
    """One prefill into a new cache, or a block of decode steps; making the cache and filling the prompt happen here."""
    cache = candidate.new_cache()
    if phase == "prefill":
        return lambda: candidate.prefill(plan.ids_BS[:, :tokens], cache)
    candidate.prefill(plan.ids_BS[:, : plan.context], cache)

    def steps() -> None:
        for position in range(plan.context, plan.context + plan.steps):
            candidate.decode(plan.ids_BS[:, position : position + 1], position, cache)

    return steps


def timed_run(candidate: Candidate, phase: str, tokens: int, plan: Plan) -> Callable[[], float]:
    """What `interleave` takes: prepare, run, and give the seconds of one prefill or of one decode step."""
    blocks = plan.steps if phase == "decode" else 1
    return lambda: stopwatch(_call(candidate, phase, tokens, plan), plan.ids_BS.device) / blocks
