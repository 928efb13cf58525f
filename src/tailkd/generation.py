"""`tailkd generate`: text that a recipe's teacher writes to a file; what a run's models write, side by side."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from tailkd import pair, recipe_file
from tailkd.corpora import Say, source
from tailkd.data import tokens
from tailkd.errors import Refusal
from tailkd.models import precision
from tailkd.pair import Vocabulary
from tailkd.prompts import Prompts, prompt_source
from tailkd.recipe import Recipe
from tailkd.report.record import Run
from tailkd.teacher.rollout import Engine, Prompt, Rollout, Sampling, Written
from tailkd.teacher.server import Server
from tailkd.train.signals import StopRequest
from tailkd.written import Lines

TOLD_EVERY = 5.0  # seconds


def write(recipe: Recipe, say: Say, *, fresh: bool = False) -> Path:
    """Write the teacher's text, one JSON object a line: ``generate.out``; the same call goes on with what is there.

    Each has `id`, `prompt`, `completion`, `text` (what the teacher read and wrote), `finished` (whether it came to an
    end token, which is in none of the texts), and `tokens` (of the completion, the end token too).

    Raises:
        Refusal: nothing to write or nothing to write it with; the file is there and made of something else.
        Preempted: a signal came; what is written stands.
        DataError, OutOfMemory: disk, server or memory failed on the way.
    """
    asked = recipe.generate
    if asked is None:
        raise Refusal("the recipe has no section generate; give it one with `out`, the file to write")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise Refusal("generate writes in one process; give each process of torchrun a recipe with files of its own")
    lines = Lines(Path(asked.out).expanduser(), made_of(recipe, shared := pair.read_vocabulary(recipe)))
    if lines.finished(fresh=fresh):
        say(f"already written: {lines.path}; --fresh writes it anew")
        return lines.path
    prompts = Prompts(recipe, shared)
    with StopRequest() as stop, lines.growing(fresh=fresh) as done:
        if done:
            say(f"going on after line {done:,} of {lines.path}")
        engine = _engine(recipe, shared, say)
        total = _write(engine, prompts, lines, stop.heed, _Told(done, say))
        found = _totals(lines)
        skipped = prompts.skipped + Counter(prompts.bad.counts)
        if not total:
            raise Refusal(f"no text of {prompts.source.path or prompts.source.hub} makes a prompt: {_listed(skipped)}")
        lines.finish({**found, "skipped": skipped})
    say(f"{lines.path}: {found['lines']:,} completions, {found['finished']:,} of them finished")
    if skipped:
        say(f"skipped: {_listed(skipped)}")
    return lines.path


def made_of(recipe: Recipe, shared: Vocabulary) -> dict[str, Any]:
    """All that the file's content depends on."""
    asked, teacher = recipe.generate, recipe.one_teacher
    assert asked is not None
    heldout = recipe.data.heldout.fraction
    server = None if asked.server is None else asked.server.model or "teacher.model"
    return {
        "teacher": None if teacher is None else teacher.model_dump(exclude={"sharded", "attention", "config"}),
        "precision": recipe.training.precision,
        "generate": {**asked.model_dump(exclude={"out", "prompts", "server"}), "server": server},
        "prompts": prompt_source(recipe).fingerprint(),
        "heldout": source(recipe.data.heldout).fingerprint() if heldout is None else heldout,
        "tokenizer": tokens.tokenizer_fingerprint(shared.tokenizer),
        "usable": shared.usable,
        "begin": shared.begin,
        "fold": {str(source): target for source, target in recipe.vocabulary.fold.items()},
    }


