"""Recipe -> parts, in the order of the way: vocabulary, corpus, tokens, rows, models."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from tailkd import folder
from tailkd.data import packing, tokens
from tailkd.data.batches import evaluation_batches, rows_per_rank
from tailkd.data.corpus import BadRecords, Source
from tailkd.data.packing import Rows
from tailkd.errors import Refusal
from tailkd.evaluate.heldout import HeldOut
from tailkd.evaluate.heldout import evaluate as evaluate_heldout
from tailkd.models import load, precision, vocabulary
from tailkd.models.head import SplitModel
from tailkd.recipe import Recipe
from tailkd.recipe import Source as SourceSection
from tailkd.teacher.live import LiveTeacher
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
    teacher: LiveTeacher | None
    train_rows: Rows
    heldout_rows: Rows
    ranks: Ranks = ALONE

    @property
    def fingerprint(self) -> str:
        """Of the documents on both sides of the split and of the tokenizer: what a resumed run must share."""
        digest = xxhash.xxh3_128()
        for rows in (self.train_rows, self.heldout_rows):
            digest.update(rows.store.hashes[rows.documents].tobytes())
            digest.update(str(rows.store.manifest["made_of"]["tokenizer"]).encode())
        return digest.hexdigest()

    @property
    def data(self) -> dict[str, Any]:
        """What the corpus gave: documents and tokens on both sides of the split, and what was skipped."""
        stores = {rows.store.folder: rows.store.manifest for rows in (self.train_rows, self.heldout_rows)}
        return {
            "train": {"documents": len(self.train_rows.documents), "tokens": self.train_rows.tokens},
            "heldout": {"documents": len(self.heldout_rows.documents), "tokens": self.heldout_rows.tokens},
            "skipped": sum((Counter(manifest["skipped"]) for manifest in stores.values()), Counter()),
            "skipped_named": [name for manifest in stores.values() for name in manifest["skipped_named"]],
        }

    def measure(self, student: SplitModel, heed: Callable[[], None] = nothing_asked) -> HeldOut:
        """Held-out measures of `student` against the teacher; `heed` is called between batches and may raise."""
        settings = self.recipe.evaluate
        batches = evaluation_batches(self.heldout_rows, tokens=settings.tokens, batch_size=settings.batch_size)
        return evaluate_heldout(student, self.teacher, batches, top_k=settings.top_k, ranks=self.ranks, heed=heed)


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer that both models share, the ids they share, and the token that begins a row."""

    tokenizer: Any
    usable: int
    begin: int | None


def build(recipe: Recipe, say: Say, *, student: str | None = None, ranks: Ranks = ALONE) -> Parts:
    """Corpus, tokens, batches, models of a recipe; `student` is a folder to load instead of the recipe's own."""
    device = ranks.device
    rows_per_rank(recipe.training.batch_size, ranks.world)
    dtype = precision.resolve(recipe.training.precision, device)
    _refuse_device(recipe, device)
    shared = read_vocabulary(recipe)
    folder.refuse_small_disk(recipe.folder, _run_bytes(recipe))
    with ranks.in_turns():
        train_rows, heldout_rows = prepare(recipe, shared, say)
    torch.manual_seed(recipe.training.seed)
    student_model = load.load_model(
        "student",
        student or recipe.student.model,
        dtype=torch.float32,
        device=device,
        revision=None if student else recipe.student.revision,
        attention=recipe.student.attention,
        remote_code=recipe.student.remote_code,
    )
    split = SplitModel(student_model, usable=shared.usable, compute_dtype=dtype).prove()
    split.model = shard(split.model, ranks, recipe.training.strategy)
    teacher = _teacher(recipe, shared, ranks, dtype)
    return Parts(recipe, shared.tokenizer, split, teacher, train_rows, heldout_rows, ranks)


GPU_ATTENTION = ("flash_attention_2",)


def _refuse_device(recipe: Recipe, device: torch.device) -> None:
    for role, model in (("teacher", recipe.teacher), ("student", recipe.student)):
        if model is not None and model.attention in GPU_ATTENTION and device.type != "cuda":
            raise Refusal(f"{role}.attention is {model.attention!r}, which needs a GPU; take 'auto' here")


def _run_bytes(recipe: Recipe) -> int:
    """Bytes of a run's checkpoints (weights and two moments, one more than are kept) and of its student."""
    options = {"revision": recipe.student.revision, "remote_code": recipe.student.remote_code}
    config = load.load_config("student", recipe.student.model, **options)
    parameters = load.count_parameters(config, remote_code=recipe.student.remote_code)
    return 4 * parameters * (3 * (recipe.training.keep_checkpoints + 1) + 1)


