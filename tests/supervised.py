"""Supervised corpora, made on the spot, and recipes that train on them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import builders
import chats
import torch


def records(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Sums in words, as prompt and completion, and as messages."""
    generator, found = torch.Generator().manual_seed(seed), []
    for number in range(count):
        a, b = torch.randint(30, (2,), generator=generator).tolist()
        what = builders.WORDS[int(torch.randint(len(builders.WORDS), (1,), generator=generator))]
        question, answer = f"{number} has {a} {what} and {b}. how many?", f"{a} and {b}, {what}: {a + b}"
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        again = [{"role": "user", "content": f"and {b}?"}, {"role": "assistant", "content": f"{b} {what}."}]
        found.append({"question": question, "answer": answer, "messages": turns + again[: 2 * (number % 2)]})
    return found


def write(path: Path, found: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in found))
    return path


def models(folder: Path, template: str | None = chats.CHATML) -> SimpleNamespace:
    """Folders of a teacher and a student, with one tokenizer."""
    tokenizer = chats.tokenizer(template)
    teacher = builders.save_model(folder / "teacher", tokenizer, hidden=48, seed=1, initializer_range=0.2)
    student = builders.save_model(folder / "student", tokenizer, seed=2)
    return SimpleNamespace(teacher=teacher, student=student, tokenizer=tokenizer)


def recipe(made: SimpleNamespace, corpus: Path, out: Path, train: dict[str, Any], **data: Any) -> dict[str, Any]:
    """Six steps of eight rows."""
    return {
        "name": "supervised",
        "out": str(out),
        "teacher": {"model": str(made.teacher)},
        "student": {"model": str(made.student)},
        "data": {"train": {"path": str(corpus), **train}, "context": 96, **data},
        "objective": {"top_k": 5},
        "training": {"tokens": 6 * 8 * 96, "batch_size": 8, "micro_batch_size": 4, "learning_rate": 3e-3},
        "evaluate": {"batch_size": 4},
    }
