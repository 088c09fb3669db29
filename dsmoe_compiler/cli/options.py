"""Options that several verbs share, and the values they accept."""

from __future__ import annotations

import argparse
from pathlib import Path

from dsmoe_compiler.cli.console import UsageError
from dsmoe_model.presets import PRESETS, preset

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
TARGETS = ("cpu", "cuda")
MODEL_HELP = "a preset's name (dsmoe list), or a checkpoint folder with config.json and *.safetensors"


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of weights and activations (as stored, else fp32)")


def add_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=whole, default=0, metavar="N", help="for random weights and sampling (0)")


def whole(text: str) -> int:
    """A whole number from 0 on."""
    return _number(text, least=0)


def positive(text: str) -> int:
    """A whole number from 1 on."""
    return _number(text, least=1)


def names(text: str) -> tuple[str, ...]:
    """A comma-separated list without blanks and repetitions, in the order given."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def numbers(text: str) -> tuple[int, ...]:
    """A comma-separated list of whole numbers from 1 on."""
    return tuple(positive(part) for part in names(text))


def check_model(model: str) -> None:
    """Refuse a MODEL that is neither a folder nor a preset, before anything heavy is imported.

    Raises:
        UsageError: names the presets that come closest.
    """
    path = Path(model)
    if path.is_dir() or model in PRESETS:
        return
    if path.exists():
        raise UsageError(f"{model!r} is a file; MODEL is {MODEL_HELP}")
    try:
        preset(model)
    except ValueError as error:
        raise UsageError(f"there is no such folder, and {error}") from None


def check_target(target: str | None) -> None:
    """Refuse `--target cuda` where torch finds no GPU.

    Raises:
        UsageError: says what torch was built for and what is there.
    """
    if target != "cuda":
        return
    import torch

    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        raise UsageError(
            f"--target cuda: torch {torch.__version__} is {built} and finds no GPU here; "
            "use --target cpu, or run `dsmoe doctor` to see what is missing"
        )


def _number(text: str, *, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"{value} is below {least}")
    return value
