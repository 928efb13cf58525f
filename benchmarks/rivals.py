"""Who is measured by objective.py: the inputs of a shape, and every competitor as a step over the same inputs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tailkd.objective import Cached, Head, Objective, distillation_loss
from tailkd.objective.divergences import tail_aware_divergence
from tailkd.objective.layout import Layout, layout_of


class Shape(NamedTuple):
    rows: int
    positions: int
    vocabulary: int
    student: int
    teacher: int


SHAPES = {
    "cpu": Shape(4, 256, 32_000, 512, 768),
    "qwen": Shape(8, 2_048, 151_936, 1_536, 2_048),
    "gemma": Shape(2, 2_048, 256_000, 3_584, 3_584),
    "tiny": Shape(2, 64, 1_000, 32, 48),  # for the tests
}


@dataclass(eq=False, slots=True)
class Case:
    """The inputs; gradients are wanted for `hidden` and `weight`."""

    hidden: Tensor
    weight: Tensor
    teacher: Head
    labels: Tensor
    cached: Cached
    layout: Layout = field(init=False)

    def __post_init__(self) -> None:
        self.layout = layout_of(self.labels)  # the loader knows it on the host

    @classmethod
    def drawn(cls, shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(size, generator=generator, device=device)).to(dtype)

        rows, positions, vocabulary, student, teacher = shape
        hidden = normal(rows, positions, student).requires_grad_()
        weight = normal(vocabulary, student, scale=2 / student**0.5).requires_grad_()
        head = Head(normal(rows, positions, teacher), normal(vocabulary, teacher, scale=3 / teacher**0.5))
        labels = torch.randint(vocabulary, (rows, positions), generator=generator, device=device)
        return cls(hidden, weight, head, labels, any_cache(labels, vocabulary))

    def cut(self, rows: int, positions: int | None = None, dtype: torch.dtype | None = None) -> Case:
        """The first rows and positions as leaves of their own, over the whole vocabulary."""
        kept = (slice(rows), slice(positions))
        dtype = dtype or self.hidden.dtype
        return Case(
            self.hidden.detach()[kept].to(dtype, copy=True).requires_grad_(),
            self.weight.detach().to(dtype).requires_grad_(),
            Head(self.teacher.hidden[kept].to(dtype, copy=True), self.teacher.weight.to(dtype)),
            self.labels[kept].contiguous(),
            replace(self.cached, **{name: tensor[kept] for name, tensor in self.cached.tensors.items()}),
        )

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def gradients(self, step: Callable[[Case], None]) -> tuple[Tensor, Tensor]:
        self.clear()
        step(self)
        assert self.hidden.grad is not None
        assert self.weight.grad is not None
        return self.hidden.grad, self.weight.grad

    def flat(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What rivals take: hidden states of (tokens x width), both sides, and both matrices."""
        return self.hidden.flatten(0, 1), self.weight, self.teacher.hidden.flatten(0, 1), self.teacher.weight


