"""The chunked loss against the float64 oracle: values, gradients, memory, and how it behaves inside autograd."""

from __future__ import annotations

import builders
import pytest
import torch
from draws import draw, error, loss_and_gradients, small
from torch import Tensor
from torch.testing import assert_close

import tailkd
from tailkd.objective import blockwise, chunked
from tailkd.objective.settings import DIVERGENCES

CASES = 260


@pytest.fixture(params=["one chunk", "many chunks", "rows beyond the budget"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    budgets = {"one chunk": (1 << 30, 1 << 20), "many chunks": (80_000, 5_000), "rows beyond the budget": (1, 3_000)}
    chunk, block = budgets[request.param]
    monkeypatch.setitem(chunked.CHUNK_BYTES, "cpu", chunk)
    monkeypatch.setattr(blockwise, "BLOCK_BYTES", block)
    return request.param


def test_float64_is_exact(chunks: str) -> None:
    for seed in range(CASES):
        case = draw(seed)
        truth, found = (loss_and_gradients(case, torch.float64, impl) for impl in ("reference", "chunked"))
        for name in truth[1]:
            assert error(found[1][name], truth[1][name]) < 1e-9, (seed, name, case[1])
        assert found[0].count == truth[0].count
        assert found[0].parts.keys() == truth[0].parts.keys()
        for name, part in truth[0].parts.items():
            assert float(found[0].parts[name].sum) == pytest.approx(float(part.sum), rel=1e-9, abs=1e-9), (seed, name)


@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 2e-6), (torch.bfloat16, 4e-3)])
def test_errors_are_those_of_eager_code(dtype: torch.dtype, least: float) -> None:
    """Relative error <= max(2e-6, 1.1 x eager) in float32; in bfloat16 1.1 x eager over all cases, see numerics.md."""
    sums: dict[str, list[float]] = {}
    beyond = []
    for seed in range(CASES):
        case = draw(seed)
        rounded = {n: t.to(dtype).double() if isinstance(t, Tensor) else t for n, t in case[0].items()}
        case = (rounded, *case[1:])
        truth = loss_and_gradients(case, torch.float64, "reference")[1]
        eager = loss_and_gradients(case, dtype, "reference")[1]
        ours = loss_and_gradients(case, dtype, "chunked")[1]
        for name in truth:
            if truth[name].norm() < 1e-6:
                continue
            pair = error(ours[name], truth[name]), error(eager[name], truth[name])
            total = sums.setdefault(name, [0.0, 0.0])
            total[0], total[1] = total[0] + pair[0], total[1] + pair[1]
            if dtype == torch.float32 and pair[0] > max(least, 1.1 * pair[1]):
                beyond.append((seed, name, pair, case[1].divergence))
    assert not beyond
    for name, (ours_sum, eager_sum) in sums.items():
        assert ours_sum <= 1.1 * eager_sum + CASES * least * (dtype == torch.float32), (name, ours_sum, eager_sum)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck(divergence: str, chunks: str) -> None:
    tensors = draw(3)[0]
    labels = torch.randint(tensors["weight"].shape[0], tensors["hidden"].shape[:2])
    labels[0, 0] = -100
    teacher = tailkd.Head(tensors["teacher_hidden"], tensors["teacher_weight"])
    objective = tailkd.Objective(divergence=divergence, top_k=2, temperature=1.5)

    def total(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        head = tailkd.Head(hidden, weight, bias, 0.5, 4.0)
        return tailkd.distillation_loss(head, teacher, labels, objective=objective, impl="chunked").sum

    bias = torch.randn(tensors["weight"].shape[0], dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (tensors["hidden"], tensors["weight"], bias)]
    assert torch.autograd.gradcheck(total, leaves, atol=1e-7)


def test_auto_is_chunked_and_names_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, labels = small()
    monkeypatch.setattr(chunked, "_run", None)
    for impl in ("auto", "chunked"):
        with pytest.raises(TypeError):
            tailkd.distillation_loss(student, teacher, labels, objective=tailkd.Objective(), impl=impl)
    tailkd.distillation_loss(student, teacher, labels, objective=tailkd.Objective(), impl="reference")


def test_backward_once_twice_and_of_itself() -> None:
    student, teacher, labels = small()
    loss = tailkd.distillation_loss(student, teacher, labels, objective=tailkd.Objective(top_k=3)).mean()
    first = torch.autograd.grad(loss, (student.hidden, student.weight), retain_graph=True)
    second = torch.autograd.grad(loss, (student.hidden, student.weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    loss = tailkd.distillation_loss(student, teacher, labels, objective=tailkd.Objective(top_k=3)).mean()
    (gradient,) = torch.autograd.grad(loss, student.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        gradient.sum().backward()


@pytest.mark.parametrize("frozen", ["weight", "hidden", "both"])
def test_what_is_frozen_costs_nothing(frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, labels = small()
    expected = tailkd.distillation_loss(student, teacher, labels, objective=tailkd.Objective(top_k=3)).sum
    full = torch.autograd.grad(expected, (student.hidden, student.weight))
    hidden = student.hidden.detach().requires_grad_(frozen == "weight")
    weight = student.weight.detach().requires_grad_(frozen == "hidden")
    made = []
    plain = chunked._Gradients.like
    monkeypatch.setattr(chunked._Gradients, "like", staticmethod(lambda *a: made.append(plain(*a)) or made[-1]))
    loss = tailkd.distillation_loss(tailkd.Head(hidden, weight), teacher, labels, objective=tailkd.Objective(top_k=3))
    assert_close(loss.sum, expected)
    assert (made[0].hidden is None) == (frozen != "weight")
    assert (made[0].weight is None) == (frozen != "hidden")
    if frozen != "both":
        loss.sum.backward()
        leaf, truth = (hidden, full[0]) if frozen == "weight" else (weight, full[1])
        assert_close(leaf.grad, truth)


def test_inside_autocast_and_activation_checkpointing() -> None:
    student, teacher, labels = small()

    def loss(hidden: Tensor) -> Tensor:
        head = tailkd.Head(hidden, student.weight)
        return tailkd.distillation_loss(head, teacher, labels, objective=tailkd.Objective(top_k=3)).sum

    expected = torch.autograd.grad(loss(student.hidden), (student.hidden, student.weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(loss(student.hidden), (student.hidden, student.weight))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    again = torch.utils.checkpoint.checkpoint(loss, student.hidden, use_reentrant=False)
    found = torch.autograd.grad(again, (student.hidden, student.weight))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_fresh_memory_is_never_read(poisoned: None, chunks: str) -> None:
    for seed in range(40):
        case = draw(seed)
        truth, found = (loss_and_gradients(case, torch.float64, impl)[1] for impl in ("reference", "chunked"))
        for name in truth:
            assert error(found[name], truth[name]) < 1e-9, (seed, name)


MEMORY = """
import sys, torch, tailkd
from tailkd.objective import blockwise, chunked
torch.set_num_threads(1)
positions, vocabulary, width, planted, impl = *map(int, sys.argv[1:5]), sys.argv[5]
chunked.CHUNK_BYTES["cpu"] = 32 << 20
def run(rows):
    hidden = torch.randn(rows, 256, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    teacher = tailkd.Head(torch.randn(rows, 256, width), torch.randn(vocabulary, width))
    labels = torch.randint(vocabulary, (rows, 256))
    extra = torch.ones(rows * 256, vocabulary) if planted else None
    student = tailkd.Head(hidden, weight)
    tailkd.distillation_loss(student, teacher, labels, objective=tailkd.Objective(), impl=impl).mean().backward()
def peak():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))
run(1)
open("/proc/self/clear_refs", "w").write("5")  # forgets the peak of the imports
before = peak()
run(positions // 256)
print(peak() - before)
"""


def grown(positions: int, vocabulary: int, *, planted: bool = False, impl: str = "chunked") -> int:
    """Bytes by which the peak of a fresh process grows from 256 positions to these."""
    arguments = [str(positions), str(vocabulary), "16", str(int(planted)), impl]
    return int(builders.fresh_python(MEMORY, *arguments).stdout)


def test_memory_does_not_grow_with_tokens_times_vocabulary() -> None:
    positions, vocabulary = 4096, 8000
    dense = 4 * positions * vocabulary
    inputs = 4 * positions * 16 * 4  # hidden states of both sides, the gradient, and the packed copies
    # 32 MB of chunks and what the products pack, against 131 MB a side
    assert grown(positions, vocabulary) < 0.45 * dense + inputs
    assert grown(positions, vocabulary, planted=True) > dense  # the measure sees such a buffer


@pytest.mark.slow
def test_memory_is_flat_from_2_048_to_32_768_positions() -> None:
    few, many = grown(2_048, 32_000), grown(32_768, 32_000)
    moving = 4 * 32_768 * 16 * 5
    assert many - moving < 1.1 * few + 8e6


@pytest.mark.slow
def test_memory_is_a_tenth_of_eager_code() -> None:
    assert grown(8_192, 8_000) < grown(8_192, 8_000, impl="reference") / 10
