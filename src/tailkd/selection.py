"""What scores choose of a recipe's rows: those that the teacher prefers (MiniPLM), or tokens worth learning (Rho-1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tailkd import folder, pair
from tailkd.data import select
from tailkd.data.mixture import AnyRows, Mixture
from tailkd.data.packing import Rows
from tailkd.data.tokens import tokenizer_fingerprint
from tailkd.errors import Refusal
from tailkd.models import load, precision, vocabulary
from tailkd.models.head import SplitModel
from tailkd.pair import Vocabulary
from tailkd.recipe import Recipe
from tailkd.teacher import reading
from tailkd.teacher.live import LiveTeacher
from tailkd.teacher.score import Read, Scoring, score
from tailkd.train.ranks import Ranks


def chosen(
    recipe: Recipe,
    shared: Vocabulary,
    rows: AnyRows,
    *,
    ranks: Ranks,
    heed: Callable[[], None],
    say: Callable[[str], None],
) -> AnyRows:
    """The training rows as `data.select` or `objective.tokens` choose of them, from scores made where they are missing.

    Raises:
        Refusal: a reference that cannot be read, or whose tokens are not the student's where tokens are chosen.
        Preempted, DataError: see `teacher.score.score`.
    """
    if isinstance(rows, Mixture):  # of which nothing is chosen (recipe_rules)
        return rows
    scorer = _Scorer(recipe, shared, rows, ranks, heed, say)
    if recipe.data.select is not None:
        return _kept(scorer, recipe.data.select.reference, recipe.data.select.ratio)
    if recipe.objective.tokens is not None:
        return _with_reference(scorer, recipe.objective.tokens.reference, recipe.objective.tokens.ratio)
    return rows


def unscored(recipe: Recipe, rows: AnyRows) -> AnyRows:
    """Rows of the same kind without scores: all of them, and losses of 0."""
    if recipe.objective.tokens is None or isinstance(rows, Mixture):
        return rows
    losses = np.broadcast_to(np.float32(0), (len(rows), rows.context))
    return select.WithReference(rows, losses, recipe.objective.tokens.ratio)


@dataclass(frozen=True)
class _Scorer:
    """Makes scores of a recipe's rows, or opens them."""

    recipe: Recipe
    shared: Vocabulary
    rows: Rows
    ranks: Ranks
    heed: Callable[[], None]
    say: Callable[[str], None]

    @property
    def dtype(self) -> torch.dtype:
        return precision.resolve(self.recipe.training.precision, self.ranks.device)

    def scoring(self, made_of: Callable[[], dict[str, Any]], *, per_token: bool = False) -> Scoring:
        """One process looks at the files, the others hear from it."""
        found = self.ranks.gathered(made_of() if self.ranks.leads else {})[0]
        return Scoring(self.rows, found, folder.store(self.recipe), per_token)

    def scores(self, by: str, scoring: Scoring, reader: Callable[[], Read]) -> np.ndarray:
        if not scoring.finished:
            self.say(f"scores: {by} reads {len(self.rows):,} rows, once; what it finds is kept in {scoring.folder}")
        size = self.recipe.evaluate.batch_size
        found = score(scoring, reader, batch_size=size, ranks=self.ranks, heed=self.heed, say=self.say)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return found

    def teacher(self) -> LiveTeacher:
        model = pair.load_teacher(self.recipe, self.ranks.device)
        fold = self.recipe.vocabulary.fold
        return LiveTeacher(model, usable=self.shared.usable, compute_dtype=self.dtype, fold=fold)

    def reference(self, key: str, name: str, usable: int | None) -> SplitModel:
        model = load.load_model(key, name, dtype=self.dtype, device=self.ranks.device)
        return SplitModel(model.requires_grad_(False), usable=usable, compute_dtype=self.dtype).prove()

    def same_tokens(self, tokenizer: Any | None, rows: int) -> bool:
        """Whether a model with this tokenizer (None: it has none of its own) reads the rows' ids as they are."""
        usable = self.shared.usable
        if rows < usable or tokenizer is None:
            return rows >= usable
        try:
            return vocabulary.usable_ids(self.shared.tokenizer, tokenizer, usable, rows) == usable
        except Refusal:
            return False


