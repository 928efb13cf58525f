"""The loss against a cached teacher, chunked and fused, beside the float64 oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cached_draws import Case, draw, loss_and_gradients
from draws import error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tailkd
from tailkd.objective import blockwise, chunked, fused, written_down
from tailkd.objective.checks import FROM_CACHE
from tailkd.objective.layout import layout_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MANY = range(120)
BUDGETS = {"one chunk": (1 << 30, 1 << 20), "many chunks": (40_000, 5_000), "rows beyond the budget": (1, 3_000)}


@pytest.fixture(params=BUDGETS)
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    chunk, block = BUDGETS[request.param]
    monkeypatch.setitem(chunked.CHUNK_BYTES, DEVICE, chunk)
    monkeypatch.setattr(blockwise, "BLOCK_BYTES", block)
    return request.param


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several steps of every kernel over a row."""
    monkeypatch.setattr(fused, "LANES", 32)
    monkeypatch.setattr(fused, "BLOCK", 64)


def rounded(case: Case, dtype: torch.dtype) -> Case:
    """The case with a student whose tensors a narrow dtype holds."""
    tensors, *rest = case
    return ({n: t.to(dtype).double() if isinstance(t, Tensor) else t for n, t in tensors.items()}, *rest)  # type: ignore[return-value]


def test_float64_is_exact(chunks: str) -> None:
    for seed in MANY:
        case = draw(seed)
        truth, found = (loss_and_gradients(case, torch.float64, impl) for impl in ("reference", "chunked"))
        for name in truth[1]:
            assert error(found[1][name], truth[1][name]) < 1e-9, (seed, name, case[2])
        assert found[0].count == truth[0].count
        assert found[0].parts.keys() == truth[0].parts.keys()
        for name, part in truth[0].parts.items():
            assert float(found[0].parts[name].sum) == pytest.approx(float(part.sum), rel=1e-9, abs=1e-9), (seed, name)


