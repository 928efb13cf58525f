"""Which choices of a recipe do not go together, and which of its files are missing."""

from __future__ import annotations

import glob
import re
from pathlib import Path
from urllib.parse import urlsplit

from tailkd.recipe import READERS, MatchFlops, Recipe
from tailkd.recipe_data import HeldOut, Source
from tailkd.recipe_models import Model
from tailkd.report.record import Run

Problems = list[tuple[str, str]]


def _unread_keys(recipe: Recipe) -> Problems:
    divergence = recipe.objective.divergence
    return [
        (f"objective.{key}", f"has no meaning for divergence {divergence!r}, only for {', '.join(readers)}; remove it")
        for key, readers in READERS.items()
        if key in recipe.objective.model_fields_set and divergence not in readers
    ]


def _teacher_needed(recipe: Recipe) -> Problems:
    written = recipe.written_teacher is not None
    if recipe.teachers:
        return []
    if recipe.teacher is not None and not written:
        return [("teacher", "is an empty list; give one teacher or several, or null with divergence none")]
    problems = []
    if recipe.objective.divergence != "none" and not written:
        message = f"divergence {recipe.objective.divergence!r} needs a teacher; null goes with 'none' alone"
        problems.append(("teacher", message))
    for key, asked in (
        ("student.from_teacher", recipe.student.from_teacher),
        ("vocabulary.fold", not written and recipe.vocabulary.fold),
        ("objective.hidden", not written and recipe.objective.hidden),
        ("data.select", recipe.data.select),
        ("cache", not written and recipe.cache),
    ):
        if asked and written:
            problems.append((key, "needs the teacher itself; give teacher.model beside teacher.cache, or remove this"))
        elif asked:
            problems.append((key, "needs a teacher, which is null; give one, or remove this"))
    return problems


def _several_teachers(recipe: Recipe) -> Problems:
    if len(recipe.teachers) < 2:
        return []
    problems = []
    if recipe.objective.hidden is not None:
        problems.append(("objective.hidden", "compares hidden states with those of one teacher; several are given"))
    if recipe.data.select is not None:
        problems.append(("data.select", "chooses rows by the scores of one teacher; several are given"))
    if recipe.generate is not None:
        problems.append(("generate", "writes the text of one teacher; several are given"))
    if recipe.student.from_teacher is not None:
        message = "cuts the student out of one teacher, and several are given; give student.model, the folder that "
        problems.append(("student.from_teacher", message + "`tailkd shrink` writes from a recipe with one of them"))
    return problems


def _one_of(key: str, given: dict[str, object]) -> Problems:
    named = [name for name, value in given.items() if value]
    if len(named) == 1:
        return []
    *most, last = given
    choices = f"{', '.join(most)} or {last}"
    return [(key, f"expected one of {choices}; came {', '.join(named) or 'none'}")]


def _alternatives(recipe: Recipe) -> Problems:
    heldout, training = recipe.data.heldout, recipe.training
    problems = []
    for key, source in _sources(recipe):
        problems += _one_of(key, {"path": source.path, "hub": source.hub})
    own = {"path": heldout.path, "hub": heldout.hub, "fraction": heldout.fraction is not None}
    problems += _one_of("data.heldout", own)
    budgets = {name: getattr(training, name) for name in ("tokens", "epochs", "flops", "hours")}
    problems += _one_of("training", budgets)
    student = recipe.student
    starts = {"model": student.model, "from_teacher": student.from_teacher, "run": student.run}
    problems += _one_of("student", starts)
    for key, teacher in recipe.teachers.items():
        problems += _one_of(key, {"model": teacher.model, "config": teacher.config})
    return problems


def _written_teacher(recipe: Recipe) -> Problems:
    """What goes with `cache` and `teacher.cache`."""
    several, asked, written = len(recipe.teachers) > 1, recipe.cache, recipe.written_teacher is not None
    hidden, problems = recipe.objective.hidden, []
    if isinstance(recipe.teacher, tuple):
        told = (
            "is that of a teacher alone; write the mixture down with `tailkd cache`, then give teacher: {cache: PATH}"
        )
        problems += [(f"{key}.cache", told) for key, one in recipe.teachers.items() if one.cache is not None]
    if several and asked is not None and asked.payload == "hidden":
        problems.append(("cache.payload", "hidden is that of one teacher, and several are given; take tail or dense"))
    if asked is not None and asked.payload != "tail":
        keys = [key for key in ("top_k", "tail_samples") if key in asked.model_fields_set]
        message = f"has no meaning for payload {asked.payload!r}, only for tail; remove it"
        problems += [(f"cache.{key}", message) for key in keys]
    if written and hidden is not None and hidden.pairs != "last":
        problems.append(("objective.hidden.pairs", "a cache has the last hidden states alone; take 'last'"))
    return problems


FORMS = "expected text, or prompt and completion, or messages"


