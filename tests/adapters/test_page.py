"""The examples of README.md and docs/adapters.md, as they stand there, against our own loop on the same rows."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("accelerate", reason="transformers.Trainer needs the package accelerate (extra trainer)")

import builders
import torch
import trainers
from transformers import AutoModelForCausalLM

from tailkd.adapters.transformers import shifted_labels
from tailkd.objective import Objective

ROOT = Path(__file__).parents[2]
OBJECTIVE = Objective(top_k=5)


def block_of(page: str, containing: str) -> str:
    found = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)
    (block,) = [block for block in found if containing in block]
    return block


def trained(block: str, **names: Any) -> dict[str, Any]:
    """Run a block that ends with ``trainer.train()``: its first step and its trainer."""
    keeping, namespace = trainers.Keeping(), dict(names)
    assert block.endswith("trainer.train()\n")
    exec(block.removesuffix("trainer.train()\n"), namespace)
    trainer = namespace["trainer"]
    trainer.add_callback(keeping)
    trainer.args.max_grad_norm, trainer.args.max_steps, trainer.args.logging_steps = 0.0, 1, 1
    exec("trainer.train()", namespace)
    return {**trainer.state.log_history[0], "gradients": keeping.gradients, "trainer": trainer}


def ours(trainer: Any) -> dict[str, Any]:
    """Our own loop on the rows of the trainer, as its collator makes them, from where it began."""
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    rows = [{name: inputs[name][i] for name in ("input_ids", "labels")} for i in range(8)]
    student, teacher = (AutoModelForCausalLM.from_pretrained(name) for name in ("student", "teacher"))
    split = {"usable": trainer.usable, "compute_dtype": trainer.compute_dtype}
    return trainers.our_step(student, teacher, rows, OBJECTIVE, **split)


@pytest.fixture
def folder(stranger: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where "student" and "teacher" are models, with a tokenizer that fills up."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    stranger.tokenizer.save_pretrained("student")
    type(stranger.tokenizer).from_pretrained("student", pad_token="<s>").save_pretrained("student")
    settings = {"tie_word_embeddings": False, "pad_token_id": 0}
    builders.save_model(Path("student"), None, vocabulary=len(stranger.tokenizer), seed=2, **settings)
    wide = {"hidden": 48, "initializer_range": 0.2, **settings}
    builders.save_model(Path("teacher"), None, vocabulary=len(stranger.tokenizer), seed=1, **wide)


@pytest.mark.usefixtures("folder")
def test_twelve_lines_of_the_readme_train_as_our_own_loop() -> None:
    block = block_of("README.md", "DistillationTrainer")
    assert len([line for line in block.splitlines() if line]) <= 12
    theirs = trained(block, rows=trainers.padded())
    trainers.assert_same(theirs, ours(theirs["trainer"]))


@pytest.mark.usefixtures("folder")
def test_the_trainer_of_the_page_trains_as_our_own_loop() -> None:
    texts = [" ".join(builders.WORDS[i : i + 3 + i]) for i in range(8)]
    theirs = trained(block_of("docs/adapters.md", "DataCollatorForLanguageModeling"), texts=texts)
    trainers.assert_same(theirs, ours(theirs["trainer"]))


def test_plain_torch_is_our_own_loop() -> None:
    student, teacher = trainers.models()
    rows = trainers.padded()
    ours = trainers.our_step(student, teacher, rows, OBJECTIVE)
    inputs = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    names = {"student_model": student, "teacher_model": teacher, "input_ids": inputs["input_ids"]}
    namespace: dict[str, Any] = {**names, "labels": shifted_labels(inputs)}
    exec(block_of("docs/adapters.md", "loss.mean().backward()"), namespace)
    gradients = {name: p.grad for name, p in student.named_parameters()}
    found = {name: tally.mean() for name, tally in namespace["loss"].parts.items()}
    trainers.assert_same({**found, "gradients": gradients}, ours)


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
def test_trls_trainer_trains_as_our_own_loop() -> None:
    pytest.importorskip("trl", reason="the example for TRL needs the package trl (extra bench)")
    from datasets import Dataset

    words = builders.WORDS
    rows = [{"prompt": " ".join(words[i : i + 4]), "completion": " ".join(words[i + 9 : i + 12 + i])} for i in range(8)]
    block = block_of("docs/adapters.md", "SFTTrainer")
    theirs = trained(block, questions_and_answers=Dataset.from_list(rows))
    trainers.assert_same(theirs, ours(theirs["trainer"]))
    assert (theirs["trainer"].data_collator([theirs["trainer"].train_dataset[0]])["labels"] == -100).any()
