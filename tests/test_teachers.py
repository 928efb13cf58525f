"""Several teachers of one vocabulary: the mixture of their distributions from the recipe to loss, measures, report."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import builders
import pytest
import running
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import tailkd
from tailkd import cli, parts, recipe_file, trial
from tailkd.data.batches import Batch, Batches, evaluation_batches
from tailkd.errors import Refusal
from tailkd.objective import Objective
from tailkd.train.step import accumulate_gradients

ROWS, WEIGHTS = 403, (2.0, 1.0)
OBJECTIVES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "tail_aware": lambda q, p, mask: tailkd.tail_aware_divergence(q, p, top_k=5, beta=2.0, mask=mask),
    "forward_kl": lambda q, p, mask: (p.exp() * (p - q.log_softmax(-1))).sum(-1) * mask,
}


def silent(message: str) -> None:
    """For `say`."""


@pytest.fixture(scope="module")
def other(stranger: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of another family over the same ids, with three rows of padding."""
    torch.manual_seed(7)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Qwen2Config(vocab_size=ROWS, num_key_value_heads=1, max_position_embeddings=256, **sizes)
    model = transformers.Qwen2ForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("other")
    model.save_pretrained(folder)
    stranger.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def several(recipe: dict[str, Any], stranger: SimpleNamespace, other: Path) -> dict[str, Any]:
    models = (stranger.teacher, other)
    recipe["teacher"] = [{"model": str(m), "weight": w} for m, w in zip(models, WEIGHTS, strict=True)]
    recipe["training"] |= {"tokens": 1_000, "save_every_tokens": None, "precision": "float32"}
    recipe["evaluate"] = {"tokens": 400}
    return recipe


def mixture(recipe: dict[str, Any], ids: Tensor, fold: dict[int, int] | None = None, usable: int = 400) -> Tensor:
    """Logarithms of the mixture's probabilities in float64, from the models alone."""
    total, weights = torch.zeros(()), [one.get("weight", 1.0) for one in recipe["teacher"]]
    for one, weight in zip(recipe["teacher"], weights, strict=True):
        with torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(one["model"], dtype=torch.float64)
            p = model(input_ids=ids, use_cache=False).logits.softmax(-1)
        for source, target in (fold or {}).items():
            p[..., target] += p[..., source]
        p = p[..., :usable]
        total = total + weight / sum(weights) * p / p.sum(-1, keepdim=True)
    return total.log()


def built(recipe: dict[str, Any]) -> parts.Parts:
    return parts.build(recipe_file.read(recipe), silent)


def first_batch(found: parts.Parts) -> Batch:
    return Batches(found.train_rows, batch_size=8, seed=3)[0]


def heldout(found: parts.Parts) -> Batch:
    (batch,) = evaluation_batches(found.heldout_rows, tokens=300, batch_size=8)
    return batch


@pytest.mark.parametrize("divergence", OBJECTIVES)
def test_gradients_are_those_of_the_mixture(several: dict[str, Any], divergence: str) -> None:
    several["objective"] = {"divergence": divergence}
    found = built(several)
    assert found.teacher is not None
    found.student.plain.double()
    for one in found.teacher.each:  # pyright: ignore[reportAttributeAccessIssue]
        one.split.plain.double()
    batch = first_batch(found)
    objective = Objective(divergence=divergence, top_k=5)
    parts_of = accumulate_gradients(found.student, found.teacher, batch, objective=objective, micro_batch_size=3)

    student = AutoModelForCausalLM.from_pretrained(several["student"]["model"], dtype=torch.float64)
    q, mask = student(input_ids=batch.input_ids, use_cache=False).logits, batch.labels != -100
    clm = torch.nn.functional.cross_entropy(q.flatten(0, 1), batch.labels.flatten(), reduction="sum")
    loss = clm + OBJECTIVES[divergence](q, mixture(several, batch.input_ids), mask).sum()
    (loss / mask.sum()).backward()
    assert float(parts_of["loss"].sum) == pytest.approx(float(loss.detach()), rel=1e-9)
    for (name, truth), (_, got) in zip(student.named_parameters(), found.student.plain.named_parameters(), strict=True):
        torch.testing.assert_close(got.grad, truth.grad, rtol=1e-8, atol=1e-12, msg=name)


def losses(run: Any) -> list[float]:
    return [record["loss"] for record in run.metrics if record["kind"] == "step"]


def test_twice_the_same_teacher_is_that_teacher(several: dict[str, Any], stranger: SimpleNamespace) -> None:
    model, out = {"model": str(stranger.teacher)}, several["out"]
    two = tailkd.distill({**several, "teacher": [model, {**model, "weight": 3}]})
    one = tailkd.distill({**several, "teacher": model, "out": out + "-one"})
    assert losses(two) == pytest.approx(losses(one), rel=1e-6)
    for role in ("teacher", "student"):
        mine, theirs = (dict(run.evaluation[role]) for run in (two, one))
        assert mine.pop("tail_mass") == pytest.approx(theirs.pop("tail_mass"), rel=1e-5)
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6)


