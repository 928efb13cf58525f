"""Recipe -> parts, in the order of the way: vocabulary, corpus, tokens, rows, models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
import xxhash

from tailkd import folder, pair, selection
from tailkd.data import packing, tokens
from tailkd.data.batches import evaluation_batches, rows_per_rank
from tailkd.data.corpus import BadRecords, Source
from tailkd.data.documents import DocumentRows
from tailkd.data.packing import Rows
from tailkd.errors import Refusal
from tailkd.evaluate.heldout import HeldOut
from tailkd.evaluate.heldout import evaluate as evaluate_heldout
from tailkd.models import load, precision
from tailkd.models.head import PROJECTIONS, SplitModel
from tailkd.objective.hidden import Hidden, projections
from tailkd.pair import Vocabulary
from tailkd.recipe import Recipe
from tailkd.recipe_data import Source as SourceSection
from tailkd.teacher.live import LiveTeacher, LiveTeachers, Teacher
from tailkd.train.parallel import place_teacher, shard
from tailkd.train.ranks import ALONE, Ranks
from tailkd.train.step import nothing_asked

Say = Callable[[str], None]


@dataclass(frozen=True)
class Parts:
    """What a run is made of: both models, the rows to train and to measure on."""

    recipe: Recipe
    tokenizer: Any
    student: SplitModel
    teacher: Teacher | None
    train_rows: Rows
    heldout_rows: Rows
    hidden: Hidden | None = None
    ranks: Ranks = ALONE

    @property
    def fingerprint(self) -> str:
        """Of the documents on both sides of the split, the tokenizer and what scores chose: a resumed run's too."""
        digest = xxhash.xxh3_128()
        for rows in (self.train_rows, self.heldout_rows):
            digest.update(rows.store.hashes[rows.documents].tobytes())
            made_of = rows.store.manifest["made_of"]
            digest.update(str(made_of["tokenizer"]).encode())
            if "rules" in made_of:
                digest.update(str((made_of["rules"], made_of["chat"])).encode("utf-8", "surrogatepass"))
        digest.update(self.train_rows.choice.encode())
        return digest.hexdigest()

    @property
    def data(self) -> dict[str, Any]:
        """What the corpus gave: documents and tokens on both sides of the split, and what was skipped.

        cut, dropped: of the documents, examples longer than a row; see `tailkd.data.documents.DocumentRows`.
        """
        sides = {"train": self.train_rows, "heldout": self.heldout_rows}
        stores = {rows.store.folder: rows.store.manifest for rows in (self.train_rows, self.heldout_rows)}
        return {
            **{
                side: {"documents": len(r.documents), "tokens": r.tokens, "cut": r.cut, "dropped": r.dropped}
                for side, r in sides.items()
            },
            "skipped": sum((Counter(manifest["skipped"]) for manifest in stores.values()), Counter()),
            "skipped_named": [name for manifest in stores.values() for name in manifest["skipped_named"]],
        }

    def measure(self, student: SplitModel | Teacher, heed: Callable[[], None] = nothing_asked) -> HeldOut:
        """Held-out measures of `student`, or of the teacher itself, against the teacher.

        `heed` is called between batches and may raise.
        """
        settings = self.recipe.evaluate
        batches = evaluation_batches(self.heldout_rows, tokens=settings.tokens, batch_size=settings.batch_size)
        return evaluate_heldout(student, self.teacher, batches, top_k=settings.top_k, ranks=self.ranks, heed=heed)


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
    teachers = {
        key: pair.load_teacher(recipe, torch.device("cpu") if one.sharded and ranks.world > 1 else device, key)
        for key, one in recipe.teachers.items()
    }
    student_model = pair.load_student(recipe, teachers.get("teacher"), device, student)
    hidden = _hidden(recipe, student_model, teachers.get("teacher"))
    split = SplitModel(student_model, usable=shared.usable, compute_dtype=dtype).prove()
    if apart:
        split.prove_documents()
    split.model = shard(split.model, ranks, recipe.training.strategy)
    teacher = _teacher(recipe, teachers, shared.usable, ranks)
    return Parts(recipe, shared.tokenizer, split, teacher, train_rows, heldout_rows, hidden, ranks)


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


