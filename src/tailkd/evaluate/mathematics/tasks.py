"""The eight mathematics sets: how an item of the published file becomes a question, a gold answer and a prompt."""

from __future__ import annotations

import ast
import gzip
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailkd.errors import Refusal

STOPS = ("</s>", "\n\nQuestion:", "\n\nProblem:")
MAX_NEW_TOKENS = 1024
BETWEEN_SHOTS = "\n\n\n"

Record = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """file: in the data folder, plain or gzipped. shots: in the folder of prompts. problem: not Question."""

    name: str
    file: str
    shots: str
    question: Callable[[Record], str]
    gold: Callable[[Record], str]
    problem: bool = False
    options: bool = False

    def prompt(self, question: str, shots: str) -> str:
        r"""``shots + "\n\n\n" + question`` in the task's form; the model goes on after "Answer:" or "Solution:"."""
        form = f"Problem:\n{question}\nSolution:" if self.problem else f"Question: {question}\nAnswer:"
        return (shots.strip() + BETWEEN_SHOTS + form) if shots.strip() else form


@dataclass(frozen=True)
class Item:
    """One question. id: the published one, or the line; gold: as the file spells it, `grade` reads it."""

    id: str
    question: str
    prompt: str
    gold: str


def read_items(
    task: str,
    data: str | Path,
    *,
    prompts: str | Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
) -> list[Item]:
    """The items of a task in the order of its file, with prompts of all its shots or of the first `shots`.

    `data` and `prompts` (None: ``data/../prompts/cot``) are folders of the files that docs/evaluation.md lists. Raises
    Refusal for an unknown task, a file that is missing or broken, more shots than there are.
    """
    wanted = task_named(task)
    joined = BETWEEN_SHOTS.join(examples(task, data, prompts, shots))
    items: list[Item] = []
    path = _file(Path(data), wanted.file)
    for line, (name, record) in enumerate(_records(path)):
        if limit is not None and line >= limit:
            break
        try:
            question, gold = _asked(wanted.question(record), wanted.gold(record)), wanted.gold(record)
        except (KeyError, AttributeError, ValueError, SyntaxError) as error:
            message = f"{path}: item {name} is no item of {task}: {error!r}; expected the fields of the published file"
            raise Refusal(message) from error
        items.append(Item(name, question, wanted.prompt(question, joined), gold))
    return items


def examples(task: str, data: str | Path, prompts: str | Path | None = None, count: int | None = None) -> list[str]:
    """The solved examples of a task's prompts, all or the first `count`; folders and Refusals as in `read_items`."""
    if count == 0:
        return []
    path = (Path(data).resolve().parent / "prompts" / "cot" if prompts is None else Path(prompts)) / task_named(
        task
    ).shots
    if not path.is_file():
        raise Refusal(f"{path} is missing; it holds the solved examples of {task}: put the published prompts there")
    found = [example.strip("\n") for example in path.read_text("utf-8").strip().split(BETWEEN_SHOTS)]
    if count is not None and not 0 < count <= len(found):
        raise Refusal(f"{count} shots were asked for; {path} has {len(found)}")
    return found[:count]


def task_named(name: str) -> Task:
    """Raises Refusal for a name that is none of `TASKS`."""
    if name not in TASKS:
        raise Refusal(f"{name!r} is no mathematics task; expected one of {', '.join(TASKS)}")
    return TASKS[name]


def cut(generated: str) -> str:
    """The text before the first stop string."""
    return min((generated.partition(stop)[0] for stop in STOPS), key=len)


# ----- files


def _file(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise Refusal(f"{folder} has no {name}, nor {name}.gz; give the folder that holds the published sets with --data")


def _records(path: Path) -> Iterator[tuple[str, Record]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            if ".jsonl" in path.suffixes:
                rows = [json.loads(line) for line in file if line.strip()]
                yield from ((_id(row, line), row) for line, row in enumerate(rows))
            else:
                yield from json.load(file).items()
    except (ValueError, OSError, EOFError, AttributeError) as error:
        raise Refusal(f"{path} cannot be read: {error}; expected JSON lines, or one JSON object of items") from error


def _id(row: Record, line: int) -> str:
    return str(next((row[field] for field in ("idx", "unique_id", "id") if field in row), line))


# ----- questions and gold answers


def _asked(question: str, gold: str) -> str:
    """The harness tells the model when it wants one of two words."""
    words = {"true": "True or False", "false": "True or False", "yes": "Yes or No", "no": "Yes or No"}
    hint = words.get(gold.strip().lower())
    return f"{question.strip()} ({hint})" if hint else question.strip()


def _plain(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _svamp(record: Record) -> str:
    body = record["Body"].strip()
    return f"{body}{'' if body.endswith('.') else '.'} {record['Question'].strip()}"


def _table(record: Record) -> str:
    title = f'regarding "{record["table_title"]}" ' if record["table_title"] else ""
    options = f" Please select from the following options: {record['choices']}" if record["choices"] else ""
    return f"Read the following table {title}and answer a question:\n{record['table']}\n{record['question']}{options}"


def _choose(question: str, options: list[str], between: str) -> str:
    listed = between.join(f"({letter}) {option}" for letter, option in zip("ABCDE", options, strict=False))
    return f"{question.strip()}\nWhat of the following is the right choice? Explain your answer.\n{listed}"


def _mathqa(record: Record) -> str:
    """Options are `a ) 12 , b ) 16 ...`, or Python's spelling of a list of such."""
    text = record["options"]
    found = ast.literal_eval(text) if text.startswith("[") else re.split(r"\s*,\s*(?=[b-e] \) )", text)
    return _choose(record["problem"], [re.sub(r"^(?:[a-e] \) ?)+", "", option).strip() for option in found], ", ")


def _sat(record: Record) -> str:
    match = re.fullmatch(r"A[.)] (.*?) B[.)] (.*?) C[.)] (.*?) D[.)] (.*)", record["options"].strip(), re.DOTALL)
    if match is None:
        raise ValueError(f"options {record['options']!r}")
    return _choose(record["question"], [option.strip() for option in match.groups()], " ")


def _of(field: str) -> Callable[[Record], str]:
    return lambda record: _plain(record[field])


def _last_part(record: Record) -> str:
    return record["answer"].rpartition("####")[2].strip()


def _without_unit(record: Record) -> str:
    return re.sub(r"\s+\([^()]*\)$", "", record["answer"].strip())


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("gsm8k", "gsm8k.jsonl", "gsm8k.md", _of("question"), _last_part),
        Task("math", "math_oai.jsonl", "minerva_math.md", _of("problem"), _of("answer"), problem=True),
        Task("svamp", "svamp.jsonl", "gsm8k.md", _svamp, _of("Answer")),
        Task(
            "asdiv", "asdiv.jsonl", "gsm8k.md", lambda r: f"{r['body'].strip()} {r['question'].strip()}", _without_unit
        ),
        Task("mawps", "mawps.jsonl", "gsm8k.md", _of("input"), _of("target")),
        Task("tabmwp", "tabmwp_problems_test1k.json", "gsm8k.md", _table, _of("answer")),
        Task(
            "mathqa", "mathqa.jsonl", "mathqa.md", _mathqa, lambda r: r["correct"].upper(), problem=True, options=True
        ),
        Task("sat_math", "sat_math.jsonl", "mmlu_stem.md", _sat, _of("Answer"), problem=True, options=True),
    )
}
