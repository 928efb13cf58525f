"""The model card, from run folders in the repository: what the hub reads, what people read, what stays unsaid."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import builders
import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard

from tailkd import recipe_file
from tailkd.errors import Refusal
from tailkd.report.card import card, write_card
from tailkd.report.compare import gaps, lines
from tailkd.report.origins import licence, origins
from tailkd.report.page import write_page
from tailkd.report.readme import write_readme
from tailkd.report.record import Run
from tailkd.report.table import as_json, print_table

FOLDERS = Path(__file__).parents[1] / "golden" / "run-format-1"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A finished run with bill, origins and tasks."""
    return Run(Path(shutil.copytree(FOLDERS / "now", tmp_path / "now")))


def changed(run: Run, file: str, change: Any) -> Run:
    path = run.folder / file
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return Run(run.folder)


def on_hub(run: Run, **cards: dict[str, Any]) -> Run:
    """Its models as if loaded from the hub, with these cards."""

    def change(content: dict[str, Any]) -> None:
        for role, said in cards.items():
            found = {"name": f"org/{role}", "hub": f"org/{role}", "revision": None, "commit": "c" * 40, "card": said}
            content["models"][role] = found

    return changed(run, "origins.json", change)


def front(run: Run) -> dict[str, Any]:
    return yaml.safe_load(card(run).split("\n---\n")[0].removeprefix("---\n"))


# ----- what the hub reads


def test_the_hub_reads_it(run: Run) -> None:
    loaded = ModelCard.load(write_card(run))
    data = loaded.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"], data["license"]) == (
        "transformers",
        "text-generation",
        "unknown",
    )
    assert data["tags"] == ["tailkd", "distillation", "tail-aware"]
    assert "base_model" not in data
    assert "datasets" not in data
    found = {(r.dataset_name, r.metric_name): r for r in loaded.data.eval_results}
    measures = run.evaluation["student"]
    held_out = "held-out documents of corpus.jsonl"
    assert found[held_out, "cross-entropy, nats per token"].metric_value == measures["cross_entropy"]
    assert found[held_out, "Full-ECE, a fraction"].metric_value == measures["full_ece"]
    five = found["hellaswag", "acc_norm, 5 shots"]
    assert (five.metric_type, five.metric_value, five.metric_args["num_few_shot"]) == ("acc_norm", 0.25, 5)
    assert five.metric_args["command"] == "tailkd evaluate now --tasks commonsense --shots 0,5 --limit 4"
    assert found["gsm8k", "exact, 8 shots"].metric_args["command"].endswith("--data sets")  # not where they lie
    assert len(found) == len(loaded.data.eval_results) == 8 + 3
    again = ModelCard(str(loaded))  # as the hub's own tools would save it
    assert [vars(r) for r in again.data.eval_results] == [vars(r) for r in loaded.data.eval_results]


def test_the_base_is_what_the_student_started_from(run: Run) -> None:
    taught = on_hub(run, teacher={})
    assert front(taught)["base_model"] == "org/teacher"  # the start is a folder without a card
    assert "base_model_relation" not in front(taught)
    started = front(on_hub(run, teacher={}, student={}))
    assert (started["base_model"], started["base_model_relation"]) == ("org/student", "finetune")
    told = f"| start | [org/student](https://huggingface.co/org/student) | (`{'c' * 40}`) | 33,440 |"
    assert told in card(Run(run.folder))


def test_an_earlier_stage_gives_what_its_card_says(run: Run) -> None:
    said = {"base_model": "org/first", "datasets": "org/web", "license": "mit", "language": "no"}
    found = front(changed(run, "origins.json", lambda content: content["models"]["student"].update(card=said)))
    assert found["base_model"] == "org/first"
    assert found["datasets"] == ["org/web"]
    assert found["license"] == "mit"
    assert found["language"] == "no"  # YAML 1.1 has it for false


