"""The loss of a distillation step: cross-entropy on the corpus plus a divergence from the teacher."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tailkd.objective import checks, divergences
from tailkd.objective.chunked import chunked_sums
from tailkd.objective.head import Head
from tailkd.objective.layout import Layout, layout_of
from tailkd.objective.settings import TOP_K_DIVERGENCES, Objective
from tailkd.objective.signal import Cached, Dense
from tailkd.objective.tally import Tally
from tailkd.objective.work import PARTS

P = ParamSpec("P")
R = TypeVar("R")

IMPLEMENTATIONS = ("auto", "fused", "chunked", "reference")


@dataclass(frozen=True, slots=True)
class Loss:
    """Sums over the valid tokens of what was given; divide once, by the valid tokens of the global batch.

    sum: scalar tensor with gradient (nats). count: valid tokens. parts: named `Tally`s without gradient, for logging.
    """

    sum: Tensor
    count: int
    parts: dict[str, Tally] = field(default_factory=dict)

    def mean(self, total: float | None = None) -> Tensor:
        """``sum / (total or count)``; 0 where there is no valid token."""
        return self.sum / ((self.count if total is None else total) or 1)


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """The function as it is, also inside `torch.compile`: one break in the graph.

    A trace would unroll chunks and blocks, and be made again for every number of valid positions.
    """
    outside: Any = torch._disable_dynamo(function)  # pyright: ignore[reportPrivateImportUsage]

    @functools.wraps(function)
    def call(*arguments: P.args, **options: P.kwargs) -> R:
        # Asked first: the detour imports Dynamo (seconds), which a process that compiles nothing never needs.
        return (outside if torch.compiler.is_compiling() else function)(*arguments, **options)

    return call


@untraced
def distillation_loss(
    student: Head,
    teacher: Head | Dense | Cached | None,
    labels: Tensor,
    *,
    objective: Objective,
    segments: Tensor | None = None,
    token_weights: Tensor | None = None,
    impl: str = "auto",
    layout: Layout | None = None,
) -> Loss:
    """Sum over valid positions of cross-entropy and divergence, with gradient to the student alone.

    Equals, for ``objective.divergence == "tail_aware"`` (its siblings likewise)::

        valid = labels != -100
        clm = F.cross_entropy(student.logits().transpose(1, 2), labels, reduction="none")    # 0 where not valid
        div = tail_aware_divergence(student.logits(), teacher.logits(), top_k=..., beta=..., mask=valid,
                                    segments=segments, temperature=...)
        loss.sum == (token_weights * (clm_weight * clm + divergence_weight * div)).sum();  loss.count == valid.sum()

    ``loss.mean().backward()`` is a whole training step's loss on one device without accumulation. With micro-batches
    call ``loss.mean(total).backward()`` on each, `total` being the valid tokens of the *global* batch. Gradients that
    are averaged over ranks afterwards (DDP, FSDP) need ``loss.mean(total / world_size)``.

    Args:
        student, teacher: heads over one vocabulary (`teacher` may be None where ``divergence == "none"``); a `Dense`
            teacher is a mixture of several, or has ids folded into others; a `Cached` one was written down, its tail
            estimated: on average over its draws all is as with a live teacher.
        labels: (batch, sequence), already shifted: ``labels[b, t]`` is what position t predicts; -100 is ignored.
        segments: (batch, sequence) document ids, for a mean tail mass per document instead of per row.
        token_weights: (batch, sequence) factor on each position's loss; the count stays that of valid positions.
        impl: "fused" (Triton kernels, CUDA), "chunked" (torch ops, any device), "reference" (eager, dense logits: the
            oracle), or "auto": fused where it can run, else chunked.
        layout: where the valid positions lie, if the host knows (`with_sequences`); else it is read off the labels,
            which waits for a GPU.

    Raises:
        ValueError: a teacher that is missing, vocabularies or shapes that differ, an `impl` that is unknown or cannot
            run here, a cache that holds less than the objective needs.

    Source: "Don't Ignore the Tail", Eq. 4.
    """
    impl = _chosen(impl, student.hidden)
    checks.labels(labels, student.hidden.shape[:2], student.vocabulary_size)
    if objective.needs_teacher:
        _check_teacher(teacher, student, labels, objective)
    if impl == "reference":
        return _reference(student, teacher, labels, objective, segments, token_weights)
    layout = layout or layout_of(labels, segments)
    teacher = teacher if objective.needs_teacher else None
    return _loss(
        objective, layout.count, chunked_sums(student, teacher, labels, objective, layout, token_weights, impl)
    )


def _check_teacher(teacher: Head | Dense | Cached | None, student: Head, labels: Tensor, objective: Objective) -> None:
    if teacher is None:
        raise ValueError(f"divergence {objective.divergence!r} needs a teacher; give one or take divergence 'none'")
    if teacher.vocabulary_size != student.vocabulary_size:
        raise ValueError(
            f"the teacher has {teacher.vocabulary_size:,} vocabulary rows, the student "
            f"{student.vocabulary_size:,}; expected one vocabulary: slice padded rows off with Head.narrow(usable)"
        )
    if isinstance(teacher, Cached):
        checks.cached(teacher, objective, labels)


def _chosen(impl: str, hidden: Tensor) -> str:
    """The implementation to run; a named one is that one or an error."""
    checks.one_of("impl", impl, IMPLEMENTATIONS)
    if impl not in ("auto", "fused"):
        return impl
    reason = _why_not_fused(hidden)
    if reason and impl == "fused":
        raise ValueError(f"impl 'fused' cannot run here: {reason}; expected auto, chunked or reference")
    return "fused" if impl == "fused" or (hidden.is_cuda and not reason) else "chunked"


def _why_not_fused(hidden: Tensor) -> str | None:
    if find_spec("triton") is None:
        return "its kernels need the package triton, which is not installed"
    if not hidden.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"its kernels need a CUDA device, and the hidden states are on {hidden.device.type}"
    if hidden.dtype == torch.float64:
        return "its kernels compute in float32, and the hidden states are float64"
    return None


def _loss(objective: Objective, count: int, found: tuple[Tensor, Tensor, Tensor]) -> Loss:
    total, sums, floored = found
    names = ["loss", "clm", *(["divergence"] if objective.needs_teacher else [])]
    if objective.divergence in TOP_K_DIVERGENCES:
        names += ["head_kl", "tail_kl", "tail_mass"]
    parts = {name: Tally(sums[PARTS.index(name)], count) for name in names}
    if objective.divergence == "tail_aware":
        parts["floored_rows"] = Tally(floored, 1)
    return Loss(total, count, parts)


def _reference(
    student: Head,
    teacher: Head | Dense | Cached | None,
    labels: Tensor,
    objective: Objective,
    segments: Tensor | None,
    token_weights: Tensor | None,
) -> Loss:
    student_logits = student.logits()
    mask = labels != -100
    count = int(mask.sum())
    log_q = divergences.log_probabilities(student_logits)
    clm = F.nll_loss(log_q.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    values, parts = {"clm": clm}, {}
    if objective.needs_teacher and teacher is not None:
        values["divergence"], parts = _divergence(student_logits, teacher, labels, objective, segments)
    weights = {"clm": objective.clm_weight, "divergence": objective.divergence_weight}
    total = torch.stack([weights[name] * value for name, value in values.items()]).sum(0)
    total = total if token_weights is None else total * token_weights
    total = total.masked_fill(~mask, 0.0).sum()
    summed = {name: Tally(value.detach().sum(), count) for name, value in values.items()}
    return Loss(total, count, {"loss": Tally(total.detach(), count), **summed, **parts})


Divergence = tuple[Tensor, dict[str, Tally]]  # nats per position, and its parts


def _divergence(
    student_logits: Tensor,
    teacher: Head | Dense | Cached,
    labels: Tensor,
    objective: Objective,
    segments: Tensor | None,
) -> Divergence:
    mask, is_split = labels != -100, objective.divergence in TOP_K_DIVERGENCES
    if isinstance(teacher, Cached):
        log_q = divergences.log_probabilities(student_logits, objective.temperature)
        split = divergences.cached_split(log_q, teacher, mask, objective.top_k if is_split else 0)
        if is_split:
            return _split_divergence(split, mask, objective, segments)
        values = split.head_kl + split.log_tail_mass.exp() * split.tail_kl
        return (values * objective.temperature**2).masked_fill(~mask, 0.0), {}
    with torch.no_grad():
        teacher_logits = teacher.logits()
    if not is_split:
        return _plain_divergence(student_logits, teacher_logits, labels, objective), {}
    log_p, log_q = divergences.pair(student_logits, teacher_logits, objective.temperature)
    split = divergences.split_kl(log_p, log_q, divergences.top_k_mask(teacher_logits, objective.top_k))
    return _split_divergence(split, mask, objective, segments)


def _plain_divergence(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, objective: Objective) -> Tensor:
    own: dict[str, Any] = {
        "jensen_shannon": {"jsd_beta": objective.jsd_beta},
        "skew_forward_kl": {"skew": objective.skew},
        "skew_reverse_kl": {"skew": objective.skew},
        "decoupled_kd": {"labels": labels, "dkd_alpha": objective.dkd_alpha, "dkd_beta": objective.dkd_beta},
    }
    divergence = getattr(divergences, objective.divergence)
    shared = {"mask": labels != -100, "temperature": objective.temperature}
    return divergence(student_logits, teacher_logits, **shared, **own.get(objective.divergence, {}))


def _split_divergence(
    split: divergences.Split, mask: Tensor, objective: Objective, segments: Tensor | None
) -> Divergence:
    """The divergence, and of it: head and tail part of the KL at its temperature, tail mass, rows under the floor."""
    floor = objective.tail_mass_floor
    log_mean = divergences.log_mean_tail_mass(split.log_tail_mass, mask, segments)
    beta = objective.beta if objective.divergence == "tail_aware" else 0.0
    values = divergences.tail_aware_values(
        split, log_mean, mask, beta=beta, floor=floor, temperature=objective.temperature
    )
    tail_mass = split.log_tail_mass.exp()
    count = int(mask.sum())
    floored = ((log_mean.exp() < floor) & mask).any(-1).sum()

    def tally(part: Tensor) -> Tally:
        return Tally(part.detach().masked_fill(~mask, 0.0).sum(), count)

    parts = {"head_kl": split.head_kl, "tail_kl": tail_mass * split.tail_kl, "tail_mass": tail_mass}
    extra = {"floored_rows": Tally(floored, 1)} if objective.divergence == "tail_aware" else {}
    return values, {**{name: tally(part) for name, part in parts.items()}, **extra}
