"""The runner: what it refuses before native code sees it, and that it says what the oracle says.

The phases run eagerly here, behind the interface of a loaded package; `test_aoti.py` has the real ones.
"""

import threading
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsmoe_compiler.phases import Decode, Prefill
from dsmoe_compiler.runner import Runner
from dsmoe_model.attention import KVCache
from dsmoe_model.checkpoint import byte_tokenizer
from dsmoe_model.config import ModelConfig
from dsmoe_model.generation import generate
from dsmoe_model.transformer import Transformer, build
from dsmoe_runtime.errors import InputError

CONFIG = ModelConfig(
    vocab_size=260,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=48,
    max_position_embeddings=64,
    n_routed_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    first_k_dense_replace=1,
    initializer_range=0.2,
    bos_token_id=256,
    eos_token_id=257,
)
BATCH, CAPACITY = 2, 20


def runner_of(model: Transformer, *, tokenizer: bool = True) -> Runner:
    """A runner whose programs are the eager phases, called with flat inputs as packages are."""
    layers = model.config.num_hidden_layers

    def prefill(flat: list[Tensor]) -> list[Tensor]:
        return list(Prefill(model)(flat[0], flat[1 : 1 + layers], flat[1 + layers :]))

    def decode(flat: list[Tensor]) -> list[Tensor]:
        return list(Decode(model)(flat[0], flat[1], flat[2 : 2 + layers], flat[2 + layers :]))

    config = model.config
    shape = (BATCH, config.num_key_value_heads, CAPACITY, config.head_dim)
    return Runner(
        config.vocab_size,
        [(shape, shape)] * layers,
        manifest={"dtype": "float32", "batch_size": BATCH, "capacity": CAPACITY},
        tokenizer=byte_tokenizer() if tokenizer else None,
        programs={"prefill": prefill, "decode": decode},
        device=torch.device("cpu"),
    )


@pytest.fixture(scope="module")
def model() -> Transformer:
    return build(CONFIG, seed=1)


@pytest.fixture
def runner(model: Transformer) -> Runner:
    return runner_of(model)


def prompt(length: int) -> Tensor:
    return torch.randint(0, 256, (BATCH, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("length", [1, 7, CAPACITY - 6])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 3}])
def test_generates_what_the_oracle_generates(model: Transformer, runner: Runner, length: int, sampling: dict) -> None:
    heard: list[Tensor] = []
    ids = runner.generate(prompt(length), max_new_tokens=6, on_token=heard.append, **sampling)
    assert torch.equal(ids, generate(model, prompt(length), max_new_tokens=6, **sampling))
    assert torch.equal(torch.stack(heard, 1), ids[:, length:])


def test_a_finished_row_is_filled_and_all_finished_rows_end_it(model: Transformer, runner: Runner) -> None:
    free = runner.generate(prompt(3), max_new_tokens=8)
    stop = int(free[0, 5])  # row 0's third new token
    expected = generate(model, prompt(3), max_new_tokens=8, eos_token_id=stop)
    assert torch.equal(runner.generate(prompt(3), max_new_tokens=8, eos_token_id=stop), expected)
    assert (expected[0, 5:] == stop).all()


def test_no_new_tokens_gives_the_prompt_back(runner: Runner) -> None:
    assert torch.equal(runner.generate(prompt(CAPACITY), max_new_tokens=0), prompt(CAPACITY))


def test_text_in_text_out(runner: Runner) -> None:
    text = runner.generate_text("\u00e9t\u00e9", max_new_tokens=5)
    ids = runner.generate(torch.tensor([[256, *"\u00e9t\u00e9".encode()]] * BATCH), max_new_tokens=5)
    assert text == byte_tokenizer().decode(ids[0, 6:].tolist())
    assert runner.generate_text("", max_new_tokens=2) is not None  # from bos


def test_threads_with_their_own_caches_do_not_disturb_each_other(runner: Runner) -> None:
    alone = [runner.generate(prompt(n), max_new_tokens=6) for n in range(1, 7)]
    found: dict[int, Tensor] = {}

    def work(n: int) -> None:
        found[n] = runner.generate(prompt(n), max_new_tokens=6)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[n], alone[n - 1]) for n in range(1, 7))


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (torch.zeros(3, 2, dtype=torch.int64), r"ids have 3 rows, .* batch_size = 2"),
        (torch.zeros(2, 2, dtype=torch.int32), r"must be \[B, S\] int64, got \[2, 2\] torch\.int32"),
        (torch.zeros(2, dtype=torch.int64), r"must be \[B, S\] int64, got \[2\]"),
        (torch.tensor([[0], [260]]), r"ids span \[0, 260\], vocab_size = 260"),
        (torch.tensor([[-1], [3]]), r"ids span \[-1, 3\], vocab_size = 260"),
        (torch.zeros(2, 0, dtype=torch.int64), "the prompt is empty"),
        (torch.zeros(2, 21, dtype=torch.int64), "has 21 tokens, the artifact has room for 20"),
        (torch.zeros(2, 2, dtype=torch.int64, device="meta"), "ids are on meta, the artifact runs on cpu"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(runner: Runner, ids: Tensor, said: str) -> None:
    with pytest.raises(InputError, match=said):
        runner.prefill(ids, runner.new_cache())


def test_generation_that_cannot_fit_is_refused_before_it_starts(runner: Runner) -> None:
    heard: list[Tensor] = []
    with pytest.raises(ValueError, match="15 prompt tokens and max_new_tokens = 6 must fit the 20 positions"):
        runner.generate(prompt(15), max_new_tokens=6, on_token=heard.append)
    with pytest.raises(ValueError, match="the prompt is empty"):
        runner.generate(prompt(0), max_new_tokens=1)
    assert not heard


@pytest.mark.parametrize("position", [-1, CAPACITY])
def test_positions_outside_the_cache_are_refused(runner: Runner, position: int) -> None:
    with pytest.raises(InputError, match=f"position is {position}; the cache has slots 0 to 19"):
        runner.decode(prompt(1), position, runner.new_cache())
    with pytest.raises(InputError, match=r"decode takes one token a row, ids \[2, 1\]; got \[2, 3\]"):
        runner.decode(prompt(3), 4, runner.new_cache())


def test_a_foreign_cache_is_refused(model: Transformer, runner: Runner) -> None:
    for cache, said in (
        (KVCache.zeros(CONFIG, BATCH, 8, torch.float32), r"is \[2, 2, 8, 8\] .* wants \[2, 2, 20, 8\]"),
        (KVCache.zeros(CONFIG, BATCH, CAPACITY, torch.float64), r"torch\.float64 on cpu; .* torch\.float32"),
        (KVCache.zeros(replace(CONFIG, num_hidden_layers=2), BATCH, CAPACITY, torch.float32), "has 2 and 2 layers"),
        (
            KVCache(
                [t.transpose(2, 3).contiguous().transpose(2, 3) for t in runner.new_cache().key],
                runner.new_cache().value,
            ),
            "contiguous",
        ),
    ):
        with pytest.raises(InputError, match=said):
            runner.prefill(prompt(2), cache)


def test_text_without_a_tokenizer_is_refused(model: Transformer) -> None:
    with pytest.raises(InputError, match="no tokenizer: pass token ids"):
        runner_of(model, tokenizer=False).generate_text("x", max_new_tokens=1)
