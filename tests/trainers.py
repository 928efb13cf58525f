"""What tests of the adapter are made of: rows as other people's collators make them, trainers, and our own loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import builders
import torch
import transformers
from stepping import VOCABULARY
from torch import Tensor

from tailkd.adapters.transformers import DistillationTrainer
from tailkd.data.batches import Batch, _batch
from tailkd.models.head import SplitModel
from tailkd.objective import Objective
from tailkd.teacher.live import LiveTeacher
from tailkd.train.step import accumulate_gradients

WIDTH = 14
OBJECTIVES = {"tail_aware": Objective(top_k=4), "forward_kl": Objective(divergence="forward_kl")}

Rows = list[dict[str, Tensor]]


def padded() -> Rows:
    """Eight rows of different lengths, filled up on the right."""
    generator = torch.Generator().manual_seed(4)
    return [_padded(generator, length) for length in (14, 3, 9, 14, 2, 7, 12, 5)]


def _padded(generator: torch.Generator, length: int) -> dict[str, Tensor]:
    ids = torch.zeros(WIDTH, dtype=torch.int64)
    ids[:length] = torch.randint(2, VOCABULARY, (length,), generator=generator)
    mask = (torch.arange(WIDTH) < length).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def packed() -> Rows:
    """Eight rows of two or three documents each, whose first tokens nobody predicts."""
    generator, made = torch.Generator().manual_seed(5), []
    for border in (3, 9, 5, 7, 12, 2, 4, 10):
        ids = torch.randint(2, VOCABULARY, (WIDTH,), generator=generator)
        positions = torch.cat([torch.arange(border), torch.arange(WIDTH - border)])
        made.append({"input_ids": ids, "labels": ids.masked_fill(positions == 0, -100), "position_ids": positions})
    return made


def batch_of(rows: Rows) -> Batch:
    """The same rows as our own loop's batch."""
    stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    labels = torch.cat([stacked["labels"][:, 1:], torch.full((len(rows), 1), -100)], 1)
    positions = stacked.get("position_ids")
    segments = torch.zeros_like(labels) if positions is None else (positions == 0).cumsum(-1) - 1
    return _batch(stacked["input_ids"], labels, segments, tuple(range(len(rows))), positions)


def models(**student: Any) -> tuple[Any, Any]:
    """A student whose vocabulary matrix is its own, and a teacher."""
    own = builders.build_model(VOCABULARY, seed=2, **{"tie_word_embeddings": False, **student})
    return own, builders.build_model(VOCABULARY, hidden=48, seed=1, initializer_range=0.2)


def our_step(
    student: Any, teacher: Any, rows: Rows, objective: Objective, *, usable: int = VOCABULARY, **split: Any
) -> dict[str, Any]:
    """Mean loss and parts of a global batch, and its gradients, by our own loop."""
    student.zero_grad()
    parts = accumulate_gradients(
        SplitModel(student, usable=usable, **split),
        LiveTeacher(teacher, usable=usable, **split),
        batch_of(rows),
        objective=objective,
        micro_batch_size=len(rows),
    )
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    return {**{name: tally.mean() for name, tally in parts.items()}, "gradients": gradients}


class Keeping(transformers.TrainerCallback):
    """Keeps the gradients of a step."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        found = {name: p.grad for name, p in given["model"].named_parameters() if p.grad is not None}
        whole = {name: g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for name, g in found.items()}
        self.gradients = {name.removeprefix("module."): gradient for name, gradient in whole.items()}


def arguments(folder: Path, *, rows: int, micro_batches: int, **more: Any) -> transformers.TrainingArguments:
    """For one step on a global batch of `rows` on this rank."""
    values = {
        "per_device_train_batch_size": rows // micro_batches,
        "gradient_accumulation_steps": micro_batches,
        "max_steps": 1,
        "logging_steps": 1,
        "max_grad_norm": 0.0,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return transformers.TrainingArguments(str(folder), **{**values, **more})


def their_step(student: Any, teacher: Any, rows: Rows, args: Any, objective: Objective, **more: Any) -> dict[str, Any]:
    """The same by the trainer."""
    keeping = Keeping()
    given = {"train_dataset": rows, "callbacks": [keeping], **more}
    trainer = DistillationTrainer(student, args, teacher=teacher, objective=objective, **given)
    trainer.train()
    logged = next(record for record in trainer.state.log_history if "loss" in record)
    return {**logged, "gradients": keeping.gradients, "trainer": trainer}


def assert_same(theirs: dict[str, Any], ours: dict[str, Any], *, tolerance: float = 1e-5) -> None:
    """Losses, parts and gradients."""
    for name in ("loss", "clm", "divergence"):
        assert abs(theirs[name] - ours[name]) <= tolerance * max(1.0, abs(ours[name])), name
    assert theirs["gradients"].keys() == ours["gradients"].keys()
    largest = max(float(gradient.abs().max()) for gradient in ours["gradients"].values())
    for name, gradient in ours["gradients"].items():
        difference = (theirs["gradients"][name] - gradient).abs().max()
        assert difference <= tolerance * largest, name
