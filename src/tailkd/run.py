"""The whole way, in order: corpus -> tokens -> batches -> models -> training -> evaluation -> report.

The only file that knows all rooms; a newcomer reads it first.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tailkd import folder, recipe_file
from tailkd.data import packing, tokens
from tailkd.data.batches import Batches, evaluation_batches
from tailkd.data.corpus import BadRecords, Source
from tailkd.data.packing import Rows
from tailkd.errors import Refusal
from tailkd.evaluate.heldout import evaluate as evaluate_heldout
from tailkd.models import load, precision, vocabulary
from tailkd.models.head import SplitModel
from tailkd.objective import Objective
from tailkd.recipe import Recipe
from tailkd.recipe import Source as SourceSection
from tailkd.report.card import write_card
from tailkd.report.page import write_page
from tailkd.report.record import FORMAT, Metrics, Run, write_json
from tailkd.report.terminal import Terminal
from tailkd.teacher.live import LiveTeacher
from tailkd.train.checkpoint import Checkpoints, Cursor
from tailkd.train.loop import Hooks, Plan, train
from tailkd.train.optim import Schedule, build_optimizer

Say = Callable[[str], None]


def distill(recipe: str | Path | dict[str, Any] | Recipe, *, fresh: bool = False, **overrides: Any) -> Run:
    """Train a student by a recipe and measure it; the same call goes on with a run that was interrupted.

    Args:
        recipe: a YAML file, its content as a dict, or a checked `Recipe`.
        fresh: throw away what the run folder holds of an earlier run.
        overrides: dotted keys, such as ``**{"training.seed": 4}``.

    Returns:
        The finished run: ``run.evaluation``, ``run.metrics``, ``run.student`` (a folder for from_pretrained).

    Raises:
        tailkd.errors.Refusal: the recipe, the data or the models cannot be used; nothing was written.
    """
    checked = recipe if isinstance(recipe, Recipe) else recipe_file.read(recipe, overrides)
    run = Run(checked.folder)
    with Terminal(steps=checked.steps, name=checked.name) as terminal:
        if fresh:
            folder.clear(run)
        if folder.already_finished(checked, run):
            terminal.say(f"already finished in {run.folder}; --fresh trains it anew")
            return run
        parts = build(checked, terminal.say)
        folder.start_folder(checked, run)
        measures = _train(checked, parts, run, terminal)
        parts.student.model.save_pretrained(run.student)
        parts.tokenizer.save_pretrained(run.student)
        write_json(run.folder / "evaluation.json", {"format": FORMAT, **measures})
        finished = Run(run.folder)
        _write_report(finished)
    return finished


@dataclass(frozen=True)
class Parts:
    """What a run is made of: both models, the rows to train and to measure on."""

    recipe: Recipe
    tokenizer: Any
    student: SplitModel
    teacher: LiveTeacher | None
    train_rows: Rows
    heldout_rows: Rows

    def measure(self, student: SplitModel) -> dict[str, Any]:
        """Held-out measures of `student` against the teacher."""
        settings = self.recipe.evaluate
        batches = evaluation_batches(self.heldout_rows, tokens=settings.tokens, batch_size=settings.batch_size)
        return evaluate_heldout(student, self.teacher, batches, top_k=settings.top_k)


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer that both models share, the ids they share, and the token that begins a row."""

    tokenizer: Any
    usable: int
    begin: int | None


def build(recipe: Recipe, say: Say, *, student: str | None = None) -> Parts:
    """Corpus, tokens, batches, models of a recipe; `student` is a folder to load instead of the recipe's own."""
    device = precision.default_device()
    dtype = precision.resolve(recipe.training.precision, device)
    shared = read_vocabulary(recipe)
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
    return Parts(recipe, shared.tokenizer, split, _teacher(recipe, shared, device, dtype), train_rows, heldout_rows)


def _teacher(recipe: Recipe, shared: Vocabulary, device: torch.device, dtype: torch.dtype) -> LiveTeacher | None:
    if recipe.teacher is None:
        return None
    model = load.load_model(
        "teacher",
        recipe.teacher.model,
        dtype=dtype if recipe.teacher.dtype == "auto" else getattr(torch, recipe.teacher.dtype),
        device=device,
        revision=recipe.teacher.revision,
        attention=recipe.teacher.attention,
        remote_code=recipe.teacher.remote_code,
    )
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
    _check_saved_tokenizer(recipe, shared, corpus)
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
    _refuse_empty(train_rows, heldout_rows)
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


def _check_saved_tokenizer(recipe: Recipe, shared: Vocabulary, corpus: Source) -> None:
    options = {"revision": recipe.student.revision, "remote_code": recipe.student.remote_code}
    config = load.load_config("student", recipe.student.model, **options)
    texts = [document.text[:2000] for document in islice(corpus.documents(BadRecords()), 100)]
    load.check_saved_tokenizer(shared.tokenizer, config, texts)


def _refuse_empty(train_rows: Rows, heldout_rows: Rows) -> None:
    for name, rows in (("train on", train_rows), ("hold out", heldout_rows)):
        if rows.predicted < 1:
            raise Refusal(
                f"no token is left to {name}: {len(rows.documents):,} documents with {rows.tokens:,} tokens; give more "
                "text, or documents that are not all held out as well"
            )


# ----- training and what it writes


