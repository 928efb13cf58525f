"""Commonsense tasks through us beside lm-eval called directly, and what their files must hold."""

from __future__ import annotations

import copy
import json
import math
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import builders
import pytest
import suites
import torch

from tailkd.errors import OutOfMemory, Refusal
from tailkd.evaluate import commonsense
from tailkd.evaluate.commonsense import files, measuring
from tailkd.evaluate.commonsense.tasks import TASKS

# Section 8 of the task table: lm-eval's names and the metric of each.
METRICS = {
    "hellaswag": "acc_norm",
    "winogrande": "acc",
    "openbookqa": "acc_norm",
    "arc_easy": "acc_norm",
    "arc_challenge": "acc_norm",
    "piqa": "acc_norm",
    "social_iqa": "acc",
    "storycloze_2018": "acc",
}
DEFINITIONS = {
    "hellaswag": "hellaswag/hellaswag",
    "winogrande": "winogrande/default",
    "openbookqa": "openbookqa/openbookqa",
    "arc_easy": "arc/arc_easy",
    "arc_challenge": "arc/arc_challenge",
    "piqa": "piqa/piqa",
    "social_iqa": "siqa/siqa",
    "storycloze_2018": "storycloze/storycloze_2018",
}


def test_the_metrics_are_those_of_the_table() -> None:
    assert {name: task.metric for name, task in commonsense.TASKS.items()} == METRICS


# ----- lm-eval itself


@pytest.fixture(scope="module")
def model(stranger: SimpleNamespace) -> Any:
    return builders.build_model(len(stranger.tokenizer), hidden=48, seed=1, initializer_range=0.4)


def measured(
    model: Any, tokenizer: Any, data: Path, out: Path, **options: Any
) -> dict[tuple[str, int], dict[str, Any]]:
    given = {"shots": (0,), "limit": None, "batch_size": 4, "say": lambda line: None, **options}
    sources = commonsense.find(list(TASKS), data)
    return {
        (one["task"], one["shots"]): one for one in commonsense.measured(model, tokenizer, sources, out=out, **given)
    }


def direct(
    model: Any, tokenizer: Any, data: Path, folder: Path, *, shots: int, same_split: bool = False
) -> dict[str, Any]:
    """What lm-eval's entry point gives for YAML files that include its own and read the same files as JSON."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    folder.mkdir()
    for task, definition in DEFINITIONS.items():
        own = TASKS[task]
        found = commonsense.find([task], data)[task]
        rows = {own.split: found.items} | ({} if found.examples is None else {"train": found.examples})
        for split, items in rows.items():
            (folder / f"{task}-{split}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
        lines: dict[str, Any] = {
            "include": str(Path(lm_eval.__file__).parent / "tasks" / f"{definition}.yaml"),
            "task": f"our_{task}",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {
                "data_files": {split: str(folder / f"{task}-{split}.jsonl") for split in rows},
                "cache_dir": str(folder / "cache"),
            },
        }
        if same_split or "train" not in rows:
            lines |= {"training_split": None, "test_split": own.split, "fewshot_split": own.split}
        (folder / f"{task}.yaml").write_text(json.dumps(lines))  # JSON is YAML
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(folder))
    found = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=4),
        tasks=[f"our_{task}" for task in TASKS],
        num_fewshot=shots,
        task_manager=manager,
    )
    assert found is not None
    return found


@pytest.mark.parametrize("training", [True, False])
def test_equals_lm_eval_called_directly(
    training: bool, model: Any, stranger: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values, standard errors, and each item's score and log-likelihoods, without and with examples."""
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # asks pip and git, for seconds
    data = suites.write(tmp_path / "data", training=training)
    ours = measured(model, stranger.tokenizer, data, tmp_path / "out", shots=(0, 2))
    assert len(ours) == 2 * len(TASKS)
    for shots in (0, 2) if training else (2,):
        theirs = direct(model, stranger.tokenizer, data, tmp_path / f"{shots}", shots=shots)
        for task, metric in METRICS.items():
            entry, expected = ours[task, shots], theirs["results"][f"our_{task}"]
            samples = theirs["samples"][f"our_{task}"]
            assert entry["value"] == expected[f"{metric},none"]
            assert entry["error"] == expected[f"{metric}_stderr,none"]
            assert entry["scores"] == [sample[metric] for sample in samples]
            assert entry["items"] == suites.ITEMS
            logged = [json.loads(line) for line in (tmp_path / "out" / entry["samples"]).open()]
            for line, sample in zip(logged, samples, strict=True):
                chances = [chance for chance, _ in sample["filtered_resps"]]
                assert line["log_likelihoods"] == pytest.approx(chances, rel=1e-4)
                assert (line["output"] == line["gold"]) == bool(line["score"])
                contexts = {context for context, _ in sample["arguments"]}
                assert contexts == set(line["prompt"] if isinstance(line["prompt"], list) else [line["prompt"]])


