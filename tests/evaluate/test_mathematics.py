"""Answers read out of generated text and judged: the rules one by one, the published verdicts, and the log."""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
from mathematics_cases import CASES, DIFFERENT, EXTRACTED, SAME

from tailkd.errors import DataError, Refusal
from tailkd.evaluate import mathematics
from tailkd.evaluate.mathematics import (
    Answer,
    Item,
    Scored,
    extract,
    grade,
    grading,
    read_items,
    score,
    scoring,
    summary,
)
from tailkd.evaluate.mathematics.judge import Judge, Judges
from tailkd.evaluate.mathematics.normal import normalised

DATA = Path(os.environ.get("TAILKD_DATA", "nowhere"))
with_data = pytest.mark.skipif(not (DATA / "math").is_dir(), reason="TAILKD_DATA names no folder with math/")
with_verify = pytest.mark.skipif(not mathematics.can_verify(), reason="math-verify (extra `eval`) is not installed")


# ----- rules


def test_there_are_enough_cases_of_both_kinds() -> None:
    assert len(CASES) >= 150
    assert len(DIFFERENT) >= 50
    assert len(set(CASES)) == len(CASES)


@pytest.mark.parametrize(("rule", "answer", "gold", "right"), CASES)
def test_verdict(rule: str, answer: str, gold: str, right: bool) -> None:
    assert grade("math", rf"So \boxed{{{answer}}}", gold) is right, rule


@pytest.mark.parametrize(("rule", "answer", "gold"), SAME)
def test_one_spelling_is_final(rule: str, answer: str, gold: str) -> None:
    assert normalised(normalised(answer)) == normalised(answer), rule
    assert grade("math", rf"\boxed{{{gold}}}", answer), f"{rule}: the other way round"


@pytest.mark.parametrize(("task", "generated", "answer"), EXTRACTED)
def test_extraction(task: str, generated: str, answer: str) -> None:
    assert extract(task, generated) == answer


def test_options_are_letters() -> None:
    assert grade("sat_math", "The answer is (b).", "B")
    assert not grade("sat_math", "It is 5, in the end.", "5")
    assert not grade("mathqa", "", "")


@pytest.mark.parametrize(
    "text", [r"\sqrt" * 900, "(" * 900, "{" * 900 + "}" * 900, "1!" + "!" * 900, "1" * 9000, "5 cm " * 900]
)
def test_endless_answers_are_wrong_and_quick(text: str) -> None:
    begin = time.monotonic()
    assert not grade("math", rf"\boxed{{{text}}}", "5")
    assert time.monotonic() - begin < 5


def test_unknown_task() -> None:
    with pytest.raises(Refusal, match="'gsm9k' is no mathematics task; expected one of gsm8k, math, svamp"):
        grade("gsm9k", "8", "8")


def test_graders_test_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    mathematics.self_test()
    grading._tested.cache_clear()
    monkeypatch.setattr(grading, "right", lambda task, extracted, gold: True)
    with pytest.raises(RuntimeError, match=r"grader of gsm8k is broken: 'The answer is 8\.' against '9' is True"):
        mathematics.self_test()
    monkeypatch.undo()
    grading._tested.cache_clear()


@with_verify
def test_math_verify_is_tested_too(monkeypatch: pytest.MonkeyPatch) -> None:
    grading._tested.cache_clear()
    monkeypatch.setattr(grading.judge, "all_verified", lambda pairs: [None] * len(pairs))
    with pytest.raises(RuntimeError, match=r"math-verify is broken: .* is None, expected True"):
        mathematics.self_test()
    grading._tested.cache_clear()


