"""Properties over drawn shapes and logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.testing import assert_close

import tailkd

Case = tuple[Tensor, Tensor, Tensor, Tensor]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Student logits, teacher logits, mask, labels; ragged shapes, flat to peaked distributions."""
    shape = (*(draw(st.integers(1, high)) for high in (3, 5)), draw(st.integers(2, 17)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scales = [draw(st.sampled_from([0.1, 1.0, 5.0, 40.0])) for _ in range(2)]
    student, teacher = (s * torch.randn(shape, generator=generator, dtype=torch.float64) for s in scales)
    mask = torch.rand(shape[:2], generator=generator) < draw(st.sampled_from([0.3, 1.0]))
    return student, teacher, mask, torch.randint(shape[2], shape[:2], generator=generator)


def divergences(labels: Tensor, top_k: int) -> dict[str, Callable[..., Tensor]]:
    def tad(student: Tensor, teacher: Tensor, **settings: Any) -> Tensor:
        return tailkd.tail_aware_divergence(student, teacher, top_k=top_k, **settings)

    def dkd(student: Tensor, teacher: Tensor, **settings: Any) -> Tensor:
        return tailkd.decoupled_kd(student, teacher, labels, **settings)

    def ghost(student: Tensor, teacher: Tensor, **settings: Any) -> Tensor:
        return tailkd.ghost_token_kl(student, teacher, top_k=top_k, **settings)

    plain = (
        tailkd.forward_kl,
        tailkd.reverse_kl,
        tailkd.jensen_shannon,
        tailkd.skew_forward_kl,
        tailkd.skew_reverse_kl,
        tailkd.total_variation,
    )
    return {"tad": tad, "dkd": dkd, "ghost": ghost, **{d.__name__: d for d in plain}}


@given(cases(), st.integers(1, 20))
def test_not_negative_and_zero_where_equal(case: Case, top_k: int) -> None:
    student, teacher, mask, labels = case
    for name, divergence in divergences(labels, top_k).items():
        value = divergence(student, teacher, mask=mask)
        assert value.min() >= -1e-12, name
        assert (value[~mask] == 0).all(), name
        assert divergence(teacher, teacher).abs().max() < 1e-12, name


@given(cases(), st.integers(1, 20))
def test_positive_where_different(case: Case, top_k: int) -> None:
    student, _, _, labels = case
    student = student.clamp(-5, 5)
    teacher = student.clone()
    teacher[..., 0] += 1.0
    for name, divergence in divergences(labels, top_k).items():
        floor = {} if name != "tad" else {"tail_mass_floor": 0.0}
        assert (divergence(student, teacher, **floor) > 1e-12).all(), name


@given(cases(), st.integers(1, 20), st.floats(-50, 50), st.integers(0, 2**31))
def test_shift_and_permutation_change_nothing(case: Case, top_k: int, shift: float, seed: int) -> None:
    student, teacher, mask, labels = case
    order = torch.randperm(student.shape[-1], generator=torch.Generator().manual_seed(seed))
    moved = divergences(order.argsort()[labels], top_k)
    for name, divergence in divergences(labels, top_k).items():
        value = divergence(student, teacher, mask=mask)
        assert_close(divergence(student + shift, teacher - shift, mask=mask), value, atol=1e-9, rtol=1e-9)
        permuted = moved[name](student[..., order], teacher[..., order], mask=mask)
        assert_close(permuted, value, atol=1e-9, rtol=1e-9, msg=name)


@given(cases(), st.integers(1, 20))
def test_masking_is_slicing(case: Case, top_k: int) -> None:
    student, teacher, mask, labels = case
    row = mask[0]
    if not row.any():
        return
    sliced = divergences(labels[:1, row], top_k)
    for name, divergence in divergences(labels[:1], top_k).items():
        value = divergence(student[:1], teacher[:1], mask=mask[:1])[:, row]
        assert_close(value, sliced[name](student[:1, row], teacher[:1, row]), atol=1e-10, rtol=1e-10, msg=name)


@given(cases(), st.integers(0, 5), st.floats(0, 10))
def test_a_head_as_large_as_the_vocabulary_is_kl(case: Case, more: int, beta: float) -> None:
    student, teacher, mask, _ = case
    value = tailkd.tail_aware_divergence(student, teacher, top_k=student.shape[-1] + more, beta=beta, mask=mask)
    assert_close(value, tailkd.forward_kl(student, teacher, mask=mask), atol=1e-11, rtol=1e-11)


@given(cases(), st.integers(1, 6))
def test_beta_at_the_mean_tail_mass_is_kl(case: Case, top_k: int) -> None:
    student, teacher, _, _ = case
    student, teacher = student[:1], teacher[:1]
    p = teacher.softmax(-1)
    mean = p.scatter(-1, p.topk(min(top_k, p.shape[-1])).indices, 0.0).sum(-1).mean().item()
    value = tailkd.tail_aware_divergence(student, teacher, top_k=top_k, beta=mean, tail_mass_floor=0.0)
    assert_close(value, tailkd.forward_kl(student, teacher), atol=1e-9, rtol=1e-9)


HARD = {
    "huge logits": lambda s, t: (1e4 * s.sign(), 1e4 * t.sign()),
    "one-hot teacher": lambda s, t: (s, torch.full_like(t, -1e4).index_fill(-1, torch.tensor([2]), 1e4)),
    "one-hot both": lambda s, t: 2 * (torch.full_like(t, -1e4).index_fill(-1, torch.tensor([2]), 1e4),),
    "padded rows": lambda s, t: tuple(x.index_fill(-1, torch.tensor([1, 8]), float("-inf")) for x in (s, t)),
    "tail all padded": lambda s, t: tuple(x.index_fill(-1, torch.arange(3, 9), float("-inf")) for x in (s, t)),
    "equal logits": lambda s, t: (torch.zeros_like(s), torch.zeros_like(t)),
}


@pytest.mark.parametrize("masked", ["none", "all but one", "all"])
@pytest.mark.parametrize("hard", HARD)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_hard_logits_give_finite_values_and_gradients(hard: str, masked: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    pair = (torch.randn((2, 4, 9), generator=generator, dtype=torch.float64) for _ in range(2))
    student, teacher = (x.to(dtype) for x in HARD[hard](*pair))
    mask = torch.full((2, 4), masked == "none")
    mask[0, 1] = masked != "all"
    labels = torch.tensor([[0, 2, 0, 2], [2, 0, 2, 0]])
    for top_k in (1, 3, 9):
        for name, divergence in divergences(labels, top_k).items():
            leaf = student.clone().requires_grad_()
            value = divergence(leaf, teacher, mask=mask)
            value.sum().backward()
            assert leaf.grad is not None
            assert value.isfinite().all(), (name, top_k)
            assert leaf.grad.isfinite().all(), (name, top_k)
            if masked == "all":
                assert (value == 0).all(), name
                assert (leaf.grad == 0).all(), name
