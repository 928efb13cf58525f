"""A chunk's products into its gradient in torch ops: on a CPU in blocks that stay in cache, elsewhere all at once."""

from __future__ import annotations

import torch
from torch import Tensor

from tailkd.objective import blocks
from tailkd.objective.from_cache import cached_block
from tailkd.objective.rows import Weights
from tailkd.objective.work import Work

BLOCK_BYTES = 4 << 20  # one float32 buffer of a block on a CPU

Buffers = tuple[Tensor, Tensor, Tensor]


class Blockwise:
    """The torch implementation of one call."""

    def __init__(self, work: Work) -> None:
        self.work = work
        on_cpu = work.labels.device.type == "cpu"
        self.rows = max(1, BLOCK_BYTES // (4 * work.vocabulary)) if on_cpu else 0
        self.kept = self._fresh(self.rows)

    def turn(self, student: Tensor, teacher: Tensor | None, start: int, whole: bool) -> None:
        """Turn products into the gradient with respect to them, in place, and note values; `whole` rows are complete.

        The mean tail mass of a row is not known while its blocks are worked on: they leave the tail's share in the
        teacher's products, and one pass adds it with the weight that is then known.
        """
        work, rows = self.work, self.rows or len(student)
        waiting = whole and work.divergence == "tail_aware" and work.cached is None
        for at in range(0, len(student), rows):
            part = None if teacher is None else teacher[at : at + rows]
            self._block(student[at : at + rows], part, start + at, waiting)
        if work.has_head and whole:
            work.close_sequences(start, start + len(student))
        if waiting and teacher is not None:
            weight = work.tail_weight(start, start + len(student)).to(student.dtype)
            student.addcmul_(teacher.to(student.dtype), weight)

    def sweep(self, teacher: Tensor, start: int) -> None:
        """Note the log tail masses of some positions; consumes their products."""
        work, rows = self.work, self.rows or len(teacher)
        assert work.teacher is not None
        for at in range(0, len(teacher), rows):
            part = teacher[at : at + rows]
            logits = work.teacher.widen(part, self._buffers(len(part))[1])
            found = blocks.log_tail_mass(logits.div_(work.objective.temperature), work.objective.top_k)
            work.note(slice(start + at, start + at + len(part)), log_tail_mass=found)

    def _fresh(self, rows: int) -> Buffers:
        size = (3, rows, self.work.vocabulary)
        new = torch.empty(size, dtype=self.work.wide, device=self.work.labels.device)
        return new[0], new[1], new[2]

    def _buffers(self, rows: int) -> Buffers:
        """Two buffers for logits and one for scratch."""
        return (self.kept[0][:rows], self.kept[1][:rows], self.kept[2][:rows]) if self.rows else self._fresh(rows)

    def _block(self, student: Tensor, teacher: Tensor | None, start: int, waiting: bool) -> None:
        work, objective = self.work, self.work.objective
        place = slice(start, start + len(student))
        buffers = self._buffers(len(student))
        s = t = work.student.widen(student, buffers[0])
        factor = work.student.slope(s)
        labels = work.labels[place]
        weight = work.token_weights[place]
        w_clm = weight * objective.clm_weight
        if teacher is None and work.cached is None:
            cross_entropy = blocks.clm_block(s, w_clm, labels)
        else:
            at_label = s.gather(1, labels)
            if teacher is not None and work.teacher is not None:
                t = work.teacher.widen(teacher, buffers[1])
            untempered = s.clone() if objective.temperature != 1.0 else None
            inside = (w_clm if untempered is None else torch.zeros_like(w_clm), weight * objective.divergence_weight)
            cross_entropy = self._divergence((s, t, buffers[2]), labels, inside, place, waiting) - at_label
            if untempered is not None:
                cross_entropy = blocks.clm_block(untempered, w_clm, labels)
                s.add_(untempered)
        work.note(place, clm=cross_entropy)
        for buffer, products in ((s, student), (t, teacher if waiting else None)):
            if products is not None:
                if factor is not None:
                    buffer.mul_(factor)
                if buffer is not products:
                    products.copy_(buffer)

    def _divergence(
        self, buffers: Buffers, labels: Tensor, weights: tuple[Tensor, Tensor], place: slice, waiting: bool
    ) -> Tensor:
        """logsumexp of the (tempered) student; notes the values and leaves the gradient in the first buffer."""
        work, objective, (s, t, _), (w_clm, w_divergence) = self.work, self.work.objective, buffers, weights
        temperature = objective.temperature
        if temperature != 1.0:
            s.div_(temperature)
            if t is not s:
                t.div_(temperature)
        weight = w_divergence * temperature  # temperature^2 of the definition, 1 / temperature from the chain rule
        if work.divergence in blocks.WHOLE:
            setting = objective.jsd_beta if work.divergence == "jensen_shannon" else objective.skew
            value, log_sum_exp = blocks.whole_block(
                s, t, blocks.WHOLE[work.divergence], setting, (w_clm, weight), labels
            )
            work.note(place, divergence=temperature**2 * value)
            return log_sum_exp
        by_name = split_weights(work, w_clm, weight, None if waiting else place)
        if work.cached is not None:
            found = cached_block(s, work.cached, place, labels, by_name)
            note_split(work, place, found)
            return found.log_sum_exp
        head_ids = labels if work.divergence == "decoupled_kd" else None
        found = blocks.split_block(buffers, labels, head_ids, objective.top_k if work.has_head else 0, by_name)
        note_split(work, place, found)
        return found.log_sum_exp


def split_weights(work: Work, w_clm: Tensor, weight: Tensor, known: slice | None) -> Weights:
    """Weights of the split family; the tail's of TAD are None unless its mean tail masses are `known` at positions."""
    objective = work.objective
    match work.divergence:
        case "forward_kl":
            return Weights(w_clm, weight, weight, weight)
        case "decoupled_kd":
            return Weights(w_clm, weight * objective.dkd_alpha, weight, weight * objective.dkd_beta)
        case "ghost_token_kl":
            return Weights(w_clm, weight, weight, torch.zeros_like(weight))
    tail = None if known is None else weight * work.tail_weight(known.start, known.stop)
    return Weights(w_clm, weight, weight, tail)


def note_split(work: Work, place: slice, found: blocks.Split) -> None:
    """Keep a split's values; TAD's tail waits for the mean tail mass, `Work.totals` adds it."""
    objective = work.objective
    squared = objective.temperature**2
    if work.divergence == "forward_kl":
        work.note(place, divergence=squared * found.tail_kl)
    elif work.divergence == "decoupled_kd":
        value = objective.dkd_alpha * found.head_kl + objective.dkd_beta * found.tail_kl
        work.note(place, divergence=squared * value)
    else:
        parts = {"head_kl": found.head_kl, "tail_kl": found.tail_kl, "log_tail_mass": found.log_tail_mass}
        work.note(place, divergence=squared * found.head_kl, **parts)