def test_grading_loads_neither_torch_nor_sympy() -> None:
    code = (
        "import sys; from tailkd.evaluate.mathematics import grade; assert grade('math', '\\\\boxed{1/2}', '0.5');"
        "assert not {'torch', 'sympy', 'math_verify'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# ----- processes that hang or crash

WORKER = """
import os, sys, time
print("ready", flush=True)
for line in sys.stdin:
    if "hang" in line: time.sleep(600)
    if "crash" in line: os._exit(3)
    if "last" in line: print("true", flush=True), os._exit(3)
    print("true" if "yes" in line else "false", flush=True)
"""


def test_a_judge_survives_hangs_and_crashes() -> None:
    judge = Judge([sys.executable, "-c", WORKER], seconds=1.0)
    asked = ["yes", "hang", "yes", "crash", "no", "last", "yes"]
    assert [judge.ask({"q": word}) for word in asked] == [True, None, True, None, False, True, True]
    assert judge.process is not None
    process = judge.process
    judge.close()
    assert process.poll() is not None


def test_judges_keep_the_order() -> None:
    judges = Judges([sys.executable, "-c", WORKER], seconds=1.0, count=2)
    words = ["yes", "no", "hang", "yes", "crash", "no"]
    assert judges.ask_all({"q": word} for word in words) == [True, False, None, True, None, False]
    judges.close()


def test_a_judge_that_cannot_start_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="did not start"):
        Judge([sys.executable, "-c", "raise SystemExit(3)"], seconds=1.0).ask({})


def test_sympy_is_cut_off() -> None:
    begin = time.monotonic()
    assert not grade("math", r"\boxed{x^{9^{9^{9}}}}", "x")
    assert time.monotonic() - begin < 15
    assert grade("math", r"\boxed{(x+1)^2}", "x^2+2x+1")


@with_verify
def test_verified() -> None:
    assert mathematics.verified(r"so $\boxed{\frac{1}{2}}$", "0.5") is True
    assert mathematics.verified(r"so $\boxed{\frac{1}{3}}$", "0.5") is False
    assert mathematics.verified("The answer is 18.", "18") is True
    assert mathematics.verified("", "18") is False


# ----- published outputs


