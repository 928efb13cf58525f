"""The step: micro-batches do not change it, weight decay spares norms, precision is one policy."""

from __future__ import annotations

from collections.abc import Callable

import builders
import pytest
import torch
from stepping import VOCABULARY, eight_rows, pair
from torch.testing import assert_close

from tailkd.data.batches import Batch
from tailkd.models.head import SplitModel
from tailkd.objective import Objective, distillation_loss
from tailkd.teacher.live import LiveTeacher
from tailkd.train.optim import Schedule, build_optimizer
from tailkd.train.step import Step, accumulate_gradients


@pytest.fixture(scope="module")
def batch() -> Batch:
    return eight_rows()


@pytest.mark.parametrize("divergence", ["tail_aware", "forward_kl", "none", "decoupled_kd"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_the_micro_batch_changes_nothing(batch: Batch, divergence: str, dtype: torch.dtype, tolerance: float) -> None:
    student, teacher = pair(dtype)
    gradients, losses, seen = [], [], []
    for size in (1, 2, 4, 8):
        order: list[int] = []
        student.model.zero_grad()
        parts = accumulate_gradients(
            student, spy(teacher, order), batch, objective=Objective(divergence=divergence), micro_batch_size=size
        )
        gradients.append([p.grad.clone() for p in student.model.parameters()])
        losses.append(parts["loss"].mean())
        seen.append(order)
    for other in gradients[:-1]:
        for ours, theirs in zip(other, gradients[-1], strict=True):
            assert (ours - theirs).abs().max() <= tolerance * max(1.0, float(theirs.abs().max()))
    assert losses == pytest.approx([losses[-1]] * 4, rel=tolerance)
    assert all(order == seen[0] for order in seen)


def spy(teacher: LiveTeacher, order: list[int]) -> Callable[[Batch], object]:
    def call(micro: Batch) -> object:
        order.extend(micro.samples)
        return teacher(micro)

    return call


def test_the_step_is_the_mean_loss_of_the_batch(batch: Batch) -> None:
    student, teacher = pair(torch.float64)
    objective = Objective(top_k=4)
    accumulate_gradients(student, teacher, batch, objective=objective, micro_batch_size=3)
    ours = [p.grad.clone() for p in student.model.parameters()]
    student.model.zero_grad()
    loss = distillation_loss(student(batch.input_ids), teacher(batch), batch.labels, objective=objective)
    (loss.sum / int((batch.labels != -100).sum())).backward()
    for one, other in zip(ours, student.model.parameters(), strict=True):
        assert_close(one, other.grad, atol=1e-12, rtol=1e-10)


def test_the_teacher_is_never_trained(batch: Batch) -> None:
    student, teacher = pair(torch.float32)
    student.model.train()
    train(student, teacher, batch)
    assert not teacher.split.model.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.split.model.parameters())


def train(
    student: SplitModel, teacher: LiveTeacher, batch: Batch, *, steps: int = 1, weight_decay: float = 0.1
) -> list[float]:
    optimizer = build_optimizer(student.model, learning_rate=1e-2, betas=(0.9, 0.95), weight_decay=weight_decay)
    step = Step(student, teacher, Objective(), optimizer, micro_batch_size=8, clip_norm=1.0)
    results = [step(batch) for _ in range(steps)]
    return [r.parts["loss"].mean() for r in results]


def test_training_lowers_the_loss(batch: Batch) -> None:
    losses = train(*pair(torch.float32), batch, steps=12)
    assert losses[-1] < 0.7 * losses[0]


def test_weight_decay_spares_norms_and_biases() -> None:
    model = builders.build_model(VOCABULARY, attention_bias=True)
    optimizer = build_optimizer(model, learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == (parameter.dim() == 2), name
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_gradients_are_clipped(batch: Batch) -> None:
    student, teacher = pair(torch.float32)
    optimizer = torch.optim.SGD(student.model.parameters(), lr=1.0)
    before = [p.detach().clone() for p in student.model.parameters()]
    result = Step(student, teacher, Objective(), optimizer, micro_batch_size=8, clip_norm=0.01)(batch)
    moved = torch.stack([(p - b).square().sum() for p, b in zip(student.model.parameters(), before, strict=True)])
    assert result.gradient_norm > 0.01
    assert moved.sum().sqrt().item() == pytest.approx(0.01, rel=1e-3)


def test_bfloat16_products_stay_near_float32(batch: Batch) -> None:
    losses, gradients = [], []
    for dtype in (torch.float32, torch.bfloat16):
        student = SplitModel(builders.build_model(VOCABULARY, seed=2), compute_dtype=dtype)
        teacher = LiveTeacher(
            builders.build_model(VOCABULARY, hidden=48, seed=1), usable=VOCABULARY, compute_dtype=dtype
        )
        parts = accumulate_gradients(student, teacher, batch, objective=Objective(), micro_batch_size=8)
        losses.append(parts["loss"].mean())
        gradients.append(torch.cat([p.grad.flatten() for p in student.model.parameters()]))
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in student.model.parameters())
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.99


def test_schedule() -> None:
    schedule = Schedule(2.0, 100, warmup_fraction=0.05, final_fraction=0.1)
    assert [schedule(s) for s in (0, 1, 4)] == pytest.approx([0.4, 0.8, 2.0])
    assert schedule(5) == pytest.approx(2.0)
    assert schedule(99) == pytest.approx(0.2)
    rates = [schedule(s) for s in range(5, 100)]
    assert rates == sorted(rates, reverse=True)
    assert Schedule(1.0, 1)(0) == 1.0
    assert Schedule(1.0, 10, warmup_fraction=0.0, final_fraction=1.0)(9) == 1.0
