"""Cosine of hidden states: section 13's vector, torch's own loss, gradients, precision, projections."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tailkd.objective.hidden import Hidden, cosine, hidden_loss, projections


def states(width: int = 5, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(2, 7, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mask() -> Tensor:
    return torch.arange(7) < torch.tensor([[7], [3]])


def test_the_vector_of_section_13() -> None:
    student = torch.tensor([[[1.0, 0.0], [3.0, 4.0]]], dtype=torch.float64)
    teacher = torch.tensor([[[1.0, 1.0], [-3.0, -4.0]]], dtype=torch.float64)
    both = torch.tensor([[True, True]])
    first = torch.tensor([[1, 0]])
    assert float(cosine(student, teacher, first)) == pytest.approx(1 - 1 / math.sqrt(2), abs=1e-15)
    assert float(cosine(student, teacher, both)) == pytest.approx(1 - 1 / math.sqrt(2) + 2, abs=1e-15)
    assert float(cosine(student, teacher, ~both)) == 0.0


def test_equals_the_loss_of_distilbert_and_its_gradient() -> None:
    student, teacher = states().requires_grad_(), states(seed=1).requires_grad_()
    loss = cosine(student, teacher, mask())
    (ours,) = torch.autograd.grad(loss, student, retain_graph=True)
    kept = student[mask()]
    expected = nn.CosineEmbeddingLoss(reduction="sum")(kept, teacher.detach()[mask()], torch.ones(len(kept)))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, student)[0])
    assert torch.autograd.grad(loss, teacher, allow_unused=True) == (None,)
    torch.autograd.gradcheck(lambda s: cosine(s, teacher, mask()), student)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_stands_at_padding_does_not_count(bad: float) -> None:
    student, teacher = states(), states(seed=1)
    expected = cosine(student, teacher, mask())
    for tensor in (student, teacher):
        tensor[~mask()] = bad
    student.requires_grad_()
    loss = cosine(student, teacher, mask())
    loss.backward()
    assert torch.equal(loss, expected)
    assert student.grad is not None
    assert not student.grad[~mask()].any()
    assert student.grad[mask()].abs().min() > 0


@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_states_are_compared_in_float32(autocast: bool) -> None:
    student, teacher = states(512, torch.bfloat16), states(512, torch.bfloat16, seed=1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = cosine(student, teacher, mask())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), cosine(student.double(), teacher.double(), mask()), rtol=1e-6, atol=0)
    assert cosine(student.float(), teacher.double(), mask()).dtype == torch.float64


def test_pairs_count_by_their_mean() -> None:
    student, teacher = [states(seed=n) for n in (0, 1)], [states(seed=n) for n in (2, 3)]
    expected = (cosine(student[0], teacher[0], mask()) + cosine(student[1], teacher[1], mask())) / 2
    torch.testing.assert_close(hidden_loss(student, teacher, mask()), expected)
    with pytest.raises(ValueError, match="zip"):
        hidden_loss(student, teacher[:1], mask())


def test_projections_bring_unequal_widths_together_and_learn() -> None:
    state = torch.get_rng_state()
    maps, same = projections(200, 300, 2, seed=3), projections(200, 300, 2, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(maps.parameters(), same.parameters(), strict=True))
    weights = list(maps.parameters())
    assert [tuple(weight.shape) for weight in weights] == [(300, 200), (300, 200)]
    assert not torch.equal(*weights)
    student, teacher = [states(200, torch.float32)] * 2, [states(300, torch.float32, seed=n) for n in (4, 5)]
    image = student[0] @ weights[0].detach().T
    assert float(image.std()) == pytest.approx(float(student[0].std()), rel=0.1)
    loss = hidden_loss(student, teacher, mask(), projections=weights)
    images = [s @ w.T for s, w in zip(student, weights, strict=True)]
    torch.testing.assert_close(loss, hidden_loss(images, teacher, mask()))
    loss.backward()
    with torch.no_grad():
        for weight in weights:
            assert weight.grad is not None
            weight -= 0.1 * weight.grad
    assert hidden_loss(student, teacher, mask(), projections=weights) < loss


def test_settings_name_states() -> None:
    assert Hidden().student_states == Hidden().teacher_states == (-1,)
    some = Hidden(pairs=((1, 2), (3, 6)), weight=0.5)
    assert (some.student_states, some.teacher_states) == ((1, 3), (2, 6))
    with pytest.raises(ValueError, match=r"hidden.pairs is empty; expected .last. or \[\[student state"):
        Hidden(pairs=())
    with pytest.raises(ValueError, match=r"hidden.weight is 0.0; expected a finite number > 0"):
        Hidden(weight=0.0)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 7, 5\), teacher's \(2, 7, 6\), mask \(2, 7\); expected .* project"):
        cosine(states(5), states(6), mask())
    with pytest.raises(ValueError, match=r"mask \(2, 6\); expected"):
        cosine(states(), states(), mask()[:, :6])
