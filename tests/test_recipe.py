"""Recipes: what is read, what is refused, with which words, and that nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tailkd import recipe_file
from tailkd.errors import Refusal
from tailkd.objective import Objective
from tailkd.objective.settings import DIVERGENCES
from tailkd.recipe import Divergence, ObjectiveSection, Recipe
from tailkd.recipe_types import seconds_of

HEAD = """\
name: stranger
teacher: {model: some/teacher}
student:
  model: some/student
data:
  train: {path: CORPUS}
training:
  tokens: 60_000
"""


def write(tmp_path: Path, text: str, *, encoding: str = "utf-8") -> Path:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "a"}\n')
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text.replace("CORPUS", str(corpus)).encode(encoding))
    return path


def refusal(tmp_path: Path, text: str, **options: Any) -> str:
    path = write(tmp_path, text, **options)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(Refusal) as caught:
        recipe_file.read(path)
    assert sorted(tmp_path.iterdir()) == before
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_only_what_is_required(tmp_path: Path) -> None:
    recipe = recipe_file.read(write(tmp_path, HEAD))
    assert recipe.training.tokens == 60_000
    assert recipe.folder == Path("runs/stranger")
    assert recipe.data.heldout.fraction == 0.1
    assert recipe.evaluate.every_tokens is recipe.training.save_every_tokens is None


def test_a_resolved_recipe_reads_the_same(recipe: dict[str, Any], tmp_path: Path) -> None:
    first = recipe_file.read(recipe)
    recipe_file.write(first, tmp_path / "resolved.yaml")
    assert (tmp_path / "resolved.yaml").read_text().startswith(recipe_file.HEADER + "\n")
    again = recipe_file.read(tmp_path / "resolved.yaml")
    assert again.resolved() == first.resolved()
    kl = {**recipe, "objective": {"divergence": "forward_kl"}}
    recipe_file.write(recipe_file.read(kl), tmp_path / "kl.yaml")
    assert "top_k" not in YAML(typ="safe").load(tmp_path / "kl.yaml")["objective"]
    recipe_file.read(tmp_path / "kl.yaml")


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    text = HEAD + "  learning_rate: 1e-3\n  weight_decay: 1.0e-2\n  seed: 7\n"
    training = recipe_file.read(write(tmp_path, text)).training
    assert (training.learning_rate, training.weight_decay, training.seed) == (1e-3, 1e-2, 7)
    assert recipe_file.read(write(tmp_path, HEAD.replace("60_000", "2e9"))).training.tokens == 2_000_000_000


def test_overrides(tmp_path: Path) -> None:
    arguments = ["out=elsewhere", "training.seed=4", "training.learning_rate=1e-3", "objective.divergence=forward_kl"]
    recipe = recipe_file.read(write(tmp_path, HEAD), recipe_file.parse_overrides(arguments))
    assert (recipe.folder, recipe.training.seed) == (Path("elsewhere"), 4)
    assert (recipe.training.learning_rate, recipe.objective.divergence) == (1e-3, "forward_kl")
    with pytest.raises(Refusal, match=r"override: training.sead: unknown key; did you mean 'seed'"):
        recipe_file.read(write(tmp_path, HEAD), {"training.sead": 1})
    with pytest.raises(Refusal, match=r"'training.seed' is not of the form key=value"):
        recipe_file.parse_overrides(["training.seed"])
    with pytest.raises(Refusal, match=r"'\[0.9' is not a value in YAML"):
        recipe_file.parse_overrides(["training.betas=[0.9"])


BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{this}: &{this} [{', '.join([f'*{above}'] * 10)}]\n" for above, this in zip("abcde", "bcdef", strict=True)
)
CASES = {
    "typo": (
        HEAD + "  learning_rat: 1\n",
        ["line 9: training.learning_rat: unknown key; did you mean 'learning_rate'?"],
    ),
    "two at once": (
        HEAD.replace("60_000", "many") + "colour: red\n",
        ["2 problems", "line 8: training.tokens: expected a valid integer; came 'many'", "line 9: colour: unknown key"],
    ),
    "missing": (
        HEAD.replace("  tokens: 60_000", "  seed: 1"),
        ["line 7: training: expected one of tokens, epochs, flops or hours; came none"],
    ),
    "unknown divergence": (
        HEAD + "objective: {divergence: tail_awar}\n",
        ["line 9: objective.divergence: expected", "came 'tail_awar'; did you mean 'tail_aware'?"],
    ),
    "negative": (HEAD + "  learning_rate: -1\n", ["line 9: training.learning_rate: expected greater than 0; came -1"]),
    "infinite": (HEAD + "  learning_rate: .inf\n", ["line 9: training.learning_rate: expected a finite number"]),
    "not a number": (HEAD + "  learning_rate: .nan\n", ["line 9: training.learning_rate: expected"]),
    "truth for a number": (
        HEAD + "  batch_size: true\n",
        ["line 9: training.batch_size: expected a number; came True"],
    ),
    "list for a scalar": (
        HEAD + "  batch_size: [8]\n",
        ["line 9: training.batch_size: expected a valid integer; came [8]"],
    ),
    "scalar for a section": (HEAD.replace("{model: some/teacher}", "big"), ["line 2: teacher: expected", "came 'big'"]),
    "duplicate key": (HEAD + "  seed: 1\n  seed: 2\n", [":10: the key 'seed' stands here a second time"]),
    "not YAML": (HEAD + "  seed: [1\n", ["recipe.yaml:", "not YAML"]),
    "empty": ("", ["the file holds nothing"]),
    "a list": ("- a\n", ["the file holds CommentedSeq"]),
    "fraction": (
        HEAD.replace("{path: CORPUS}", "{path: CORPUS}\n  heldout: {fraction: 1.5}"),
        ["line 7: data.heldout.fraction: expected less than 1"],
    ),
    "K = 0": (
        HEAD + "objective: {top_k: 0}\n",
        ["line 9: objective.top_k: expected greater than or equal to 1; came 0"],
    ),
    "K without a head": (
        HEAD + "objective: {divergence: forward_kl, top_k: 5}\n",
        ["line 9: objective.top_k: has no meaning for divergence 'forward_kl', only for tail_aware, ghost_token_kl"],
    ),
    "no teacher": (
        HEAD.replace("{model: some/teacher}", "null"),
        ["line 2: teacher: divergence 'tail_aware' needs a teacher"],
    ),
    "missing corpus": (
        HEAD.replace("CORPUS", "nowhere.jsonl"),
        ["line 6: data.train.path: no file, folder or match at 'nowhere.jsonl'"],
    ),
    "missing folder": (
        HEAD.replace("some/student", "./nowhere"),
        ["line 4: student.model: no config.json in './nowhere'"],
    ),
    "two sources": (
        HEAD.replace("path: CORPUS", "path: CORPUS, hub: a/b"),
        ["line 6: data.train: expected one of path or hub; came path, hub"],
    ),
    "two forms of documents": (
        HEAD.replace("path: CORPUS", "path: CORPUS, text: body, prompt: q, completion: a, messages: m"),
        ["line 6: data.train: expected text, or prompt and completion, or messages; came text, prompt and completion"],
    ),
    "a prompt without its completion": (
        HEAD.replace("path: CORPUS", "path: CORPUS, prompt: q"),
        ["line 6: data.train.prompt: needs completion beside it, the name of its field"],
    ),
    "a template for nothing": (
        HEAD.replace("path: CORPUS", "path: CORPUS, messages: m, template: chat"),
        ["line 6: data.train.template: is for prompt and completion alone"],
    ),
    "a template without its fields": (
        HEAD.replace("path: CORPUS", "path: CORPUS, prompt: q, completion: a, template: 'Q: {question}'"),
        ["data.train.template: expected 'chat' or a text with {prompt} and then {completion}, each once", "{question}"],
    ),
    "unknown packing": (
        HEAD.replace("path: CORPUS}", "path: CORPUS}\n  packing: document"),
        ["line 7: data.packing: expected 'rows' or 'documents'; came 'document'; did you mean 'documents'?"],
    ),
    "interval beyond the run": (
        HEAD + "  save_every_tokens: 70_000\n",
        ["line 9: training.save_every_tokens: 70,000 is beyond training.tokens = 60,000"],
    ),
    "remote code": (
        HEAD.replace("{model: some/teacher}", "{model: some/teacher, remote_code: true}"),
        ["teacher.revision: expected a 40-digit commit hash"],
    ),
    "bomb": (
        BOMB,
        ["aliases that multiply are not a recipe"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_recipes_are_refused_with_line_and_key(name: str, tmp_path: Path) -> None:
    text, expected = CASES[name]
    message = refusal(tmp_path, text)
    for part in expected:
        assert part in message, message


def test_supervised_keys(tmp_path: Path) -> None:
    """What is resolved reads the same, and names no field that is not read."""
    for form in ("prompt: q, completion: a, template: chat", "messages: m"):
        text = HEAD.replace("path: CORPUS}", f"path: CORPUS, {form}}}\n  packing: documents")
        recipe = recipe_file.read(write(tmp_path, text))
        recipe_file.write(recipe, tmp_path / "resolved.yaml")
        resolved = YAML(typ="safe").load(tmp_path / "resolved.yaml")["data"]
        assert resolved["packing"] == "documents"
        assert "text" not in resolved["train"]
        assert "text" in resolved["heldout"]
        assert recipe_file.read(tmp_path / "resolved.yaml") == recipe
        assert {"data.packing", "data.train.prompt", "data.train.template"} < recipe.identity().keys()


def test_other_encodings_and_missing_files(tmp_path: Path) -> None:
    assert ":9: not UTF-8" in refusal(tmp_path, HEAD + "# ä\n", encoding="latin-1")
    assert "a recipe has at most 1,048,576" in refusal(tmp_path, HEAD + "#" * (1 << 20))
    assert "not YAML" in refusal(tmp_path, "a: " + "[" * 3000)
    with pytest.raises(Refusal, match=r"cannot be read \(No such file or directory\)"):
        recipe_file.read(tmp_path / "nothing.yaml")


def test_the_recipe_and_the_objective_say_the_same() -> None:
    assert Divergence.__args__ == DIVERGENCES  # type: ignore[attr-defined]
    section = ObjectiveSection()
    assert Objective(**section.settings()) == Objective()


def test_every_key_is_documented() -> None:
    def check(section: Any, above: str) -> None:
        for name, field in section.model_fields.items():
            inner = next(
                (
                    t
                    for t in (field.annotation, *getattr(field.annotation, "__args__", ()))
                    if hasattr(t, "model_fields")
                ),
                None,
            )
            if inner is not None:
                check(inner, f"{above}{name}.")
            elif name not in ("model", "name", "out"):
                assert field.description, f"{above}{name}"

    check(Recipe, "")


@pytest.mark.parametrize(("text", "seconds"), [("11h30m", 41_400), ("90s", 90), ("2d", 172_800), ("1h1s", 3_601)])
def test_durations(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "0s", "90", "1h30", "soon", "30m1h", "-5m"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="is no duration; expected one such as 11h30m"):
        seconds_of(text)
