"""Are two vocabularies one? Proof or refusal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tailkd.errors import Refusal

SHOWN = 5


def usable_ids(
    teacher_tokenizer: Any, student_tokenizer: Any, teacher_rows: int, student_rows: int, *, teacher: str = "teacher"
) -> int:
    """How many ids (0 to n - 1) mean one token on both sides and have a vocabulary row in both models.

    Rows beyond the tokenizer's ids are padding and are sliced off on both sides. Ids below must carry the same token
    in both tokenizers. `teacher` is its name in a message.

    Raises:
        Refusal: naming the first ids and tokens that differ.
    """
    theirs, ours = _tokens(teacher_tokenizer), _tokens(student_tokenizer)
    rows = min(teacher_rows, student_rows)
    usable = min(rows, max(theirs, default=-1) + 1, max(ours, default=-1) + 1)
    differing = [i for i in range(rows) if theirs.get(i) != ours.get(i)]
    if differing:
        shown = "; ".join(f"id {i}: {theirs.get(i)!r} against {ours.get(i)!r}" for i in differing[:SHOWN])
        raise Refusal(
            f"{teacher} and student do not share one vocabulary: {len(differing):,} of {rows:,} ids carry another "
            f"token (teacher against student: {shown}); distillation compares the two distributions id by id, so take "
            "a pair with one tokenizer, or a tool for cross-tokenizer distillation"
        )
    return usable


def check_fold(fold: Mapping[int, int], usable: int, teacher_rows: int, *, teacher: str = "teacher") -> None:
    """Refuse folded ids that the teacher does not have, that the student has, or that go to one it does not have."""
    for source, target in fold.items():
        if not usable <= source < teacher_rows or not 0 <= target < usable:
            raise Refusal(
                f"vocabulary.fold: {source}: {target} adds the {teacher}'s probability of id {source} to id {target}; "
                f"expected one of {usable:,} to {teacher_rows - 1:,}, that the student lacks, and one below them"
            )


def tokenizer_usable_ids(tokenizer: Any, rows: int) -> int:
    """The same for a student alone."""
    return min(rows, max(_tokens(tokenizer), default=-1) + 1)


def _tokens(tokenizer: Any) -> dict[int, str]:
    return {i: token for token, i in tokenizer.get_vocab().items()}
