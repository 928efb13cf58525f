"""Recipe -> parts, in the order of the way: vocabulary, corpus, tokens, rows, models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import xxhash

from tailkd import cache, folder, pair, selection
from tailkd.corpora import Say, counted, prepare
from tailkd.data.batches import evaluation_batches, rows_per_rank
from tailkd.data.mixture import AnyRows, Mixture, parts_of, row_shown
from tailkd.errors import Refusal
from tailkd.evaluate.heldout import HeldOut
from tailkd.evaluate.heldout import evaluate as evaluate_heldout
from tailkd.models import load, precision
from tailkd.models.head import PROJECTIONS, SplitModel
from tailkd.objective.hidden import Hidden, projections
from tailkd.recipe import Recipe
from tailkd.teacher.cache import CachedTeacher
from tailkd.teacher.live import LiveTeacher, LiveTeachers, Teacher
from tailkd.train.parallel import place_teacher, shard
from tailkd.train.ranks import ALONE, Ranks
from tailkd.train.step import nothing_asked


@dataclass(frozen=True)
class Parts:
    """What a run is made of: both models, the rows to train and to measure on.

    teacher: with which held-out measures compare. cached: what training reads in its place, where there is a cache.
    """

    recipe: Recipe
    tokenizer: Any
    student: SplitModel
    teacher: Teacher | None
    train_rows: AnyRows
    heldout_rows: AnyRows
    hidden: Hidden | None = None
    ranks: Ranks = ALONE
    cached: CachedTeacher | None = None

    @property
    def teaches(self) -> Teacher | CachedTeacher | None:
        """What the student learns from."""
        return self.teacher if self.cached is None else self.cached

    @property
    def fingerprint(self) -> str:
        """Of the documents on both sides of the split, the tokenizer and what scores chose: a resumed run's too."""
        digest = xxhash.xxh3_128()
        for rows in (*parts_of(self.train_rows), *parts_of(self.heldout_rows)):
            digest.update(rows.store.hashes[rows.documents].tobytes())
            made_of = rows.store.manifest["made_of"]
            digest.update(str(made_of["tokenizer"]).encode())
            if "rules" in made_of:
                digest.update(str((made_of["rules"], made_of["chat"])).encode("utf-8", "surrogatepass"))
        digest.update(self.train_rows.choice.encode())
        return digest.hexdigest()

    @property
    def data(self) -> dict[str, Any]:
        """What the corpora gave: documents and tokens on both sides of the split, epochs, and what was skipped.

        cut, dropped: of the documents, examples longer than a row; see `tailkd.data.documents.DocumentRows`.
        """
        sides = (*parts_of(self.train_rows), *parts_of(self.heldout_rows))
        stores = {rows.store.folder: rows.store.manifest for rows in sides}
        return {
            "train": counted(self.train_rows),
            "heldout": counted(self.heldout_rows),
            "sources": self._sources,
            "skipped": sum((Counter(manifest["skipped"]) for manifest in stores.values()), Counter()),
            "skipped_named": [name for manifest in stores.values() for name in manifest["skipped_named"]],
        }

    @property
    def _sources(self) -> dict[str, dict[str, Any]]:
        """By name: documents and tokens to train on, and how often the run sees them."""
        rows, samples = self.train_rows, self.recipe.steps * self.recipe.training.batch_size
        epochs = rows.epochs(samples) if isinstance(rows, Mixture) else [samples / len(rows)]
        named = zip(self.recipe.data.names, parts_of(rows), epochs, strict=True)
        return {name: {**counted(part), "epochs": times} for name, part, times in named}

    def measure(self, student: SplitModel | Teacher, heed: Callable[[], None] = nothing_asked) -> HeldOut:
        """Held-out measures of `student`, or of the teacher itself, against the teacher.

        `heed` is called between batches and may raise.
        """
        settings = self.recipe.evaluate
        batches = evaluation_batches(self.heldout_rows, tokens=settings.tokens, batch_size=settings.batch_size)
        return evaluate_heldout(
            student, self.teacher, batches, top_k=settings.top_k, ranks=self.ranks, heed=heed, group=self._group
        )

    @property
    def _group(self) -> Callable[[int], str] | None:
        """The source of a held-out sample, where there are several."""
        rows = self.heldout_rows
        return (lambda s: rows.names[rows.source_of(row_shown(rows, s, 0))]) if isinstance(rows, Mixture) else None


