"""Runs a loaded artifact: prefill, decode, generate; every argument is checked before native code sees it.

Letters: B sequences (fixed when compiled), S prompt tokens, V vocabulary, L layers with routed experts, K experts per
token. The compiled programs trust their inputs (a wrong shape would read beyond a buffer), hence the checks here, each
one line with both values.

Threads: one runner may be called from several threads, each with its own cache; calls of one phase then wait for one
another. Two runners in one process are independent. A cache belongs to one sequence (per row) at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsmoe_compiler.config import TARGETS
from dsmoe_compiler.targets.package import Program
from dsmoe_model.attention import KVCache
from dsmoe_model.checkpoint import Tokenizer
from dsmoe_runtime.errors import ArtifactError, InputError
from dsmoe_runtime.generation import generate

Steps = tuple[Callable[[Tensor], Tensor], Callable[[Tensor, int], Tensor]]
Shapes = list[tuple[tuple[int, ...], tuple[int, ...]]]  # of each layer's keys and values: [B, heads, capacity, width]


def place_of(folder: Path, target: str, device: torch.device | str | None) -> torch.device:
    """Where an artifact for `target` is run: on `device`, if it is given. Raises: ArtifactError, if it cannot be."""
    place = torch.device(device or (target if target in TARGETS else "cpu"))
    if place.type != target:
        raise ArtifactError(f"{folder} was compiled for {target}; it cannot run on {place}")
    if target != "cuda":
        return place
    if not torch.cuda.is_available():
        raise ArtifactError(f"{folder} was compiled for cuda; torch {torch.__version__} sees no GPU here")
    return torch.device("cuda", torch.cuda.current_device() if place.index is None else place.index)


class Runner:
    """The model of an artifact. `load` makes it; `manifest` says where it came from and what was proved."""

    def __init__(
        self,
        vocab_size: int,
        shapes: Shapes,
        *,
        manifest: dict[str, Any],
        tokenizer: Tokenizer | None,
        programs: dict[str, Program],
        device: torch.device,
    ) -> None:
        self.vocab_size = vocab_size
        self.shapes = shapes
        self.manifest = manifest
        self.tokenizer = tokenizer
        self.device = device
        self.dtype: torch.dtype = getattr(torch, manifest["dtype"])
        self.batch_size: int = manifest["batch_size"]
        self.capacity: int = manifest["capacity"]
        self._programs = programs

    def new_cache(self) -> KVCache:
        """An empty cache for this artifact: `batch_size` rows of `capacity` positions."""
        keys, values = zip(*self.shapes, strict=True)
        return KVCache(
            *([torch.zeros(s, dtype=self.dtype, device=self.device) for s in side] for side in (keys, values))
        )

    @torch.no_grad()
    def prefill(self, ids_BS: Tensor, cache: KVCache) -> tuple[Tensor, Tensor]:
        """Read a prompt into `cache` from slot 0: next-token logits `[B, V]` and experts `[L, B*S, K]` int64.

        Raises: InputError for an empty prompt, a wrong batch, ids outside the vocabulary, more tokens than slots.
        """
        self._check_ids(ids_BS)
        length = ids_BS.shape[1]
        if length == 0:
            raise InputError("the prompt is empty: pass at least one token, such as bos_token_id")
        if length > self.capacity:
            raise InputError(
                f"the prompt has {length} tokens, the artifact has room for {self.capacity}: shorten it, or compile "
                "with a larger max_seq_len"
            )
        return self._run("prefill", [ids_BS.contiguous()], cache)

    @torch.no_grad()
    def decode(self, ids_B1: Tensor, position: int, cache: KVCache) -> tuple[Tensor, Tensor]:
        """Add one token per row at `position` (0-based): the same two, for that token.

        Raises: InputError as `prefill`, and for a position outside the cache.
        """
        self._check_ids(ids_B1)
        return self._decode(ids_B1, position, cache)

    def _decode(self, ids_B1: Tensor, position: int, cache: KVCache) -> tuple[Tensor, Tensor]:
        """`decode` of ids that are known to be tokens: on a GPU a look at them would wait for it, once a token."""
        if ids_B1.shape[1] != 1:
            raise InputError(f"decode takes one token a row, ids [{self.batch_size}, 1]; got {list(ids_B1.shape)}")
        if not 0 <= position < self.capacity:
            raise InputError(f"position is {position}; the cache has slots 0 to {self.capacity - 1}")
        place = torch.full((1,), position, device=self.device)
        return self._run("decode", [ids_B1.contiguous(), place], cache)

    def generate(
        self,
        ids_BS: Tensor,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        eos_token_id: int | None = None,
        on_token: Callable[[Tensor], object] | None = None,
    ) -> Tensor:
        """`ids [B, S]` continued to `[B, S + new]`; the arguments are those of `dsmoe_runtime.generation.generate`."""
        self._check_ids(ids_BS)
        with self._sequences(len(ids_BS)) as (prefill, decode):
            return generate(
                prefill,
                decode,
                ids_BS,
                vocab_size=self.vocab_size,
                capacity=self.capacity,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
                eos_token_id=eos_token_id,
                on_token=on_token,
            )

    @contextmanager
    def _sequences(self, rows: int) -> Iterator[Steps]:
        """What `generate` calls for so many sequences: prefill and decode on one cache, which give logits `[B, V]`."""
        cache = self.new_cache()
        yield (
            lambda ids: self.prefill(ids, cache)[0],
            lambda ids, position: self._decode(ids, position, cache)[0],
        )

    def generate_text(
        self,
        prompt: str,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        on_token: Callable[[Tensor], object] | None = None,
    ) -> str:
        """The text that follows `prompt`, up to the end-of-text token. An empty prompt starts from bos if there is one.

        An artifact for several sequences gets the prompt in each row; the first row's text is returned.
        """
        if self.tokenizer is None:
            raise InputError("the artifact has no tokenizer: pass token ids to generate")
        ids = self.tokenizer.encode(prompt)
        if not ids and self.tokenizer.bos_id is not None:
            ids = [self.tokenizer.bos_id]
        ids_BS = torch.tensor([ids] * self.batch_size, dtype=torch.int64, device=self.device)
        out_BS = self.generate(
            ids_BS,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            eos_token_id=self.tokenizer.eos_id,
            on_token=on_token,
        )
        return self.tokenizer.decode(out_BS[0, len(ids) :].tolist())

    def _check_ids(self, ids_BS: Tensor) -> None:
        if ids_BS.dim() != 2 or ids_BS.dtype != torch.int64:
            raise InputError(f"ids must be [B, S] int64, got {list(ids_BS.shape)} {ids_BS.dtype}")
        if ids_BS.device != self.device:
            raise InputError(f"ids are on {ids_BS.device}, the artifact runs on {self.device}: move them")
        self._check_rows(ids_BS)
        if ids_BS.numel():
            low, high = torch.stack(ids_BS.aminmax()).tolist()  # on a GPU one wait, not two
            if low < 0 or high >= self.vocab_size:
                raise InputError(f"ids span [{low}, {high}], vocab_size = {self.vocab_size}")

    def _check_rows(self, ids_BS: Tensor) -> None:
        if ids_BS.shape[0] != self.batch_size:
            raise InputError(
                f"ids have {ids_BS.shape[0]} rows, the artifact was compiled for batch_size = {self.batch_size}"
            )

    def _run(self, phase: str, inputs: list[Tensor], cache: KVCache) -> tuple[Tensor, Tensor]:
        layers = len(self.shapes)
        if len(cache.key) != layers or len(cache.value) != layers:
            raise InputError(f"the cache has {len(cache.key)} and {len(cache.value)} layers, the model has {layers}")
        wanted = [shape for side in zip(*self.shapes, strict=True) for shape in side]
        for tensor, shape in zip((*cache.key, *cache.value), wanted, strict=True):
            if tensor.shape != shape or tensor.dtype != self.dtype or tensor.device != self.device:
                raise InputError(
                    f"a cache tensor is {list(tensor.shape)} {tensor.dtype} on {tensor.device}; the artifact wants "
                    f"{list(shape)} {self.dtype} on {self.device}: use new_cache()"
                )
            if not tensor.is_contiguous():
                raise InputError(
                    f"a cache tensor has strides {tensor.stride()}, it must be contiguous: use new_cache()"
                )
        logits_BV, experts = self._programs[phase]([*inputs, *cache.key, *cache.value])
        return logits_BV, experts
