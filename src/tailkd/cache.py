"""A recipe's teacher written down by `tailkd cache`, and opened for training where `teacher.cache` names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tailkd import folder, pair, selection
from tailkd.corpora import Say, prepare
from tailkd.data.mixture import AnyRows
from tailkd.data.tokens import tokenizer_fingerprint
from tailkd.errors import Refusal
from tailkd.models import precision
from tailkd.objective.checks import FROM_CACHE
from tailkd.pair import Vocabulary
from tailkd.recipe import Recipe
from tailkd.recipe_models import WeightedTeacher
from tailkd.teacher import cache_writing
from tailkd.teacher.cache import Cache, CachedTeacher, Manifest
from tailkd.teacher.cache_writing import Writing, differences
from tailkd.teacher.live import LiveTeacher, LiveTeachers, Teacher
from tailkd.teacher.shards import Payload
from tailkd.train.ranks import ALONE, Ranks
from tailkd.train.signals import StopRequest

LARGEST_DENSE = 16_384  # ids: each position takes four bytes an id, and the loss a product with as many columns


def write(recipe: Recipe, say: Say) -> Manifest:
    """Write the teacher down for every training row of a recipe, on all processes of torchrun.

    The same call goes on after an interruption, and adds the rows of a corpus that has grown.

    Raises:
        Refusal: a recipe without `cache` or without a teacher to load; see `teacher.cache_writing.write`.
        Preempted: asked to stop; the shards that are written stay.
        DataError: the disk does not take them.
    """
    asked = recipe.cache
    if asked is None:
        raise Refusal("the recipe has no section cache; give it one with `path`, or cache.path=FOLDER behind it")
    if not recipe.teachers:
        raise Refusal(
            "teacher.model is null, and its weights are what is to be written down; give a folder or a hub id"
        )
    target, ranks = Path(asked.path).expanduser(), Ranks.start()
    with StopRequest(recipe.training.stop_after_seconds, ranks.agreed) as stop:
        said = say if ranks.leads else lambda line: None
        pair.refuse_device(recipe, ranks.device)
        shared = pair.read_vocabulary(recipe)
        manifest = _manifest(recipe, shared, ranks)
        cache_writing.refuse_other(target, manifest.made_of)
        folder.refuse_unwritable(target, "cache.path")
        with ranks.in_turns():
            rows, _ = prepare(recipe, shared, said)
        if recipe.data.select is not None:
            rows = selection.chosen(recipe, shared, rows, ranks=ranks, heed=stop.heed, say=said)
        return cache_writing.write(
            Writing.of(target, manifest, rows),
            lambda: _live(recipe, shared, ranks.device),
            batch_size=recipe.evaluate.batch_size,
            ranks=ranks,
            heed=stop.heed,
            say=said,
        )


def verify(recipe: Recipe) -> Manifest:
    """Read a recipe's cache and compare all of it with its checksums.

    Raises:
        Refusal: there is none, or naming the file that is not what was written.
    """
    target = recipe.written_teacher if recipe.cache is None else Path(recipe.cache.path).expanduser()
    if target is None:
        raise Refusal("the recipe names no cache; give cache.path=FOLDER or teacher.cache=FOLDER behind it")
    with StopRequest(None) as stop:
        cache = Cache(target)
        cache.verify(stop.heed)
    return cache.manifest


def opened(recipe: Recipe, shared: Vocabulary, rows: AnyRows, ranks: Ranks) -> CachedTeacher | None:
    """What training reads in the place of the teacher; None where it asks the teacher itself.

    Raises:
        Refusal: a cache of another teacher, tokenizer or setting, without some of the rows, or that holds less than the
            objective needs.
    """
    target = recipe.written_teacher
    if target is None:
        return None
    cache = Cache(target)
    refuse_unfit(recipe, shared, ranks)
    needed = [rows[number].key for number in range(len(rows))] if ranks.leads else []
    lacking = ranks.gathered(len(cache.missing(needed)) if needed else 0)[0]
    if lacking:
        raise Refusal(
            f"teacher.cache: {target} has no signal for {lacking:,} of {len(rows):,} training rows (another corpus, "
            f"context, split or packing, or a cache that is not finished); `tailkd cache` with cache.path={target} "
            "adds them"
        )
    return CachedTeacher(cache, fold=recipe.vocabulary.fold or dict(cache.manifest.made_of["fold"]))


def refuse_unfit(recipe: Recipe, shared: Vocabulary, ranks: Ranks = ALONE) -> None:
    """Refuse a `teacher.cache` of another teacher or setting, or an objective that needs more than it holds."""
    if recipe.written_teacher is not None:
        manifest = Manifest.read(recipe.written_teacher)
        _refuse_other(recipe, shared, manifest, ranks)
        _refuse_objective(recipe, manifest)


def content(recipe: Recipe) -> dict[str, str]:
    """What a resumed run must share of its teacher's cache; empty without one."""
    target = recipe.written_teacher
    return {} if target is None else {"teacher.cache (content)": Manifest.read(target).fingerprint}


# ----- what it is made of


