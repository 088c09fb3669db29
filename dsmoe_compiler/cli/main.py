"""Reads the command line, runs one verb, and turns what goes wrong into one line and an exit code.

Heavy imports (torch takes seconds) stand inside each verb's `run`, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from types import FrameType
from typing import NoReturn, Protocol, cast

from dsmoe_compiler.cli import build_ort, compare, doctor, explain, generate, info, tune
from dsmoe_compiler.cli import compile as compile_verb
from dsmoe_compiler.cli import list as list_verb
from dsmoe_compiler.cli.console import UsageError, accept_any_text, set_up_log
from dsmoe_compiler.version import __version__
from dsmoe_runtime.errors import DsmoeError, VerificationError

OK, FAILED, USAGE, UNVERIFIED, INTERRUPTED, TERMINATED, BROKEN_PIPE = 0, 1, 2, 3, 130, 143, 141

DESCRIPTION = """\
Takes a mixture-of-experts model written plainly and gives back the same model,
fast and deployable, with the proof that it is the same.
"""

EPILOG = """\
MODEL is a preset's name (dsmoe list) or a checkpoint folder.

  dsmoe compile deepseek-moe-tiny -o out/tiny
  dsmoe generate out/tiny --prompt "Once upon a time"
  dsmoe compare deepseek-moe-tiny

exit codes: 0 ok, 1 failed, 2 usage, 3 verification failed, 130 Ctrl-C
environment: DSMOE_LOG_LEVEL=DEBUG|INFO|WARNING|ERROR, DSMOE_DEBUG=1 (tracebacks)
"""


class Verb(Protocol):
    """A module of this folder."""

    NAME: str
    SUMMARY: str
    EXAMPLES: str

    def arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> int: ...


VERBS: tuple[Verb, ...] = (compile_verb, compare, explain, generate, list_verb, info, tune, build_ort, doctor)


def build_parser() -> argparse.ArgumentParser:
    """The parser of every verb; `verb` in the parsed arguments is the module to run."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="dsmoe", description=DESCRIPTION, epilog=EPILOG, formatter_class=plain, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"dsmoe {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for verb in VERBS:
        child = verbs.add_parser(
            verb.NAME,
            help=verb.SUMMARY,
            description=verb.SUMMARY[0].upper() + verb.SUMMARY[1:] + ".",
            epilog=f"examples:\n{verb.EXAMPLES}",
            formatter_class=plain,
            allow_abbrev=False,
        )
        verb.arguments(child)
        child.add_argument("-v", "--verbose", action="count", default=0, help="more of the log; -vv with tracebacks")
        child.add_argument("-q", "--quiet", action="count", default=0, help="less of the log")
        child.set_defaults(verb=verb)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return the exit code; argparse itself leaves through SystemExit (0 for help, 2 for usage)."""
    args = build_parser().parse_args(argv)
    traced = os.environ.get("DSMOE_DEBUG", "0") not in ("", "0") or args.verbose > 1
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        accept_any_text()
        set_up_log(args.verbose, args.quiet)
        code = args.verb.run(args)
        sys.stdout.flush()
        return cast(int, code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our result has gone; point stdout nowhere, so that Python's own last flush cannot fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as error:
        if traced:
            traceback.print_exc()
        print(f"dsmoe {args.verb.NAME}: {_message(error, traced=traced)}", file=sys.stderr)
        return _exit_code(error)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _exit_code(error: Exception) -> int:
    if isinstance(error, UsageError):
        return USAGE
    if isinstance(error, VerificationError):
        return UNVERIFIED
    return FAILED


def _message(error: Exception, *, traced: bool) -> str:
    """What a user reads: our errors, all ValueErrors and the system's as they are; anything else is a fault of ours."""
    if isinstance(error, DsmoeError | ValueError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        where = "".join(f": {name}" for name in (error.filename, error.filename2) if name)
        return f"{error.strerror}{where}"
    hint = "" if traced else "; set DSMOE_DEBUG=1 for the traceback"
    return f"unexpected {type(error).__name__}: {str(error) or 'no message'}{hint}"


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM leaves through the same `finally` blocks as Ctrl-C does: no half-written file, no worker stays."""
    raise SystemExit(TERMINATED)