def _kept(scorer: _Scorer, name: str, ratio: float) -> Rows:
    recipe, shared, device = scorer.recipe, scorer.shared, scorer.ranks.device
    key, theirs = "data.select.reference", load.load_tokenizer("data.select.reference", name)
    config = load.load_config(key, name).get_text_config()
    same = scorer.same_tokens(theirs, config.vocab_size)
    if not same:
        _refuse_unreadable(name, theirs, config)
    shown = {"per": "token" if same else "byte", "dtype": str(scorer.dtype)}
    teacher = recipe.one_teacher
    assert teacher is not None  # recipe_rules

    def of_teacher() -> dict[str, Any]:
        options = {"revision": teacher.revision, "gguf_file": teacher.gguf_file}
        model = load.fingerprint("teacher", str(teacher.model), **options)
        fold = sorted(recipe.vocabulary.fold.items())
        return {**shown, "model": model, "weights": teacher.dtype, "usable": shared.usable, "fold": fold}

    def of_reference() -> dict[str, Any]:
        usable = shared.usable if same else tokenizer_fingerprint(theirs)
        return {**shown, "model": load.fingerprint(key, name), "weights": "auto", "usable": usable, "fold": []}

    def teacher_reads() -> Read:
        signal = scorer.teacher()
        return reading.by_token(signal, device) if same else reading.by_byte(signal, device, shared.tokenizer)

    def reference_reads() -> Read:
        if same:
            split = scorer.reference(key, name, shared.usable)
            return reading.by_token(lambda batch: split(batch.input_ids), device)
        split = scorer.reference(key, name, vocabulary.tokenizer_usable_ids(theirs, config.vocab_size))
        return reading.by_byte_of_another(split, theirs, shared.tokenizer)

    first, second = scorer.scoring(of_teacher), scorer.scoring(of_reference)
    ours = scorer.scores("the teacher", first, teacher_reads)
    other = scorer.scores("the reference", second, reference_reads)
    _refuse_other_rows(first, second, ours, other)
    kept = select.difference(_means(ours), _means(other), ratio)
    found = select.Kept(scorer.rows, kept)
    scorer.say(f"selection: {len(kept):,} of {len(scorer.rows):,} rows, {found.tokens:,} tokens (by {shown['per']})")
    return found


def _means(table: np.ndarray) -> np.ndarray:
    return table["nll"] / np.maximum(table["weight"], 1)


def _refuse_unreadable(name: str, tokenizer: Any | None, config: Any) -> None:
    if tokenizer is None or reading.marks(tokenizer, config)[0] is None:
        raise Refusal(
            f"data.select.reference: {name!r} has another vocabulary than the teacher and no tokenizer with a begin or "
            "end token to read the text with; save one into it, or take another reference"
        )


def _refuse_other_rows(first: Scoring, second: Scoring, teacher: np.ndarray, reference: np.ndarray) -> None:
    """Both must have read the same: equal lengths, and 64 rows with the same ids."""
    same = first.manifest["instances"] == second.manifest["instances"]
    if not same or not np.array_equal(teacher["weight"], reference["weight"]):
        raise Refusal(
            f"{first.folder} and {second.folder} were not made of the same rows; delete both folders to score anew"
        )


def _with_reference(scorer: _Scorer, name: str, ratio: float) -> Rows:
    key, shared = "objective.tokens.reference", scorer.shared
    theirs, config = load.load_tokenizer(key, name), load.load_config(key, name).get_text_config()
    if not scorer.same_tokens(theirs, config.vocab_size):
        raise Refusal(
            f"{key}: {name!r} has another vocabulary than the student; losses are compared token by token, so take a "
            "reference with the student's tokenizer"
        )

    def made_of() -> dict[str, Any]:
        return {
            "per": "position",
            "dtype": str(scorer.dtype),
            "model": load.fingerprint(key, name),
            "usable": shared.usable,
        }

    def reads() -> Read:
        split = scorer.reference(key, name, shared.usable)
        return reading.each_token(lambda batch: split(batch.input_ids), scorer.ranks.device)

    scoring = scorer.scoring(made_of, per_token=True)
    losses = scorer.scores("the reference", scoring, reads)
    return select.WithReference(scorer.rows, losses, ratio, choice=scoring.manifest["xxh3_128"])
