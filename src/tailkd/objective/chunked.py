"""The loss without (tokens x vocabulary) in memory: same value and gradient as the oracle, in torch ops.

Valid positions are taken in chunks of a byte budget, cut at row borders, so that the mean tail mass of a row is known
inside its chunk. The gradient is complete in the forward pass: logits become the gradient in place, ``dh = G W`` and
``dW += G^T h`` follow at once; backward scales by the incoming number. Four products in all, three where the head is
frozen. On a CPU the elementwise work runs over blocks that stay in cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tailkd.objective import blocks
from tailkd.objective.head import Head, scaled
from tailkd.objective.layout import Layout
from tailkd.objective.settings import TOP_K_DIVERGENCES, Objective

CHUNK_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
BLOCK_BYTES = 1 << 20  # one float32 buffer of a block on a CPU
PARTS = ("loss", "clm", "divergence", "head_kl", "tail_kl", "tail_mass")


@dataclass(frozen=True, slots=True)
class Side:
    """A head's tensors with the valid positions packed: hidden (n, width), weight in the products' dtype."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    may_be_infinite: bool
    """-inf comes in through the bias alone (padded rows); asking costs nothing on a CPU, and a pass is dear there."""

    @staticmethod
    def of(head: Head, valid: Tensor) -> Side:
        hidden = head.hidden.detach().flatten(0, -2).index_select(0, valid)
        bias = None if head.bias is None else head.bias.detach().to(hidden.dtype)
        infinite = bias is not None and (bias.device.type != "cpu" or not bool(torch.isfinite(bias).all()))
        return Side(hidden, head.weight.detach().to(hidden.dtype), bias, head.scale, head.softcap, infinite)

    def products(self, start: int, stop: int) -> Tensor:
        """hidden @ weight.T + bias of some positions: logits before scale and soft-cap."""
        hidden = self.hidden[start:stop]
        return hidden @ self.weight.T if self.bias is None else torch.addmm(self.bias, hidden, self.weight.T)

    def widen(self, products: Tensor, out: Tensor) -> Tensor:
        """Logits of a block in the wide dtype: in the products' own place where they have it, else in `out`."""
        logits = products if products.dtype == out.dtype else out.copy_(products)
        if self.scale != 1.0:
            logits.copy_(scaled(logits, self.scale))
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits.clamp_(min=blocks.LOW) if self.may_be_infinite else logits

    def slope(self, logits: Tensor) -> Tensor | float | None:
        """d logits / d products, of logits in the wide dtype; None for 1."""
        if self.softcap is None:
            return None if self.scale == 1.0 else self.scale
        return (logits / self.softcap).square_().neg_().add_(1.0).mul_(self.scale)


@dataclass(slots=True)
class Work:
    """One call: both sides, what is asked, buffers of a block, and what has been found so far."""

    student: Side
    teacher: Side | None
    labels: Tensor  # (n,)
    token_weights: Tensor | None  # (n, 1)
    objective: Objective
    layout: Layout
    group: Tensor  # layout.group on the device
    log_mean: Tensor  # (groups,) log of the mean tail mass, once known
    values: dict[str, Tensor]  # (n,) per position
    buffers: tuple[Tensor, Tensor, Tensor]
    gradient: bool

    @property
    def divergence(self) -> str:
        """The divergence after its special cases: a head that holds everything splits nothing, JSD ends in KL."""
        objective = self.objective
        if objective.divergence in TOP_K_DIVERGENCES and objective.top_k >= self.student.weight.shape[0]:
            return "forward_kl"
        if objective.divergence == "jensen_shannon" and objective.jsd_beta in (0.0, 1.0):
            return "forward_kl" if objective.jsd_beta == 0.0 else "reverse_kl"
        return objective.divergence

    @property
    def has_head(self) -> bool:
        """Whether the divergence splits at the teacher's top-k ids."""
        return self.divergence in TOP_K_DIVERGENCES

    def rows_of_block(self, rows: int) -> int:
        return len(self.buffers[0]) or rows

    def block_buffers(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Two buffers for logits and one for scratch; on a GPU, where a block is a chunk, made when asked for."""
        if len(self.buffers[0]):
            return self.buffers[0][:rows], self.buffers[1][:rows], self.buffers[2][:rows]
        wide, vocabulary = self.buffers[0].dtype, self.student.weight.shape[0]
        new = torch.empty((3, rows, vocabulary), dtype=wide, device=self.labels.device)
        return new[0], new[1], new[2]


def chunked_sums(
    student: Head,
    teacher: Head | None,
    labels: Tensor,
    objective: Objective,
    layout: Layout,
    token_weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss with its gradient; sums of `PARTS`; rows under the floor. See `loss.distillation_loss`."""
    rest = (student, teacher, labels, objective, layout, token_weights)
    return _Chunked.apply(student.hidden, student.weight, student.bias, rest)  # pyright: ignore[reportReturnType]


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, rest: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs = ctx.needs_input_grad[:3]
        with torch.autocast(hidden.device.type, enabled=False):
            work = _work(*rest, gradient=any(needs))
            gradients = _Gradients.like(work, hidden, weight, bias, needs)
            _run(work, gradients)
        ctx.save_for_backward(*gradients.finished(hidden, work.layout))
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias)]
        parts = _totals(work)
        total = parts[0].to(work.buffers[0].dtype)
        floored = _floored_rows(work)
        ctx.mark_non_differentiable(parts, floored)
        return total, parts, floored

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        scaled_back = (None if g is None else (g * incoming[0].to(g.dtype)).to(dtype) for g, dtype in pairs)
        return (*scaled_back, None)


