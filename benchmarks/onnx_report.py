"""The README's tables of what onnx_gpu and onnx_cpu_layer wrote."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu_report import median, number, unique
from benchmarks.markdown import conditions, table

Record = dict[str, Any]
PARTS = {
    "experts": "the op alone, its routing given",
    "layer": "a whole layer: gate, routed and shared experts",
    "model": "a step of 4 layers",
}


def gpu(record: Record) -> str:
    """For each part and dtype a row, for each number of tokens a column: ours, contrib's MoE, our torch path."""
    cells, rows = record["cells"], []
    tokens = sorted(unique(cell["tokens"] for cell in cells))
    for part in unique(cell["part"] for cell in cells):
        for dtype in unique(cell["dtype"] for cell in cells if cell["part"] == part):
            there = {c["tokens"]: c for c in cells if (c["part"], c["dtype"]) == (part, dtype)}
            for name in unique(name for cell in there.values() for name in cell["candidates"]):
                figures = [number(value) if (value := median(there.get(t), name)) else "-" for t in tokens]
                rows.append((PARTS.get(part, part), dtype, name, *figures))
    head = ("what", "dtype", "candidate", *(f"T={count}" for count in tokens))
    return "\n\n".join(
        [
            "**ONNX Runtime on a GPU**, deepseek-moe-16b's sizes, cold weights, ONNX Runtime's CUDA graphs, median "
            "microseconds; `MoE` is com.microsoft.MoE, `torch` the kernels under torch's CUDA graphs",
            table(head, rows),
            conditions(record["environment"]),
        ]
    )


def cpu(record: Record) -> str:
    """For each number of threads and tokens a row, for each candidate a column."""
    sizes = record["layer"]
    names = unique(row["candidate"] for run in record["runs"] for row in run["rows"])
    rows = []
    for run in record["runs"]:
        for tokens in unique(row["tokens"] for row in run["rows"]):
            found = {row["candidate"]: row["median_ms"] for row in run["rows"] if row["tokens"] == tokens}
            figures = [f"{found[name]:.1f}" if name in found else "-" for name in names]
            rows.append((str(run["threads"]), str(tokens), *figures))
    facts = record["machine"] | record["versions"] | {"command": record["command"]}
    return "\n\n".join(
        [
            f"**Routed experts in ONNX Runtime on a CPU**, H {sizes['hidden_size']}, "
            f"I {sizes['moe_intermediate_size']}, "
            f"{sizes['n_routed_experts']} experts, top-{sizes['num_experts_per_tok']}, {record['dtype']}, median ms",
            table(("threads", "tokens", *names), rows),
            conditions(facts),
        ]
    )
