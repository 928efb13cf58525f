"""Values and gradients worked out by hand for one pair of positions, float64."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import tailkd
from tailkd.objective import divergences

T = [[[2.0, 1, 0, -1, -2], [0.5, 0, 1.5, -0.5, 1]]]
S = [[[1.0, 1, 0.5, -0.5, 0], [0, 1, 0.5, -1, 0.25]]]
TEACHER = torch.tensor(T, dtype=torch.float64)
STUDENT = torch.tensor(S, dtype=torch.float64)
LABELS = torch.tensor([[1, 2]])
CLM = [1.16238185, 1.44860764]

VALUES = {
    "forward_kl": (tailkd.forward_kl, {}, [0.26465690, 0.23736298]),
    "forward_kl t=2": (tailkd.forward_kl, {"temperature": 2.0}, [0.38379860, 0.24943211]),
    "forward_kl t=4": (tailkd.forward_kl, {"temperature": 4.0}, [0.43854204, 0.24952679]),
    "reverse_kl": (tailkd.reverse_kl, {}, [0.33662790, 0.31623075]),
    "jensen_shannon .1": (tailkd.jensen_shannon, {"jsd_beta": 0.1}, [0.02387302, 0.02166046]),
    "jensen_shannon .5": (tailkd.jensen_shannon, {"jsd_beta": 0.5}, [0.06907399, 0.06517959]),
    "jensen_shannon .9": (tailkd.jensen_shannon, {"jsd_beta": 0.9}, [0.02824754, 0.02700039]),
    "jensen_shannon 0": (tailkd.jensen_shannon, {"jsd_beta": 0.0}, [0.26465690, 0.23736298]),
    "jensen_shannon 1": (tailkd.jensen_shannon, {"jsd_beta": 1.0}, [0.33662790, 0.31623075]),
    "skew_forward_kl": (tailkd.skew_forward_kl, {"skew": 0.1}, [0.21565484, 0.19785649]),
    "skew_reverse_kl": (tailkd.skew_reverse_kl, {"skew": 0.1}, [0.24010483, 0.23142158]),
    "ghost_token_kl K=1": (tailkd.ghost_token_kl, {"top_k": 1}, [0.22065573, 0.09099600]),
    "ghost_token_kl K=2": (tailkd.ghost_token_kl, {"top_k": 2}, [0.24683956, 0.15437451]),
    "tad K=1 b=1": (tailkd.tail_aware_divergence, {"top_k": 1, "beta": 1.0}, [0.31478234, 0.40410193]),
    "tad K=1 b=2": (tailkd.tail_aware_divergence, {"top_k": 1, "beta": 2.0}, [0.40890895, 0.71720787]),
    "tad K=2 b=1": (tailkd.tail_aware_divergence, {"top_k": 2, "beta": 1.0}, [0.32767656, 0.53089187]),
    "tad K=2 b=2": (tailkd.tail_aware_divergence, {"top_k": 2, "beta": 2.0}, [0.40851355, 0.90740923]),
    "tad K=3 b=1": (tailkd.tail_aware_divergence, {"top_k": 3, "beta": 1.0}, [0.36676153, 0.54557682]),
    "tad K=3 b=2": (tailkd.tail_aware_divergence, {"top_k": 3, "beta": 2.0}, [0.48002231, 0.88746670]),
}
SPLITS = {
    1: ([0.22065573, 0.09099600], [0.12101820, 0.25617991], [0.36359135, 0.57134447], 0.46746791),
    2: ([0.24683956, 0.15437451], [0.13761785, 0.26654247], [0.12946970, 0.31135175], 0.22041072),
    3: ([0.25350075, 0.20368694], [0.25740316, 0.21916203], [0.04334115, 0.15365819], 0.09849967),
}


@pytest.mark.parametrize("name", VALUES)
def test_value(name: str) -> None:
    divergence, settings, expected = VALUES[name]
    assert_close(divergence(STUDENT, TEACHER, **settings), torch.tensor([expected]).double(), atol=1e-7, rtol=0)


def test_total_variation() -> None:
    value = tailkd.total_variation(STUDENT, TEACHER)
    assert value.mean().item() == pytest.approx(0.30765107, abs=1e-8)


@pytest.mark.parametrize("top_k", SPLITS)
def test_split_parts(top_k: int) -> None:
    log_p, log_q = divergences.pair(STUDENT, TEACHER, 1.0)
    split = divergences.split_kl(log_p, log_q, divergences.top_k_mask(log_p, top_k))
    head, tail, mass, mean = SPLITS[top_k]
    for got, expected in ((split.head_kl, head), (split.tail_kl, tail), (split.log_tail_mass.exp(), mass)):
        assert_close(got, torch.tensor([expected]).double(), atol=1e-7, rtol=0)
    assert split.log_tail_mass.exp().mean().item() == pytest.approx(mean, abs=1e-7)


@pytest.mark.parametrize(
    ("temperature", "target", "others"),
    [
        (1.0, [0.01516739, 0.09099600], [0.32575607, 0.25617991]),
        (4.0, [0.00589215, 0.06376892], [0.57036090, 0.24861759]),
    ],
)
def test_decoupled_parts(temperature: float, target: list[float], others: list[float]) -> None:
    for alpha, beta, expected in ((1.0, 0.0, target), (0.0, 1.0, others)):
        value = tailkd.decoupled_kd(STUDENT, TEACHER, LABELS, dkd_alpha=alpha, dkd_beta=beta, temperature=temperature)
        assert_close(value, torch.tensor([expected]).double(), atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    ("alpha", "beta", "temperature", "expected"),
    [(1, 8, 1, 2.38082561), (1, 8, 4, 3.31074451), (1, 1, 1, 0.34404968)],
)
def test_decoupled_as_its_authors_reduce(alpha: float, beta: float, temperature: float, expected: float) -> None:
    value = tailkd.decoupled_kd(STUDENT, TEACHER, LABELS, dkd_alpha=alpha, dkd_beta=beta, temperature=temperature)
    assert value.mean().item() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    ("top_k", "beta", "expected"),
    [
        (1, 1.0, 3.32987374),
        (1, 2.0, 3.73710631),
        (2, 1.0, 3.46955792),
        (2, 2.0, 3.92691227),
    ],
)
def test_whole_loss(top_k: int, beta: float, expected: float) -> None:
    eye = torch.eye(5, dtype=torch.float64)
    objective = tailkd.Objective(top_k=top_k, beta=beta)
    loss = tailkd.distillation_loss(
        tailkd.Head(STUDENT, eye), tailkd.Head(TEACHER, eye), LABELS, objective=objective, impl="reference"
    )
    assert loss.sum.item() == pytest.approx(expected, abs=1e-7)
    assert loss.count == 2
    assert loss.parts["clm"].sum.item() == pytest.approx(sum(CLM), abs=1e-7)


def test_gradients() -> None:
    student = STUDENT.clone().requires_grad_()
    tailkd.tail_aware_divergence(student, TEACHER, top_k=2, beta=2.0).sum().backward()
    expected = [
        [-0.32366825, 0.07861874, -0.06239977, -0.02295559, 0.33040487],
        [-0.67322482, 1.19170345, -0.19375841, -0.24766557, -0.07705466],
    ]
    assert_close(student.grad, torch.tensor([expected]).double(), atol=1e-7, rtol=0)

    student = STUDENT.clone().requires_grad_()
    eye = torch.eye(5, dtype=torch.float64)
    objective = tailkd.Objective(divergence="none")
    tailkd.distillation_loss(tailkd.Head(student, eye), None, LABELS, objective=objective).sum.backward()
    expected = [
        [0.31274039, -0.68725961, 0.18968664, 0.06978181, 0.11505076],
        [0.14247231, 0.38727988, -0.76510288, 0.05241263, 0.18293806],
    ]
    assert_close(student.grad, torch.tensor([expected]).double(), atol=1e-7, rtol=0)
