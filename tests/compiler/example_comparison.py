"""A comparison made by hand, for tests of the table and the report: plausible numbers, nothing measured."""

from dsmoe_compiler.compare.load import LayerLoad
from dsmoe_compiler.compare.memory import Memory
from dsmoe_compiler.compare.result import (
    BatchEffect,
    CandidateAgreement,
    CandidateReport,
    Comparison,
    Measurement,
    PhaseWork,
)
from dsmoe_compiler.compare.roofline import Roof, Work
from dsmoe_compiler.compare.timing import Samples
from dsmoe_runtime.agreement import Agreement, RoutingAgreement

SPEED = {"eager": 1.0, "inductor": 1.3, "hf-grouped": 1.7, "dsmoe": 3.1}
TITLE = {
    "eager": "eager PyTorch",
    "inductor": "torch.compile",
    "hf-grouped": "transformers grouped_mm",
    "dsmoe": "dsmoe",
}
POINTS = (("prefill", 1, 1), ("prefill", 16, 16), ("prefill", 256, 256), ("decode", 1, 272))


def example(
    *, model: str = "preset deepseek-moe-tiny, seed 0", layer: str = "layers", reason: str = "", experts: int = 32
) -> Comparison:
    """Ours at 3.1 times eager everywhere; one candidate absent with `reason`, one layer left alone."""
    work = tuple(_work(*point) for point in POINTS)
    measured = tuple(_candidate(name, work) for name in SPEED)
    absent = CandidateReport(
        name="hf-batched", title="transformers batched_mm", state="absent", reason=reason or "no room"
    )
    names = [f"{layer}.{index}.mlp" for index in range(1, 8)]
    fused = {"fused": True, "pattern": "softmax, top-4", "operator": "dsmoe::moe", "kernel": "cpu", "reason": None}
    alone = {"fused": False, "pattern": "router", "operator": None, "kernel": "as captured", "reason": reason or "bias"}
    checks = [{"name": "values", "ok": True, "detail": "row 3 is off by 6.1e-07, budget 1.4e-06"}]
    return Comparison(
        model=model,
        dtype="float32",
        target="cpu",
        batch_size=1,
        parameters=16_080_128,
        tokens=(1, 16, 256),
        decode_context=256,
        decode_steps=32,
        repeats=7,
        inputs="English prose, 1 x 288 tokens",
        candidates=(*measured[:3], absent, measured[3]),
        roof=Roof(bytes_per_second=21e9, flops_per_second=160e9, dtype="float32"),
        work=work,
        load=tuple(_load(name, index, experts) for index, name in enumerate(names)),
        layers=(*({"name": name, **fused} for name in names[:-1]), {"name": names[-1], **alone}),
        verification={"ok": True, "checks": checks, "first_diverging_layer": None},
        environment={
            "date": "2026-01-01",
            "command": "dsmoe compare deepseek-moe-tiny",
            "cpu": "AMD EPYC",
            "threads": "2",
        },
    )


def _work(phase: str, tokens: int, context: int) -> PhaseWork:
    distinct = (min(32, 4 * tokens), min(32, 3 * tokens + 1))
    bytes_, flops = 8_000_000 + sum(distinct) * 590_000, tokens * 16_000_000
    memory, compute = bytes_ / 21e9, flops / 160e9
    bound = "memory" if memory > compute else "compute"
    work = Work(bytes=bytes_, flops=flops, seconds=max(memory, compute), bound=bound)
    return PhaseWork(phase=phase, tokens=tokens, context=context, distinct=distinct, work=work)


def _candidate(name: str, work: tuple[PhaseWork, ...]) -> CandidateReport:
    measurements = []
    for item in work:
        middle = item.work.seconds / 0.09 / SPEED[name] * (1 + 0.002 * item.tokens)
        samples = Samples.of([middle * (1 + 0.03 * ((7 * k) % 5 - 2)) for k in range(7)])
        measurements.append(
            Measurement(
                phase=item.phase,
                tokens=item.tokens,
                context=item.context,
                samples=samples,
                tokens_per_second=item.tokens / samples.median,
                speedup=SPEED[name],
                roofline_share=item.work.seconds / samples.median,
                memory=Memory(peak_bytes=900_000_000, working_bytes=4_200_000),
            )
        )
    errors = tuple(4e-7 * (1 + 0.4 * ((11 * k) % 7) / 7) * (1.2 if name == "eager" else 1.0) for k in range(36))
    lazy = {"inductor": 92.0, "dsmoe": 41.0}.get(name)
    return CandidateReport(
        name=name,
        title=TITLE[name],
        state="measured",
        note="31 graphs, 96 graph breaks" if name == "inductor" else None,
        compile_seconds=lazy,
        break_even_tokens={"inductor": 41_000, "dsmoe": 6_200}.get(name),
        agreement=CandidateAgreement(
            ok=True,
            values=Agreement(True, 3, max(errors), 1.4e-6, 0, len(errors)),
            routing=tuple(RoutingAgreement(True, 561, 0, 0, 0, -0.01, 1e-6, 0.0) for _ in range(7)),
            routing_reported=True,
            errors=errors,
            eager_errors=errors,
            greedy_equal=len(errors),
            repeatable=True,
            batch_effect=BatchEffect(tokens=32, flips=0, error=5e-7),
        ),
        measurements=tuple(measurements),
    )


def _load(name: str, index: int, experts: int) -> LayerLoad:
    counts = tuple(
        (37 * (expert + 3) * (index + 2)) % 71 * (0 if (expert * 5 + index) % 17 == 0 else 1)
        for expert in range(experts)
    )
    hottest = max(range(experts), key=counts.__getitem__)
    distinct = sum(count > 0 for count in counts)
    share = counts[hottest] / sum(counts)
    return LayerLoad(
        name=name, counts=counts, distinct=distinct, entropy=0.94, gini=0.31, hottest=hottest, hottest_share=share
    )
