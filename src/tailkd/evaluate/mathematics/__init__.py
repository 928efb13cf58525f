"""Mathematics word problems: prompts, answers read out of generated text, verdicts, and a log of every sample.

The rules are those of the evaluation harness that the paper's tables follow, written anew;
docs/evaluation.md states them and lists where verdicts differ. `solving` runs a model; nothing else here loads one.
"""

from __future__ import annotations

from tailkd.evaluate.mathematics.extraction import extract
from tailkd.evaluate.mathematics.grading import grade, self_test
from tailkd.evaluate.mathematics.judge import can_verify, verified
from tailkd.evaluate.mathematics.log import Sample
from tailkd.evaluate.mathematics.scoring import Answer, Scored, score, summary
from tailkd.evaluate.mathematics.tasks import MAX_NEW_TOKENS, STOPS, TASKS, Item, read_items

__all__ = [
    "Answer",
    "Item",
    "MAX_NEW_TOKENS",
    "STOPS",
    "Sample",
    "Scored",
    "TASKS",
    "can_verify",
    "extract",
    "grade",
    "read_items",
    "score",
    "self_test",
    "summary",
    "verified",
]
