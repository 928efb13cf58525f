"""Mixtures of teachers, usable ids and folded ids: each against probabilities added up by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from draws import error
from torch import Tensor

import tailkd
from tailkd.objective import Dense, chunked
from tailkd.objective.settings import DIVERGENCES

VOCABULARY, USABLE = 40, 36


def heads(dtype: torch.dtype = torch.float64) -> tuple[tailkd.Head, list[tailkd.Head], Tensor]:
    """A student over 36 ids, three teachers over 40 (one with bias, one with soft-cap and scale), labels."""
    generator = torch.Generator().manual_seed(3)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    student = tailkd.Head(normal(3, 7, 5).requires_grad_(), normal(USABLE, 5).requires_grad_())
    teachers = [
        tailkd.Head(normal(3, 7, 6), normal(VOCABULARY, 6)),
        tailkd.Head(normal(3, 7, 4), normal(VOCABULARY, 4), normal(VOCABULARY)),
        tailkd.Head(normal(3, 7, 8), 5 * normal(VOCABULARY, 8), None, 0.5, 4.0),
    ]
    labels = torch.randint(USABLE, (3, 7), generator=generator)
    labels[1, 2:5] = -100
    return student, teachers, labels


def by_hand(dense: Dense, ids: list[int]) -> Tensor:
    """Probabilities of the mixture over `ids`: masses moved and parts added, in a loop."""
    weights = dense.weights or [1.0] * len(dense.heads)
    total = torch.zeros(())
    for weight, head in zip(weights, dense.heads, strict=True):
        p = head.logits().softmax(-1)
        for source, target in dense.fold.items():
            p[..., target] += p[..., source]
        p = p[..., ids]
        total = total + weight / sum(weights) * p / p.sum(-1, keepdim=True)
    return total


SIGNALS: dict[str, dict[str, Any]] = {
    "two teachers": {"count": 2, "weights": (3.0, 1.0), "usable": USABLE},
    "three alike": {"count": 3, "usable": USABLE},
    "one": {"count": 1, "usable": USABLE},
    "one, folded": {"count": 1, "usable": USABLE, "fold": {36: 2, 39: 2, 37: 0}},
    "two, folded, other ids": {"count": 2, "usable": torch.arange(USABLE).flip(0), "fold": {38: 5}},
}


def signal(name: str, teachers: list[tailkd.Head]) -> Dense:
    options = dict(SIGNALS[name])
    return Dense(tuple(teachers[-options.pop("count") :]), **options)


@pytest.mark.parametrize("name", SIGNALS)
def test_logits_are_those_of_the_mixture(name: str) -> None:
    dense = signal(name, heads()[1])
    ids = dense.usable.tolist() if isinstance(dense.usable, Tensor) else range(USABLE)
    torch.testing.assert_close(dense.logits().softmax(-1), by_hand(dense, list(ids)))


@pytest.mark.parametrize("budget", [1 << 30, 3_000, 1], ids=["one chunk", "many chunks", "rows beyond the budget"])
@pytest.mark.parametrize("name", SIGNALS)
def test_loss_and_gradient(name: str, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunked.CHUNK_BYTES, "cpu", budget)
    student, teachers, labels = heads()
    for divergence in DIVERGENCES[1:]:
        objective = tailkd.Objective(divergence=divergence, top_k=4, temperature=1.5)
        results = []
        for impl in ("reference", "chunked"):
            loss = tailkd.distillation_loss(student, signal(name, teachers), labels, objective=objective, impl=impl)
            results.append((loss.sum, *torch.autograd.grad(loss.sum, (student.hidden, student.weight))))
        for truth, found in zip(*results, strict=True):
            assert error(found.detach(), truth.detach()) < 1e-9, divergence


def test_fused_takes_mixtures() -> None:
    student, teachers, labels = heads(torch.float32)
    for name in SIGNALS:
        results = [
            tailkd.distillation_loss(
                student, signal(name, teachers), labels, objective=tailkd.Objective(top_k=4), impl=impl
            ).sum
            for impl in ("reference", "fused")
        ]
        torch.testing.assert_close(results[1], results[0])


def test_a_plain_signal_multiplies_the_usable_rows_alone() -> None:
    student, teachers, labels = heads()
    one = tailkd.distillation_loss(student, signal("one", teachers), labels, objective=tailkd.Objective(top_k=4))
    other = tailkd.distillation_loss(student, teachers[-1].narrow(USABLE), labels, objective=tailkd.Objective(top_k=4))
    assert torch.equal(one.sum, other.sum)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "teachers with .* vocabulary rows; expected one or more over the same rows"),
        ({"count": 2, "weights": (1.0,)}, "expected a positive number for each"),
        ({"count": 2, "weights": (1.0, 0.0)}, "expected a positive number for each"),
        ({"count": 1, "fold": {40: 1}}, r"ids \[40\] are outside the teacher's 40 vocabulary rows"),
        ({"count": 1, "usable": 41}, r"ids \[41\] are outside"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    teachers = heads()[1]
    with pytest.raises(ValueError, match=message):
        Dense(tuple(teachers[: options.pop("count")]), **options)
