"""The recipe's corpora."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, Tag

from tailkd.data.chat import check_template
from tailkd.recipe_types import ONE, SEVERAL, Count, Fraction, OneOrSeveral, Part, Positive, Section, Share


class Source(Section):
    path: str | None = None
    """A file (JSONL, JSON, parquet, text, zip; .gz too), a folder of such files, or a glob."""
    hub: str | None = None
    """A data set id on the hub, instead of `path`."""
    config: str | None = None
    """Configuration of the hub data set."""
    split: str = "train"
    """Split of the hub data set."""
    revision: str | None = None
    """Revision of the hub data set."""
    text: str = "text"
    """The field that holds the text, in JSONL, JSON, parquet and hub data sets."""
    prompt: str | None = None
    """With `completion`, instead of `text`: the field that holds what is asked; it is read and not learned."""
    completion: str | None = None
    """The field that holds the answer; it and the end token after it are learned."""
    template: Annotated[str, AfterValidator(check_template)] | None = None
    """How prompt and completion become a text: one with {prompt} and {completion}, or chat, the student's chat
    template; null is "Question: {prompt}\\nAnswer: {completion}"."""
    messages: str | None = None
    """Instead of `text`: the field that holds chat messages, a list of {role, content}, for the student's chat
    template; the assistant's are learned, each with its end token."""


class TrainSource(Source):
    name: str | None = None
    """Shown in reports; null is the path's or data set's own."""
    weight: Positive | None = None
    """Share of the tokens seen, beside the weights of the other sources; null everywhere goes by their sizes."""
    tokens: Count | None = None
    """Use the documents from the first on, as long as they have at most this many tokens together."""


class HeldOut(Source):
    fraction: Share | None = None
    """Share of the training documents held out, by content hash; instead of an own `path` or `hub`."""


class Select(Section):
    """Rows chosen by scores of the teacher and a reference model (`tailkd score`), before training."""

    method: Literal["difference"] = "difference"
    """difference: rows that the teacher finds most likely compared with the reference (MiniPLM)."""
    ratio: Part = 0.5
    """Share of the rows that is kept."""
    reference: str
    """The reference model: a save_pretrained folder or a hub id; another tokenizer than the teacher's will do."""


class Overlap(Section):
    sets: Annotated[tuple[Source, ...], Field(min_length=1)]
    """Evaluation sets; `text` is the field with the question."""
    words: Count = 13
    """Documents that share this many words in a row with a text of the sets are found."""
    drop: bool = True
    """Leave them out of training; false only counts them."""


class Data(Section):
    train: Annotated[
        Annotated[TrainSource, Tag(ONE)]
        | Annotated[Annotated[tuple[TrainSource, ...], Field(min_length=1)], Tag(SEVERAL)],
        OneOrSeveral,
    ]
    """The corpus, or a list of several."""
    overlap: Overlap | None = None
    """Evaluation sets that training documents are compared with; null compares with none."""
    heldout: HeldOut = HeldOut(fraction=0.1)
    """What is evaluated and never trained on."""
    select: Select | None = None
    """Train on the rows of `train` that scores choose; null for all."""
    context: Count = 2048
    """Tokens in a row."""
    packing: Literal["rows", "documents"] = "rows"
    """rows: one run of tokens, cut every `context`; documents: whole documents side by side, with attention, positions
    and the mean tail mass inside each."""
    bos: Literal["auto", "always", "never"] = "auto"
    """A begin token at each row's start, or each document's where they are packed whole; auto does what the tokenizer
    does."""
    store: str | None = None
    """Folder for prepared token files; null is ~/.cache/tailkd."""
    max_bad: Fraction = 0.001
    """Share of records that may be unusable (skipped and counted) before the corpus is refused."""
    processes: Count | None = None
    """Processes that tokenise; null is one per core. Changes time and memory, not the result."""

    @property
    def sources(self) -> tuple[TrainSource, ...]:
        """The corpora, one or several."""
        return self.train if isinstance(self.train, tuple) else (self.train,)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the corpora: as given, or the last part of the path without wildcards and ending, or the data set's id."""
        return tuple(source.name or _own_name(source) for source in self.sources)


def _own_name(source: Source) -> str:
    if source.hub or not source.path:
        return source.hub or "corpus"
    plain = [part for part in PurePath(source.path).parts if not set("*?[") & set(part)]
    return (plain[-1].split(".")[0] if plain else "") or source.path
