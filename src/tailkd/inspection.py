"""`tailkd check`: what a run needs, what it costs and what would break it, before it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from tailkd import cache, folder, pair
from tailkd.bill import bill
from tailkd.corpora import check_saved_tokenizer, overlap_of, packed, settled, source, told_cut
from tailkd.data import tokens
from tailkd.data.chat import Encoded
from tailkd.data.corpus import BadRecords, Document, Source
from tailkd.data.encoding import encode
from tailkd.data.packing import IGNORED, Rows
from tailkd.errors import Refusal
from tailkd.pair import Vocabulary
from tailkd.recipe import Recipe
from tailkd.recipe_data import TrainSource
from tailkd.recipe_problems import Problem, RecipeRefusal
from tailkd.report.origins import origins
from tailkd.report.record import Run

T = TypeVar("T")
SAMPLE, SHOWN = 1000, 2  # documents that are looked at, rows that are shown
BORDER, LEARNED = " ⏐ ", ("⟦", "⟧")


def check(recipe: Recipe, refused: RecipeRefusal | None = None) -> dict[str, Any]:
    """Everything that can be known without weights: bill, vocabulary, a sample of the corpus.

    Args:
        refused: what is wrong with the recipe already; the rest of it is looked at all the same.

    Raises:
        RecipeRefusal: with what was wrong before and what is found here, all at once.
    """
    problems = list(refused.problems) if refused else []

    def tried(key: str, work: Callable[[], T]) -> T | None:
        if any(problem.key.startswith(key) for problem in problems):
            return None
        try:
            return work()
        except Refusal as refusal:
            problems.append(Problem(key, str(refusal)))
            return None

    shared = tried("vocabulary", lambda: pair.read_vocabulary(recipe))
    if shared is not None:
        tried("teacher.cache", lambda: cache.refuse_unfit(recipe, shared))
    corpus = None if shared is None else tried("data", lambda: _corpora(recipe, shared))
    unknown = corpus is None and recipe.training.epochs is not None
    budget = None if unknown else tried("training", lambda: settled(recipe, lambda line: None))
    made_out = None if budget is None else tried("student", lambda: bill(budget, usable=shared and shared.usable))
    if budget is not None:
        tried("out", lambda: folder.already_finished(budget, Run(budget.folder)))
    if problems or budget is None or shared is None or corpus is None or made_out is None:
        raise RecipeRefusal(
            refused.name if refused else recipe.name, problems, refused.places if refused else {}, recipe
        )
    return {
        "name": recipe.name,
        "folder": str(recipe.folder),
        "divergence": recipe.objective.divergence,
        "steps": budget.steps,
        "tokens": budget.tokens,
        "vocabulary": _vocabulary(recipe, shared),
        "corpus": _with_epochs(budget, corpus),
        "licences": {role: one["card"].get("license") for role, one in origins(recipe.resolved())["models"].items()},
        **made_out.as_dict(),
    }


def _vocabulary(recipe: Recipe, shared: Vocabulary) -> dict[str, Any]:
    theirs, ours = pair.configurations(recipe)
    rows = [config.get_text_config().vocab_size for config in theirs.values()]
    begin = None if shared.begin is None else shared.tokenizer.convert_ids_to_tokens(shared.begin)
    return {
        "usable_ids": shared.usable,
        "teacher_rows": rows if isinstance(recipe.teacher, tuple) else rows[0] if rows else None,
        "student_rows": ours.get_text_config().vocab_size,
        "folded": {str(source): target for source, target in recipe.vocabulary.fold.items()},
        "begin_token": begin,
        "end_token": shared.tokenizer.eos_token,
    }


def _corpora(recipe: Recipe, shared: Vocabulary) -> dict[str, Any]:
    """A sample of the corpus, or of each."""
    found = {
        name: _corpus(recipe, shared, one) for name, one in zip(recipe.data.names, recipe.data.sources, strict=True)
    }
    if len(found) == 1:
        return next(iter(found.values()))
    counts = [one["tokens"] for one in found.values()]
    total = None if None in counts else sum(counts)
    return {"sources": found, "tokens": total, "exact": all(one["exact"] for one in found.values())}


def _with_epochs(budget: Recipe, corpus: dict[str, Any]) -> dict[str, Any]:
    """How often the run sees each corpus, from the tokens counted or estimated; None where they are not known."""
    fraction = budget.data.heldout.fraction or 0.0
    total = corpus["tokens"]

    def epochs(tokens: int | None, seen: float) -> float | None:
        return None if not tokens else seen / (tokens * (1 - fraction))

    if "sources" not in corpus:
        return {**corpus, "epochs": epochs(total, budget.tokens)}
    weights = [source.weight for source in budget.data.sources]
    shares = [None if weight is None else weight / sum(w or 0 for w in weights) for weight in weights]
    for one, share in zip(corpus["sources"].values(), shares, strict=True):
        one["epochs"] = epochs(total, budget.tokens) if share is None else epochs(one["tokens"], share * budget.tokens)
    return corpus


def _corpus(recipe: Recipe, shared: Vocabulary, section: TrainSource) -> dict[str, Any]:
    bad, corpus = BadRecords(), source(section)
    documents = corpus.documents(bad)
    sample = list(islice(documents, SAMPLE))
    tokens.refuse_bad(bad, len(sample), recipe.data.max_bad, corpus)
    check_saved_tokenizer(recipe, shared, corpus)
    encoded = [
        (document, ids)
        for document, ids in zip(sample, encode(shared.tokenizer, sample), strict=True)
        if _usable(document, ids, bad)
    ]
    tokens.refuse_bad(bad, len(encoded), recipe.data.max_bad, corpus)
    store = tokens.held([ids for _, ids in encoded])
    rows = packed(recipe, shared, store, np.arange(len(encoded)))
    learned = rows.tokens if store.loss is None else int(store.loss.sum())
    overlap = overlap_of(recipe)
    found = {} if overlap is None else {"sampled_overlaps": sum(overlap.found(d.text) for d, _ in encoded)}
    return {
        "sampled_documents": len(encoded),
        "sampled_tokens": rows.tokens,
        "sampled_tokens_learned": learned,
        **found,
        "tokens": _limited(section, rows.tokens if len(sample) < SAMPLE else _estimated(corpus, sample, rows.tokens)),
        "exact": len(sample) < SAMPLE,
        "longer_than_context": told_cut(rows) if rows.cut or rows.dropped else None,
        "bad_records": bad.counts,
        "bad_records_named": bad.named,
        "rows": [_shown(rows, number, shared.tokenizer) for number in range(min(SHOWN, len(rows)))],
    }


def _usable(document: Document, encoded: Encoded, bad: BadRecords) -> bool:
    if encoded.unusable is not None:
        bad.add(document.id, *encoded.unusable)
    return encoded.unusable is None


def _limited(section: TrainSource, counted: int | None) -> int | None:
    """No more than the source's own limit, which also stands where the number is not known."""
    return counted if section.tokens is None else min(counted or section.tokens, section.tokens)


