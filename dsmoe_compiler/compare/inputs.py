"""The fixed inputs of a comparison: prose for a model that comes with a tokenizer, seeded random ids for one without.

Routing follows the input, and random ids spread over the experts more evenly than language does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsmoe_compiler.loading import Loaded

PROSE = (
    "The lighthouse keeper wrote down the weather twice a day, at six in the morning and at six in the evening, "
    "in a book that the harbour office replaced every January. Wind from the south-west, force 5; sea rough; "
    "visibility 9 miles. He had a word for every kind of fog, and 31 of them by the time he retired. When his "
    "daughter asked why nobody read the old books, he said that they were not written to be read but to be "
    "compared: 'If you want to know what is unusual, you must first be bored for a year.' She became a "
    "statistician. The first program she wrote, in 1974, had 12 lines: it took the 730 entries of one year, "
    "sorted them, and printed the ten that were least like the others. Nine were storms. The tenth read, in the "
    "same square hand as all the rest: 'Calm. Clear. Could see everything.' "
)


def fixed_inputs(loaded: Loaded, *, batch: int, length: int, seed: int = 0) -> tuple[Tensor, str]:
    """Token ids `[batch, length]` int64 on the model's device, and a line saying what they are."""
    device, vocab = loaded.model.embed_tokens.weight.device, loaded.config.vocab_size
    if loaded.tokenizer is not None and (prose := [id_ for id_ in loaded.tokenizer.encode(PROSE) if id_ < vocab]):
        endless = torch.tensor(prose).repeat((length + 97 * batch) // len(prose) + 2)
        rows = [endless[97 * row : 97 * row + length] for row in range(batch)]
        return torch.stack(rows).to(device), f"English prose, {batch} x {length} tokens"
    generator = torch.Generator().manual_seed(seed)
    ids_BS = torch.randint(vocab, (batch, length), generator=generator)
    return ids_BS.to(device), f"random token ids, seed {seed}, {batch} x {length} tokens"
