"""Who takes part: the eager reference, stock torch.compile, transformers' experts, and the compiled artifact.

Each offers the same two calls on the same static problem: `prefill` fills a fresh cache, `decode` adds one token.

L layers with routed experts, B sequences, S positions, K experts per token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dsmoe_compiler.compare.memory import available_bytes
from dsmoe_model.attention import KVCache
from dsmoe_model.transformer import Transformer

TITLES = {
    "eager": "eager PyTorch",
    "inductor": "torch.compile",
    "hf-grouped": "transformers grouped_mm",
    "hf-batched": "transformers batched_mm",
    "mlir": "dsmoe, format mlir",
    "dsmoe": "dsmoe",
}


class Candidate(Protocol):
    """What can be compared.

    `prefill(ids [B, S], cache)` and `decode(ids [B, 1], position, cache)` give the logits `[B, V]` of the last position
    and the experts chosen, `[L, B * S, K]` int64, or None while a candidate does not report them.
    """

    name: str

    def new_cache(self) -> Any: ...
    def prefill(self, ids_BS: Tensor, cache: Any) -> tuple[Tensor, Tensor | None]: ...
    def decode(self, ids_B1: Tensor, position: int, cache: Any) -> tuple[Tensor, Tensor | None]: ...
    def refuses(self, tokens: int) -> str | None:
        """Why a prefill of so many tokens per sequence cannot be run, or None."""


class Absent(Exception):
    """A candidate that cannot take part here; the message is the reason shown in its row."""


class Reference:
    """The plain model, as it is ("eager") or behind `torch.compile` with its defaults ("inductor")."""

    def __init__(self, model: Transformer, *, batch: int, capacity: int, compiled: bool = False) -> None:
        self.name = "inductor" if compiled else "eager"
        self.model, self.batch, self.capacity = model, batch, capacity
        self.forward: Callable[..., Any] = torch.compile(model) if compiled else model

    def new_cache(self) -> KVCache:
        weight = self.model.embed_tokens.weight
        return KVCache.zeros(self.model.config, self.batch, self.capacity, weight.dtype, weight.device)

    def prefill(self, ids_BS: Tensor, cache: KVCache) -> tuple[Tensor, Tensor]:
        return _unpack(self.forward(ids_BS, cache, last_only=True), ids_BS)

    def decode(self, ids_B1: Tensor, position: int, cache: KVCache) -> tuple[Tensor, Tensor]:
        place = torch.tensor([position], device=ids_B1.device)
        return _unpack(self.forward(ids_B1, cache, place), ids_B1)

    def refuses(self, tokens: int) -> str | None:
        return None


class Compiled:
    """The artifact's runner: `new_cache()`, `prefill(ids, cache)`, `decode(ids, position, cache)`."""

    def __init__(self, runner: Any, name: str = "dsmoe", compile_seconds: float | None = None) -> None:
        self.name, self.runner, self.compile_seconds = name, runner, compile_seconds

    def new_cache(self) -> Any:
        return self.runner.new_cache()

    def prefill(self, ids_BS: Tensor, cache: Any) -> tuple[Tensor, Tensor]:
        logits_BV, experts = self.runner.prefill(ids_BS, cache)
        return logits_BV, experts if isinstance(experts, Tensor) else torch.stack(list(experts))

    def decode(self, ids_B1: Tensor, position: int, cache: Any) -> tuple[Tensor, Tensor]:
        logits_BV, experts = self.runner.decode(ids_B1, position, cache)
        return logits_BV, experts if isinstance(experts, Tensor) else torch.stack(list(experts))

    def refuses(self, tokens: int) -> str | None:
        return None


class HuggingFace:
    """transformers' own model of the same architecture, with the same weights and its own growing cache.

    Experts are read off the calls of the experts modules, whose arguments are `(hidden, ids [T, K], weights)` in every
    in-tree model; the hooks are there only inside `watched()`, never while anything is timed.
    """

    def __init__(self, model: Transformer, implementation: str) -> None:
        self.name = f"hf-{implementation.removesuffix('_mm')}"
        self.model: Any = _build_witness(model, implementation)
        self.config, self.device = model.config, model.embed_tokens.weight.device
        self.gathers = implementation == "batched_mm"
        self.element_size = model.embed_tokens.weight.element_size()
        self.chosen: list[Tensor] | None = None

    def new_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.model.model.config)

    def prefill(self, ids_BS: Tensor, cache: Any) -> tuple[Tensor, Tensor | None]:
        if self.chosen is not None:
            self.chosen.clear()
        hidden_BSH = self.model.model(ids_BS, past_key_values=cache, use_cache=True).last_hidden_state
        return self.model.lm_head(hidden_BSH[:, -1]), torch.stack(self.chosen) if self.chosen else None

    def decode(self, ids_B1: Tensor, position: int, cache: Any) -> tuple[Tensor, Tensor | None]:
        return self.prefill(ids_B1, cache)

    def watch(self) -> list[Any]:
        """Hooks that record the experts of each call; remove them before timing."""
        self.chosen = []
        watched = [module for name, module in self.model.named_modules() if name.endswith(".mlp.experts")]
        return [module.register_forward_pre_hook(self._record, with_kwargs=True) for module in watched]

    def unwatch(self, hooks: list[Any]) -> None:
        for hook in hooks:
            hook.remove()
        self.chosen = None

    def refuses(self, tokens: int) -> str | None:
        """`batched_mm` gathers the weights of every (token, expert) pair; that must fit into half of what is free."""
        if not self.gathers:
            return None
        config = self.config
        per_pair = 3 * config.hidden_size * config.moe_intermediate_size * self.element_size
        need, free = tokens * config.num_experts_per_tok * per_pair, available_bytes(self.device)
        if free is None or need <= free / 2:
            return None
        return f"batched_mm would gather {need / 2**30:.1f} GiB of expert weights, {free / 2**30:.1f} GiB are free"

    def _record(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self.chosen is not None
        ids = args[1] if len(args) > 1 else kwargs["top_k_index"]
        self.chosen.append(ids.detach().to(torch.int64).reshape(-1, ids.shape[-1]))


def stock_dynamo() -> Any:
    """A context with torch.compile as a user finds it: what dsmoe sets for its own capture neither helps nor hurts."""
    return torch._dynamo.config.patch(capture_dynamic_output_shape_ops=False, capture_scalar_outputs=False)


def _unpack(output: Any, ids_BS: Tensor) -> tuple[Tensor, Tensor]:
    logits_BSV, routing = output
    if not routing:
        return logits_BSV[:, -1], ids_BS.new_zeros(0, ids_BS.numel(), 0)
    return logits_BSV[:, -1], torch.stack([layer.experts_TK for layer in routing])


def _build_witness(model: Transformer, implementation: str) -> nn.Module:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise Absent("transformers is not installed: pip install 'transformers>=5.17,<5.24'") from error
    try:
        from dsmoe_compiler.witness import to_transformers

        return to_transformers(model, experts_implementation=implementation).eval()
    except (ValueError, ImportError) as error:
        raise Absent(f"transformers has no model for this: {error}") from error
