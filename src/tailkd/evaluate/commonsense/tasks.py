"""The eight sets: lm-eval's name of each, the metric that is reported, and what an item of its file holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Field = Callable[[Any], Any]


@dataclass(frozen=True)
class Task:
    """name: lm-eval's. room: where lm-eval defines it. split: what its items are called on the hub.

    files: names of a local file, without suffix. training: has a training split, which examples are drawn from.
    fields: what an item must hold; each is called with the value, and raises ValueError for one that it cannot be.
    renamed: published field -> the name that lm-eval's definition has for it.
    """

    name: str
    metric: str
    room: str
    split: str
    files: tuple[str, ...]
    fields: dict[str, Field]
    training: bool = True
    renamed: dict[str, str] = field(default_factory=dict)

    @property
    def training_files(self) -> tuple[str, ...]:
        stems = (name.removesuffix(f"_{self.split}") for name in self.files)
        return tuple(dict.fromkeys(f"{stem}_train" for stem in stems)) if self.training else ()


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value


def one_of(*allowed: str) -> Field:
    def label(value: Any) -> str:
        if str(value).strip() not in allowed:
            raise ValueError(f"the right answer is {value!r}, not one of {', '.join(allowed)}")
        return str(value).strip()

    return label


def number(*allowed: str) -> Field:
    return lambda value: int(one_of(*allowed)(value))


def texts(value: Any) -> list[str]:
    if not isinstance(value, list):
        raise ValueError(f"{value!r} is no list of texts")
    return [text(one) for one in value]


def with_blank(value: Any) -> str:
    if "_" not in text(value):
        raise ValueError(f"{value!r} has no blank (_)")
    return value


def choices(value: Any) -> dict[str, list[str]]:
    if not isinstance(value, dict) or set(value) < {"text", "label"}:
        raise ValueError(f"{value!r} has not the lists text and label")
    found = {name: texts(value[name]) for name in ("text", "label")}
    if len(found["text"]) != len(found["label"]):
        raise ValueError(f"{value!r} has not as many texts as labels")
    return found


ARC: dict[str, Field] = {"question": text, "choices": choices, "answerKey": text}
HELLASWAG = {"activity_label": text, "ctx_a": text, "ctx_b": text, "endings": texts, "label": one_of(*"0123")}
SOCIAL = {"context": text, "question": text, "answerA": text, "answerB": text, "answerC": text, "label": one_of(*"123")}
STORY_NAMES = {
    **{f"InputSentence{place}": f"input_sentence_{place}" for place in range(1, 5)},
    **{f"RandomFifthSentenceQuiz{place}": f"sentence_quiz{place}" for place in range(1, 3)},
    "AnswerRightEnding": "answer_right_ending",
}
STORY = dict.fromkeys(STORY_NAMES, text) | {"AnswerRightEnding": number("1", "2")}
STORY_FILE = "cloze_test_val__winter2018-cloze_test_ALL_val - 1 - 1"

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("hellaswag", "acc_norm", "hellaswag", "validation", ("hellaswag_validation", "hellaswag"), HELLASWAG),
        Task(
            "winogrande",
            "acc",
            "winogrande",
            "validation",
            ("winogrande_xl_validation", "winogrande_validation", "winogrande"),
            {"sentence": with_blank, "option1": text, "option2": text, "answer": one_of("1", "2")},
        ),
        Task(
            "openbookqa",
            "acc_norm",
            "openbookqa",
            "test",
            ("openbookqa_test", "openbookqa"),
            {"question_stem": text, "choices": choices, "answerKey": text},
        ),
        Task("arc_easy", "acc_norm", "arc", "test", ("arc_easy_test", "arc_easy"), ARC),
        Task("arc_challenge", "acc_norm", "arc", "test", ("arc_challenge_test", "arc_challenge"), ARC),
        Task(
            "piqa",
            "acc_norm",
            "piqa",
            "validation",
            ("piqa_validation", "piqa"),
            {"goal": text, "sol1": text, "sol2": text, "label": number("0", "1")},
        ),
        Task(
            "social_iqa",
            "acc",
            "siqa",
            "validation",
            ("siqa_validation", "social_iqa_validation", "social_iqa"),
            SOCIAL,
        ),
        Task(
            "storycloze_2018",
            "acc",
            "storycloze",
            "validation",
            ("storycloze_2018", STORY_FILE),
            STORY,
            training=False,
            renamed=STORY_NAMES,
        ),
    )
}
