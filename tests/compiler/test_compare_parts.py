"""The parts of a comparison that need no clock: statistics, load, bytes and operations, the table, the JSON."""

import json
import math
from dataclasses import replace

import pytest
import torch

from dsmoe_compiler.compare.conditions import _command, conditions
from dsmoe_compiler.compare.load import distinct_experts, expert_load
from dsmoe_compiler.compare.memory import peak_memory
from dsmoe_compiler.compare.roofline import Roof, phase_work
from dsmoe_compiler.compare.table import render_table
from dsmoe_compiler.compare.timing import Samples, interleave
from dsmoe_model.config import ModelConfig
from dsmoe_model.transformer import build
from tests.compiler.example_comparison import example

ROOF = Roof(bytes_per_second=1e9, flops_per_second=1e12, dtype="float32")


def test_samples_keep_the_raw_seconds_in_order_and_mark_a_large_spread():
    steady, shaky = Samples.of([1.0, 1.02, 0.98, 1.01, 1.0]), Samples.of([1.0, 1.9, 0.7, 1.0, 1.2])
    assert steady.seconds == (1.0, 1.02, 0.98, 1.01, 1.0)
    assert (steady.median, steady.mean) == pytest.approx((1.0, 1.002))
    assert not steady.unstable
    assert shaky.unstable
    assert shaky.p90 == pytest.approx(1.62)
    with pytest.raises(ValueError, match="at least 1"):
        Samples.of([])


def test_candidates_take_turns_and_the_first_round_is_not_kept():
    order: list[str] = []

    def run(name: str) -> float:
        order.append(name)
        return float(len(order))

    samples = interleave({name: lambda name=name: run(name) for name in "ABC"}, repeats=3)
    assert "".join(order) == "ABC" * 4
    assert samples["B"].seconds == (5.0, 8.0, 11.0)


def test_load_of_an_even_and_a_collapsed_layer():
    even = torch.arange(8).reshape(4, 2)
    collapsed = torch.tensor([[3, 3]] * 4)
    first, second = expert_load(torch.stack([even, collapsed]), ["a", "b"], n_experts=8)
    assert (first.entropy, first.gini, first.distinct) == (pytest.approx(1.0), pytest.approx(0.0), 8)
    assert (second.entropy, second.gini, second.distinct) == (0.0, pytest.approx(7 / 8), 1)
    assert (second.hottest, second.hottest_share) == (3, 1.0)


def test_skipped_slots_hit_no_expert():
    experts_LTK = torch.tensor([[[0, -1], [8, 0]]])
    assert distinct_experts(experts_LTK, n_experts=8) == (1,)
    assert expert_load(experts_LTK, ["a"], n_experts=8)[0].counts == (2, 0, 0, 0, 0, 0, 0, 0)


def test_no_tokens_is_a_load_of_nothing():
    (layer,) = expert_load(torch.zeros(1, 0, 2, dtype=torch.int64), ["a"], n_experts=8)
    assert (layer.distinct, layer.entropy, layer.gini) == (0, 0.0, 0.0)


CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=2048,
    num_hidden_layers=1,
    num_attention_heads=16,
    num_key_value_heads=16,
    head_dim=128,
    intermediate_size=64,
    max_position_embeddings=64,
    n_routed_experts=64,
    n_shared_experts=2,
    num_experts_per_tok=6,
    moe_intermediate_size=1408,
)


def test_bytes_count_the_experts_hit_and_nothing_for_those_that_were_not():
    """One expert of the 16B model is 17.30 MB in bfloat16: six of them 104 MB, as kernels are judged."""
    model = build(CONFIG, dtype=torch.bfloat16, device="meta")
    six, seven = (phase_work(model, ROOF, batch=1, tokens=1, context=1, distinct=(n,)) for n in (6, 7))
    assert seven.bytes - six.bytes == 17_301_504
    assert six.flops == seven.flops
    rest = six.bytes - 6 * 17_301_504
    attention, shared, head, router = 4 * 2048 * 2048, 3 * 2048 * 2816, 64 * 2048, 64 * 2048
    assert rest == pytest.approx(2 * (attention + shared + head + router), rel=0.01)
    assert six.bound == "memory"
    assert six.seconds == six.bytes / 1e9


def test_operations_grow_with_tokens_and_bytes_with_experts():
    model = build(CONFIG, dtype=torch.bfloat16, device="meta")
    one = phase_work(model, ROOF, batch=1, tokens=1, context=1, distinct=(6,))
    many = phase_work(model, ROOF, batch=1, tokens=32, context=32, distinct=(6,))
    per_token = 2 * (4 * 2048 * 2048 + 64 * 2048 + 3 * 2048 * (2816 + 6 * 1408))
    head, attention = 2 * 64 * 2048, 4 * 16 * 128
    assert one.flops == per_token + attention + head
    assert many.flops == 32 * per_token + attention * sum(range(1, 33)) + head
    with pytest.raises(ValueError, match="distinct counts 2 layers, the model has 1"):
        phase_work(model, ROOF, batch=1, tokens=1, context=1, distinct=(6, 6))


def test_peak_memory_sees_a_buffer_that_is_gone_again():
    memory = peak_memory(lambda: torch.ones(64 * 2**20, dtype=torch.uint8).max(), torch.device("cpu"))
    if memory is None:
        pytest.skip("no resettable high-water mark here")
    assert 60 * 2**20 < memory.working_bytes < 200 * 2**20


def test_table_is_plain_text_without_a_terminal():
    text = render_table(example())
    assert "\x1b" not in text
    assert "3.10x" in text
    assert "transformers batched_mm: no room" in text
    decode = text[text.index("decode, 32 steps after 256 tokens") :].splitlines()
    assert decode[1].split()[0] == "candidate"
    assert len({len(line) for line in decode[2:4]}) == 1


def test_json_is_strict_and_complete():
    comparison = replace(example(), roof=Roof(bytes_per_second=math.inf, flops_per_second=1.0, dtype="float32"))
    values = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert values["roof"]["bytes_per_second"] is None
    assert values["candidates"][0]["measurements"][0]["samples"]["seconds"]
    assert values["headline"] == comparison.headline()


def test_conditions_name_versions_and_the_command_as_it_was_typed():
    facts = conditions(torch.device("cpu"))
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == str(torch.get_num_threads())
    assert all(facts.values())
    assert (
        _command(["/usr/bin/python3", "-m", "benchmarks.decode", "--steps", "8"])
        == "python -m benchmarks.decode --steps 8"
    )
    assert _command(["/usr/bin/python3", "/home/me/bin/dsmoe", "compare", "a b"]) == "dsmoe compare 'a b'"