def _forms(recipe: Recipe) -> Problems:
    problems = []
    for key, source in (*_sources(recipe), ("data.heldout", recipe.data.heldout)):
        asked, chats = source.prompt or source.completion, source.messages
        forms = {"text": "text" in source.model_fields_set, "prompt and completion": asked, "messages": chats}
        named = [name for name, given in forms.items() if given]
        if len(named) > 1:
            problems.append((key, f"{FORMS}; came {', '.join(named)}"))
        for name, other in (("prompt", "completion"), ("completion", "prompt")):
            if getattr(source, name) and not getattr(source, other):
                problems.append((f"{key}.{name}", f"needs {other} beside it, the name of its field"))
        if source.template and not asked:
            problems.append((f"{key}.template", "is for prompt and completion alone; remove it, or name their fields"))
    return problems


def _hours(recipe: Recipe) -> Problems:
    if recipe.training.hours is None or recipe.hardware.peak_flops is not None:
        return []
    return [
        (
            "training.hours",
            "needs hardware.peak_flops, the peak of one device in FLOPs per second, and hardware.utilisation; "
            "or give training.tokens",
        )
    ]


def _remote_code(recipe: Recipe) -> Problems:
    return [
        (
            f"{role}.revision",
            f"expected a 40-digit commit hash, since {role}.remote_code runs code; came {model.revision!r}",
        )
        for role, model in _models(recipe)
        if model.remote_code and not re.fullmatch(r"[0-9a-f]{40}", model.revision or "")
    ]


def _mixture(recipe: Recipe) -> Problems:
    sources, names, problems = recipe.data.sources, recipe.data.names, []
    weighted = [source.weight is not None for source in sources]
    if len(sources) == 1 and weighted[0]:
        problems.append(("data.train", "weight has no meaning for a single source; remove it"))
    elif any(weighted) and not all(weighted):
        without = ", ".join(name for name, has in zip(names, weighted, strict=True) if not has)
        problems.append(("data.train", f"give all sources a weight, or none; {without} came without"))
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        problems.append(("data.train", f"two sources are called {', '.join(twice)}; give each its own name"))
    return problems


def _intervals(recipe: Recipe) -> Problems:
    tokens, training = recipe.training.tokens, recipe.training
    if not isinstance(tokens, int):
        return []
    pairs = (
        ("training.save_every_tokens", training.save_every_tokens),
        ("evaluate.every_tokens", recipe.evaluate.every_tokens),
    )
    return [
        (key, f"{every:,} is beyond training.tokens = {tokens:,}; null means only at the end")
        for key, every in pairs
        if every is not None and every > tokens
    ]


def _selections(recipe: Recipe) -> Problems:
    select, chosen, sources = recipe.data.select, recipe.objective.tokens, recipe.data.sources
    problems = []
    if select is not None and chosen is not None:
        message = "does not go together with data.select: rows are chosen, or tokens of them; remove one"
        problems.append(("objective.tokens", message))
    plain = recipe.data.packing == "rows" and all(one.prompt is None and one.messages is None for one in sources)
    key = "data.select" if select is not None else "objective.tokens"
    if select is not None and recipe.training.epochs is not None:
        problems.append(("training.epochs", "counts rows before data.select chooses among them; give training.tokens"))
    if len(sources) > 1 and (select is not None or chosen is not None):
        problems.append((key, f"chooses among the rows of one source; data.train names {len(sources)}"))
    if not plain and (select is not None or chosen is not None):
        message = "chooses among rows of plain text; it goes with data.packing rows, without prompts and messages"
        problems.append((key, message))
    return problems


def _references(recipe: Recipe) -> list[tuple[str, str]]:
    asked = (("data.select", recipe.data.select), ("objective.tokens", recipe.objective.tokens))
    return [(f"{key}.reference", section.reference) for key, section in asked if section is not None]


def _split(recipe: Recipe) -> Problems:
    fraction = recipe.data.heldout.fraction
    if fraction is not None and fraction > 0.5:
        return [("data.heldout.fraction", f"{fraction} holds out more than it trains on; expected at most 0.5")]
    return []


def _generate(recipe: Recipe) -> Problems:
    asked, sources = recipe.generate, recipe.data.sources
    if asked is None:
        return []
    read = sources[0].path if asked.prompts is None else asked.prompts.path
    url = None if asked.server is None else asked.server.url
    several = asked.prompts is None and len(sources) > 1
    found = {
        "generate.prompts": several and f"is needed where data.train names several sources; it names {len(sources)}",
        "generate": not recipe.teachers
        and "needs a teacher, which is null or a cache alone; give teacher.model, or remove this",
        "generate.out": read == asked.out
        and f"{read!r} is also what prompts are taken of; give the corpus as generate.prompts",
        "generate.prefix_tokens": asked.prompts is None
        and asked.prefix_tokens is None
        and "is needed where prompts are prefixes of the documents of data.train; or give generate.prompts",
        "generate.template": ("{prompt}" not in asked.template and "expected {prompt} in it, where the prompt goes")
        or (asked.prefix_tokens and asked.template != "{prompt}" and "does not go with generate.prefix_tokens"),
        "generate.samples": asked.samples > 1
        and not asked.temperature
        and "at temperature 0 all samples of a prompt are the same; take 1, or a temperature",
        "generate.server.url": url is not None and not _is_address(url) and f"expected http://HOST:PORT; came {url!r}",
    }
    return [(key, message) for key, message in found.items() if message]


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


