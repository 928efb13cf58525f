from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

import tailkd
from tailkd.evaluate.calibration import Ece, FullEce

P = torch.tensor([[0.55, 0.25, 0.15, 0.05], [0.05, 0.85, 0.07, 0.03], [0.30, 0.30, 0.22, 0.18]], dtype=torch.float64)
Y = torch.tensor([0, 1, 2])


def brute_force(probabilities: Tensor, labels: Tensor, bins: int) -> float:
    gaps = [0.0] * bins
    for row, label in zip(probabilities.tolist(), labels.tolist(), strict=True):
        for token, p in enumerate(row):
            number = next(m for m in range(bins) if p * bins <= m + 1)
            gaps[number] += (token == label) - p
    return sum(map(abs, gaps)) / len(labels)


def test_vector() -> None:
    stream = FullEce(4)
    stream.update(P, Y)
    assert stream.confidence.tolist() == pytest.approx([1, 0.6, 0.55, 0.85])
    assert stream.hits.tolist() == [1, 0, 1, 1]
    assert tailkd.full_ece(P, Y, bins=4) == pytest.approx(0.4)
    top = Ece(4)
    top.update(P, Y)
    assert top.value() == pytest.approx(0.3)


@given(
    st.integers(1, 30), st.integers(1, 60), st.integers(1, 20), st.sampled_from([0.1, 1.0, 8.0]), st.integers(0, 999)
)
def test_equals_brute_force_in_any_chunks(count: int, vocabulary: int, bins: int, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    p = (scale * torch.randn(count, vocabulary, generator=generator, dtype=torch.float64)).softmax(-1)
    y = torch.randint(vocabulary, (count,), generator=generator)
    expected = brute_force(p, y, bins)
    assert tailkd.full_ece(p, y, bins=bins) == pytest.approx(expected, abs=1e-9)
    stream = FullEce(bins)
    for part in range(0, count, 7):
        stream.update(p[part : part + 7], y[part : part + 7])
    assert stream.value() == pytest.approx(expected, abs=1e-9)


def test_bins_are_checked() -> None:
    with pytest.raises(ValueError, match="bins is 0; expected at least 1"):
        tailkd.full_ece(P, Y, bins=0)
