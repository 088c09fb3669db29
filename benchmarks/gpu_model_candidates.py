"""Whole models on a GPU: ours, the eager reference, and transformers, on one prompt or one decode step.

A candidate is a call without arguments that gives the last position's logits `[B, V]` and the experts `[L, T, K]` (None
where they cannot be seen), and writes the cache at the same place every time, so that it may be replayed.

L layers with routed experts, B sequences, T tokens, K experts per token, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from dsmoe_compiler.capture import Capture
from dsmoe_compiler.phases import Phase
from dsmoe_compiler.targets.aoti import accepted
from dsmoe_compiler.targets.lower import copied
from dsmoe_compiler.targets.one_token import options_for, prepare
from dsmoe_model.attention import KVCache
from dsmoe_model.config import ModelConfig
from dsmoe_model.transformer import Transformer, build

Answer = tuple[Tensor, Tensor | None]
Call = Callable[[], Answer]
SLACK = 64  # slots of the cache beyond the context
PROMPT = 4096  # slots for a prompt, whatever its length: one capture serves all of them


@dataclass
class Problem:
    """A prompt (`position` None) or a decode step behind `context` positions, whose keys and values are random."""

    phase: str
    ids: Tensor
    position: Tensor | None
    cache: KVCache

    @property
    def tokens(self) -> int:
        return self.ids.numel()

    @property
    def capacity(self) -> int:
        return self.cache.capacity


def make_problem(model: Transformer, phase: str, size: int, context: int) -> Problem:
    """`size` is the prompt's length, or the number of sequences that decode."""
    weight, config = model.embed_tokens.weight, model.config
    device, dtype = weight.device, weight.dtype
    generator = torch.Generator(device).manual_seed(size)
    shape = (1, size) if phase == "prefill" else (size, 1)
    ids = torch.randint(0, config.vocab_size, shape, generator=generator, device=device)
    capacity = max(size, PROMPT) if phase == "prefill" else context + SLACK
    cache = KVCache.zeros(config, shape[0], capacity, dtype, device)
    if phase == "prefill":
        return Problem(phase, ids, None, cache)
    for part in (*cache.key, *cache.value):
        part[:, :, :context].normal_(0.0, 0.3, generator=generator)
    return Problem(phase, ids, torch.full((1,), context, device=device), cache)


class Ours:
    """The compiler's phases: captured and fused once for each (phase, batch, capacity), then through Inductor."""

    def __init__(self, model: Transformer, *, compiled: bool) -> None:
        self.model, self.compiled, self.seconds = model, compiled, dict[str, float]()
        self.phases: dict[tuple[str, int, int], Phase] = {}

    def phase(self, name: str, batch: int, capacity: int) -> Phase:
        """Captured once."""
        start, key = time.perf_counter(), (name, batch, capacity)
        if key not in self.phases:
            capture = Capture(self.model, batch=batch, capacity=capacity, progress=lambda _: None)
            self.phases[key] = next(capture.phases((name,)))
        self.seconds["capture"] = time.perf_counter() - start
        return self.phases[key]

    def call(self, problem: Problem) -> Call:
        """Capture and compile for the problem's own sizes; the first answer is part of the compile time."""
        graph = self.phase(problem.phase, problem.ids.shape[0], problem.capacity).graph
        where = () if problem.position is None else (problem.position,)
        inputs = (problem.ids, *where, problem.cache.key, problem.cache.value)
        start = time.perf_counter()
        function = inductor(graph, inputs) if self.compiled else graph
        function(*inputs)
        if problem.ids.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds["compile"] = time.perf_counter() - start
        return lambda: tuple(function(*inputs))  # type: ignore[return-value]


def inductor(graph: fx.GraphModule, inputs: tuple[Any, ...]) -> Callable[..., Any]:
    """A graph that holds its parameters, compiled for the sizes of `inputs`: no Dynamo, no second capture.

    Inductor caches only graphs whose sizes have an environment, which Dynamo would have given.
    """
    import torch._inductor
    from torch._guards import TracingContext, tracing
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    own = copied(graph)  # the compiler rewrites it
    if inputs[0].is_cuda:
        prepare(own, inputs)
    options = accepted(options_for(inputs))
    fake = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    with tracing(TracingContext(fake)):
        return torch._inductor.compile(own, list(inputs), options=options)  # type: ignore[return-value]


