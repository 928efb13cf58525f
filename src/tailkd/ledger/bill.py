"""The bill of a run, as one tree: parameters, operations, memory, disk, hours, money."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tailkd.errors import Refusal
from tailkd.ledger import flops
from tailkd.ledger.anatomy import Anatomy, dissect
from tailkd.ledger.cache import Cache
from tailkd.ledger.flops import PAPER, Convention
from tailkd.ledger.memory import Memory, Teacher, disk, memory
from tailkd.ledger.parameters import Parameters, count
from tailkd.ledger.rehearsal import Batch, bytes_per_id, chunk_limit

PETA_PER_MILLION = 1e6 / 1e15
Teachers = Teacher | Sequence[Teacher] | None


@dataclass(frozen=True)
class Student:
    """config: of transformers. frozen_embeddings: the input embedding, and a tied head with it, is not trained."""

    config: Any
    frozen_embeddings: bool = False


@dataclass(frozen=True)
class Selection:
    """Scoring of a corpus by a teacher, and a reference model if its cost is to be counted; `ratio` of it is kept."""

    teacher: Any
    reference: Any | None = None
    ratio: float = 0.5


@dataclass(frozen=True)
class Generation:
    """Training sequences written by a model: `generated` tokens after `prompt` tokens.

    per_trained: tokens written for each token that is trained on; 1 where those written are, alone and once.
    """

    writer: Any
    prompt: int
    generated: int
    per_trained: float = 1.0


@dataclass(frozen=True)
class Training:
    """tokens: trained on in all. batch: a micro-batch. corpus_tokens: prepared on the disk. moment_bytes: of the
    optimizer per trained parameter. top_k: whether the divergence splits at a top-k.
    """

    tokens: float
    batch: Batch
    corpus_tokens: int = 0
    keep_checkpoints: int = 2
    moment_bytes: int = 8
    top_k: bool = True
    selection: Selection | None = None
    generation: Generation | None = None


@dataclass(frozen=True)
class Hardware:
    """peak: FLOP/s of one device. utilisation: share of it that is reached. price: of one device's hour, if known."""

    peak: float
    utilisation: float
    devices: int = 1
    price: float | None = None

    def __post_init__(self) -> None:
        if not (self.peak > 0 and 0 < self.utilisation <= 1 and self.devices >= 1):
            raise Refusal(
                f"a device's peak must be positive, its utilisation in (0, 1], and one device is the least; got "
                f"{self.peak:g} FLOP/s, {self.utilisation:g}, {self.devices}"
            )


@dataclass(frozen=True)
class Stages:
    """PFLOP per million trained tokens (10^15 operations, 10^6 tokens), by stage."""

    teacher_forward: float
    student_step: float
    selection: float = 0.0
    generation: float = 0.0

    @property
    def total(self) -> float:
        return self.teacher_forward + self.student_step + self.selection + self.generation

    def as_dict(self) -> dict[str, float]:
        names = ("teacher_forward", "student_step", "total", "selection", "generation")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Bill:
    """What a run costs; `pflop_per_million_tokens` is in the paper's convention, `executed` is what will run.

    teacher: of the one; of several where a list of teachers was given. cache: of writing the teacher down, which is
    paid once and is in no other figure.
    """

    student: Parameters
    teacher: Parameters | tuple[Parameters, ...] | None
    pflop_per_million_tokens: Stages
    executed: Stages
    memory: Memory
    disk_bytes: int
    hours: float | None
    money: float | None = None
    cache: Cache | None = None

    def as_dict(self) -> dict[str, Any]:
        """The tree with plain numbers, for JSON; `money` where a price was given, `teacher` where there is one."""
        sides: dict[str, Any] = {"student": self.student.as_dict()}
        if isinstance(self.teacher, tuple):
            sides["teacher"] = [one.as_dict() for one in self.teacher]
        elif self.teacher is not None:
            sides["teacher"] = self.teacher.as_dict()
        return {
            "parameters": sides,
            "pflop_per_million_tokens": self.pflop_per_million_tokens.as_dict(),
            "executed": self.executed.as_dict(),
            "memory_bytes": self.memory.as_dict(),
            "disk_bytes": self.disk_bytes,
            "hours": self.hours,
            **({} if self.money is None else {"money": self.money}),
            **({} if self.cache is None else {"cache": self.cache.as_dict()}),
        }


