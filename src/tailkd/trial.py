"""`tailkd check --load`: a few steps with the models and rows of a run on this machine: do they fit, and how fast."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tailkd import pair
from tailkd.corpora import settled
from tailkd.data.batches import Batch, collate, evaluation_batches
from tailkd.data.mixture import AnyRows, parts_of
from tailkd.data.packing import IGNORED, Row, Rows
from tailkd.evaluate.heldout import evaluate
from tailkd.models.head import SplitModel
from tailkd.objective import Head, Objective
from tailkd.parts import Parts, Say, build, prepare
from tailkd.recipe import Recipe
from tailkd.teacher.live import LiveTeacher, Teacher
from tailkd.train.checkpoint import Checkpoints, Cursor
from tailkd.train.memory import status_bytes
from tailkd.train.optim import build_optimizer
from tailkd.train.ranks import ALONE
from tailkd.train.step import Step

TIMED_STEPS, TIMED_SECONDS = 2, 2.0  # at least; steps of milliseconds are repeated until their times tell something
SAVED_BYTES = 1 << 30  # of a save that is timed
BLOCK_BYTES = 16 << 20  # of float32 logits
CLEAR = Path("/proc/self/clear_refs")


def load(recipe: Recipe, say: Say) -> dict[str, Any]:
    """What can only be known with weights: one step to warm up and at least two that are timed, on one process.

    Each is a global batch of full rows. The token store is prepared where it is not yet; no run folder is made.

    Returns:
        tokens_per_second: of the timed steps.
        hours: of all steps and held-out evaluations of the run at that rate, and of its last save.
        peak_bytes: above what the process held before the models; None where the system does not tell.
        teacher_perplexity: over the same held-out tokens with rows that start with a begin token and without;
            None where there is no such token, or no teacher.
        dropped_teacher_mass: mean teacher probability (0 to 1) of ids that the student lacks and that are not folded.

    Raises:
        Refusal: what cannot be loaded.
        OutOfMemory: a step does not fit.
    """
    recipe = settled(recipe, say)
    prepare(recipe, pair.read_vocabulary(recipe), say)
    memory = _Memory(ALONE.device)
    parts = build(recipe, lambda line: None, scored=False)
    memory.forget_building()
    seconds, tokens = _timed_steps(parts, say)
    return {
        "tokens_per_second": tokens / seconds,
        "hours": (seconds * recipe.steps + _evaluation_seconds(parts) + _saving_seconds(parts)) / 3600,
        "peak_bytes": memory.peak_bytes(),
        "teacher_perplexity": _perplexities(parts),
        "dropped_teacher_mass": _dropped(parts),
    }


# ----- memory


class _Memory:
    """The most that is held above what was held when this was made."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._before = torch.cuda.memory_allocated() if self._on_gpu else status_bytes("VmRSS") or 0

    def forget_building(self) -> None:
        """Models are loaded once, with copies that training does not have."""
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        with suppress(OSError):
            CLEAR.write_text("5")

    def peak_bytes(self) -> int | None:
        peak = torch.cuda.max_memory_allocated() if self._on_gpu else status_bytes("VmHWM")
        return None if peak is None else peak - self._before


# ----- time


def _timed_steps(parts: Parts, say: Say) -> tuple[float, int]:
    """Seconds of a step, and the tokens of its batch."""
    training, student = parts.recipe.training, parts.student
    optimizer = build_optimizer(
        student.plain, learning_rate=training.learning_rate, betas=training.betas, weight_decay=training.weight_decay
    )
    step = Step(
        student,
        parts.teaches,
        Objective(**parts.recipe.objective.settings()),
        optimizer,
        micro_batch_size=training.micro_batch_size,
        clip_norm=training.clip_norm,
        auto_microbatch=training.auto_microbatch,
        say=say,
        hidden=parts.hidden,
    )
    student.model.train()
    batch = full_batch(parts.train_rows, training.batch_size)
    _seconds(lambda: step(batch))
    timed: list[float] = []
    while len(timed) < TIMED_STEPS or sum(timed) < TIMED_SECONDS:
        timed.append(_seconds(lambda: step(full_batch(parts.train_rows, training.batch_size, len(timed)))))
    student.model.eval()
    return sum(timed) / len(timed), batch.count


