"""Do probabilities mean what they say? Full-ECE of the whole vocabulary, ECE of the top token, and bins in which the
tail shows; all exact and streamed: what is kept of any number of tokens is a few arrays of fixed size."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = {"cpu": 1 << 18, "cuda": 1 << 24}  # probabilities taken at a time: what is made of them stays this small


def full_ece(probabilities: Tensor, labels: Tensor, *, bins: int = 10) -> float:
    """Full-ECE of predictions (n, vocabulary) against labels (n,), a fraction between 0 and 2.

    Equals, over all n * vocabulary entries in right-closed bins ``(m / bins, (m + 1) / bins]``::

        index = (probabilities.double() * bins).ceil().sub(1).clamp(0, bins - 1)
        hit = one_hot(labels, vocabulary)
        sum(abs((hit - probabilities.double())[index == m].sum()) for m in range(bins)) / n

    The paper prints it times 100. Source: arXiv 2406.11345; bins default to 10, which the paper leaves open.

    Raises:
        ValueError: no bins, other shapes, rows that are no distributions (such as logits).
    """
    stream = FullEce(bins)
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1]:
        came = f"{tuple(probabilities.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"probabilities and labels are {came}; expected (n, vocabulary) and (n,)")
    sums = torch.cat([block.sum(1, dtype=torch.float64) for block in _blocks(probabilities)])
    if not (sums - 1).abs().le(0.02).all() or (probabilities < 0).any():
        raise ValueError("the probabilities of some position do not sum to 1; expected a softmax of its logits")
    stream.update(probabilities, labels)
    return stream.value()


class FullEce:
    """Exact streaming Full-ECE: a distribution has at most `bins` entries above 1 / bins, the rest is bin 0."""

    def __init__(self, bins: int = 10) -> None:
        if bins < 1:
            raise ValueError(f"bins is {bins}; expected at least 1")
        self.confidence = torch.zeros(bins, dtype=torch.float64)
        self.hits = torch.zeros(bins, dtype=torch.float64)
        self.count = 0

    def update(self, probabilities: Tensor, labels: Tensor) -> None:
        """Of probabilities (n, vocabulary) whose rows sum to 1."""
        top = probabilities.topk(min(len(self.hits), probabilities.shape[1]), dim=1).values
        mass = sum(float(block.sum(dtype=torch.float64)) for block in _blocks(probabilities))
        self.add(top, probabilities.gather(1, labels.unsqueeze(1)), mass)

    def add(self, top: Tensor, gold: Tensor, mass: float) -> None:
        """Of the `bins` largest probabilities of each position (n, bins), its label's (n, 1), and the sum of all."""
        bins, top = len(self.hits), top.double()
        index = _bin(top, bins)
        outside = torch.where(index > 0, top, torch.zeros_like(top))
        confidence = torch.zeros(bins, dtype=torch.float64, device=top.device)
        confidence.index_add_(0, index.flatten(), outside.flatten())
        confidence[0] = mass - outside.sum()
        self.confidence += confidence.cpu()
        self.hits += torch.bincount(_bin(gold.double(), bins).flatten(), minlength=bins).double().cpu()
        self.count += len(gold)

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
        if bins < 1:
            raise ValueError(f"bins is {bins}; expected at least 1")
        self.sums = torch.zeros(3, bins, dtype=torch.float64)  # count, confidence, hits

    def update(self, probabilities: Tensor, labels: Tensor) -> None:
        confidence, answer = probabilities.max(1)
        self.add(confidence, answer == labels)

    def add(self, confidence: Tensor, right: Tensor) -> None:
        """Of the first choices (n,): their probabilities, and whether they are the labels."""
        confidence, bins = confidence.double(), self.sums.shape[1]
        columns = torch.stack([torch.ones_like(confidence), confidence, right.double()])
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


