"""A recipe's corpora -> token stores -> rows to train on and rows held out."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import numpy as np

from tailkd import bill, folder, pair
from tailkd.data import packing, tokens
from tailkd.data.corpus import BadRecords, Source
from tailkd.data.documents import DocumentRows
from tailkd.data.mixture import AnyRows, Mixture, parts_of
from tailkd.data.overlap import Overlap
from tailkd.data.packing import Rows
from tailkd.data.tokens import Options, TokenStore
from tailkd.errors import Refusal
from tailkd.models import load
from tailkd.pair import Vocabulary
from tailkd.recipe import Recipe
from tailkd.recipe_data import Source as SourceSection

Say = Callable[[str], None]


def prepare(recipe: Recipe, shared: Vocabulary, say: Say) -> tuple[AnyRows, AnyRows]:
    """Training rows and held-out rows, from token stores that are made where they do not lie ready."""
    data = recipe.data
    trained, heldout = stores(recipe, shared, say)
    training = [np.arange(len(store)) for store in trained]
    if heldout is not None:
        held_rows = packed(recipe, shared, heldout, np.arange(len(heldout)))
        training = [packing.without(store.hashes, heldout.hashes) for store in trained]
    else:
        fraction = data.heldout.fraction or 0.0
        training, held = zip(*(packing.split(store.hashes, fraction) for store in trained), strict=True)
        training = _apart(trained, list(training), list(held))
        held_rows = _together(recipe, [packed(recipe, shared, *one) for one in zip(trained, held, strict=True)])
    if data.overlap is not None and data.overlap.drop:
        training = [kept[~store.overlaps[kept]] for store, kept in zip(trained, training, strict=True)]
    each = [packed(recipe, shared, *one) for one in zip(trained, training, strict=True)]
    _refuse_empty(recipe, each)
    train_rows = _together(recipe, each, tuple(source.weight for source in data.sources))
    _refuse_split(train_rows, held_rows, own=heldout is not None)
    _tell(recipe, trained, training, train_rows, held_rows, say)
    return train_rows, held_rows


def settled(recipe: Recipe, say: Say) -> Recipe:
    """`bill.settled`; a budget in epochs by the rows of the corpus, which is prepared where it does not lie ready."""
    if recipe.training.epochs is None:
        return bill.settled(recipe)
    train_rows, _ = prepare(recipe, pair.read_vocabulary(recipe), say)
    return bill.settled(recipe, rows=len(train_rows))


def stores(recipe: Recipe, shared: Vocabulary, say: Say) -> tuple[list[TokenStore], TokenStore | None]:
    """The token store of each corpus, and that of the held-out one if it is another."""
    data = recipe.data
    check_saved_tokenizer(recipe, shared, source(data.sources[0]))
    overlap = overlap_of(recipe)

    def store(section: SourceSection, options: Options) -> TokenStore:
        return tokens.prepare(
            source(section),
            shared.tokenizer,
            folder.store(recipe),
            usable=shared.usable,
            max_bad=data.max_bad,
            say=say,
            options=options,
        )

    trained = [store(one, Options(one.tokens, overlap, data.processes)) for one in data.sources]
    if data.heldout.fraction is not None:
        return trained, None
    return trained, store(data.heldout, Options(processes=data.processes))


def overlap_of(recipe: Recipe) -> Overlap | None:
    """The runs of words of the recipe's evaluation sets."""
    asked = recipe.data.overlap
    return None if asked is None else Overlap.of([source(one) for one in asked.sets], asked.words)


def source(section: SourceSection) -> Source:
    """The corpus that a recipe's section names."""
    values = section.model_dump(exclude={"fraction", "name", "weight", "tokens"})
    return Source(**values)


def check_saved_tokenizer(recipe: Recipe, shared: Vocabulary, corpus: Source) -> None:
    """Refuse a tokenizer that the student's folder would not give back; see `load.check_saved_tokenizer`."""
    config = pair.configurations(recipe)[1]
    texts = [document.text[:2000] for document in islice(corpus.documents(BadRecords()), 100)]
    load.check_saved_tokenizer(shared.tokenizer, config, texts)


