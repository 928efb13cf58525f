"""Student against teacher on held-out rows, as sums over tokens divided once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from itertools import islice, zip_longest
from operator import add
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from tailkd.data.batches import Batch
from tailkd.evaluate.calibration import Calibration
from tailkd.models.head import SplitModel
from tailkd.objective import Dense, Head, blocks, rows
from tailkd.objective.chunked import logits_in_blocks
from tailkd.objective.layout import with_sequences
from tailkd.teacher.live import Teacher

TAIL_SIZES = (1, 5, 10, 20)
BLOCK_BYTES = 16 << 20  # of one side's float32 logits
TINY = 1e-38  # so that 0 log 0 is 0

Signal = Callable[[Batch], Head | Dense]
T = TypeVar("T")


@dataclass(frozen=True)
class HeldOut:
    """measures: means over tokens. rows: sums per held-out row, for intervals. reliability: of the first choice.

    log_reliability: of every probability, by its size; see `LogEce.reliability`. Older files have none.
    """

    measures: dict[str, Any]
    rows: dict[str, list[float]]
    reliability: list[list[float]]
    log_reliability: list[list[float]] = field(default_factory=list)


class Ranks(Protocol):
    """The processes of a run, as `tailkd.train.ranks.Ranks` tells of them."""

    @property
    def rank(self) -> int: ...
    @property
    def world(self) -> int: ...
    def gathered(self, value: T) -> list[T]: ...


@torch.no_grad()
def evaluate(
    student: SplitModel | Teacher,
    teacher: Signal | None,
    batches: Iterable[Batch],
    *,
    top_k: int,
    ranks: Ranks | None = None,
    heed: Callable[[], None] = lambda: None,
    group: Callable[[int], str] | None = None,
    tail_sizes: tuple[int, ...] = TAIL_SIZES,
) -> HeldOut:
    """Measures of the student over every valid position of `batches`.

    Measures are nats per token (cross_entropy, entropy, kl = head_kl + tail_kl split at the teacher's `top_k` ids),
    fractions (full_ece, ece, log_ece, top1_accuracy, top1_agreement, mismatch_rate = teacher's first choice is not the
    next token, acceptance = 1 - total variation) and tail_mass, the student's mass outside the teacher's K first ids,
    for each K of `tail_sizes`. Without a teacher the measures that need one are None and tail_mass is outside the
    student's own. Give the teacher as both for its own measures. Formulas: docs/measures.md.

    Several `ranks` share the same batches out and all get the measures that one process gets. `heed` is called before
    each batch, on all ranks equally often, and may raise to stop.

    `group` names the source of a sample, the batches' samples being 0, 1, 2 ...: the same measures, but for those of
    calibration, are then given for the rows of each source too, as ``measures["sources"][name]``.
    """
    asked = _Asked(top_k, tail_sizes)
    own = _Sums(asked, [], Calibration())
    with _at_rest(student):
        for batch, counted in _shared_out(batches, ranks):
            heed()
            batch = batch.to(student.device)
            head = student(batch.input_ids, batch.position_ids) if isinstance(student, SplitModel) else student(batch)
            signal = head if teacher is student else None if teacher is None else teacher(batch)
            if counted:
                own.add(batch, head, signal)
    total = own if ranks is None else _Sums.of_all(ranks.gathered(own))
    table = torch.cat(total.tables)
    calibration, alone = total.calibration, teacher is None
    measures = asked.means(table.sum(0), calibration.measures(), alone=alone)
    if group is not None:
        measures["sources"] = _by_source(asked, table, group, alone=alone)
    per_row = {name: table[:, asked.names.index(name)].tolist() for name in ROW_MEASURES if measures[name] is not None}
    rows = {"tokens": table[:, -1].tolist(), **per_row}
    return HeldOut(measures, rows, calibration.top.reliability(), calibration.log.reliability())


@contextmanager
def _at_rest(student: SplitModel | Teacher) -> Iterator[None]:
    """A student in evaluation mode, in which a teacher always is; its shards are shards again afterwards."""
    model = student.model if isinstance(student, SplitModel) else None
    was_training = model is not None and model.training
    try:
        if model is not None:
            model.eval()
        yield
    finally:
        if model is not None:
            model.train(was_training)
        student.settle()


def _shared_out(batches: Iterable[Batch], ranks: Ranks | None) -> Iterator[tuple[Batch, bool]]:
    """Every world-th batch, and whether it counts.

    Where the last ones do not go round, a rank without one gets one that does not count: a model that is split among
    ranks needs all of them in each forward pass.
    """
    rank, world = (0, 1) if ranks is None else (ranks.rank, ranks.world)
    left = iter(batches)
    while turn := list(islice(left, world)):
        yield turn[min(rank, len(turn) - 1)], rank < len(turn)


ROW_MEASURES = ("cross_entropy", "kl")
_TEACHER_NAMES = ("kl", "head_kl", "tail_kl", "top1_agreement", "mismatch_rate", "acceptance")


@dataclass(frozen=True)
class _Asked:
    """What is measured at each position: KL split at `top_k` ids, mass outside each number of `tail_sizes` of them."""

    top_k: int
    tail_sizes: tuple[int, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return ("cross_entropy", "entropy", "top1_accuracy", *_TEACHER_NAMES, *map(_tail_name, self.tail_sizes))

    def means(self, sums: Tensor, calibration: dict[str, float] | None = None, *, alone: bool) -> dict[str, Any]:
        """Measures of sums over positions, the last of which counts them."""
        tokens = int(sums[-1])
        values: dict[str, float | None] = dict(zip(self.names, (sums[:-1] / max(tokens, 1)).tolist(), strict=True))
        tail_mass = {str(k): values.pop(_tail_name(k)) for k in self.tail_sizes}
        if alone:
            values |= dict.fromkeys(_TEACHER_NAMES)
        return {"tokens": tokens, **values, **(calibration or {}), "tail_mass": tail_mass}


def _tail_name(size: int) -> str:
    return f"tail_mass_{size}"


@dataclass
class _Sums:
    """What was measured on some batches: for each a table (rows, names + 1) of sums and the number of tokens."""

    asked: _Asked
    tables: list[Tensor]
    calibration: Calibration

    def add(self, batch: Batch, student: Head | Dense, teacher: Head | Dense | None) -> None:
        layout = with_sequences(batch.valid, batch.row_borders, batch.labels.shape[1], None)
        sums = torch.zeros(len(batch), len(self.asked.names) + 1, dtype=torch.float64)
        labels = batch.labels.flatten()[batch.valid.to(batch.labels.device)].unsqueeze(1)
        size = max(1, BLOCK_BYTES // (4 * student.vocabulary_size))
        other = None if teacher is None or teacher is student else teacher.to(torch.float32)
        heads = student.to(torch.float32), other
        for place, s, t in logits_in_blocks(*heads, layout, size):
            columns, ranked = _measured(s, t, labels[place], self.asked)
            sums.index_add_(0, batch.valid[place] // batch.labels.shape[1], columns.cpu())
            self.calibration.update(s, labels[place].squeeze(1), ranked)
        self.tables.append(sums)

    @staticmethod
    def of_all(shares: list[_Sums]) -> _Sums:
        """The ranks' shares as one, in the order in which one process meets the batches."""
        turns = zip_longest(*(share.tables for share in shares))
        tables = [table for turn in turns for table in turn if table is not None]
        return _Sums(shares[0].asked, tables, reduce(add, (share.calibration for share in shares)))


def _measured(s: Tensor, t: Tensor | None, labels: Tensor, asked: _Asked) -> tuple[Tensor, Tensor]:
    """Each position's measures in the order of the names, and a 1 to count it: float64 (positions, names + 1).

    And the student's most probable ids, as many as `Calibration` needs. From logits (positions, vocabulary) of student
    and teacher, which become their probabilities in place.
    """
    at_label, vocabulary, top_k = s.gather(1, labels), s.shape[1], asked.top_k
    few, alone = min(Calibration.RANKED, vocabulary), t is None
    t, scratch = s.clone() if t is None else t, torch.empty_like(s)
    _, order = blocks.largest(t, min(max(*asked.tail_sizes, top_k, few), vocabulary))
    ranked = order[:, :few] if alone else blocks.largest(s, few)[1]
    found = blocks.read(s, t, scratch, order[:, :top_k], 0)
    q, p = found.student, found.teacher
    head_kl, tail_kl = rows.head_kl(p, q), p.log_mass.exp() * found.tail_kl
    for probabilities, side, total in ((s, q, found.student_total), (t, p, found.teacher_total)):
        probabilities.mul_((side.log_mass.exp() / total).to(s.dtype))
        probabilities.scatter_(1, order[:, :top_k], side.log[:, :-1].exp().to(s.dtype))
    first_p, first_q = order[:, :1], ranked[:, :1]
    columns = [
        q.log_sum_exp - at_label,
        -torch.clamp_min(s, TINY, out=scratch).log_().mul_(s).sum(1, keepdim=True),
        first_q == labels,
        head_kl + tail_kl,
        head_kl,
        tail_kl,
        first_p == first_q,
        first_p != labels,
        torch.minimum(s, t, out=scratch).sum(1, keepdim=True),
        _tail_masses(s, order, asked.tail_sizes),
        torch.ones_like(labels),
    ]
    return torch.cat([column.double() for column in columns], 1), ranked


def _tail_masses(q: Tensor, order: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Mass of q outside the first K ids of an order, added up from the far tail inwards so that nothing cancels."""
    rest = q.scatter(1, order, 0.0).sum(1, keepdim=True)
    kept = q.gather(1, order)
    masses = [rest + kept[:, k:].sum(1, keepdim=True) for k in sizes]
    return torch.cat([m if k < q.shape[1] else torch.zeros_like(m) for k, m in zip(sizes, masses, strict=True)], 1)


def _by_source(asked: _Asked, table: Tensor, group: Callable[[int], str], *, alone: bool) -> dict[str, dict[str, Any]]:
    names = [group(sample) for sample in range(len(table))]
    places = {name: [i for i, other in enumerate(names) if other == name] for name in dict.fromkeys(names)}
    return {name: asked.means(table[of].sum(0), alone=alone) for name, of in sorted(places.items())}