def test_an_entry_is_what_readers_expect(model: Any, stranger: SimpleNamespace, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    data, told = suites.write(tmp_path / "data" / "commonsense", without=("storycloze_2018",)).parent, []
    tokens = len(stranger.tokenizer), stranger.tokenizer.pad_token
    found = measured(model, stranger.tokenizer, data, tmp_path, shots=(0, 5), limit=5, say=told.append)
    assert (len(stranger.tokenizer), stranger.tokenizer.pad_token) == tokens
    assert {name for name, _ in found} == set(TASKS) - {"storycloze_2018"}
    one = found["piqa", 0]
    assert {key: one[key] for key in ("suite", "shots", "metric", "items", "limit", "data", "examples", "samples")} == {
        "suite": "commonsense",
        "shots": 0,
        "metric": "acc_norm",
        "items": 5,
        "limit": 5,
        "data": "piqa_validation.jsonl",
        "examples": None,
        "samples": "tasks/commonsense/piqa-0-first-5.jsonl",
    }
    assert one["value"] == statistics.fmean(one["scores"])
    assert one["error"] == pytest.approx(statistics.stdev(one["scores"]) / math.sqrt(5))
    assert len(one["items_hash"]) == 16
    assert len({entry["items_hash"] for entry in found.values()}) == len(found)
    assert any("piqa: no training file beside piqa_validation.jsonl" in line for line in told)
    assert not any("longer than the model reads" in line for line in told if line.startswith("piqa, 0"))
    with_examples = [json.loads(line) for line in (tmp_path / found["piqa", 5]["samples"]).open()]
    for line in with_examples:  # five others, never the item itself
        assert line["prompt"].count("Question:") == 6
        question = line["prompt"].rpartition("Question:")[2]
        assert line["prompt"].count(question.removesuffix("\nAnswer:")) == 1


def test_texts_that_do_not_fit_are_counted(stranger: SimpleNamespace, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    short = builders.build_model(len(stranger.tokenizer), max_position_embeddings=24)
    data, told = suites.write(tmp_path / "data"), []
    sources = commonsense.find(["piqa"], data)
    options = {"shots": (5,), "limit": 3, "batch_size": 2, "say": told.append, "out": tmp_path}
    list(commonsense.measured(short, stranger.tokenizer, sources, **options))
    assert "piqa, 5 shots: 6 texts were longer than the model reads and lost their beginning" in told


@pytest.mark.slow
def test_with_files_no_connection_is_opened(stranger: SimpleNamespace, tmp_path: Path) -> None:
    """Without any switch that keeps libraries offline."""
    pytest.importorskip("lm_eval")
    data = suites.write(tmp_path / "data")
    code = """
import os, socket, sys
for name in [name for name in os.environ if name.endswith("_OFFLINE")]:
    del os.environ[name]
def refuse(*arguments, **options):
    raise SystemExit(f"a connection was opened: {arguments}")
for name in ("create_connection", "getaddrinfo"):
    setattr(socket, name, refuse)
socket.socket.connect = socket.socket.connect_ex = refuse
from tailkd.cli import app
app(["evaluate", sys.argv[1], "--tasks", "commonsense", "--shots", "0,1", "--limit", "2", "--data", sys.argv[2],
     "--out", sys.argv[3]])
"""
    done = builders.fresh_python(code, str(stranger.teacher), str(data), str(tmp_path / "out"))
    assert "over 8 tasks" in done.stdout
    assert len(json.loads((tmp_path / "out" / "tasks.json").read_text())["results"]) == 16


# ----- files


def test_files_are_found_by_their_names(tmp_path: Path) -> None:
    data = suites.write(tmp_path, training=True)
    found = commonsense.find(list(TASKS), data)
    names = {
        name: (one.path.name, None if one.examples_path is None else one.examples_path.name)
        for name, one in found.items()
    }
    assert names == suites.NAMES
    (tmp_path / "storycloze_2018.csv").rename(tmp_path / "cloze_test_val__winter2018-cloze_test_ALL_val - 1 - 1.csv")
    assert "storycloze_2018" in commonsense.find(["storycloze_2018"], data)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    data = suites.write(tmp_path / "data", without=("piqa", "arc_easy", "storycloze_2018"))
    with pytest.raises(Refusal, match=r"lacks files of 2 tasks \(arc_easy: arc_easy_test.jsonl\[.gz\]; piqa: piqa_val"):
        commonsense.find(list(TASKS), data)
    with pytest.raises(Refusal, match="nowhere is no folder"):
        commonsense.find(["piqa"], tmp_path / "nowhere")


def test_there_must_be_more_items_than_examples(tmp_path: Path) -> None:
    data = suites.write(tmp_path)
    commonsense.find(["piqa"], data, shots=7)
    with pytest.raises(Refusal, match=r"piqa: 8 shots are to be drawn from .*piqa_validation.jsonl, which has 8 items"):
        commonsense.find(["piqa"], data, shots=8)


WRONG = {
    "piqa": [
        ({"goal": "a", "sol1": "b", "sol2": "c"}, "it has no 'label'"),
        ({"goal": "a", "sol1": "b", "sol2": "c", "label": -1}, "the right answer is -1, not one of 0, 1"),
        ({"goal": 1, "sol1": "b", "sol2": "c", "label": 1}, "1 is no text"),
    ],
    "hellaswag": [
        ({"activity_label": "", "ctx_a": "", "ctx_b": "", "endings": ["a"], "label": ""}, "the right answer is ''"),
        ({"activity_label": "", "ctx_a": "", "ctx_b": "", "endings": "a", "label": "0"}, "'a' is no list of texts"),
        ({"activity_label": "", "ctx_a": "", "ctx_b": "", "endings": ["a"], "label": "3"}, "3 of 1 endings"),
    ],
    "winogrande": [({"sentence": "a", "option1": "a", "option2": "b", "answer": "1"}, "'a' has no blank")],
    "arc_easy": [
        (
            {"question": "a", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "B"},
            "no choice has the label 'B'",
        ),
        ({"question": "a", "choices": {"text": ["a"], "label": []}, "answerKey": "A"}, "not as many texts as labels"),
        ({"question": "a", "choices": [{"text": "a"}], "answerKey": "A"}, "has not the lists text and label"),
    ],
}


@pytest.mark.parametrize(("task", "item", "message"), [(t, *one) for t, many in WRONG.items() for one in many])
def test_an_item_of_another_kind_is_refused(task: str, item: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / f"{task}.jsonl"
    path.write_text(json.dumps(item) + "\n")
    with pytest.raises(Refusal) as refused:
        files.read(TASKS[task], path)
    assert message in str(refused.value)
    assert f"{path}:1 is no item of {task}" in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"), [("", "it holds 0 items, and no error is known"), ("no JSON\n", "not JSON")]
)
def test_a_file_that_holds_no_items_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "piqa.jsonl"
    path.write_text(text)
    with pytest.raises(Refusal, match=message):
        files.read(TASKS["piqa"], path)


def test_a_label_in_another_spelling_is_the_same(tmp_path: Path) -> None:
    """A label "1" where lm-eval's definition wants 1 would count as wrong, each time and without a word."""
    path = tmp_path / "piqa.jsonl"
    path.write_text(2 * (json.dumps({"goal": "a", "sol1": "b", "sol2": "c", "label": "1"}) + "\n"))
    assert files.read(TASKS["piqa"], path)[0]["label"] == 1


# ----- what goes wrong on the way


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (OSError("no route to the hub\nand more"), Refusal, r"items of piqa did not come from the hub \(no route"),
        (torch.OutOfMemoryError("CUDA"), OutOfMemory, "piqa: 4 texts do not fit into memory; lower --batch-size"),
    ],
)
def test_what_fails_is_said(
    error: Exception, expected: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*arguments: Any, **options: Any) -> Any:
        raise error

    fake = SimpleNamespace(Harness=lambda *arguments: SimpleNamespace(ask=ask))
    monkeypatch.setitem(sys.modules, "tailkd.evaluate.commonsense.harness", fake)
    options: dict[str, Any] = {"shots": (0,), "limit": None, "batch_size": 4, "say": print, "out": tmp_path}
    with pytest.raises(expected, match=message):
        list(measuring.measured(None, None, {"piqa": None}, **options))
    if isinstance(error, OSError):  # of a disk, say
        found = commonsense.find(["piqa"], suites.write(tmp_path / "data"))
        with pytest.raises(OSError, match="no route"):
            list(measuring.measured(None, None, found, **options))
