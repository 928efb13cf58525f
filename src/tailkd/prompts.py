"""What a teacher is given to go on from: a file's prompts, or prefixes of documents that are not held out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np

from tailkd import pair
from tailkd.corpora import source
from tailkd.data import packing, tokens
from tailkd.data.corpus import BadRecords, Document, Source
from tailkd.errors import Refusal
from tailkd.pair import Vocabulary
from tailkd.recipe import Recipe
from tailkd.recipe_generate import Generate
from tailkd.teacher.rollout import HALF_A_CHARACTER, Prompt

BATCH = 256  # texts that are tokenised at once
SAMPLE = 100  # records that are looked at before a model is loaded


class Prompts:
    """The prompts of a recipe's `generate`, each as often as it is to be completed, in the corpus's order.

    bad: records that hold no text. skipped: texts that make no prompt, by reason, as far as they were read.

    Raises:
        Refusal: the first records are unusable; a teacher with no room for a prompt and its completion.
    """

    def __init__(self, recipe: Recipe, shared: Vocabulary) -> None:
        assert recipe.generate is not None
        self.asked: Generate = recipe.generate
        self.shared = shared
        self.source = prompt_source(recipe)
        self.bad, self.skipped = BadRecords(), Counter[str]()
        self.begin = () if shared.begin is None else (shared.begin,)
        self.room = _room(recipe, len(self.begin))
        first = BadRecords()
        found = len(list(islice(self.source.documents(first), SAMPLE)))
        tokens.refuse_bad(first, found, recipe.data.max_bad, self.source)
        self._held_out = _held_out(recipe, self.source)

    def __iter__(self) -> Iterator[Prompt]:
        """Starts anew each time."""
        self.bad, self.skipped = BadRecords(), Counter[str]()
        samples = self.asked.samples
        for number, (document, ids, shown) in enumerate(islice(self._usable(), self.asked.count)):
            whole = self.asked.template.replace("{prompt}", shown)
            for sample in range(samples):
                name = f"{document.id}#{sample}" if samples > 1 else document.id
                yield Prompt(name, number * samples + sample, (*self.begin, *ids), whole, shown)

    def _usable(self) -> Iterator[tuple[Document, list[int], str]]:
        documents = self.source.documents(self.bad)
        while batch := list(islice(documents, BATCH)):
            texts = [self.asked.template.replace("{prompt}", document.text) for document in batch]
            encoded = self.shared.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            for document, ids in zip(batch, encoded, strict=True):
                reason, ids, shown = self._cut(document, ids)
                if reason:
                    self.skipped[reason] += 1
                else:
                    yield document, ids, shown

    def _cut(self, document: Document, ids: list[int]) -> tuple[str | None, list[int], str]:
        """Why the document gives no prompt, or its ids and the text that they stand for."""
        prefix, shown = self.asked.prefix_tokens, document.text
        if self._held_out(document.hash):
            return "held out", ids, shown
        if prefix is not None and len(ids) <= prefix:
            return "no longer than generate.prefix_tokens", ids, shown
        if prefix is not None:
            ids = ids[:prefix]
            shown = self.shared.tokenizer.decode(ids, clean_up_tokenization_spaces=False).rstrip(HALF_A_CHARACTER)
        if self.room is not None and len(ids) > self.room:
            return f"more than {self.room:,} tokens, which with its completion the teacher has no positions for", [], ""
        if max(ids) >= self.shared.usable:
            return "a token outside the ids that teacher and student share", ids, shown
        return None, ids, shown


def prompt_source(recipe: Recipe) -> Source:
    """The corpus that prompts are taken of."""
    assert recipe.generate is not None
    given = recipe.generate.prompts
    return source(recipe.data.sources[0]) if given is None else Source(path=given.path, text=given.text)


def _room(recipe: Recipe, begin: int) -> int | None:
    """Tokens that a prompt may have; None where the teacher's configuration names no longest input."""
    assert recipe.generate is not None
    config: Any = pair.teacher_configs(recipe).get("teacher")
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return None
    new, prefix = recipe.generate.max_new_tokens, recipe.generate.prefix_tokens or 1
    if positions - begin - new < prefix:
        raise Refusal(
            f"generate.max_new_tokens: {new:,} tokens after a prompt of {prefix:,} are more than the {positions:,} "
            "positions of the teacher; lower it"
        )
    return positions - begin - new


def _held_out(recipe: Recipe, corpus: Source) -> Callable[[int], bool]:
    """Whether a document of this hash is held out, by the same rule as in the run: never a prompt."""
    heldout, fraction = recipe.data.heldout, recipe.data.heldout.fraction
    assert recipe.generate is not None
    if fraction is None:
        known = {document.hash for document in source(heldout).documents(BadRecords())}
        return known.__contains__
    if recipe.generate.prompts is not None:  # the split is one of data.train
        return lambda found: False
    enough = int(50 / fraction)  # among so many none below the limit is as good as impossible
    hashes = np.asarray([d.hash for d in islice(corpus.documents(BadRecords()), enough)], dtype=np.uint64)
    if len(hashes) < enough:
        return set(hashes[packing.split(hashes, fraction)[1]].tolist()).__contains__
    limit = int(fraction * 2.0**64)
    return lambda found: found < limit
