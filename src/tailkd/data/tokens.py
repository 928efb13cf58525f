"""Documents -> token ids on disk, memory-mapped, with a manifest that says what they were made of.

A store is a folder: `tokens.bin` (ids of all documents one after the other, an end token after each that was not cut
off), `offsets.bin` (int64 document borders), `hashes.bin` (uint64 content hashes), where only answers are learned
`loss.bin` (uint8, 1 where a token is learned), with an overlap check `overlap.bin` (uint8, 1 where a document shares
words with an evaluation set), and `manifest.json`, with the size and hash of each.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from tailkd.data import chat
from tailkd.data.chat import Encoded
from tailkd.data.corpus import Source
from tailkd.data.encoding import dtype_of, worker
from tailkd.data.files import BadRecords, Hashes, file_hash
from tailkd.data.overlap import Overlap
from tailkd.data.writing import PROGRESS, Encode, Progress, alone, cores, write, write_lasting
from tailkd.errors import DataError, Refusal

FORMAT = 2


@dataclass(frozen=True)
class TokenStore:
    """An opened store; nothing is read before it is asked for."""

    folder: Path
    manifest: dict[str, Any]

    @cached_property
    def tokens(self) -> np.ndarray:
        return np.memmap(self.folder / "tokens.bin", dtype=self.manifest["dtype"], mode="r")

    @cached_property
    def offsets(self) -> np.ndarray:
        """int64 (documents + 1,): document d is ``tokens[offsets[d]:offsets[d + 1]]``."""
        return np.memmap(self.folder / "offsets.bin", dtype=np.int64, mode="r")

    @cached_property
    def loss(self) -> np.ndarray | None:
        """uint8 (tokens,): 1 where a token is learned; None where every token is."""
        if "loss.bin" not in self.manifest["files"]:
            return None
        return np.memmap(self.folder / "loss.bin", dtype=np.uint8, mode="r")

    @cached_property
    def hashes(self) -> np.ndarray:
        """uint64 (documents,): content hash of each document's text."""
        return np.memmap(self.folder / "hashes.bin", dtype=np.uint64, mode="r")

    @cached_property
    def overlaps(self) -> np.ndarray:
        """bool (documents,): whether a document shares words with an evaluation set; none where it was not asked."""
        if "overlap.bin" not in self.manifest["files"]:
            return np.zeros(len(self), dtype=bool)
        return np.memmap(self.folder / "overlap.bin", dtype=np.bool_, mode="r")

    def __len__(self) -> int:
        return self.manifest["documents"]

    @property
    def hash(self) -> str:
        """Of the manifest, and so of all that the store holds and was made of."""
        return file_hash(self.folder / MANIFEST)

    def verify(self) -> None:
        """Read every file and compare its hash. Raises: Refusal where one differs."""
        for name, expected in self.manifest["files"].items():
            if file_hash(self.folder / name) != expected["hash"]:
                raise Refusal(f"{self.folder / name} is damaged: {_ANEW}")


MANIFEST = "manifest.json"
_ANEW = "delete the folder, and the same command makes it anew"


@dataclass(frozen=True)
class Options:
    """limit: stop before the document with which there would be more tokens. overlap: mark documents that share words
    with these. processes: that tokenise; None is one per core. The first two are part of what a store is made of.
    """

    limit: int | None = None
    overlap: Overlap | None = None
    processes: int | None = None

    @property
    def made_of(self) -> dict[str, Any]:
        limit = {} if self.limit is None else {"limit": self.limit}
        return limit if self.overlap is None else {**limit, "overlap": self.overlap.made_of}


def fingerprint(source: Source, tokenizer: Any, usable: int, hashes: Hashes | None = None) -> dict[str, Any]:
    """Everything the ids and the loss mask depend on, but for the options."""
    made_of = {
        "format": FORMAT,
        "source": source.fingerprint(hashes),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "end_token": tokenizer.eos_token_id,
        "usable": usable,
    }
    if "text" in source.fields:
        return made_of
    return {**made_of, "rules": chat.RULES, "chat": chat.chat_template(tokenizer) if source.is_chat else None}


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of what turns text into ids: the whole fast tokenizer, or for a slow one its vocabulary and class."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return xxhash.xxh3_128_hexdigest(f"{type(tokenizer).__name__}\n{rules}".encode("utf-8", "surrogatepass"))


