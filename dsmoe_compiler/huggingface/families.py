"""The page `docs/families.md`: every family of transformers with stacked experts, what of it fuses and how exact it is.

    python -m dsmoe_compiler.huggingface.families --write docs/families.md
    python -m dsmoe_compiler.huggingface.families --only qwen3_moe,gpt_oss --jobs 2

Families run in processes apart, a few in one, with a time limit; where one takes the process with it, the others of it
run again, alone. Without --write the page goes to stdout. Exit code 1 if a family's numbers are wrong, 0 otherwise.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

from dsmoe_compiler.huggingface.family_models import families
from dsmoe_compiler.huggingface.family_run import Row
from dsmoe_compiler.huggingface.versions import check
from dsmoe_compiler.version import __version__

COMMAND = "python -m dsmoe_compiler.huggingface.families --write docs/families.md"
COLUMNS = ("family", "", "layers", "gate", "experts", "error", "budget", "reason")
SECONDS = 120  # for one family
TOGETHER = 8
INTRODUCTION = """\
A tiny random model of each family (two or more layers, eight experts, float32, on a CPU) is built from the family's own
config class, captured as `torch.compile(model, backend="dsmoe")` captures it, and run as the passes left it, without
Inductor. "fused": the gate and the experts of every layer are operators of ours; "experts only": the gates are not.
"layers" counts those with fused experts and all that were seen, and in brackets those whose gate and experts are one
operator, `dsmoe::moe`. "error" is the relative distance of a row of the output from float64, for the row that uses most
of its budget, which is twice what transformers' eager loop is off itself. A reason says what is not fused, and why.
"""


def survey_all(
    names: Sequence[str], *, jobs: int = 1, seconds: int = SECONDS, progress: Callable[[str], None] = lambda _: None
) -> list[Row]:
    """The rows of `names` in their order, from `jobs` processes at a time."""
    parts = [names[i : i + TOGETHER] for i in range(0, len(names), TOGETHER)]

    def one(part: Sequence[str]) -> list[Row]:
        rows = run_together(part, seconds=seconds)
        for row in rows:
            progress(f"{row.family}: {row.state}, {row.fused} / {row.seen} {row.reason}".rstrip())
        return rows

    with ThreadPoolExecutor(jobs) as pool:
        return [row for rows in pool.map(one, parts) for row in rows]


def run_together(part: Sequence[str], *, seconds: int = SECONDS) -> list[Row]:
    """The rows of a few families from one process; where that ends early, the rest have one each."""
    done, why = _run(part, seconds * len(part))
    missing = [family for family in part if family not in done]
    if len(part) == 1:
        return [done.get(family, Row(family, reason=why)) for family in part]
    alone = {family: run_together([family], seconds=seconds)[0] for family in missing}
    return [done[family] if family in done else alone[family] for family in part]


def _run(part: Sequence[str], seconds: int) -> tuple[dict[str, Row], str]:
    """What a process for `part` printed, and why there is no more."""
    command = [sys.executable, "-m", "dsmoe_compiler.huggingface.family_run", *part]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        out, last = done.stdout, (done.stderr.strip() or "no message").splitlines()[-1][:200]
        why = f"its process ended with exit code {done.returncode}: {last}"
    except subprocess.TimeoutExpired as late:
        out, why = (late.stdout or b"").decode(), f"no result after {seconds} s"
    rows = [Row(**json.loads(line)) for line in out.splitlines() if line.startswith('{"family"')]
    return {row.family: row for row in rows}, why


def header() -> str:
    """The page's first lines, up to the date: what made it, with which versions."""
    import torch
    import transformers

    versions = f"transformers {transformers.__version__}, torch {torch.__version__}, dsmoe-compiler {__version__}"
    return f"# Families of transformers\n\nMade by `{COMMAND}`: do not edit. {versions}"


def render(rows: Sequence[Row], *, day: date) -> str:
    """The page."""
    counts = Counter(row.state for row in rows)
    lines = [
        f"{header()}, {day.isoformat()}.",
        "",
        INTRODUCTION,
        f"Of {len(rows)} families {counts['fused']} fuse completely, {counts['experts only']} their experts only, "
        f"{counts['partly']} partly, {counts['left alone']} not at all; {counts['wrong']} are wrong, "
        f"{counts['not run']} could not be run.",
        "",
        _line(COLUMNS),
        _line(["---"] * len(COLUMNS)),
        *(_line(_cells(row)) for row in rows),
    ]
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> list[str]:
    number = "{:.1e}".format
    layers = f"{row.fused} / {row.seen}" + (f" ({row.whole} in one)" if row.fused else "")
    error, budget = ("" if value is None else number(value) for value in (row.error, row.budget))
    return [row.family, row.state, layers, row.gate, row.experts, error, budget, row.reason]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the survey and write the page."""
    parser = argparse.ArgumentParser(prog=COMMAND.partition(" --")[0], description=__doc__.partition("\n")[0])
    parser.add_argument("--write", type=Path, metavar="FILE", help="where the page goes (stdout)")
    parser.add_argument("--only", metavar="FAMILY,...", help="these families, not all")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="families at a time (1)")
    parser.add_argument("--seconds", type=int, default=SECONDS, metavar="N", help=f"for one family ({SECONDS})")
    args = parser.parse_args(arguments)
    check("the survey of families")
    known = families()
    names = args.only.split(",") if args.only else known
    for name in names:
        if name not in known:
            parser.error(f"--only {name!r}: transformers has no such family with stacked experts")
    rows = survey_all(
        names, jobs=args.jobs, seconds=args.seconds, progress=lambda line: print(line, file=sys.stderr, flush=True)
    )
    page = render(rows, day=date.today())
    if args.write:
        args.write.write_text(page, encoding="utf-8")
    else:
        print(page, end="")
    return int(any(row.state == "wrong" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
