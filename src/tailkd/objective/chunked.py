"""The loss without (tokens x vocabulary) in memory: same value and gradient as the oracle.

Valid positions are taken in chunks of a byte budget, cut at row borders, so that the mean tail mass of a row is known
inside its chunk. The gradient is complete in the forward pass: an engine (torch ops or Triton kernels) turns logits
into their gradient in place, ``dh = G W`` and ``dW += G^T h`` follow at once; backward scales by the incoming number.
Four products in all, three where the head is frozen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tailkd.objective.blockwise import Blockwise
from tailkd.objective.head import Head
from tailkd.objective.layout import Layout
from tailkd.objective.settings import Objective
from tailkd.objective.sides import Mixture, Side, side_of
from tailkd.objective.signal import Cached, Dense
from tailkd.objective.work import Work, wide_dtype

CHUNK_BYTES = {"cpu": 256 << 20, "cuda": 5 << 30}
SCORED_BYTES = {"cpu": 32 << 20, "cuda": 1 << 30}  # of products and logits whose cross-entropy alone is asked for
WIDE_SUMS = "dtype_out" in torch.ops.aten.addmm.overloads()  # products of bfloat16 added up in float32 (torch >= 2.8)


class Engine(Protocol):
    """What turns a chunk's products into its gradient."""

    def turn(self, student: Tensor, teacher: Tensor | None, start: int, whole: bool) -> None: ...

    def sweep(self, teacher: Tensor, start: int) -> None: ...


def engine_of(impl: str, work: Work) -> Engine:
    """The engine of that name, for one call."""
    if impl == "chunked":
        return Blockwise(work)
    from tailkd.objective.fused import Fused  # Triton is loaded only where it is used

    return Fused(work)


def chunked_sums(
    student: Head,
    teacher: Head | Dense | Cached | None,
    labels: Tensor,
    objective: Objective,
    layout: Layout,
    token_weights: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss with its gradient; sums of `work.PARTS`; rows under the floor. See `loss.distillation_loss`."""
    rest = (student, teacher, labels, objective, layout, token_weights, impl)
    return _Chunked.apply(student.hidden, student.weight, student.bias, rest)  # pyright: ignore[reportReturnType]


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, rest: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        student, teacher, labels, objective, layout, token_weights, impl = rest
        needs = ctx.needs_input_grad[:3]
        with torch.autocast(hidden.device.type, enabled=False):
            layout = layout.to(labels.device)
            is_cached = isinstance(teacher, Cached)
            live = None if teacher is None or is_cached else side_of(teacher, layout.valid, wide_dtype(hidden))
            student = Side.of(student, layout.valid)
            inputs = (student, live, labels, token_weights, objective, layout)
            work = Work.of(*inputs, gradient=any(needs), cached=teacher if is_cached else None)
            gradients = _Gradients.like(work, hidden, weight, bias, needs)
            _run(work, gradients, engine_of(impl, work))
        ctx.save_for_backward(*gradients.finished(hidden, layout))
        ctx.impl = impl
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias)]
        parts = work.totals()
        total = parts[0].to(work.wide)
        floored = work.floored_rows()
        ctx.mark_non_differentiable(parts, floored)
        return total, parts, floored

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return (*(None if g is None else _scaled(g, incoming[0], dtype, ctx.impl) for g, dtype in pairs), None)


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype, impl: str) -> Tensor:
    """`gradient * factor` in `dtype`, in one pass; in place where nobody else will read what was saved."""
    if dtype != gradient.dtype and impl == "fused" and gradient.is_cuda:
        from tailkd.objective.fused import scaled

        return scaled(gradient, factor, dtype)
    in_place = dtype == gradient.dtype and not _graph_is_kept()
    out = gradient if in_place else torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, factor.to(gradient.dtype), out=out)


def _graph_is_kept() -> bool:
    """Whether this backward pass may be followed by another; True where torch does not tell."""
    autograd: Any = getattr(torch._C, "_autograd", None)
    told = getattr(autograd, "_get_current_graph_task_keep_graph", None)
    return told is None or told()


def _run(work: Work, gradients: _Gradients, engine: Engine) -> None:
    pieces = list(work.layout.pieces(_positions(work.student, work.teacher)))
    if work.has_head and work.teacher is not None:
        # Rows that no chunk holds whole: their mean tail mass first, a teacher product more for them alone.
        parts = [(start, stop) for start, stop, whole in pieces if not whole]
        for start, stop in parts:
            engine.sweep(work.teacher.products(start, stop), start)
        if parts:  # whole rows between them are closed again with their chunk
            work.close_sequences(parts[0][0], parts[-1][1])
    for start, stop, whole in pieces:
        student = work.student.products(start, stop)
        teacher = None if work.teacher is None else work.teacher.products(start, stop)
        engine.turn(student, teacher, start, whole)
        if work.gradient:
            gradients.add(work.student, student, start, stop)
        del student, teacher  # else two chunks live while the next is made


def _positions(student: Side | Mixture, teacher: Side | Mixture | None) -> int:
    """How many positions a chunk may hold."""
    one = student if isinstance(student, Side) else student.sides[0]
    budget = CHUNK_BYTES.get(one.hidden.device.type, CHUNK_BYTES["cuda"])
    per_id = student.bytes_per_id + (teacher.bytes_per_id if teacher is not None else 0)
    return max(1, budget // (per_id * one.weight.shape[0]))


@dataclass(slots=True)
class _Gradients:
    """dh of packed positions, dW and db in the wide dtype; None where nobody asks."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    started: bool = False

    @staticmethod
    def like(work: Work, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, ...]) -> _Gradients:
        return _Gradients(
            torch.empty_like(work.student.hidden) if needs[0] else None,
            torch.empty(weight.shape, dtype=work.wide, device=weight.device) if needs[1] else None,
            torch.zeros(weight.shape[0], dtype=work.wide, device=weight.device)
            if bias is not None and needs[2]
            else None,
        )

    def add(self, student: Side, products: Tensor, start: int, stop: int) -> None:
        """Account for the gradient with respect to the products of some positions."""
        if self.hidden is not None:
            torch.mm(products, student.weight, out=self.hidden[start:stop])
        hidden = student.hidden[start:stop]
        if self.weight is not None:
            _accumulate(self.weight, products, hidden, self.started)
        if self.bias is not None:
            self.bias += products.sum(0, dtype=self.bias.dtype)
        self.started = True

    def finished(self, hidden: Tensor, layout: Layout) -> tuple[Tensor | None, ...]:
        """Gradients in the shapes of the inputs."""
        if not self.started:
            for part in (self.hidden, self.weight):
                if part is not None:
                    part.zero_()
        spread = self.hidden
        if spread is not None and spread.numel() < hidden.numel():
            flat = torch.zeros(hidden.shape, dtype=spread.dtype, device=hidden.device).flatten(0, -2)
            spread = flat.index_copy_(0, layout.valid, spread)
        spread = None if spread is None else spread.view(hidden.shape)
        return spread, self.weight, self.bias


