"""`options={"target": "mlir-cpu"}`: whole graphs through torch-mlir, judged against float64; refusals by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torch_mlir")

import torch._dynamo

from dsmoe_compiler import backend
from dsmoe_compiler.targets.mlir import jit
from dsmoe_model.moe import MoE
from dsmoe_model.transformer import build
from dsmoe_runtime.agreement import OTHER_KERNELS, assert_within_budget, within_budget
from dsmoe_runtime.errors import ConfigError
from dsmoe_runtime.mlir.levels import LEVELS, cpu_flags
from tests.compiler.test_backend import SMALL
from tests.runtime.op_cases import layer_of, normal, small_config, weight

pytestmark = pytest.mark.skipif(not LEVELS["avx2"].flags <= cpu_flags(), reason="needs AVX2")
OPTIONS = {"target": "mlir-cpu"}


@pytest.fixture(autouse=True)
def _fresh_dynamo(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> object:
    """One cache for this file, empty at first: nothing compiled by another version is judged here."""
    monkeypatch.setenv("DSMOE_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "objects"))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Layer(nn.Module):
    """A norm, a mixture of experts and what goes around it."""

    def __init__(self, moe: MoE, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.moe = moe
        self.scale = nn.Parameter(1 + weight(hidden, seed=3).to(dtype))

    def forward(self, x: Tensor, experts: Tensor | None = None) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        return x + self.moe(self.scale * normed, experts_TK=experts)[0]


def layer(dtype: torch.dtype) -> Layer:
    config = small_config(n_routed_experts=6, n_shared_experts=1)
    return Layer(layer_of(config, dtype), config.hidden_size, dtype).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_with_any_number_of_tokens(dtype: torch.dtype) -> None:
    eager = layer(dtype)
    fast = torch.compile(eager, backend="dsmoe", options=OPTIONS)
    exact = layer(dtype).double()
    for tokens in (7, 63, 300, 1, 0):
        x = normal(1, tokens, 42, seed=tokens, dtype=dtype)
        with torch.no_grad():
            y, reference = fast(x), eager(x)
            chosen = eager.moe(_normed(eager, x))[1].experts_TK
            truth = exact(x.double(), chosen)
        same = (y.float() - reference.float()).norm(dim=-1) < 0.1 * reference.float().norm(dim=-1)
        assert tokens == 0 or same.float().mean() > 0.98  # the others have other experts: ties of rounded scores
        assert y.shape == x.shape
        assert y.dtype == dtype
        if tokens:
            verdict = within_budget(y[same], eager=reference[same], exact=truth[same], **OTHER_KERNELS._asdict())
            assert verdict.ok, verdict
    report = backend.last_report()
    assert report is not None
    assert [found.kernel for found in report.layers] == ["mlir-cpu"]


def _normed(model: Layer, x: Tensor) -> Tensor:
    wide = x.float()
    return model.scale * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def test_a_whole_model_without_a_cache() -> None:
    eager = build(SMALL, seed=1).requires_grad_(False)
    fast = torch.compile(eager, backend="dsmoe", options=OPTIONS)
    ids = torch.randint(SMALL.vocab_size, (2, 19), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, reference = fast(ids), eager(ids)
    chosen = [routing.experts_TK for routing in reference.routing]
    assert all(torch.equal(a.experts_TK, b) for a, b in zip(ours.routing, chosen, strict=True))
    exact = build(SMALL, seed=1).double()(ids, experts=chosen).logits_BSV.detach()
    assert_within_budget(ours.logits_BSV, eager=reference.logits_BSV, exact=exact)


class Plain(nn.Module):
    """What lies around experts in other people's models."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(24, 40)
        self.down = nn.Parameter(weight(40, 24, seed=1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = torch.nn.functional.gelu(self.up(x.transpose(0, 1)))
        scores = torch.softmax(hidden, dim=-1)
        return hidden @ self.down, scores.topk(3, dim=-1).indices, x[:, 1:].sum(-1)


def test_views_biases_products_and_top_k_outside_of_layers() -> None:
    eager = Plain().requires_grad_(False)
    fast = torch.compile(eager, backend="dsmoe", options=OPTIONS)
    x = normal(9, 5, 24, seed=2)
    with torch.no_grad():
        ours, reference, exact = fast(x), eager(x), Plain().double()
        exact.load_state_dict(eager.double().state_dict())
        truth = exact(x.double())
    for mine, theirs, right in zip((ours[0], ours[2]), (reference[0], reference[2]), (truth[0], truth[2]), strict=True):
        assert_within_budget(mine, eager=theirs, exact=right)
    assert torch.equal(ours[1], reference[1])
    assert ours[0].stride() == reference[0].stride()


def test_layers_that_are_equal_share_their_code() -> None:
    from dsmoe_compiler.capture import Capture
    from dsmoe_compiler.targets.mlir.schedule import schedule
    from dsmoe_runtime.mlir.levels import best_level

    counts = []
    for layers in (3, 6):
        capture = Capture(build(replace(SMALL, num_hidden_layers=layers), seed=1), batch=1, capacity=16)
        for phase in capture.phases(("decode",)):
            plan = schedule(phase.graph, phase.name, best_level())
            counts.append((len(plan.functions), len(plan.glues)))
    assert counts[0] == counts[1]


def test_training_is_refused() -> None:
    model = layer(torch.float32).requires_grad_(True)
    fast = torch.compile(model, backend="dsmoe", options=OPTIONS)
    with pytest.raises(Exception, match=r"inference only.*no_grad"):
        fast(normal(1, 4, 42, seed=1))


def test_options_of_inductor_are_refused_beside_it() -> None:
    with pytest.raises(ConfigError, match=r"'max_autotune' is for Inductor"):
        backend.dsmoe(torch.fx.GraphModule({}, torch.fx.Graph()), [], options=OPTIONS | {"max_autotune": True})
    with pytest.raises(ConfigError, match=r"mode 'reduce-overhead'"):
        backend.dsmoe(torch.fx.GraphModule({}, torch.fx.Graph()), [], mode="reduce-overhead", options=OPTIONS)
    with pytest.raises(ConfigError, match=r"'mlir-gpu'.*'mlir-cpu'"):
        backend.dsmoe(torch.fx.GraphModule({}, torch.fx.Graph()), [], options={"target": "mlir-gpu"})


def test_what_torch_mlir_cannot_lower_is_named() -> None:
    fast = torch.compile(lambda x: torch.linalg.qr(x)[0], backend="dsmoe", options=OPTIONS)
    with torch.no_grad(), pytest.raises(Exception, match=r"aten\.linalg_qr"):
        fast(normal(4, 4, seed=1))


def test_inputs_that_lie_with_gaps_are_refused() -> None:
    fast = torch.compile(lambda x: x + 1, backend="dsmoe", options=OPTIONS)
    with torch.no_grad(), pytest.raises(Exception, match="with gaps"):
        fast(normal(6, 8, seed=1)[:, :5])


def test_an_empty_value_inside_is_refused_before_torch_mlir_divides_by_its_size() -> None:
    fast = torch.compile(lambda x: (x[:0] * 2).view(2, 0, 8), backend="dsmoe", options=OPTIONS)
    with torch.no_grad(), pytest.raises(Exception, match="which is empty"):
        fast(normal(6, 8, seed=1))


def test_the_name_of_the_target() -> None:
    assert OPTIONS["target"] == jit.NAME
