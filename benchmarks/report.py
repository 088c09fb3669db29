"""Markdown tables from benchmarks/results/*.json, for the README and the docs: no figure is typed by hand.

    python -m benchmarks.report                    print the tables of all results
    python -m benchmarks.report --into README.md   replace what stands between the two marks in that file
    python -m benchmarks.report --check README.md  exit 1 if the file does not hold the tables of these results

The marks are `<!-- benchmarks -->` and `<!-- /benchmarks -->`, each on a line of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import gpu_report, mlir_report, onnx_report
from benchmarks.markdown import conditions, table

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
OF_BENCHMARK = {
    "gpu_experts": gpu_report.experts,
    "gpu_layer": gpu_report.layer,
    "gpu_training": gpu_report.training,
    "gpu_model": gpu_report.model,
    "onnx_gpu": onnx_report.gpu,
    "onnx_model": onnx_report.gpu,
    "mlir_experts": mlir_report.experts,
    "mlir_model": mlir_report.model,
}


def tables(folder: Path = RESULTS) -> str:
    """The tables of all results in `folder`, by file name; raises ValueError for a file of unknown shape."""
    parts = []
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record.get("format") == "dsmoe-comparison-1":
            parts.append(comparison(record))
        elif record.get("benchmark") == "decode":
            parts.append(decode(record))
        elif record.get("benchmark") == "compile_time":
            parts.append(compile_time(record))
        elif record.get("benchmark") in OF_BENCHMARK:
            parts.append(OF_BENCHMARK[record["benchmark"]](record))
        elif "runs" in record:
            parts.append(onnx_report.cpu(record))
        elif "layer" in record and "dtypes" in record:
            parts.append(layer(record))
        else:
            raise ValueError(f"{path} is no result that benchmarks.report knows: its keys are {', '.join(record)}")
    return "\n\n".join(parts)


def compile_time(record: dict[str, Any]) -> str:
    """Seconds from a checkpoint folder to an artifact, from benchmarks.compile_time."""
    seconds, kernels = record["seconds"], record["kernels"]
    head = ("read", "capture and passes", "read + compile, both phases", "proof", "kernels generated", "expert kernels")
    row = (
        f"{seconds['load']:.1f} s",
        f"{seconds['capture']:.1f} s",
        f"{seconds['load_and_compile']:.1f} s",
        f"{seconds['verify']:.1f} s",
        " and ".join(str(count) for count in kernels.values()),
        str(len({name for operators in record["operators"].values() for name in operators})),
    )
    title = f"**Compile time**, {record['layers']} layers of deepseek-moe-16b's structure at 1/8 width, cold caches"
    return f"{title}\n\n{table(head, [row])}\n\n{conditions(record['environment'])}"


def decode(record: dict[str, Any]) -> str:
    """Tokens per second of whole models, from benchmarks.decode."""
    rows = []
    for result in record["results"]:
        if "median" not in result:
            rows.append((result["dtype"], result["candidate"], "disagrees", "", "", ""))
            continue
        rows.append(
            (
                result["dtype"],
                result["candidate"],
                _rate(result["tokens_per_second"]),
                f"{_ms(result['mean'])} ± {_ms(result['sd'])}",
                f"{result['speedup']:.2f}x",
                "unstable" if result["unstable"] else "",
            )
        )
    title = f"**Decode, {record['preset']}**, {record['steps']} steps after {record['context']} tokens"
    head = ("dtype", "candidate", "tokens/s", "ms per token", "vs eager", "")
    return f"{title}\n\n{table(head, rows)}\n\n{conditions(record['environment'])}"


def layer(record: dict[str, Any]) -> str:
    """One mixture-of-experts layer, from benchmarks.cpu_layer: milliseconds, and ours against each."""
    shape, parts = record["layer"], []
    for found in record["dtypes"]:
        rows = found["rows"]
        names = list(dict.fromkeys(row["candidate"] for row in rows))
        median = {(row["tokens"], row["candidate"]): row["median_ms"] for row in rows}
        share = {(row["tokens"], row["candidate"]): row["share_of_roof"] for row in rows}
        lines = []
        for tokens in dict.fromkeys(row["tokens"] for row in rows):
            ours = median.get((tokens, "dsmoe"))
            cells = [f"{median[tokens, name]:.3g}" if (tokens, name) in median else "" for name in names]
            eager = median.get((tokens, "eager"))
            ratio = f"{eager / ours:.2f}x" if ours and eager else ""
            roof = f"{share[tokens, 'dsmoe']:.0%}" if (tokens, "dsmoe") in share else ""
            lines.append((str(tokens), *cells, ratio, roof))
        head = ("tokens", *(f"{name}, ms" for name in names), "dsmoe vs eager", "of roof")
        parts.append(f"{found['dtype']}\n\n{table(head, lines)}")
    title = (
        f"**One layer** (H {shape['hidden_size']}, I {shape['moe_intermediate_size']}, "
        f"{shape['n_routed_experts']} experts, top-{shape['num_experts_per_tok']}, "
        f"{shape['n_shared_experts']} shared), medians"
    )
    machine = {**record["machine"], **record["versions"], "command": record["command"]}
    return "\n\n".join([title, *parts, conditions(machine)])


def comparison(record: dict[str, Any]) -> str:
    """What `dsmoe compare --json` wrote."""
    rows = []
    for candidate in record["candidates"]:
        points = [point for point in candidate["measurements"] if point["samples"]]
        if not points:
            rows.append((candidate["title"], candidate["state"], "", "", "", ""))
        for point in points:
            phase = "decode" if point["phase"] == "decode" else f"prefill {point['tokens']}"
            unstable = " (unstable)" if point["samples"]["unstable"] else ""
            rows.append(
                (
                    candidate["title"],
                    phase,
                    _rate(point["tokens_per_second"]) + unstable,
                    f"{_ms(point['samples']['mean'])} ± {_ms(point['samples']['sd'])}",
                    f"{point['speedup']:.2f}x" if point["speedup"] else "",
                    f"{point['roofline_share']:.0%}" if point["roofline_share"] else "",
                )
            )
    title = f"**{record['model']}**, {record['dtype']} on {record['target']}. {record['headline']}"
    head = ("candidate", "phase", "tokens/s", "ms", "vs eager", "of roof")
    return f"{title}\n\n{table(head, rows)}\n\n{conditions(record['environment'])}"


def into(text: str, new: str) -> str:
    """`text` with `new` between the marks; raises ValueError if they are not there once each, in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the file must hold {BEGIN} and then {END}, once each")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n\n{new}\n\n{END}{after}"


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.3g}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--into", type=Path)
    where.add_argument("--check", type=Path)
    arguments = parser.parse_args()
    new = tables(arguments.results)
    if arguments.into is None and arguments.check is None:
        print(new)
        return 0
    path = arguments.into or arguments.check
    old = path.read_text(encoding="utf-8")
    changed = into(old, new)
    if arguments.into is not None:
        path.write_text(changed, encoding="utf-8")
        return 0
    if changed != old:
        print(f"{path} does not hold the tables of {arguments.results}: run python -m benchmarks.report --into {path}")
    return int(changed != old)


if __name__ == "__main__":
    sys.exit(main())