def bill(student: Student, teacher: Teachers, training: Training, hardware: Hardware | None) -> Bill:
    """The bill of training `student` against `teacher`, one or several; needs configurations alone.

    ``hours == training.tokens * executed operations per token / (peak * utilisation * devices) / 3600``;
    ``money == hours * devices * price``. Memory is that of one device that holds everything.
    Without hardware there are no hours and no money.
    """
    ours = count(student.config, frozen_embeddings=student.frozen_embeddings)
    ran = stages(student, teacher, training, None)
    hours, money = (None, None) if hardware is None else _time(ran.total / PETA_PER_MILLION * training.tokens, hardware)
    theirs = tuple(count(one.config) for one in _all(teacher))
    return Bill(
        student=ours,
        teacher=theirs if isinstance(teacher, Sequence) else theirs[0] if theirs else None,
        pflop_per_million_tokens=stages(student, teacher, training, PAPER),
        executed=ran,
        memory=memory(
            student.config,
            _all(teacher),
            training.batch,
            frozen_embeddings=student.frozen_embeddings,
            moment_bytes=training.moment_bytes,
        ),
        disk_bytes=disk(
            ours.total,
            ours.trainable,
            keep_checkpoints=training.keep_checkpoints,
            corpus_tokens=training.corpus_tokens,
            vocabulary=training.batch.usable or dissect(student.config).vocabulary,
        ),
        hours=hours,
        money=money,
    )


def _all(teacher: Teachers) -> Sequence[Teacher]:
    return teacher if isinstance(teacher, Sequence) else [] if teacher is None else [teacher]


def _time(operations: float, hardware: Hardware) -> tuple[float, float | None]:
    hours = operations / (hardware.peak * hardware.utilisation * hardware.devices) / 3600
    return hours, None if hardware.price is None else hours * hardware.devices * hardware.price


def stages(student: Student, teacher: Teachers, training: Training, convention: Convention | None) -> Stages:
    """PFLOP per million trained tokens of each stage; without a convention, as executed for each model."""
    batch, ours = training.batch, dissect(student.config)
    step = flops.student_step(
        ours,
        batch.context,
        convention or flops.executed(ours),
        frozen_embeddings=student.frozen_embeddings,
        checkpointing=batch.checkpointing,
    )
    each = _all(teacher)
    signal = sum(_signal(ours, one, training, convention, of=len(each)) for one in each)
    chosen = 0.0 if training.selection is None else _selection(training.selection, batch.context, convention)
    written = 0.0
    if training.generation is not None:
        made = training.generation
        written = made.per_trained * flops.generation(dissect(made.writer), made.prompt, made.generated)
    return Stages(*(value * PETA_PER_MILLION for value in (signal, step, chosen, written)))


def _signal(student: Anatomy, teacher: Teacher, training: Training, convention: Convention | None, *, of: int) -> float:
    """What one of so many teachers costs."""
    theirs, batch = dissect(teacher.config), training.batch
    found = flops.teacher_forward(theirs, batch.context, convention or flops.executed(theirs), signal=teacher.signal)
    if convention is None and training.top_k and teacher.signal in ("live", "hidden"):
        usable = batch.usable or student.vocabulary
        limit = chunk_limit(batch, usable, bytes_per_id(batch.compute.itemsize, of))
        found += flops.sweep(theirs, limit, batch.context)
    return found


def _selection(selection: Selection, context: int, convention: Convention | None) -> float:
    scored = []
    for config in (selection.teacher, selection.reference):
        anatomy = None if config is None else dissect(config)
        scored.append(
            0.0 if anatomy is None else flops.forward(anatomy, context, convention or flops.executed(anatomy))
        )
    return flops.selection(*scored, ratio=selection.ratio)