# ----- files


def _corpora(recipe: Recipe) -> Problems:
    sources = (*_sources(recipe), ("data.heldout", recipe.data.heldout))
    return [
        (f"{key}.path", f"no file, folder or match at {source.path!r}{_who_writes(recipe, source.path)}")
        for key, source in sources
        if source.path
        and not (source.hub or (isinstance(source, HeldOut) and source.fraction is not None))
        and not _exists(source.path)
    ]


def _who_writes(recipe: Recipe, path: str) -> str:
    written = recipe.generate is not None and recipe.generate.out == path
    return "; `tailkd generate` with this recipe writes it" if written else ""


def _prompts(recipe: Recipe) -> Problems:
    asked = None if recipe.generate is None else recipe.generate.prompts
    if asked is None:
        return _corpora(recipe)
    missing = [] if _exists(asked.path) else [("generate.prompts.path", f"no file, folder or match at {asked.path!r}")]
    return missing + [problem for problem in _corpora(recipe) if problem[0] == "data.heldout.path"]


def _exists(path: str) -> bool:
    expanded = Path(path).expanduser()
    return expanded.exists() or any(True for _ in glob.iglob(str(expanded), recursive=True))


def _model_folders(recipe: Recipe) -> Problems:
    problems = []
    for role, model in _models(recipe):
        if model.model is None:
            continue
        path, gguf = Path(model.model).expanduser(), getattr(model, "gguf_file", None)
        looks_like_path = _looks_like_path(model.model)
        if looks_like_path and gguf and not (path / gguf).is_file():
            problems.append((f"{role}.gguf_file", f"no file {gguf!r} in {model.model!r}"))
        elif looks_like_path and not gguf and not (path / "config.json").is_file():
            problems.append((f"{role}.model", f"no config.json in {model.model!r}; expected a save_pretrained folder"))
    return problems + [
        (key, f"no config.json in {model!r}; expected a save_pretrained folder")
        for key, model in _references(recipe)
        if _looks_like_path(model) and not (Path(model).expanduser() / "config.json").is_file()
    ]


def _looks_like_path(model: str) -> bool:
    return model.startswith((".", "/", "~")) or model.count("/") > 1 or Path(model).expanduser().exists()


def _configs(recipe: Recipe) -> Problems:
    return [
        (f"{key}.config", f"has no weights, only the ledger can use it; give {key}.model")
        for key, teacher in recipe.teachers.items()
        if teacher.config is not None
    ]


def _cache(recipe: Recipe) -> Problems:
    folder = recipe.written_teacher
    if folder is None or (folder / "manifest.json").is_file():
        return []
    return [("teacher.cache", f"no cache in {str(folder)!r}; `tailkd cache` with cache.path={folder} writes one")]


def _first_stage(recipe: Recipe) -> Problems:
    asked = recipe.student.run
    if asked is None:
        return []
    if Path(asked).expanduser().resolve() == recipe.folder.resolve():
        return [("student.run", f"{asked!r} is this run's own folder; give the run of the stage before")]
    problem = unfinished(Run(Path(asked).expanduser()))
    return [] if problem is None else [("student.run", problem)]


def unfinished(earlier: Run) -> str | None:
    """Why no student can be taken out of a run's folder; None where one can."""
    if not (earlier.folder / "recipe.yaml").is_file():
        return f"{earlier.folder} is not a run folder: it holds no recipe.yaml"
    if earlier.finished:
        return None
    finish = f"tailkd distill {earlier.folder / 'recipe.yaml'} out={earlier.folder}"
    return f"the run in {earlier.folder} is not finished; finish it first: {finish}"


def _other_recipe(recipe: Recipe) -> Problems:
    asked = recipe.training.tokens
    if isinstance(asked, MatchFlops) and not Path(asked.match_flops).is_file():
        return [("training.tokens.match_flops", f"no recipe file at {asked.match_flops!r}")]
    return []


def _sources(recipe: Recipe) -> list[tuple[str, Source]]:
    """The corpora and evaluation sets with their keys."""
    data = recipe.data
    trained = (
        [(f"data.train.{i}", one) for i, one in enumerate(data.train)]
        if isinstance(data.train, tuple)
        else [("data.train", data.train)]
    )
    compared = () if data.overlap is None else data.overlap.sets
    return [*trained, *((f"data.overlap.sets.{i}", one) for i, one in enumerate(compared))]


def _models(recipe: Recipe) -> list[tuple[str, Model]]:
    return [*recipe.teachers.items(), ("student", recipe.student)]


RULES = (
    _unread_keys,
    _teacher_needed,
    _several_teachers,
    _alternatives,
    _written_teacher,
    _forms,
    _mixture,
    _hours,
    _remote_code,
    _intervals,
    _split,
    _selections,
    _other_recipe,
    _generate,
)
"""What can be said of a recipe by itself."""

CACHING = (_corpora, _model_folders, _configs, _first_stage)
"""What a cache needs to be written on this machine."""

FILES = (*CACHING, _cache)
"""What a run needs."""

WRITING = (_prompts, _model_folders, _configs)
"""What its text needs to be written."""