def reference(
    model: Transformer, problem: Problem, *, experts: Tensor | None = None, cache: KVCache | None = None
) -> Answer:
    """The oracle, as it is; `experts` forces the choice of each layer."""
    forced = None if experts is None or not len(experts) else list(experts)
    logits, routing = model(problem.ids, cache or problem.cache, problem.position, last_only=True, experts=forced)
    chosen = [layer.experts_TK for layer in routing]
    return logits[:, -1], torch.stack(chosen) if chosen else problem.ids.new_empty(0, problem.tokens, 0)


class Exact:
    """The same model in float32: twice the bytes, and an error far below that of bfloat16."""

    def __init__(self, model: Transformer) -> None:
        weight = model.embed_tokens.weight
        with torch.device("meta"):
            wide = Transformer(model.config).to(torch.float32)
        self.model = wide.eval().to_empty(device=weight.device).requires_grad_(False)
        with torch.no_grad():
            for ours, theirs in zip(self.model.parameters(), model.parameters(), strict=True):
                ours.copy_(theirs)

    def logits(self, problem: Problem, experts: Tensor) -> Tensor:
        """With the given experts."""
        cache = KVCache([k.float() for k in problem.cache.key], [v.float() for v in problem.cache.value])
        return reference(self.model, problem, experts=experts, cache=cache)[0]


class HuggingFace:
    """transformers' own model of the architecture on the same weights, with its static cache held at one place."""

    def __init__(self, model: Transformer, implementation: str) -> None:
        from dsmoe_compiler.witness import to_transformers

        self.config = model.config
        self.model: Any = to_transformers(model, experts_implementation=implementation)

    def call(self, problem: Problem, *, compiled: bool) -> Call:
        """Prefill into a new cache, decode on one with the problem's keys and values."""
        from transformers import DynamicCache

        theirs, options = self.model.model.config, dict[str, Any]()
        if problem.position is not None:
            cache = fixed_cache(theirs, self.config, problem)
            options = {"past_key_values": cache, "position_ids": problem.position[None]}

        def plain(ids: Tensor) -> Tensor:
            # Without any cache it would look for packed sequences, and wait for the host.
            given = options or {"past_key_values": DynamicCache(config=theirs)}
            return self.model.lm_head(self.model.model(ids, use_cache=True, **given).last_hidden_state[:, -1])

        function = torch.compile(plain, dynamic=False) if compiled else plain
        return lambda: (function(problem.ids), None)

    def watched(self, call: Call) -> Answer:
        """One call with the experts that were chosen, read off the arguments of the experts modules."""
        chosen: list[Tensor] = []

        def record(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids = args[1] if len(args) > 1 else kwargs["top_k_index"]
            chosen.append(ids.detach().to(torch.int64).reshape(-1, ids.shape[-1]))

        experts = [module for name, module in self.model.named_modules() if name.endswith(".mlp.experts")]
        hooks = [module.register_forward_pre_hook(record, with_kwargs=True) for module in experts]
        try:
            logits, _ = call()
        finally:
            for hook in hooks:
                hook.remove()
        return logits, torch.stack(chosen)


def fixed_cache(theirs: Any, config: ModelConfig, problem: Problem) -> Any:
    """transformers' StaticCache on the problem's own tensors, whose update writes at the context's end, every time."""
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer

    position = problem.position
    assert position is not None

    class FixedLayer(StaticLayer):
        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
            mine: Any = self
            mine.keys.index_copy_(2, position, key_states)
            mine.values.index_copy_(2, position, value_states)
            return mine.keys, mine.values

    cache = StaticCache(config=theirs, max_cache_len=problem.capacity)
    first = problem.cache.key[0]
    sizes = (problem.ids.shape[0], config.num_key_value_heads, config.head_dim)
    cache.early_initialization(*sizes, first.dtype, first.device)
    layers: Any = cache.layers
    for layer, key, value in zip(layers, problem.cache.key, problem.cache.value, strict=True):
        layer.__class__ = FixedLayer
        layer.keys, layer.values = key, value
        layer.cumulative_length.copy_(position[0])
    return cache


def make_model(name: str, device: torch.device) -> Transformer:
    """The preset in bfloat16 with random weights, made on the device."""
    from dsmoe_model.presets import preset

    return build(preset(name), dtype=torch.bfloat16, device=device, seed=0).requires_grad_(False)
