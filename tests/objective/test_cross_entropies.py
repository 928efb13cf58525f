"""Cross-entropies alone, without dense logits: those of the dense logits, for every kind of head."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tailkd.objective import Dense, Head, chunked
from tailkd.objective.layout import layout_of

ROWS, VOCABULARY, WIDTH = (3, 7), 31, 8


def head(seed: int = 0, *, bias: bool = False, **options: float) -> Head:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    hidden, weight = normal(*ROWS, WIDTH), normal(VOCABULARY, WIDTH)
    return Head(hidden.requires_grad_(), weight, normal(VOCABULARY) if bias else None, **options)


HEADS = {
    "plain": head(),
    "bias, scale and soft-cap": head(bias=True, scale=0.5, softcap=3.0),
    "mixture": Dense((head(1), head(2)), weights=(0.25, 0.75)),
    "folded": Dense((head(3),), usable=25, fold={30: 4}),
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("budget", [1, 1 << 12, 1 << 30])
def test_those_of_the_dense_logits(name: str, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunked.SCORED_BYTES, "cpu", budget)
    labels = torch.randint(25, ROWS, generator=torch.Generator().manual_seed(4))
    labels[0, 3:], labels[2] = -100, -100
    found = chunked.cross_entropies(HEADS[name], labels, layout_of(labels))
    expected = F.cross_entropy(HEADS[name].logits()[labels != -100], labels[labels != -100], reduction="none")
    assert not found.requires_grad
    torch.testing.assert_close(found, expected.detach(), atol=1e-12, rtol=1e-12)


def test_bfloat16_is_widened_before_the_sum() -> None:
    labels = torch.randint(VOCABULARY, ROWS, generator=torch.Generator().manual_seed(4))
    half = head().to(torch.bfloat16)
    found = chunked.cross_entropies(half, labels, layout_of(labels))
    products = half.hidden.flatten(0, 1) @ half.weight.T
    expected = F.cross_entropy(products.float(), labels.flatten(), reduction="none")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.detach())