def _work(
    student: Head,
    teacher: Head | None,
    labels: Tensor,
    objective: Objective,
    layout: Layout,
    token_weights: Tensor | None,
    *,
    gradient: bool,
) -> Work:
    device, count = labels.device, layout.count
    valid = layout.valid.to(device, non_blocking=True)
    wide = torch.float64 if student.hidden.dtype == torch.float64 else torch.float32
    vocabulary = student.vocabulary_size
    rows = max(1, BLOCK_BYTES // (4 * vocabulary)) if device.type == "cpu" else 0
    buffers = tuple(torch.empty((rows, vocabulary), dtype=wide, device=device) for _ in range(3))
    if token_weights is not None:
        token_weights = token_weights.detach().flatten().index_select(0, valid).to(wide).unsqueeze(1)
    return Work(
        student=Side.of(student, valid),
        teacher=None if teacher is None else Side.of(teacher, valid),
        labels=labels.flatten().index_select(0, valid),
        token_weights=token_weights,
        objective=objective,
        layout=layout,
        group=layout.group.to(device, non_blocking=True),
        log_mean=torch.full((layout.groups,), float("nan"), dtype=wide, device=device),
        values={name: torch.zeros(count, dtype=wide, device=device) for name in (*PARTS, "log_tail_mass")},
        buffers=(buffers[0], buffers[1], buffers[2]),
        gradient=gradient,
    )


@dataclass(slots=True)
class _Gradients:
    """dh of packed positions, dW and db in the wide dtype; None where nobody asks."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    started: bool = False

    @staticmethod
    def like(work: Work, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, ...]) -> _Gradients:
        wide = work.buffers[0].dtype
        return _Gradients(
            torch.empty_like(work.student.hidden) if needs[0] else None,
            torch.empty(weight.shape, dtype=wide, device=weight.device) if needs[1] else None,
            torch.zeros(weight.shape[0], dtype=wide, device=weight.device) if bias is not None and needs[2] else None,
        )

    def add(self, work: Work, logits: Tensor, start: int, stop: int) -> None:
        """Account for the gradient with respect to the products of some positions."""
        if self.hidden is not None:
            torch.mm(logits, work.student.weight, out=self.hidden[start:stop])
        hidden = work.student.hidden[start:stop]
        if self.weight is not None:
            if logits.dtype == self.weight.dtype:
                torch.addmm(self.weight, logits.T, hidden, beta=float(self.started), out=self.weight)
            elif self.started:
                self.weight += logits.T @ hidden
            else:
                self.weight.copy_(logits.T @ hidden)
        if self.bias is not None:
            self.bias += logits.sum(0, dtype=self.bias.dtype)
        self.started = True

    def finished(self, hidden: Tensor, layout: Layout) -> tuple[Tensor | None, ...]:
        """Gradients in the shapes of the inputs."""
        if not self.started:
            for part in (self.hidden, self.weight):
                if part is not None:
                    part.zero_()
        spread = None
        if self.hidden is not None:
            flat = torch.zeros(hidden.shape, dtype=self.hidden.dtype, device=hidden.device).flatten(0, -2)
            spread = flat.index_copy_(0, layout.valid.to(hidden.device), self.hidden).view(hidden.shape)
        return spread, self.weight, self.bias


def _run(work: Work, gradients: _Gradients) -> None:
    budget = CHUNK_BYTES.get(work.labels.device.type, CHUNK_BYTES["cuda"])
    itemsize = work.student.hidden.element_size() + (work.teacher.hidden.element_size() if work.teacher else 0)
    limit = max(1, budget // (itemsize * work.student.weight.shape[0]))
    pieces = list(work.layout.pieces(limit))
    if work.has_head:
        _sweep_teacher(work, [(start, stop) for start, stop, whole in pieces if not whole])
    for start, stop, whole in pieces:
        student = work.student.products(start, stop)
        teacher = None if work.teacher is None else work.teacher.products(start, stop)
        waiting = whole and work.divergence == "tail_aware"
        step = work.rows_of_block(stop - start)
        for at in range(0, stop - start, step):
            part = None if teacher is None else teacher[at : at + step]
            _block(work, student[at : at + step], part, start + at, waiting)
        if work.has_head and whole:
            _close_sequences(work, start, stop)
        if waiting and teacher is not None:
            student.addcmul_(teacher.to(student.dtype), _tail_weight(work, start, stop).to(student.dtype))
        if work.gradient:
            gradients.add(work, student, start, stop)
        del student, teacher  # else two chunks live while the next is made


def _sweep_teacher(work: Work, pieces: list[tuple[int, int]]) -> None:
    """Mean tail mass of the rows that no chunk holds whole: a teacher product more, for them alone."""
    for start, stop in pieces:
        assert work.teacher is not None
        products = work.teacher.products(start, stop)
        step = work.rows_of_block(stop - start)
        for at in range(0, stop - start, step):
            part = products[at : at + step]
            logits = work.teacher.widen(part, work.block_buffers(len(part))[1])
            found = blocks.log_tail_mass(logits.div_(work.objective.temperature), work.objective.top_k)
            work.values["log_tail_mass"][start + at : start + at + len(part)] = found.squeeze(1)
    for start, stop in pieces:
        _close_sequences(work, start, stop)


def _close_sequences(work: Work, start: int, stop: int) -> None:
    """log of the mean tail mass of every sequence that has a position between two, from all its positions."""
    touched = torch.zeros_like(work.log_mean).index_fill_(0, work.group[start:stop], 1.0)
    log_mass = work.values["log_tail_mass"]
    top = torch.full_like(work.log_mean, blocks.LOW).scatter_reduce_(0, work.group, log_mass, "amax")
    sums = torch.zeros_like(top).index_add_(0, work.group, (log_mass - top[work.group]).exp())
    counts = torch.zeros_like(top).index_add_(0, work.group, torch.ones_like(log_mass))
    work.log_mean = torch.where(touched > 0, top + sums.log() - counts.log(), work.log_mean)


def _tail_weight(work: Work, start: int, stop: int) -> Tensor:
    """beta * tail mass / max(mean tail mass of the sequence, floor), (positions, 1)."""
    objective, log_mean = work.objective, work.log_mean[work.group[start:stop]]
    if objective.tail_mass_floor > 0:
        log_mean = log_mean.clamp_min(math.log(objective.tail_mass_floor))
    weight = objective.beta * (work.values["log_tail_mass"][start:stop] - log_mean).exp()
    return weight.unsqueeze(1)


def _block(work: Work, student: Tensor, teacher: Tensor | None, start: int, waiting: bool) -> None:
    """Turn the products of a few positions into their gradient, in place, and note their values."""
    objective, place = work.objective, slice(start, start + len(student))
    buffers = work.block_buffers(len(student))
    s = work.student.widen(student, buffers[0])
    factor = work.student.slope(s)
    labels = work.labels[place].unsqueeze(1)
    weight = 1.0 if work.token_weights is None else work.token_weights[place]
    w_clm = torch.full_like(s[:, :1], objective.clm_weight) * weight
    w_divergence = torch.full_like(w_clm, objective.divergence_weight) * weight
    at_label = s.gather(1, labels)
    t = s
    if teacher is None or work.teacher is None:
        shift, log_sum = blocks.clm_block(s, w_clm)
    else:
        t = work.teacher.widen(teacher, buffers[1])
        untempered = s.clone() if objective.temperature != 1.0 else None
        inside = (torch.zeros_like(w_clm) if untempered is not None else w_clm, w_divergence)
        shift, log_sum, values = _divergence_block(work, (s, t, buffers[2]), labels, inside, place, waiting)
        for name, value in values.items():
            work.values[name][place] = value.squeeze(1)
        if untempered is not None:
            shift, log_sum = blocks.clm_block(untempered, w_clm)
            s.add_(untempered)
    work.values["clm"][place] = (log_sum + (shift - at_label)).squeeze(1)
    s.scatter_add_(1, labels, -w_clm)
    for buffer, products in ((s, student), (t, teacher if waiting else None)):
        if products is not None:
            if factor is not None:
                buffer.mul_(factor)
            if buffer is not products:
                products.copy_(buffer)


def _divergence_block(
    work: Work,
    buffers: tuple[Tensor, Tensor, Tensor],
    labels: Tensor,
    weights: tuple[Tensor, Tensor],
    place: slice,
    waiting: bool,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Largest logit and logsumexp less that of the (tempered) student, and values; gradient in the first buffer."""
    objective, (s, t, scratch), (w_clm, w_divergence) = work.objective, buffers, weights
    temperature = objective.temperature
    if temperature != 1.0:
        s.div_(temperature)
        t.div_(temperature)
    weight = w_divergence * temperature  # temperature^2 of the definition, 1 / temperature from the chain rule
    if work.divergence in blocks.WHOLE:
        setting = objective.jsd_beta if work.divergence == "jensen_shannon" else objective.skew
        of = blocks.WHOLE[work.divergence]
        value, shift, log_sum = blocks.whole_block(s, t, of, setting, (w_clm, weight))
        return shift, log_sum, {"divergence": temperature**2 * value}
    w_head, w_tail, head_ids, top_k = weight, None, None, 0
    match work.divergence:
        case "forward_kl":
            w_tail = weight
        case "decoupled_kd":
            w_head, w_tail, head_ids = weight * objective.dkd_alpha, weight * objective.dkd_beta, labels
        case "ghost_token_kl":
            w_tail, top_k = torch.zeros_like(weight), objective.top_k
        case "tail_aware":
            w_tail = None if waiting else weight * _tail_weight(work, place.start, place.stop)
            top_k = objective.top_k
    found = blocks.split_block(s, t, scratch, head_ids, top_k, blocks.Weights(w_clm, w_head, weight, w_tail))
    head_kl, tail_kl = found.head_kl, found.tail_kl
    if work.divergence == "forward_kl":
        return found.shift, found.log_sum, {"divergence": temperature**2 * tail_kl}
    if work.divergence == "decoupled_kd":
        value = objective.dkd_alpha * head_kl + objective.dkd_beta * tail_kl
        return found.shift, found.log_sum, {"divergence": temperature**2 * value}
    # The tail's share waits for the mean tail mass; _totals adds it.
    parts = {"head_kl": head_kl, "tail_kl": tail_kl, "log_tail_mass": found.log_tail_mass}
    return found.shift, found.log_sum, {"divergence": temperature**2 * head_kl, **parts}


def _totals(work: Work) -> Tensor:
    """Sums of `PARTS` over positions, float64."""
    objective, values = work.objective, work.values
    if work.has_head:
        tail_kl = values["tail_kl"]
        if work.divergence == "tail_aware":
            weight = _tail_weight(work, 0, work.layout.count).squeeze(1)
            values["divergence"] = values["divergence"] + objective.temperature**2 * weight * tail_kl
        values["tail_mass"] = values["log_tail_mass"].exp()
        values["tail_kl"] = values["tail_mass"] * tail_kl
    elif objective.divergence in TOP_K_DIVERGENCES:  # the head holds everything
        values["head_kl"] = values["divergence"] / objective.temperature**2
    loss = objective.clm_weight * values["clm"] + objective.divergence_weight * values["divergence"]
    values["loss"] = loss if work.token_weights is None else loss * work.token_weights.squeeze(1)
    return torch.stack([values[name].sum(dtype=torch.float64) for name in PARTS])


def _floored_rows(work: Work) -> Tensor:
    """Rows with a sequence whose mean tail mass lies below the floor."""
    below = torch.zeros_like(work.log_mean, dtype=torch.int64)
    if work.has_head:
        below = (work.log_mean.exp() < work.objective.tail_mass_floor).long()
    elif work.objective.divergence in TOP_K_DIVERGENCES and work.objective.tail_mass_floor > 0:
        below = torch.zeros_like(below).index_fill_(0, work.group, 1)
    rows = work.layout.rows_of_groups.to(below.device, non_blocking=True)
    hit = torch.zeros(len(work.layout.row_borders) - 1, dtype=torch.int64, device=below.device)
    return hit.index_add_(0, rows, below).clamp_max(1).sum()