@pytest.mark.parametrize(
    ("cards", "expected", "sentence"),
    [
        ({}, {"license": "unknown"}, "find out what they allow"),
        ({"teacher": {"license": "unknown"}}, {"license": "unknown"}, "find out what they allow"),
        ({"teacher": {"license": "mit"}, "student": {}}, {"license": "mit"}, "The student inherits `mit`"),
        (
            {"teacher": {"license": "mit"}, "student": {"license": "gpl-3.0"}},
            {"license": "other", "license_name": "gpl-3.0-and-mit"},
            "Their licences differ",
        ),
        (
            {"teacher": {"license": "other", "license_name": "own", "license_link": "LICENSE"}},
            {
                "license": "other",
                "license_name": "own",
                "license_link": f"https://huggingface.co/org/teacher/blob/{'c' * 40}/LICENSE",
            },
            "The student inherits `own`",
        ),
    ],
)
def test_licences_are_inherited(cards: dict[str, Any], expected: dict[str, str], sentence: str, run: Run) -> None:
    run = on_hub(run, **cards)
    assert licence(run.origins["models"]) == expected
    assert {key: value for key, value in front(run).items() if key.startswith("license")} == expected
    assert sentence in card(run)


# ----- what people read


def test_what_it_cost_by_the_ledger(run: Run) -> None:
    assert run.bill is not None
    tokens, rates = 4 * 8 * 24, run.bill["pflop_per_million_tokens"]
    flops = {name: f"{rates[name] * 1e9 * tokens:.3g}" for name in ("total", "student_step", "teacher_forward")}
    text = card(run)
    assert f"{flops['total']}, of them student {flops['student_step']}, teacher {flops['teacher_forward']}" in text
    assert f"tokens: {tokens:,}, in 4 steps" in text
    seconds = run.metrics[-2]["seconds"]
    assert f"time: {seconds / 3600:.3g} hours" in text