def test_weights_matter(several: dict[str, Any]) -> None:
    """Exchanged they give another loss; a weight that outweighs the others leaves that teacher alone."""
    found = []
    for number, weights in enumerate(((2, 1), (1, 2), (1e9, 1))):
        teachers = [{**one, "weight": w} for one, w in zip(several["teacher"], weights, strict=True)]
        found.append(losses(tailkd.distill({**several, "teacher": teachers, "out": f"{several['out']}-{number}"})))
    first = {key: value for key, value in several["teacher"][0].items() if key != "weight"}
    alone = losses(tailkd.distill({**several, "teacher": first, "out": several["out"] + "-alone"}))
    assert abs(found[0][0] - found[1][0]) > 1e-2
    assert found[2] == pytest.approx(alone, rel=1e-6)


def test_held_out_measures_are_against_the_mixture(several: dict[str, Any]) -> None:
    several["evaluate"] = {"tokens": 300, "batch_size": 8}
    found = built(several)
    batch = heldout(found)
    valid, labels = batch.labels != -100, batch.labels.clamp(min=0)
    p = mixture(several, batch.input_ids)[valid]
    with torch.no_grad():
        student = AutoModelForCausalLM.from_pretrained(several["student"]["model"], dtype=torch.float64)
        q = student(input_ids=batch.input_ids, use_cache=False).logits.log_softmax(-1)[valid]
    ours, theirs = found.measure(found.student).measures, found.measure(found.teacher).measures  # type: ignore[arg-type]
    assert ours["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)
    assert ours["acceptance"] == pytest.approx(float(torch.minimum(p.exp(), q.exp()).sum(-1).mean()), rel=1e-5)
    at_labels = -p.gather(1, labels[valid][:, None]).mean()
    assert theirs["cross_entropy"] == pytest.approx(float(at_labels), rel=1e-5)
    assert theirs["kl"] == pytest.approx(0, abs=1e-6)
    beyond = p.exp().sort(descending=True).values[:, 10:].sum(-1).mean()
    assert theirs["tail_mass"]["10"] == pytest.approx(float(beyond), rel=1e-4)


def test_folded_ids_of_each(recipe: dict[str, Any], stranger: SimpleNamespace, tmp_path: Path) -> None:
    """Both teachers have a token that the student lacks, one more rows of padding than the other."""
    tokenizer = builders.build_tokenizer([json.loads(line)["body"] for line in stranger.corpus.open()])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end of turn|>"]})
    sizes = {"a": {"vocabulary": 401, "hidden": 48}, "b": {"vocabulary": 405, "hidden": 16}}
    folders = [builders.save_model(tmp_path / n, tokenizer, initializer_range=0.5, **v) for n, v in sizes.items()]
    recipe["teacher"] = [{"model": str(folder)} for folder in folders]
    recipe["vocabulary"], recipe["training"]["precision"] = {"fold": {400: 1}}, "float32"
    found = built(recipe)
    assert found.teacher is not None
    batch = heldout(found)
    expected = mixture(recipe, batch.input_ids, {400: 1})
    torch.testing.assert_close(found.teacher(batch).logits().double(), expected, rtol=1e-4, atol=1e-5)
    recipe["evaluate"] = {"tokens": 300, "batch_size": 8}
    lost = trial.load(recipe_file.read(recipe), silent)["dropped_teacher_mass"]
    each = []
    for folder in folders:
        p = AutoModelForCausalLM.from_pretrained(folder)(input_ids=batch.input_ids, use_cache=False).logits.softmax(-1)
        each.append(float(p[..., 401:].sum(-1)[batch.labels != -100].mean()))
    assert lost == pytest.approx(sum(each) / 2, rel=1e-5)
    recipe["vocabulary"] = {"fold": {402: 1}}
    with pytest.raises(
        Refusal, match=r"teacher\.0 \(.*/a\)'s probability of id 402 to id 1; expected one of 400 to 400"
    ):
        tailkd.distill(recipe)


# ----- what is refused


def test_another_vocabulary_is_refused_by_name(several: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = builders.build_tokenizer(
        ["quite other words than those of the corpus, zebra yacht xylophone"], size=300
    )
    stray = builders.save_model(tmp_path / "stray", tokenizer)
    several["teacher"].append({"model": str(stray)})
    with pytest.raises(Refusal, match=r"teacher\.2 \(.*/stray\) and student do not share one vocabulary"):
        tailkd.distill(several)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"teacher": []}, "teacher: is an empty list; give one teacher or several, or null"),
        ({"teacher": [{"model": "a", "weight": 0}]}, r"teacher\.0\.weight: expected greater than 0; came 0"),
        (
            {"teacher": [{"model": "a"}, {"model": "b", "wieght": 2}]},
            r"teacher\.1\.wieght: unknown key; did you mean 'weight'",
        ),
        ({"teacher": {"model": "a", "weight": 2}}, r"teacher\.weight: unknown key"),
        (
            {"teacher": [{"model": "a", "config": "b"}]},
            r"teacher\.0: expected one of model or config; came model, config",
        ),
        ({"teacher": [{"model": "./nowhere"}]}, r"teacher\.0\.model: no config.json in './nowhere'"),
        ({"teacher": [{"config": "./nowhere"}]}, r"teacher\.0\.config: has no weights.*give teacher\.0\.model"),
        ({"objective": {"hidden": {}}}, r"objective\.hidden: compares hidden states with those of one teacher"),
        ({"student": {"from_teacher": {"layers": 1}}}, r"student\.from_teacher: cuts the student out of one teacher"),
    ],
)
def test_what_does_not_go(several: dict[str, Any], change: dict[str, Any], told: str) -> None:
    with pytest.raises(Refusal, match=told):
        recipe_file.read({**several, **change})


