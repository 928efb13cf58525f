"""What the mathematics promises: facts of the tail-aware divergence, and each gradient against finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import tailkd
from tailkd.objective import divergences

Divergence = Callable[..., Tensor]


def draw(seed: int = 0, *, shape: tuple[int, int, int] = (2, 7, 23), scale: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, teacher


def split(student: Tensor, teacher: Tensor, top_k: int) -> divergences.Split:
    log_p, log_q = divergences.pair(student, teacher, 1.0)
    return divergences.split_kl(log_p, log_q, divergences.top_k_mask(log_p, top_k))


ALL: dict[str, tuple[Divergence, dict[str, Any]]] = {
    "forward_kl": (tailkd.forward_kl, {}),
    "reverse_kl": (tailkd.reverse_kl, {}),
    "tail_aware": (tailkd.tail_aware_divergence, {"top_k": 3, "beta": 2.0}),
    "tail_aware segments": (
        tailkd.tail_aware_divergence,
        {"top_k": 3, "segments": torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 2, 2, 3, 3]])},
    ),
    "jensen_shannon": (tailkd.jensen_shannon, {"jsd_beta": 0.3}),
    "skew_forward_kl": (tailkd.skew_forward_kl, {}),
    "skew_reverse_kl": (tailkd.skew_reverse_kl, {}),
    "total_variation": (tailkd.total_variation, {}),
    "decoupled_kd": (
        tailkd.decoupled_kd,
        {"labels": torch.tensor([[1, 2, 3, 4, 5, 6, 7], [0, 22, 3, -100, 1, 1, 9]])},
    ),
    "ghost_token_kl": (tailkd.ghost_token_kl, {"top_k": 4}),
}


@pytest.mark.parametrize("top_k", [1, 2, 10, 22])
def test_fact_1_head_plus_tail_is_kl(top_k: int) -> None:
    student, teacher = draw()
    parts = split(student, teacher, top_k)
    whole = parts.head_kl + parts.log_tail_mass.exp() * parts.tail_kl
    assert_close(whole, tailkd.forward_kl(student, teacher), atol=1e-14, rtol=0)


@pytest.mark.parametrize("top_k", [1, 5, 20])
def test_fact_2_mean_weight_of_the_tail_is_beta(top_k: int) -> None:
    student, teacher = draw(1)
    mask = torch.rand(2, 7, generator=torch.Generator().manual_seed(1)) > 0.3
    parts = split(student, teacher, top_k)
    value = tailkd.tail_aware_divergence(student, teacher, top_k=top_k, beta=1.7, mask=mask)
    weight = ((value - parts.head_kl) / parts.tail_kl).masked_fill(~mask, 0.0)
    assert_close(weight.sum(-1) / mask.sum(-1), torch.full((2,), 1.7, dtype=torch.float64), atol=1e-12, rtol=0)


def test_fact_3_beta_equal_to_the_mean_tail_mass_is_kl_and_beta_1_is_not() -> None:
    student, teacher = (part[:1] for part in draw(2))
    mean = split(student, teacher, 5).log_tail_mass.exp().mean().item()
    kl = tailkd.forward_kl(student, teacher)
    assert_close(tailkd.tail_aware_divergence(student, teacher, top_k=5, beta=mean), kl, atol=1e-13, rtol=0)
    assert (tailkd.tail_aware_divergence(student, teacher, top_k=5, beta=1.0) - kl).abs().max() > 0.1


@pytest.mark.parametrize("beta", [0.0, 0.5, 2.0])
def test_fact_4_gradient_is_equation_6(beta: float) -> None:
    student, teacher = draw(3)
    student.requires_grad_()
    tailkd.tail_aware_divergence(student, teacher, top_k=4, beta=beta).sum().backward()
    p, q = teacher.softmax(-1), student.detach().softmax(-1)
    tail = torch.ones_like(p).scatter(-1, p.topk(4).indices, 0.0)
    mass_p, mass_q = ((x * tail).sum(-1, keepdim=True) for x in (p, q))
    beta_x = beta / mass_p.mean(1, keepdim=True)
    expected = q - p + tail * (beta_x - 1) * (q * mass_p / mass_q - p)
    assert_close(student.grad, expected, atol=1e-13, rtol=0)


def test_fact_5_the_beta_term_moves_no_mass_into_the_tail() -> None:
    student, teacher = draw(4)
    extra = []
    for beta in (0.0, 5.0):
        leaf = student.clone().requires_grad_()
        tailkd.tail_aware_divergence(leaf, teacher, top_k=4, beta=beta).sum().backward()
        assert leaf.grad is not None
        extra.append(leaf.grad)
    difference = extra[1] - extra[0]
    assert difference.abs().max() > 0.1
    assert difference.sum(-1).abs().max() < 1e-13


def test_decoupled_kd_identity() -> None:
    student, teacher = draw(5)
    labels = torch.randint(0, 23, (2, 7), generator=torch.Generator().manual_seed(5))
    target, others = (
        tailkd.decoupled_kd(student, teacher, labels, dkd_alpha=a, dkd_beta=b) for a, b in ((1.0, 0.0), (0.0, 1.0))
    )
    p_label = teacher.softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    assert_close(target + (1 - p_label) * others, tailkd.forward_kl(student, teacher), atol=1e-13, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", ALL)
def test_gradcheck(name: str, temperature: float) -> None:
    divergence, settings = ALL[name]
    student, teacher = draw(6)
    student.requires_grad_()
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 2:5] = False
    call = lambda leaf: divergence(leaf, teacher, mask=mask, temperature=temperature, **settings)  # noqa: E731
    assert torch.autograd.gradcheck(call, (student,), atol=1e-7)


@pytest.mark.parametrize("name", ALL)
def test_no_gradient_to_the_teacher(name: str) -> None:
    divergence, settings = ALL[name]
    student, teacher = (part.requires_grad_() for part in draw(7))
    divergence(student, teacher, **settings).sum().backward()
    assert teacher.grad is None


def test_segments_are_sequences_of_their_own() -> None:
    student, teacher = draw(8)
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [4, 4, 4, 4, 4, 4, 4]])
    whole = tailkd.tail_aware_divergence(student, teacher, top_k=3, segments=segments)
    alone = [tailkd.tail_aware_divergence(student[:1, a:b], teacher[:1, a:b], top_k=3) for a, b in ((0, 3), (3, 7))]
    assert_close(whole[:1], torch.cat(alone, 1), atol=1e-13, rtol=0)
    assert_close(whole[1:], tailkd.tail_aware_divergence(student[1:], teacher[1:], top_k=3), atol=1e-13, rtol=0)


def test_floor_holds_up_rows_that_the_teacher_is_sure_of() -> None:
    student, teacher = draw(9, shape=(1, 4, 12))
    teacher[..., 0] = 40.0
    mass = split(student, teacher, 1).log_tail_mass.exp()
    assert mass.max() < 1e-12
    floored = tailkd.tail_aware_divergence(student, teacher, top_k=1, beta=2.0)
    paper = tailkd.tail_aware_divergence(student, teacher, top_k=1, beta=2.0, tail_mass_floor=0.0)
    head = tailkd.ghost_token_kl(student, teacher, top_k=1)
    assert_close(floored, head, atol=1e-4, rtol=0)
    assert ((paper - head).mean() / split(student, teacher, 1).tail_kl.mean()).item() == pytest.approx(2.0, rel=0.5)
