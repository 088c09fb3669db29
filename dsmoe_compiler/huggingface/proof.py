"""The proof for a transformers model: its artifact against its own eager code, and both against float64.

Eager runs with the plain loop over experts, which is its authors' specification. The float64 pass borrows the weights a
layer at a time, does in float64 what the code asks for in float32, and takes the experts that it is told to: the top-k
of each router is answered with them, so that ours and eager's are each judged with the experts that they chose.

B sequences, S positions, E experts, K experts per token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from dsmoe_compiler.config import CompileConfig
from dsmoe_compiler.huggingface.folder import Pretrained, experts_run_as, stacked_experts
from dsmoe_compiler.huggingface.phases import Decode, Prefill, Shapes, cache_of, empty_cache, prompt_layer
from dsmoe_compiler.verify import probes
from dsmoe_compiler.verify.exact import Exact
from dsmoe_compiler.verify.result import Check, Verification
from dsmoe_compiler.verify.trace import RunnerLike, Trace, cache_rows, run
from dsmoe_compiler.verify.whole import check_cache, check_greedy, check_logits, check_repeat
from dsmoe_model.attention import KVCache
from dsmoe_runtime.agreement import OWN_KERNELS, Allowance

SPARE = 2  # choices that may differ from float64's where eager has none
TOPK = {torch.topk, Tensor.topk}
Sizes = list[tuple[int, int]]  # experts and top-k of each layer with routed experts


def prove(
    pretrained: Pretrained, runner: RunnerLike, shapes: Shapes, sizes: Sizes, *, config: CompileConfig,
    progress: Callable[[str], None], allowance: Allowance = OWN_KERNELS,
) -> Verification:  # fmt: skip
    """Compare `runner`, the artifact on its target, with the eager model in the same dtype, and both with float64.

    `sizes` of the layers whose experts the artifact reports; `allowance` as of `verify`. Raises nothing for a
    difference: see `Verification.ok`.
    """
    start = time.perf_counter()
    model = pretrained.model
    plan = probes(pretrained.vocab_size, batch=runner.batch_size, capacity=runner.capacity, seed=config.seed)
    with experts_run_as(model, "eager"):
        progress("verify: eager")
        reference = Eager(pretrained, shapes, sizes)
        eager = [run(reference, p.to(pretrained.device), reference.new_cache(), steps=n) for p, n in plan]
        progress("verify: artifact")
        ours = [follow(runner, trace, runner.new_cache()) for trace in eager]
        used = runner.new_cache()
        again = [follow(runner, trace, used) for trace in reversed(eager)][::-1]
        progress("verify: float64")
        turns = reference.turns
        exact, natural = zip(*(exact_of(pretrained, shapes, trace, sizes, turns) for trace in ours), strict=True)
        exact_eager, natural_eager = zip(
            *(exact_of(pretrained, shapes, trace, sizes, turns) for trace in eager), strict=True
        )
    routing = check_choices(ours, eager, natural, natural_eager)
    checks = [
        check_cache(ours, eager, exact, exact_eager, allowance),
        check_logits(ours, eager, exact, exact_eager, allowance),
        routing,
        check_greedy(ours, eager, exact if routing.ok else exact_eager, exact_eager),
        check_repeat(ours, again),
    ]
    accused = [check.layer for check in checks if check.layer is not None]
    return Verification(
        checks=tuple(checks), first_diverging_layer=f"layers.{min(accused)}" if accused else None,
        dtype=str(pretrained.dtype).removeprefix("torch."), device=str(pretrained.device),
        seconds=time.perf_counter() - start,
    )  # fmt: skip


class Eager:
    """The model's own code behind a runner's interface; the experts are read off the top-k of its routers."""

    def __init__(self, pretrained: Pretrained, shapes: Shapes, sizes: Sizes) -> None:
        self.pretrained, self.shapes, self.sizes = pretrained, shapes, sizes
        self.turns = turns_of(pretrained, sizes)
        self.batch_size, self.capacity = shapes[0][0][0], shapes[0][0][2]

    def new_cache(self) -> KVCache:
        """An empty cache."""
        return empty_cache(self.shapes, self.pretrained.dtype, self.pretrained.device)

    def prefill(self, ids_BS: Tensor, cache: KVCache) -> tuple[Tensor, list[Tensor]]:
        """Logits `[B, V]` of the last position and the experts `[B*S, K]` of every layer."""
        return self._watched(Prefill(self.pretrained.model), ids_BS, cache)

    def decode(self, ids_B1: Tensor, position: int, cache: KVCache) -> tuple[Tensor, list[Tensor]]:
        """The same for one token at `position`."""
        place = torch.tensor([position], device=ids_B1.device)
        return self._watched(Decode(self.pretrained.model), ids_B1, place, cache)

    def _watched(self, phase: nn.Module, *inputs: Any) -> tuple[Tensor, list[Tensor]]:
        *given, cache = inputs
        with Routers(self.sizes, self.turns) as routers:
            logits = phase(*given, cache.key, cache.value)[0]
        return logits, routers.chosen


class Routers(TorchFunctionMode):
    """While open, the top-k of each router in turn is kept, and answered with `forced` where that is given.

    `turns`: which of the calls that take K of E scores are those, see `turns_of`. `exact`: float32 means float64.
    """

    def __init__(
        self, sizes: Sizes, turns: list[bool], forced: Sequence[Tensor] | None = None, *, exact: bool = False
    ) -> None:
        super().__init__()
        self.sizes, self.turns, self.forced, self.exact = sizes, turns, forced, exact
        self.chosen: list[Tensor] = []
        self.seen = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.exact:
            func = Tensor.double if func is Tensor.float else func
            args, kwargs = pytree.tree_map(lambda a: torch.float64 if a is torch.float32 else a, (args, kwargs))
        result = func(*args, **kwargs)
        if func not in TOPK or (args[0].shape[-1], result[1].shape[-1]) not in self.sizes:
            return result
        self.seen += 1
        if not self.turns[self.seen - 1]:
            return result
        scores = args[0]
        self.chosen.append(result[1].detach().reshape(-1, result[1].shape[-1]))
        if self.forced is None:
            return result
        ids = self.forced[len(self.chosen) - 1].reshape(result[1].shape)
        return torch.return_types.topk((scores.gather(-1, ids), ids))


@torch.no_grad()
def turns_of(pretrained: Pretrained, sizes: Sizes) -> list[bool]:
    """For each call of a forward that takes K of E scores, whether it is the last before experts run: a router's.

    The others rank something else, such as the two best of a group that is all there is.
    """
    turns: list[bool] = []
    counter = Routers(sizes, [False] * (64 * len(sizes)))

    def mark(*_: Any) -> None:
        turns.extend([False] * (counter.seen - len(turns)))
        turns[-1:] = [True]

    hooks = [m.register_forward_pre_hook(mark) for _, m in stacked_experts(pretrained.model)]
    try:
        with counter:
            pretrained.model(torch.zeros(1, 2, dtype=torch.int64, device=pretrained.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return turns + [False] * (counter.seen - len(turns))


def exact_of(
    pretrained: Pretrained, shapes: Shapes, trace: Trace, sizes: Sizes, turns: list[bool]
) -> tuple[Exact, list[Tensor]]:
    """A sequence in float64 with the experts of `trace`, and the experts that float64 itself would have chosen."""
    batch, length = trace.ids_BS.shape
    here = [tuple((batch, s[1], length, s[3]) for s in pair) for pair in shapes]
    cache = empty_cache(here, torch.float64, pretrained.device)  # type: ignore[arg-type]
    with torch.no_grad(), borrowed(pretrained.model), Routers(sizes, turns, trace.experts, exact=True) as routers:
        filled = cache_of(prompt_layer, cache.key, cache.value)
        logits = pretrained.model(input_ids=trace.ids_BS, past_key_values=filled, use_cache=True).logits
    exact = Exact(
        logits_BNV=logits[:, trace.prompt - 1 :].double(), scores=[],
        key=[cache_rows(key, length) for key in cache.key], value=[cache_rows(value, length) for value in cache.value],
    )  # fmt: skip
    return exact, [ids.unflatten(0, (batch, length)) for ids in routers.chosen]


@contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """While open, the model computes in float64: its layers one at a time, everything else at once."""
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    stack = max(stacks, key=lambda m: sum(p.numel() for p in m.parameters()), default=None)
    units = list(stack) if stack is not None else []
    inside = {id(t) for unit in units for t in (*unit.parameters(), *unit.buffers())}
    rest = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in inside]
    kept: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def widen(key: int, tensors: Sequence[Tensor]) -> None:
        kept[key] = [(t, t.data) for t in tensors if t.is_floating_point()]
        for tensor, data in kept[key]:
            tensor.data = data.double()

    def restore(key: int) -> None:
        for tensor, data in kept.pop(key, []):
            tensor.data = data

    handles = []
    for unit in units:
        handles.append(unit.register_forward_pre_hook(lambda m, _: widen(id(m), [*m.parameters(), *m.buffers()])))
        handles.append(unit.register_forward_hook(lambda m, _args, _out: restore(id(m)), always_call=True))
    widen(0, rest)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for key in list(kept):
            restore(key)


def follow(runner: RunnerLike, eager: Trace, cache: KVCache) -> Trace:
    """Eager's tokens through another runner."""
    prompt_BS, tokens_BN = eager.ids_BS[:, : eager.prompt], eager.ids_BS[:, eager.prompt :]
    return run(runner, prompt_BS, cache, steps=eager.steps, tokens_BN=tokens_BN)


