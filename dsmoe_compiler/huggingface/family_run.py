"""One family: a tiny model in eager and after the passes, which layers fused, and how far the numbers are off.

    python -m dsmoe_compiler.huggingface.family_run qwen3_moe gpt_oss        # one row of JSON a line

No Inductor: the graphs run as the passes left them. The budget is that of `dsmoe_runtime.agreement`: twice what
transformers' eager loop is off from float64, in the same dtype, row by row.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

from dsmoe_compiler.huggingface.explaining import explained_call
from dsmoe_compiler.huggingface.family_models import build, prompt
from dsmoe_runtime.agreement import FACTOR, row_error, within_budget

SENSIBLE = 1e-4  # a budget in float32 beyond which float64 was not the same model
NEAR = FACTOR * 64 * torch.finfo(torch.float32).eps  # of eager itself, where float64 cannot be asked


@dataclass(frozen=True)
class Row:
    """A family's line of the page: layers seen, those whose experts, gate too, or all in one operator are fused.

    `error` and `budget` are those of the row of the output that uses most of its budget.
    """

    family: str
    model: str = ""
    seen: int = 0
    fused: int = 0
    gated: int = 0
    whole: int = 0
    gate: str = ""
    experts: str = ""
    error: float | None = None
    budget: float | None = None
    ok: bool = False
    reason: str = ""

    @property
    def state(self) -> str:
        """One word for the page."""
        if not self.model:
            return "not run"
        if self.error is not None and not self.ok:
            return "wrong"
        if self.seen and self.gated == self.seen:
            return "fused"
        if self.seen and self.fused == self.seen:
            return "experts only"
        return "partly" if self.fused else "left alone"


def survey(family: str) -> Row:
    """Build, run, compile and compare one family; what goes wrong is the row's reason."""
    try:
        model = build(family)
    except (ValueError, ImportError) as error:
        return Row(family, reason=f"no tiny model of it could be built: {error}")
    name = type(model).__name__
    try:
        eager = _logits(model, "eager")
    except Exception as error:  # a model that does not run tells nothing about us
        return Row(family, reason=f"{name} does not run in eager at these sizes: {_line(error)}")
    try:
        model.set_experts_implementation(None)  # type: ignore[operator]  # transformers' own default
        with torch.no_grad():
            explanation, output = explained_call(model, {"input_ids": prompt(), "use_cache": False}, run=True)
    except Exception as error:
        return Row(family, name, reason=f"torch.compile fails: {_line(error)}")
    actual = _tensor(output)
    verdict_ok, worst, budget, note = _judge(family, actual, eager)
    layers = explanation.layers
    reasons = [f"{layer.advice}: {layer.reason}" if layer.advice else layer.reason for layer in layers if layer.reason]
    return Row(
        family,
        name,
        len(layers),
        sum(layer.fused for layer in layers),
        sum(layer.fused and layer.gate is not None for layer in layers),
        sum(layer.operator == "dsmoe::moe" for layer in layers),
        _joined(layer.gate for layer in layers),
        _joined(layer.experts for layer in layers),
        worst,
        budget,
        verdict_ok,
        _joined([*reasons, note, *explanation.notes]),
    )


def _judge(family: str, actual: Tensor, eager: Tensor) -> tuple[bool, float, float, str]:
    """Within budget, the error and budget of the worst row, and a remark if float64 could not be asked."""
    try:
        exact = _logits(build(family).double(), "eager")
    except Exception as error:  # some models have float32 written into them
        worst, note = float(row_error(actual, eager).max()), f"against eager: float64 does not run ({_line(error)})"
        return worst <= NEAR, worst, NEAR, note
    verdict = within_budget(actual.flatten(0, -2), eager=eager.flatten(0, -2), exact=exact.flatten(0, -2))
    if verdict.budget > SENSIBLE:
        note = f"eager itself is off float64 by {float(row_error(eager, exact).max()):.1e}: the budget says nothing"
        return verdict.ok and float(row_error(actual, eager).max()) <= NEAR, verdict.worst, verdict.budget, note
    return verdict.ok, verdict.worst, verdict.budget, ""


def _logits(model: nn.Module, experts_implementation: str) -> Tensor:
    model.set_experts_implementation(experts_implementation)  # type: ignore[operator]
    with torch.no_grad():
        return _tensor(model(input_ids=prompt(), use_cache=False))


def _tensor(output: Any) -> Tensor:
    logits = getattr(output, "logits", None)
    return logits if logits is not None else output[0]


def _joined(parts: Any) -> str:
    return "; ".join(dict.fromkeys(part for part in parts if part))


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:160]}"


def main(names: list[str]) -> None:
    """Print the rows of `names`, one a line, each as soon as it is there."""
    import warnings

    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    for family in names:
        print(json.dumps(asdict(survey(family))), flush=True)
        torch._dynamo.reset()


if __name__ == "__main__":
    main(sys.argv[1:])
