"""Files of the eight commonsense sets, made of the tests' words, in the form in which the sets are published."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import builders
import torch

ITEMS = 8


def _item(task: str, words: Any, number: int) -> dict[str, Any]:
    few = [f"{words()} {words()} {words()}" for _ in range(4)]
    if task == "hellaswag":
        context = {"activity_label": words(), "ctx_a": f"{few[0]} [step] {few[1]}.", "ctx_b": words()}
        return {"ind": number, **context, "endings": few, "label": str(number % 4)}
    if task == "winogrande":
        pair = {"option1": words(), "option2": words()}
        return {"sentence": f"the {words()} sang before the _ {few[0]}.", **pair, "answer": str(1 + number % 2)}
    if task == "piqa":
        return {"goal": f"{number} {few[0]}", "sol1": few[1], "sol2": f"{few[2]} {words()}", "label": number % 2}
    if task == "social_iqa":
        answers = {f"answer{letter}": few[place] for place, letter in enumerate("ABC")}
        return {"context": f"{few[3]}.", "question": f"{number} {words()}?", **answers, "label": str(1 + number % 3)}
    if task == "storycloze_2018":
        story = {f"InputSentence{place}": f"{few[place - 1]}." for place in range(1, 5)}
        endings = {f"RandomFifthSentenceQuiz{place}": f"{words()} {words()}." for place in (1, 2)}
        return {"InputStoryid": f"id-{number}", **story, **endings, "AnswerRightEnding": 1 + number % 2}
    labels = list("ABCD" if number % 3 else "1234")
    name = "question_stem" if task == "openbookqa" else "question"
    choices = {"text": few, "label": labels}
    return {"id": f"id-{number}", name: f"{number} {words()} {words()}", "choices": choices, "answerKey": labels[2]}


NAMES = {
    "hellaswag": ("hellaswag_validation.jsonl.gz", "hellaswag_train.jsonl"),
    "winogrande": ("winogrande_xl_validation.jsonl", "winogrande_xl_train.jsonl.gz"),
    "openbookqa": ("openbookqa_test.jsonl", "openbookqa_train.jsonl"),
    "arc_easy": ("arc_easy.jsonl", "arc_easy_train.jsonl"),
    "arc_challenge": ("arc_challenge_test.jsonl.gz", "arc_challenge_train.jsonl"),
    "piqa": ("piqa_validation.jsonl", "piqa_train.jsonl"),
    "social_iqa": ("siqa_validation.jsonl", "siqa_train.jsonl"),
    "storycloze_2018": ("storycloze_2018.csv", None),
}


def write(folder: Path, *, training: bool = False, without: tuple[str, ...] = ()) -> Path:
    """All eight sets but those of `without`, each with `ITEMS` items, and the training files where asked."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(5)

    def words() -> str:
        return builders.WORDS[int(torch.randint(len(builders.WORDS), (1,), generator=generator))]

    for task, (items, examples) in NAMES.items():
        for name in (items, examples if training else None):
            rows = [_item(task, words, number) for number in range(ITEMS)]
            if name is not None and task not in without:
                _write(folder / name, rows)
    return folder


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
