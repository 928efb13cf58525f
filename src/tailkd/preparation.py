"""`tailkd prepare`: every corpus of a recipe as token ids on disk, before any model is loaded."""

from __future__ import annotations

from typing import Any

from tailkd import pair
from tailkd.corpora import Say, counted, prepare, stores
from tailkd.recipe import Recipe


def prepared(recipe: Recipe, say: Say) -> dict[str, Any]:
    """Make the token stores of a recipe or go on with them; those that are there are read and compared by hash.

    Returns:
        By the corpora's names, and for a held-out corpus of its own: documents, tokens, the store's folder and hash.

    Raises:
        tailkd.errors.Refusal: a corpus that cannot be used; a store that is damaged.
    """
    shared = pair.read_vocabulary(recipe)
    trained, heldout = stores(recipe, shared, say)
    named = dict(zip(recipe.data.names, trained, strict=True))
    if heldout is not None:
        named["(held out)"] = heldout
    for store in named.values():
        store.verify()
    train_rows, held_rows = prepare(recipe, shared, say)
    return {
        "sources": {
            name: {
                "documents": len(store),
                "tokens": store.manifest["tokens"],
                "bytes": store.manifest["bytes"],
                "skipped": store.manifest["skipped"],
                "folder": str(store.folder),
                "hash": store.hash,
            }
            for name, store in named.items()
        },
        "train": counted(train_rows),
        "heldout": counted(held_rows),
    }
