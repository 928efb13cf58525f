"""Held-out measures against slow loops over positions."""

from __future__ import annotations

import builders
import numpy as np
import pytest
import torch
from builders import numbered_store

import tailkd
from tailkd.data.batches import evaluation_batches
from tailkd.data.packing import Rows
from tailkd.evaluate import heldout
from tailkd.evaluate.calibration import Ece, LogEce
from tailkd.models.head import SplitModel
from tailkd.teacher.live import LiveTeacher

USABLE = 117


@pytest.fixture(scope="module")
def rows() -> Rows:
    return Rows(numbered_store([20, 13, 31, 9, 31]), np.arange(5), context=14, begin=0, end=1)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def pair() -> tuple[SplitModel, LiveTeacher]:
    student, teacher = (builders.build_model(120, hidden=h, seed=s) for h, s in ((32, 2), (48, 1)))
    for model in (student, teacher):
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return SplitModel(student, usable=USABLE), LiveTeacher(teacher, usable=USABLE)


def batches(rows: Rows, size: int):
    return evaluation_batches(rows, tokens=None, batch_size=size)


def test_measures_are_means_over_tokens(
    rows: Rows, pair: tuple[SplitModel, LiveTeacher], monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = pair
    lists: dict[str, list[float]] = {}
    probabilities, labels = [], []
    with torch.no_grad():
        for row in (rows[i] for i in range(len(rows))):
            ids = torch.from_numpy(row.input_ids).unsqueeze(0)
            q = student.model(ids).logits[0, :, :USABLE].double().softmax(-1)
            p = teacher.split.model(ids).logits[0, :, :USABLE].double().softmax(-1)
            for t in np.flatnonzero(row.labels != -100):
                label = int(row.labels[t])
                probabilities.append(q[t])
                labels.append(label)
                order = p[t].argsort(descending=True)
                head, tail = order[:3], order[3:]
                a, b = p[t, tail].sum(), q[t, tail].sum()
                found = {
                    "cross_entropy": -q[t, label].log(),
                    "entropy": -(q[t] * q[t].log()).sum(),
                    "kl": (p[t] * (p[t] / q[t]).log()).sum(),
                    "head_kl": (p[t, head] * (p[t, head] / q[t, head]).log()).sum() + a * (a / b).log(),
                    "tail_kl": (p[t, tail] * (p[t, tail] / a / (q[t, tail] / b)).log()).sum(),
                    "top1_accuracy": q[t].argmax() == label,
                    "top1_agreement": q[t].argmax() == p[t].argmax(),
                    "mismatch_rate": p[t].argmax() != label,
                    "acceptance": 1 - 0.5 * (p[t] - q[t]).abs().sum(),
                    **{f"tail_mass {k}": q[t, order[k:]].sum() for k in (1, 5, 10, 20)},
                }
                for name, value in found.items():
                    lists.setdefault(name, []).append(float(value))
    expected = {name: sum(values) / len(values) for name, values in lists.items()}
    for size, chunk in ((8, 1 << 20), (3, 4 * USABLE * 5)):
        monkeypatch.setattr(heldout, "BLOCK_BYTES", chunk)
        found = heldout.evaluate(student, teacher, batches(rows, size), top_k=3)
        measures = dict(found.measures)
        assert sorted(found.rows["tokens"]) == [6.0] + [14.0] * 7
        assert sum(found.rows["kl"]) / 104 == pytest.approx(measures["kl"])
        assert sum(count for _, _, count in found.reliability) == 104
        tail_mass = measures.pop("tail_mass")
        assert measures.pop("tokens") == 104
        assert measures.pop("full_ece") == pytest.approx(
            tailkd.full_ece(torch.stack(probabilities), torch.tensor(labels)), abs=1e-5
        )
        top, log = Ece(), LogEce()
        top.update(torch.stack(probabilities), torch.tensor(labels))
        log.update(torch.stack(probabilities), torch.tensor(labels))
        assert measures.pop("ece") == pytest.approx(top.value(), abs=1e-5)
        assert measures.pop("log_ece") == pytest.approx(log.value(), abs=1e-5)
        for one, other in zip(found.log_reliability, log.reliability(), strict=True):
            assert one == pytest.approx(other, rel=1e-4)
        assert {**measures, **{f"tail_mass {k}": v for k, v in tail_mass.items()}} == pytest.approx(
            expected, rel=1e-4, abs=1e-6
        )


def test_the_teacher_against_itself(rows: Rows, pair: tuple[SplitModel, LiveTeacher]) -> None:
    teacher = pair[1]
    measures = heldout.evaluate(teacher.split, teacher, batches(rows, 8), top_k=3).measures
    assert measures["kl"] == pytest.approx(0, abs=1e-6)
    assert measures["acceptance"] == pytest.approx(1, abs=1e-5)
    assert measures["top1_agreement"] == 1


def test_without_a_teacher(rows: Rows, pair: tuple[SplitModel, LiveTeacher]) -> None:
    student, teacher = pair
    alone = heldout.evaluate(student, None, batches(rows, 8), top_k=3).measures
    beside = heldout.evaluate(student, teacher, batches(rows, 8), top_k=3).measures
    assert alone["kl"] is alone["acceptance"] is None
    assert alone["cross_entropy"] == pytest.approx(beside["cross_entropy"], rel=1e-8)
    assert set(alone) == set(beside)


def test_files_of_older_runs_open() -> None:
    assert heldout.HeldOut(**{"measures": {}, "rows": {}, "reliability": []}).log_reliability == []


def test_tail_sizes_are_asked_for(rows: Rows, pair: tuple[SplitModel, LiveTeacher]) -> None:
    """As many as there are ids, and more, leave no tail; those by default are what they were."""
    student, teacher = pair
    plain = heldout.evaluate(student, teacher, batches(rows, 8), top_k=3).measures["tail_mass"]
    asked = heldout.evaluate(student, teacher, batches(rows, 8), top_k=3, tail_sizes=(2, 10, USABLE, 1000))
    masses = asked.measures["tail_mass"]
    assert list(masses) == ["2", "10", str(USABLE), "1000"]
    assert masses["10"] == pytest.approx(plain["10"])
    assert plain["1"] > masses["2"] > plain["5"]
    assert masses[str(USABLE)] == masses["1000"] == 0


def test_training_mode_is_given_back(rows: Rows, pair: tuple[SplitModel, LiveTeacher]) -> None:
    student = pair[0]
    student.model.train()
    heldout.evaluate(student, None, batches(rows, 8), top_k=3)
    assert student.model.training
    student.model.eval()
