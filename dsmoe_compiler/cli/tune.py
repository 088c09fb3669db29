"""`dsmoe tune`: faster tiles for a model's experts on this GPU, within a time box, remembered for this user."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dsmoe_compiler.cli.console import UsageError, print_json, print_table, say
from dsmoe_compiler.cli.options import DTYPES, MODEL_HELP, add_json, check_model, numbers, positive, whole

if TYPE_CHECKING:
    from dsmoe_compiler.search import Result
    from dsmoe_runtime.kernels.gpu import Device
    from dsmoe_runtime.kernels.plan import Tile

NAME = "tune"
SUMMARY = "time tiles of the expert kernels on this GPU and remember those that win"
EXAMPLES = """\
  dsmoe tune deepseek-moe-16b
  dsmoe tune --shape 2048,768,128,8 --tokens 1,64,4096 --budget 30
  dsmoe tune --shape 2048,1408,64,6,2 --tokens 1      with two shared experts
  dsmoe tune deepseek-moe-16b --dry-run --gpu H200

Without tuning a cost model chooses, and tables for some GPUs and models come with the package. What tuning keeps is at
least 2 % faster, beyond twice the noise, with equal results; it is stored in $DSMOE_CACHE_DIR/tuned, or dsmoe/tuned in
the user's cache folder, and counts for this GPU, shape, dtype and release of Triton.
"""

SIZES = ("hidden", "width", "experts", "top_k", "shared")
SHOWN = 5  # plans of a dry run
Sizes = tuple[int, int, int, int, int]
Layers = Mapping[str, Sizes]

log = logging.getLogger(__name__)


def arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("model", metavar="MODEL", nargs="?", help=MODEL_HELP)
    what.add_argument("--shape", type=sizes, metavar="H,I,E,K[,S]", help="hidden size, width, experts, top-k, shared")
    what.add_argument("--all-shapes", action="store_true", help="the layers that the package has tables for")
    parser.add_argument("--tokens", type=numbers, metavar="T,...", help="tokens a call (1,16,64,512,4096,16384)")
    parser.add_argument(
        "--dtype", choices=(*DTYPES, *DTYPES.values()), default="bf16", help="of weights and activations (bf16)"
    )
    parser.add_argument("--budget", type=positive, default=60, metavar="SECONDS", help="for everything (60)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="keep the winners in this table, not the user's own")
    parser.add_argument(
        "--dry-run", action="store_true", help="only print plans with the times that the model predicts"
    )
    parser.add_argument("--gpu", metavar="NAME", help="with --dry-run: a GPU that need not be here, such as H200")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    if args.gpu is not None and not args.dry_run:
        raise UsageError("--gpu names a GPU for --dry-run; kernels can only be timed on the one that is here")
    if args.model is not None:
        check_model(args.model)
    check_triton()

    from dsmoe_compiler.tuning import LAYERS, TOKENS

    layers = LAYERS if args.all_shapes else {args.model or "shape": args.shape or layer_of(args.model)}
    tokens, dtype = args.tokens or TOKENS, DTYPES.get(args.dtype, args.dtype)
    if args.dry_run:
        return dry_run(layers, tokens, dtype, device_named(args.gpu), as_json=args.json)
    check_gpu()

    from dsmoe_compiler.tuning import tune

    results, path = tune(layers, tokens=tokens, dtype=dtype, budget=args.budget, path=args.write)
    kept = sum(result.kept for result in results)
    if args.json:
        print_json({"table": str(path) if kept else None, "results": [result.to_dict() for result in results]})
    else:
        _print(results)
        say(f"{kept} of {len(results)} kept{f' in {path}' if kept else ''}")
    missing = len(layers) * len(tokens) - len(results)
    if missing:
        log.warning("%d of %d were not tuned, see above; give a larger --budget", missing, len(layers) * len(tokens))
    return 0 if results else 1


def sizes(text: str) -> Sizes:
    """`H,I,E,K` or `H,I,E,K,S`, whole numbers from 1 on, S from 0 on; it is 0 if it is not given."""
    parts = text.split(",")
    if len(parts) not in (4, 5):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not H,I,E,K or H,I,E,K,S (hidden size, expert width, experts, top-k, shared experts)"
        )
    hidden, width, experts, top_k = (positive(part.strip()) for part in parts[:4])
    shared = whole(parts[4].strip()) if len(parts) > 4 else 0
    if top_k > experts:
        raise argparse.ArgumentTypeError(f"top-k is {top_k}, but there are only {experts} experts")
    return hidden, width, experts, top_k, shared


def check_triton() -> None:
    """Raises UsageError where the kernels cannot even be imported."""
    from importlib.util import find_spec

    if find_spec("triton") is None:
        raise UsageError("the kernels need Triton, which is not installed; it comes with a CUDA build of torch")


def check_gpu() -> None:
    """Raises UsageError where there is no GPU to time kernels on."""
    import torch

    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        raise UsageError(
            f"tune times kernels on a GPU; torch {torch.__version__} is {built} and finds none here. "
            "See the plans without one by --dry-run --gpu H200, or what is missing by `dsmoe doctor`"
        )


def layer_of(model: str) -> Sizes:
    """H, I, E, K and S of a model's mixture-of-experts layers.

    Raises:
        UsageError: it has none.
    """
    from dsmoe_compiler.description import describe

    config = describe(model).config
    if not config.n_routed_experts:
        raise UsageError(f"{model} has no mixture-of-experts layer, so there is nothing to tune")
    routed = (config.hidden_size, config.moe_intermediate_size, config.n_routed_experts, config.num_experts_per_tok)
    return (*routed, config.n_shared_experts)


def device_named(name: str | None) -> Device:
    """The facts of a GPU: of the one that is here, if no name is given."""
    import torch

    from dsmoe_runtime.kernels.gpu import facts, named

    try:
        if name is not None:
            return named(name)
        if torch.cuda.is_available():
            return facts(torch.device("cuda", torch.cuda.current_device()))
    except ValueError as error:
        raise UsageError(f"--gpu: {error}") from None
    raise UsageError("--dry-run: there is no GPU here to plan for; name one, such as --gpu H200")


def dry_run(layers: Layers, tokens: tuple[int, ...], dtype: str, device: Device, *, as_json: bool) -> int:
    """Print the best plans as the model has it, and which one is in use."""
    from dataclasses import asdict

    from dsmoe_runtime.kernels.choose import candidates, choose, predict
    from dsmoe_runtime.kernels.plan import Shape

    found = []
    for name, sizes in layers.items():
        for number in tokens:
            shape = Shape(number, *sizes[:4], dtype, sizes[4])
            chosen = choose(shape, device)
            listed = [chosen, *(plan for plan in candidates(shape, device) if plan != chosen)][:SHOWN]
            found += [(name, number, plan, plan == chosen, predict(shape, plan, device)) for plan in listed]
    if as_json:
        keys = ("name", "tokens", "plan", "in_use", "predicted_us")
        rows = [dict(zip(keys, (n, t, asdict(p), used, us), strict=True)) for n, t, p, used, us in found]
        print_json({"device": asdict(device), "dtype": dtype, "plans": rows})
        return 0
    say(f"{device.name}, {dtype}: the first plan of each is the one in use, times are predicted")
    print_table(
        ("layer", "T", "us", "regime", "gate and up", "down"),
        [(n, str(t), f"{us:.1f}", p.regime, tile_text(p.up), tile_text(p.down)) for n, t, p, _, us in found],
    )
    return 0


def tile_text(tile: Tile) -> str:
    """Rows x columns x depth, warps, stages."""
    return f"{tile.block_m}x{tile.block_n}x{tile.block_k} w{tile.num_warps} s{tile.num_stages}"


def _print(results: list[Result]) -> None:
    rows = [
        (
            ",".join(str(getattr(result.shape, size)) for size in SIZES),
            str(result.shape.tokens),
            f"{result.incumbent_us:.1f}",
            f"{result.tuned_us:.1f}",
            f"{100 * result.gain:.1f} %",
            "yes" if result.kept else "no",
            result.why,
        )
        for result in results
    ]
    print_table(("H,I,E,K,S", "T", "default us", "tuned us", "gain", "kept", ""), rows)