def _manifest(recipe: Recipe, shared: Vocabulary, ranks: Ranks) -> Manifest:
    """Of the cache that this recipe writes."""
    asked = recipe.cache
    assert asked is not None
    if asked.payload == "dense" and shared.usable > LARGEST_DENSE:
        raise Refusal(
            f"cache.payload: dense keeps {4 * shared.usable:,} bytes a token for {shared.usable:,} ids; it is for "
            f"vocabularies of up to {LARGEST_DENSE:,}: take hidden, which is exact too, or tail"
        )
    products = precision.resolve(recipe.training.precision, ranks.device)
    configs = pair.teacher_configs(recipe).values()
    payload = Payload(
        asked.payload,
        shared.usable,
        asked.top_k,
        asked.tail_samples,
        next(iter(configs)).get_text_config().hidden_size if asked.payload == "hidden" else 0,
        products if asked.payload == "hidden" else torch.float32,
    )
    return Manifest({**_made_of(recipe, shared, ranks), **_settings(recipe, payload)}, payload)


def _made_of(recipe: Recipe, shared: Vocabulary, ranks: Ranks) -> dict[str, Any]:
    """Teacher and vocabulary; one process reads the weights, the others hear of it."""
    weights = ranks.gathered(pair.fingerprints(recipe) if ranks.leads else {})[0]
    products = precision.resolve(recipe.training.precision, ranks.device)
    found: dict[str, Any] = {}
    for key, one in recipe.teachers.items():
        found[f"{key}.weights"] = weights[key]
        found[f"{key}.dtype"] = str(products).removeprefix("torch.") if one.dtype == "auto" else one.dtype
        if isinstance(one, WeightedTeacher):
            found[f"{key}.weight"] = one.weight
    return {**found, "products": str(products).removeprefix("torch."), **_vocabulary(recipe, shared)}


def _vocabulary(recipe: Recipe, shared: Vocabulary) -> dict[str, Any]:
    return {
        "tokenizer": tokenizer_fingerprint(shared.tokenizer),
        "usable ids": shared.usable,
        "fold": [list(pair) for pair in sorted(recipe.vocabulary.fold.items())],
    }


def _settings(recipe: Recipe, payload: Payload) -> dict[str, Any]:
    if payload.kind != "tail":
        return {"payload": payload.kind}
    kept = {"top_k": payload.top_k, "tail_samples": payload.tail_samples}
    return {"payload": "tail", **kept, "temperature": recipe.objective.temperature}


def _refuse_other(recipe: Recipe, shared: Vocabulary, manifest: Manifest, ranks: Ranks) -> None:
    """Everything that the recipe says of the teacher is what the cache was made of."""
    then = manifest.made_of
    now = _made_of(recipe, shared, ranks) if recipe.teachers else _vocabulary(recipe, shared)
    if not recipe.teachers and not recipe.vocabulary.fold:
        del now["fold"]
    if recipe.cache is not None:
        now |= {"payload": recipe.cache.payload}
        if recipe.cache.payload == "tail":
            now |= {"top_k": recipe.cache.top_k, "tail_samples": recipe.cache.tail_samples}
    told = differences({key: then.get(key) for key in now}, now)
    if told:
        raise Refusal(
            f"teacher.cache: {recipe.written_teacher} is the cache of something else:{told}\ntake the old values back, "
            "or write another with `tailkd cache` and another cache.path"
        )


def _refuse_objective(recipe: Recipe, manifest: Manifest) -> None:
    asked, payload, made_of = recipe.objective, manifest.payload, manifest.made_of
    problem = None
    if asked.hidden is not None and payload.kind != "hidden":
        problem = ("hidden", "compares hidden states", "take payload: hidden")
    elif payload.kind != "tail" or asked.divergence == "none":
        problem = None
    elif asked.divergence not in FROM_CACHE:
        needs = f"is {asked.divergence!r}, which needs the probability of every id"
        problem = ("divergence", needs, f"take payload: hidden or dense, or one of {', '.join(FROM_CACHE)}")
    elif asked.temperature != made_of["temperature"]:
        needs = f"is {asked.temperature:g}, and draws at {made_of['temperature']:g} cannot be turned into others"
        problem = ("temperature", needs, "take that one, or write another cache")
    elif asked.divergence != "forward_kl" and asked.top_k > payload.top_k and payload.top_k < payload.usable:
        needs = f"is {asked.top_k}, and {payload.top_k} ids are kept with their probabilities"
        problem = ("top_k", needs, "take that many or fewer, or write another cache with a larger cache.top_k")
    if problem is not None:
        key, needs, advice = problem
        raise Refusal(
            f"objective.{key}: {needs}; the cache {recipe.written_teacher} has payload {payload.kind!r}: {advice} "
            "(`tailkd cache`)"
        )


def _live(recipe: Recipe, shared: Vocabulary, device: torch.device) -> Teacher:
    """The teachers whole in each process."""
    dtype, fold = precision.resolve(recipe.training.precision, device), recipe.vocabulary.fold
    each = []
    for key in recipe.teachers:
        model = pair.load_teacher(recipe, device, key)
        each.append(LiveTeacher(model, usable=shared.usable, compute_dtype=dtype, fold=fold))
        if recipe.data.packing == "documents":
            each[-1].split.prove_documents()
    if isinstance(recipe.teacher, tuple):
        return LiveTeachers(each, [one.weight for one in recipe.teacher])
    return each[0]