def test_the_recipe_in_it_makes_it_again(run: Run, tmp_path: Path) -> None:
    text = card(run)
    (tmp_path / "again.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    again = recipe_file.read_saved(tmp_path / "again.yaml")
    assert again.resolved() == recipe_file.read_saved(run.folder / "recipe.yaml").resolved()


def test_no_path_of_this_machine_and_no_secret(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "canary-1234567")
    recipe = (run.folder / "recipe.yaml").read_text()
    for name in ("corpus.jsonl", "teacher"):
        recipe = recipe.replace(f": {name}\n", f": /home/somebody/secret-project/{name}\n")
    (run.folder / "recipe.yaml").write_text(recipe.replace("name: now", "name: canary-1234567"))
    (run.folder / "origins.json").unlink()
    text = card(Run(run.folder))
    assert "path: corpus.jsonl" in text
    assert "/home" not in text
    assert "secret-project" not in text
    assert "canary" not in text
    assert "base_model" not in text.split("\n---\n")[0]


def test_a_student_on_the_hub_and_one_without_a_teacher(run: Run) -> None:
    text = card(run, "org/small model".replace(" ", "-"))
    assert 'from_pretrained("org/small-model")' in text
    assert "hf download org/small-model --local-dir small-model" in text
    recipe = (run.folder / "recipe.yaml").read_text()
    start, _, rest = recipe.partition("teacher:\n")
    (run.folder / "recipe.yaml").write_text(start + "teacher:\n" + rest[rest.index("student:") :])
    alone = changed(run, "origins.json", lambda content: content["models"].pop("teacher"))
    assert "A language model trained without a teacher, started from `start`" in card(alone)
    assert front(alone)["tags"] == ["tailkd"]


# ----- where models and data come from


def recipe_of(teacher: str, data: dict[str, Any]) -> dict[str, Any]:
    train = {"hub": None, "path": None, "revision": None, **data}
    return {"teacher": {"model": teacher, "revision": None}, "student": {"from_teacher": {}}, "data": {"train": train}}


def test_origins_of_folders(tmp_path: Path, run: Run) -> None:
    write_card(run)
    (tmp_path / "sets").mkdir()
    found = origins(recipe_of(str(run.student), {"path": str(tmp_path / "sets")}))
    teacher = found["models"]["teacher"]
    assert teacher["name"] == "the student of the run now"
    assert (teacher["hub"], teacher["card"]) == (None, {"license": "unknown"})
    assert found["data"][0]["name"] == "sets"
    (tmp_path / "sets" / "README.md").write_text("---\nlicense: cc0-1.0\nbase_model: ./mine\n---\n")
    (tmp_path / "sets" / "config.json").write_text('{"license": "mit"}')
    assert origins(recipe_of("x", {"path": str(tmp_path / "sets")}))["data"][0]["card"] == {"license": "cc0-1.0"}
    for broken in ("[1]", "{"):
        (tmp_path / "sets" / "config.json").write_text(broken)
        assert origins(recipe_of("x", {"path": str(tmp_path / "sets")}))["data"][0]["card"] == {"license": "cc0-1.0"}
    (tmp_path / "sets" / "config.json").write_text('{"license": "mit"}')
    for said in ("no card at all", "---\n[\n---\n", "---\n- a\n---\n", "---\nlicense: {a: b}\n---\n"):
        (tmp_path / "sets" / "README.md").write_text(said)
        assert origins(recipe_of(str(tmp_path / "sets"), {"path": "y"}))["models"]["teacher"]["card"] == {
            "license": "mit"
        }


def test_origins_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was loaded lies in the cache; its card is fetched where that is asked, and nothing ends where it fails."""
    snapshot = tmp_path / ("d" * 40)
    snapshot.mkdir()
    (snapshot / "config.json").write_text("{}")
    cached = {("org/teacher", "config.json", "model"): snapshot / "config.json"}
    asked = []

    def look(name: str, file: str, *, revision: str | None, repo_type: str) -> str | None:
        path = cached.get((name, file, repo_type))
        return str(path) if path else None

    def fetch(name: str, file: str, *, revision: str | None, repo_type: str) -> str:
        asked.append((name, file, revision, repo_type))
        if repo_type == "dataset":
            raise RuntimeError("no connection")
        (snapshot / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en, de]\n---\n")
        return str(snapshot / "README.md")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", look)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    recipe = recipe_of("org/teacher", {"hub": "org/web"})
    expected = {"name": "org/teacher", "hub": "org/teacher", "revision": None, "commit": "d" * 40}
    assert origins(recipe)["models"]["teacher"] == {**expected, "card": {}}
    assert not asked
    found = origins(recipe, fetch=True)
    assert found["models"]["teacher"] == {**expected, "card": {"license": "apache-2.0", "language": ["en", "de"]}}
    assert found["data"][0] == {"name": "org/web", "hub": "org/web", "revision": None, "commit": None, "card": {}}
    assert asked == [("org/teacher", "README.md", "d" * 40, "model"), ("org/web", "README.md", None, "dataset")]
    assert origins(recipe_of("models/gone", {"path": "x"}))["models"]["teacher"]["hub"] is None


# ----- older run folders, newer ones


@pytest.mark.parametrize("name", ["first", "now"])
def test_a_run_folder_of_this_format_opens(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`first` was written by the first version that measured held-out rows, `now` by one with bill, origins, tasks."""
    run = Run(Path(shutil.copytree(FOLDERS / name, tmp_path / name)))
    other = Run(FOLDERS / "now")
    assert run.finished
    assert (run.bill is None, run.tasks == []) == (name == "first", name == "first")
    assert [line.role for line in lines([run, other])].count("student") == 2
    assert len(gaps([run, other])) == 1
    print_table([run, other])
    assert name in capsys.readouterr().out
    assert as_json([run])[0]["evaluation"]["student"]["kl"] > 0
    for runs in ([run], [run, other]):
        assert "<figure>" in write_page(runs, tmp_path / "page.html").read_text("utf-8")
    assert ModelCard.load(write_card(run)).data.eval_results
    assert "KL(T||S)" in write_readme(run).read_text()
    assert recipe_file.read_saved(run.folder / "recipe.yaml").steps == 4


@pytest.mark.parametrize(
    "file", ["bill", "origins", "tasks", "environment", "evaluation", "heldout", "data", "samples"]
)
def test_a_newer_format_is_refused_with_a_word(file: str, run: Run) -> None:
    run = changed(run, f"{file}.json", lambda content: content.update(format=2))
    expected = rf"{file}\.json has format 2; this tailkd reads format 1: take the version that wrote it, or a newer one"
    with pytest.raises(Refusal, match=expected):
        getattr(run, file)


def test_the_report_room_loads_no_torch() -> None:
    code = "import sys, tailkd.report.card as c, tailkd.report.record as r; from pathlib import Path\n"
    code += f"c.card(r.Run(Path({str(FOLDERS / 'now')!r})))\n"
    done: subprocess.CompletedProcess[str] = builders.fresh_python(
        code + "print({'torch', 'transformers'} & set(sys.modules))"
    )
    assert done.stdout.strip() == "set()"
