"""The public loss against the formula in its docstring."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

import tailkd
from tailkd.objective.settings import DIVERGENCES

VOCABULARY = 19


def heads(seed: int = 0) -> tuple[tailkd.Head, tailkd.Head, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    student = tailkd.Head(normal(3, 6, 8).requires_grad_(), normal(VOCABULARY, 8), normal(VOCABULARY), 0.5, 4.0)
    teacher = tailkd.Head(normal(3, 6, 12), normal(VOCABULARY, 12))
    labels = torch.randint(VOCABULARY, (3, 6), generator=generator)
    labels[0, :2], labels[2] = -100, -100
    return student, teacher, labels


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equals_its_docstring(divergence: str) -> None:
    student, teacher, labels = heads()
    own = {"decoupled_kd": {"labels": labels}, "tail_aware": {"top_k": 3}, "ghost_token_kl": {"top_k": 3}}
    names = {"tail_aware": "tail_aware_divergence"}
    valid = labels != -100
    expected = 0.7 * F.cross_entropy(student.logits().transpose(1, 2), labels, reduction="none")
    if divergence != "none":
        function = getattr(tailkd, names.get(divergence, divergence))
        settings: dict[str, Any] = {"mask": valid, "temperature": 2.0, **own.get(divergence, {})}
        expected = expected + 1.3 * function(student.logits(), teacher.logits(), **settings)
    weights = torch.rand(3, 6, dtype=torch.float64)
    objective = tailkd.Objective(divergence=divergence, top_k=3, temperature=2.0, clm_weight=0.7, divergence_weight=1.3)
    for token_weights in (None, weights):
        loss = tailkd.distillation_loss(student, teacher, labels, objective=objective, token_weights=token_weights)
        truth = expected if token_weights is None else expected * token_weights
        assert_close(loss.sum, truth.sum(), atol=1e-12, rtol=1e-12)
        assert loss.count == int(valid.sum()) == 10
        assert_close(loss.mean(), truth.sum() / 10)
        assert_close(loss.mean(40), truth.sum() / 40)
    assert_close(
        loss.parts["clm"].sum, F.cross_entropy(student.logits().flatten(0, 1), labels.flatten(), reduction="sum")
    )


def test_parts_of_the_tail_aware_divergence() -> None:
    student, teacher, labels = heads()
    loss = tailkd.distillation_loss(student, teacher, labels, objective=tailkd.Objective(top_k=3, beta=2.0))
    kl = tailkd.forward_kl(student.logits(), teacher.logits(), mask=labels != -100).sum()
    assert_close(loss.parts["head_kl"].sum + loss.parts["tail_kl"].sum, kl)
    assert 0 < loss.parts["tail_mass"].mean() < 1
    assert int(loss.parts["floored_rows"].sum) == 0
    assert not any(part.sum.requires_grad for part in loss.parts.values())


def test_floored_rows_are_counted() -> None:
    student, teacher, labels = heads()
    teacher = tailkd.Head(teacher.hidden, teacher.weight * 50)
    loss = tailkd.distillation_loss(student, teacher, labels, objective=tailkd.Objective(top_k=12))
    assert int(loss.parts["floored_rows"].sum) == 2  # the third row has no valid position


def test_nothing_valid_is_zero_with_a_gradient() -> None:
    student, teacher, labels = heads()
    loss = tailkd.distillation_loss(student, teacher, torch.full_like(labels, -100), objective=tailkd.Objective())
    loss.mean().backward()
    assert loss.count == 0
    assert loss.sum == 0
    assert student.hidden.grad is not None
    assert (student.hidden.grad == 0).all()


def test_what_is_refused() -> None:
    student, teacher, labels = heads()
    objective = tailkd.Objective()
    with pytest.raises(ValueError, match=r"impl is 'fast'; expected one of auto, fused, chunked, reference"):
        tailkd.distillation_loss(student, teacher, labels, objective=objective, impl="fast")
    with pytest.raises(ValueError, match=r"needs a teacher"):
        tailkd.distillation_loss(student, None, labels, objective=objective)
    with pytest.raises(ValueError, match=r"19 vocabulary rows, the student 7.*narrow"):
        tailkd.distillation_loss(student.narrow(7), teacher, labels.clamp_max(6), objective=objective)
    with pytest.raises(ValueError, match=r"label 19 is outside the 19 vocabulary rows"):
        tailkd.distillation_loss(
            student, teacher, labels + 1 * (labels == labels.max()) * (19 - labels), objective=objective
        )
    with pytest.raises(ValueError, match=r"labels \(3, 5\); expected"):
        tailkd.distillation_loss(student, teacher, labels[:, :5], objective=objective)
    for settings, message in (
        ({"divergence": "kl"}, "expected one of none, forward_kl"),
        ({"top_k": 0}, "top_k is 0"),
        ({"beta": -1.0}, "beta is -1.0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"jsd_beta": 1.5}, "jsd_beta is 1.5"),
        ({"clm_weight": float("nan")}, "clm_weight is nan"),
    ):
        with pytest.raises(ValueError, match=message):
            tailkd.Objective(**settings)
    with pytest.raises(ValueError, match="do not fit a vocabulary matrix"):
        tailkd.Head(student.hidden, teacher.weight)
    with pytest.raises(ValueError, match="expected one shape"):
        tailkd.forward_kl(student.logits(), teacher.logits()[..., :-1])
