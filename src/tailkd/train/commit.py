"""Folders that are whole or not there: written aside, hashed, renamed; and checked byte by byte before use.

A folder of checkpoints holds `step-N` (whole), `corrupt-step-N` (failed its check, kept for a look) and, after a save
that was killed, `.tmp-*`. Anything else, and every symbolic link, is left alone.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, NamedTuple

import xxhash

from tailkd.errors import Refusal
from tailkd.fault import at
from tailkd.train import disk

FORMAT = 2
STATE, MANIFEST = "state.json", "manifest.json"
PIECE = 4 << 20
LARGEST_JSON = 64 << 20
POINTS = (
    *(f"folder:{when}" for when in ("before", "after")),
    *(f"{file}:{when}" for file in ("shard", "state", "manifest") for when in ("before", "middle", "after")),
    *(f"rename:{when}" for when in ("before", "after")),
    *(f"rotate:{when}" for when in ("before", "middle", "after")),
)
"""Where a save can be broken by a test, in the order they are passed."""
_STEP = re.compile(r"step-(\d{9,})")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class Damaged(Exception):
    """Why a checkpoint cannot be trusted."""


class Written(NamedTuple):
    """What a file holds: bytes, and their xxh3-128 in hexadecimal digits."""

    size: int
    xxh3_128: str


# ----- writing


def stage(folder: Path, step: int, needed: int) -> Path:
    """A new hidden folder beside the checkpoints, for step `step`, if the disk has `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed:,} bytes are needed and {free:,} are free")
    at("folder:before")
    staged = folder / f".tmp-{step_name(step)}-{uuid.uuid4().hex[:8]}"
    staged.mkdir()
    at("folder:after")
    return staged


def write_file(path: Path, pieces: Iterable[Any]) -> Written:
    """Write a new file to the disk, not only to the cache; hashed from memory on the way."""
    digest, size = xxhash.xxh3_128(), 0
    kind = path.stem.split("-")[0]
    at(f"{kind}:before")
    with disk.Writer(path) as file:
        for piece in pieces:
            view = memoryview(piece)
            for start in range(0, len(view), PIECE):
                part = view[start : start + PIECE]
                digest.update(part)
                file.write(part)
            size += len(view)
            if size == len(view):
                at(f"{kind}:middle")
        at(f"{kind}:after")
        file.sync()
    return Written(size, digest.hexdigest())


def seal(staged: Path, files: dict[str, Written], state: dict[str, Any]) -> None:
    """Add state and manifest, after every file was read back and equals what was written."""
    text = json.dumps(state, indent=1).encode()
    files = {**files, STATE: write_file(staged / STATE, [text[: len(text) // 2], text[len(text) // 2 :]])}
    for name, expected in files.items():
        found = measure(staged / name, past_cache=True)
        if found != expected:
            raise OSError(errno.EIO, f"{name} reads back as {found}, expected {expected}")
    text = _manifest(FORMAT, files)
    write_file(staged / MANIFEST, [text[: len(text) // 2], text[len(text) // 2 :]])
    sync(staged)


def publish(staged: Path, step: int) -> Path:
    """Rename a sealed folder to step-N; one that stands there already steps aside until the new one does."""
    target = staged.with_name(step_name(step))
    aside = staged.with_name(f".old-{target.name}")
    if target in committed(staged.parent):
        target.rename(aside)
    elif os.path.lexists(target):
        quarantine(target)
    try:
        at("rename:before")
        staged.rename(target)
    except OSError:
        if aside.exists():
            aside.rename(target)
        raise
    at("rename:after")
    sync(target.parent)
    if aside.exists():
        drop(aside)
    return target


def rotate(published: Path, keep: int) -> None:
    """Remove all but the newest `keep`, and never the one just published, which was read back and is finite."""
    at("rotate:before")
    for old in committed(published.parent)[:-keep]:
        if old != published:
            drop(old)
    at("rotate:after")


def drop(old: Path) -> None:
    """Hidden first: a removal that is cut short leaves no half checkpoint in sight."""
    hidden = old.with_name(f".tmp-drop-{old.name.lstrip('.')}-{uuid.uuid4().hex[:8]}")
    old.rename(hidden)
    at("rotate:middle")
    shutil.rmtree(hidden)


def sync(folder: Path) -> None:
    """Names in the folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ----- finding


def step_name(step: int) -> str:
    return f"step-{step:09d}"


def step_of(folder: Path) -> int:
    found = _STEP.fullmatch(folder.name)
    assert found, folder
    return int(found[1])


def committed(folder: Path) -> list[Path]:
    """Real folders named step-N in the order of their steps: clocks and dates of files have no say."""
    return sorted(_folders(folder, lambda name: _STEP.fullmatch(name) is not None), key=step_of)


def quarantined(folder: Path) -> list[Path]:
    return _folders(folder, lambda name: name.startswith("corrupt-step-"))


def sweep(folder: Path) -> None:
    """Undo what a dead save left: hidden folders go, a checkpoint that had stepped aside comes back."""
    for left in _folders(folder, lambda name: name.startswith(".tmp-")):
        shutil.rmtree(left)
    for aside in _folders(folder, lambda name: name.startswith(".old-step-")):
        target = aside.with_name(aside.name.removeprefix(".old-"))
        if target.exists():
            drop(aside)
        else:
            aside.rename(target)


def quarantine(bad: Path) -> Path:
    """Rename to corrupt-step-N, or corrupt-step-N.2 and so on where that is taken."""
    target = bad.with_name(f"corrupt-{bad.name}")
    number = 1
    while os.path.lexists(target):
        number += 1
        target = bad.with_name(f"corrupt-{bad.name}.{number}")
    bad.rename(target)
    sync(bad.parent)
    return target


def _folders(folder: Path, wanted: Callable[[str], bool]) -> list[Path]:
    with os.scandir(folder) as entries:
        return [Path(e.path) for e in entries if wanted(e.name) and e.is_dir(follow_symlinks=False)]


# ----- checking


def verified(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint whose every byte is what its manifest says.

    Raises:
        Damaged: a file is missing, cut, changed, not listed, or not a plain file.
        Refusal: whole, but of a format that this version does not read.
    """
    try:
        files = _read_manifest(folder)
        _same_files(folder, files)
        for name, expected in files.items():
            size = (folder / name).lstat().st_size
            if size != expected.size:
                raise Damaged(f"{name} has {size:,} bytes, expected {expected.size:,}")
        for name, expected in files.items():
            if measure(folder / name) != expected:
                raise Damaged(f"{name} is not what was written")
        return _read_state(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, Refusal):
            raise
        raise Damaged(f"{type(error).__name__}: {error}") from error


def measure(path: Path, *, past_cache: bool = False) -> Written:
    """Size and hash of a plain file, from the disk itself or through the cache; a symbolic link is an error."""
    digest, size = xxhash.xxh3_128(), 0
    with _plain(path) as file:
        for part in disk.pieces(file.fileno(), past_cache=past_cache):
            digest.update(part)
            size += len(part)
    return Written(size, digest.hexdigest())


def _plain(path: Path) -> IO[bytes]:
    """Open for reading, through no symbolic link, and without waiting for the other end of a pipe."""
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")


def _manifest(written: int, files: dict[str, Written]) -> bytes:
    """The manifest's text; it carries its own hash, so there is one text for one content."""
    content = {"format": written, "files": {name: files[name]._asdict() for name in sorted(files)}}
    own = xxhash.xxh3_128_hexdigest(json.dumps(content).encode())
    return json.dumps({**content, "xxh3_128": own}, indent=1).encode()


def _read_manifest(folder: Path) -> dict[str, Written]:
    raw = _read_json(folder / MANIFEST)
    content = json.loads(raw)
    files = {name: Written(**entry) for name, entry in content["files"].items()}
    if raw != _manifest(content["format"], files):
        raise Damaged(f"{MANIFEST} does not agree with its own hash")
    if content["format"] != FORMAT:
        raise Refusal(f"{folder} has checkpoint format {content['format']}; this tailkd reads format {FORMAT}")
    for name in files:
        if not _NAME.fullmatch(name) or name == MANIFEST:
            raise Damaged(f"{MANIFEST} lists {name!r}, which is not a plain file name")
    if STATE not in files:
        raise Damaged(f"{MANIFEST} does not list {STATE}")
    return files


def _same_files(folder: Path, files: dict[str, Written]) -> None:
    with os.scandir(folder) as entries:
        plain = {entry.name: entry.is_file(follow_symlinks=False) for entry in entries}
    listed = {*files, MANIFEST}
    if missing := sorted(listed - plain.keys()):
        raise Damaged(f"{missing[0]} is missing")
    if extra := sorted(plain.keys() - listed):
        raise Damaged(f"{extra[0]!r} is not in {MANIFEST}")
    if links := sorted(name for name, is_plain in plain.items() if not is_plain):
        raise Damaged(f"{links[0]} is not a plain file")


def _read_state(folder: Path) -> dict[str, Any]:
    state = json.loads(_read_json(folder / STATE))
    if state["cursor"]["step"] != step_of(folder):
        raise Damaged(f"{STATE} is that of step {state['cursor']['step']}")
    return state


def _read_json(path: Path) -> bytes:
    with _plain(path) as file:
        raw = file.read(LARGEST_JSON + 1)
    if len(raw) > LARGEST_JSON:
        raise Damaged(f"{path.name} has more than {LARGEST_JSON:,} bytes")
    return raw
