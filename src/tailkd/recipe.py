"""Every knob of a recipe: typed, documented, with units; its models and corpora have pages of their own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, Tag

from tailkd.recipe_data import Data
from tailkd.recipe_generate import Generate
from tailkd.recipe_models import Cache, Student, Teacher, Vocabulary, WeightedTeacher
from tailkd.recipe_track import Track
from tailkd.recipe_types import (
    MADE_UP,
    ONE,
    PLAIN,
    SEVERAL,
    Count,
    Duration,
    Either,
    Fraction,
    NonNegative,
    NotNegative,
    Number,
    OneOrSeveral,
    Part,
    Positive,
    Section,
    Share,
    seconds_of,
)
from tailkd.report.record import flattened

Divergence = Literal[
    "none",
    "forward_kl",
    "reverse_kl",
    "tail_aware",
    "jensen_shannon",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
    "decoupled_kd",
    "ghost_token_kl",
]


class Hidden(Section):
    """Adds ``weight * (1 - cos)`` between hidden states of student and teacher, per token."""

    pairs: Annotated[
        Annotated[Literal["last"], Tag(PLAIN)] | Annotated[tuple[tuple[NonNegative, NonNegative], ...], Tag(MADE_UP)],
        Either,
    ] = "last"
    """The last hidden states, or pairs [student's layer, teacher's layer] counted from 0 (the embeddings)."""
    weight: NotNegative = 1.0
    """Weight of each pair."""
    project: bool = False
    """Learn a projection from the student's width to the teacher's; needed where they differ."""


class Tokens(Section):
    """Learns the tokens of each row whose loss exceeds a reference model's most; the others are only read."""

    method: Literal["excess_loss"] = "excess_loss"
    """excess_loss: the student's cross-entropy less the reference's (Rho-1)."""
    ratio: Part = 0.6
    """Share of each row's tokens that is learned."""
    reference: str
    """The reference model, of the student's tokenizer: a save_pretrained folder or a hub id."""


class ObjectiveSection(Section):
    divergence: Divergence = "tail_aware"
    """What pulls the student towards the teacher."""
    top_k: Count = 10
    """Teacher ids in the head (tail_aware, ghost_token_kl)."""
    beta: NotNegative = 2.0
    """Mean weight of the tail (tail_aware)."""
    tail_mass_floor: NotNegative = 1e-6
    """Lower bound under a row's mean tail mass; 0 is the paper (tail_aware)."""
    temperature: Positive = 1.0
    """Softens both distributions of the divergence and multiplies it by its square."""
    clm_weight: NotNegative = 1.0
    """Weight of the cross-entropy on the corpus."""
    divergence_weight: NotNegative = 1.0
    """Weight of the divergence."""
    jsd_beta: Fraction = 0.5
    """Teacher's share in the mixture (jensen_shannon)."""
    skew: Fraction = 0.1
    """Share of the distribution itself in its mixture (skew_forward_kl, skew_reverse_kl)."""
    dkd_alpha: NotNegative = 1.0
    """Weight of the label's part (decoupled_kd)."""
    dkd_beta: NotNegative = 8.0
    """Weight of the other ids' part (decoupled_kd)."""
    hidden: Hidden | None = None
    """Cosine loss on hidden states; null for none."""
    tokens: Tokens | None = None
    """Which tokens are learned; null for all."""

    def settings(self) -> dict[str, Any]:
        """The fields of `tailkd.Objective`."""
        return self.model_dump(exclude={"hidden", "tokens"})


class MatchFlops(Section):
    match_flops: str
    """Recipe file: as many tokens as cost the FLOPs of that run (by the paper's convention)."""


class Training(Section):
    tokens: Annotated[Annotated[Count, Tag(PLAIN)] | Annotated[MatchFlops, Tag(MADE_UP)], Either] | None = None
    """Budget in predicted tokens; may exceed the corpus. One of tokens, epochs, flops and hours is to be given."""
    epochs: Positive | None = None
    """Budget in passes over the rows to train on, once the corpus is prepared; several sources are one corpus."""
    flops: Positive | None = None
    """Budget in FLOPs of teacher and student (by the paper's convention)."""
    hours: Positive | None = None
    """Budget in hours on the `hardware` that is stated."""
    batch_size: Count = 128
    """Rows of the global batch."""
    micro_batch_size: Count = 4
    """Rows in one forward pass; changes memory, not the result."""
    learning_rate: Positive = 1e-4
    """Peak of the schedule."""
    warmup_fraction: Fraction = 0.02
    """Share of the steps with linear warm-up."""
    final_fraction: Fraction = 0.1
    """Where the cosine ends, as a share of the peak."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """AdamW's moments."""
    weight_decay: NotNegative = 0.1
    """On matrices only."""
    clip_norm: Positive = 1.0
    """Bound of the gradient norm."""
    seed: Annotated[int, Field(ge=0, lt=2**63), Number] = 0
    """Order of the data and random numbers."""
    save_every_tokens: Count | None = None
    """Checkpoint interval; null only at the end."""
    stop_after: Duration | None = None
    """Save and exit with code 75 after this time (such as 11h30m), before a scheduler ends the job."""
    auto_microbatch: bool = False
    """Where memory runs out, halve the micro-batch and repeat the same global batch (on one process)."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """Many processes: a copy of the student in each (ddp), or its parts (fsdp); auto goes by its size."""

    @property
    def stop_after_seconds(self) -> float | None:
        return None if self.stop_after is None else seconds_of(self.stop_after)

    keep_checkpoints: Count = 2
    """Checkpoints kept."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of the products; master parameters are float32. auto is bfloat16 on GPUs that have it, else float32."""


