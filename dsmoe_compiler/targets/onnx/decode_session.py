"""decode.onnx in ONNX Runtime on a GPU: one token of one sequence after another, in one CUDA graph.

The cache has fixed slots and is written in place, and token and position are read on the GPU: all steps are the same
launches on the same memory, captured once. So there is one cache, that of the sequence whose turn it is.

C slots, V vocabulary, L layers with routed experts, K experts a token.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsmoe_compiler.targets.onnx.session import NAMES, interface, open_session, place

INTEGERS = {"tensor(int64)": torch.int64}


class DecodeSession:
    """`fill(past)`, then `(ids [1, 1], position)` -> `(logits [1, V], experts [L, 1, K])`, one position after another.

    options: of `session.open_session`, which see.
    """

    def __init__(self, path: Path, device: torch.device, **options: Any) -> None:
        self.device, self._turn, self._holder = device, threading.Lock(), 0
        self._stream = torch.cuda.Stream(device)
        with torch.cuda.stream(self._stream):
            self._session = open_session(path, device, graph=True, **options)
        self.inputs, self.outputs = interface(self._session)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Held for as long as a sequence needs; other threads wait."""
        with self._turn:
            self._holder = threading.get_ident()
            try:
                yield
            finally:
                self._holder = 0

    @property
    def held_here(self) -> bool:
        """Whether it is the turn of a sequence of this very thread, which would wait for itself."""
        return self._holder == threading.get_ident()

    @cached_property
    def _memory(self) -> dict[str, Tensor]:
        """Of every input and output by its name; a cache is one tensor with two names."""
        kinds = NAMES | INTEGERS
        made = {
            name: torch.zeros(shape, dtype=kinds[kind], device=self.device)
            for name, (kind, shape) in (self.inputs | self.outputs).items()
            if not name.startswith("present.")
        }
        return made | {name: made[past_of(name)] for name in self.outputs if name.startswith("present.")}

    @property
    def cache(self) -> list[Tensor]:
        """Keys and values of each layer in turn, `[1, heads, C, D]` each."""
        return [self._memory[name] for name in self.inputs if name.startswith("past_")]

    @cached_property
    def _binding(self) -> Any:
        binding, memory = self._session.io_binding(), self._memory
        for name in self.inputs:
            binding.bind_input(name, *place(memory[name]))
        for name in self.outputs:
            if memory[name].numel():
                binding.bind_output(name, *place(memory[name]))
        return binding

    @cached_property
    def _options(self) -> Any:
        from onnxruntime import RunOptions

        options = RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return options

    @torch.no_grad()
    def fill(self, past: Sequence[Tensor]) -> None:
        """Take over a prompt's keys and values of each layer in turn, `[1, heads, P, D]` each, P at most C."""
        for slots, tensor in zip(self.cache, past, strict=True):
            slots[:, :, : tensor.shape[2]] = tensor

    @torch.no_grad()
    def __call__(self, ids_11: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """The inputs are trusted: `OnnxRunner` has checked them."""
        memory, here = self._memory, torch.cuda.current_stream(self.device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            memory["input_ids"].copy_(ids_11)
            memory["position"].fill_(position)
            self._session.run_with_iobinding(self._binding, self._options)
            answer = memory["logits"].clone(), memory["experts"].clone()
        here.wait_stream(self._stream)
        for tensor in answer:
            tensor.record_stream(here)
        return answer


def past_of(present: str) -> str:
    """The input whose memory an output is written to."""
    return present.replace("present.", "past_key_values.")
