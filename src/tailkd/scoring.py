"""`tailkd score`: the log-likelihoods by which a recipe chooses rows or tokens, made ahead of training."""

from __future__ import annotations

from dataclasses import dataclass

from tailkd import pair, selection
from tailkd.data.select import Kept
from tailkd.errors import Refusal
from tailkd.parts import Say, prepare
from tailkd.recipe import Recipe
from tailkd.train.ranks import Ranks
from tailkd.train.signals import StopRequest


@dataclass(frozen=True)
class Scored:
    """rows: scored. kept: of them, those that are trained on; None where tokens are chosen while training."""

    rows: int
    kept: int | None


def score(recipe: Recipe, say: Say) -> Scored:
    """Score the training rows of a recipe, on all processes of torchrun; the same call goes on after an interruption.

    Raises:
        Refusal: a recipe that chooses nothing by scores; models or data that cannot be used.
        Preempted: asked to stop; the chunks of rows that are read stay.
        DataError: the disk does not take the scores.
    """
    if recipe.data.select is None and recipe.objective.tokens is None:
        raise Refusal("the recipe has neither data.select nor objective.tokens, so nothing is to be scored")
    ranks = Ranks.start()
    with StopRequest(recipe.training.stop_after_seconds, ranks.agreed) as stop:
        shared = pair.read_vocabulary(recipe)
        with ranks.in_turns():
            rows, _ = prepare(recipe, shared, say if ranks.leads else lambda line: None)
        said = say if ranks.leads else lambda line: None
        found = selection.chosen(recipe, shared, rows, ranks=ranks, heed=stop.heed, say=said)
    return Scored(len(rows), len(found) if isinstance(found, Kept) else None)
