"""A finished student ready for others: what would go, into a folder of its own, or to the hub."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailkd.errors import DataError, Refusal
from tailkd.report.card import card
from tailkd.report.origins import ID
from tailkd.report.record import Run
from tailkd.secrets import without_secrets

CARD = "README.md"
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
TEXTS = re.compile(
    r"(config|generation_config|tokenizer_config|special_tokens_map|added_tokens)\.json|chat_template\.jinja|.*\.py"
)
VOCABULARY = re.compile(r"tokenizer\.(json|model)|vocab\.(json|txt)|merges\.txt|spiece\.model")


@dataclass(frozen=True)
class Export:
    """A student's card, the files that go beside it, and the names of what lies in its folder and stays."""

    card: str
    files: tuple[Path, ...]
    left: tuple[str, ...]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes by name."""
        return {CARD: len(self.card.encode()), **{path.name: path.stat().st_size for path in self.files}}


def prepared(run: Run, repository: str | None = None) -> Export:
    """What of a run goes to others; its card is written anew, with all that has been measured.

    Args:
        repository: its id on the hub, where it goes there.

    Raises:
        Refusal: the run is not finished, or something that goes would tell a secret or a path of this machine.
    """
    if not run.finished:
        raise Refusal(f"{run.folder} holds no finished run: run `tailkd distill` on its recipe to the end")
    found = sorted(path for path in run.student.glob("*") if path.name != CARD)
    goes = [path for path in found if path.is_file() and _known(path.name)]
    missing = [what for what, form in (("weights", WEIGHTS), ("configuration", TEXTS)) if not _any(form, goes)]
    if missing:
        raise Refusal(f"{run.student} holds no {' and no '.join(missing)}: run `tailkd distill` on its recipe again")
    for path in goes:
        _refuse_secret(path)
    _refuse_paths(run)
    return Export(card(run, repository), tuple(goes), tuple(path.name for path in found if path not in goes))


def _known(name: str) -> bool:
    return any(form.fullmatch(name) for form in (WEIGHTS, TEXTS, VOCABULARY))


def _any(form: re.Pattern[str], paths: list[Path]) -> bool:
    return any(form.fullmatch(path.name) for path in paths)


def _refuse_secret(path: Path) -> None:
    """Vocabularies are not looked at: among 100,000 words of a language some look like anything."""
    if TEXTS.fullmatch(path.name):
        text = path.read_text("utf-8", errors="replace")
        if without_secrets(text) != text:
            raise Refusal(f"{path} holds what looks like a secret (a token, a password); take it out and export again")


def _refuse_paths(run: Run) -> None:
    """The card's metadata name what lies on the hub, and nothing else."""
    for one in (*run.origins["models"].values(), *run.origins["data"]):
        name = one["hub"]
        if name is not None and not ID.fullmatch(name):
            raise Refusal(f"{run.folder / 'origins.json'} has hub {name!r}, which is no id there but a path; set null")


# ----- a folder


def refuse_folder(to: Path) -> None:
    """Refuse what is not new or empty."""
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise Refusal(f"{to} is there already and not an empty folder; give another --to")


def into_folder(export: Export, to: Path) -> None:
    """Copy everything into `to`, which appears when it is whole.

    Raises:
        Refusal: `to` is not new or empty, or cannot be made.
        DataError: the disk does not take it; nothing is left there.
    """
    refuse_folder(to)
    staged = to.absolute().with_name(f".{to.absolute().name}.{os.getpid()}.partial")
    try:
        staged.mkdir(parents=True)
    except OSError as error:
        raise Refusal(f"{to} cannot be made ({error.strerror}); give another --to") from error
    try:
        (staged / CARD).write_text(export.card, encoding="utf-8")
        for path in export.files:
            shutil.copyfile(path, staged / path.name)
        staged.rename(to)
    except OSError as error:
        raise DataError(
            f"{to} cannot be written ({error.strerror}); nothing is left there: make room and repeat"
        ) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


# ----- the hub


def refuse_repository(repository: str) -> None:
    """Refuse what is no ORG/NAME."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise Refusal(f"--push {repository!r} is no id on the hub ({error}); give ORG/NAME") from error
    if "/" not in repository:
        raise Refusal(f"--push {repository!r} names no owner; give ORG/NAME")


def push(export: Export, repository: str, *, public: bool = False) -> str:
    """Upload everything as one commit, which is there whole or not at all; the repository is made where there is none.

    Returns:
        The address of the commit.

    Raises:
        Refusal: no token, one that may not, no connection, or a repository that is seen by more or by fewer people.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    refuse_repository(repository)
    if get_token() is None:
        raise Refusal("no token of the hub: `hf auth login`, or set HF_TOKEN to one that may write")
    api = HfApi(library_name="tailkd")
    with _refusals(repository):
        api.create_repo(repository, private=not public, exist_ok=True)
        _refuse_other_readers(repository, bool(api.model_info(repository).private), public)
        files: list[Any] = [CommitOperationAdd(path.name, path) for path in export.files]
        operations = [CommitOperationAdd(CARD, export.card.encode()), *files]
        return api.create_commit(repository, operations, commit_message="Student and card, by tailkd export").commit_url


def _refuse_other_readers(repository: str, private: bool, public: bool) -> None:
    """A repository that was there before keeps who sees it, whatever was asked when it was to be made."""
    if private == public:
        now, option = ("private", "--private") if private else ("public", "--public")
        raise Refusal(
            f"{repository} is there already and {now}; push with {option}, change it on the hub, or give another name"
        )


@contextmanager
def _refusals(repository: str) -> Iterator[None]:
    """What the hub and the way to it may answer, with what to do; nothing of a commit is there before all of it is."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # pyright: ignore[reportPrivateImportUsage]

    remedies = {
        401: "the hub does not know this token: `hf auth login` with one that may write",
        403: f"this token may not write to {repository}: give another owner, or a token with that right",
    }
    try:
        yield
    except HfHubHTTPError as error:
        code = error.response.status_code
        remedy = remedies.get(code, "nothing was uploaded; look at the message and repeat the same command")
        raise Refusal(f"--push {repository}: answer {code} of the hub: {remedy} ({_line(error)})") from error
    except (HTTPError, OSError, RuntimeError) as error:
        raise Refusal(
            f"--push {repository}: the hub cannot be reached ({_line(error)}); nothing was uploaded: repeat the same "
            "command when there is a connection, or export with --to and upload the folder"
        ) from error


def _line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
