"""Runs a loaded ONNX artifact: the interface of `dsmoe_compiler.runner`, with a cache that grows and any batch.

Letters as there. Every argument is checked before ONNX Runtime sees it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsmoe_compiler.runner import Runner, Shapes, Steps, place_of
from dsmoe_compiler.targets.onnx.decode_session import DecodeSession
from dsmoe_compiler.targets.onnx.opening import DECODE
from dsmoe_compiler.targets.onnx.session import LIBRARY, Interface, StepSession
from dsmoe_compiler.targets.onnx.weights_once import Weights
from dsmoe_model.attention import KVCache
from dsmoe_model.checkpoint import Tokenizer
from dsmoe_runtime.errors import ArtifactError, InputError

DTYPES = {"float32": "tensor(float)", "float16": "tensor(float16)", "bfloat16": "tensor(bfloat16)"}


def open_onnx(
    folder: Path,
    manifest: dict[str, Any],
    interface: tuple[int, Shapes],
    tokenizer: Tokenizer | None,
    device: torch.device | str | None,
    library: bool,
    threads: int | None,
) -> OnnxRunner:
    """A session on the provider of the artifact's target. Raises: ArtifactError, if file and manifest do not agree."""
    vocab_size, shapes = interface
    target, dtype = manifest["target"], DTYPES.get(manifest["dtype"])
    place = place_of(folder, target, device)
    try:
        file, one = str(manifest["onnx"]["file"]), manifest["onnx"].get("decode") is not None
    except (KeyError, TypeError):
        raise ArtifactError(f"{folder} is damaged: its manifest names no ONNX file") from None
    weights = Weights(folder, place) if one else None
    options: dict[str, Any] = {"library": library_of(folder, library), "threads": threads}
    session = StepSession(folder / file, place, weights=weights.of(file) if weights else None, **options)
    wanted: Interface = {"input_ids": ("tensor(int64)", ["batch", "sequence"])}
    for number, pair in enumerate(shapes):
        for side, (_, heads, _, width) in zip(("key", "value"), pair, strict=True):
            wanted[f"past_key_values.{number}.{side}"] = (str(dtype), ["batch", heads, "past", width])
    check_interface(folder, file, session, wanted, ["batch", vocab_size])
    decode = None
    if weights is not None:
        decode = DecodeSession(folder / DECODE, place, weights=weights.of(DECODE), **options)
        sizes = {"batch": 1, "sequence": 1, "past": manifest["capacity"]}
        fixed = {name: (kind, [sizes.get(size, size) for size in shape]) for name, (kind, shape) in wanted.items()}
        check_interface(folder, DECODE, decode, fixed | {"position": ("tensor(int64)", [1])}, [1, vocab_size])
    own: dict[str, Any] = {"manifest": manifest, "tokenizer": tokenizer, "weights": weights}
    return OnnxRunner(vocab_size, shapes, session=session, decode=decode, **own)


def check_interface(
    folder: Path, file: str, session: StepSession | DecodeSession, wanted: Interface, logits: list[Any]
) -> None:
    """Raises: ArtifactError, if a file's inputs and logits are not those of the manifest's model."""
    if session.inputs != wanted or session.outputs["logits"][1] != logits:
        differing = [name for name in {**wanted, **session.inputs} if session.inputs.get(name) != wanted.get(name)]
        raise ArtifactError(f"{folder} is damaged: {file} takes other inputs than its manifest says: {differing[:3]}")


def library_of(folder: Path, wanted: bool) -> Path | None:
    """The library that an artifact holds; else this machine's own, if it is wanted."""
    if (folder / LIBRARY).is_file():
        return folder / LIBRARY
    if not wanted:
        return None
    from dsmoe_runtime.ort_library.build import library

    return library()


