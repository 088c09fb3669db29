"""The warp-specialised kernels on a Hopper GPU: any number of rows, activations, what training keeps, same bits."""

from __future__ import annotations

import pytest
import torch

from dsmoe_runtime.agreement import within_budget
from dsmoe_runtime.kernels import experts as kernels
from dsmoe_runtime.kernels.plan import Plan, Tile
from tests.kernels.cases import ON_GPU, case_of, check, run, verdict
from tests.runtime.op_cases import attributes

PLAN = Plan("sorted", Tile(128, 128, 64, 8, 4), Tile(128, 256, 64, 8, 4), specialised=True)
COUNTS = (1, 64, 0, 65, 127, 128, 129, 300, 2)  # rows of each expert: around a half tile, a tile, and more
SKIPPED = 4
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(torch.cuda.is_available() and not HOPPER, reason="only Hopper has these kernels"),
]


def ragged(dtype: torch.dtype = torch.bfloat16, **sizes: int) -> dict[str, torch.Tensor]:
    """Slots of COUNTS, shuffled, and four that are skipped, whose weights are NaN."""
    ids = torch.repeat_interleave(torch.arange(len(COUNTS)), torch.tensor(COUNTS))
    ids = torch.cat([ids, torch.tensor([-1, len(COUNTS), -1, len(COUNTS)])])
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(7))].view(-1, 4)
    case = case_of(len(ids), "aligned", skip=False, dtype=dtype, **sizes)
    case["experts"] = ids.to(case["experts"].dtype)
    case["weights"].masked_fill_((ids < 0) | (ids >= len(COUNTS)), torch.nan)
    case["gate_up"][2], case["down"][2] = torch.nan, torch.nan  # of the expert without rows
    return case


@ON_GPU
@pytest.mark.parametrize("activation", ["silu", "silu_clamped", "swiglu_oai", "gelu", "gelu_tanh", "relu", "relu2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ragged_rows(device, dtype, activation):
    check(device, ragged(dtype), PLAN, activation)


@ON_GPU
@pytest.mark.parametrize(("hidden", "width"), [(64, 128), (40, 24), (256, 1104), (1280, 864)])
def test_sizes_that_blocks_divide_and_do_not(device, hidden, width):
    """From a ring that one item does not fill to many turns of it."""
    check(device, ragged(hidden=hidden, width=width), PLAN)


@ON_GPU
@pytest.mark.parametrize("tokens", [1, 7, 300, 3000])
def test_any_number_of_tokens(device, tokens):
    """At 3000 every program has several items."""
    check(device, case_of(tokens, "aligned", dtype=torch.bfloat16, width=1104 if tokens == 3000 else 176), PLAN)


@ON_GPU
def test_tokens_that_are_columns_of_a_wider_tensor(device):
    """Rows of x further apart than they are long, between NaN."""
    case = ragged()
    wide = torch.full((case["x"].shape[0], 3 * 264), torch.nan, dtype=torch.bfloat16, device=device)
    wide[:, 264:528] = case["x"].to(device)
    given = {name: None if value is None else value.to(device) for name, value in case.items()}
    x, experts, weights = wide[:, 264:528], given.pop("experts"), given.pop("weights")
    given.pop("x")
    actual = kernels.run(x, experts, weights, kernels.Weights.of(**given, **attributes()), PLAN)
    found = verdict(actual.cpu(), case)
    assert found.ok, str(found)


@ON_GPU
def test_hidden_and_joint(device):
    """In sorted order, as training keeps them; rows of skipped slots are nobody's, and stay as they were."""
    case = ragged()
    total, (n_experts, rows_of, _) = sum(COUNTS), case["gate_up"].shape
    given = {name: None if value is None else value.to(device) for name, value in case.items()}
    x, experts, _ = (given.pop(name) for name in ("x", "experts", "weights"))
    w = kernels.Weights.of(**given, **attributes())
    rows = kernels.plan_rows(experts, n_experts, PLAN.up.block_m)
    hidden, joint = kernels.up_sorted(x, rows, 4, w, PLAN, save_joint=True)
    answers = kernels.down_sorted(hidden, rows, w, PLAN)
    slots = rows.slots[:total].long().cpu()
    owner = torch.repeat_interleave(torch.arange(n_experts), torch.tensor(COUNTS))
    assert hidden[total:].isnan().all()
    assert joint[total:].isnan().all()
    assert int(answers.isnan().all(dim=1).sum()) == SKIPPED

    def judge(what, actual, sources, matrices, then=lambda value: value):
        for expert in owner.unique().tolist():
            mine = owner == expert
            factors = sources[mine].cpu(), matrices[expert].cpu().T
            eager = then(factors[0] @ factors[1])
            found = within_budget(
                actual[mine].cpu(), eager=eager, exact=then(factors[0].double() @ factors[1].double())
            )
            assert found.ok, f"{what} of expert {expert}: {found}"

    def activated(both):
        gate, up = both.chunk(2, dim=1)
        return torch.nn.functional.silu(gate) * up

    tokens = x.cpu()[slots // 4]
    assert joint.shape[1] == rows_of
    judge("joint", joint[:total], tokens, case["gate_up"])
    judge("hidden", hidden[:total], tokens, case["gate_up"], activated)
    judge("answers", answers.cpu()[slots], hidden[:total], case["down"])


@ON_GPU
def test_same_input_same_bits(device):
    """50 runs, each into memory that the one before has used."""
    case = ragged(width=1104)
    first = run(device, case, PLAN)
    assert verdict(first, case).ok
    assert all(torch.equal(run(device, case, PLAN), first) for _ in range(50))


@ON_GPU
def test_what_they_cannot_take_is_refused(device):
    """And not done in another way: a plan from elsewhere is somebody's mistake."""
    for layout, bias, word in (("interleaved", False, "interleaved"), ("concat", True, "biases")):
        with pytest.raises(AssertionError, match=word):
            run(device, case_of(7, "aligned", layout=layout, bias=bias, dtype=torch.bfloat16), PLAN, layout=layout)
