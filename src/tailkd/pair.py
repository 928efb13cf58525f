"""Teacher and student of a recipe: configurations, the vocabulary they share, models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tailkd import folder
from tailkd.errors import Refusal
from tailkd.ledger.parameters import Parameters, count
from tailkd.models import load, precision, vocabulary
from tailkd.models.shrink import Cut, cut_student, freeze_embeddings, student_config
from tailkd.recipe import Recipe
from tailkd.recipe_models import FromTeacher, Model
from tailkd.recipe_models import Teacher as TeacherSection


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer that both models share, the ids they share, and the token that begins a row."""

    tokenizer: Any
    usable: int
    begin: int | None


# ----- configurations


def teacher_config(recipe: Recipe) -> Any | None:
    """The teacher's configuration; None without a teacher."""
    teacher = recipe.teacher
    if teacher is None:
        return None
    if teacher.config is not None:
        return load.load_config("teacher", str(_config_folder(teacher.config)))
    return _config("teacher", teacher)


def _config_folder(path: str) -> Path:
    found = Path(path).expanduser()
    return found.parent if found.name == "config.json" else found


def configurations(recipe: Recipe) -> tuple[Any | None, Any]:
    """Those of teacher (None without one) and student; no weights are read."""
    teacher = teacher_config(recipe)
    if recipe.student.from_teacher is None:
        return teacher, _config("student", recipe.student)
    assert teacher is not None
    return teacher, student_config(teacher, cut_of(recipe.student.from_teacher))


def cut_of(section: FromTeacher) -> Cut:
    """A recipe's `student.from_teacher` as `models.shrink` takes it."""
    return Cut(**section.model_dump(exclude={"freeze_embeddings"}))


def _config(role: str, model: Model) -> Any:
    return load.load_config(role, _name(role, model), **_options(model))


def _options(model: Model) -> dict[str, Any]:
    options: dict[str, Any] = {"revision": model.revision, "remote_code": model.remote_code}
    if isinstance(model, TeacherSection) and model.gguf_file:
        options["gguf_file"] = model.gguf_file
    return options


def _name(role: str, model: Model) -> str:
    if model.model is None:
        raise Refusal(f"{role}.model is null, and this needs its weights or tokenizer; give a folder or a hub id")
    return model.model


# ----- vocabulary


def read_vocabulary(recipe: Recipe) -> Vocabulary:
    """Tokenizers and configurations alone: the proof that teacher and student speak of the same ids."""
    own = None if recipe.student.model is None else _tokenizer("student", recipe.student)
    teacher_rows, student_rows = (
        None if config is None else _vocabulary_rows(config) for config in configurations(recipe)
    )
    assert student_rows is not None
    if recipe.teacher is None or teacher_rows is None:
        if own is None:
            raise Refusal(f"student.model: {recipe.student.model!r} holds no tokenizer; save one into it")
        usable = vocabulary.tokenizer_usable_ids(own, student_rows)
        return Vocabulary(own, usable, _begin_token(recipe, own))
    teachers = _tokenizer("teacher", recipe.teacher)
    tokenizer = own or teachers
    if tokenizer is None:
        raise Refusal("neither the teacher's nor the student's folder holds a tokenizer; save one into either")
    usable = vocabulary.usable_ids(teachers or tokenizer, tokenizer, teacher_rows, student_rows)
    vocabulary.check_fold(recipe.vocabulary.fold, usable, teacher_rows)
    return Vocabulary(tokenizer, usable, _begin_token(recipe, tokenizer))


def _tokenizer(role: str, model: Model) -> Any | None:
    return load.load_tokenizer(role, _name(role, model), **_options(model))


def _vocabulary_rows(config: Any) -> int:
    return config.get_text_config().vocab_size


def _begin_token(recipe: Recipe, tokenizer: Any) -> int | None:
    begin = tokenizer.bos_token_id
    if recipe.data.bos == "never":
        return None
    if recipe.data.bos == "always":
        if begin is None:
            raise Refusal(
                "data.bos is 'always' but the tokenizer has no begin token (bos_token); take 'auto' or 'never'"
            )
        return begin
    ids = tokenizer("a")["input_ids"]
    return begin if begin is not None and ids and ids[0] == begin else None


# ----- models


GPU_ATTENTION = ("flash_attention_2",)


def refuse_device(recipe: Recipe, device: torch.device) -> None:
    """Refuse what this device cannot run, before a model is loaded."""
    for role, model in (("teacher", recipe.teacher), ("student", recipe.student)):
        if model is not None and model.attention in GPU_ATTENTION and device.type != "cuda":
            raise Refusal(f"{role}.attention is {model.attention!r}, which needs a GPU; take 'auto' here")


def load_teacher(recipe: Recipe, device: torch.device) -> Any | None:
    """The teacher's model in its precision; None without a teacher."""
    teacher = recipe.teacher
    if teacher is None:
        return None
    products = precision.resolve(recipe.training.precision, device)
    return load.load_model(
        "teacher",
        _name("teacher", teacher),
        dtype=products if teacher.dtype == "auto" else getattr(torch, teacher.dtype),
        device=device,
        attention=teacher.attention,
        **_options(teacher),
    )


def load_student(recipe: Recipe, teacher: Any | None, device: torch.device, folder: str | None = None) -> Any:
    """The student's model in float32: from a `folder` or the recipe's, or cut out of the teacher's model."""
    student, made = recipe.student, recipe.student.from_teacher
    torch.manual_seed(recipe.training.seed)
    if made is not None and folder is None:
        assert teacher is not None
        made_model: Any = cut_student(teacher, cut_of(made))
        model = made_model.to(device)
    else:
        options = {} if folder else _options(student)
        name = folder or _name("student", student)
        model = load.load_model(
            "student", name, dtype=torch.float32, device=device, attention=student.attention, **options
        )
    if made is not None and made.freeze_embeddings:
        freeze_embeddings(model)
    return model


# ----- the student alone


def shrink(recipe: Recipe, out: Path) -> Parameters:
    """Write the student of `student.from_teacher` and its tokenizer, as the recipe's run would start from them.

    The teacher is loaded on the CPU, in float32 unless `teacher.dtype` or `training.precision` say otherwise.

    Returns:
        How many parameters the student has.

    Raises:
        Refusal: a recipe without `student.from_teacher`, a folder that is not new or empty.
    """
    made = recipe.student.from_teacher
    if made is None:
        raise Refusal("the recipe has no student.from_teacher, so there is no student to be cut out of its teacher")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Refusal(f"{out} is there already and not an empty folder; give another --out")
    folder.refuse_unwritable(out)
    device = torch.device("cpu")
    shared = read_vocabulary(recipe)
    student = load_student(recipe, load_teacher(recipe, device), device)
    student.save_pretrained(out)
    shared.tokenizer.save_pretrained(out)
    return count(student.config, frozen_embeddings=made.freeze_embeddings)
