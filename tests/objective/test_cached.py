"""A teacher that was written down: what is kept, and that its estimates are right on average, exactly."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.testing import assert_close

import tailkd
from tailkd.objective import Cached, caching, divergences, written_down
from tailkd.objective.caching import SPAN, drawn
from tailkd.objective.checks import FROM_CACHE

# Section "A teacher that was written down" of docs/numerics.md: head .5 and .2, and the tail with its student's logits.
P = torch.tensor([0.5, 0.2, 0.12, 0.1, 0.05, 0.03], dtype=torch.float64)
Z = torch.tensor([0.4, -0.2, -0.3, 0.5, 0.0, -1.0], dtype=torch.float64)
KL2, ENTROPY, VARIANCE = 0.115460124, 1.261605476, 0.216488889


def uniforms(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def identity(logits: Tensor) -> tailkd.Head:
    """A student whose logits are its hidden states."""
    return tailkd.Head(logits, torch.eye(logits.shape[-1], dtype=logits.dtype))


def example(draws: Tensor) -> Cached:
    """The example's teacher with draws from its tail (positions, draws), one row."""
    found = written_down(P.log().expand(1, len(draws), 6), top_k=2, uniforms=uniforms(1, len(draws), 1))
    return replace(found, tail_ids=draws.unsqueeze(0))


