"""The README's tables of what mlir_experts and mlir_model wrote."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu_report import unique
from benchmarks.markdown import conditions, table

Record = dict[str, Any]


def experts(record: Record) -> str:
    """For each dtype, number of threads and tokens a row: every candidate's least processor time, and our shares."""
    names = unique(name for cell in record["cells"] for name in cell["milliseconds"])
    rows = []
    for cell in record["cells"]:
        times = cell["milliseconds"]
        figures = [f"{times[name]['cpu_min']:.1f}" if name in times else "-" for name in names]
        shares = (f"{cell['share_of_read']:.0%}", f"{cell['share_of_peak']:.0%}", f"{cell['ahead_by_cpu_min']:.2f}x")
        rows.append((cell["dtype"], str(cell["threads"]), str(cell["tokens"]), *figures, *shares))
    sizes = record["layer"]
    title = (
        f"**Routed experts through MLIR on a CPU**, H {sizes['hidden']}, I {sizes['width']}, "
        f"{sizes['experts']} experts, top-{sizes['top_k']}: processor milliseconds of all threads, least of many "
        "interleaved rounds; shares of the "
        "measured read bandwidth and peak; ahead of the best other"
    )
    head = ("dtype", "threads", "tokens", *names, "of read", "of peak", "ahead")
    facts = record["machine"] | record["versions"] | {"command": record["command"]}
    return "\n\n".join([title, table(head, rows), conditions(facts)])


def model(record: Record) -> str:
    """For each dtype, phase and number of tokens a row: tokens per second of every candidate."""
    results = record["results"]
    names = unique(result["candidate"] for result in results)
    rows = []
    for key in unique((r["dtype"], r["phase"], r["tokens"]) for r in results):
        found = {r["candidate"]: r for r in results if (r["dtype"], r["phase"], r["tokens"]) == key}
        figures = [f"{found[name]['tokens_per_second']:.0f}" if name in found else "-" for name in names]
        rows.append((*map(str, key), *figures, f"{found['mlir']['against_best_other_processor']:.1f}x"))
    title = (
        f"**A whole model through MLIR on a CPU**, {record['preset']}, {record['threads']} thread: tokens per second "
        "by wall time, and by how much processor time the better of the others takes more"
    )
    return "\n\n".join(
        [title, table(("dtype", "phase", "tokens", *names, "ahead"), rows), conditions(record["environment"])]
    )
