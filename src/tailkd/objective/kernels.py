"""Triton kernels of the fused loss: one program reads one row of products, in float32 inside.

They reduce and turn products into gradients; the products themselves stay with the vendor's library. What each equals
in torch stands in blocks.py, and tests compare the two under Triton's interpreter. Loaded by fused.py alone.

A row's products become logits while they are read: ``softcap * tanh(x * factor / divisor / softcap)``, and LOW where a
product is -inf (padded rows, and ids of a head that was taken out), so that a difference of two of them is a number.
"""

# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false
from __future__ import annotations

import triton
import triton.language as tl

LOW = tl.constexpr(-1e30)
EMPTY = tl.constexpr(-3e38)  # of a lane without ids: below every logit

# How a product becomes a logit: divisions are dear, and most models have nothing to divide.
PLAIN = tl.constexpr(0)
SCALED = tl.constexpr(1)
CAPPED = tl.constexpr(2)  # scaled too

REVERSE_KL = tl.constexpr(0)
JENSEN_SHANNON = tl.constexpr(1)
SKEW_FORWARD_KL = tl.constexpr(2)
SKEW_REVERSE_KL = tl.constexpr(3)
TOTAL_VARIATION = tl.constexpr(4)


@triton.jit
def _tanh(x):
    size = tl.minimum(tl.abs(x), 20.0)
    z = size * size
    # Least squares of (tanh(x) / x - 1) / x^2 on [0, 0.55]; beyond, the exponential has every digit.
    series = (((-0.00661575 * z + 0.02131274) * z - 0.05391007) * z + 0.13333118) * z - 0.33333332
    near = size + size * z * series
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    found = tl.where(size < 0.55, near, far)
    return tl.where(x < 0.0, -found, found)


@triton.jit
def _log1p(x):
    up = 1.0 + x
    return tl.where(up == 1.0, x, tl.log(up) * (x / tl.where(up == 1.0, 1.0, up - 1.0)))


@triton.jit
def _logit(raw, factor, divisor, softcap, FORM: tl.constexpr):
    x = raw.to(tl.float32)
    z = x
    if FORM != PLAIN:
        z = x * factor / divisor
    if FORM == CAPPED:
        z = softcap * _tanh(z / softcap)
    return tl.where(x > -1e29, z, LOW)


@triton.jit
def _tempered(logit, temperature, TEMPERED: tl.constexpr):
    if TEMPERED:
        return logit / temperature
    return logit


@triton.jit
def _through_logit(gradient, logit, factor, divisor, softcap, FORM: tl.constexpr):
    """The gradient with respect to the product behind a logit."""
    if FORM == PLAIN:
        return gradient
    slope = factor / divisor
    if FORM == CAPPED:
        part = tl.where(logit > -1e29, logit / softcap, 1.0)
        return gradient * (1.0 - part * part) * slope
    return gradient * slope


@triton.jit
def _seen(logit, inside, step, best, place, sums):
    """The largest of each lane, its step, and the sum of exponentials relative to it, after one more logit."""
    logit = tl.where(inside, logit, EMPTY)
    gap = logit - best
    smaller = tl.exp(-tl.abs(gap))
    sums = tl.where(inside, tl.where(gap > 0, sums * smaller + 1.0, sums + smaller), sums)
    place = tl.where(gap > 0, step, place)
    return tl.maximum(best, logit), place, sums