def _engine(recipe: Recipe, shared: Vocabulary, say: Say) -> Engine:
    asked, teacher = recipe.generate, recipe.one_teacher
    assert asked is not None
    assert teacher is not None
    sampling = Sampling(asked.max_new_tokens, asked.temperature, asked.top_p, asked.top_k, asked.seed)
    if asked.server is not None:
        options = asked.server.model_dump(exclude={"model"})
        ends = (shared.tokenizer.eos_token_id,)
        server = Server(model=asked.server.model or teacher.model or "", sampling=sampling, ends=ends, **options)
        say(f"written by {server.model} at {server.url} (kind {server.kind})")
        return server
    device = precision.default_device()
    pair.refuse_device(recipe, device)
    model = pair.load_teacher(recipe, device)
    return Rollout(
        model,
        shared.tokenizer,
        sampling,
        usable=shared.usable,
        batch_size=asked.batch_size,
        fold=recipe.vocabulary.fold,
    )


def _write(engine: Engine, prompts: Prompts, lines: Lines, heed: Callable[[], None], told: _Told) -> int:
    """Append what is missing; how many lines there are then."""
    heed()
    with closing(engine(prompts, told.done)) as pairs:  # at once: requests may be under way
        for prompt, written in pairs:
            lines.append(_record(prompt, written))
            told.one_more(written.tokens)
            heed()
    return told.done


def _record(prompt: Prompt, written: Written) -> dict[str, Any]:
    completion = written.completion.replace("\0", "")  # which no corpus may hold
    return {
        "id": prompt.id,
        "prompt": prompt.shown,
        "completion": completion,
        "text": prompt.text + completion,
        "finished": written.finished,
        "tokens": written.tokens,
    }


class _Told:
    """Counts lines, and says now and then how many there are."""

    def __init__(self, done: int, say: Say) -> None:
        self.done, self._say = done, say
        self._start = self._last = time.monotonic()
        self._tokens = 0

    def one_more(self, tokens: int | None) -> None:
        self.done, self._tokens = self.done + 1, self._tokens + (tokens or 0)
        now = time.monotonic()
        if now - self._last > TOLD_EVERY:
            self._last = now
            self._say(f"{self.done:,} completions, {self._tokens / (now - self._start):,.0f} tokens/s")


def _totals(lines: Lines) -> dict[str, int]:
    found = {"lines": 0, "finished": 0, "tokens": 0}
    for record in lines.records():
        found = {
            "lines": found["lines"] + 1,
            "finished": found["finished"] + record["finished"],
            "tokens": found["tokens"] + (record["tokens"] or 0),
        }
    return found


def _listed(skipped: dict[str, int]) -> str:
    return ", ".join(f"{count:,} texts: {reason}" for reason, count in skipped.items()) or "none"


# ----- side by side


def side_by_side(run: Run, prompt: str, *, tokens: int, temperature: float = 0.0) -> dict[str, str]:
    """What teacher (where there is one), student before training and student write after a prompt.

    Raises:
        Refusal: no finished run; a prompt without a token.
    """
    if not run.finished:
        raise Refusal(f"{run.folder} holds no finished run: run `tailkd distill` on its recipe to the end")
    recipe = recipe_file.read(run.folder / "recipe.yaml", files=False)
    device, shared = precision.default_device(), pair.read_vocabulary(recipe)
    pair.refuse_device(recipe, device)
    ids = shared.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if not ids:
        raise Refusal("the prompt is empty; give --prompt some text")
    begin = () if shared.begin is None else (shared.begin,)
    asked = Prompt("", 0, (*begin, *ids), prompt, prompt)
    sampling = Sampling(tokens, temperature)

    def text(model: Any, **options: Any) -> str:
        model = model.eval()
        writer = Rollout(model, shared.tokenizer, sampling, usable=shared.usable, batch_size=1, **options)
        return writer.write([asked])[0].completion

    teachers = {key: pair.load_teacher(recipe, device, key) for key in recipe.teachers}
    found = {key: text(model, fold=recipe.vocabulary.fold) for key, model in teachers.items()}
    found["student_before"] = text(pair.load_student(recipe, teachers.get("teacher"), device))
    del teachers
    torch.cuda.empty_cache()
    found["student"] = text(pair.load_student(recipe, None, device, str(run.student)))
    return found
