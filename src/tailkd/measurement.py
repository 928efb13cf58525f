"""`tailkd measure`: how models spread their probability over a text, each measured alone; no recipe, no teacher."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tailkd import folder, pair
from tailkd.corpora import Say
from tailkd.data import tokens
from tailkd.data.batches import Batch, evaluation_batches
from tailkd.data.corpus import Source
from tailkd.data.packing import Rows
from tailkd.errors import Refusal
from tailkd.evaluate.heldout import TAIL_SIZES, evaluate
from tailkd.models import load, precision, vocabulary
from tailkd.models.head import SplitModel
from tailkd.recipe_rules import unfinished
from tailkd.report.record import FORMAT, Run

CONTEXT = 2048  # positions in a row, or what the model takes if that is less
BATCH_POSITIONS = 4096
MAX_BAD = 0.001  # share of records that may be unusable, as of a recipe
TOLD_EVERY = 10.0  # seconds


@dataclass(frozen=True)
class Asked:
    """What is measured, and on what.

    path: a file, folder or glob of text. field: of its records. positions: measured at most, spread over the text;
    None is all. context: of a row; None is 2,048, or what a model takes if less. tail_sizes: the numbers K of first ids
    outside which the tail lies. revision, gguf_file: of the one model.
    """

    path: str
    field: str = "text"
    positions: int | None = None
    context: int | None = None
    tail_sizes: tuple[int, ...] = TAIL_SIZES
    revision: str | None = None
    gguf_file: str | None = None


def measure(models: Sequence[str], asked: Asked, say: Say) -> dict[str, Any]:
    """Each model's measures on the text, by the model's name; what a reader of the file needs beside them.

    A model is a folder of `save_pretrained`, a hub id, or a run folder, of which it is the student. Each reads the text
    in its own tokens: of models with different tokenizers, measures per token do not compare.

    Returns:
        ``{"format", "data": {...}, "models": {name: {...}}}``: tokens, cross_entropy and entropy (nats per token),
        perplexity, mismatch_rate, tail_mass by K, full_ece, ece, log_ece, and both tables of reliability.

    Raises:
        Refusal: no such file or field; a model that cannot be read, has no tokenizer, no readable head, or fewer
            positions than `context`.
    """
    if len(models) > 1 and (asked.revision or asked.gguf_file):
        raise Refusal(f"--revision and --gguf-file are those of one model; {len(models)} came, measure them one by one")
    source = Source(path=asked.path, text=asked.field)
    source.files()
    opened = [_opened(model, name, asked) for model, name in zip(models, _names(models), strict=True)]
    found = {one.name: _measured(one, source, asked, say) for one in opened}
    return {"format": FORMAT, "data": {"path": asked.path, "field": asked.field}, "models": found}


# ----- a model before its weights are read


@dataclass(frozen=True)
class _Opened:
    """Where a model lies, and how it reads."""

    given: str
    name: str
    place: str
    tokenizer: Any
    usable: int
    context: int


def _opened(given: str, name: str, asked: Asked) -> _Opened:
    run = _run_of(given)
    place = str(run.student) if run else given
    options: dict[str, Any] = {"revision": asked.revision, "gguf_file": asked.gguf_file}
    config = load.load_config("", place, **options).get_text_config()
    tokenizer = load.load_tokenizer("", place, **options)
    if tokenizer is None:
        raise Refusal(f"{given} holds no tokenizer, so its text cannot be read as it reads it; save one into it")
    most = getattr(config, "max_position_embeddings", None) or asked.context or CONTEXT
    if asked.context is not None and asked.context > most:
        raise Refusal(
            f"--context is {asked.context:,}, and {given} takes at most {most:,} positions; take that or less"
        )
    context = asked.context or min(CONTEXT, most)
    return _Opened(
        given, name, place, tokenizer, vocabulary.tokenizer_usable_ids(tokenizer, config.vocab_size), context
    )


def _run_of(given: str) -> Run | None:
    """The run in a folder; None of what is none."""
    run = Run(Path(given).expanduser())
    if not (run.folder / "recipe.yaml").is_file():
        return None
    problem = unfinished(run)
    if problem is not None:
        raise Refusal(f"{given}: {problem}")
    return run


def _names(models: Sequence[str]) -> list[str]:
    """A run's own name, a folder's last part, a hub id; as they were given where two would be the same."""
    if len(set(models)) < len(models):
        raise Refusal(f"a model came twice: {', '.join(models)}; give each once")
    names = []
    for given in models:
        path, run = Path(given).expanduser(), _run_of(given)
        names.append(run.name if run else path.resolve().name if path.is_dir() else given)
    return names if len(set(names)) == len(names) else list(models)


# ----- its measures


def _measured(one: _Opened, source: Source, asked: Asked, say: Say) -> dict[str, Any]:
    store = tokens.prepare(
        source, one.tokenizer, folder.shared_store(), usable=one.usable, max_bad=MAX_BAD, say=lambda line: None
    )
    begin, end = pair.begin_token(one.tokenizer), one.tokenizer.eos_token_id
    rows = Rows(store, np.arange(len(store)), context=one.context, begin=begin, end=end)
    device = precision.default_device()
    dtype = precision.resolve("auto", device)
    options: dict[str, Any] = {"revision": asked.revision, "gguf_file": asked.gguf_file}
    model = load.load_model("", one.place, dtype=dtype, device=device, **options)
    split = SplitModel(model, usable=one.usable, compute_dtype=dtype).prove()
    size = max(1, BATCH_POSITIONS // one.context)
    batches = _told(evaluation_batches(rows, tokens=asked.positions, batch_size=size), one.name, say)
    found = evaluate(split, None, batches, top_k=1, tail_sizes=asked.tail_sizes)
    told = {
        "model": one.given,
        "revision": asked.revision,
        "parameters": model.num_parameters(),
        "vocabulary": one.usable,
        "precision": str(dtype).removeprefix("torch."),
        "context": one.context,
        "documents": len(store),
    }
    tables = {"reliability": found.reliability, "log_reliability": found.log_reliability}
    return {**told, **_alone(found.measures), **tables}


def _alone(measures: dict[str, Any]) -> dict[str, Any]:
    """What a model's measures are without a teacher; its first choice is the next token or a mismatch."""
    own = {name: value for name, value in measures.items() if value is not None}
    return {
        **own,
        "perplexity": math.exp(own["cross_entropy"]),
        "mismatch_rate": 1 - own["top1_accuracy"],
    }


def _told(batches: Iterator[Batch], name: str, say: Say) -> Iterator[Batch]:
    """The batches; now and then how many positions are behind."""
    done, last = 0, time.monotonic()
    for batch in batches:
        yield batch
        done += batch.count
        if time.monotonic() - last > TOLD_EVERY:
            last = time.monotonic()
            say(f"{name}: {done:,} positions measured")
