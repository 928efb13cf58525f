"""Hidden states of the student beside the teacher's: 1 - cosine, over the valid positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tailkd.objective import checks


@dataclass(frozen=True)
class Hidden:
    """Which hidden states are compared, and how much it counts.

    pairs: (student's, teacher's) numbers of hidden states, 0 the embeddings, i after block number i, -1 after the final
        norm; "last" is ((-1, -1),), as in DistilBERT (Sanh et al. 2019, section 3) and in Tail-Aware Distillation.
    weight: factor of the mean over positions and pairs.
    project: compare a learned linear image of the student's states; needed where the widths differ.

    Raises:
        ValueError: no pair, or a weight that is not positive.
    """

    pairs: Literal["last"] | tuple[tuple[int, int], ...] = "last"
    weight: float = 1.0
    project: bool = False

    def __post_init__(self) -> None:
        checks.positive("hidden.weight", self.weight)
        if not self.pairs:
            raise ValueError('hidden.pairs is empty; expected "last" or [[student state, teacher state], ...]')

    @property
    def student_states(self) -> tuple[int, ...]:
        return (-1,) if self.pairs == "last" else tuple(student for student, _ in self.pairs)

    @property
    def teacher_states(self) -> tuple[int, ...]:
        return (-1,) if self.pairs == "last" else tuple(teacher for _, teacher in self.pairs)


def cosine(student_hidden: Tensor, teacher_hidden: Tensor, mask: Tensor) -> Tensor:
    """Sum over valid positions of 1 - cos(student, teacher), in float32 at least; gradient to the student alone.

    Equals, s and t being the states of a valid position, ``1 - s @ t / (|s| * |t|)`` summed: DistilBERT's
    ``CosineEmbeddingLoss`` with targets of 1 before its mean. 1 where either is 0.

    Args:
        student_hidden, teacher_hidden: (batch, sequence, width), of one width.
        mask: (batch, sequence), which positions are valid; what stands at the others, not finite even, does not count.

    Raises:
        ValueError: shapes that do not fit.
    """
    if student_hidden.shape != teacher_hidden.shape or mask.shape != student_hidden.shape[:-1]:
        raise ValueError(
            f"student's hidden states {tuple(student_hidden.shape)}, teacher's {tuple(teacher_hidden.shape)}, mask "
            f"{tuple(mask.shape)}; expected (batch, sequence, width) twice and (batch, sequence): project the "
            "student's states where the widths differ"
        )
    wide = torch.promote_types(torch.promote_types(student_hidden.dtype, teacher_hidden.dtype), torch.float32)
    valid = mask.bool()
    outside = ~valid.unsqueeze(-1)
    student = student_hidden.to(wide).masked_fill(outside, 0.0)
    teacher = teacher_hidden.detach().to(wide).masked_fill(outside, 0.0)
    with torch.autocast(student.device.type, enabled=False):
        similarity = F.cosine_similarity(student, teacher, dim=-1, eps=1e-8)
    return torch.where(valid, 1.0 - similarity, 0.0).sum()


def hidden_loss(
    student_states: Sequence[Tensor],
    teacher_states: Sequence[Tensor],
    mask: Tensor,
    *,
    projections: Sequence[Tensor] | None = None,
) -> Tensor:
    """Mean over pairs of their `cosine`: a sum over valid positions.

    Equals ``sum(cosine(s @ p.T, t, mask) for s, t, p in zip(student_states, teacher_states, projections)) / pairs``, or
    without ``p``. Projections are whole matrices (teacher's width, student's width): `models.head.whole` of sharded
    ones.
    """
    if projections is not None:
        pairs = zip(student_states, projections, strict=True)
        student_states = [F.linear(state, image.to(state.dtype)) for state, image in pairs]
    sums = [cosine(student, teacher, mask) for student, teacher in zip(student_states, teacher_states, strict=True)]
    return torch.stack(sums).mean()


def projections(student_width: int, teacher_width: int, count: int, *, seed: int = 0) -> nn.ModuleList:
    """A learned map of the student's states into the teacher's width for each of `count` pairs, without bias.

    It starts as N(0, 1 / student_width): an image about as large as the state.
    """
    generator = torch.Generator().manual_seed(seed)
    made = nn.ModuleList(
        nn.utils.skip_init(nn.Linear, student_width, teacher_width, bias=False, device="cpu") for _ in range(count)
    )
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=student_width**-0.5, generator=generator)
    return made
