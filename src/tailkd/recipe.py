"""Every knob on one page: typed, documented, with units; and which choices do not go together."""

from __future__ import annotations

import glob
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from tailkd.report.record import flattened


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


def _no_truth_value(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number")
    return value


Number = BeforeValidator(_no_truth_value)
Positive = Annotated[float, Field(gt=0), Number]
NotNegative = Annotated[float, Field(ge=0), Number]
Fraction = Annotated[float, Field(ge=0, le=1), Number]
Share = Annotated[float, Field(gt=0, lt=1), Number]
Count = Annotated[int, Field(ge=1), Number]


def seconds_of(duration: str) -> float:
    """``"11h30m"`` as 41400.0: days, hours, minutes, seconds, in this order, each with its letter."""
    found = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", duration)
    total = (
        sum(int(n or 0) * size for n, size in zip(found.groups(), (86_400, 3_600, 60, 1), strict=True)) if found else 0
    )
    if not total:
        raise ValueError(f"{duration!r} is no duration; expected one such as 11h30m, 45m or 90s")
    return float(total)


def _duration(value: Any) -> str:
    seconds_of(str(value))
    return str(value)


Duration = Annotated[str, BeforeValidator(_duration)]
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


class Model(Section):
    model: str
    """Folder written by save_pretrained, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    remote_code: bool = False
    """Run code from the model's repository; needs a 40-digit commit hash as `revision`."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = "auto"
    """Attention implementation of transformers."""


class Teacher(Model):
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the teacher's weights; auto is that of the run's products."""
    sharded: bool = False
    """On many processes: its weights split among them, instead of a copy in each."""


class Student(Model):
    pass


class Source(Section):
    path: str | None = None
    """A file (JSONL, parquet, text; .gz too), a folder of such files, or a glob."""
    hub: str | None = None
    """A data set id on the hub, instead of `path`."""
    config: str | None = None
    """Configuration of the hub data set."""
    split: str = "train"
    """Split of the hub data set."""
    revision: str | None = None
    """Revision of the hub data set."""
    text: str = "text"
    """The field that holds the text, in JSONL, parquet and hub data sets."""


class HeldOut(Source):
    fraction: Share | None = None
    """Share of the training documents held out, by content hash; instead of an own `path` or `hub`."""


class Data(Section):
    train: Source
    """The corpus."""
    heldout: HeldOut = HeldOut(fraction=0.1)
    """What is evaluated and never trained on."""
    context: Count = 2048
    """Tokens in a row."""
    bos: Literal["auto", "always", "never"] = "auto"
    """A begin token at each row's start; auto does what the tokenizer does."""
    store: str | None = None
    """Folder for prepared token files; null is ~/.cache/tailkd."""
    max_bad: Fraction = 0.001
    """Share of records that may be unusable (skipped and counted) before the corpus is refused."""


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


class Training(Section):
    tokens: Count
    """Budget in predicted tokens; may exceed the corpus (epochs)."""
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


class Recipe(Section):
    name: str = "run"
    """Shown in reports."""
    out: str | None = None
    """Run folder; null is runs/NAME."""
    teacher: Teacher | None
    """null only with divergence none."""
    student: Student
    data: Data
    objective: ObjectiveSection = ObjectiveSection()
    training: Training
    evaluate: Evaluate = Evaluate()

    @property
    def folder(self) -> Path:
        return Path(self.out or f"runs/{self.name}")

    @property
    def steps(self) -> int:
        return -(-self.training.tokens // (self.training.batch_size * self.data.context))

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, without those that this objective does not read."""
        values = self.model_dump(mode="json")
        unread = [k for k, readers in READERS.items() if self.objective.divergence not in readers]
        values["objective"] = {k: v for k, v in values["objective"].items() if k not in unread}
        return values

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with the one it goes on from, flat by dotted key."""
        flat = flattened(self.resolved())
        return {key: value for key, value in flat.items() if not key.startswith((*COSMETIC, *OPTIMISER))}

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
    "training.micro_batch_size",
    "training.save_every_tokens",
    "training.keep_checkpoints",
    "training.stop_after",
    "training.auto_microbatch",
    "training.strategy",
    "evaluate.",
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


# ----- choices that do not go together


def _unread_keys(recipe: Recipe) -> list[tuple[str, str]]:
    divergence = recipe.objective.divergence
    return [
        (f"objective.{key}", f"has no meaning for divergence {divergence!r}, only for {', '.join(readers)}; remove it")
        for key, readers in READERS.items()
        if key in recipe.objective.model_fields_set and divergence not in readers
    ]


def _teacher_needed(recipe: Recipe) -> list[tuple[str, str]]:
    if recipe.teacher is None and recipe.objective.divergence != "none":
        return [("teacher", f"divergence {recipe.objective.divergence!r} needs a teacher; null goes with 'none' alone")]
    return []


def _sources(recipe: Recipe) -> list[tuple[str, str]]:
    problems = []
    for key, source in (("data.train", recipe.data.train), ("data.heldout", recipe.data.heldout)):
        own = isinstance(source, HeldOut) and source.fraction is not None
        given = [name for name in ("path", "hub") if getattr(source, name)] + (["fraction"] if own else [])
        if len(given) != 1:
            choices = "path, hub or fraction" if isinstance(source, HeldOut) else "path or hub"
            problems.append((key, f"expected one of {choices}; came {', '.join(given) or 'none'}"))
        elif source.path and not _exists(source.path):
            problems.append((f"{key}.path", f"no file, folder or match at {source.path!r}"))
    return problems


def _exists(path: str) -> bool:
    expanded = Path(path).expanduser()
    return expanded.exists() or any(True for _ in glob.iglob(str(expanded), recursive=True))


def _model_folders(recipe: Recipe) -> list[tuple[str, str]]:
    problems = []
    for role, model in (("teacher", recipe.teacher), ("student", recipe.student)):
        if model is None:
            continue
        path = Path(model.model).expanduser()
        looks_like_path = model.model.startswith((".", "/", "~")) or model.model.count("/") > 1 or path.exists()
        if looks_like_path and not (path / "config.json").is_file():
            problems.append((f"{role}.model", f"no config.json in {model.model!r}; expected a save_pretrained folder"))
        if model.remote_code and not re.fullmatch(r"[0-9a-f]{40}", model.revision or ""):
            message = f"expected a 40-digit commit hash, since {role}.remote_code runs code; came {model.revision!r}"
            problems.append((f"{role}.revision", message))
    return problems


def _intervals(recipe: Recipe) -> list[tuple[str, str]]:
    tokens, training = recipe.training.tokens, recipe.training
    pairs = (
        ("training.save_every_tokens", training.save_every_tokens),
        ("evaluate.every_tokens", recipe.evaluate.every_tokens),
    )
    problems = [
        (key, f"{every:,} is beyond training.tokens = {tokens:,}; null means only at the end")
        for key, every in pairs
        if every is not None and every > tokens
    ]
    return problems


def _split(recipe: Recipe) -> list[tuple[str, str]]:
    fraction = recipe.data.heldout.fraction
    if fraction is not None and fraction > 0.5:
        return [("data.heldout.fraction", f"{fraction} holds out more than it trains on; expected at most 0.5")]
    return []


RULES = (_unread_keys, _teacher_needed, _sources, _model_folders, _intervals, _split)
