"""A chunk's products into its gradient by Triton kernels; the few numbers of a row between them are torch ops."""

# pyright: reportCallIssue=false
from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tailkd.objective import from_cache, kernels, rows
from tailkd.objective.blocks import Split
from tailkd.objective.blockwise import note_split, split_weights
from tailkd.objective.head import factor_and_divisor
from tailkd.objective.rows import Lumped, Tail
from tailkd.objective.sides import Mixture, Side
from tailkd.objective.work import Work

LANES = 2048  # of a scan
BLOCK = 2048  # ids of a row in flight
MOST_IN_A_SCAN = 128  # a longer head is searched by torch.topk
WARPS = 8
KINDS: dict[str, Any] = {
    "reverse_kl": kernels.REVERSE_KL,
    "jensen_shannon": kernels.JENSEN_SHANNON,
    "skew_forward_kl": kernels.SKEW_FORWARD_KL,
    "skew_reverse_kl": kernels.SKEW_REVERSE_KL,
    "total_variation": kernels.TOTAL_VARIATION,
}


class Fused:
    """The Triton implementation of one call. The host never waits for the device."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def turn(self, student: Tensor, teacher: Tensor | None, start: int, whole: bool) -> None:
        """Turn products into the gradient with respect to them, in place; note values. `whole` rows are complete."""
        place = slice(start, start + len(student))
        at_label = self._logits(self.work.student, student, self.work.labels[place])
        if self.work.cached is not None:
            log_sum_exp = self._cached(student, self.work.cached, place)
        elif teacher is None:
            log_sum_exp = self._clm(student, place)
        elif self.work.divergence in KINDS:
            log_sum_exp = self._whole(student, teacher, place)
        else:
            log_sum_exp = self._split(student, teacher, place, whole)
        self.work.note(place, clm=log_sum_exp - at_label.double())

    def sweep(self, teacher: Tensor, start: int) -> None:
        """Note the log tail masses of some positions."""
        place = slice(start, start + len(teacher))
        _, p, _ = self._teacher_split(teacher, None)
        self.work.note(place, log_tail_mass=p.log_mass)

    # ----- steps: each returns logsumexp of the untempered student, (rows, 1)

    def _clm(self, student: Tensor, place: slice) -> Tensor:
        plain, _ = self._scan(self.work.student, student, 1.0)
        w_clm = self.work.token_weights[place] * self.work.objective.clm_weight
        zero = torch.zeros_like(w_clm)
        numbers = [plain.largest, zero, w_clm / plain.total, zero, zero, zero, zero, w_clm]
        self._gradient(student, None, numbers, place)
        return Lumped.of(None, plain).log_sum_exp

    def _split(self, student: Tensor, teacher: Tensor, place: slice, whole: bool) -> Tensor:
        work, objective = self.work, self.work.objective
        labels, weight = work.labels[place], work.token_weights[place]
        w_clm = weight * objective.clm_weight
        is_tempered = objective.temperature != 1.0
        head_ids, p, tail_t = self._teacher_split(teacher, labels if work.divergence == "decoupled_kd" else None)
        plain = self._scan(work.student, student, 1.0)[0] if is_tempered else None
        logits = None
        if head_ids is not None:
            logits = self._logits(work.student, student, head_ids)
            student.scatter_(1, head_ids, -math.inf)
        tail_s, _ = self._scan(work.student, student, objective.temperature)
        q = Lumped.of(None if logits is None else logits / objective.temperature, tail_s)
        if work.has_head and whole:
            work.note(place, log_tail_mass=p.log_mass)
            work.close_sequences(place.start, place.stop)
        inside = torch.zeros_like(w_clm) if is_tempered else w_clm
        scale = weight * objective.divergence_weight * objective.temperature
        weights = split_weights(work, inside, scale, place)
        assert weights.tail is not None
        is_label = None if head_ids is None else head_ids == labels
        gradient = rows.gradient(p, q, weights, is_label)
        total_s, total_t = tail_s.total, tail_t.total
        numbers = [tail_s.largest, tail_t.largest, gradient.on_tail / total_s, weights.tail / total_s]
        numbers += [weights.tail / total_t, *self._untempered(plain, w_clm), w_clm]
        dots = self._gradient(student, teacher, numbers, place)
        if head_ids is not None and logits is not None and is_label is not None:
            in_head = gradient.in_head
            if plain is not None:
                probability = (logits.double() - Lumped.of(None, plain).log_sum_exp).exp()
                in_head = in_head + w_clm * (probability - is_label.double())
            slope = work.student.slope(logits)
            student.scatter_(1, head_ids, (in_head if slope is None else in_head * slope).to(student.dtype))
        tail_kl = dots.unsqueeze(1) / total_t.double() - total_t.double().log() + total_s.double().log()
        note_split(work, place, Split(q.log_sum_exp, rows.head_kl(p, q), tail_kl, p.log_mass))
        return q.log_sum_exp if plain is None else Lumped.of(None, plain).log_sum_exp

    def _cached(self, student: Tensor, side: from_cache.CachedSide, place: slice) -> Tensor:
        work, objective = self.work, self.work.objective
        labels, weight = work.labels[place], work.token_weights[place]
        w_clm, is_tempered = weight * objective.clm_weight, objective.temperature != 1.0
        ids = torch.cat([side.head_ids[place], side.tail_ids[place]], 1)
        logits = self._logits(work.student, student, ids)
        at = [side.head_ids.shape[1], side.tail_ids.shape[1]]
        plain = self._scan(work.student, student, 1.0)[0] if is_tempered else None
        student.scatter_(1, side.head_ids[place], -math.inf)
        rest, _ = self._scan(work.student, student, objective.temperature)
        inside = torch.zeros_like(w_clm) if is_tempered else w_clm
        scale = weight * objective.divergence_weight * objective.temperature
        weights = split_weights(work, inside, scale, place)
        head, draws = (logits / objective.temperature).split(at, 1)
        found = from_cache.estimate(side, place, (head, draws), rest, labels, weights)
        zero = torch.zeros_like(w_clm)
        numbers = [rest.largest, zero, found.on_rest / rest.total, zero, zero]
        self._gradient(student, None, [*numbers, *self._untempered(plain, w_clm), w_clm], place)
        log_sum_exp = found.values.log_sum_exp
        at_ids = torch.cat([found.at_head, found.at_draws], 1)
        if plain is not None:
            log_sum_exp = Lumped.of(None, plain).log_sum_exp
            at_ids = at_ids + w_clm * ((logits.double() - log_sum_exp).exp() - (ids == labels).double())
        slope = work.student.slope(logits)
        found.at_head, found.at_draws = (at_ids if slope is None else at_ids * slope).split(at, 1)
        from_cache.leave(student, side, place, found)
        note_split(work, place, found.values)
        return log_sum_exp

    def _whole(self, student: Tensor, teacher: Tensor, place: slice) -> Tensor:
        work, objective = self.work, self.work.objective
        assert work.teacher is not None
        temperature, is_tempered = objective.temperature, objective.temperature != 1.0
        tempered, likeliest = self._scan(work.student, student, temperature)
        plain = self._scan(work.student, student, 1.0)[0] if is_tempered else None
        of_teacher, _ = self._scan(work.teacher, teacher, temperature)
        w_clm = work.token_weights[place] * objective.clm_weight
        weight = work.token_weights[place] * (objective.divergence_weight * temperature)
        zero = torch.zeros_like(w_clm)
        numbers = [*_two_parts(tempered), *_two_parts(of_teacher), zero if is_tempered else w_clm, weight]
        numbers += [*self._untempered(plain, w_clm), w_clm]
        share = objective.jsd_beta if work.divergence == "jensen_shannon" else objective.skew
        values = torch.empty(len(student), dtype=torch.float32, device=student.device)
        kernels.whole_gradient[(len(student),)](
            student, teacher, values, _packed(numbers), work.labels[place], likeliest, student.stride(0),
            teacher.stride(0), work.vocabulary, *_numbers(work.student), *_numbers(work.teacher), temperature,
            share, _log(share), _log(1 - share), FORM=_form(work.student), TEACHER_FORM=_form(work.teacher),
            TEMPERED=is_tempered, KIND=KINDS[work.divergence],
            BLOCK=_width(work.vocabulary, BLOCK), num_warps=WARPS,
        )  # fmt: skip
        work.note(place, divergence=(temperature**2 * values).unsqueeze(1))
        return Lumped.of(None, tempered if plain is None else plain).log_sum_exp

    def _untempered(self, plain: Tail | None, w_clm: Tensor) -> tuple[Tensor, Tensor]:
        """Factor and shift of the exponential that cross-entropy needs beside a tempered one."""
        zero = torch.zeros_like(w_clm)
        return (zero, zero) if plain is None else (w_clm / plain.total, plain.largest)

    def _teacher_split(self, teacher: Tensor, ids: Tensor | None) -> tuple[Tensor | None, Lumped, Tail]:
        """Head ids of the teacher (`ids`, or the top-k where the divergence has them), its split there and its tail."""
        work, objective = self.work, self.work.objective
        assert work.teacher is not None
        count = objective.top_k if work.has_head else 0
        if count > MOST_IN_A_SCAN:
            ids = teacher.topk(count, dim=1).indices
        if ids is not None or not count:
            head = None
            if ids is not None:
                head = self._logits(work.teacher, teacher, ids) / objective.temperature
                teacher.scatter_(1, ids, -math.inf)
            tail, _ = self._scan(work.teacher, teacher, objective.temperature)
            return ids, Lumped.of(head, tail), tail
        ids = torch.empty(len(teacher), count, dtype=torch.int64, device=teacher.device)
        tail, _ = self._scan(work.teacher, teacher, objective.temperature, ids)
        head = self._logits(work.teacher, teacher, ids) / objective.temperature
        teacher.scatter_(1, ids, -math.inf)
        return ids, Lumped.of(head, tail), tail

    # ----- kernels

    def _scan(
        self, side: Side | Mixture, products: Tensor, temperature: float, ids: Tensor | None = None
    ) -> tuple[Tail, Tensor]:
        """What is left of each row without its largest, whose ids go to `ids`; the id of the largest left."""
        count, vocabulary = len(products), products.shape[1]
        largest, total = torch.empty((2, count, 1), dtype=torch.float32, device=products.device)
        first = torch.empty(count, dtype=torch.int64, device=products.device)
        lanes = _width(vocabulary, LANES)
        kernels.scan[(count,)](
            products, first if ids is None else ids, largest, total, first, products.stride(0), vocabulary,
            0 if ids is None else ids.shape[1], *_numbers(side), temperature, FORM=_form(side),
            TEMPERED=temperature != 1.0, LANES=lanes, STEPS=_width(-(-vocabulary // lanes), 1 << 30), num_warps=WARPS,
        )  # fmt: skip
        return Tail(largest, total), first

    def _gradient(self, student: Tensor, teacher: Tensor | None, numbers: list[Tensor], place: slice) -> Tensor:
        work, objective = self.work, self.work.objective
        other = work.student if work.teacher is None else work.teacher
        dots = torch.empty(len(student), dtype=torch.float32, device=student.device)
        given = student if teacher is None else teacher
        kernels.split_gradient[(len(student),)](
            student, given, dots, _packed(numbers), work.labels[place], student.stride(0), given.stride(0),
            work.vocabulary, *_numbers(work.student), *_numbers(other),
            objective.temperature, FORM=_form(work.student), TEACHER_FORM=_form(other), TEACHER=teacher is not None,
            TEMPERED=objective.needs_teacher and objective.temperature != 1.0,
            BLOCK=_width(work.vocabulary, BLOCK), num_warps=WARPS,
        )  # fmt: skip
        return dots

    def _logits(self, side: Side | Mixture, products: Tensor, ids: Tensor) -> Tensor:
        """Untempered logits at some ids, (rows, k) in float32."""
        raw = products.gather(1, ids)
        return side.widen(raw, torch.empty_like(raw, dtype=torch.float32))


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`gradient * factor` in `dtype`, in one pass at the speed of the memory."""
    out = torch.empty_like(gradient, dtype=dtype)
    width: Any = BLOCK
    kernels.scale[(-(-gradient.numel() // BLOCK),)](gradient, factor, out, gradient.numel(), BLOCK=width)
    return out


def _packed(numbers: list[Tensor]) -> Tensor:
    """(rows, len(numbers)) float32."""
    return torch.cat([number.to(torch.float32) for number in numbers], 1)


def _two_parts(tail: Tail) -> tuple[Tensor, Tensor]:
    """logsumexp of a row as the sum of two float32 numbers."""
    exact = Lumped.of(None, tail).log_sum_exp
    high = exact.float()
    return high, (exact - high.double()).float()


def _numbers(side: Side | Mixture) -> tuple[float, float, float]:
    return (*factor_and_divisor(side.scale), 1.0 if side.softcap is None else side.softcap)


def _form(side: Side | Mixture) -> Any:
    if side.softcap is not None:
        return kernels.CAPPED
    return kernels.PLAIN if side.scale == 1.0 else kernels.SCALED


def _width(size: int, most: int) -> int:
    """A power of two that holds `size`, at most `most`."""
    return min(most, 1 << max(0, (size - 1).bit_length()))


def _log(number: float) -> float:
    return math.log(number) if number > 0 else -math.inf
