"""Teachers and student of a recipe: configurations, the vocabulary they share, models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from tailkd import folder
from tailkd.data.tokens import tokenizer_fingerprint
from tailkd.errors import Refusal
from tailkd.ledger.parameters import Parameters, count
from tailkd.models import load, precision, vocabulary
from tailkd.models.shrink import Cut, cut_student, freeze_embeddings, student_config
from tailkd.recipe import Recipe
from tailkd.recipe_models import FromTeacher, Model, Student
from tailkd.recipe_models import Teacher as TeacherSection
from tailkd.recipe_rules import unfinished
from tailkd.report.record import Run
from tailkd.teacher.cache import Manifest
from tailkd.train.commit import measure


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer that all models share, the ids they share, and the token that begins a row."""

    tokenizer: Any
    usable: int
    begin: int | None


# ----- configurations


def teacher_configs(recipe: Recipe) -> dict[str, Any]:
    """Every teacher's configuration by its key, see `Recipe.teachers`."""
    return {
        key: _config(key, teacher)
        if teacher.config is None
        else load.load_config(key, str(_config_folder(teacher.config)))
        for key, teacher in recipe.teachers.items()
    }


def _config_folder(path: str) -> Path:
    found = Path(path).expanduser()
    return found.parent if found.name == "config.json" else found


def configurations(recipe: Recipe) -> tuple[dict[str, Any], Any]:
    """Those of the teachers by their keys, and of the student; no weights are read."""
    teachers = teacher_configs(recipe)
    if recipe.student.from_teacher is None:
        return teachers, _config("student", recipe.student)
    return teachers, student_config(teachers["teacher"], cut_of(recipe.student.from_teacher))


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
    if isinstance(model, Student) and model.run is not None:
        return str(_earlier(model.run).student)
    if model.model is None:
        raise Refusal(f"{role}.model is null, and this needs its weights or tokenizer; give a folder or a hub id")
    return model.model


def _earlier(folder: str) -> Run:
    """The finished run whose student goes on."""
    earlier = Run(Path(folder).expanduser())
    problem = unfinished(earlier)
    if problem is not None:
        raise Refusal(f"student.run: {problem}")
    return earlier


# ----- vocabulary


def read_vocabulary(recipe: Recipe) -> Vocabulary:
    """Tokenizers and configurations alone: the proof that every teacher and the student speak of the same ids."""
    student = recipe.student
    own = None if student.from_teacher is not None else _tokenizer("student", student)
    configs, config = configurations(recipe)
    student_rows = _vocabulary_rows(config)
    if not configs:
        if own is None:
            raise Refusal(f"student.model: {_name('student', student)!r} holds no tokenizer; save one into it")
        usable = vocabulary.tokenizer_usable_ids(own, student_rows)
        if recipe.written_teacher is not None:
            _refuse_other_vocabulary(recipe.written_teacher, own, usable)
        return Vocabulary(own, usable, begin_token(own, recipe.data.bos))
    theirs = {key: _tokenizer(key, teacher) for key, teacher in recipe.teachers.items()}
    tokenizer = own or next((one for one in theirs.values() if one is not None), None)
    if tokenizer is None:
        raise Refusal("neither the teacher's nor the student's folder holds a tokenizer; save one into either")
    rows = {key: _vocabulary_rows(config) for key, config in configs.items()}
    usable = min(
        vocabulary.usable_ids(theirs[key] or tokenizer, tokenizer, rows[key], student_rows, teacher=_told(recipe, key))
        for key in configs
    )
    for key in configs:
        vocabulary.check_fold(recipe.vocabulary.fold, usable, rows[key], teacher=_told(recipe, key))
    return Vocabulary(tokenizer, usable, begin_token(tokenizer, recipe.data.bos))


def _refuse_other_vocabulary(folder: Path, tokenizer: Any, usable: int) -> None:
    """Of a teacher that is read from its cache alone."""
    manifest = Manifest.read(folder)
    if manifest.made_of["tokenizer"] != tokenizer_fingerprint(tokenizer):
        raise Refusal(
            f"teacher.cache: {folder} was written with another tokenizer than the student's; take a student of that "
            "tokenizer, or write another cache with `tailkd cache`"
        )
    if manifest.payload.usable != usable:
        raise Refusal(
            f"teacher.cache: {folder} is over {manifest.payload.usable:,} ids, and the student has {usable:,} of this "
            "tokenizer; write another cache with `tailkd cache` and this student"
        )


def _told(recipe: Recipe, key: str) -> str:
    """A teacher in a message: which of several it is."""
    return "teacher" if key == "teacher" else f"{key} ({recipe.teachers[key].model})"


def _tokenizer(role: str, model: Model) -> Any | None:
    return load.load_tokenizer(role, _name(role, model), **_options(model))


def _vocabulary_rows(config: Any) -> int:
    return config.get_text_config().vocab_size


def begin_token(tokenizer: Any, rule: str = "auto") -> int | None:
    """The token before each row by a rule of `data.bos`; auto does what the tokenizer does."""
    begin = tokenizer.bos_token_id
    if rule == "never":
        return None
    if rule == "always":
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
    for role, model in (*recipe.teachers.items(), ("student", recipe.student)):
        if model.attention in GPU_ATTENTION and device.type != "cuda":
            raise Refusal(f"{role}.attention is {model.attention!r}, which needs a GPU; take 'auto' here")


def load_teacher(recipe: Recipe, device: torch.device, key: str = "teacher") -> Any:
    """The model of one of `Recipe.teachers` in its precision."""
    teacher = recipe.teachers[key]
    products = precision.resolve(recipe.training.precision, device)
    return load.load_model(
        key,
        _name(key, teacher),
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


def fingerprints(recipe: Recipe) -> dict[str, str]:
    """What each teacher's weights are, by its key: the content of its files, or the commit behind a hub id."""
    return {
        key: load.fingerprint(key, _name(key, one), revision=one.revision, gguf_file=one.gguf_file)
        for key, one in recipe.teachers.items()
    }


def content_of_run(recipe: Recipe) -> dict[str, str]:
    """What `student.run` gave, as a resumed run must share it: a hash of its weights; empty without one."""
    if recipe.student.run is None:
        return {}
    digest = xxhash.xxh3_128()
    for path in sorted(_earlier(recipe.student.run).student.glob("*.safetensors")):
        digest.update(measure(path.resolve()).xxh3_128.encode())
    return {"student.run (content)": digest.hexdigest()}


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