def prepare(
    source: Source,
    tokenizer: Any,
    folder: Path,
    *,
    usable: int,
    max_bad: float,
    say: Callable[[str], None],
    options: Options | None = None,
) -> TokenStore:
    """The store of `source` under `tokenizer` inside `folder`; made once, then opened.

    Killed at any moment and called again, it goes on where it was and ends with the same bytes; so it does with another
    number of processes.

    Args:
        folder: parent folder; the store's own name is its fingerprint.
        usable: ids from here on are outside the shared vocabulary and refused by name.
        max_bad: share of records that may be unusable (skipped and counted) before the corpus is refused.

    Raises:
        Refusal: an empty corpus, too many bad records, an id outside the usable range, no end token; a damaged store.
        DataError: the disk took nothing more, or a process was killed; what is done stands.
    """
    if tokenizer.eos_token_id is None:
        raise Refusal("the tokenizer has no end token (eos_token); documents could not be told apart: set one")
    options = options or Options()
    made_of = {**fingerprint(source, tokenizer, usable, Hashes(folder)), **options.made_of}
    target = folder / xxhash.xxh3_128_hexdigest(json.dumps(made_of, sort_keys=True).encode())
    if target.is_dir():
        return open_store(target, made_of)
    partial = target.with_name(f".{target.name}-partial")
    first_new = next((p for p in [*reversed(partial.parents), partial] if not p.exists()), partial)
    try:
        with alone(partial, say):
            try:
                if not target.is_dir():
                    work = worker(tokenizer, usable, options.overlap)
                    written = _write(source, work, partial, options, max_bad, say)
                    manifest = {**written, "dtype": dtype_of(usable).name, "made_of": made_of}
                    write_lasting(partial / MANIFEST, json.dumps(manifest, indent=1))
                    partial.replace(target)
            except Refusal:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    except OSError as error:
        raise DataError(
            f"preparing tokens in {folder} stopped ({error}); what is done stands: run the same command again"
        ) from error
    finally:
        _without_empty(first_new, partial)
    return open_store(target, made_of)


def _without_empty(first_new: Path, partial: Path) -> None:
    """Folders that were made for nothing go."""
    for path in (partial, first_new):
        if path.is_dir() and not any(p.is_file() for p in path.rglob("*")):
            shutil.rmtree(path, ignore_errors=True)


def open_store(folder: Path, made_of: dict[str, Any]) -> TokenStore:
    """The store in `folder`, if it was made of exactly this and its files are there; reads the manifest alone."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise Refusal(f"{folder / MANIFEST} is damaged ({error}): {_ANEW}") from error
    if manifest["made_of"] != json.loads(json.dumps(made_of)):
        raise Refusal(
            f"{folder} holds tokens of another corpus, tokenizer or setting; delete the folder to make it anew"
        )
    for name, expected in manifest["files"].items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else None
        if size != expected["bytes"]:
            came = "missing" if size is None else f"{size:,} bytes long"
            raise Refusal(f"{folder / name} is {came}, expected {expected['bytes']:,} bytes: {_ANEW}")
    return TokenStore(folder, manifest)


def _write(
    source: Source, work: Encode, folder: Path, options: Options, max_bad: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """Write the store's files and tell of them."""
    processes = options.processes or cores()
    done, bad = write(source.documents, work, folder, limit=options.limit, processes=processes, say=say)
    if options.limit is not None and not done.documents and not bad.total:
        raise Refusal(
            f"{source.path or source.hub}: its first document alone has more than tokens = {options.limit:,}; give more"
        )
    refuse_bad(bad, done.documents, max_bad, source)
    (folder / PROGRESS).unlink()
    return {**_made(folder, done), "skipped": bad.counts, "skipped_named": bad.named}


def _made(folder: Path, done: Progress) -> dict[str, Any]:
    files = {name: {"bytes": size, "hash": file_hash(folder / name)} for name, size in sorted(done.files.items())}
    return {"format": FORMAT, "documents": done.documents, "tokens": done.tokens, **done.totals, "files": files}


def held(documents: Sequence[Encoded]) -> TokenStore:
    """Documents as a store that lies in memory alone, without hashes."""
    offsets = np.cumsum([0, *(len(document.ids) for document in documents)])
    masks = [document.loss for document in documents if document.loss is not None]
    store = TokenStore(Path(), {"documents": len(documents)})
    vars(store).update(  # what would be read from files
        tokens=np.asarray([token for document in documents for token in document.ids], dtype=np.int64),
        offsets=offsets,
        loss=np.asarray([one for mask in masks for one in mask], dtype=np.uint8) if masks else None,
    )
    return store


def refuse_bad(bad: BadRecords, good: int, max_bad: float, source: Source) -> None:
    name = source.path or source.hub
    reasons = ", ".join(f"{count:,} x {reason}" for reason, count in bad.counts.items())
    shown = "".join(f"\n  {line}" for line in bad.named)
    if good == 0:
        why = f"; {bad.total:,} records were unusable ({reasons}):{shown}" if bad.total else " (no records)"
        raise Refusal(f"{name}: the corpus is empty{why}")
    share = bad.total / (bad.total + good)
    if share > max_bad:
        raise Refusal(
            f"{name}: {bad.total:,} of {bad.total + good:,} records are unusable ({reasons}), {share:.2%} and more "
            f"than data.max_bad = {max_bad:.2%} allows:{shown}"
        )
