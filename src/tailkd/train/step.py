"""One optimizer step: micro-batches, one division by the global count, backward, guards, clip, update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from tailkd.data.batches import Batch
from tailkd.data.packing import IGNORED
from tailkd.data.select import excess_weights
from tailkd.errors import OutOfMemory
from tailkd.models.head import PROJECTIONS, SplitModel, whole
from tailkd.objective import Cached, Dense, Head, Objective, Tally, distillation_loss
from tailkd.objective.chunked import cross_entropies
from tailkd.objective.hidden import Hidden, hidden_loss
from tailkd.objective.layout import Layout, with_sequences
from tailkd.objective.tally import add
from tailkd.train.parallel import clip_gradients, without_sync
from tailkd.train.ranks import ALONE, Ranks

Signal = Cached | Dense | Head
Teacher = Callable[[Batch], Signal]


@runtime_checkable
class ShowsStates(Protocol):
    """A teacher that shows its hidden states too."""

    def with_states(self, batch: Batch, states: tuple[int, ...]) -> tuple[Signal, tuple[Tensor, ...]]: ...


NOT_FINITE = ("teacher's hidden states", "loss", "gradient norm")


@dataclass(frozen=True)
class StepResult:
    """parts: summed loss parts (nats). gradient_norm: before clipping. tokens: valid positions of the global batch.

    not_finite: what was not, and so kept the update from happening; None for an update.
    """

    parts: dict[str, Tally]
    gradient_norm: float
    tokens: int
    not_finite: str | None = None


@dataclass
class _Watched:
    """A teacher whose every signal is looked at: `bad` where one was not finite."""

    teacher: Teacher | None
    bad: Tensor

    def __call__(self, batch: Batch) -> Signal:
        assert self.teacher is not None
        return self._seen(self.teacher(batch))

    def with_states(self, batch: Batch, states: tuple[int, ...]) -> tuple[Signal, tuple[Tensor, ...]]:
        assert isinstance(self.teacher, ShowsStates)
        signal, found = self.teacher.with_states(batch, states)
        return self._seen(signal), found

    def _seen(self, signal: Signal) -> Signal:
        numbers = signal.head_log_probabilities if isinstance(signal, Cached) else signal.hidden
        self.bad = self.bad | ~torch.isfinite(numbers).all()
        return signal


def nothing_asked() -> None:
    """For `heed` where nobody can ask to stop."""


@dataclass
class Step:
    """``step(batch)`` is one update of the student on one global batch, or none where something is not finite.

    heed: called before every micro-batch; what it raises leaves student and optimizer as they were.
    auto_microbatch: where memory runs out, halve the micro-batch and repeat the same batch; `say` is told.
    """

    student: SplitModel
    teacher: Teacher | None
    objective: Objective
    optimizer: torch.optim.Optimizer
    micro_batch_size: int
    clip_norm: float
    ranks: Ranks = ALONE
    heed: Callable[[], None] = nothing_asked
    auto_microbatch: bool = False
    say: Callable[[str], None] = field(default=lambda line: None)
    hidden: Hidden | None = None

    def __call__(self, batch: Batch) -> StepResult:
        parts, teacher_is_bad = self._gradients(batch)
        norm = clip_gradients(self.student.plain, self.clip_norm)
        not_finite = self._first_bad(teacher_is_bad, parts, norm)
        if not_finite is None and batch.count:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(parts, float(norm), batch.count, not_finite)

    def _gradients(self, batch: Batch) -> tuple[dict[str, Tally], Tensor]:
        """Gradients of the batch's mean loss; its parts over all ranks; whether the teacher was not finite."""
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            try:
                return self._accumulate(batch)
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    self.optimizer.zero_grad(set_to_none=True)
                    raise
                reason = str(error).splitlines()[0]
            self._smaller_micro_batches(batch, reason)

    def _accumulate(self, batch: Batch) -> tuple[dict[str, Tally], Tensor]:
        own = batch.part(self.ranks.rank, self.ranks.world)
        watched = _Watched(self.teacher, torch.zeros((), dtype=torch.bool, device=self.student.device))
        parts = accumulate_gradients(
            self.student,
            None if self.teacher is None else watched,
            own,
            objective=self.objective,
            hidden=self.hidden,
            micro_batch_size=self.micro_batch_size,
            divisor=batch.learned_count / self.ranks.world,
            heed=self.heed,
        )
        return self._over_ranks(parts, batch), watched.bad

    def _over_ranks(self, parts: dict[str, Tally], batch: Batch) -> dict[str, Tally]:
        if self.ranks.world == 1 or not parts:
            return parts
        names = list(parts)
        sums = self.ranks.summed(torch.stack([parts[n].sum.double() for n in names]))
        weights = self.ranks.summed(torch.tensor([parts[n].weight for n in names], dtype=torch.float64))
        return {n: Tally(sums[i], float(weights[i])) for i, n in enumerate(names)}

    def _first_bad(self, teacher_is_bad: Tensor, parts: dict[str, Tally], norm: Tensor) -> str | None:
        """What is not finite on any rank, asked in one look at the device."""
        losses = [~torch.isfinite(tally.sum) for tally in parts.values()]
        loss_is_bad = torch.stack(losses).any() if losses else torch.zeros_like(teacher_is_bad)
        flags = torch.stack([teacher_is_bad, loss_is_bad.to(norm.device), ~torch.isfinite(norm)]).float()
        found = self.ranks.largest(flags).tolist()
        return next((name for name, flag in zip(NOT_FINITE, found, strict=True) if flag), None)

    def _smaller_micro_batches(self, batch: Batch, reason: str) -> None:
        rows = min(self.micro_batch_size, len(batch) // self.ranks.world)
        if not self.auto_microbatch or rows == 1 or self.ranks.world > 1:
            raise OutOfMemory(
                f"{rows} rows of {batch.input_ids.shape[1]} tokens do not fit into memory ({reason}); lower "
                "training.micro_batch_size (it changes memory, not the result), data.context, or set "
                "training.auto_microbatch: true (on one process), and run the same command again"
            )
        self.micro_batch_size = rows // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.say(f"out of memory: going on with micro-batches of {self.micro_batch_size} rows ({reason})")


def accumulate_gradients(
    student: SplitModel,
    teacher: Teacher | None,
    batch: Batch,
    *,
    objective: Objective,
    micro_batch_size: int,
    divisor: float | None = None,
    heed: Callable[[], None] = nothing_asked,
    hidden: Hidden | None = None,
) -> dict[str, Tally]:
    """Add the gradient of the batch's mean loss to the student's parameters; the micro-batch does not change it.

    Equals ``distillation_loss(student(batch), teacher(batch), batch.labels, objective=objective,
    segments=batch.sequences).mean(divisor).backward()``, with the cosine loss of `hidden` added to its sum; the divisor
    is the number of valid tokens, where gradients are averaged over ranks a rank's share. Of a batch with reference
    losses the learned tokens alone count.
    """
    parts: dict[str, Tally] = {}
    divisor = batch.learned_count if divisor is None else divisor
    micros = list(batch.micro_batches(micro_batch_size))
    for number, micro in enumerate(micros, 1):
        heed()
        micro = micro.to(student.device)
        with without_sync(student, last=number == len(micros)):
            total, found = _loss(student, teacher, micro, objective, hidden)
            (total / max(divisor, 1)).backward()
        parts = add(parts, found)
    return parts


def _loss(
    student: SplitModel,
    teacher: Teacher | None,
    micro: Batch,
    objective: Objective,
    hidden: Hidden | None,
) -> tuple[Tensor, dict[str, Tally]]:
    """The summed loss of a micro-batch, and its parts."""
    signal, theirs, ours = None, (), ()
    if hidden is not None:
        assert isinstance(teacher, ShowsStates)
        signal, theirs = teacher.with_states(micro, hidden.teacher_states)
    elif teacher is not None and objective.needs_teacher:
        signal = teacher(micro)
    if hidden is None:
        head = student(micro.input_ids, micro.position_ids)
    else:
        head, ours = student.with_states(micro.input_ids, hidden.student_states, micro.position_ids)
    layout = with_sequences(micro.valid, micro.row_borders, micro.labels.shape[1], micro.sequences)
    signal = signal if objective.needs_teacher else None
    weights = _token_weights(head, micro, layout)
    loss = distillation_loss(head, signal, micro.labels, objective=objective, layout=layout, token_weights=weights)
    parts = {**loss.parts, "loss": Tally(loss.parts["loss"].sum, micro.learned_count)}
    if hidden is None:
        return loss.sum, parts
    images = [whole(image.weight) for image in getattr(student.plain, PROJECTIONS, ())] or None
    learned = micro.labels != IGNORED if weights is None else weights > 0
    cosine = hidden_loss(ours, theirs, learned, projections=images)
    total = loss.sum + hidden.weight * cosine
    found = {name: Tally(part.detach(), micro.learned_count) for name, part in (("loss", total), ("hidden", cosine))}
    return total, {**parts, **found}


def _token_weights(head: Head, micro: Batch, layout: Layout) -> Tensor | None:
    """1 for the tokens that are learned, from a pass over the student's head without gradient; None for all."""
    if micro.reference is None:
        return None
    valid = layout.to(micro.labels.device).valid
    losses = cross_entropies(head, micro.labels, layout)
    reference = micro.reference.flatten()[valid].to(losses.dtype)
    weights = torch.zeros(micro.labels.numel(), dtype=losses.dtype, device=losses.device)
    weights[valid] = excess_weights(losses, reference, micro.row_borders, micro.learned)
    return weights.view(micro.labels.shape)


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