def full_batch(rows: AnyRows, size: int, number: int = 0) -> Batch:
    """Batch `number` of rows without padding, as often as it takes; the last row of a corpus is seldom full."""
    full = max(rows.predicted // rows.context, 1)
    samples = range(number * size, (number + 1) * size)
    return collate([rows[sample % full] for sample in samples], samples)


def _evaluation_seconds(parts: Parts) -> float:
    """Of every held-out evaluation that the run will make, from one batch of each kind."""
    recipe = parts.recipe
    settings, every = recipe.evaluate, recipe.evaluate.every_tokens
    batch = _heldout_batch(parts)
    rows = len(parts.heldout_rows)
    if settings.tokens is not None:
        rows = min(rows, -(-settings.tokens // recipe.data.context))

    def seconds(measured: SplitModel | Teacher) -> float:
        found = [_seconds(lambda: evaluate(measured, parts.teacher, [batch], top_k=settings.top_k)) for _ in range(3)]
        return min(found) * rows / len(batch)

    before_the_last = (recipe.steps - 1) * recipe.training.batch_size * recipe.data.context
    between = 0 if every is None else min(recipe.steps - 1, before_the_last // every)
    teacher = 0.0 if parts.teacher is None else seconds(parts.teacher)
    return teacher + (2 + between) * seconds(parts.student)  # the student before and after too


def _saving_seconds(parts: Parts) -> float:
    """Of the checkpoint that ends the run, which nothing goes on beside, from a smaller one on the same disk."""
    place = next(folder for folder in parts.recipe.folder.absolute().parents if folder.is_dir())
    parameters = list(parts.student.plain.parameters())
    needed = sum(4 * p.numel() * (3 if p.requires_grad else 1) for p in parameters)  # weights and two moments
    sample = torch.nn.Embedding(min(needed, SAVED_BYTES) // 4, 1, device=parts.student.device)
    optimizer = torch.optim.SGD(sample.parameters())
    with TemporaryDirectory(dir=place) as folder, Checkpoints(Path(folder), identity={}) as checkpoints:

        def save(step: int) -> None:
            checkpoints.save(sample, optimizer, Cursor(step))
            checkpoints.wait()

        save(0)  # allocates
        return _seconds(lambda: save(1)) * needed / sample.weight.nbytes


def _heldout_batch(parts: Parts) -> Batch:
    settings = parts.recipe.evaluate
    return next(iter(evaluation_batches(parts.heldout_rows, tokens=settings.tokens, batch_size=settings.batch_size)))


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


# ----- the teacher


def _perplexities(parts: Parts) -> dict[str, float | None] | None:
    if parts.teacher is None:
        return None
    begin, rows = parts.tokenizer.bos_token_id, parts_of(parts.heldout_rows)[0]
    if begin is None:
        return {"with_begin": None, "without_begin": _perplexity(parts, _heldout_batch(parts))}
    began = Rows(rows.store, rows.documents, context=rows.context, begin=begin, end=rows.end)
    found = [began[number] for number in range(min(parts.recipe.evaluate.batch_size, len(began)))]
    numbers = range(len(found))
    # Position 0 reads the begin token and has no counterpart without it.
    with_begin = [Row(row.input_ids, _unlabelled_first(row), row.segments) for row in found]
    without = [Row(row.input_ids[1:], row.labels[1:], row.segments[1:]) for row in found]
    return {
        "with_begin": _perplexity(parts, collate(with_begin, numbers)),
        "without_begin": _perplexity(parts, collate(without, numbers)),
    }


def _unlabelled_first(row: Row) -> Any:
    labels = row.labels.copy()
    labels[0] = IGNORED
    return labels


def _perplexity(parts: Parts, batch: Batch) -> float:
    assert parts.teacher is not None
    measured = evaluate(parts.teacher, None, [batch], top_k=parts.recipe.evaluate.top_k)
    return math.exp(measured.measures["cross_entropy"])


def _dropped(parts: Parts) -> float | None:
    if parts.teacher is None:
        return None
    if isinstance(parts.teacher, LiveTeacher):
        return _dropped_by(parts, parts.teacher)
    shares = [weight / sum(parts.teacher.weights) for weight in parts.teacher.weights]
    return sum(share * _dropped_by(parts, one) for share, one in zip(shares, parts.teacher.each, strict=True))


@torch.no_grad()
def _dropped_by(parts: Parts, teacher: LiveTeacher) -> float:
    whole = SplitModel(teacher.split.plain, compute_dtype=teacher.split.compute_dtype)
    lost = [i for i in range(teacher.usable, whole.usable) if i not in teacher.fold]
    if not lost:
        return 0.0
    batch = _heldout_batch(parts).to(whole.device)
    masses = [part.softmax(-1)[:, lost].sum(-1) for part in _logits(whole(batch.input_ids, batch.position_ids), batch)]
    return float(torch.cat(masses).double().mean())


def _logits(head: Head, batch: Batch) -> Iterator[torch.Tensor]:
    """Float32 logits (positions, vocabulary) of the valid positions, some at a time."""
    hidden = head.hidden.flatten(0, 1)[batch.valid.to(head.hidden.device)]
    for part in hidden.split(max(1, BLOCK_BYTES // (4 * head.vocabulary_size))):
        yield replace(head, hidden=part).logits().float()
