"""Text from a model: prefill once, then one token at a time over a static key/value cache; greedy or sampled.

Letters: B rows, S prompt tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsmoe_model.attention import KVCache
from dsmoe_model.transformer import Transformer


@torch.no_grad()
def generate(
    model: Transformer,
    ids_BS: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_token_id: int | None = None,
    cache: KVCache | None = None,
) -> Tensor:
    """`ids [B, S]` continued to `[B, S + new]`, `new <= max_new_tokens`.

    A row that has produced `eos_token_id` is filled with it, and generation stops when all have. Temperature 0 is
    greedy. `cache`, when given, is overwritten from slot 0. Raises ValueError when the prompt is empty or holds ids
    outside the vocabulary, when prompt and new tokens exceed the positions or the cache, or on NaN logits.
    """
    check_sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    check_prompt(ids_BS, model.config.vocab_size)
    batch, length = ids_BS.shape
    total = length + max_new_tokens
    if max_new_tokens < 0 or total > model.config.max_position_embeddings:
        raise ValueError(
            f"{length} prompt tokens and max_new_tokens = {max_new_tokens} must stay within "
            f"max_position_embeddings = {model.config.max_position_embeddings}"
        )
    if cache is None:
        weight = model.embed_tokens.weight
        cache = KVCache.zeros(model.config, batch, total, weight.dtype, weight.device)
    if cache.capacity < total or cache.key[0].shape[0] != batch:
        raise ValueError(
            f"the cache holds {cache.key[0].shape[0]} rows of {cache.capacity} positions; "
            f"{batch} rows of {total} are needed"
        )
    generator = torch.Generator(device=ids_BS.device).manual_seed(seed)
    done_B = torch.zeros(batch, dtype=torch.bool, device=ids_BS.device)
    for step in range(max_new_tokens):
        if step == 0:
            logits = model(ids_BS, cache, last_only=True).logits_BSV
        else:
            position = torch.tensor([ids_BS.shape[1] - 1], device=ids_BS.device)
            logits = model(ids_BS[:, -1:], cache, position).logits_BSV
        next_B = sample(logits[:, -1], temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        if eos_token_id is not None:
            next_B = next_B.masked_fill(done_B, eos_token_id)
            done_B = done_B | (next_B == eos_token_id)
        ids_BS = torch.cat((ids_BS, next_B[:, None]), dim=1)
        if eos_token_id is not None and bool(done_B.all()):
            break
    return ids_BS


def sample(
    logits_BV: Tensor,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token id a row, `[B]` int64. Temperature 0: the largest logit, the lowest id among equals.

    Otherwise softmax(logits / temperature), kept to the `top_k` most likely and then to the fewest whose probability
    reaches `top_p`, drawn with `generator` (on the logits' device).
    """
    check_sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    bad_B = logits_BV.isnan().any(dim=-1)
    if bool(bad_B.any()):
        raise ValueError(f"the logits of row {int(bad_B.nonzero()[0])} hold NaN: no token can be chosen")
    if temperature == 0.0:
        return logits_BV.argmax(dim=-1)
    scaled = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32)) / temperature
    likely_BV, ids_BV = torch.sort(scaled.softmax(dim=-1), dim=-1, descending=True, stable=True)
    if top_k is not None:
        likely_BV = likely_BV[:, :top_k]
        likely_BV = likely_BV / likely_BV.sum(dim=-1, keepdim=True)
    if top_p is not None:
        before_BV = likely_BV.cumsum(dim=-1) - likely_BV
        likely_BV = likely_BV.masked_fill(before_BV >= top_p, 0.0)
        likely_BV[:, 0] = likely_BV[:, 0].clamp(min=torch.finfo(likely_BV.dtype).tiny)
    if likely_BV.shape[0] == 0:
        return ids_BV.new_empty(0)
    return ids_BV.gather(1, torch.multinomial(likely_BV, 1, generator=generator))[:, 0]


def check_sampling(*, temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises ValueError on a setting that means nothing, before a token is spent."""
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature = {temperature} must be 0 (greedy) or positive and finite")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k = {top_k} must be at least 1, or None for all tokens")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p = {top_p} must lie in (0, 1], or None for all tokens")


def check_prompt(ids_BS: Tensor, vocab_size: int) -> None:
    """Raises ValueError unless `ids_BS` is a non-empty `[B, S]` int64 prompt with ids in [0, vocab_size)."""
    if ids_BS.dim() != 2 or ids_BS.dtype != torch.int64:
        raise ValueError(f"ids must be [B, S] int64, got {list(ids_BS.shape)} {ids_BS.dtype}")
    if ids_BS.shape[1] == 0:
        raise ValueError("the prompt is empty: pass at least one token, such as bos_token_id")
    if ids_BS.numel() and not 0 <= int(ids_BS.min()) <= int(ids_BS.max()) < vocab_size:
        raise ValueError(f"ids span [{int(ids_BS.min())}, {int(ids_BS.max())}], vocab_size = {vocab_size}")
