"""Recipes that extend others, and budgets in other units than tokens."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ruamel.yaml import YAML

import tailkd
from tailkd import corpora, inspection, recipe_file, sweep
from tailkd.bill import flops_per_token, settled
from tailkd.errors import Refusal
from tailkd.pair import read_vocabulary


@pytest.fixture
def base(recipe: dict[str, Any], tmp_path: Path) -> Path:
    YAML().dump(recipe, tmp_path / "base.yaml")
    return tmp_path / "base.yaml"


def child(base: Path, text: str, name: str = "child.yaml") -> Path:
    path = base.with_name(name)
    path.write_text(f"extends: {base.name}\n" + text)
    return path


def test_a_baseline_in_three_lines(base: Path) -> None:
    path = child(base, "name: kl\nobjective: {divergence: forward_kl}\n")
    kl, tad = recipe_file.read(path), recipe_file.read(base)
    assert (kl.name, kl.objective.divergence) == ("kl", "forward_kl")
    assert "top_k" not in kl.resolved()["objective"]
    assert kl.training == tad.training
    assert recipe_file.read(path, {"objective.divergence": "tail_aware"}).objective.top_k == 10  # the default again


def test_an_alternative_takes_the_place_of_the_other(base: Path) -> None:
    path = child(base, "student: {from_teacher: {layers: 1}}\ntraining: {flops: 1e15}\n")
    read = recipe_file.read(path)
    assert read.student.model is None
    assert read.training.tokens is None
    assert read.training.learning_rate == recipe_file.read(base).training.learning_rate


def test_another_form_of_documents_takes_the_place_of_the_one_below(base: Path) -> None:
    child(base, "data: {train: {prompt: q, completion: a, template: chat}}\n", "pairs.yaml")
    pairs = recipe_file.read(base.with_name("pairs.yaml")).data.train
    assert "text" not in pairs.model_fields_set
    chats = base.with_name("chats.yaml")
    chats.write_text("extends: pairs.yaml\ndata: {train: {messages: m}}\n")
    assert recipe_file.read(chats).data.train.prompt is None
    texts = base.with_name("texts.yaml")
    texts.write_text("extends: chats.yaml\ndata: {train: {text: body}}\n")
    assert recipe_file.read(texts) == recipe_file.read(base)


def test_problems_name_the_file_they_stand_in(base: Path) -> None:
    path = child(base, "training: {batch_size: many}\n")
    base.write_text(base.read_text().replace("seed: 3", "sead: 3"))
    with pytest.raises(Refusal) as refused:
        recipe_file.read(path)
    assert "line 2: training.batch_size: expected a valid integer; came 'many'" in str(refused.value)
    assert "base.yaml, line 30: training.sead: unknown key" in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: [a]\n", r"extends: expected the path of a recipe file; came \['a'\]"),
        ("extends: nowhere.yaml\n", r"nowhere.yaml: the recipe cannot be read"),
        ("extends: self.yaml\n", r"extend one another in a circle"),
    ],
)
def test_what_cannot_be_extended(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "self.yaml").write_text(text)
    with pytest.raises(Refusal, match=message):
        recipe_file.read(tmp_path / "self.yaml")


def test_flops_matched(base: Path) -> None:
    text = "name: clm\nobjective: {divergence: none}\ntraining: {tokens: {match_flops: base.yaml}}\n"
    tad, clm = recipe_file.read(base), settled(recipe_file.read(child(base, text)))
    assert clm.tokens > 1.5 * tad.tokens
    spent = [one.tokens * flops_per_token(one) for one in (tad, clm)]
    batch = tad.training.batch_size * tad.data.context
    assert 0 <= spent[0] - spent[1] < batch * flops_per_token(clm)
    assert clm.tokens % batch == 0
    assert settled(tad) is tad


def test_budgets_in_flops_and_hours(base: Path) -> None:
    read = recipe_file.read(child(base, "training: {flops: 1e12}\n"))
    tokens = settled(read).tokens
    assert tokens == pytest.approx(1e12 / flops_per_token(read), abs=400)
    hours = "training: {hours: 0.5}\nhardware: {peak_flops: 1e10, utilisation: 0.5, devices: 2}\n"
    per_hour = settled(recipe_file.read(child(base, hours))).tokens
    twice = settled(recipe_file.read(child(base, hours.replace("0.5}", "1.0}", 1)))).tokens
    assert twice == pytest.approx(2 * per_hour, rel=0.02)


def test_a_budget_in_epochs_is_that_of_the_prepared_corpus(base: Path) -> None:
    read = recipe_file.read(child(base, "training: {epochs: 1.5}\n"))
    rows, batch = len(corpora.prepare(read, read_vocabulary(read), print)[0]), read.training.batch_size
    found = corpora.settled(read, print)
    assert found.tokens == math.ceil(1.5 * rows / batch) * batch * read.data.context
    assert inspection.check(read)["steps"] == found.steps == sweep.plan(base.with_name("child.yaml"), [])[0].steps
    with pytest.raises(Refusal, match=r"training.epochs: .* known once it is prepared .*; here give training.tokens"):
        settled(read)
    run = tailkd.distill(read)
    assert sum(record["kind"] == "step" for record in run.metrics) == found.steps
    assert tailkd.distill(read).metrics == run.metrics  # finished already


def test_epochs_are_not_of_rows_that_are_chosen_later(base: Path, stranger: SimpleNamespace) -> None:
    select = f"data: {{select: {{reference: {stranger.student}}}}}\n"
    with pytest.raises(Refusal, match=r"training.epochs: counts rows before data.select chooses among them"):
        recipe_file.read(child(base, select + "training: {epochs: 1}\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {hours: 1}\n", r"training.hours: needs hardware.peak_flops"),
        (
            "training: {hours: 1, tokens: 5}\n",
            r"training: expected one of tokens, epochs, .*; came tokens, hours",
        ),
        ("training: {tokens: {match_flops: no.yaml}}\n", r"training.tokens.match_flops: no recipe file at .*no.yaml"),
        ("training: {tokens: {match: no.yaml}}\n", r"training.tokens.match: unknown key; did you mean 'match_flops'"),
        ("teacher: null\nobjective: {divergence: none}\nstudent: {from_teacher: {}}\n", r"student.from_teacher: needs"),
        ("teacher: {config: a}\n", r"teacher.config: has no weights, only the ledger can use it"),
    ],
)
def test_budgets_and_choices_that_are_refused(text: str, message: str, base: Path) -> None:
    with pytest.raises(Refusal, match=message):
        recipe_file.read(child(base, text))


def test_budgets_that_buy_nothing(base: Path) -> None:
    with pytest.raises(Refusal, match=r"buys 0 tokens, less than one global batch of 384"):
        settled(recipe_file.read(child(base, "training: {flops: 1.0}\n")))
    match = "training: {tokens: {match_flops: %s}}\n"
    one, two = child(base, match % "two.yaml", "one.yaml"), child(base, match % "one.yaml", "two.yaml")
    for path in (one, two):
        with pytest.raises(Refusal, match="recipes match one another in a circle"):
            settled(recipe_file.read(path))


def test_a_configuration_alone_has_no_tokenizer(base: Path, stranger: SimpleNamespace) -> None:
    text = f"teacher: {{config: {stranger.teacher / 'config.json'}}}\n"
    read = recipe_file.read(child(base, text), files=False)
    with pytest.raises(Refusal, match=r"teacher.model is null, and this needs its weights or tokenizer"):
        read_vocabulary(read)