def _train(recipe: Recipe, parts: Parts, run: Run, terminal: Terminal) -> dict[str, Any]:
    """Train to the end; the measures of teacher, student before and student."""
    training, student = recipe.training, parts.student
    optimizer = build_optimizer(
        student.model,
        learning_rate=training.learning_rate,
        betas=training.betas,
        weight_decay=training.weight_decay,
    )
    checkpoints = Checkpoints(run.folder / "checkpoints", identity=recipe.identity(), keep=training.keep_checkpoints)
    cursor = checkpoints.resume(student.model, optimizer)
    metrics = Metrics(run.folder / "metrics.jsonl", resume_at=cursor.metrics_bytes)
    if cursor.step:
        terminal.say(f"going on from step {cursor.step:,} of {recipe.steps:,}")
    before = _measures_before(parts, run, metrics, cursor)

    def record(values: dict[str, Any]) -> None:
        metrics.append(values)
        terminal.step(values)

    def evaluate(step: int, trained: int) -> dict[str, Any]:
        values = parts.measure(student)
        metrics.append(_evaluation_record("student", step, trained, values))
        terminal.say(f"held out at {trained:,} tokens: " + _short(values))
        return values

    cursor = train(
        student,
        parts.teacher,
        Batches(parts.train_rows, batch_size=training.batch_size, seed=training.seed),
        objective=Objective(**recipe.objective.model_dump()),
        optimizer=optimizer,
        schedule=Schedule(training.learning_rate, recipe.steps, training.warmup_fraction, training.final_fraction),
        checkpoints=checkpoints,
        plan=Plan(
            steps=recipe.steps,
            micro_batch_size=training.micro_batch_size,
            clip_norm=training.clip_norm,
            save_every_tokens=training.save_every_tokens,
            evaluate_every_tokens=recipe.evaluate.every_tokens,
        ),
        hooks=Hooks(record, evaluate, metrics.size),
        cursor=cursor,
    )
    after = evaluate(cursor.step, cursor.tokens)
    metrics.close()
    return {**before, "student": after}


def _measures_before(parts: Parts, run: Run, metrics: Metrics, cursor: Cursor) -> dict[str, Any]:
    """Teacher and untrained student, measured once; a resumed run reads them from its metrics."""
    if cursor.step:
        found = {r["role"]: r for r in run.metrics if r["kind"] == "evaluation" and r["step"] == 0}
        return {"teacher": _measures(found.get("teacher")), "student_before": _measures(found["student"])}
    teacher = None if parts.teacher is None else parts.measure(parts.teacher.split)
    student = parts.measure(parts.student)
    if teacher is not None:
        metrics.append(_evaluation_record("teacher", 0, 0, teacher))
    metrics.append(_evaluation_record("student", 0, 0, student))
    return {"teacher": teacher, "student_before": student}


def _evaluation_record(role: str, step: int, trained: int, values: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "evaluation", "role": role, "step": step, "tokens_trained": trained, **values}


def _measures(record: dict[str, Any] | None) -> dict[str, Any] | None:
    keys = ("kind", "role", "step", "tokens_trained")
    return None if record is None else {k: v for k, v in record.items() if k not in keys}


def _short(values: dict[str, Any]) -> str:
    kl = "" if values["kl"] is None else f", KL(T||S) {values['kl']:.4f}"
    return f"cross-entropy {values['cross_entropy']:.4f}{kl}"


def _write_report(run: Run) -> None:
    write_page([run], run.folder / "report.html")
    write_card(run)


# ----- verbs beside distill


def evaluate(run: Run, say: Say) -> Run:
    """Measure a finished run's student again and rewrite its evaluation and report."""
    if not run.student.is_dir():
        raise Refusal(f"{run.folder} has no student yet: run `tailkd distill` on its recipe to the end")
    recipe = recipe_file.read(run.folder / "recipe.yaml")
    parts = build(recipe, say, student=str(run.student))
    content = {**run.evaluation, "student": parts.measure(parts.student)}
    if parts.teacher is not None:
        content["teacher"] = parts.measure(parts.teacher.split)
    write_json(run.folder / "evaluation.json", content)
    measured = Run(run.folder)
    _write_report(measured)
    return measured


def check(recipe: Recipe) -> dict[str, Any]:
    """What can be known before a run without loading weights: vocabulary, a sample of the corpus, steps."""
    shared = read_vocabulary(recipe)
    bad = BadRecords()
    sample = list(islice(source(recipe.data.train).documents(bad), 1000))
    tokens.refuse_bad(bad, len(sample), recipe.data.max_bad, source(recipe.data.train))
    _check_saved_tokenizer(recipe, shared, source(recipe.data.train))
    ids = shared.tokenizer([d.text for d in sample], add_special_tokens=False, verbose=False)["input_ids"]
    return {
        "name": recipe.name,
        "folder": str(recipe.folder),
        "divergence": recipe.objective.divergence,
        "steps": recipe.steps,
        "tokens": recipe.training.tokens,
        "usable_ids": shared.usable,
        "begin_token": None if shared.begin is None else shared.tokenizer.convert_ids_to_tokens(shared.begin),
        "sampled_documents": len(sample),
        "sampled_tokens": sum(len(i) + 1 for i in ids),
        "bad_records": bad.counts,
        "first_row": shared.tokenizer.decode(ids[0][: recipe.data.context]),
    }
