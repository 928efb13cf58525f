"""`tailkd evaluate --tasks`: a model asked the tasks of two suites, the results in the tasks.json of its folder."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailkd import folder, recipe_file
from tailkd.corpora import Say
from tailkd.errors import Refusal
from tailkd.evaluate import commonsense
from tailkd.evaluate.commonsense.files import ON_REQUEST
from tailkd.evaluate.mathematics import TASKS as MATHEMATICS
from tailkd.models import load, precision
from tailkd.recipe_rules import unfinished
from tailkd.report.card import write_card
from tailkd.report.page import write_page
from tailkd.report.record import FORMAT, Run, write_json
from tailkd.report.tasks import merged

SUITES: dict[str, tuple[str, ...]] = {"commonsense": tuple(commonsense.TASKS), "mathematics": tuple(MATHEMATICS)}
OUT = Path("evaluations")


@dataclass(frozen=True)
class Asked:
    """What is measured: `tasks` as named on the command line, the rest as its options."""

    tasks: str
    shots: tuple[int, ...] = (0,)
    limit: int | None = None
    data: Path | None = None
    batch_size: int = 8

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks, those of a suite for its name.

        Raises:
            Refusal: a name that is neither.
        """
        known = [name for suite in SUITES.values() for name in suite]
        given = [name.strip() for name in self.tasks.split(",") if name.strip()]
        wrong = [name for name in given if name not in known and name not in SUITES]
        if wrong or not given:
            raise Refusal(
                f"--tasks {self.tasks!r}: expected {', '.join(SUITES)}, or of {', '.join(known)} some, joined by commas"
            )
        return tuple(dict.fromkeys(name for one in given for name in SUITES.get(one, (one,))))

    def of(self, suite: str) -> tuple[str, ...]:
        return tuple(name for name in SUITES[suite] if name in self.names)


@dataclass(frozen=True)
class Subject:
    """A model to be asked.

    given: the words that name it on the command line. called: what its results call it. folder: where they go.
    """

    given: tuple[str, ...]
    model: str
    called: str
    folder: Path
    precision: str
    gguf_file: str | None = None


def subject(
    given: str, *, gguf_file: str | None = None, out: Path | None = None, products: str | None = None
) -> Subject:
    """A run's student by the run's folder; else a save_pretrained folder, a hub id, or a GGUF file.

    Args:
        gguf_file: a GGUF file's name in the folder or hub repository that is given; or its path is given.
        products: the precision; by default the run's, "auto" for a bare model.

    Raises:
        Refusal: an unfinished run, options that a run has not, a folder of results that is another model's.
    """
    place = Path(given).expanduser()
    if (place / "recipe.yaml").is_file():
        return _student(given, gguf_file=gguf_file, out=out, products=products)
    words = (given, "--gguf-file", gguf_file) if gguf_file else (given,)
    model, called = given, "/".join(words[::2])
    if place.suffix == ".gguf" and place.is_file():
        model, gguf_file = str(place.parent), place.name
    name = Path(gguf_file).stem if gguf_file else (place.resolve() if place.is_dir() else place).name
    target = out or OUT / name
    others = {one["model"] for one in Run(target).tasks} - {called}
    if others:
        raise Refusal(f"{target} holds results of {' '.join(sorted(others))}, not of {called}; give another --out")
    return Subject(words, model, called, target, products or "auto", gguf_file)


def _student(given: str, *, gguf_file: str | None, out: Path | None, products: str | None) -> Subject:
    run = Run(Path(given).expanduser())
    if gguf_file or out:
        raise Refusal(
            f"{given} is a run: its student is measured, and its results stay in it; leave --gguf-file and --out away"
        )
    problem = unfinished(run)
    if problem is not None:
        raise Refusal(problem)
    recipe = recipe_file.read_saved(run.folder / "recipe.yaml")
    return Subject((given,), str(run.student), "student", run.folder, products or recipe.training.precision)


def examine(one: Subject, asked: Asked, say: Say) -> list[dict[str, Any]]:
    """Measure the tasks and write each result, as soon as it is there, into the tasks.json of the subject's folder.

    Returns:
        The results of this call, entries of tasks.json.

    Raises:
        Refusal: tasks, files or the model cannot be used; all that can be known is checked before the model is loaded.
    """
    sources = _sources(asked, say)
    if asked.of("mathematics") and asked.data is None:
        raise Refusal("mathematics reads local files: give the folder that holds math/ and prompts/ by --data")
    folder.refuse_unwritable(one.folder)
    device = precision.default_device()
    dtype = precision.resolve(one.precision, device)
    options: dict[str, Any] = {"gguf_file": one.gguf_file}
    tokenizer = load.load_tokenizer("", one.model, **options)
    if tokenizer is None:
        raise Refusal(f"{one.model} holds no tokenizer; save the model's into it")
    model = load.load_model("", one.model, dtype=dtype, device=device, **options)
    known = {"model": one.called, "precision": str(dtype).removeprefix("torch."), "command": command(one, asked)}
    found: list[dict[str, Any]] = []

    def keep(entries: Sequence[dict[str, Any]]) -> None:
        found.extend({**entry, **known} for entry in entries)
        one.folder.mkdir(parents=True, exist_ok=True)
        write_json(one.folder / "tasks.json", {"format": FORMAT, "results": merged(Run(one.folder).tasks, found)})

    shared: dict[str, Any] = {"limit": asked.limit, "batch_size": asked.batch_size, "out": one.folder, "say": say}
    if sources:
        for entry in commonsense.measured(model, tokenizer, sources, shots=asked.shots, **shared):
            keep([entry])
    if mathematics := asked.of("mathematics"):
        from tailkd.evaluate.mathematics import solving

        assert asked.data is not None
        own = asked.data / "math"
        shared |= {"data": own if own.is_dir() else asked.data, "prompts": None, "command": known["command"]}
        keep(solving.measured(model, tokenizer, mathematics, **shared))
    _tell(Run(one.folder))
    return found


def _tell(run: Run) -> None:
    """A run's page and its student's card have the results too."""
    if run.finished:
        write_page([run], run.folder / "report.html")
        write_card(run)


def _sources(asked: Asked, say: Say) -> dict[str, commonsense.Local | None]:
    """Where the items of each commonsense task come from."""
    names = asked.of("commonsense")
    found: dict[str, commonsense.Local | None] = dict.fromkeys(name for name in names if name not in ON_REQUEST)
    if asked.data is not None and names:
        found = dict(commonsense.find(names, asked.data, shots=max(asked.shots)))
    absent = [name for name in names if name not in found]
    if absent and len(names) == len(absent):
        raise Refusal(f"{' '.join(absent)} is no free download: ask its makers, and give the folder with it by --data")
    for name in absent:
        say(f"{name} is left out: it is no free download, and no --data folder holds it")
    if names and not commonsense.can_measure():
        raise Refusal("commonsense tasks are asked by lm-eval, which is not installed: pip install 'tailkd[eval]'")
    return found


def command(one: Subject, asked: Asked) -> str:
    """The command that measures this again."""
    words = ["tailkd", "evaluate", *one.given, "--tasks", asked.tasks, "--shots", ",".join(map(str, asked.shots))]
    optional = {
        "--limit": asked.limit,
        "--data": asked.data,
        "--batch-size": asked.batch_size,
        "--precision": None if one.precision == "auto" else one.precision,
    }
    return shlex.join([*words, *(str(part) for pair in optional.items() if pair[1] is not None for part in pair)])
