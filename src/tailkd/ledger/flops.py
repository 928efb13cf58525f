"""Floating-point operations per token, closed forms: matrix products only, two operations per multiply-add.

A token is a position of a row of `context` tokens. A product with a matrix of N entries is 2 N; scores and their
product with the values are 4 * heads * keys, where a causal query sees context / 2 keys on average.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tailkd.errors import Refusal
from tailkd.ledger.anatomy import Anatomy

SIGNALS = ("live", "hidden", "logits", "none")


@dataclass(frozen=True)
class Convention:
    """What is counted.

    causal: attention above the diagonal (and outside a window) is not computed. attention_backward: backward over
    forward, 2.5 for flash attention, which makes the scores again, and 2 for attention that keeps them.
    everything_trained: gradients of frozen matrices count as if they were made, recomputation does not count.
    """

    name: str
    causal: bool = True
    attention_backward: float = 2.5
    everything_trained: bool = False


PAPER = Convention("paper", everything_trained=True)
EXECUTED = Convention("executed")
EXECUTED_EAGER = Convention("executed", causal=False, attention_backward=2.0)


def executed(anatomy: Anatomy) -> Convention:
    """What runs for a model: flash attention where PyTorch has it, whole score matrices where logits are capped."""
    return EXECUTED_EAGER if anatomy.softcapped else EXECUTED


def attention(anatomy: Anatomy, context: int, convention: Convention) -> float:
    """Scores and values of one token's forward pass."""
    return sum(4 * anatomy.heads * _keys(context, window, convention.causal) for window in anatomy.windows)


def forward(anatomy: Anatomy, context: int, convention: Convention) -> float:
    """``2 * (blocks + head) + attention``: a forward pass with logits at every position."""
    return 2 * (anatomy.blocks + anatomy.head) + attention(anatomy, context, convention)


def teacher_forward(anatomy: Anatomy, context: int, convention: Convention, *, signal: str = "live") -> float:
    """A teacher's signal: all of a forward pass, its vocabulary product over cached hidden states, or read logits.

    "none" is that of a teacher which training does not ask, only held-out evaluation does.

    Raises:
        Refusal: another signal than "live", "hidden", "logits" or "none".
    """
    if signal == "live":
        return forward(anatomy, context, convention)
    if signal not in SIGNALS:
        raise Refusal(f"a teacher's signal is {', '.join(SIGNALS)}; got {signal!r}")
    return 2.0 * anatomy.head if signal == "hidden" else 0.0


def student_step(
    anatomy: Anatomy,
    context: int,
    convention: Convention,
    *,
    frozen_embeddings: bool = False,
    checkpointing: bool = False,
) -> float:
    """Forward and backward: twice the forward's matrix products again, `attention_backward` times its attention.

    As executed a frozen tied head has no gradient of its matrix (three of the loss's four products are left, of which
    one is the teacher's), and activation checkpointing runs the blocks' forward again but for a last matrix whose
    result no gradient needs.
    """
    seen = attention(anatomy, context, convention)
    blocks, head, attended = 6.0 * anatomy.blocks, 6.0 * anatomy.head, (1 + convention.attention_backward) * seen
    if not convention.everything_trained:
        if frozen_embeddings and anatomy.tied:
            head -= 2.0 * anatomy.head
        if checkpointing:
            blocks += 2.0 * (anatomy.blocks - anatomy.last)
            attended += seen
    return blocks + head + attended


def sweep(teacher: Anatomy, positions: int, context: int) -> float:
    """The teacher's vocabulary product once more, where a chunk of `positions` cannot hold a row (TAD alone)."""
    return 2.0 * teacher.head if positions < context else 0.0


def selection(teacher: float, reference: float, ratio: float) -> float:
    """Scoring by teacher and reference model, forward passes per token of corpus, per token that is kept.

    Equals ``(teacher + reference) / ratio``: a share `ratio` of the corpus is trained on (MiniPLM, section 3.2.2).

    Raises:
        Refusal: a ratio outside (0, 1].
    """
    if not 0 < ratio <= 1:
        raise Refusal(f"a selection keeps a share of the corpus in (0, 1]; got {ratio}")
    return (teacher + reference) / ratio


def generation(anatomy: Anatomy, prompt: int, generated: int) -> float:
    """Per generated token, with a cache of keys and values: the prompt once, then a token at a time.

    The head's product is made at the prompt's last position and at every generated one but the last.
    """
    positions = prompt + generated - 1
    seen = sum(sum(_range_keys(positions, window)) for window in anatomy.windows)
    total = 2 * anatomy.blocks * positions + 2 * anatomy.head * generated + 4 * anatomy.heads * seen
    return total / generated


def _range_keys(positions: int, window: int | None) -> Iterator[int]:
    return (min(at, window or at) for at in range(1, positions + 1))


def _keys(context: int, window: int | None, causal: bool) -> float:
    """Keys that a query is multiplied with, on average."""
    if not causal:
        return context
    reach = min(window or context, context)
    return reach - reach * reach / (2 * context)
