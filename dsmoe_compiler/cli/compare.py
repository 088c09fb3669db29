"""`dsmoe compare`: is it the same model, and how fast is it beside eager and others?"""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

from dsmoe_compiler.cli.console import UsageError, print_json, say
from dsmoe_compiler.cli.options import (
    DTYPES,
    TARGETS,
    add_dtype,
    add_model,
    add_seed,
    check_model,
    check_target,
    names,
    numbers,
    positive,
)

NAME = "compare"
SUMMARY = "compare the compiled model with eager and others: agreement first, then speed"
EXAMPLES = """\
  dsmoe compare deepseek-moe-tiny
  dsmoe compare deepseek-moe-tiny --against eager,inductor --tokens 1,16,256 --report report.html
  dsmoe compare path/to/checkpoint --dtype bf16 --against hf --json result.json
"""

log = logging.getLogger(__name__)

FAILED, UNVERIFIED = 1, 3
AGAINST = ("eager", "inductor", "mlir", "hf", "hf-grouped", "hf-batched")


def arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--against",
        type=names,
        metavar="NAME,...",
        help=f"of {', '.join(AGAINST)} (eager,inductor,hf, and on the CPU mlir)",
    )
    parser.add_argument(
        "--tokens", type=numbers, default=(1, 16, 256), metavar="N,...", help="prefill lengths (1,16,256)"
    )
    parser.add_argument("--decode-steps", type=positive, default=32, metavar="N", help="tokens decoded one by one (32)")
    parser.add_argument("--repeats", type=positive, default=7, metavar="N", help="timed rounds (7)")
    parser.add_argument("--target", choices=TARGETS, help="where to run (cuda where there is a GPU, else cpu)")
    add_dtype(parser)
    parser.add_argument("--report", type=Path, metavar="FILE", help="write one self-contained HTML page")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was found as JSON; - is stdout")
    add_seed(parser)


def run(args: argparse.Namespace) -> int:
    unknown = [name for name in args.against or () if name not in AGAINST]
    if unknown:
        raise UsageError(f"--against {unknown[0]!r}: nothing is called so; there are {', '.join(AGAINST)}")
    check_model(args.model)
    check_target(args.target)
    for path in (args.report, args.json):
        check_file(path)

    import torch

    from dsmoe_compiler.compare import compare, render_table
    from dsmoe_compiler.loading import load_model, progress_bar
    from dsmoe_compiler.report import write_report
    from dsmoe_model.checkpoint.json_files import write_json

    target = args.target or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, DTYPES[args.dtype]) if args.dtype else None
    with progress_bar(f"loading {args.model}") as progress:
        loaded = load_model(args.model, dtype=dtype, device=target, seed=args.seed, progress=progress)
    limit = loaded.config.max_position_embeddings
    if max(args.tokens) > limit or args.decode_steps >= limit:
        raise UsageError(
            f"--tokens {max(args.tokens)} and --decode-steps {args.decode_steps} must fit the model's {limit} positions"
        )
    for note in loaded.notes:
        log.info("%s: %s", args.model, note)
    comparison = compare(
        loaded,
        against=args.against or ("eager", "inductor", *(["mlir"] if target == "cpu" else []), "hf"),
        tokens=args.tokens,
        decode_steps=args.decode_steps,
        repeats=args.repeats,
    )
    for path in (args.report, args.json):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    if args.report:
        write_report(args.report, comparison)
        log.info("report: %s", args.report)
    if args.json and str(args.json) != "-":
        write_json(args.json, comparison.to_dict())
        log.info("JSON: %s", args.json)
    if str(args.json) == "-":
        print_json(comparison.to_dict())
    else:
        say(render_table(comparison))
    states = [candidate.state for candidate in comparison.candidates if candidate.name == "dsmoe"]
    return 0 if comparison.ok else UNVERIFIED if "disagrees" in states else FAILED


def check_file(path: Path | None) -> None:
    """Raises UsageError if a result could not be written to `path`, before the minutes that it takes to get it."""
    if path is None or str(path) == "-":
        return
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name a file")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not os.access(folder, os.W_OK):
        raise UsageError(f"{path}: {folder} is not writable")
