"""Rho-1 in the step: a dense computation by hand, whatever the micro-batch."""

from __future__ import annotations

from dataclasses import replace

import builders
import pytest
import torch
import torch.nn.functional as F
from stepping import VOCABULARY, eight_rows

from tailkd.data.batches import Batch
from tailkd.data.select import share_of
from tailkd.models.head import SplitModel
from tailkd.objective import Objective
from tailkd.objective.hidden import Hidden
from tailkd.teacher.live import LiveTeacher
from tailkd.train.step import Step, accumulate_gradients

RATIO = 0.6


@pytest.fixture(scope="module")
def batch() -> Batch:
    plain = eight_rows()
    noise = torch.rand(plain.labels.shape, generator=torch.Generator().manual_seed(3))
    return replace(plain, reference=4.5 + noise, learned=RATIO)


def models() -> tuple[SplitModel, LiveTeacher]:
    """Of one width."""
    made = [builders.build_model(VOCABULARY, seed=seed).double() for seed in (2, 1)]
    return SplitModel(made[0]), LiveTeacher(made[1], usable=VOCABULARY)


def by_hand(batch: Batch, divergence: str, hidden: bool) -> tuple[float, list[torch.Tensor]]:
    """Mean loss over the selected tokens, and its gradient."""
    student, teacher = models()
    ours, theirs = (
        split.plain(input_ids=batch.input_ids, output_hidden_states=True) for split in (student, teacher.split)
    )
    losses = F.cross_entropy(ours.logits.transpose(1, 2), batch.labels, reduction="none")
    total = losses
    if divergence == "forward_kl":
        log_p, log_q = theirs.logits.log_softmax(-1), ours.logits.log_softmax(-1)
        total = total + (log_p.exp() * (log_p - log_q)).sum(-1)
    if hidden:
        total = total + 1 - F.cosine_similarity(ours.hidden_states[-1], theirs.hidden_states[-1], dim=-1)
    assert batch.reference is not None
    chosen = []
    for row in range(len(batch)):
        valid = (batch.labels[row] != -100).nonzero().squeeze(-1)
        excess = losses[row, valid].detach() - batch.reference[row, valid]
        chosen.append(total[row, valid[excess.topk(share_of(len(valid), RATIO)).indices]])
    loss = torch.cat(chosen).sum() / len(torch.cat(chosen))
    loss.backward()
    assert len(torch.cat(chosen)) == batch.learned_count < batch.count
    return float(loss.detach()), [p.grad for p in student.model.parameters()]


@pytest.mark.parametrize(("divergence", "hidden"), [("none", False), ("forward_kl", False), ("forward_kl", True)])
def test_it_is_the_mean_over_the_tokens_with_the_largest_excess(batch: Batch, divergence: str, hidden: bool) -> None:
    loss, expected = by_hand(batch, divergence, hidden)
    for size in (1, 3, 8):
        student, teacher = models()
        parts = accumulate_gradients(
            student,
            teacher,
            batch,
            objective=Objective(divergence=divergence),
            micro_batch_size=size,
            hidden=Hidden() if hidden else None,
        )
        assert float(parts["loss"].mean()) == pytest.approx(loss, rel=1e-12)
        for parameter, gradient in zip(student.model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, atol=1e-12, rtol=1e-10)


def test_a_step_counts_what_it_read_and_divides_by_what_it_learned(batch: Batch) -> None:
    student, _ = models()
    optimizer = torch.optim.SGD(student.model.parameters(), lr=0.0)
    result = Step(student, None, Objective(divergence="none"), optimizer, micro_batch_size=4, clip_norm=1.0)(batch)
    loss, gradients = by_hand(batch, "none", hidden=False)
    assert result.tokens == batch.count
    assert float(result.parts["loss"].mean()) == pytest.approx(loss, rel=1e-12)
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    assert result.gradient_norm == pytest.approx(float(norm), rel=1e-6)