@triton.jit
def scan(
    products, ids, largest, total, first, stride, vocabulary, count, factor, divisor, softcap, temperature,
    FORM: tl.constexpr, TEMPERED: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Of each row: ids of its `count` largest logits; of the others the largest, its id, the sum of exponentials.

    Every lane keeps the largest of the ids it has seen (those congruent modulo LANES) and the sum of exponentials
    relative to it. The largest of all lanes is taken `count` times, its lane read again without it; what the lanes hold
    then is the tail. One pass over memory and `count` short ones, and nothing is ever subtracted from a sum.
    """
    row = tl.program_id(0).to(tl.int64)
    start = products + row * stride
    lane = tl.arange(0, LANES)
    best = tl.full([LANES], EMPTY, tl.float32)
    place = tl.zeros([LANES], tl.int32)
    sums = tl.zeros([LANES], tl.float32)
    for step in range(
        0, tl.cdiv(vocabulary, LANES), 2
    ):  # two loads on their way at a time: one does not fill the memory's pipe
        column = step * LANES + lane
        one = tl.load(start + column, mask=column < vocabulary, other=float("-inf"))
        two = tl.load(start + column + LANES, mask=column + LANES < vocabulary, other=float("-inf"))
        logit = _tempered(_logit(one, factor, divisor, softcap, FORM), temperature, TEMPERED)
        best, place, sums = _seen(logit, column < vocabulary, step, best, place, sums)
        logit = _tempered(_logit(two, factor, divisor, softcap, FORM), temperature, TEMPERED)
        best, place, sums = _seen(logit, column + LANES < vocabulary, step + 1, best, place, sums)
    member = tl.arange(0, STEPS)
    for taken in range(0, count):
        top = tl.max(best, axis=0)
        found = tl.min(tl.where(best == top, place * LANES + lane, vocabulary), axis=0)
        tl.store(ids + row * count + taken, found.to(tl.int64))
        column = member * LANES + found % LANES
        raw = tl.load(start + column, mask=column < vocabulary, other=float("-inf"))
        logit = _tempered(_logit(raw, factor, divisor, softcap, FORM), temperature, TEMPERED)
        left = (column < vocabulary) & ((logit < top) | ((logit == top) & (member > found // LANES)))
        logit = tl.where(left, logit, EMPTY)
        next_best = tl.max(logit, axis=0)
        next_place = tl.min(tl.where(left & (logit == next_best), member, STEPS), axis=0)
        next_sum = tl.sum(tl.where(left, tl.exp(logit - next_best), 0.0), axis=0)
        mine = lane == found % LANES
        best = tl.where(mine, next_best, best)
        place = tl.where(mine, next_place, place)
        sums = tl.where(mine, next_sum, sums)
    top = tl.max(best, axis=0)
    tl.store(largest + row, top)
    tl.store(total + row, tl.sum(sums * tl.exp(best - top), axis=0))
    found = tl.min(tl.where(best == top, place * LANES + lane, vocabulary), axis=0)
    tl.store(first + row, found.to(tl.int64))


@triton.jit
def split_gradient(
    student, teacher, dots, numbers, labels, student_stride, teacher_stride, vocabulary,
    factor, divisor, softcap, teacher_factor, teacher_divisor, teacher_softcap, temperature,
    FORM: tl.constexpr, TEACHER_FORM: tl.constexpr, TEACHER: tl.constexpr, TEMPERED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Student products into their gradient, for every id outside the head; `dots` is sum(eT * (u - mT - z + mS)).

    numbers (rows, 8): mS, mT, then factors of eS, of eS and eT in the tail part, of the untempered exponential with its
    shift, and of the label: ``g = a eS + (b eS - c eT) + d exp(z - shift) - e [label]``.
    """
    row = tl.program_id(0).to(tl.int64)
    own = numbers + row * 8
    shift_s, shift_t = tl.load(own), tl.load(own + 1)
    plain, on_student, on_teacher = tl.load(own + 2), tl.load(own + 3), tl.load(own + 4)
    on_untempered, untempered_shift, on_label = tl.load(own + 5), tl.load(own + 6), tl.load(own + 7)
    label = tl.load(labels + row)
    dot = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, vocabulary, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = column < vocabulary
        place = student + row * student_stride + column
        logit = _logit(tl.load(place, mask=inside, other=float("-inf")), factor, divisor, softcap, FORM)
        z = _tempered(logit, temperature, TEMPERED) - shift_s
        of_student = tl.exp(z)
        gradient = plain * of_student
        if TEACHER:
            raw = tl.load(teacher + row * teacher_stride + column, mask=inside, other=float("-inf"))
            u = _logit(raw, teacher_factor, teacher_divisor, teacher_softcap, TEACHER_FORM)
            u = _tempered(u, temperature, TEMPERED) - shift_t
            of_teacher = tl.exp(u)
            gradient += on_student * of_student - on_teacher * of_teacher
            dot += of_teacher * (u - z)
        if TEMPERED:
            gradient += on_untempered * tl.exp(logit - untempered_shift)
        gradient = tl.where(column == label, gradient - on_label, gradient)
        gradient = _through_logit(gradient, logit, factor, divisor, softcap, FORM)
        tl.store(place, gradient.to(student.dtype.element_ty), mask=inside)
    if TEACHER:
        tl.store(dots + row, tl.sum(dot, axis=0))


@triton.jit
def _log_mixture(ratio, log_share, log_rest):
    """``log(share * e^ratio + rest)``."""
    one = ratio + log_share
    return tl.maximum(one, log_rest) + _log1p(tl.exp(-tl.abs(one - log_rest)))


@triton.jit
def _value_and_slope(log_q, log_p, share, log_share, log_rest, KIND: tl.constexpr):
    """A divergence's share of one id, and its derivative by q; what blocks.WHOLE does with a row."""
    q, p = tl.exp(log_q), tl.exp(log_p)
    if KIND == REVERSE_KL:
        slope = log_q - log_p
        value = q * slope
    elif KIND == JENSEN_SHANNON:
        ratio = log_p - log_q
        q_over_m = -_log_mixture(ratio, log_share, log_rest)
        slope = (1.0 - share) * q_over_m
        value = share * p * (ratio + q_over_m) + q * slope
    elif KIND == SKEW_FORWARD_KL:
        p_over_m = -_log_mixture(log_q - log_p, log_rest, log_share)
        slope = -(1.0 - share) * tl.exp(p_over_m)
        value = p * p_over_m
    elif KIND == SKEW_REVERSE_KL:
        q_over_m = -_log_mixture(log_p - log_q, log_rest, log_share)
        slope = q_over_m - share * tl.exp(q_over_m)
        value = q * q_over_m
    else:
        slope = 0.5 * tl.where(q > p, 1.0, tl.where(q < p, -1.0, 0.0))
        value = 0.5 * tl.abs(q - p)
    return value, slope


@triton.jit
def whole_gradient(
    student, teacher, values, numbers, labels, first, student_stride, teacher_stride, vocabulary,
    factor, divisor, softcap, teacher_factor, teacher_divisor, teacher_softcap, temperature,
    share, log_share, log_rest,
    FORM: tl.constexpr, TEACHER_FORM: tl.constexpr, TEMPERED: tl.constexpr, KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Student products into their gradient ``q * (w_clm + w * (slope - sum(q * slope)))``, and values, per row.

    numbers (rows, 9): logsumexp of the student in two parts, of the teacher in two, w_clm, w, then as in
    `split_gradient` the factor of the untempered exponential, its shift, and the label's.
    """
    row = tl.program_id(0).to(tl.int64)
    own = numbers + row * 9
    high_s, low_s, high_t, low_t = tl.load(own), tl.load(own + 1), tl.load(own + 2), tl.load(own + 3)
    w_clm, weight = tl.load(own + 4), tl.load(own + 5)
    on_untempered, untempered_shift, on_label = tl.load(own + 6), tl.load(own + 7), tl.load(own + 8)
    label, likeliest = tl.load(labels + row), tl.load(first + row)
    student += row * student_stride
    teacher += row * teacher_stride
    first_s, first_t = tl.load(student + likeliest), tl.load(teacher + likeliest)
    first_q = _tempered(_logit(first_s, factor, divisor, softcap, FORM), temperature, TEMPERED) - high_s - low_s
    first_p = _logit(first_t, teacher_factor, teacher_divisor, teacher_softcap, TEACHER_FORM)
    first_p = _tempered(first_p, temperature, TEMPERED) - high_t - low_t
    _unused, origin = _value_and_slope(first_q, first_p, share, log_share, log_rest, KIND)
    value, mean = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for begin in range(0, vocabulary, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = column < vocabulary
        raw_s = tl.load(student + column, mask=inside, other=float("-inf"))
        raw_t = tl.load(teacher + column, mask=inside, other=float("-inf"))
        log_q = _tempered(_logit(raw_s, factor, divisor, softcap, FORM), temperature, TEMPERED) - high_s - low_s
        log_p = _logit(raw_t, teacher_factor, teacher_divisor, teacher_softcap, TEACHER_FORM)
        log_p = _tempered(log_p, temperature, TEMPERED) - high_t - low_t
        part, slope = _value_and_slope(log_q, log_p, share, log_share, log_rest, KIND)
        value += tl.where(inside, part, 0.0)
        mean += tl.where(inside, tl.exp(log_q) * (slope - origin), 0.0)
    tl.store(values + row, tl.sum(value, axis=0))
    middle = tl.sum(mean, axis=0)
    for begin in range(0, vocabulary, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = column < vocabulary
        raw_s = tl.load(student + column, mask=inside, other=float("-inf"))
        raw_t = tl.load(teacher + column, mask=inside, other=float("-inf"))
        logit = _logit(raw_s, factor, divisor, softcap, FORM)
        log_q = _tempered(logit, temperature, TEMPERED) - high_s - low_s
        log_p = _logit(raw_t, teacher_factor, teacher_divisor, teacher_softcap, TEACHER_FORM)
        log_p = _tempered(log_p, temperature, TEMPERED) - high_t - low_t
        _again, slope = _value_and_slope(log_q, log_p, share, log_share, log_rest, KIND)
        gradient = tl.exp(log_q) * (w_clm + weight * (slope - origin - middle))
        if TEMPERED:
            gradient += on_untempered * tl.exp(logit - untempered_shift)
        gradient = tl.where(column == label, gradient - on_label, gradient)
        gradient = _through_logit(gradient, logit, factor, divisor, softcap, FORM)
        tl.store(student + column, gradient.to(student.dtype.element_ty), mask=inside)


@triton.jit
def scale(source, factor, target, count, BLOCK: tl.constexpr):
    """target = source * factor, of one number `factor`, in the target's precision: one pass."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    value = tl.load(source + place, mask=inside).to(tl.float32) * tl.load(factor).to(tl.float32)
    tl.store(target + place, value.to(target.dtype.element_ty), mask=inside)
