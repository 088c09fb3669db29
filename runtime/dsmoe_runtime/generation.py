"""Text from two compiled programs: prefill once, then decode one token at a time.

Letters: B rows, S prompt tokens, V vocabulary. The choice of a token is the reference model's own (`sample`), so a
compiled model and eager differ in their logits alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsmoe_model.generation import check_prompt, check_sampling, sample


@torch.no_grad()
def generate(
    prefill: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor, int], Tensor],
    ids_BS: Tensor,
    *,
    vocab_size: int,
    capacity: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_token_id: int | None = None,
    on_token: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """`ids [B, S]` (int64) continued to `[B, S + new]`, `new <= max_new_tokens`.

    `prefill(ids [B, S])` and `decode(ids [B, 1], position)` give the next token's logits `[B, V]` and keep the cache.
    Temperature 0 is greedy. A row that has produced `eos_token_id` is filled with it, and generation stops when all
    rows have. `on_token` hears each new column `[B]` as soon as it is chosen.

    Raises: ValueError when the prompt is empty or holds ids outside the vocabulary, when prompt and new tokens exceed
    `capacity`, for sampling settings that mean nothing, and on NaN logits.
    """
    check_sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    check_prompt(ids_BS, vocab_size)
    length = ids_BS.shape[1]
    if max_new_tokens < 0 or length + max_new_tokens > capacity:
        raise ValueError(
            f"{length} prompt tokens and max_new_tokens = {max_new_tokens} must fit the {capacity} positions that the "
            "cache was compiled for (max_seq_len)"
        )
    generator = torch.Generator(device=ids_BS.device).manual_seed(seed)
    done_B = torch.zeros(ids_BS.shape[0], dtype=torch.bool, device=ids_BS.device)
    for step in range(max_new_tokens):
        logits_BV = prefill(ids_BS) if step == 0 else decode(ids_BS[:, -1:], length + step - 1)
        next_B = sample(logits_BV, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        if eos_token_id is not None:
            next_B = next_B.masked_fill(done_B, eos_token_id)
            done_B = done_B | (next_B == eos_token_id)
        ids_BS = torch.cat((ids_BS, next_B[:, None]), dim=1)
        if on_token is not None:
            on_token(next_B)
        if eos_token_id is not None and bool(done_B.all()):
            break
    return ids_BS