def any_cache(labels: Tensor, vocabulary: int) -> Cached:
    """A teacher that was written down, of any content: 10 ids with half of the mass, 32 draws from the rest."""
    steps = torch.arange(42, device=labels.device) * (vocabulary // 42)
    head, tail = ((labels.unsqueeze(-1) + steps) % vocabulary).int().split([10, 32], -1)
    log_p = torch.full(head.shape, 0.05, device=labels.device).log()
    half = torch.full(labels.shape, 0.5, device=labels.device)
    return Cached(head, log_p, half.log(), half * math.log(vocabulary), tail, vocabulary)


@dataclass(frozen=True, slots=True)
class Competitor:
    """A step that leaves gradients in a case.

    loss: what it claims to compute, for the float64 oracle (None: no loss). beside: our row of the same loss.
    dense: it holds (tokens x vocabulary) in several copies, so that large shapes are measured on one row and scaled.
    cached: its teacher was written down.
    """

    name: str
    step: Callable[[Case], None]
    note: str
    loss: Objective | None
    beside: str | None = None
    dense: bool = False
    cached: bool = False


# ----- the bound, ours, eager


def products(case: Case) -> None:
    """The four matrix products that no implementation can do without."""
    hidden, weight = case.hidden.detach().flatten(0, 1), case.weight.detach()
    teacher = case.teacher.hidden.flatten(0, 1) @ case.teacher.weight.T
    student = hidden @ weight.T
    del teacher
    _ = student @ weight
    _ = student.T @ hidden


def ours(objective: Objective, impl: str = "auto", *, cached: bool = False) -> Callable[[Case], None]:
    def step(case: Case) -> None:
        live = case.teacher if objective.needs_teacher else None
        head, teacher = Head(case.hidden, case.weight), case.cached if cached else live
        options = {"objective": objective, "impl": impl, "layout": case.layout}
        distillation_loss(head, teacher, case.labels, **options).mean().backward()

    return step


def dense_logits(case: Case) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        teacher = case.teacher.logits()
    return F.linear(case.hidden, case.weight), teacher


def eager_tad(case: Case) -> None:
    student, teacher = dense_logits(case)
    clm = F.cross_entropy(student.float().flatten(0, 1), case.labels.flatten(), reduction="sum")
    ((clm + tail_aware_divergence(student, teacher).sum()) / case.labels.numel()).backward()


def eager_kl(case: Case) -> None:
    student, teacher = dense_logits(case)
    log_q, log_p = student.float().log_softmax(-1).flatten(0, 1), teacher.float().log_softmax(-1).flatten(0, 1)
    clm = F.nll_loss(log_q, case.labels.flatten(), reduction="sum")
    ((clm + F.kl_div(log_q, log_p, log_target=True, reduction="sum")) / case.labels.numel()).backward()


BOUND = Competitor(
    "bare products",
    products,
    "teacher logits, student logits, gradient of the hidden states, gradient of the vocabulary matrix: four matrix "
    "products on dense matrices and nothing else, no loss",
    None,
)
OURS = [
    Competitor(f"tailkd {divergence}", ours(Objective(divergence=divergence)), note, Objective(divergence=divergence))
    for divergence, note in {
        "tail_aware": "cross-entropy plus the tail-aware divergence, top 10, beta 2",
        "forward_kl": "cross-entropy plus KL(teacher || student)",
        "reverse_kl": "cross-entropy plus KL(student || teacher)",
        "jensen_shannon": "cross-entropy plus the Jensen-Shannon divergence, beta 0.5",
        "none": "cross-entropy alone, without a teacher: three of the four products",
    }.items()
]
OURS += [
    Competitor(
        "tailkd tail_aware, cached",
        ours(Objective(), cached=True),
        "cross-entropy plus the tail-aware divergence from a teacher that was written down, 10 ids and 32 draws a "
        "position: three of the four products, to be held against cross-entropy alone",
        Objective(),
        cached=True,
    )
]
EAGER = [
    Competitor(
        "eager TAD",
        eager_tad,
        "cross-entropy plus the tail-aware divergence from dense logits, plain torch with autograd",
        Objective(),
        beside="tailkd tail_aware",
        dense=True,
    ),
    Competitor(
        "eager F.kl_div",
        eager_kl,
        "cross-entropy plus KL(teacher || student) from dense logits: `log_softmax`, `nll_loss`, `kl_div`",
        Objective(divergence="forward_kl"),
        beside="tailkd forward_kl",
        dense=True,
    ),
]


# ----- rivals


def trl(device: torch.device) -> Competitor:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    def step(case: Case) -> None:
        every = torch.ones_like(case.labels)
        heads = case.weight, case.teacher.weight
        _chunked_divergence_loss(case.hidden, case.teacher.hidden, *heads, every, beta=0.0)[0].backward()

    return Competitor(
        TRL,
        step,
        "`_chunked_divergence_loss` of TRL's `DistillationTrainer` at beta 0: KL(teacher || student), mean over the "
        "positions, and the student's entropy as a measure; no cross-entropy and no tail; its backward pass computes "
        "both sides' logits a second time; products in float32 on a CPU, whatever comes in",
        Objective(divergence="forward_kl", clm_weight=0.0),
        beside="tailkd forward_kl",
    )


def liger(name: str, beta: float, divergence: str) -> Callable[[torch.device], Competitor]:
    def load(device: torch.device) -> Competitor:
        from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction

        weights = {"weight_hard_loss": 1.0, "weight_soft_loss": 1.0}

        def step(case: Case) -> None:
            labels = case.labels.flatten()
            LigerFusedLinearJSDFunction.apply(*case.flat(), labels, None, None, *weights.values(), beta).backward()

        what = "KL(teacher || student)" if beta == 0 else "the Jensen-Shannon divergence"
        return Competitor(
            name,
            step,
            f"`LigerFusedLinearJSDFunction`, beta {beta:g}: cross-entropy plus {what}, weights 1 and 1, "
            "compiled and in chunks of 1,024 positions as by default; the divergence's softmax is in the precision of "
            "the products",
            Objective(divergence=divergence),
            beside=f"tailkd {divergence}",
        )

    return load


def cut_cross_entropy(device: torch.device) -> Competitor:
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if device.type == "cuda" else "torch_compile"
    how = {
        "cce": "its own kernels, which leave out small entries of the gradient, as by default",
        "torch_compile": "`torch_compile`, the only one of its ways that runs on a CPU, with dense logits",
    }

    def step(case: Case) -> None:
        linear_cross_entropy(case.hidden, case.weight, case.labels, impl=impl).backward()

    note = f"`linear_cross_entropy`: cross-entropy alone, no teacher; {how[impl]}"
    truth = Objective(divergence="none")
    return Competitor(CCE, step, note, truth, beside="tailkd none", dense=impl == "torch_compile")


TRL, LIGER_KL, LIGER_JSD, CCE = "TRL forward KL", "Liger forward KL", "Liger JSD", "cut-cross-entropy CLM"
RIVALS: dict[str, Callable[[torch.device], Competitor]] = {
    TRL: trl,
    LIGER_KL: liger(LIGER_KL, 0.0, "forward_kl"),
    LIGER_JSD: liger(LIGER_JSD, 0.5, "jensen_shannon"),
    CCE: cut_cross_entropy,
}
NAMES = [one.name for one in (BOUND, *OURS, *EAGER)] + list(RIVALS)


def chosen(names: list[str], device: torch.device) -> tuple[list[Competitor], dict[str, str]]:
    """Those of these names that can be had here, and why the others cannot."""
    found, missing = [one for one in (BOUND, *OURS, *EAGER) if one.name in names], {}
    for name in (name for name in RIVALS if name in names):
        try:
            found.append(RIVALS[name](device))
        except Exception as reason:
            missing[name] = told(reason)
    return found, missing


def told(reason: Exception) -> str:
    """The reason in one line, without paths of this machine."""
    text = re.sub(r"(?<![\w/])/[^\s:,)]+", "...", " ".join(str(reason).split()))
    return f"{type(reason).__name__}: {text}"[:200]