def build(
    recipe: Recipe,
    say: Say,
    *,
    student: str | None = None,
    ranks: Ranks = ALONE,
    scored: bool = True,
    heed: Callable[[], None] = nothing_asked,
) -> Parts:
    """Corpus, tokens, batches, models of a recipe; `student` is a folder to load instead of the recipe's own.

    scored: choose rows or tokens by scores, which are made where they do not lie ready (`heed` may stop that); without,
    all rows are there, and a reference's losses are 0.
    """
    device = ranks.device
    rows_per_rank(recipe.training.batch_size, ranks.world)
    dtype = precision.resolve(recipe.training.precision, device)
    apart = recipe.data.packing == "documents"
    pair.refuse_device(recipe, device)
    shared = pair.read_vocabulary(recipe)
    folder.refuse_small_disk(recipe.folder, _run_bytes(recipe))
    with ranks.in_turns():
        train_rows, heldout_rows = prepare(recipe, shared, say)
    if scored:
        train_rows = selection.chosen(recipe, shared, train_rows, ranks=ranks, heed=heed, say=say)
    else:
        train_rows = selection.unscored(recipe, train_rows)
    training = student is None and (scored or recipe.data.select is None)
    cached = cache.opened(recipe, shared, train_rows, ranks) if training else None
    teachers = {
        key: pair.load_teacher(recipe, torch.device("cpu") if one.sharded and ranks.world > 1 else device, key)
        for key, one in recipe.teachers.items()
    }
    student_model = pair.load_student(recipe, teachers.get("teacher"), device, student)
    hidden = _hidden(recipe, student_model, teachers.get("teacher"), cached)
    split = SplitModel(student_model, usable=shared.usable, compute_dtype=dtype).prove()
    if apart:
        split.prove_documents()
    split.model = shard(split.model, ranks, recipe.training.strategy)
    teacher = _teacher(recipe, teachers, shared.usable, ranks)
    return Parts(recipe, shared.tokenizer, split, teacher, train_rows, heldout_rows, hidden, ranks, cached)


def _teacher(recipe: Recipe, models: dict[str, Any], usable: int, ranks: Ranks) -> Teacher | None:
    """The teachers on their places: one, or the mixture of several."""
    dtype, fold = precision.resolve(recipe.training.precision, ranks.device), recipe.vocabulary.fold
    each = []
    for key, one in recipe.teachers.items():
        placed = place_teacher(models[key], ranks, sharded=one.sharded)
        each.append(LiveTeacher(placed, usable=usable, compute_dtype=dtype, fold=fold))
        if recipe.data.packing == "documents":
            each[-1].split.prove_documents()
    if isinstance(recipe.teacher, tuple):
        return LiveTeachers(each, [one.weight for one in recipe.teacher])
    return each[0] if each else None


def _hidden(recipe: Recipe, student: Any, teacher: Any | None, cached: CachedTeacher | None) -> Hidden | None:
    """What is compared of the hidden states; learned projections become a part of the student's model."""
    asked = recipe.objective.hidden
    if asked is None:
        return None
    widths = [model.config.get_text_config().hidden_size for model in (student, teacher) if model is not None]
    if teacher is None and cached is not None:
        widths.append(cached.cache.payload.width)
    if asked.project:
        count = 1 if asked.pairs == "last" else len(asked.pairs)
        images = projections(widths[0], widths[1], count, seed=recipe.training.seed)
        student.add_module(PROJECTIONS, images.to(student.device))
    elif widths[0] != widths[1]:
        raise Refusal(
            f"objective.hidden compares states of width {widths[0]} (student) and {widths[1]} (teacher); set "
            "objective.hidden.project: true, or give the student the teacher's hidden_size"
        )
    return Hidden(**asked.model_dump())


def _run_bytes(recipe: Recipe) -> int:
    """Bytes of a run's checkpoints (weights and two moments, one more than are kept) and of its student."""
    config = pair.configurations(recipe)[1]
    parameters = load.count_parameters(config, remote_code=recipe.student.remote_code)
    return 4 * parameters * (3 * (recipe.training.keep_checkpoints + 1) + 1)