class LogEce:
    """Calibration of every probability by its size: Full-ECE's bin 0 holds the whole tail, and hides how it is shaped.

    Bins are powers of 4: ``[1/2, 1], [1/8, 1/2), [1/32, 1/8)`` and so on, `WIDE` of them, and all below in one. A
    float32 holds its power of 2 in its bits, so that a bin costs a shift and no search.
    """

    WIDE = 14  # the lowest is from 2^-27, 7.5e-9
    SLOTS = 1024  # what is counted: eight to a power of 2, since a processor waits where one slot grows without pause

    def __init__(self) -> None:
        self.sums = torch.zeros(3, self.SLOTS, dtype=torch.float64)  # count, confidence, hits
        self.count = 0

    def update(self, probabilities: Tensor, labels: Tensor) -> float:
        """Of probabilities (n, vocabulary), whose sum it returns; in bins of what they are as float32."""
        sums = torch.zeros(3, self.SLOTS, dtype=torch.float64, device=probabilities.device)
        for block in _blocks(probabilities):
            slots = _slots(block)
            sums[0] += torch.bincount(slots, minlength=self.SLOTS)
            sums[1] += torch.bincount(slots, block.double().flatten(), minlength=self.SLOTS)
        gold = probabilities.gather(1, labels.unsqueeze(1))
        sums[2] += torch.bincount(_slots(gold), minlength=self.SLOTS)
        sums = sums.cpu()
        self.sums += sums
        self.count += len(labels)
        return float(sums[1].sum())

    def __add__(self, other: LogEce) -> LogEce:
        """Of both streams' predictions."""
        total = LogEce()
        total.sums, total.count = self.sums + other.sums, self.count + other.count
        return total

    def _bins(self) -> Tensor:
        """(3, WIDE + 1), from the lowest up."""
        wide = self.sums.unflatten(1, (-1, 16)).sum(-1)
        return torch.cat([wide[:, : -self.WIDE].sum(1, keepdim=True), wide[:, -self.WIDE :]], 1)

    def value(self) -> float:
        """``sum |hits - confidence| / n`` over the bins, a fraction between 0 and 2."""
        _, confidence, hits = self._bins()
        return float((hits - confidence).abs().sum()) / max(self.count, 1)

    def reliability(self) -> list[list[float]]:
        """``[mean probability, frequency, mass, hits]`` of every bin that holds something, from the lowest up.

        mass: the sum of its probabilities, so what hits would be of a calibrated model. hits: how many of its ids came.
        frequency: hits over all its entries.
        """
        return [[c / n, h / n, c, h] for n, c, h in self._bins().T.tolist() if n]


class Calibration:
    """The three of them over the same predictions."""

    RANKED = 10  # of a position's first ids, that Full-ECE needs

    def __init__(self) -> None:
        self.full, self.top, self.log = FullEce(self.RANKED), Ece(), LogEce()

    def update(self, probabilities: Tensor, labels: Tensor, ranked: Tensor) -> None:
        """Of probabilities (n, vocabulary); `ranked` (n, RANKED) are the most probable ids, the first first."""
        top = probabilities.gather(1, ranked)
        self.full.add(top, probabilities.gather(1, labels.unsqueeze(1)), self.log.update(probabilities, labels))
        self.top.add(top[:, 0], ranked[:, 0] == labels)

    def __add__(self, other: Calibration) -> Calibration:
        """Of both streams' predictions."""
        total = Calibration()
        total.full, total.top, total.log = self.full + other.full, self.top + other.top, self.log + other.log
        return total

    def measures(self) -> dict[str, float]:
        return {"full_ece": self.full.value(), "ece": self.top.value(), "log_ece": self.log.value()}


def _bin(probabilities: Tensor, bins: int) -> Tensor:
    return (probabilities * bins).ceil().long().sub(1).clamp(0, bins - 1)


def _slots(probabilities: Tensor) -> Tensor:
    """Exponent and three bits of the fraction of each, flat; for 0 <= p < 2 as a float32, and any for what is none."""
    return probabilities.float().view(torch.int32).bitwise_right_shift(20).bitwise_and_(LogEce.SLOTS - 1).flatten()


def _blocks(probabilities: Tensor) -> Iterator[Tensor]:
    """The rows, a few at a time."""
    size = BLOCK.get(probabilities.device.type, BLOCK["cuda"])
    yield from probabilities.split(max(1, size // max(1, probabilities.shape[-1])))