class Evaluate(Section):
    every_tokens: Count | None = None
    """Interval of held-out evaluation during training; null only at the end."""
    tokens: Count | None = 200_000
    """Held-out positions evaluated; null for all."""
    batch_size: Count = 8
    """Rows in one forward pass."""
    top_k: Count = 10
    """Where the held-out KL is split into head and tail; one number for all runs of a comparison."""


class Hardware(Section):
    """What the bill is made out for; changes nothing of what is trained, except where a budget is in hours."""

    peak_flops: Positive | None = None
    """FLOPs per second of one device's matrix products (an H100 in bfloat16: 989e12)."""
    utilisation: Annotated[float, Field(gt=0, le=1), Number] = 0.4
    """Share of the peak that training reaches."""
    devices: Count = 1
    """How many work at once."""
    price_per_hour: NotNegative | None = None
    """Of one device, in whatever currency."""


class Recipe(Section):
    name: str = "run"
    """Shown in reports."""
    out: str | None = None
    """Run folder; null is runs/NAME."""
    teacher: Annotated[
        Annotated[Teacher | None, Tag(ONE)] | Annotated[tuple[WeightedTeacher, ...], Tag(SEVERAL)], OneOrSeveral
    ]
    """null only with divergence none; a list of several with their weights is a mixture of distributions."""
    student: Student
    vocabulary: Vocabulary = Vocabulary()
    data: Data
    objective: ObjectiveSection = ObjectiveSection()
    training: Training
    evaluate: Evaluate = Evaluate()
    hardware: Hardware = Hardware()
    track: Track = Track()
    """Tools that show the run while it trains."""
    generate: Generate | None = None
    """Text for the teacher to write; null for none."""
    cache: Cache | None = None
    """The teacher to be written down; null for none."""

    @property
    def teachers(self) -> dict[str, Teacher]:
        """All teachers that are models: ``teacher``, or ``teacher.0``, ``teacher.1`` of a list; empty without one."""
        if isinstance(self.teacher, tuple):
            return {f"teacher.{place}": one for place, one in enumerate(self.teacher)}
        return {} if self.teacher is None or self.teacher.cache_alone else {"teacher": self.teacher}

    @property
    def written_teacher(self) -> Path | None:
        """The folder in which training reads the teacher, `teacher.cache`."""
        path = self.teacher.cache if isinstance(self.teacher, Teacher) else None
        return None if path is None else Path(path).expanduser()

    @property
    def one_teacher(self) -> Teacher | None:
        """The teacher, where there is one alone."""
        return self.teachers.get("teacher")

    @property
    def folder(self) -> Path:
        return Path(self.out or f"runs/{self.name}")

    @property
    def steps(self) -> int:
        return -(-self.tokens // (self.training.batch_size * self.data.context))

    @property
    def tokens(self) -> int:
        """The budget in tokens, once `bill.settled` has made one of what was given."""
        assert isinstance(self.training.tokens, int), "the budget is not settled"
        return self.training.tokens

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, without those that this objective or corpus does not read."""
        values = self.model_dump(mode="json")
        unread = [k for k, readers in READERS.items() if self.objective.divergence not in readers]
        values["objective"] = {k: v for k, v in values["objective"].items() if k not in unread}
        data = values["data"]
        trained = data["train"] if isinstance(data["train"], list) else [data["train"]]
        for corpus in (*trained, data["heldout"], *(data["overlap"] or {"sets": ()})["sets"]):
            if corpus["prompt"] or corpus["messages"]:
                del corpus["text"]
        return values

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with the one it goes on from, flat by dotted key."""
        flat = flattened(self.resolved())
        unread = (*COSMETIC, *OPTIMISER)
        return {key: value for key, value in flat.items() if not re.sub(r"\.\d+\.", ".", key).startswith(unread)}

    def optimiser(self) -> dict[str, Any]:
        """What may change when a run goes on: the new values apply from there, flat by dotted key."""
        flat = flattened(self.resolved())
        return {key: value for key, value in flat.items() if key.startswith(OPTIMISER)}


COSMETIC = (
    "name",
    "out",
    "teacher.sharded",
    "data.store",
    "data.max_bad",
    "data.processes",
    "training.micro_batch_size",
    "training.save_every_tokens",
    "training.keep_checkpoints",
    "training.stop_after",
    "training.auto_microbatch",
    "training.strategy",
    "evaluate.",
    "hardware.",
    "track.",
    "generate",
    "cache",
)
"""Keys that change nothing of what is trained."""

OPTIMISER = (
    "training.learning_rate",
    "training.warmup_fraction",
    "training.final_fraction",
    "training.betas",
    "training.weight_decay",
    "training.clip_norm",
)
"""Keys of the update and its schedule."""

READERS = {
    "top_k": ("tail_aware", "ghost_token_kl"),
    "beta": ("tail_aware",),
    "tail_mass_floor": ("tail_aware",),
    "jsd_beta": ("jensen_shannon",),
    "skew": ("skew_forward_kl", "skew_reverse_kl"),
    "dkd_alpha": ("decoupled_kd",),
    "dkd_beta": ("decoupled_kd",),
}
"""Objective keys that only some divergences read."""
