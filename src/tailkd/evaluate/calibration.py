"""Do probabilities mean what they say? Full-ECE over the whole vocabulary and ECE of the top token, streamed."""

from __future__ import annotations

import torch
from torch import Tensor


def full_ece(probabilities: Tensor, labels: Tensor, *, bins: int = 10) -> float:
    """Full-ECE of predictions (n, vocabulary) against labels (n,), a fraction between 0 and 2.

    Equals, over all n * vocabulary entries in right-closed bins ``(m / bins, (m + 1) / bins]``::

        index = (probabilities * bins).ceil().sub(1).clamp(0, bins - 1)
        hit = one_hot(labels, vocabulary)
        sum(abs((hit - probabilities)[index == m].sum()) for m in range(bins)) / n

    The paper prints it times 100. Source: arXiv 2406.11345; bins default to 10, which the paper leaves open.
    """
    stream = FullEce(bins)
    stream.update(probabilities, labels)
    return stream.value()


class FullEce:
    """Exact streaming Full-ECE: a distribution has fewer than `bins` entries above 1 / bins, the rest is bin 0."""

    def __init__(self, bins: int = 10) -> None:
        if bins < 1:
            raise ValueError(f"bins is {bins}; expected at least 1")
        self.confidence = torch.zeros(bins, dtype=torch.float64)
        self.hits = torch.zeros(bins, dtype=torch.float64)
        self.count = 0

    def update(self, probabilities: Tensor, labels: Tensor) -> None:
        bins = len(self.hits)
        top = probabilities.topk(min(bins, probabilities.shape[-1]), dim=-1).values.double()
        index = _bin(top, bins)
        outside = torch.where(index > 0, top, torch.zeros_like(top))
        confidence = torch.zeros(bins, dtype=torch.float64, device=top.device)
        confidence.index_add_(0, index.flatten(), outside.flatten())
        confidence[0] = probabilities.sum(dtype=torch.float64) - outside.sum()
        gold = probabilities.gather(-1, labels.unsqueeze(-1)).squeeze(-1).double()
        self.confidence += confidence.cpu()
        self.hits += torch.bincount(_bin(gold, bins), minlength=bins).double().cpu()
        self.count += len(labels)

    def __add__(self, other: FullEce) -> FullEce:
        """Of both streams' predictions."""
        total = FullEce(len(self.hits))
        total.confidence, total.hits = self.confidence + other.confidence, self.hits + other.hits
        total.count = self.count + other.count
        return total

    def value(self) -> float:
        return float((self.hits - self.confidence).abs().sum()) / max(self.count, 1)


class Ece:
    """Expected calibration error of the most probable token: ``sum |bin| / n * |accuracy - confidence|``, 15 bins."""

    def __init__(self, bins: int = 15) -> None:
        self.sums = torch.zeros(3, bins, dtype=torch.float64)  # count, confidence, hits

    def update(self, probabilities: Tensor, labels: Tensor) -> None:
        confidence, answer = probabilities.max(-1)
        confidence, bins = confidence.double(), self.sums.shape[1]
        columns = torch.stack([torch.ones_like(confidence), confidence, (answer == labels).double()])
        sums = torch.zeros(3, bins, dtype=torch.float64, device=confidence.device)
        self.sums += sums.index_add_(1, _bin(confidence, bins), columns).cpu()

    def __add__(self, other: Ece) -> Ece:
        """Of both streams' predictions."""
        total = Ece(self.sums.shape[1])
        total.sums = self.sums + other.sums
        return total

    def value(self) -> float:
        count, confidence, hits = self.sums
        return float((hits - confidence).abs().sum() / count.sum().clamp_min(1))

    def reliability(self) -> list[list[float]]:
        """``[mean confidence, accuracy, count]`` of every bin that holds something."""
        return [[c / n, h / n, n] for n, c, h in self.sums.T.tolist() if n]


def _bin(probabilities: Tensor, bins: int) -> Tensor:
    return (probabilities * bins).ceil().long().sub(1).clamp(0, bins - 1)
