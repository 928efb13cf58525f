"""The whole way: parts -> training -> evaluation -> report. A newcomer reads this first, then `parts.py`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from tailkd import cache, ending, folder, recipe_file
from tailkd.bill import best_speed, operations
from tailkd.corpora import settled
from tailkd.data.batches import Batches
from tailkd.data.mixture import AnyRows, parts_of
from tailkd.data.packing import IGNORED
from tailkd.errors import Diverged, Refusal
from tailkd.evaluate.heldout import HeldOut
from tailkd.models.sample import continuation
from tailkd.objective import Objective
from tailkd.pair import content_of_run
from tailkd.parts import Parts, Say, build
from tailkd.recipe import Recipe
from tailkd.report.card import write_card
from tailkd.report.page import write_page
from tailkd.report.readme import write_readme
from tailkd.report.record import FORMAT, Metrics, NoMetrics, Run, Stopped, write_json
from tailkd.report.terminal import Terminal
from tailkd.secrets import masked
from tailkd.teacher.live import LiveTeacher
from tailkd.track.trackers import Trackers, refuse_missing
from tailkd.train.checkpoint import Checkpoints, Cursor
from tailkd.train.loop import Hooks, Loop, Plan
from tailkd.train.optim import Schedule, build_optimizer
from tailkd.train.parallel import full_state
from tailkd.train.ranks import Ranks
from tailkd.train.signals import StopRequest
from tailkd.train.step import Step

ROLES = ("teacher", "student_before", "student")
SAMPLE_PROMPT, SAMPLE_TOKENS = 24, 60


def distill(
    recipe: str | Path | dict[str, Any] | Recipe,
    *,
    fresh: bool = False,
    allow_change: Collection[str] = (),
    **overrides: Any,
) -> Run:
    """Train a student by a recipe and measure it; the same call goes on with a run that was interrupted.

    Args:
        recipe: a YAML file, its content as a dict, or a checked `Recipe`.
        fresh: throw away what the run folder holds of an earlier run.
        allow_change: keys whose value may differ from the one that an interrupted run began with.
        overrides: dotted keys, such as ``**{"training.seed": 4}``.

    Returns:
        The finished run: ``run.evaluation``, ``run.metrics``, ``run.student`` (a folder for from_pretrained).

    Raises:
        tailkd.errors.Refusal: the recipe, the data or the models cannot be used; nothing was written.
        tailkd.errors.Stop: the run ended before its end and says why; `exit_code` is what the command line returns.
    """
    read = recipe if isinstance(recipe, Recipe) else recipe_file.read(recipe, overrides)
    ranks = Ranks.start()
    with ranks.in_turns():
        checked = settled(read, lambda line: print(line, file=sys.stderr) if ranks.leads else None)
    run, allowed = Run(checked.folder), frozenset(allow_change)
    stop = StopRequest(checked.training.stop_after_seconds, ranks.agreed)
    with Terminal(steps=checked.steps, name=checked.name, quiet=not ranks.leads) as terminal:
        if fresh:
            folder.holds_a_run(run)
        elif folder.already_finished(checked, run, allowed):
            terminal.say(f"already finished in {run.folder}; --fresh trains it anew")
            return run
        folder.refuse_unwritable(run.folder)
        refuse_missing(checked.track.tools)
        tools = Trackers(checked.track.tools if ranks.leads else (), run, terminal.say)
        with folder.locked(run) if ranks.leads else nullcontext(), ending.noted(run, leads=ranks.leads), stop, tools:
            parts = build(checked, terminal.say, ranks=ranks, heed=stop.heed)
            if ranks.leads:
                if fresh:
                    folder.clear(run)
                folder.start_folder(checked, run, parts.data)
                _write_bill(run, parts)
            ranks.wait()
            _finish(run, parts, _train(parts, run, terminal, stop, tools, allow_change=allowed))
            ranks.wait()
    return Run(run.folder)


def _write_bill(run: Run, parts: Parts) -> None:
    """What the run costs, for its report and card."""
    made_out = None
    with suppress(Exception):  # a model that the ledger cannot read is trained all the same
        made_out = operations(parts.recipe, usable=parts.student.usable, device=parts.ranks.device)
    if made_out is not None:
        write_json(run.folder / "bill.json", {"format": FORMAT, **made_out})


def _train(
    parts: Parts, run: Run, terminal: Terminal, stop: StopRequest, tools: Trackers, *, allow_change: frozenset[str]
) -> dict[str, HeldOut | None]:
    """Train to the end; the held-out measures of teacher, student before and student."""
    recipe, training, student, ranks = parts.recipe, parts.recipe.training, parts.student, parts.ranks
    optimizer = build_optimizer(
        student.plain, learning_rate=training.learning_rate, betas=training.betas, weight_decay=training.weight_decay
    )
    checkpoints = Checkpoints(
        run.folder / "checkpoints",
        identity=_identity(parts),
        optimiser=recipe.optimiser(),
        keep=training.keep_checkpoints,
        allow_change=allow_change,
        say=terminal.say,
    )
    cursor = checkpoints.resume(student.plain, optimizer)
    metrics = Metrics(run.folder / "metrics.jsonl", resume_at=cursor.metrics_bytes) if ranks.leads else NoMetrics()
    tools.follow()
    before = _measures_before(parts, run, metrics, cursor, stop)
    if cursor.step:
        terminal.say(f"going on from step {cursor.step:,} of {recipe.steps:,}")

    def record(values: dict[str, Any]) -> None:
        metrics.append(values)
        terminal.step(values)
        tools.look()

    last = before["student_before"]  # what is known of the student, should the run diverge

    def evaluate(step: int, trained: int) -> HeldOut:
        nonlocal last
        last = found = parts.measure(student, stop.heed)
        metrics.append(_evaluation_record("student", step, trained, found))
        terminal.say(f"held out at {trained:,} tokens: " + _short(found.measures))
        return found

    loop = Loop(
        step=_step(parts, optimizer, stop, terminal.say),
        batches=Batches(parts.train_rows, batch_size=training.batch_size, seed=training.seed),
        schedule=Schedule(training.learning_rate, recipe.steps, training.warmup_fraction, training.final_fraction),
        checkpoints=checkpoints,
        plan=Plan(
            recipe.steps,
            training.seed,
            training.save_every_tokens,
            recipe.evaluate.every_tokens,
            best_speed=best_speed(recipe, ranks.device, ranks.world) if ranks.leads else None,
        ),
        hooks=Hooks(record, evaluate, metrics.size),
    )
    with checkpoints, _reported(run, ranks, lambda: {**before, "student": last}):
        cursor = loop.run(cursor)
    after = evaluate(cursor.step, cursor.tokens)
    metrics.close()
    return {**before, "student": after}


def _step(parts: Parts, optimizer: Any, stop: StopRequest, say: Say) -> Step:
    training = parts.recipe.training
    return Step(
        parts.student,
        parts.teaches,
        Objective(**parts.recipe.objective.settings()),
        optimizer,
        micro_batch_size=training.micro_batch_size,
        clip_norm=training.clip_norm,
        ranks=parts.ranks,
        heed=stop.heed,
        auto_microbatch=training.auto_microbatch,
        say=say,
        hidden=parts.hidden,
    )


def _identity(parts: Parts) -> dict[str, Any]:
    """What a resumed run must share with the one that it goes on with: the recipe, and the content that it names."""
    recipe = parts.recipe
    made_of = {"data (content)": parts.fingerprint, **content_of_run(recipe), **cache.content(recipe)}
    return masked({**recipe.identity(), **made_of})


@contextmanager
def _reported(run: Run, ranks: Ranks, found: Callable[[], dict[str, HeldOut | None]]) -> Iterator[None]:
    """A run that diverges leaves a report: why, and what was measured until then."""
    try:
        yield
    except Diverged as diverged:
        if ranks.leads:
            with ending.on_disk(run):
                _write_heldout(run, found())
                write_page([Stopped(run.folder, f"Diverged at {diverged}.")], run.folder / "report.html")
        raise


def _measures_before(
    parts: Parts, run: Run, metrics: Metrics | NoMetrics, cursor: Cursor, stop: StopRequest
) -> dict[str, HeldOut | None]:
    """Teacher and untrained student, measured once; a resumed run finds them in its held-out file."""
    if cursor.step:
        found = run.heldout
        return {role: None if found[role] is None else HeldOut(**found[role]) for role in ROLES[:2]}
    teacher = None if parts.teacher is None else parts.measure(parts.teacher, stop.heed)
    student = parts.measure(parts.student, stop.heed)
    before: dict[str, HeldOut | None] = {"teacher": teacher, "student_before": student}
    for role, name in (("teacher", "teacher"), ("student_before", "student")):
        found = before[role]
        if found is not None:
            metrics.append(_evaluation_record(name, 0, 0, found))
    if parts.ranks.leads:
        with ending.on_disk(run):
            _write_heldout(run, before)
    return before


def _finish(run: Run, parts: Parts, found: dict[str, HeldOut | None]) -> None:
    """Write the student, what was measured, a sample of text, the report and the card."""
    state, samples = full_state(parts.student.model, parts.ranks), _samples(parts)
    if not parts.ranks.leads:
        return
    with ending.on_disk(run):
        parts.student.plain.save_pretrained(run.student, state_dict=state)
        parts.tokenizer.save_pretrained(run.student)
        write_json(run.folder / "samples.json", {"format": FORMAT, **samples})
        _write_heldout(run, found)
        evaluation = {role: None if (one := found[role]) is None else one.measures for role in ROLES}
        write_json(run.folder / "evaluation.json", {"format": FORMAT, **evaluation})
        _write_report(Run(run.folder))


def _write_heldout(run: Run, found: dict[str, HeldOut | None]) -> None:
    content = {role: None if one is None else vars(one) for role, one in found.items()}
    write_json(run.folder / "heldout.json", {"format": FORMAT, **content})


def _samples(parts: Parts) -> dict[str, Any]:
    """What student and teachers write after the first tokens of the held-out text."""
    prompt = _prompt(parts.heldout_rows)
    models = {"student": parts.student}
    if isinstance(parts.teacher, LiveTeacher):
        models["teacher"] = parts.teacher.split
    elif parts.teacher is not None:  # a mixture is not asked for text, each of its teachers is
        models |= {key: one.split for key, one in zip(parts.recipe.teachers, parts.teacher.each, strict=True)}
    texts = {
        name: continuation(split.plain, parts.tokenizer, prompt, tokens=SAMPLE_TOKENS, usable=split.usable)
        for name, split in models.items()
    }
    for split in models.values():
        split.settle()
    return {"prompt": parts.tokenizer.decode(prompt, skip_special_tokens=True), **texts}


def _prompt(rows: AnyRows) -> list[int]:
    """The first tokens of the held-out text; where only answers are learned, those before the first of them."""
    row, stop = rows[0], SAMPLE_PROMPT
    if parts_of(rows)[0].store.loss is not None and (row.labels != IGNORED).any():
        stop = int((row.labels != IGNORED).argmax()) + 1
    elif row.positions is not None:
        stop = min(stop, int((row.segments == 0).sum()))
    return row.input_ids[:stop].tolist()


def _evaluation_record(role: str, step: int, trained: int, found: HeldOut) -> dict[str, Any]:
    return {"kind": "evaluation", "role": role, "step": step, "tokens_trained": trained, **found.measures}


def _short(values: dict[str, Any]) -> str:
    kl = "" if values["kl"] is None else f", KL(T||S) {values['kl']:.4f}"
    return f"cross-entropy {values['cross_entropy']:.4f}{kl}"


def _write_report(run: Run) -> None:
    write_page([run], run.folder / "report.html")
    write_readme(run)
    write_card(run)


def leads() -> bool:
    """Whether this process is the one that speaks."""
    return os.environ.get("RANK", "0") == "0"


# ----- a verb beside distill


def evaluate(run: Run, say: Say) -> Run:
    """Measure a finished run's student again and rewrite its evaluation and report."""
    if not run.finished:
        raise Refusal(f"{run.folder} holds no finished run: run `tailkd distill` on its recipe to the end")
    recipe = recipe_file.read(run.folder / "recipe.yaml")
    parts = build(recipe, say, student=str(run.student), scored=False)
    found = {role: None if one is None else HeldOut(**one) for role, one in run.heldout.items() if role in ROLES}
    if parts.teacher is not None:
        found["teacher"] = parts.measure(parts.teacher)
    _finish(run, parts, {**found, "student": parts.measure(parts.student)})
    return Run(run.folder)
