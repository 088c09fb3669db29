"""`dsmoe generate`: text in, text out, from an artifact or from the plain model."""

from __future__ import annotations

import argparse
import logging
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dsmoe_compiler.cli.console import UsageError, print_json, say
from dsmoe_compiler.cli.figures import plural
from dsmoe_compiler.cli.options import DTYPES, add_json, add_seed, check_model, positive
from dsmoe_compiler.cli.stream import TextStream

if TYPE_CHECKING:
    from dsmoe_model.checkpoint import Tokenizer

log = logging.getLogger(__name__)

NAME = "generate"
SUMMARY = "continue a text with an artifact or with the plain model"
EXAMPLES = """\
  dsmoe generate out/tiny --prompt "Once upon a time"
  dsmoe generate out/tiny --prompt "Once" --temperature 0.8 --top-p 0.95 --seed 7 > story.txt
  dsmoe generate deepseek-moe-tiny --prompt "Once" --max-new-tokens 16     (the eager model)
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="OUT|MODEL", help="an artifact folder, a preset's name or a checkpoint folder")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the text to continue; - reads it from stdin")
    parser.add_argument("--max-new-tokens", type=positive, default=64, metavar="N", help="(64)")
    parser.add_argument("--temperature", type=temperature, default=0.0, metavar="X", help="0: always the likeliest (0)")
    parser.add_argument("--top-k", type=positive, metavar="N", help="draw from the N likeliest tokens only")
    parser.add_argument("--top-p", type=share, metavar="X", help="draw from the likeliest that make up X of 1")
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the end-of-text token")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of a plain model (fp32, or as stored)")
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

    speak = _artifact if is_artifact else _eager
    said = speak(args, prompt)
    speed = said.tokens / said.seconds if said.seconds else math.inf
    log.info(
        "%s in %.2f s after loading for %.2f s: %.1f tokens/s (prompt of %s included)",
        plural(said.tokens, "token"),
        said.seconds,
        said.load_seconds,
        speed,
        plural(said.prompt_tokens, "token"),
    )
    if args.json:
        print_json({**asdict(said), "prompt": prompt, "tokens_per_second": speed})
    return 0


@dataclass(frozen=True)
class Said:
    """One continuation and what it took."""

    text: str
    tokens: int
    prompt_tokens: int
    load_seconds: float
    seconds: float


def _artifact(args: argparse.Namespace, prompt: str) -> Said:
    """Stream from an artifact; one for more than one sequence gets the prompt in each, and the first is shown."""
    import torch

    from dsmoe_compiler.api import load

    start = time.perf_counter()
    runner = load(args.model)
    loaded = time.perf_counter()
    tokenizer = _tokenizer(runner.tokenizer, args.model)
    prompt_ids = tokenizer.encode(prompt)
    stream = TextStream(tokenizer.decode, _silent if args.json else _write)
    ids = runner.generate(
        torch.tensor([prompt_ids] * runner.batch_size, dtype=torch.int64),
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        eos_token_id=None if args.ignore_eos else tokenizer.eos_id,
        on_token=lambda token: stream.push(int(torch.as_tensor(token).flatten()[0])),
    )
    return _finish(args, stream, ids[0, len(prompt_ids) :].tolist(), len(prompt_ids), start, loaded)


def _eager(args: argparse.Namespace, prompt: str) -> Said:
    """The plain model; its text comes at the end, since the oracle's `generate` has no ear for single tokens."""
    import torch

    from dsmoe_compiler.loading import load_model, progress_bar
    from dsmoe_model.generation import generate

    start = time.perf_counter()
    with progress_bar(f"loading {args.model}") as progress:
        dtype = getattr(torch, DTYPES[args.dtype]) if args.dtype else None
        model = load_model(args.model, dtype=dtype, seed=args.seed, progress=progress)
    loaded = time.perf_counter()
    for note in model.notes:
        log.info("%s", note)
    tokenizer = _tokenizer(model.tokenizer, args.model)
    prompt_ids = tokenizer.encode(prompt)
    stream = TextStream(tokenizer.decode, _silent if args.json else _write)
    ids = generate(
        model.model,
        torch.tensor([prompt_ids], dtype=torch.int64),
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        eos_token_id=None if args.ignore_eos else tokenizer.eos_id,
    )
    new = ids[0, len(prompt_ids) :].tolist()
    for token in new:
        stream.push(token)
    return _finish(args, stream, new, len(prompt_ids), start, loaded)


def _finish(
    args: argparse.Namespace, stream: TextStream, new: list[int], prompt_tokens: int, start: float, loaded: float
) -> Said:
    stream.close()
    if not args.json:
        say("")
    text = stream.decode(new)
    return Said(text, len(new), prompt_tokens, loaded - start, time.perf_counter() - loaded)


def _tokenizer(tokenizer: Tokenizer | None, model: str) -> Tokenizer:
    """Raises UsageError where there is none: text cannot go in."""
    if tokenizer is None:
        raise UsageError(f"{model} has no tokenizer, so no text can go in; use the Python API with token ids")
    return tokenizer


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