def packed(recipe: Recipe, shared: Vocabulary, store: TokenStore, documents: np.ndarray) -> Rows:
    """Documents of a store in rows, as the recipe packs them."""
    kind = DocumentRows if recipe.data.packing == "documents" else Rows
    end = shared.tokenizer.eos_token_id
    return kind(store, documents, context=recipe.data.context, begin=shared.begin, end=end)


def _together(recipe: Recipe, parts: list[Rows], weights: tuple[float | None, ...] = ()) -> AnyRows:
    """The rows of several sources as one set; those of one source as they are."""
    if len(parts) == 1:
        return parts[0]
    given = [weight for weight in weights if weight is not None]
    return Mixture(parts, recipe.data.names, given or None)


def _apart(trained: list[TokenStore], training: list[np.ndarray], held: list[np.ndarray]) -> list[np.ndarray]:
    """No document is trained on that another source holds out."""
    if len(trained) == 1:
        return training
    hashes = np.concatenate([store.hashes[documents] for store, documents in zip(trained, held, strict=True)])
    return [kept[~np.isin(store.hashes[kept], hashes)] for store, kept in zip(trained, training, strict=True)]


def _tell(
    recipe: Recipe,
    trained: list[TokenStore],
    training: list[np.ndarray],
    train_rows: AnyRows,
    held_rows: AnyRows,
    say: Say,
) -> None:
    say(
        f"data: {sum(map(len, training)):,} documents, {train_rows.tokens:,} tokens to train on; "
        f"{counted(held_rows)['documents']:,} documents, {held_rows.tokens:,} tokens held out"
    )
    for rows in (train_rows, held_rows):
        if rows.cut or rows.dropped:
            say(f"data: {told_cut(rows)}")
    for store in trained:
        skipped = store.manifest["skipped"]
        if skipped:
            say("data: skipped " + ", ".join(f"{count:,} records: {reason}" for reason, count in skipped.items()))
    overlap = recipe.data.overlap
    if overlap is not None:
        found, total = sum(int(store.overlaps.sum()) for store in trained), sum(map(len, trained))
        done = "left out of training" if overlap.drop else "trained on all the same (data.overlap.drop: false)"
        say(f"data: {found:,} of {total:,} documents share {overlap.words} words with an evaluation set: {done}")


def told_cut(rows: AnyRows) -> str:
    """What became of the examples that are longer than a row."""
    return (
        f"{rows.cut + rows.dropped:,} of {counted(rows)['documents']:,} examples are longer than data.context = "
        f"{rows.context:,}: {rows.cut:,} lost the left of their prompt, {rows.dropped:,} without room for a whole "
        "answer are left out"
    )


def counted(rows: AnyRows) -> dict[str, int]:
    """Documents and tokens; and of examples longer than a row, see `tailkd.data.documents.DocumentRows`."""
    documents = sum(len(part.documents) for part in parts_of(rows))
    return {"documents": documents, "tokens": rows.tokens, "cut": rows.cut, "dropped": rows.dropped}


def _refuse_empty(recipe: Recipe, each: list[Rows]) -> None:
    for name, rows in zip(recipe.data.names, each, strict=True):
        if rows.predicted < 1 and len(each) > 1:
            raise Refusal(
                f"source {name!r} has no token left to train on: all its documents are held out or dropped; leave it "
                "out, or give it more text"
            )


def _refuse_split(train_rows: AnyRows, heldout_rows: AnyRows, *, own: bool) -> None:
    for name, rows in (("train on", train_rows), ("hold out", heldout_rows)):
        if rows.predicted < 1:
            dropped = f" ({told_cut(rows)})" if rows.dropped else ""
            documents = counted(rows)["documents"]
            raise Refusal(
                f"no token is left to {name}: {documents:,} documents with {rows.tokens:,} tokens{dropped}; give more "
                "text, a longer context, or documents that are not all held out as well"
            )
    if own and heldout_rows.tokens > train_rows.tokens:
        raise Refusal(
            f"data.heldout has {heldout_rows.tokens:,} tokens, more than the {train_rows.tokens:,} to train on; hold "
            "fewer out (the two may have been exchanged)"
        )