def test_the_line_of_a_problem_in_a_list(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("name: x\nteacher:\n  - model: a\n  - model: b\n    weight: -1\nstudent: {model: c}\n")
    with pytest.raises(Refusal, match=r"line 5: teacher\.1\.weight: expected greater than 0; came -1"):
        recipe_file.read(path)


def test_a_run_goes_on_with_the_same_weights_alone(several: dict[str, Any]) -> None:
    """Whether a teacher is shared out among processes changes nothing of the run."""
    run = tailkd.distill(several)
    sharded = [{**several["teacher"][0], "sharded": True}, several["teacher"][1]]
    assert tailkd.distill({**several, "teacher": sharded}).evaluation == run.evaluation
    other_weights = [several["teacher"][0], {**several["teacher"][1], "weight": 5}]
    with pytest.raises(Refusal, match=r"teacher\.1\.weight: was 1\.0, is 5\.0"):
        tailkd.distill({**several, "teacher": other_weights})


# ----- what is told


def test_check_bill_report_and_card(several: dict[str, Any], stranger: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(several))
    told = json.loads(CliRunner().invoke(cli.app, ["check", str(path), "--json"]).stdout)
    one = json.loads(
        CliRunner().invoke(cli.app, ["check", str(path), f"teacher={{model: {stranger.teacher}}}", "--json"]).stdout
    )
    assert told["vocabulary"]["teacher_rows"] == [400, ROWS]
    assert one["vocabulary"]["teacher_rows"] == 400
    assert told["vocabulary"]["usable_ids"] == one["vocabulary"]["usable_ids"] == 400
    assert set(told["licences"]) == {"teacher.0", "teacher.1", "student"}
    first, second = told["parameters"]["teacher"]
    assert first == one["parameters"]["teacher"]
    assert second["total"] == AutoModelForCausalLM.from_pretrained(several["teacher"][1]["model"]).num_parameters()
    forward = "pflop_per_million_tokens"
    assert told[forward]["teacher_forward"] > one[forward]["teacher_forward"]
    assert told["memory_bytes"]["teacher"] > one["memory_bytes"]["teacher"] + 4 * second["total"]
    run = tailkd.distill(several)
    names = f"the mixture of 66.7 % {several['teacher'][0]['model']} and 33.3 % {several['teacher'][1]['model']}"
    assert f"A student of {names}, started from" in (run.folder / "README.md").read_text()
    page = (run.folder / "report.html").read_text()
    assert f"Taught by {names}." in page
    assert all(f"<h3>{name}</h3>" in page for name in ("teacher.0", "teacher.1"))
    rate = run.evaluation["teacher"]["mismatch_rate"]
    assert f"The teacher&#39;s mismatch rate is {100 * rate:.1f} %" in page
    assert re.search(r"Mismatch rate: .*first choice", page)


# ----- many processes


@pytest.mark.slow
def test_two_processes_do_what_one_does(several: dict[str, Any]) -> None:
    """One teacher split among the processes, the other whole in each."""
    one = tailkd.distill({**several, "out": several["out"] + "-one"})
    teachers = [{**several["teacher"][0], "sharded": True}, several["teacher"][1]]
    two = {**several, "teacher": teachers, "training": {**several["training"], "strategy": "fsdp"}}
    process = running.start(two, ranks=2)
    assert process.wait(timeout=300) == 0, process.stderr.read() if process.stderr else ""
    both = tailkd.distill(two)
    assert losses(both) == pytest.approx(losses(one), rel=1e-5)
    for role in ("teacher", "student"):
        ours, theirs = ({k: v for k, v in run.evaluation[role].items() if k != "tail_mass"} for run in (both, one))
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_one_teacher_writes_and_scores(recipe: dict[str, Any], stranger: SimpleNamespace, tmp_path: Path) -> None:
    several = {**recipe, "teacher": [{"model": str(stranger.teacher)}, {"model": str(stranger.teacher)}]}
    select = {"select": {"method": "difference", "ratio": 0.5, "reference": str(stranger.student)}}
    with pytest.raises(Refusal, match=r"data.select: chooses rows by the scores of one teacher; several are given"):
        recipe_file.read({**several, "data": {**recipe["data"], **select}})
    with pytest.raises(Refusal, match=r"generate: writes the text of one teacher; several are given"):
        recipe_file.read({**several, "generate": {"out": str(tmp_path / "text.jsonl"), "prefix_tokens": 4}})
