"""The recipe's teacher, student and vocabulary."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Tag

from tailkd.recipe_types import MADE_UP, PLAIN, Count, Either, NonNegative, Number, Positive, Section


class Model(Section):
    model: str | None = None
    """Folder written by save_pretrained, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    remote_code: bool = False
    """Run code from the model's repository; needs a 40-digit commit hash as `revision`."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = "auto"
    """Attention implementation of transformers."""


class Teacher(Model):
    config: str | None = None
    """Instead of `model`, for the ledger alone: a configuration (config.json or its folder)."""
    gguf_file: str | None = None
    """A GGUF file in the folder or repository `model`: its weights, dequantised (extra `gguf`)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the teacher's weights; auto is that of the run's products."""
    sharded: bool = False
    """On many processes: its weights split among them, instead of a copy in each."""
    cache: str | None = None
    """Folder that `tailkd cache` wrote: training reads the teacher there. `model` beside it is for evaluation."""

    @property
    def cache_alone(self) -> bool:
        """Whether there is a cache and no model to load."""
        return self.cache is not None and self.model is None and self.config is None


class WeightedTeacher(Teacher):
    weight: Positive = 1.0
    """Its share in the mixture of the teachers' distributions, relative to the others'."""


class Cache(Section):
    """The teacher written down once by `tailkd cache`, to be read by any number of runs as `teacher.cache`."""

    path: str
    """Folder to write to."""
    payload: Literal["tail", "dense", "hidden"] = "tail"
    """tail: likeliest ids and draws from the rest; dense: all log-probabilities (small vocabularies); hidden: the last
    hidden states."""
    top_k: Count = 10
    """Ids kept with their own probability (tail)."""
    tail_samples: Count = 32
    """Ids drawn from the rest (tail)."""


class FromTeacher(Section):
    """Sizes that are null are the teacher's; the number of query heads always is."""

    layers: Count | None = None
    """Transformer blocks."""
    hidden_size: Count | None = None
    """Width of the hidden states."""
    intermediate_size: Count | None = None
    """Width inside the MLP."""
    head_dim: Count | None = None
    """Width of an attention head."""
    kv_heads: Count | None = None
    """Key and value heads."""
    layer_choice: Annotated[
        Annotated[Literal["even"], Tag(PLAIN)] | Annotated[tuple[NonNegative, ...], Tag(MADE_UP)], Either
    ] = "even"
    """The teacher's blocks that are taken: evenly spread, first and last among them, or their numbers."""
    attention: Literal["prefix", "rope", "random"] = "prefix"
    """Attention weights: the first entries of each head (the paper's), or those of matching rotary frequencies."""
    mlp: Literal["random", "copy"] = "random"
    """MLP weights: N(0, 0.02), or the teacher's (first entries)."""
    embeddings: Literal["copy", "slice", "random"] = "copy"
    """Embeddings and untied head: the teacher's, its first columns, or N(0, 0.02)."""
    freeze_embeddings: bool = False
    """Leave the embeddings (and a head tied to them) as they are."""
    tie_word_embeddings: bool | None = None
    """Whether the head is the input embeddings; null as the teacher."""
    rescale: bool = False
    """Scale what is cut by sqrt(teacher's width / student's)."""
    seed: Annotated[int, Field(ge=0, lt=2**63), Number] = 0
    """Of the random weights."""


class Student(Model):
    from_teacher: FromTeacher | None = None
    """A student cut out of its teacher, instead of `model`."""
    run: str | None = None
    """Folder of a finished run whose student goes on here (a second stage), instead of `model`."""


class Vocabulary(Section):
    fold: dict[int, int] = {}  # noqa: RUF012, pydantic copies it
    """Teacher ids whose probability is added to another id's, such as an end token that the student does not have."""
