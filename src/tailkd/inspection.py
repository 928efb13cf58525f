"""`tailkd check`: what a run needs, what it costs and what would break it, before it."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from tailkd import folder, pair
from tailkd.bill import bill, settled
from tailkd.data import tokens
from tailkd.data.corpus import BadRecords, Document, Source
from tailkd.errors import Refusal
from tailkd.pair import Vocabulary
from tailkd.parts import check_saved_tokenizer, source
from tailkd.recipe import Recipe
from tailkd.recipe_problems import Problem, RecipeRefusal
from tailkd.report.record import Run

T = TypeVar("T")
SAMPLE, SHOWN = 1000, 2  # documents that are looked at, rows that are shown
BORDER = " ⏐ "


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

    budget = tried("training", lambda: settled(recipe))
    shared = tried("vocabulary", lambda: pair.read_vocabulary(recipe))
    corpus = None if shared is None else tried("data", lambda: _corpus(recipe, shared))
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
        "corpus": corpus,
        "licences": _licences(recipe),
        **made_out.as_dict(),
    }


def _vocabulary(recipe: Recipe, shared: Vocabulary) -> dict[str, Any]:
    theirs, ours = pair.configurations(recipe)
    begin = None if shared.begin is None else shared.tokenizer.convert_ids_to_tokens(shared.begin)
    return {
        "usable_ids": shared.usable,
        "teacher_rows": None if theirs is None else theirs.get_text_config().vocab_size,
        "student_rows": ours.get_text_config().vocab_size,
        "folded": {str(source): target for source, target in recipe.vocabulary.fold.items()},
        "begin_token": begin,
        "end_token": shared.tokenizer.eos_token,
    }


def _corpus(recipe: Recipe, shared: Vocabulary) -> dict[str, Any]:
    bad, corpus = BadRecords(), source(recipe.data.train)
    documents = corpus.documents(bad)
    sample = list(islice(documents, SAMPLE))
    tokens.refuse_bad(bad, len(sample), recipe.data.max_bad, corpus)
    check_saved_tokenizer(recipe, shared, corpus)
    texts = [document.text for document in sample]
    ids = shared.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    counted = sum(len(document) + 1 for document in ids)
    return {
        "sampled_documents": len(sample),
        "sampled_tokens": counted,
        "tokens": counted if len(sample) < SAMPLE else _estimated(corpus, sample, counted),
        "exact": len(sample) < SAMPLE,
        "bad_records": bad.counts,
        "bad_records_named": bad.named,
        "rows": _rows(recipe, shared, ids),
    }


def _estimated(corpus: Source, sample: list[Document], counted: int) -> int | None:
    """Tokens of files by their size, from those of the sample; None for a hub data set or packed files."""
    if corpus.path is None or any(path.suffix in (".gz", ".parquet") for path in corpus.files()):
        return None
    letters = sum(len(document.text.encode()) for document in sample)
    return round(counted / letters * sum(path.stat().st_size for path in corpus.files()))


def _rows(recipe: Recipe, shared: Vocabulary, ids: list[list[int]]) -> list[str]:
    """The first rows as the models read them, with borders between documents; every token of them is learned."""
    end, run = shared.tokenizer.eos_token_id, []
    for document in ids:
        run += [*document, end]
        if len(run) >= SHOWN * recipe.data.context:
            break
    begin = [] if shared.begin is None else [shared.begin]
    width = recipe.data.context
    rows = [begin + run[at : at + width - len(begin)] for at in range(0, min(len(run), SHOWN * width), width)]
    mark = shared.tokenizer.decode([end])
    return [shared.tokenizer.decode(row).replace(mark, mark + BORDER) for row in rows]


def _licences(recipe: Recipe) -> dict[str, str | None]:
    """What the model folders' cards say; None where they say nothing."""
    models = {"teacher": recipe.teacher, "student": recipe.student}
    return {role: _licence(model.model) for role, model in models.items() if model is not None and model.model}


def _licence(model: str) -> str | None:
    card = Path(model).expanduser() / "README.md"
    if not card.is_file():
        return None
    found = re.search(r"^license:\s*(\S+)", card.read_text("utf-8", errors="replace"), re.MULTILINE)
    return found.group(1) if found else None
