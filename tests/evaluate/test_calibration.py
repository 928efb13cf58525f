from __future__ import annotations

import math

import builders
import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

import tailkd
from tailkd.evaluate import calibration
from tailkd.evaluate.calibration import Calibration, Ece, FullEce, LogEce

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


def brute_force_ece(probabilities: Tensor, labels: Tensor, bins: int) -> float:
    gaps = [0.0] * bins
    for row, label in zip(probabilities.tolist(), labels.tolist(), strict=True):
        p = max(row)
        gaps[next(m for m in range(bins) if p * bins <= m + 1)] += (row.index(p) == label) - p
    return sum(map(abs, gaps)) / len(labels)


def brute_force_by_size(probabilities: Tensor, labels: Tensor) -> dict[int, list[float]]:
    """Bin -> count, confidence, hits; -1 is [1/8, 1/2), 0 what lies above, -14 all below the fourteenth."""
    sums: dict[int, list[float]] = {}
    exact, floats = probabilities.tolist(), probabilities.float().tolist()
    for row, sizes, label in zip(exact, floats, labels.tolist(), strict=True):
        for token, (p, size) in enumerate(zip(row, sizes, strict=True)):
            octave = math.frexp(size)[1] - 1 if size else -999  # size is in [2 ** octave, 2 ** (octave + 1))
            one = sums.setdefault(max((octave + 1) // 2, -14), [0.0, 0.0, 0.0])
            for place, value in enumerate((1.0, p, float(token == label))):
                one[place] += value
    return sums


def drawn(number: int) -> tuple[Tensor, Tensor, int]:
    """Distributions, labels and bins: soft and peaked ones, ties on borders of bins, one-hot rows; both precisions."""
    generator = torch.Generator().manual_seed(number)

    def whole(high: int) -> int:
        return int(torch.randint(1, high + 1, (), generator=generator))

    count, vocabulary, bins = whole(9), whole(30), (1, 2, 3, 8, 10, 15, 20, 100)[number % 8]
    kind = number // 8 % 4
    if kind < 2:
        logits = (0.3, 12.0)[kind] * torch.randn(count, vocabulary, generator=generator, dtype=torch.float64)
        p = logits.softmax(-1)
    else:  # `pieces` shares of 1 / pieces each, thrown on the ids; one is a row of a 1 and zeros
        pieces = 1 if kind == 3 else (bins, 2 * bins, 64)[whole(3) - 1]
        places = torch.randint(vocabulary, (count, pieces), generator=generator)
        p = torch.nn.functional.one_hot(places, vocabulary).sum(1).double() / pieces
    labels = torch.multinomial(p if whole(2) == 1 else p + 1e-3, 1, generator=generator).squeeze(1)
    return p.float() if number % 3 == 0 else p, labels, bins


def test_a_thousand_draws_equal_brute_force() -> None:
    for number in range(1000):
        p, labels, bins = drawn(number)
        assert tailkd.full_ece(p, labels, bins=bins) == pytest.approx(brute_force(p, labels, bins), abs=1e-9), number
        top, log = Ece(bins), LogEce()
        top.update(p, labels)
        assert top.value() == pytest.approx(brute_force_ece(p, labels, bins), abs=1e-9), number
        mass = log.update(p, labels)
        assert mass == pytest.approx(float(p.double().sum()), abs=1e-9)
        by_size = brute_force_by_size(p, labels)
        assert log.value() == pytest.approx(sum(abs(h - c) for _, c, h in by_size.values()) / len(labels), abs=1e-9)
        expected = [[c / n, h / n, c, h] for _, (n, c, h) in sorted(by_size.items())]
        for one, other in zip(log.reliability(), expected, strict=True):
            assert one == pytest.approx(other, abs=1e-9)


@pytest.mark.parametrize("bins", [4, 5, 10, 20])
def test_a_larger_case_in_parts_and_together(bins: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two streams add up; blocks of rows and the known first ids change nothing."""
    monkeypatch.setitem(calibration.BLOCK, "cpu", 2000)
    monkeypatch.setattr(Calibration, "RANKED", bins)
    generator = torch.Generator().manual_seed(bins)
    p = (3 * torch.randn(200, 300, generator=generator)).softmax(-1)
    labels = torch.multinomial(p, 1, generator=generator).squeeze(1)
    ranked = p.topk(bins).indices
    one, other = Calibration(), Calibration()
    one.update(p[:77], labels[:77], ranked[:77])
    other.update(p[77:], labels[77:], ranked[77:])
    by_size = brute_force_by_size(p, labels)
    assert len(by_size) > 6
    assert (one + other).measures() == pytest.approx(
        {
            "full_ece": brute_force(p, labels, bins),
            "ece": brute_force_ece(p, labels, 15),
            "log_ece": sum(abs(h - c) for _, c, h in by_size.values()) / 200,
        },
        abs=1e-9,
    )


def test_the_tail_shows_in_bins_by_size_alone() -> None:
    """A tail of the right mass and the wrong shape: Full-ECE's bin 0 finds nothing, bins by size do."""
    tail = 0.5 ** torch.arange(1, 41, dtype=torch.float64)
    steep = torch.cat([torch.tensor([0.6]).double(), 0.4 * tail / tail.sum()])
    flat = torch.cat([torch.tensor([0.6]).double(), torch.full((40,), 0.01).double()])
    labels = torch.multinomial(flat, 20_000, replacement=True, generator=torch.Generator().manual_seed(0))
    found = {}
    for name, p in (("steep", steep), ("flat", flat)):
        log = LogEce()
        log.update(p.expand(20_000, -1), labels)
        found[name] = tailkd.full_ece(p.expand(20_000, -1), labels, bins=2), log.value()
    assert max(*found["flat"], found["steep"][0]) < 0.02
    assert found["steep"][1] > 0.5


PEAK = """
import sys, torch
from tailkd.evaluate.calibration import Calibration, FullEce

torch.set_num_threads(1)
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

rows, vocabulary = int(sys.argv[1]), 50_000
p, labels = torch.full((rows, vocabulary), 1 / vocabulary), torch.arange(rows)
streams = Calibration(), FullEce()
def update(part):
    streams[0].update(p[:part], labels[:part], p[:part].topk(10).indices)
    streams[1].update(p[:part], labels[:part])
update(8)
open("/proc/self/clear_refs", "w").write("5")  # forgets the peak of the imports
before = peak()
update(rows)
state = [streams[0].full.confidence, streams[0].full.hits, streams[0].top.sums, streams[0].log.sums]
print(peak() - before, sum(one.nbytes for one in state))
"""


def test_memory_is_that_of_a_block_and_a_state() -> None:
    """Neither of the vocabulary times the tokens: 64 MB of probabilities are read with a few MB beside them."""
    grown, state = map(int, builders.fresh_python(PEAK, "320").stdout.split())
    assert grown < 12e6
    assert state < 30_000


def test_bins_and_distributions_are_checked() -> None:
    for stream in (FullEce, Ece):
        with pytest.raises(ValueError, match="bins is 0; expected at least 1"):
            stream(0)
    with pytest.raises(ValueError, match=r"are \(3, 4\) and \(2,\); expected \(n, vocabulary\) and \(n,\)"):
        tailkd.full_ece(P, Y[:2])
    for wrong in (P.log(), 2 * P, P * torch.nan):
        with pytest.raises(ValueError, match="do not sum to 1; expected a softmax of its logits"):
            tailkd.full_ece(wrong, Y)


def test_what_is_no_number_stops_nothing() -> None:
    """A student that has diverged is still measured for its report."""
    for value in (torch.nan, -torch.nan, torch.inf):
        Calibration().update(torch.full((2, 30), value), torch.tensor([0, 1]), torch.arange(10).expand(2, -1))