def _estimated(corpus: Source, sample: list[Document], counted: int) -> int | None:
    """Tokens of files by their size, from those of the sample; None for a hub data set or packed files."""
    if corpus.path is None or any(path.suffix in (".gz", ".parquet", ".zip") for path in corpus.files()):
        return None
    letters = sum(len(document.text.encode()) for document in sample)
    return round(counted / letters * sum(path.stat().st_size for path in corpus.files()))


def _shown(rows: Rows, number: int, tokenizer: Any) -> str:
    """A row as the models read it, borders between its documents; where not all of it is learned, what is in marks."""
    row = rows[number]
    if row.positions is None:
        filled = min(rows.context, rows.predicted - number * rows.context)
        changes = np.flatnonzero(np.diff(row.segments[:filled])) + 1
        learned = np.concatenate([[False], row.labels[: filled - 1] != IGNORED])
        pieces = list(zip(np.split(row.input_ids[:filled], changes), np.split(learned, changes), strict=True))
    else:
        places = np.split(np.arange(rows.context), np.flatnonzero(np.diff(row.segments)) + 1)
        labelled = [place for place in places if (row.labels[place] != IGNORED).any()]
        pieces = [
            (
                np.concatenate([row.input_ids[place], row.labels[place[-1:]]]),
                np.concatenate([[False], row.labels[place] != IGNORED]),
            )
            for place in labelled
        ]
    marks = ("", "") if rows.store.loss is None else LEARNED
    return BORDER.join(_marked(ids, learned, marks, tokenizer) for ids, learned in pieces)


def _marked(ids: np.ndarray, learned: np.ndarray, marks: tuple[str, str], tokenizer: Any) -> str:
    if not any(marks):
        return tokenizer.decode(ids)
    changes = np.flatnonzero(np.diff(learned)) + 1
    runs = zip(np.split(ids, changes), np.split(learned, changes), strict=True)
    texts = [(tokenizer.decode(run), bool(flags[0])) for run, flags in runs]
    return "".join(f"{marks[0]}{text}{marks[1]}" if is_learned else text for text, is_learned in texts)
