"""Documents -> token ids on disk, memory-mapped, with a manifest that says what they were made of.

A store is a folder: `tokens.bin` (ids of all documents one after the other, an end token after each), `offsets.bin`
(int64 document borders), `hashes.bin` (uint64 content hashes) and `manifest.json`.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from tailkd.data.corpus import BadRecords, Document, Source
from tailkd.errors import Refusal

FORMAT = 1
BATCH = 256  # documents tokenised at once


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
        return np.fromfile(self.folder / "offsets.bin", dtype=np.int64)

    @cached_property
    def hashes(self) -> np.ndarray:
        """uint64 (documents,): content hash of each document's text."""
        return np.fromfile(self.folder / "hashes.bin", dtype=np.uint64)

    def __len__(self) -> int:
        return self.manifest["documents"]


def fingerprint(source: Source, tokenizer: Any, usable: int) -> dict[str, Any]:
    """Everything the ids depend on."""
    return {
        "format": FORMAT,
        "source": source.fingerprint(),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "end_token": tokenizer.eos_token_id,
        "usable": usable,
    }


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of what turns text into ids: the whole fast tokenizer, or for a slow one its vocabulary and class."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return xxhash.xxh3_128_hexdigest(f"{type(tokenizer).__name__}\n{rules}".encode("utf-8", "surrogatepass"))


def prepare(
    source: Source, tokenizer: Any, folder: Path, *, usable: int, max_bad: float, say: Callable[[str], None]
) -> TokenStore:
    """The store of `source` under `tokenizer` inside `folder`; made once, then opened.

    Args:
        folder: parent folder; the store's own name is its fingerprint.
        usable: ids from here on are outside the shared vocabulary and refused by name.
        max_bad: share of records that may be unusable (skipped and counted) before the corpus is refused.

    Raises:
        Refusal: an empty corpus, too many bad records, an id outside the usable range, no end token.
    """
    if tokenizer.eos_token_id is None:
        raise Refusal("the tokenizer has no end token (eos_token); documents could not be told apart: set one")
    made_of = fingerprint(source, tokenizer, usable)
    target = folder / xxhash.xxh3_128_hexdigest(json.dumps(made_of, sort_keys=True).encode())
    if target.is_dir():
        return open_store(target, made_of)
    temporary = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}")
    first_new = next((p for p in [*reversed(target.parents), target] if not p.exists()), target)
    try:
        temporary.mkdir(parents=True)
        bad = BadRecords()
        manifest = _write(source.documents(bad), tokenizer, temporary, usable, say)
        refuse_bad(bad, manifest["documents"], max_bad, source)
        manifest |= {"made_of": made_of, "skipped": bad.counts, "skipped_named": bad.named}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
        temporary.replace(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if first_new.is_dir() and not any(p.is_file() for p in first_new.rglob("*")):
            shutil.rmtree(first_new, ignore_errors=True)
        raise
    return open_store(target, made_of)


def open_store(folder: Path, made_of: dict[str, Any]) -> TokenStore:
    """The store in `folder`, if it was made of exactly this."""
    manifest = json.loads((folder / "manifest.json").read_text())
    if manifest["made_of"] != json.loads(json.dumps(made_of)):
        raise Refusal(
            f"{folder} holds tokens of another corpus, tokenizer or setting; delete the folder to make it anew"
        )
    return TokenStore(folder, manifest)


def _write(
    documents: Iterator[Document], tokenizer: Any, folder: Path, usable: int, say: Callable[[str], None]
) -> dict[str, Any]:
    dtype = np.dtype(np.uint16 if usable <= 1 << 16 else np.uint32)
    offsets, hashes, content_bytes = [0], [], 0
    with (folder / "tokens.bin").open("wb") as file:
        for batch in _batches(documents):
            for document, ids in zip(batch, _encode(tokenizer, [d.text for d in batch]), strict=True):
                row = np.asarray([*ids, tokenizer.eos_token_id], dtype=np.int64)
                _refuse_unusable(row, usable, document, tokenizer)
                file.write(row.astype(dtype).tobytes())
                offsets.append(offsets[-1] + len(row))
                hashes.append(document.hash)
                content_bytes += len(document.text.encode())
            say(f"tokens: {len(hashes):,} documents, {offsets[-1]:,} tokens")
    np.asarray(offsets, dtype=np.int64).tofile(folder / "offsets.bin")
    np.asarray(hashes, dtype=np.uint64).tofile(folder / "hashes.bin")
    return {
        "format": FORMAT,
        "dtype": dtype.name,
        "documents": len(hashes),
        "tokens": offsets[-1],
        "bytes": content_bytes,
    }


def _encode(tokenizer: Any, texts: list[str]) -> Iterable[list[int]]:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    for document in documents:
        batch.append(document)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _refuse_unusable(ids: np.ndarray, usable: int, document: Document, tokenizer: Any) -> None:
    outside = ids[ids >= usable]
    if len(outside):
        first = int(outside[0])
        raise Refusal(
            f"{document.id}: token {tokenizer.convert_ids_to_tokens(first)!r} (id {first}) lies outside the {usable:,} "
            "ids that teacher and student share; take a tokenizer without it or remove it from the text"
        )


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