@pytest.mark.parametrize(
    ("impl", "seeds"),
    [
        ("chunked", range(60)),
        ("fused", range(9)),
        pytest.param("fused", MANY, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
def test_float32_errs_no_more_than_eager_code(impl: str, seeds: range, short: None) -> None:
    """Relative error <= max(2e-6, 1.1 x eager)."""
    device = DEVICE if impl == "fused" else "cpu"
    for seed in seeds:
        case = rounded(draw(seed), torch.float32)
        truth = loss_and_gradients(case, torch.float64, "reference", device)[1]
        eager = loss_and_gradients(case, torch.float32, "reference", device)[1]
        ours = loss_and_gradients(case, torch.float32, impl, device)[1]
        for name in (n for n in truth if truth[n].norm() > 1e-6):
            limit = max(2e-6, 1.1 * error(eager[name], truth[name]))
            assert error(ours[name], truth[name]) <= limit, (seed, name, case[2])


def test_fused_in_many_chunks(chunks: str, short: None) -> None:
    for seed in range(3):
        case = rounded(draw(seed), torch.float32)
        truth = loss_and_gradients(case, torch.float64, "reference", DEVICE)[1]
        found = loss_and_gradients(case, torch.float32, "fused", DEVICE)[1]
        assert all(error(found[name], truth[name]) < 2e-5 for name in truth), (seed, case[2])


@pytest.mark.parametrize(
    ("impl", "seeds"),
    [
        ("chunked", range(60)),
        ("fused", range(9)),
        pytest.param("fused", MANY, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
def test_narrow_products_cost_what_eager_code_pays(impl: str, seeds: range) -> None:
    sums, device = [0.0, 0.0], DEVICE if impl == "fused" else "cpu"
    for seed in seeds:
        case = rounded(draw(seed), torch.bfloat16)
        truth = loss_and_gradients(case, torch.float64, "reference", device)[1]
        for place, one in enumerate((impl, "reference")):
            found = loss_and_gradients(case, torch.bfloat16, one, device)[1]
            sums[place] += sum(error(found[n], truth[n]) for n in truth if truth[n].norm() > 1e-6)
    assert sums[0] <= 1.1 * sums[1]


def test_fresh_memory_is_never_read(poisoned: None, chunks: str, short: None) -> None:
    for seed in range(12):
        case = draw(seed)
        truth, found = (loss_and_gradients(case, torch.float64, impl)[1] for impl in ("reference", "chunked"))
        assert all(error(found[name], truth[name]) < 1e-9 for name in truth), seed
    for seed in range(3):
        case = rounded(draw(seed), torch.float32)
        truth = loss_and_gradients(case, torch.float64, "reference", DEVICE)[1]
        found = loss_and_gradients(case, torch.float32, "fused", DEVICE)[1]
        assert all(error(found[name], truth[name]) < 2e-5 for name in truth), seed


@pytest.mark.parametrize("divergence", FROM_CACHE)
def test_gradcheck(divergence: str) -> None:
    generator = torch.Generator().manual_seed(2)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    uniforms = torch.rand(2, 3, 6, generator=generator, dtype=torch.float64)
    cached = written_down(2 * normal(2, 3, 13), top_k=4, uniforms=uniforms, temperature=1.5)
    labels = torch.tensor([[-100, 3, 0], [12, 5, 5]])
    objective = tailkd.Objective(divergence=divergence, top_k=2, temperature=1.5)

    def total(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        head = tailkd.Head(hidden, weight, bias, 0.5, 4.0)
        return tailkd.distillation_loss(head, cached, labels, objective=objective, impl="chunked").sum

    leaves = [t.requires_grad_() for t in (normal(2, 3, 3), normal(13, 3), normal(13))]
    assert torch.autograd.gradcheck(total, leaves, atol=1e-7)


def test_auto_takes_the_chunked_way_on_a_cpu_and_never_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    cached = written_down(torch.randn(1, 4, 30), top_k=3, uniforms=torch.rand(1, 4, 2).double())
    student = tailkd.Head(torch.randn(1, 4, 5, requires_grad=True), torch.randn(30, 5))
    called = []
    monkeypatch.setattr(blockwise, "cached_block", lambda *a: called.append(a) or _stop())
    for impl in ("auto", "chunked"):
        with pytest.raises(KeyboardInterrupt):
            tailkd.distillation_loss(
                student, cached, torch.ones(1, 4).long(), objective=tailkd.Objective(top_k=2), impl=impl
            )
    assert len(called) == 2


def _stop() -> None:
    raise KeyboardInterrupt


class Largest(TorchDispatchMode):
    """How many elements the largest tensor has that any operation gives back."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for one in tree_leaves(found):
            if isinstance(one, Tensor):
                self.elements = max(self.elements, one.numel())
        return found


@pytest.mark.parametrize(("impl", "is_dense"), [("auto", False), ("reference", True)])
@pytest.mark.parametrize("divergence", FROM_CACHE)
def test_no_tensor_grows_with_tokens_times_vocabulary(
    divergence: str, impl: str, is_dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, length, vocabulary = 8, 64, 900
    monkeypatch.setitem(chunked.CHUNK_BYTES, "cpu", 4 * length * vocabulary)  # one row
    monkeypatch.setattr(blockwise, "BLOCK_BYTES", 4 * 4 * vocabulary)
    cached = written_down(
        torch.randn(rows, length, vocabulary), top_k=10, uniforms=torch.rand(rows, length, 16).double(), temperature=2.0
    )
    student = tailkd.Head(torch.randn(rows, length, 16, requires_grad=True), torch.randn(vocabulary, 16))
    labels = torch.randint(vocabulary, (rows, length))
    objective = tailkd.Objective(divergence=divergence, temperature=2.0)
    with Largest() as seen:
        tailkd.distillation_loss(student, cached, labels, objective=objective, impl=impl).mean().backward()
    assert (seen.elements >= rows * length * vocabulary) == is_dense
    assert is_dense or seen.elements <= length * vocabulary


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("divergence", FROM_CACHE)
def test_the_host_never_waits_for_the_device(divergence: str) -> None:
    hidden, weight = torch.randn(2, 64, 32, device="cuda"), torch.randn(5_000, 32, device="cuda")
    logits = torch.randn(2, 64, 5_000, device="cuda")
    cached = written_down(logits, top_k=10, uniforms=torch.rand(2, 64, 32, device="cuda").double())
    student = tailkd.Head(hidden.requires_grad_(), weight.requires_grad_())
    labels = torch.randint(5_000, (2, 64))
    layout, labels = layout_of(labels), labels.cuda()
    for debug in ("default", "error"):  # the first call compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(debug)
        try:
            objective = tailkd.Objective(divergence=divergence)
            loss = tailkd.distillation_loss(student, cached, labels, objective=objective, impl="fused", layout=layout)
            loss.mean().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