def check_choices(
    ours: Sequence[Trace],
    eager: Sequence[Trace],
    natural: Sequence[list[Tensor]],
    natural_eager: Sequence[list[Tensor]],
) -> Check:
    """How often the artifact's routers choose other experts than float64 with the same past; eager sets the budget."""
    mine, theirs = differing(ours, natural), differing(eager, natural_eager)
    tokens = sum(layer[..., 0].numel() for trace in ours for layer in trace.experts)
    allowed = 2 * sum(theirs) + SPARE
    ok = sum(mine) <= allowed
    worst = max(range(len(mine)), key=lambda i: mine[i], default=None)
    detail = f"{sum(mine)} of {tokens} choices differ from float64's, eager's {sum(theirs)}"
    if not ok:
        detail += f"; at most {allowed} are excused; most in routed layer {worst}"
    return Check("routing", ok, detail, {"ours": mine, "eager": theirs, "tokens": tokens})


def differing(traces: Sequence[Trace], natural: Sequence[list[Tensor]]) -> list[int]:
    """For each layer, the tokens whose set of experts is another."""
    counts = [0] * (len(traces[0].experts) if traces else 0)
    for trace, choices in zip(traces, natural, strict=True):
        for layer, (one, other) in enumerate(zip(trace.experts, choices, strict=True)):
            counts[layer] += int((one.sort(-1).values != other.sort(-1).values).any(-1).sum())
    return counts
