"""What a run costs, from its recipe and two configurations; and budgets in other units as tokens."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from tailkd import ledger, pair, recipe_file
from tailkd.errors import Refusal
from tailkd.ledger import flops
from tailkd.ledger.anatomy import dissect
from tailkd.ledger.parameters import count
from tailkd.ledger.peak import measured_peak
from tailkd.models import load, precision
from tailkd.recipe import MatchFlops, Recipe
from tailkd.teacher.cache import MANIFEST, Manifest
from tailkd.teacher.shards import Payload

PETA = 1e15 / 1e6  # FLOPs per token of one PFLOP per million tokens


def bill(recipe: Recipe, *, usable: int | None = None, device: torch.device | None = None) -> ledger.Bill:
    """The bill of a recipe whose budget is settled; reads model configurations, no weights, tokenizer or data."""
    student, teachers = _sides(recipe)
    hardware = recipe.hardware
    training = _training(recipe, recipe.tokens, usable=usable, device=device or precision.default_device())
    found = ledger.bill(
        student,
        teachers,
        replace(training, generation=_generation(recipe, recipe.tokens)),
        None
        if hardware.peak_flops is None
        else ledger.Hardware(hardware.peak_flops, hardware.utilisation, hardware.devices, hardware.price_per_hour),
    )
    return replace(found, cache=_cache(recipe, usable, training.batch.compute))


def operations(recipe: Recipe, *, usable: int | None = None, device: torch.device | None = None) -> dict[str, Any]:
    """Parameters and FLOPs of `bill` as a tree, without the memory, which takes a rehearsal of the step."""
    theirs, ours = pair.configurations(recipe)
    counts = [count(config).as_dict() for config in theirs.values()]
    training = _training(recipe, recipe.tokens, usable=usable, device=device)
    training = replace(training, generation=_generation(recipe, recipe.tokens))
    paper, ran = (ledger.stages(*_sides(recipe), training, way).as_dict() for way in (ledger.PAPER, None))
    made = recipe.student.from_teacher
    student = count(ours, frozen_embeddings=made is not None and made.freeze_embeddings).as_dict()
    sides = {
        "student": student,
        **({"teacher": counts if isinstance(recipe.teacher, tuple) else counts[0]} if counts else {}),
    }
    return {"parameters": sides, "pflop_per_million_tokens": paper, "executed": ran}


def settled(recipe: Recipe, *, rows: int | None = None) -> Recipe:
    """The recipe with its budget in tokens, whole global batches of them; of one in tokens already, itself.

    ``tokens == flops / (FLOPs per token by the paper's convention)``, and for `hours` those that the stated hardware
    executes in that time; for `epochs` the whole batches that hold ``epochs * rows``, `rows` of the prepared corpus
    (see `corpora.settled`). Reads model configurations.

    Raises:
        Refusal: recipes that match each other's FLOPs in a circle; a budget of less than one global batch; epochs of a
            corpus whose rows are not given.
    """
    return _settled(recipe, (), rows)


def _settled(recipe: Recipe, above: tuple[str, ...], rows: int | None = None) -> Recipe:
    training = recipe.training
    if isinstance(training.tokens, int):
        return recipe
    if isinstance(training.tokens, MatchFlops):
        tokens = _matched(recipe, training.tokens.match_flops, above)
    elif training.epochs is not None:
        tokens = _epochs(recipe, training.epochs, rows)
    elif training.flops is not None:
        tokens = (training.flops - _written_before(recipe)) / flops_per_token(recipe)
    else:
        tokens = _within_hours(recipe, training.hours or 0.0)
    batch = training.batch_size * recipe.data.context
    if tokens < batch:
        raise Refusal(
            f"training: the budget buys {tokens:,.0f} tokens, less than one global batch of {batch:,}; give more, or "
            "lower training.batch_size"
        )
    whole = {"tokens": batch * math.floor(tokens / batch), "epochs": None, "flops": None, "hours": None}
    return recipe.model_copy(update={"training": training.model_copy(update=whole)})


def flops_per_token(recipe: Recipe) -> float:
    """FLOPs of teacher and student per trained token, by the paper's convention.

    The text that `generate` writes is among them where it grows with the tokens: without a `generate.count`.
    """
    return ledger.stages(*_sides(recipe), _training(recipe, 1), ledger.PAPER).total * PETA


def best_speed(recipe: Recipe, device: torch.device, devices: int) -> float | None:
    """Tokens per second if every device did nothing but the run's matrix products, at its peak.

    ``devices * hardware.peak_flops / executed FLOPs of a trained token``; the peak is measured where none is stated.
    None of a model whose operations the ledger does not know.
    """
    try:
        found = ledger.stages(*_sides(recipe), _training(recipe, 1, device=device), None)
    except Refusal:
        return None
    peak = recipe.hardware.peak_flops or measured_peak(device, precision.resolve(recipe.training.precision, device))
    return devices * peak / (PETA * (found.teacher_forward + found.student_step))


def _matched(recipe: Recipe, path: str, above: tuple[str, ...]) -> float:
    if path in above:
        raise Refusal(f"training.tokens.match_flops: recipes match one another in a circle: {' -> '.join(above)}")
    other = _settled(recipe_file.read(path, files=False), (*above, path))
    budget = other.tokens * flops_per_token(other) + _written_before(other)
    return (budget - _written_before(recipe)) / flops_per_token(recipe)


def _epochs(recipe: Recipe, epochs: float, rows: int | None) -> float:
    if rows is None:
        raise Refusal(
            f"training.epochs: {recipe.name!r} trains on as many tokens as its corpus has, which is known once it is "
            "prepared (`tailkd prepare`, `tailkd check`); here give training.tokens instead"
        )
    batch = recipe.training.batch_size
    return batch * math.ceil(epochs * rows / batch) * recipe.data.context


def _within_hours(recipe: Recipe, hours: float) -> float:
    hardware = recipe.hardware
    per_token = ledger.stages(*_sides(recipe), _training(recipe, 1), None).total * PETA
    speed = (hardware.peak_flops or 0.0) * hardware.utilisation * hardware.devices
    return (hours * 3600 * speed - _written_before(recipe)) / per_token


def _written_before(recipe: Recipe) -> float:
    """FLOPs of the text that `generate` writes, as many prompts as `generate.count` says; 0 without a count."""
    asked, made = recipe.generate, _generation(recipe, None)
    if asked is None or asked.count is None or made is None:
        return 0.0
    per_token = flops.generation(dissect(made.writer), made.prompt, made.generated)
    return asked.count * asked.samples * made.generated * per_token


def _generation(recipe: Recipe, tokens: float | None) -> ledger.Generation | None:
    """What `generate` writes at most: no completion ends before `max_new_tokens`, prompts given whole fill the row.

    `tokens` are those trained on. Without a `generate.count` each line is trained on once, its prompt too.
    """
    asked = recipe.generate
    if asked is None:
        return None
    writer = pair.teacher_configs(recipe).get("teacher")
    if writer is None:  # what `check` says of it comes from the recipe's rules
        return None
    new = asked.max_new_tokens
    prompt = asked.prefix_tokens or max(1, recipe.data.context - new)
    if asked.count is None:
        return ledger.Generation(writer, prompt, new, new / (prompt + new))
    return ledger.Generation(writer, prompt, new, asked.count * asked.samples * new / tokens if tokens else 0.0)


def _cache(recipe: Recipe, usable: int | None, products: torch.dtype) -> ledger.Cache | None:
    """Of the cache that a recipe asks for; its corpus is taken to be as large as the budget."""
    asked, configs = recipe.cache, list(pair.teacher_configs(recipe).values())
    if asked is None or not configs:
        return None
    ids = usable or min(config.get_text_config().vocab_size for config in configs)
    payload = Payload(asked.payload, ids, asked.top_k, asked.tail_samples, dtype=products)
    return ledger.cache(configs, payload, tokens=recipe.tokens, context=recipe.data.context)


def _signal(recipe: Recipe) -> str:
    """What a step asks of a teacher: nothing where the objective reads none or a cache has its tail."""
    folder, objective = recipe.written_teacher, recipe.objective
    if objective.divergence == "none" and objective.hidden is None:
        return "none"
    if folder is None:
        return "live"
    there = (folder / MANIFEST).is_file()
    return "hidden" if there and Manifest.read(folder).payload.kind == "hidden" else "none"


def _sides(recipe: Recipe) -> tuple[ledger.Student, ledger.Teachers]:
    """A teacher that training does not ask costs memory alone: held-out evaluation compares with it."""
    theirs, ours = pair.configurations(recipe)
    made = recipe.student.from_teacher
    student = ledger.Student(ours, frozen_embeddings=made is not None and made.freeze_embeddings)
    signal, beside = _signal(recipe), recipe.written_teacher is not None
    teachers = [
        ledger.Teacher(theirs[key], None if one.dtype == "auto" else getattr(torch, one.dtype), signal, beside)
        for key, one in recipe.teachers.items()
    ]
    return student, teachers if isinstance(recipe.teacher, tuple) else teachers[0] if teachers else None


def _training(
    recipe: Recipe, tokens: float, *, usable: int | None = None, device: torch.device | None = None
) -> ledger.Training:
    training, device = recipe.training, device or torch.device("cpu")
    batch = ledger.Batch(
        rows=min(training.micro_batch_size, training.batch_size),
        context=recipe.data.context,
        compute=precision.resolve(training.precision, device),
        usable=usable,
        device=device.type,
        accumulating=training.batch_size > training.micro_batch_size,
    )
    return ledger.Training(
        tokens=tokens,
        batch=batch,
        corpus_tokens=int(tokens),
        keep_checkpoints=training.keep_checkpoints,
        top_k=recipe.objective.divergence in ("tail_aware", "ghost_token_kl"),
        generation=_generation(recipe, None),
        selection=_selection(recipe),
    )


def _selection(recipe: Recipe) -> ledger.Selection | None:
    """What is read to choose: by teacher and reference of rows, by the reference alone of tokens."""
    select, chosen = recipe.data.select, recipe.objective.tokens
    if select is not None:
        reference = load.load_config("data.select.reference", select.reference)
        return ledger.Selection(pair.teacher_configs(recipe).get("teacher"), reference, select.ratio)
    if chosen is not None:
        return ledger.Selection(load.load_config("objective.tokens.reference", chosen.reference), ratio=1.0)
    return None
