"""Runs libmodel.so by ctypes alone, as a process of its own: a job as JSON from stdin, logits as float32 to stdout.

    {"folder": "out/tiny", "level": "avx2", "runs": [{"prompt": [[256, 72]], "tokens": [[5], [9]]}]}

Each run reads a prompt, a row a sequence, then adds tokens, a step each; the logits of all its calls follow.
"""

from __future__ import annotations

import ctypes
import json
import sys


def main() -> None:
    job = json.load(sys.stdin)
    library = ctypes.CDLL(f"{job['folder']}/libmodel.so")
    library.dsmoe_create.restype = ctypes.c_void_p
    library.dsmoe_error.restype = ctypes.c_char_p
    for name in ("batch", "vocabulary"):
        getattr(library, f"dsmoe_{name}").restype = ctypes.c_int64
    error = ctypes.create_string_buffer(512)
    made = library.dsmoe_create(job["folder"].encode(), job["level"].encode(), error, ctypes.c_size_t(len(error)))
    if not made:
        sys.exit(error.value.decode())
    model = ctypes.c_void_p(made)
    logits = (ctypes.c_float * (library.dsmoe_batch(model) * library.dsmoe_vocabulary(model)))()

    def take(failed: int) -> None:
        if failed:
            sys.exit(library.dsmoe_error(model).decode())
        sys.stdout.buffer.write(logits)

    for run in job["runs"]:
        ids = [number for row in run["prompt"] for number in row]
        length = len(run["prompt"][0])
        take(library.dsmoe_prefill(model, (ctypes.c_int64 * len(ids))(*ids), ctypes.c_int64(length), logits))
        for step, tokens in enumerate(run["tokens"]):
            row = (ctypes.c_int64 * len(tokens))(*tokens)
            take(library.dsmoe_decode(model, row, ctypes.c_int64(length + step), logits))
    library.dsmoe_destroy(model)


if __name__ == "__main__":
    main()
