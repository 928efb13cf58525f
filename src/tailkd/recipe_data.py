"""The recipe's corpora."""

from __future__ import annotations

from typing import Literal

from tailkd.recipe_types import Count, Fraction, Section, Share


class Source(Section):
    path: str | None = None
    """A file (JSONL, parquet, text; .gz too), a folder of such files, or a glob."""
    hub: str | None = None
    """A data set id on the hub, instead of `path`."""
    config: str | None = None
    """Configuration of the hub data set."""
    split: str = "train"
    """Split of the hub data set."""
    revision: str | None = None
    """Revision of the hub data set."""
    text: str = "text"
    """The field that holds the text, in JSONL, parquet and hub data sets."""


class HeldOut(Source):
    fraction: Share | None = None
    """Share of the training documents held out, by content hash; instead of an own `path` or `hub`."""


class Data(Section):
    train: Source
    """The corpus."""
    heldout: HeldOut = HeldOut(fraction=0.1)
    """What is evaluated and never trained on."""
    context: Count = 2048
    """Tokens in a row."""
    bos: Literal["auto", "always", "never"] = "auto"
    """A begin token at each row's start; auto does what the tokenizer does."""
    store: str | None = None
    """Folder for prepared token files; null is ~/.cache/tailkd."""
    max_bad: Fraction = 0.001
    """Share of records that may be unusable (skipped and counted) before the corpus is refused."""