def _teacher(recipe: Recipe, shared: Vocabulary, ranks: Ranks, dtype: torch.dtype) -> LiveTeacher | None:
    if recipe.teacher is None:
        return None
    sharded = recipe.teacher.sharded and ranks.world > 1
    model = load.load_model(
        "teacher",
        recipe.teacher.model,
        dtype=dtype if recipe.teacher.dtype == "auto" else getattr(torch, recipe.teacher.dtype),
        device=torch.device("cpu") if sharded else ranks.device,
        revision=recipe.teacher.revision,
        attention=recipe.teacher.attention,
        remote_code=recipe.teacher.remote_code,
    )
    model = place_teacher(model, ranks, sharded=sharded)
    return LiveTeacher(model, usable=shared.usable, compute_dtype=dtype)


def read_vocabulary(recipe: Recipe) -> Vocabulary:
    """Tokenizers and configurations alone: the proof that teacher and student speak of the same ids."""
    student = _tokenizer_and_rows("student", recipe.student)
    if recipe.teacher is None:
        tokenizer, config = student
        if tokenizer is None:
            raise Refusal(f"student.model: {recipe.student.model!r} holds no tokenizer; save one into it")
        usable = vocabulary.tokenizer_usable_ids(tokenizer, _vocabulary_rows(config))
        return Vocabulary(tokenizer, usable, _begin_token(recipe, tokenizer))
    teacher = _tokenizer_and_rows("teacher", recipe.teacher)
    tokenizer = student[0] or teacher[0]
    if tokenizer is None:
        raise Refusal("neither the teacher's nor the student's folder holds a tokenizer; save one into either")
    usable = vocabulary.usable_ids(
        teacher[0] or tokenizer, tokenizer, _vocabulary_rows(teacher[1]), _vocabulary_rows(student[1])
    )
    return Vocabulary(tokenizer, usable, _begin_token(recipe, tokenizer))


def _tokenizer_and_rows(role: str, model: Any) -> tuple[Any | None, Any]:
    options = {"revision": model.revision, "remote_code": model.remote_code}
    return load.load_tokenizer(role, model.model, **options), load.load_config(role, model.model, **options)


def _vocabulary_rows(config: Any) -> int:
    return config.get_text_config().vocab_size


def _begin_token(recipe: Recipe, tokenizer: Any) -> int | None:
    begin = tokenizer.bos_token_id
    if recipe.data.bos == "never":
        return None
    if recipe.data.bos == "always":
        if begin is None:
            raise Refusal(
                "data.bos is 'always' but the tokenizer has no begin token (bos_token); take 'auto' or 'never'"
            )
        return begin
    ids = tokenizer("a")["input_ids"]
    return begin if begin is not None and ids and ids[0] == begin else None


def prepare(recipe: Recipe, shared: Vocabulary, say: Say) -> tuple[Rows, Rows]:
    """Training rows and held-out rows, from token stores that are made where they do not lie ready."""
    data, own = recipe.data, recipe.data.heldout.fraction is None
    corpus = source(data.train)
    check_saved_tokenizer(recipe, shared, corpus)
    store_folder = Path(data.store or os.environ.get("TAILKD_CACHE") or "~/.cache/tailkd/tokens").expanduser()

    def store(section: Source) -> tokens.TokenStore:
        return tokens.prepare(
            section, shared.tokenizer, store_folder, usable=shared.usable, max_bad=data.max_bad, say=say
        )

    def rows(of: tokens.TokenStore, documents: np.ndarray) -> Rows:
        end = shared.tokenizer.eos_token_id
        return Rows(of, documents, context=data.context, begin=shared.begin, end=end)

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
    skipped = corpus_store.manifest["skipped"]
    if skipped:
        say("data: skipped " + ", ".join(f"{count:,} records: {reason}" for reason, count in skipped.items()))
    return train_rows, heldout_rows


def source(section: SourceSection) -> Source:
    """The corpus that a recipe's section names."""
    values = section.model_dump(exclude={"fraction"})
    return Source(**values)


def check_saved_tokenizer(recipe: Recipe, shared: Vocabulary, corpus: Source) -> None:
    """Refuse a tokenizer that the student's folder would not give back; see `load.check_saved_tokenizer`."""
    options = {"revision": recipe.student.revision, "remote_code": recipe.student.remote_code}
    config = load.load_config("student", recipe.student.model, **options)
    texts = [document.text[:2000] for document in islice(corpus.documents(BadRecords()), 100)]
    load.check_saved_tokenizer(shared.tokenizer, config, texts)


def _refuse_split(train_rows: Rows, heldout_rows: Rows) -> None:
    for name, rows in (("train on", train_rows), ("hold out", heldout_rows)):
        if rows.predicted < 1:
            raise Refusal(
                f"no token is left to {name}: {len(rows.documents):,} documents with {rows.tokens:,} tokens; give more "
                "text, or documents that are not all held out as well"
            )
    if heldout_rows.store is not train_rows.store and heldout_rows.tokens > train_rows.tokens:
        raise Refusal(
            f"data.heldout has {heldout_rows.tokens:,} tokens, more than the {train_rows.tokens:,} to train on; hold "
            "fewer out (the two may have been exchanged)"
        )
