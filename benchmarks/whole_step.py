"""What step.py measures: a teacher, a student and a batch of a shape, the floor, and our step over them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tailkd.data.batches import Batch
from tailkd.ledger import Batch as Micro
from tailkd.ledger import Student, Teacher, Training, memory, stages
from tailkd.ledger.published import config
from tailkd.models import precision
from tailkd.models.head import SplitModel
from tailkd.objective import Objective, distillation_loss
from tailkd.teacher.live import LiveTeacher
from tailkd.train.optim import build_optimizer
from tailkd.train.step import Step, accumulate_gradients

OURS = {
    "tailkd tail_aware": Objective(),
    "tailkd forward_kl": Objective(divergence="forward_kl"),
    "tailkd none": Objective(divergence="none"),
}
OPTIMIZER: dict[str, Any] = {"learning_rate": 1e-5, "betas": (0.9, 0.95), "weight_decay": 0.1}
SAME_LOSS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # relative difference between two ways to compute one
PER_MILLION = 1e9  # operations per token in a PFLOP per million tokens


@dataclass(frozen=True)
class Shape:
    """Names in `ledger.published`, or sizes of two Llamas."""

    student: Any
    teacher: Any
    context: int
    rows: int


SHAPES = {
    "cpu": Shape((32_000, 256, 704, 4, 4), (32_000, 512, 1376, 5, 8), 256, 4),  # 11 M and 32 M parameters
    "qwen": Shape("Qwen 1.2B", "Qwen1.5-1.8B", 2048, 8),
    "gemma": Shape("Gemma2 2B", "Gemma2-9B", 2048, 2),
    "tiny": Shape((500, 32, 64, 2, 2), (500, 48, 96, 2, 2), 32, 2),  # for the tests
}


def configuration(of: Any) -> Any:
    if isinstance(of, str):
        return config(of)
    from transformers import LlamaConfig

    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return LlamaConfig(**dict(zip(names, of, strict=True)), tie_word_embeddings=True)


def model_of(configuration: Any, dtype: torch.dtype, device: torch.device, compiled: bool) -> Any:
    """A model with random weights, each block compiled where asked."""
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        model = AutoModelForCausalLM.from_config(configuration, dtype=dtype)
    for block in model.model.layers if compiled else ():
        block.compile()
    return model


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those that make a `Bench`."""
    parser.add_argument("--shape", choices=SHAPES, default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rows", type=int, help="of a micro-batch, which is the whole batch here")
    parser.add_argument("--compile", action="store_true", help="torch.compile of every block")
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing of the student")


class Bench:
    """Both models and a batch; every competitor is a step over them."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.shape = SHAPES[arguments.shape]
        self.device = device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = getattr(torch, arguments.dtype)
        self.rows = arguments.rows or self.shape.rows
        torch.manual_seed(0)
        self.configurations = configuration(self.shape.student), configuration(self.shape.teacher)
        student = model_of(self.configurations[0], torch.float32, device, arguments.compile).train()
        if arguments.checkpointing:
            student.gradient_checkpointing_enable()
        self.checkpointing = arguments.checkpointing
        teacher = model_of(self.configurations[1], self.dtype, device, arguments.compile)
        self.vocabulary = self.configurations[0].vocab_size
        self.student = SplitModel(student, compute_dtype=self.dtype)
        self.teacher = LiveTeacher(teacher, usable=self.vocabulary, compute_dtype=self.dtype)
        self.optimizer = build_optimizer(student, **OPTIMIZER)
        self.batch = self.batch_of(0, self.rows)
        torch.manual_seed(1)
        self.direction = torch.randn(self.rows, self.shape.context, student.config.hidden_size, device=device)

    def batch_of(self, seed: int, rows: int) -> Batch:
        """Made-up ids without borders, and all of them to be learned."""
        context = self.shape.context
        ids = torch.randint(3, self.vocabulary, (rows, context + 1), generator=torch.Generator().manual_seed(seed))
        borders = tuple(range(0, rows * context + 1, context))
        segments, valid = torch.zeros(rows, context, dtype=torch.int32), torch.arange(rows * context)
        return Batch(ids[:, :-1], ids[:, 1:], segments, valid, borders, borders, len(valid), tuple(range(rows)))

    def ours(self, objective: Objective) -> Callable[[], None]:
        teacher = self.teacher if objective.needs_teacher else None
        step = Step(self.student, teacher, objective, self.optimizer, micro_batch_size=self.rows, clip_norm=1.0)

        def run() -> None:
            assert step(self.batch).not_finite is None

        return run

    def floor(self) -> None:
        ids = self.batch.input_ids.to(self.device)
        with precision.compute(self.dtype, self.device):
            with torch.inference_mode():
                theirs = self.teacher.split.backbone(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
            hidden = self.student.backbone(input_ids=ids, use_cache=False).last_hidden_state
        weight = self.student.projection.weight
        with torch.no_grad():
            along, gradient = self._products(theirs, hidden.detach().flatten(0, 1), weight)
        hidden.backward(self.direction.to(hidden.dtype) + 0 * along.view_as(hidden))
        if weight.grad is None:
            weight.grad = gradient.to(weight.dtype)
        else:  # tied: the embeddings have theirs already
            weight.grad.add_(gradient)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _products(self, theirs: Tensor, ours: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        narrow, ours = weight.to(self.dtype), ours.to(self.dtype)
        teacher = theirs.to(self.dtype) @ self.teacher.split.projection.weight.to(self.dtype).T
        student = ours @ narrow.T
        del teacher
        return student @ narrow, student.T @ ours

    def loss(self, objective: Objective, batch: Batch) -> dict[str, float]:
        """Mean loss and its parts as a step computes them, without an update."""
        teacher = self.teacher if objective.needs_teacher else None
        parts = accumulate_gradients(self.student, teacher, batch, objective=objective, micro_batch_size=self.rows)
        self.optimizer.zero_grad(set_to_none=True)
        return {name: tally.mean() for name, tally in parts.items()}

    def operations(self) -> float:
        """Executed operations of a step, from the ledger."""
        batch = Micro(self.rows, self.shape.context, checkpointing=self.checkpointing)
        student, teacher = self.configurations
        found = stages(Student(student), Teacher(teacher), Training(1.0, batch), None)
        return found.total * PER_MILLION * self.batch.count

    def predicted_bytes(self) -> int:
        batch = Micro(
            self.rows,
            self.shape.context,
            compute=self.dtype,
            checkpointing=self.checkpointing,
            device=self.device.type,
        )
        student, teacher = self.configurations
        return memory(student, [Teacher(teacher, self.dtype)], batch).total


def check_losses(bench: Bench) -> None:
    """Refuse to time a step whose loss is wrong: ours on one row against the reference from dense logits."""
    row = next(bench.batch.micro_batches(1)).to(bench.device)
    for name, objective in OURS.items():
        with torch.no_grad():
            head, signal = bench.student(row.input_ids), bench.teacher(row)
            theirs = signal if objective.needs_teacher else None
            loss = distillation_loss(head, theirs, row.labels, objective=objective, impl="reference")
        assert_same(name, bench.loss(objective, row)["loss"], float(loss.mean()), bench.dtype)


def assert_same(name: str, found: float, expected: float, dtype: torch.dtype) -> None:
    assert abs(found / expected - 1) < SAME_LOSS[dtype], (
        f"{name} computes a loss of {found:.6g}, expected {expected:.6g}"
    )
