"""`dsmoe generate`: text in, text out, from an artifact or from the plain model."""

from __future__ import annotations

import argparse
import logging
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dsmoe_compiler.cli.console import UsageError, print_json, say
from dsmoe_compiler.cli.figures import plural
from dsmoe_compiler.cli.options import DTYPES, add_dtype, add_json, add_seed, check_model, positive
from dsmoe_compiler.cli.stream import TextStream

if TYPE_CHECKING:
    from torch import Tensor

    from dsmoe_model.checkpoint import Tokenizer

log = logging.getLogger(__name__)

NAME = "generate"
SUMMARY = "continue a text with an artifact or with the plain model"
EXAMPLES = """\
  dsmoe generate out/tiny --prompt "Once upon a time"
  dsmoe generate out/tiny --prompt "Once" --temperature 0.8 --top-p 0.95 --seed 7 > story.txt
  dsmoe generate deepseek-moe-tiny --prompt "Once" --max-new-tokens 16     (the eager model)
"""


class Speaker(NamedTuple):
    """Who continues the text: `generate(ids [B, S], **sampling, on_token=...)`, each row the same prompt."""

    tokenizer: Tokenizer | None
    generate: Callable[..., Tensor]
    rows: int
    device: str


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="OUT|MODEL", help="an artifact folder, a preset's name or a checkpoint folder")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the text to continue; - reads it from stdin")
    parser.add_argument("--max-new-tokens", type=positive, default=64, metavar="N", help="at most so many (64)")
    parser.add_argument("--temperature", type=temperature, default=0.0, metavar="X", help="0: always the likeliest (0)")
    parser.add_argument("--top-k", type=positive, metavar="N", help="draw from the N likeliest tokens only")
    parser.add_argument("--top-p", type=share, metavar="X", help="draw from the likeliest that make up X of 1")
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the end-of-text token")
    add_dtype(parser)
    add_seed(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    is_artifact = (Path(args.model) / "manifest.json").is_file()
    if not is_artifact:
        check_model(args.model)
    elif args.dtype:
        raise UsageError(f"--dtype {args.dtype}: {args.model} is an artifact, its dtype was fixed when it was compiled")
    if args.temperature == 0 and (args.top_k or args.top_p):
        raise UsageError("--top-k and --top-p choose among drawn tokens: give --temperature above 0 as well")
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt

    import torch

    start = time.perf_counter()
    speaker = _artifact(args.model) if is_artifact else _eager(args)
    loaded = time.perf_counter()
    tokenizer = speaker.tokenizer
    if tokenizer is None:
        raise ValueError(f"{args.model} has no tokenizer, so no text can go in; use the Python API with token ids")
    ids = tokenizer.encode(prompt)
    if not ids and tokenizer.bos_id is not None:
        ids = [tokenizer.bos_id]
    stream = TextStream(tokenizer.decode, _silent if args.json else _write)
    speaker.generate(
        torch.tensor([ids] * speaker.rows, dtype=torch.int64, device=speaker.device),
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        eos_token_id=None if args.ignore_eos else tokenizer.eos_id,
        on_token=lambda token_B: stream.push(int(token_B[0])),
    )
    stream.close()
    seconds = time.perf_counter() - loaded
    result = {
        "prompt": prompt,
        "text": tokenizer.decode(stream.ids),
        "prompt_tokens": len(ids),
        "tokens": len(stream.ids),
        "load_seconds": loaded - start,
        "seconds": seconds,
        "tokens_per_second": len(stream.ids) / seconds,
    }
    if args.json:
        print_json(result)
        return 0
    say("")
    made, read = plural(len(stream.ids), "token"), plural(len(ids), "token")
    log.info("%s in %.2f s, %.1f tokens/s, prompt of %s included", made, seconds, result["tokens_per_second"], read)
    return 0


def _artifact(folder: str) -> Speaker:
    """An artifact for several sequences gets the prompt in each row, and the first row is shown."""
    from dsmoe_compiler.api import load

    runner = load(folder)
    return Speaker(runner.tokenizer, runner.generate, runner.batch_size, str(runner.device))


def _eager(args: argparse.Namespace) -> Speaker:
    """The plain model behind the same generation loop that artifacts use."""
    import torch

    from dsmoe_compiler.loading import load_model, progress_bar
    from dsmoe_model.attention import KVCache
    from dsmoe_runtime.generation import generate

    with progress_bar(f"loading {args.model}") as progress:
        dtype = getattr(torch, DTYPES[args.dtype]) if args.dtype else None
        loaded = load_model(args.model, dtype=dtype, seed=args.seed, progress=progress)
    for note in loaded.notes:
        log.info("%s: %s", args.model, note)
    model, capacity = loaded.model, loaded.config.max_position_embeddings
    cache = KVCache.zeros(loaded.config, 1, capacity, model.embed_tokens.weight.dtype)

    def prefill(ids_BS: Tensor) -> Tensor:
        return model(ids_BS, cache, last_only=True).logits_BSV[:, -1]

    def decode(ids_B1: Tensor, position: int) -> Tensor:
        return model(ids_B1, cache, torch.tensor([position])).logits_BSV[:, -1]

    speak = partial(generate, prefill, decode, vocab_size=loaded.config.vocab_size, capacity=capacity)
    return Speaker(loaded.tokenizer, speak, 1, "cpu")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _silent(text: str) -> None:
    """With --json the text is part of the result, which comes at the end."""


def temperature(text: str) -> float:
    """0 or a positive number."""
    value = _real(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not 0 or a positive number")
    return value


def share(text: str) -> float:
    """A number above 0, up to 1."""
    value = _real(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} does not lie in (0, 1]")
    return value


def _real(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