def _hidden(recipe: Recipe, student: Any, teacher: Any) -> Hidden | None:
    """What is compared of the hidden states; learned projections become a part of the student's model."""
    asked = recipe.objective.hidden
    if asked is None:
        return None
    widths = [model.config.get_text_config().hidden_size for model in (student, teacher)]
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


def prepare(recipe: Recipe, shared: Vocabulary, say: Say) -> tuple[Rows, Rows]:
    """Training rows and held-out rows, from token stores that are made where they do not lie ready."""
    data, own = recipe.data, recipe.data.heldout.fraction is None
    corpus = source(data.train)
    check_saved_tokenizer(recipe, shared, corpus)
    store_folder = folder.store(recipe)

    def store(section: Source) -> tokens.TokenStore:
        return tokens.prepare(
            section, shared.tokenizer, store_folder, usable=shared.usable, max_bad=data.max_bad, say=say
        )

    def rows(of: tokens.TokenStore, documents: np.ndarray) -> Rows:
        return packed(recipe, shared, of, documents)

    corpus_store = store(corpus)
    if own:
        heldout_store = store(source(data.heldout))
        training = packing.without(corpus_store.hashes, heldout_store.hashes)
        heldout = np.arange(len(heldout_store))
    else:
        heldout_store = corpus_store
        training, heldout = packing.split(corpus_store.hashes, data.heldout.fraction or 0.0)
    train_rows, heldout_rows = rows(corpus_store, training), rows(heldout_store, heldout)
    _refuse_split(train_rows, heldout_rows)
    say(
        f"data: {len(training):,} documents, {train_rows.tokens:,} tokens to train on; "
        f"{len(heldout):,} documents, {heldout_rows.tokens:,} tokens held out"
    )
    for side in (train_rows, heldout_rows):
        if side.cut or side.dropped:
            say(f"data: {told_cut(side)}")
    skipped = corpus_store.manifest["skipped"]
    if skipped:
        say("data: skipped " + ", ".join(f"{count:,} records: {reason}" for reason, count in skipped.items()))
    return train_rows, heldout_rows


def packed(recipe: Recipe, shared: Vocabulary, store: tokens.TokenStore, documents: np.ndarray) -> Rows:
    """Documents of a store in rows, as the recipe packs them."""
    kind = DocumentRows if recipe.data.packing == "documents" else Rows
    end = shared.tokenizer.eos_token_id
    return kind(store, documents, context=recipe.data.context, begin=shared.begin, end=end)


def told_cut(rows: Rows) -> str:
    """What became of the examples that are longer than a row."""
    return (
        f"{rows.cut + rows.dropped:,} of {len(rows.documents):,} examples are longer than data.context = "
        f"{rows.context:,}: {rows.cut:,} lost the left of their prompt, {rows.dropped:,} without room for a whole "
        "answer are left out"
    )


def source(section: SourceSection) -> Source:
    """The corpus that a recipe's section names."""
    values = section.model_dump(exclude={"fraction"})
    return Source(**values)


def check_saved_tokenizer(recipe: Recipe, shared: Vocabulary, corpus: Source) -> None:
    """Refuse a tokenizer that the student's folder would not give back; see `load.check_saved_tokenizer`."""
    config = pair.configurations(recipe)[1]
    texts = [document.text[:2000] for document in islice(corpus.documents(BadRecords()), 100)]
    load.check_saved_tokenizer(shared.tokenizer, config, texts)


def _refuse_split(train_rows: Rows, heldout_rows: Rows) -> None:
    for name, rows in (("train on", train_rows), ("hold out", heldout_rows)):
        if rows.predicted < 1:
            dropped = f" ({told_cut(rows)})" if rows.dropped else ""
            raise Refusal(
                f"no token is left to {name}: {len(rows.documents):,} documents with {rows.tokens:,} tokens{dropped}; "
                "give more text, a longer context, or documents that are not all held out as well"
            )
    if heldout_rows.store is not train_rows.store and heldout_rows.tokens > train_rows.tokens:
        raise Refusal(
            f"data.heldout has {heldout_rows.tokens:,} tokens, more than the {train_rows.tokens:,} to train on; hold "
            "fewer out (the two may have been exchanged)"
        )