def _accumulate(total: Tensor, products: Tensor, hidden: Tensor, started: bool) -> None:
    """`total` (+)= products.T @ hidden, summed in the dtype of `total` where the device's library can."""
    if products.dtype == total.dtype:
        torch.addmm(total, products.T, hidden, beta=float(started), out=total)
    elif products.is_cuda and WIDE_SUMS:
        torch.ops.aten.addmm.dtype_out(total, products.T, hidden, total.dtype, beta=float(started), out=total)
    elif started:
        total += products.T @ hidden
    else:
        total.copy_(products.T @ hidden)


def logits_in_blocks(
    student: Head | Dense, teacher: Head | Dense | None, layout: Layout, rows: int
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Float32 logits of both sides, at most `rows` valid positions at a time; the caller may overwrite them."""
    valid = layout.to(student.hidden.device).valid
    wide = wide_dtype(student.hidden)
    ours = side_of(student, valid, wide)
    theirs = None if teacher is None else side_of(teacher, valid, wide)
    for start in range(0, layout.count, limit := _positions(ours, theirs)):
        stop = min(start + limit, layout.count)
        chunk = ours.products(start, stop)
        other = None if theirs is None else theirs.products(start, stop)
        for at in range(0, stop - start, rows):
            part = chunk[at : at + rows]
            s = ours.widen(part, torch.empty_like(part, dtype=wide))
            t = None
            if theirs is not None and other is not None:
                part = other[at : at + rows]
                t = theirs.widen(part, torch.empty_like(part, dtype=wide))
            yield slice(start + at, start + at + len(s)), s, t


@torch.no_grad()
def cross_entropies(head: Head | Dense, labels: Tensor, layout: Layout) -> Tensor:
    """Cross-entropy (nats) of each valid position, (n,), float32 or float64; no gradient, no dense logits.

    Equals ``F.cross_entropy(head.logits()[labels != -100], labels[labels != -100], reduction="none")``.
    """
    layout = layout.to(labels.device)
    expected = labels.flatten().index_select(0, layout.valid).unsqueeze(1)
    with torch.autocast(labels.device.type, enabled=False):
        wide = wide_dtype(head.hidden if isinstance(head, Head) else head.heads[0].hidden)
        side = side_of(head, layout.valid, wide)
        found = torch.empty(layout.count, dtype=wide, device=labels.device)
        budget = SCORED_BYTES.get(labels.device.type, SCORED_BYTES["cuda"])
        size = max(1, budget // ((side.bytes_per_id + wide.itemsize) * head.vocabulary_size))
        for start in range(0, layout.count, size):
            products = side.products(start, min(start + size, layout.count))
            logits = side.widen(products, torch.empty_like(products, dtype=wide))
            at_label = logits.gather(1, expected[start : start + size])
            found[start : start + size] = (logits.logsumexp(1, keepdim=True) - at_label).squeeze(1)
    return found