def estimates(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of draws: the tail's KL, and its gradient with respect to the student's logits."""
    z = Z.expand(1, len(draws), 6).clone().requires_grad_()
    mask = torch.ones(1, len(draws), dtype=torch.bool)
    split = divergences.cached_split(z.log_softmax(-1), example(draws), mask, 2)
    (gradient,) = torch.autograd.grad(split.tail_kl.sum(), z)
    return split.tail_kl[0].detach(), gradient[0]


# ----- the example, by hand


def test_what_is_kept_of_the_example() -> None:
    found = written_down(
        P.log(), top_k=2, uniforms=torch.tensor([0.0, 0.399, 0.401, 0.734, 0.899, 0.901, 0.999]).double()
    )
    assert found.head_ids.tolist() == [0, 1]
    assert_close(found.head_log_probabilities.exp(), P[:2])
    assert found.log_tail_mass.exp().item() == pytest.approx(0.3, abs=1e-12)
    assert found.tail_entropy.item() == pytest.approx(ENTROPY, abs=1e-9)
    assert found.tail_ids.tolist() == [2, 2, 3, 4, 4, 5, 5]  # borders 0.4, 0.7333, 0.9
    assert (found.top_k, found.draws, found.vocabulary_size, found.temperature) == (2, 7, 6, 1.0)


def test_mean_and_variance_over_single_draws_are_exact() -> None:
    values, gradients = estimates(torch.arange(2, 6).unsqueeze(1))
    tail = P[2:] / 0.3
    mean = (tail * values).sum()
    assert mean.item() == pytest.approx(KL2, abs=1e-9)
    assert (tail * (values - mean) ** 2).sum().item() == pytest.approx(VARIANCE, abs=1e-9)
    exact = Z[2:].softmax(0) - tail
    assert_close((tail.unsqueeze(1) * gradients).sum(0), torch.cat([torch.zeros(2), exact]).double())
    error = ((gradients[:, 2:] - exact) ** 2).sum(1)
    assert_close((tail * error).sum(), 1 - (tail**2).sum())


def test_eight_draws_vary_as_the_formula_says() -> None:
    weights = torch.cat([torch.zeros(2), P[2:], torch.zeros(SPAN - 6)]).double().expand(20_000, SPAN)
    values, gradients = estimates(drawn(weights, uniforms(20_000, 8)))
    tail, exact = P[2:] / 0.3, Z[2:].softmax(0) - P[2:] / 0.3
    assert values.mean().item() == pytest.approx(KL2, abs=3 * (VARIANCE / 8 / 20_000) ** 0.5)
    assert values.var().item() == pytest.approx(VARIANCE / 8, rel=0.05)
    error = ((gradients[:, 2:] - exact) ** 2).sum(1).mean()
    assert error.item() == pytest.approx((1 - (tail**2).sum().item()) / 8, rel=0.05)


# ----- on average exactly the live teacher's, for every K and beta from one cache


ROWS, LENGTH, VOCABULARY, HELD = 3, 4, 11, 5


def live(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """Logits of student and teacher, labels, options."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        2 * torch.randn(ROWS, LENGTH, VOCABULARY, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    labels = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator)
    labels[0, 1], labels[2, 2:] = -100, -100
    segments = torch.tensor([[0, 0, 1, 1], [3, 3, 3, 4], [0, 0, 0, 0]])
    return student, teacher, labels, {"segments": segments}


def every_draw(teacher: Tensor, draws: int, temperature: float) -> Iterator[tuple[Cached, Tensor]]:
    """Each possible outcome of the draws, with its probability at each position."""
    cached = written_down(teacher, top_k=HELD, uniforms=uniforms(ROWS, LENGTH, draws), temperature=temperature)
    p = (teacher / temperature).softmax(-1)
    others = p.scatter(-1, cached.head_ids, 0.0).topk(VOCABULARY - HELD)
    q = others.values / others.values.sum(-1, keepdim=True)
    for places in itertools.product(range(VOCABULARY - HELD), repeat=draws):
        yield replace(cached, tail_ids=others.indices[..., list(places)]), q[..., list(places)].prod(-1)


def value_and_gradient(
    student: Tensor, teacher: Any, labels: Tensor, objective: tailkd.Objective, **options: Any
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    logits = student.clone().requires_grad_()
    loss = tailkd.distillation_loss(identity(logits), teacher, labels, objective=objective, **options)
    loss.sum.backward()
    assert logits.grad is not None
    return loss.sum.detach(), logits.grad, {name: part.sum for name, part in loss.parts.items()}


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize(
    ("divergence", "top_k", "beta", "temperature", "draws"),
    [
        *[("tail_aware", top_k, 2.0, 1.0, 1) for top_k in (1, 2, 4, HELD)],
        ("tail_aware", 3, 0.5, 1.0, 2),
        ("tail_aware", HELD, 7.0, 2.0, 1),
        ("forward_kl", 1, 2.0, 1.0, 1),
        ("forward_kl", 1, 2.0, 2.0, 2),
        ("ghost_token_kl", 2, 2.0, 1.0, 1),
    ],
)
def test_the_mean_over_all_draws_is_the_live_teachers(
    divergence: str, top_k: int, beta: float, temperature: float, draws: int, impl: str
) -> None:
    student, teacher, labels, options = live()
    objective = tailkd.Objective(divergence=divergence, top_k=top_k, beta=beta, temperature=temperature)
    truth = value_and_gradient(student, identity(teacher), labels, objective, impl="reference", **options)
    value, gradient = torch.zeros_like(truth[0]), torch.zeros_like(truth[1])
    for cached, probability in every_draw(teacher, draws, temperature):
        found = value_and_gradient(student, cached, labels, objective, impl=impl, token_weights=probability, **options)
        value, gradient = value + found[0], gradient + found[1]
        for name in {"clm", "head_kl", "tail_mass"} & truth[2].keys():  # exact whatever is drawn
            assert_close(found[2][name], truth[2][name], atol=1e-12, rtol=1e-12)
    assert_close(value, truth[0], atol=1e-11, rtol=1e-11)
    assert_close(gradient, truth[1], atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("divergence", FROM_CACHE)
@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_a_cache_of_all_ids_is_the_live_teacher(divergence: str, impl: str) -> None:
    student, teacher, labels, options = live()
    cached = written_down(teacher, top_k=VOCABULARY + 3, uniforms=uniforms(ROWS, LENGTH, 3))
    assert cached.top_k == VOCABULARY
    assert cached.log_tail_mass.max() == -torch.inf
    for top_k in (1, 4, VOCABULARY, VOCABULARY + 1):
        for floor in (0.0, 1e-6):
            objective = tailkd.Objective(divergence=divergence, top_k=top_k, tail_mass_floor=floor)
            truth = value_and_gradient(student, identity(teacher), labels, objective, impl="reference", **options)
            found = value_and_gradient(student, cached, labels, objective, impl=impl, **options)
            for one, other in zip(found[:2], truth[:2], strict=True):
                assert_close(one, other, atol=1e-11, rtol=1e-11)
            assert found[2].keys() == truth[2].keys()


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_a_head_alone_is_the_renormalised_head(impl: str) -> None:
    """What others cache: the tail's mass is nothing, and nothing is drawn from it."""
    student, teacher, labels, _ = live()
    whole = written_down(teacher, top_k=HELD, uniforms=uniforms(ROWS, LENGTH, 1))
    log_p = whole.head_log_probabilities.log_softmax(-1)
    alone = replace(whole, head_log_probabilities=log_p, log_tail_mass=torch.full((ROWS, LENGTH), -torch.inf))
    log_q = student.log_softmax(-1).gather(-1, whole.head_ids)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)[labels != -100].sum()
    for objective in (
        tailkd.Objective(divergence="forward_kl", clm_weight=0.0),
        tailkd.Objective(top_k=HELD, clm_weight=0.0, tail_mass_floor=0.0),
    ):
        found = value_and_gradient(student, alone, labels, objective, impl=impl)
        assert torch.isfinite(found[1]).all()
        assert_close(found[0], expected)


def test_without_a_teacher_the_cache_is_not_looked_at() -> None:
    student, teacher, labels, _ = live()
    cached = written_down(teacher, top_k=HELD, uniforms=uniforms(ROWS, LENGTH, 1), temperature=3.0)
    objective = tailkd.Objective(divergence="none")
    found = value_and_gradient(student, cached, labels, objective)
    truth = value_and_gradient(student, None, labels, objective)
    assert torch.equal(found[1], truth[1])


# ----- what is kept


@st.composite
def rows_of_weights(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Weights with zeros among them over a few spans, and uniforms with the borders among them."""
    vocabulary = SPAN * draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weights = torch.rand(3, vocabulary, generator=generator, dtype=torch.float64) ** draw(st.sampled_from([1, 20]))
    weights = weights.masked_fill(torch.rand(3, vocabulary, generator=generator) < draw(st.sampled_from([0, 0.9])), 0.0)
    some = torch.rand(3, 5, generator=generator, dtype=torch.float64)
    return weights, torch.cat([some, torch.tensor([[0.0, 1 - 2**-53]] * 3, dtype=torch.float64)], 1)


@given(rows_of_weights())
def test_draws_are_the_inverse_of_the_cumulative_sum(case: tuple[Tensor, Tensor]) -> None:
    weights, numbers = case
    found = drawn(weights, numbers)
    for row in range(len(weights)):
        cumulative = weights[row].cumsum(0)
        if cumulative[-1] == 0:
            assert ((found[row] >= 0) & (found[row] < len(cumulative))).all()
            continue
        assert (weights[row, found[row]] > 0).all()
        for u, i in zip(numbers[row].tolist(), found[row].tolist(), strict=True):
            target, slack = u * cumulative[-1].item(), 1e-12 * cumulative[-1].item()
            assert target <= cumulative[i].item() + slack
            assert (cumulative[i] - weights[row, i]).item() <= target + slack


def test_small_weights_of_a_long_row_are_drawn_in_their_proportion() -> None:
    """In float32 a cumulative sum moves in steps of 6e-8: most of these would never be drawn, others twice as often."""
    weights = torch.full((1, 4_700 * SPAN), 1e-8)
    weights[0, 0] = 1.0
    at = 1 / (1 + 1e-8 * (4_700 * SPAN - 1))
    numbers = at + (1 - at) * (torch.arange(2_000).double() + 0.5) / 2_000
    ids = drawn(weights, numbers.unsqueeze(0))[0]
    assert ids.min() >= 1
    assert_close(ids.double(), 1 + (4_700 * SPAN - 1) * (torch.arange(2_000).double() + 0.5) / 2_000, atol=2.0, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_kept_is_the_distribution(
    dtype: torch.dtype, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caching, "BLOCK_BYTES", 4 * 4 * 700)  # two blocks, the second shorter
    logits = (4 * torch.randn(2, 3, 700, generator=torch.Generator().manual_seed(1))).to(dtype)
    logits[..., 650:] = -torch.inf  # padding
    before = logits.clone()
    found = written_down(logits, top_k=10, uniforms=uniforms(2, 3, 400), temperature=temperature)
    assert torch.equal(logits, before)
    p = (logits.double() / temperature).softmax(-1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exact = {"atol": 1e-12, "rtol": 1e-12} if wide == torch.float64 else {"atol": 2e-6, "rtol": 2e-6}
    assert torch.equal(p.gather(-1, found.head_ids), p.topk(10).values)
    assert found.head_log_probabilities.dtype == found.log_tail_mass.dtype == found.tail_entropy.dtype == wide
    assert_close(found.head_log_probabilities.double().exp(), p.topk(10).values, **exact)
    tail = p.scatter(-1, found.head_ids, 0.0)
    assert_close(found.log_tail_mass.double(), tail.sum(-1).log(), **exact)
    tail = tail / tail.sum(-1, keepdim=True)
    assert_close(found.tail_entropy.double(), -torch.special.xlogy(tail, tail).sum(-1), **exact)
    assert (tail.gather(-1, found.tail_ids) > 0).all()
    again = written_down(logits[1:, 2:], top_k=10, uniforms=uniforms(2, 3, 400)[1:, 2:], temperature=temperature)
    for name, tensor in again.tensors.items():  # other rows beside it change nothing
        assert torch.equal(tensor, found.tensors[name][1:, 2:]), name
    nothing = written_down(logits[:0], top_k=10, uniforms=uniforms(0, 3, 4))
    assert nothing.head_ids.shape == (0, 3, 10)


def test_it_moves_whole() -> None:
    cached = written_down(torch.randn(1, 2, 9), top_k=2, uniforms=uniforms(1, 2, 3), temperature=1.5)
    moved = cached.to("meta")
    assert all(tensor.device.type == "meta" for tensor in moved.tensors.values())
    assert (moved.vocabulary_size, moved.temperature) == (9, 1.5)


# ----- what is refused


def test_an_objective_that_needs_more_is_refused() -> None:
    student, teacher, labels, _ = live()
    cached = written_down(teacher, top_k=HELD, uniforms=uniforms(ROWS, LENGTH, 2))

    def refused(message: str, one: Cached = cached, expected: Tensor = labels, **settings: Any) -> None:
        objective = tailkd.Objective(**{"top_k": 2, **settings})
        for impl in ("auto", "reference"):
            with pytest.raises(ValueError, match=message):
                tailkd.distillation_loss(identity(student), one, expected, objective=objective, impl=impl)

    for name in (
        "reverse_kl",
        "jensen_shannon",
        "skew_forward_kl",
        "skew_reverse_kl",
        "total_variation",
        "decoupled_kd",
    ):
        refused(
            f"'{name}' needs the teacher's probability of every id, and a cached teacher holds 5 ids and 2 draws .*; "
            "expected one of tail_aware, forward_kl, ghost_token_kl, or a teacher as a Head",
            divergence=name,
        )
    refused(r"temperature is 2.0, and the teacher was cached at 1.0.*; take that one, or cache", temperature=2.0)
    for name in ("tail_aware", "ghost_token_kl"):
        for top_k in (HELD + 1, VOCABULARY + 1):
            refused(f"top_k is {top_k}, and a cached teacher holds 5 ids .*at most 5", divergence=name, top_k=top_k)
    tailkd.distillation_loss(
        identity(student), cached, labels, objective=tailkd.Objective(divergence="forward_kl", top_k=HELD + 1)
    )
    refused(
        r"of \(2, 4\) positions; expected .* \(3, 4\), those of the labels",
        written_down(teacher[:2], top_k=3, uniforms=uniforms(2, LENGTH, 2)),
    )
    refused("the teacher has 12 vocabulary rows, the student 11", replace(cached, vocabulary_size=12))
    for name in ("head_ids", "tail_ids"):
        for bad in (-1, VOCABULARY):
            ids = cached.tensors[name].clone()
            ids[0, 1] = bad  # no label there
            tailkd.distillation_loss(
                identity(student), replace(cached, **{name: ids}), labels, objective=tailkd.Objective(top_k=2)
            )
            ids[1, 3, 1] = bad
            refused(f"cached id {bad} is outside the 11 vocabulary rows; the cache is", replace(cached, **{name: ids}))


def test_what_does_not_fit_together_is_refused() -> None:
    cached = written_down(torch.randn(2, 3, 9), top_k=4, uniforms=uniforms(2, 3, 5))
    for name, tensor in cached.tensors.items():
        with pytest.raises(ValueError, match=r"a cached teacher of shapes .*; expected \(batch, sequence, K\)"):
            replace(cached, **{name: tensor[:1]})
    with pytest.raises(ValueError, match="shapes"):
        replace(cached, head_ids=cached.head_ids[..., :2])
    with pytest.raises(ValueError, match=r"with 4 ids of 3 and 5 drawn .*; expected 1 to all ids"):
        replace(cached, vocabulary_size=3)
    with pytest.raises(ValueError, match=r"0 drawn from the rest; expected .* at least one draw"):
        replace(cached, tail_ids=cached.tail_ids[..., :0])
    with pytest.raises(ValueError, match=r"temperature is 0.0"):
        replace(cached, temperature=0.0)
    with pytest.raises(ValueError, match=r"top_k is 0"):
        written_down(torch.randn(2, 3, 9), top_k=0, uniforms=uniforms(2, 3, 5))
    with pytest.raises(ValueError, match=r"logits \(2, 3, 9\) and uniforms \(2, 5\); expected"):
        written_down(torch.randn(2, 3, 9), top_k=2, uniforms=uniforms(2, 5))
