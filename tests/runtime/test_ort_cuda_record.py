"""What is recorded for a range of tokens is what the host part launches for each number of tokens in it."""

from __future__ import annotations

import pytest
import torch

from dsmoe_runtime.errors import TargetError
from dsmoe_runtime.kernels.plan import Plan, Tile
from dsmoe_runtime.ort_library.expressions import OPERATIONS, evaluate, text
from dsmoe_runtime.ort_library.hosts import Plans
from dsmoe_runtime.ort_library.layer import DecodeAttention, Gemv, Layer, MoELayer
from dsmoe_runtime.ort_library.record import MOST_TOKENS, Note, Record, address, plans_at, record, records, symbol

LAYERS = {
    "16B": Layer(2048, 1408, 64, 6, "bfloat16"),
    "16B float32": Layer(2048, 1408, 64, 6, "float32"),
    "odd": Layer(104, 88, 7, 3, "float16", "swiglu_oai", 1.702, 7.0, "interleaved", True, True),
    "ungated": Layer(264, 176, 9, 4, "bfloat16", "gelu", layout="ungated_transposed", down_bias=True),
    "2B": Layer(1280, 853, 63, 7, "bfloat16"),
}
LAYERS |= {
    "16B, whole": MoELayer(LAYERS["16B"], router_weight="bfloat16", shared_width=2816),
    "odd, whole": MoELayer(LAYERS["odd"], "softmax_after_topk", renormalize=True, router_bias="float16"),
    "grouped, whole": MoELayer(
        Layer(264, 176, 16, 4, "float32", "gelu", layout="ungated", down_bias=True),
        *("sigmoid", 4, 2, "top2", True, 1e-20, 2.5, "activation"),
        *("float32", None, "float32", 528),
    ),
}


def numbers(note: Note, made: Record, tokens: int) -> list[object]:
    """A launch as plain numbers: grid, constants, and arguments with the buffer and the offset of each tensor."""

    def plain(value: object) -> object:
        if isinstance(value, torch.SymInt):
            return evaluate(text(value), tokens)
        if isinstance(value, torch.Tensor):
            size = [plain(s) for s in value.shape]
            return made.buffers[address(value)], plain(value.storage_offset()), value.dtype, size
        if hasattr(value, "block_shape"):
            return [plain(value.base), *map(plain, value.shape), *map(plain, value.strides), value.block_shape]
        return value

    named = sorted((name, plain(value)) for name, value in note.named.items())
    return [note.kernel, note.early, *map(plain, note.grid), *map(plain, note.arguments), named]


def everything(made: Record, tokens: int) -> list[object]:
    """All launches, and the bytes of the workspaces."""
    return [
        *(numbers(note, made, tokens) for note in made.notes),
        *(evaluate(text(room), tokens) for room in made.rooms),
    ]


@pytest.mark.parametrize("name", LAYERS)
def test_a_record_is_the_host_part_at_every_number_of_tokens(name):
    """At the ends, in the middle and between; and ranges follow each other without a hole."""
    layer, end, regimes = LAYERS[name], 0, set()
    for made in records(layer):
        assert made.first == end + 1
        end = made.last
        regimes.add(made.plans.routed.regime)
        inside = {
            made.first,
            made.first + 1,
            (made.first + made.last) // 2,
            (made.first + 3 * made.last) // 4,
            made.last,
        }
        for tokens in sorted(t for t in inside if made.first <= t <= made.last):
            assert plans_at(layer, tokens) == made.plans
            assert everything(made, tokens) == everything(record(layer, made.plans, tokens, tokens), tokens), tokens
    assert end == MOST_TOKENS
    assert regimes >= {"pairs", "sorted"}


def test_operators_for_one_token_have_one_record():
    """What is written in place is the output, never what came in: the library has copied that before."""
    (made,) = records(Gemv(40, 30, "float16"))
    assert (made.first, made.last, made.rooms) == (1, 1, [])
    assert sorted(made.buffers.values()) == ["weight", "x", "y"]
    (made,) = records(DecodeAttention(6, 3, 16, 100, 120, 0.25, "float32"))
    part, total = (numbers(note, made, 1) for note in made.notes)
    assert [part[0].__name__, total[0].__name__] == ["decode_attention_part", "attend_sum"]
    assert [name for name, *_ in part[4:12]] == [
        *("qkv", "cos", "sin", "position", "present_key", "present_value", "room0", "room1")
    ]  # fmt: skip
    assert part[12] == 0.25
    assert [name for name, *_ in total[3:6]] == ["room0", "room1", "y"]


def test_ranges_end_where_the_host_part_decides_otherwise():
    """sort_few takes 1024 slots in one chunk, and 8192 at all; at the next token another kernel runs."""
    layer = Layer(64, 32, 8, 4, "bfloat16")
    plan = Plans(Plan("sorted", Tile(16, 32, 32, 4, 3), Tile(16, 32, 32, 4, 3)))
    ends, first = [], 2
    while first <= 10_000:
        made = record(layer, plan, first, 10_000)
        ends.append((made.first, made.last, made.notes[0].kernel.__name__))
        first = made.last + 1
    assert ends == [(2, 256, "sort_few"), (257, 2048, "sort_few"), (2049, 8192, "count"), (8193, 10_000, "count")]


def test_expressions_are_evaluated_as_torch_does():
    """Negative operands too: -(-n // 4) * 4 is how sizes are rounded up."""
    tokens, _ = symbol(2, 1000)
    for value, plain in (
        (-(-tokens // 4) * 4, lambda t: -(-t // 4) * 4),
        (torch.sym_min(64, 6 * tokens) + 6 * tokens // 16, lambda t: min(64, 6 * t) + 6 * t // 16),
        (torch.sym_max(tokens - 500, 3) % 7, lambda t: max(t - 500, 3) % 7),
    ):
        for t in (2, 3, 4, 5, 11, 63, 500, 999, 1000):
            assert evaluate(text(value), t) == plain(t)
    assert text(7) == "7"


def test_what_the_library_cannot_evaluate_is_refused():
    tokens, _ = symbol(2, 1000)
    with pytest.raises(TargetError, match=r"nothing that the library can evaluate"):
        text(tokens | 3)
    assert set(OPERATIONS) == {"+", "*", "/", "%", "min", "max"}


def test_other_threads_launch_while_one_records():
    """Only the thread that records has its launches noted."""
    import threading

    from dsmoe_runtime.kernels import dispatch
    from dsmoe_runtime.ort_library.record import without_gpu

    seen, before = [], dispatch.launch
    dispatch.launch = lambda *args, **kwargs: seen.append(args)
    notes: list[Note] = []
    try:
        with without_gpu(notes):
            other = threading.Thread(target=lambda: dispatch.launch("kernel", (1,)))
            other.start()
            other.join()
            dispatch.launch("noted", (2,), pdl=True)
    finally:
        dispatch.launch = before
    assert seen == [("kernel", (1,))]
    assert [(note.kernel, note.grid, note.early) for note in notes] == [("noted", (2,), True)]