@pytest.fixture(scope="module")
def published() -> ModuleType:
    script = Path(__file__).parents[2] / "benchmarks" / "mathematics.py"
    spec = importlib.util.spec_from_file_location("mathematics_benchmark", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@with_data
@pytest.mark.parametrize(
    ("task", "count", "agreement", "accuracy", "apart"),
    [("gsm8k", 1319, 0.995, 36.2, set()), ("math", 500, 0.985, 15.8, {25, 467})],
)
def test_rho_1(
    published: ModuleType, task: str, count: int, agreement: float, accuracy: float, apart: set[int]
) -> None:
    found = published.answers(task, DATA)
    assert len(found) == count
    assert sum(a.ours == a.published for a in found) >= agreement * count
    assert 100 * sum(a.ours for a in found) / count == pytest.approx(accuracy, abs=0.2)
    assert {a.id for a in found if a.ours != a.published} == apart  # the causes are in docs/evaluation.md


@with_data
@with_verify
@pytest.mark.parametrize(("task", "count", "least"), [("gsm8k", 954, 0.99), ("math", 158, 0.96)])
def test_math_verify_agrees(published: ModuleType, task: str, count: int, least: float) -> None:
    some = published.balanced(published.answers(task, DATA))
    assert len(some) == count
    assert sum(a.published for a in some) * 2 == count
    verdicts = mathematics.judge.all_verified([(a.generated, a.gold) for a in some])
    assert sum(v == a.ours for v, a in zip(verdicts, some, strict=True)) >= least * count


# ----- items and prompts


SIZES = {"gsm8k": 1319, "math": 500, "svamp": 1000, "asdiv": 2215, "mawps": 2065, "tabmwp": 1000, "mathqa": 1000}
SIZES["sat_math"] = 32


@with_data
@pytest.mark.parametrize("task", SIZES)
def test_published_items(task: str) -> None:
    items = read_items(task, DATA / "math")
    assert len({item.id for item in items}) == len(items) == SIZES[task]
    assert all(item.gold and item.question in item.prompt for item in items)
    shots = {"gsm8k": 8, "svamp": 8, "asdiv": 8, "mawps": 8, "tabmwp": 8}.get(task, 4)
    first, asked, given = items[0], *(("Problem:\n", "Solution:") if shots == 4 else ("Question: ", "Answer:"))
    assert first.prompt.count("\n\n\n") == first.prompt.count("\n\n\n" + asked) == shots
    assert first.prompt.startswith(asked)
    assert first.prompt.endswith(f"\n\n\n{asked}{first.question}\n{given}")
    assert all(
        grading.right(task, item.gold if shots == 4 and task != "math" else normalised(item.gold), item.gold)
        for item in items
    )


@with_data
def test_tabmwp_choices_stay_apart() -> None:
    with gzip.open(DATA / "math" / "tabmwp_problems_test1k.json.gz", "rt", encoding="utf-8") as file:
        problems = [p for p in json.load(file).values() if p["choices"]]
    assert len(problems) > 200
    for problem in problems:
        assert sum(grade("tabmwp", f"The answer is {choice}.", problem["answer"]) for choice in problem["choices"]) == 1


RECORDS: dict[str, tuple[dict[str, Any], str, str]] = {
    "gsm8k": ({"question": "How many? ", "answer": "2 + 2 = 4\n#### 4"}, "How many?", "4"),
    "math": ({"problem": "What is $x$?", "answer": "x=5"}, "What is $x$?", "x=5"),
    "svamp": ({"Body": "A has 3", "Question": "How many?", "Answer": 3.0}, "A has 3. How many?", "3"),
    "asdiv": ({"body": "Is it? ", "question": "Say.", "answer": "Yes"}, "Is it? Say. (Yes or No)", "Yes"),
    "mawps": ({"input": "How much?", "target": 11.5}, "How much?", "11.5"),
    "tabmwp": (
        {"question": "Which?", "choices": ["a", "b"], "answer": "a", "table_title": "T", "table": "x | 1"},
        'Read the following table regarding "T" and answer a question:\nx | 1\n'
        "Which? Please select from the following options: ['a', 'b']",
        "a",
    ),
    "mathqa": (
        {"problem": "x ?", "options": "['a ) a ) 4 , 5', 'b ) 6']", "correct": "b"},
        "x ?\nWhat of the following is the right choice? Explain your answer.\n(A) 4 , 5, (B) 6",
        "B",
    ),
    "sat_math": (
        {"question": "x?", "options": "A. 1 B. 2 C. 3 D. 4", "Answer": "D"},
        "x?\nWhat of the following is the right choice? Explain your answer.\n(A) 1 (B) 2 (C) 3 (D) 4",
        "D",
    ),
}


def folder_of(task: str, record: object, folder: Path) -> Path:
    file = mathematics.TASKS[task].file
    (folder / "math").mkdir()
    text = json.dumps({"7": record}) if task == "tabmwp" else json.dumps(record) + "\n"
    (folder / "math" / file).write_text(text, "utf-8")
    prompts = folder / "prompts" / "cot"
    prompts.mkdir(parents=True)
    (prompts / mathematics.TASKS[task].shots).write_text("\none\n\n\n\ntwo\n", "utf-8")
    return folder / "math"


@pytest.mark.parametrize("task", RECORDS)
def test_an_item_becomes_a_question(task: str, tmp_path: Path) -> None:
    record, question, gold = RECORDS[task]
    data = folder_of(task, record, tmp_path)
    (item,) = read_items(task, data)
    assert (item.id, item.question, item.gold) == ("7" if task == "tabmwp" else "0", question, gold)
    assert item.prompt.startswith("one\n\n\ntwo\n\n\n")
    assert read_items(task, data, shots=1)[0].prompt.startswith("one\n\n\n")
    (bare,) = read_items(task, data, shots=0)
    assert item.prompt == f"one\n\n\ntwo\n\n\n{bare.prompt}"
    assert bare.prompt.startswith(("Question: ", "Problem:\n"))
    assert read_items(task, data, limit=0) == []
    elsewhere = data.parent / "elsewhere"
    (data.parent / "prompts" / "cot").rename(elsewhere)
    assert read_items(task, data, prompts=elsewhere) == [item]


def test_mathqa_options_in_one_line(tmp_path: Path) -> None:
    record = {"problem": "x", "options": "a ) 1 , 2 , b ) 3 , c ) none", "correct": "a"}
    (item,) = read_items("mathqa", folder_of("mathqa", record, tmp_path))
    assert item.question.endswith("\n(A) 1 , 2, (B) 3, (C) none")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: (data / "gsm8k.jsonl").unlink(), "has no gsm8k.jsonl, nor gsm8k.jsonl.gz"),
        (lambda data: (data / "gsm8k.jsonl").write_text("{"), "cannot be read: .*expected JSON lines"),
        (lambda data: (data / "gsm8k.jsonl").write_text('{"question": "q"}'), "item 0 is no item of gsm8k"),
        (
            lambda data: (data.parent / "prompts" / "cot" / "gsm8k.md").unlink(),
            "cot/gsm8k.md is missing; it holds the solved examples of gsm8k",
        ),
        (lambda data: None, "9 shots were asked for; .* has 2"),
    ],
)
def test_data_that_cannot_be_used(spoil: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    data = folder_of("gsm8k", RECORDS["gsm8k"][0], tmp_path)
    spoil(data)
    with pytest.raises(Refusal, match=message):
        read_items("gsm8k", data, shots=9 if "shots were" in message else None)


# ----- the log

ITEMS = [Item(str(n), f"{n} + 1?", "shots" * (9 - n) + f"{n} + 1?", str(n + 1)) for n in range(5)]


class Counting:
    """Answers right but for item 3, and notes how it was asked; `stop` ends the n-th call as a crash would."""

    def __init__(self, stop: int | None = None) -> None:
        self.batches: list[list[str]] = []
        self.stop = stop

    def __call__(self, prompts: Sequence[str]) -> list[Answer]:
        if len(self.batches) == self.stop:
            raise KeyboardInterrupt
        self.batches.append(list(prompts))
        numbers = [int(prompt[prompt.rindex("s") + 1 :].partition(" ")[0]) for prompt in prompts]
        text = "The answer is {}.\n\nQuestion: 99?\nAnswer: 99"
        return [Answer(text.format(n + 1 + (n == 3)), 20 + n, True) for n in numbers]


def scored(generate: Any, log: Path, **changes: Any) -> Scored:
    options = {"items": ITEMS, "generator": "tiny@1", "batch_size": 2, **changes}
    return score("gsm8k", generate=generate, log=log, **options)


def test_every_sample_is_logged(tmp_path: Path) -> None:
    generate, log = Counting(), tmp_path / "new" / "gsm8k.jsonl"
    samples, seconds = scored(generate, log)
    assert seconds is not None
    assert [sample.id for sample in samples] == ["0", "1", "2", "3", "4"]
    assert [sample.correct for sample in samples] == [True, True, True, False, True]
    assert samples[0].generated == "The answer is 1."
    assert (samples[3].extracted, samples[3].tokens, samples[3].finished) == ("5", 23, True)
    if mathematics.can_verify():
        assert [sample.verified for sample in samples] == [sample.correct for sample in samples]
    assert [len(batch) for batch in generate.batches] == [2, 2, 1]
    lengths = [len(prompt) for batch in generate.batches for prompt in batch]
    assert lengths == sorted(lengths, reverse=True)
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    assert lines == [{"generator": "tiny@1", **asdict(sample)} for sample in samples]
    assert [path.name for path in log.parent.iterdir()] == [log.name]
    assert summary(samples) | {"verified": None, "without_verdict": 0} == {
        "value": 0.8,
        "error": pytest.approx(0.2),
        "items": 5,
        "scores": [1, 1, 1, 0, 1],
        "verified": None,
        "without_verdict": 0,
        "without_answer": 0,
        "unasked": 0,
    }


def test_a_log_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    log, partial = tmp_path / "gsm8k.jsonl", tmp_path / "gsm8k.jsonl.partial"
    with pytest.raises(KeyboardInterrupt):
        scored(Counting(stop=2), log)
    assert not log.exists()
    whole = partial.read_bytes()
    assert whole.count(b"\n") == 2
    samples = scored(Counting(), tmp_path / "whole.jsonl").samples
    for torn, batches in ((whole[:-9], [1]), (whole[:40], [2, 1])):
        log.unlink(missing_ok=True)
        partial.write_bytes(torn)
        with pytest.raises(KeyboardInterrupt):
            scored(Counting(stop=1), log)
        second, said = Counting(), list[str]()
        assert scored(second, log, say=said.append).samples == samples
        assert [len(batch) for batch in second.batches] == batches
        assert said == ["gsm8k: 5 items" + (f", going on after {5 - sum(batches)}" if sum(batches) < 5 else "")]
        assert log.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
        assert not partial.exists()


def test_what_is_answered_is_not_asked_again(tmp_path: Path) -> None:
    samples, said = scored(Counting(), tmp_path / "log.jsonl").samples, list[str]()
    assert scored(Counting(stop=0), tmp_path / "log.jsonl", say=said.append) == (samples, None)
    assert said == [f"gsm8k: 5 items were answered already: {tmp_path / 'log.jsonl'}"]


def test_killed_at_the_very_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file has its name, and what it was made of is not removed yet."""
    monkeypatch.setattr(Path, "unlink", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        scored(Counting(), tmp_path / "log.jsonl")
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 2
    assert scored(Counting(stop=0), tmp_path / "log.jsonl").samples == scored(Counting(), tmp_path / "other").samples
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "other"]


def test_progress_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "TOLD_EVERY", -1.0)
    said: list[str] = []
    scored(Counting(), tmp_path / "log.jsonl", say=said.append)
    assert said[1:] == ["gsm8k: 2 of 5, 2 right", "gsm8k: 4 of 5, 3 right", "gsm8k: 5 of 5, 4 right"]


@pytest.mark.parametrize("stop", [1, None])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generator": "tiny@2"}, r"holds samples of another model .*tiny@1, not tiny@2.*; give another folder"),
        ({"items": [replace(item, prompt="s0 + 1?") for item in ITEMS]}, "has item .* with another prompt or gold"),
        ({"items": [replace(item, gold="9") for item in ITEMS]}, "has item .* with another prompt or gold answer"),
    ],
)
def test_another_log_is_refused(changes: dict[str, Any], message: str, stop: int | None, tmp_path: Path) -> None:
    with contextlib.suppress(KeyboardInterrupt):
        scored(Counting(stop), tmp_path / "log.jsonl")
    before = [path.read_bytes() for path in tmp_path.iterdir()]
    with pytest.raises(Refusal, match=message):
        scored(Counting(), tmp_path / "log.jsonl", **changes)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == before


def test_a_log_of_other_items_is_refused(tmp_path: Path) -> None:
    scored(Counting(), tmp_path / "log.jsonl")
    with pytest.raises(Refusal, match="has 5 items, not these 4; move it away"):
        scored(Counting(), tmp_path / "log.jsonl", items=ITEMS[:4])


@pytest.mark.parametrize("suffix", ["", ".partial"])
@pytest.mark.parametrize(
    "text", ["hello\n", "[]\n", "{}\n", '{"generator": "tiny@1", "seconds": 1, "samples": [{}]}\n']
)
def test_a_file_that_is_no_log_is_refused(text: str, suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"log.jsonl{suffix}").write_text(text)
    with pytest.raises(Refusal, match="is no log of samples"):
        scored(Counting(), tmp_path / "log.jsonl")


def test_a_log_is_written_by_one_process(tmp_path: Path) -> None:
    def generate(prompts: Sequence[str]) -> list[Answer]:
        with pytest.raises(Refusal, match="is being written by another process; wait for it"):
            scored(Counting(), tmp_path / "log.jsonl")
        return Counting()(prompts)

    scored(generate, tmp_path / "log.jsonl")


def test_a_log_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Refusal, match=r"log\.jsonl cannot be written .*; give another folder"):
        scored(Counting(), tmp_path / "file" / "log.jsonl")
    monkeypatch.setattr(os, "fsync", mock.Mock(side_effect=[None, OSError(28, "No space left on device")]))
    with pytest.raises(DataError, match=r"cannot be written any more .*No space left.*; what is written stands"):
        scored(Counting(), tmp_path / "log.jsonl")
    monkeypatch.undo()
    second = Counting()
    scored(second, tmp_path / "log.jsonl")
    assert len(second.batches) == 1


def test_a_generator_must_answer_each_prompt(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="2 prompts were answered with 1 texts"):
        scored(lambda prompts: [Answer("one")], tmp_path / "log.jsonl")
