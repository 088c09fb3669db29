"""The README's tables of the GPU benchmarks, from what gpu_experts, gpu_layer, gpu_training and gpu_model wrote."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.markdown import conditions, table

Record = dict[str, Any]


def experts(record: Record) -> str:
    """Routed experts: a row for each shape, a column for each number of tokens, and what came of the goals."""
    cells = {(c["shape"], c["tokens"]): c for c in record["cells"] if c["routing"] == "uniform"}
    shapes, tokens = unique(shape for shape, _ in cells), sorted(unique(count for _, count in cells))
    rows = [(shape, *(expert_cell(cells.get((shape, count))) for count in tokens)) for shape in shapes]
    parts = [
        f"**Routed experts**, {record['dtype']}, cold weights, CUDA graphs, median microseconds of dsmoe / best stock "
        "(torch grouped_mm, transformers) / best peer published / dsmoe's share of the roofline",
        table(("shape", *(f"T={count}" for count in tokens)), rows),
        standing(list(cells.values())),
    ]
    others = [c for c in record["cells"] if c["routing"] != "uniform"]
    lines = []
    for cell in others:
        ours, even = median(cell, "dsmoe"), median(cells.get((cell["shape"], cell["tokens"])), "dsmoe")
        versus = f"{ours / even:.2f}x" if ours and even else ""
        lines.append((cell["shape"], str(cell["tokens"]), cell["routing"], shown(cell, "dsmoe"), versus))
    if lines:
        parts.append(table(("shape", "tokens", "routing", "dsmoe, us", "of uniform"), lines))
    return "\n\n".join([*parts, conditions(record["environment"])])


def expert_cell(cell: Record | None) -> str:
    if cell is None:
        return ""
    name, peer, ours = best(cell, ("dsmoe",)), cell["best_peer_us"], median(cell, "dsmoe")
    stock = shown(cell, name) if name else "-"
    share = f"{cell['roofline_us'] / ours:.0%}" if ours else "-"
    return f"**{shown(cell, 'dsmoe')}** / {stock} / {number(peer) if peer else '-'} / {share}"


def standing(cells: list[Record]) -> str:
    """How many cells are ahead of the best peer, of the stock candidates and of the goal, and which are behind."""
    judged = [(c, median(c, "dsmoe"), c["best_peer_us"], c["goal_us"]) for c in cells if c["best_peer_us"]]
    ahead = sum(1 for _, ours, peer, _ in judged if ours and ours < peer)
    reached = sum(1 for _, ours, _, goal in judged if ours and ours <= goal)
    behind = [f"{c['shape']} T={c['tokens']}" for c, ours, peer, _ in judged if not ours or ours > 1.05 * peer]
    stock = [(median(c, "dsmoe"), median(c, best(c, ("dsmoe",)))) for c in cells]
    faster = sum(1 for ours, theirs in stock if ours and theirs and ours < theirs)
    text = (
        f"Ahead of the best peer in {ahead} of {len(judged)} cells, the goal reached in {reached}; ahead of the best "
    )
    text += f"stock candidate in {faster} of {sum(1 for _, theirs in stock if theirs)}."
    return f"{text} Behind the best peer by more than 5%: {', '.join(behind)}." if behind else text


def layer(record: Record) -> str:
    """A whole layer: what it costs over its routed experts and the roofline of the shared ones."""
    rows = []
    for cell in record["cells"]:
        stock = best(cell, ("dsmoe", "dsmoe routed", "eager"))
        over = cell.get("over_paid")
        rows.append(
            (
                str(cell["tokens"]),
                shown(cell, "dsmoe"),
                shown(cell, "dsmoe routed"),
                number(cell["roofline_us"]["shared"]),
                f"{over:.2f}x" if over else "",
                f"{shown(cell, stock)} ({stock})" if stock else "",
                shown(cell, "eager"),
                share(cell, "dsmoe", "share_of_roofline"),
            )
        )
    title = (
        f"**One whole layer** (H {record['hidden']}, I {record['width']}, {record['experts']} experts, "
        f"top-{record['top_k']}, {record['shared']} shared): gate, routed and shared experts, bfloat16, cold weights, "
        f"microseconds; at most {record['limit_over_paid']:.2f}x of routed + shared roofline is the limit"
    )
    head = ("tokens", "dsmoe", "routed alone", "shared roofline", "of the two", "best stock", "eager", "of roofline")
    return f"{title}\n\n{table(head, rows)}\n\n{conditions(record['environment'])}"


def training(record: Record) -> str:
    """Forward and backward of the routed experts."""
    rows = []
    for cell in record["cells"]:
        stock = best(cell, ("dsmoe",))
        ours = cell["candidates"].get("dsmoe", {})
        bits, kept = ours.get("repeatable"), ours.get("saved_bytes")
        theirs = cell["candidates"][stock].get("saved_bytes") if stock else None
        same = "" if bits is None else "yes" if bits["forward_same"] and bits["step_same"] else "NO"
        rows.append(
            (
                str(cell["tokens"]),
                shown(cell, "dsmoe"),
                rate(cell, "dsmoe"),
                f"{rate(cell, stock)} ({stock})" if stock else "",
                f"{cell.get('best_peer_tflop_per_second', '')}",
                f"{cell.get('goal_tflop_per_second', '')}",
                f"{mebibytes(kept)} / {mebibytes(theirs)}",
                same,
            )
        )
    head = ("tokens", "dsmoe, us", "TFLOP/s", "best stock", "best peer", "goal", "MiB kept, dsmoe / stock", "same bits")
    title = "**Training step** (forward + backward) of deepseek-moe-16b's routed experts, bfloat16"
    return f"{title}\n\n{table(head, rows)}\n\n{conditions(record['environment'])}"


def model(record: Record) -> str:
    """Whole models: tokens per second, the bound, and how long the first token takes."""
    rows = []
    for cell in record["cells"]:
        stock = best(cell, ("dsmoe", "eager"))
        ours, eager = median(cell, "dsmoe"), median(cell, "eager")
        theirs = median(cell, stock)
        rows.append(
            (
                cell["preset"],
                f"{cell['phase']} {cell['size']}",
                speed(cell, "dsmoe"),
                share(cell, "dsmoe", "share_of_bound"),
                speed(cell, "eager"),
                f"{eager / ours:.1f}x" if ours and eager else "",
                f"{speed(cell, stock)} ({stock})" if stock else "",
                f"{theirs / ours:.2f}x" if ours and theirs else "",
            )
        )
    parts = []
    if rows:
        head = ("model", "phase", "tokens/s", "of the bound", "eager", "faster", "best of transformers", "faster")
        title = (
            "**Whole models**, bfloat16, random weights, CUDA graphs. The bound is bytes for decode, FLOP for prefill"
        )
        parts += [title, table(head, rows)]
    times = {(c["preset"], c["phase"], c["size"]): median(c, "dsmoe") for c in record["cells"]}
    for (preset, phase, size), mine in times.items():
        dense = times.get(("llama2-7b", phase, size))
        if preset == "deepseek-moe-16b" and mine and dense:
            parts.append(f"{phase} {size}: deepseek-moe-16b takes {mine / dense:.2f}x the time of llama2-7b.")
    parts += [first_token(name, found) for name, found in record.get("compile", {}).items()]
    return "\n\n".join([*parts, conditions(record["environment"])])


def first_token(name: str, found: Record) -> str:
    """Seconds from the start of a process, cold and warm."""
    said = []
    for state in ("cold", "warm"):
        marks = found.get(state, {})
        seconds = f"{marks['first_token']:.1f} s" if "first_token" in marks else "failed"
        second = f", decode's {marks['second_token']:.1f} s" if "second_token" in marks else ""
        said.append(f"{state} {seconds}{second}")
    return f"{name}, from the start of a process to the first token (prompt of {found['prompt']}): {'; '.join(said)}."


def unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def median(cell: Record | None, name: str | None) -> float | None:
    """Microseconds of a candidate that agreed, or None."""
    entry = (cell or {}).get("candidates", {}).get(name, {})
    return entry.get("median_us") if entry.get("agreement", {}).get("ok", True) else None


def best(cell: Record, but: tuple[str, ...]) -> str | None:
    """The fastest candidate that agreed, apart from some."""
    times = {name: median(cell, name) for name in cell["candidates"] if name not in but}
    return min((name for name in times if times[name]), key=lambda name: times[name] or 0.0, default=None)


def shown(cell: Record, name: str | None) -> str:
    """A candidate's microseconds, or why there are none."""
    entry = cell["candidates"].get(name)
    found = median(cell, name)
    if found:
        return f"{number(found)} (unstable)" if entry["unstable"] else number(found)
    if entry is None:
        return ""
    return "failed" if "error" in entry else "not run" if "skipped" in entry else "disagrees"


def share(cell: Record, name: str, field: str) -> str:
    return f"{cell['candidates'][name][field]:.0%}" if median(cell, name) else ""


def rate(cell: Record, name: str) -> str:
    return f"{cell['candidates'][name]['tflop_per_second']:.0f}" if median(cell, name) else ""


def speed(cell: Record, name: str) -> str:
    return f"{cell['candidates'][name]['tokens_per_second']:,.0f}" if median(cell, name) else shown(cell, name)


def mebibytes(size: float | None) -> str:
    return "-" if size is None else f"{size / 2**20:.0f}"


def number(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}" if value >= 100 else f"{value:.1f}"