class OnnxRunner(Runner):
    """The model of an ONNX artifact. `load` makes it; `manifest` says where it came from and what was proved.

    `capacity` bounds prompt and answer together: the positions that the model knows, or `max_seq_len`.
    """

    def __init__(
        self,
        vocab_size: int,
        shapes: Shapes,
        *,
        manifest: dict[str, Any],
        tokenizer: Tokenizer | None,
        session: StepSession,
        decode: DecodeSession | None = None,
        weights: Weights | None = None,
    ) -> None:
        super().__init__(vocab_size, shapes, manifest=manifest, tokenizer=tokenizer, programs={}, device=session.device)
        self.session = session
        self.one_token, self.weights = decode, weights

    def new_cache(self) -> KVCache:
        """A cache of no positions; `prefill` fills it for as many sequences as its ids have rows."""
        return self._empty(1)

    @contextmanager
    def _sequences(self, rows: int) -> Iterator[Steps]:
        """A single sequence is continued by decode.onnx, where there is one: others wait until it is ended.

        One that is begun while another of the same thread goes on, as by `on_token`, is continued by model.onnx.
        """
        one = self.one_token
        if one is None or rows != 1 or one.held_here:
            with super()._sequences(rows) as steps:
                yield steps
            return
        with one.turn():
            cache = self.new_cache()

            def prefill(ids_1S: Tensor) -> Tensor:
                logits_1V, _ = self.prefill(ids_1S, cache)
                one.fill(in_turn(cache))
                for part in (cache.key, cache.value):
                    part.clear()  # they are in the slots now
                return logits_1V

            yield prefill, lambda ids, position: one(ids, position)[0]

    @torch.no_grad()
    def prefill(self, ids_BS: Tensor, cache: KVCache) -> tuple[Tensor, Tensor]:
        """Read a prompt into `cache`, whatever it held: next-token logits `[B, V]` and experts `[L, B*S, K]` int64.

        Raises: InputError for an empty prompt, ids outside the vocabulary, more tokens than `capacity`.
        """
        empty = self._empty(len(ids_BS) if ids_BS.dim() == 2 else 1)
        cache.key[:], cache.value[:] = empty.key, empty.value
        return self.extend(ids_BS, cache)

    @torch.no_grad()
    def extend(self, ids_BS: Tensor, cache: KVCache) -> tuple[Tensor, Tensor]:
        """Add tokens to what `cache` holds, one or many: the same two, logits of the last and experts of all."""
        self._check_ids(ids_BS)
        return self._step(ids_BS, cache)

    def _decode(self, ids_B1: Tensor, position: int, cache: KVCache) -> tuple[Tensor, Tensor]:
        if ids_B1.shape[1] != 1:
            raise InputError(f"decode takes one token a row, ids [B, 1]; got {list(ids_B1.shape)}")
        if position != cache.capacity:
            raise InputError(
                f"position is {position}, but the cache holds {cache.capacity} positions: the next is that"
            )
        return self._step(ids_B1, cache)

    def _step(self, ids_BS: Tensor, cache: KVCache) -> tuple[Tensor, Tensor]:
        length, held = ids_BS.shape[1], self._check_cache(cache, len(ids_BS))
        if length == 0:
            raise InputError("the prompt is empty: pass at least one token, such as bos_token_id")
        if held + length > self.capacity:
            raise InputError(
                f"{held} positions and {length} tokens exceed the {self.capacity} of this artifact: shorten the prompt"
            )
        logits_BV, experts, present = self.session(ids_BS, in_turn(cache))
        cache.key[:], cache.value[:] = present[::2], present[1::2]
        return logits_BV, experts

    def _check_rows(self, ids_BS: Tensor) -> None:
        if len(ids_BS) == 0:
            raise InputError("ids have no rows: pass at least one sequence")

    def _check_cache(self, cache: KVCache, batch: int) -> int:
        """The positions that `cache` holds. Raises: InputError, if it is not of this model and these rows."""
        if len(cache.key) != len(self.shapes) or len(cache.value) != len(self.shapes):
            raise InputError(
                f"the cache has {len(cache.key)} and {len(cache.value)} layers, the model has {len(self.shapes)}"
            )
        held = cache.key[0].shape[2] if cache.key[0].dim() == 4 else -1
        for pair, sides in zip(self.shapes, zip(cache.key, cache.value, strict=True), strict=True):
            for (_, heads, _, width), tensor in zip(pair, sides, strict=True):
                wanted = (batch, heads, held, width)
                if tensor.shape != wanted or tensor.dtype != self.dtype or tensor.device != self.device:
                    raise InputError(
                        f"a cache tensor is {list(tensor.shape)} {tensor.dtype} on {tensor.device}; this call wants "
                        f"{list(wanted)} {self.dtype} on {self.device}: use new_cache() and prefill"
                    )
        return held

    def _empty(self, batch: int) -> KVCache:
        keys, values = zip(*self.shapes, strict=True)
        return KVCache(
            *(
                [torch.empty(batch, s[1], 0, s[3], dtype=self.dtype, device=self.device) for s in side]
                for side in (keys, values)
            )
        )


def in_turn(cache: KVCache) -> list[Tensor]:
    """Key and value of each layer in turn, as the files have them."""
    return [side for pair in zip(cache.key, cache.value, strict=True) for side in pair]
