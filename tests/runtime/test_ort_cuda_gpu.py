"""dsmoe::DsMoE on ONNX Runtime's CUDA provider: machine code made beforehand, answers that are torch's to the bit."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmoe_runtime.agreement import within_budget
from dsmoe_runtime.ops.experts import experts as rule
from dsmoe_runtime.ort_library.layer import Layer
from tests.runtime import ort_cases
from tests.runtime.op_cases import ALPHA, LIMIT, exact, expert_case, laid_out

pytestmark = pytest.mark.gpu
SIZES: dict[str, Any] = {"num_experts": 9, "top_k": 4, "hidden": 264, "width": 176}
MOST = 3000
TOKENS = (1, 2, 7, 64, 300, MOST)
CASES = {
    "bfloat16": (torch.bfloat16, "silu", 1.0, 0.0, "concat", False),
    "float16, biases": (torch.float16, "swiglu_oai", ALPHA, LIMIT, "interleaved", True),
    "float32": (torch.float32, "gelu", 1.0, 0.0, "ungated_transposed", False),
}


@pytest.fixture(scope="module", autouse=True)
def stream():
    """ONNX Runtime captures no default stream."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has no CUDA provider")
    before = torch.cuda.current_stream()
    torch.cuda.set_stream(torch.cuda.Stream())
    yield
    torch.cuda.set_stream(before)


@pytest.fixture(scope="module")
def library():
    from dsmoe_runtime.ort_library.build import library

    return library()


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """Of all cases, for up to MOST tokens."""
    from dsmoe_runtime.ort_library import record
    from dsmoe_runtime.ort_library.programs import write

    folder = tmp_path_factory.mktemp("kernels")
    sizes = [SIZES[name] for name in ("hidden", "width", "num_experts", "top_k")]
    layers = [Layer(*sizes, str(dtype)[6:], *rest, bias, bias) for dtype, *rest, bias in CASES.values()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "MOST_TOKENS", MOST)
        write(layers, folder)
    return folder


def made(name: str, tokens: int, seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """A case on the GPU, with two slots that are skipped, and its attributes."""
    dtype, activation, alpha, limit, layout, bias = CASES[name]
    case = laid_out(expert_case(tokens, dtype=dtype, bias=bias, seed=seed, **SIZES), layout)
    if tokens > 2:
        case["experts"][1, 0], case["experts"][2, -1] = -1, SIZES["num_experts"]
    attributes = {"activation": activation, "alpha": alpha, "limit": limit, "layout": layout}
    return {key: None if value is None else value.cuda() for key, value in case.items()}, attributes


def by_torch(case: dict[str, Any], attributes: dict[str, Any]) -> Tensor:
    return torch.ops.dsmoe.experts(**case, **attributes)


@pytest.mark.parametrize("name", CASES)
def test_answers_are_those_of_torch(name, kernels, library):
    """To the bit: it is the same machine code. And within the budget of float64, as often as it is asked."""
    case, attributes = made(name, 1)
    session = ort_cases.session(ort_cases.model(case, attributes), library, kernels=kernels, device="cuda")
    for tokens in TOKENS:
        case, _ = made(name, tokens)
        y = ort_cases.run(session, case)
        assert torch.equal(y, by_torch(case, attributes)), tokens
        assert torch.equal(y, ort_cases.run(session, case))
        eager, reference = (rule(**given, **attributes) for given in (case, exact(case)))
        found = within_budget(y, eager=eager, exact=reference, factor=4.0 if y.dtype == torch.float32 else 2.0)
        assert found.ok, f"{tokens} tokens: {found}"


def test_no_token_is_no_work(kernels, library):
    import onnxruntime

    case, attributes = made("bfloat16", 1)
    session = ort_cases.session(ort_cases.model(case, attributes), library, kernels=kernels, device="cuda")
    binding = ort_cases.bound(session, case, case["x"])
    for name in ("x", "experts", "weights"):
        shape, kind = [0, case[name].shape[1]], ort_cases.TYPES[case[name].dtype]
        empty = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, kind, "cuda", 0)
        binding.bind_ortvalue_input(name, empty)
    binding.bind_output("y", "cuda", 0)
    session.run_with_iobinding(binding)
    assert binding.get_outputs()[0].shape() == [0, SIZES["hidden"]]


def test_between_other_nodes(kernels, library):
    """In the runtime's own memory and stream, where the kernel ahead is not ours, nor the one behind."""
    case, attributes = made("bfloat16", 300)
    session = ort_cases.session(ort_cases.model(case, attributes, beside=True), library, kernels=kernels, device="cuda")
    wanted = by_torch(case | {"x": case["x"] + case["x"]}, attributes) + case["x"]
    for _ in range(20):
        assert torch.equal(ort_cases.run(session, case), wanted)


@pytest.mark.parametrize("tokens", [1, 7, 300, MOST])
def test_a_replay_with_other_routing(tokens, kernels, library):
    """ONNX Runtime's CUDA graph: captured once, so nothing waits for the GPU; replayed with other data."""
    case, attributes = made("bfloat16", tokens)
    session = ort_cases.session(
        ort_cases.model(case, attributes, beside=True), library, kernels=kernels, device="cuda", graph=True
    )
    y, seen = torch.empty_like(case["x"]), []
    binding = ort_cases.bound(session, case, y)
    for seed in range(5):
        other, _ = made("bfloat16", tokens, seed)
        for name in ("x", "experts", "weights"):
            case[name].copy_(other[name])
        y.fill_(torch.nan)
        session.run_with_iobinding(binding)
        assert torch.equal(y, by_torch(case | {"x": case["x"] + case["x"]}, attributes) + case["x"]), seed
        seen.append(y.clone())
    assert not any(torch.equal(a, b) for a, b in pairwise(seen))


def test_what_there_is_no_kernel_for_is_refused(kernels, library, tmp_path):
    case, attributes = made("bfloat16", MOST + 1)
    session = ort_cases.session(ort_cases.model(case, attributes), library, kernels=kernels, device="cuda")
    with pytest.raises(Exception, match=rf"x has {MOST + 1} tokens, and there are kernels for 1 to {MOST}"):
        ort_cases.run(session, case)
    half = {
        name: value if value is None or value.dtype != torch.bfloat16 else value.half() for name, value in case.items()
    }
    session = ort_cases.session(ort_cases.model(half, attributes), library, kernels=kernels, device="cuda")
    with pytest.raises(
        Exception, match=r"has no kernels for float16 hidden 264 width 176 experts 9 top_k 4 activation silu"
    ):
        ort_cases.run(session, half)
    with pytest.raises(Exception, match=r"programs.txt cannot be read; export the model with --profile ort-cuda"):
        ort_cases.session(ort_cases.model(case, attributes), library, kernels=tmp_path, device="cuda")
    few, _ = made("bfloat16", 3)
    few["experts"] = torch.zeros(14, dtype=torch.int64, device="cuda")[1:13].view(3, 4)
    session = ort_cases.session(ort_cases.model(few, attributes), library, kernels=kernels, device="cuda")
    with pytest.raises(Exception, match=r"experts begins at .*, which is no multiple of 16 bytes"):
        ort_cases.run(session, few)
