"""Documents -> token ids on disk, memory-mapped, with a manifest that says what they were made of.

A store is a folder: `tokens.bin` (ids of all documents one after the other, an end token after each that was not cut
off), `offsets.bin` (int64 document borders), `hashes.bin` (uint64 content hashes) and `manifest.json`. Where only
answers are learned `loss.bin` says of which tokens (uint8 each: 1 learned, 0 not).
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from tailkd.data import chat
from tailkd.data.chat import Encoded
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
    def loss(self) -> np.ndarray | None:
        """uint8 (tokens,): 1 where a token is learned; None where every token is."""
        path = self.folder / "loss.bin"
        return np.memmap(path, dtype=np.uint8, mode="r") if path.is_file() else None

    @cached_property
    def hashes(self) -> np.ndarray:
        """uint64 (documents,): content hash of each document's text."""
        return np.fromfile(self.folder / "hashes.bin", dtype=np.uint64)

    def __len__(self) -> int:
        return self.manifest["documents"]


def fingerprint(source: Source, tokenizer: Any, usable: int) -> dict[str, Any]:
    """Everything the ids and the loss mask depend on."""
    made_of = {
        "format": FORMAT,
        "source": source.fingerprint(),
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
        manifest = _write(source.documents(bad), bad, tokenizer, temporary, usable, say)
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
    documents: Iterator[Document],
    bad: BadRecords,
    tokenizer: Any,
    folder: Path,
    usable: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    dtype = np.dtype(np.uint16 if usable <= 1 << 16 else np.uint32)
    offsets, hashes, content_bytes, learned, unfinished = [0], [], 0, 0, 0
    with (folder / "tokens.bin").open("wb") as file, (folder / "loss.bin").open("wb") as losses:
        for batch in _batches(documents):
            for document, encoded in zip(batch, encode(tokenizer, batch), strict=True):
                if encoded.unusable is not None:
                    bad.add(document.id, *encoded.unusable)
                    continue
                row = np.asarray(encoded.ids, dtype=np.int64)
                _refuse_unusable(row, usable, document, tokenizer)
                file.write(row.astype(dtype).tobytes())
                if encoded.loss is not None:
                    losses.write(bytes(encoded.loss))
                learned += len(row) if encoded.loss is None else sum(encoded.loss)
                offsets.append(offsets[-1] + len(row))
                hashes.append(document.hash)
                content_bytes += len(document.text.encode())
                unfinished += not document.finished
            say(f"tokens: {len(hashes):,} documents, {offsets[-1]:,} tokens")
    if not (folder / "loss.bin").stat().st_size:
        (folder / "loss.bin").unlink()
    np.asarray(offsets, dtype=np.int64).tofile(folder / "offsets.bin")
    np.asarray(hashes, dtype=np.uint64).tofile(folder / "hashes.bin")
    return {
        "format": FORMAT,
        "dtype": dtype.name,
        "documents": len(hashes),
        "unfinished": unfinished,
        "tokens": offsets[-1],
        "learned": learned,
        "bytes": content_bytes,
    }


def encode(tokenizer: Any, documents: Sequence[Document]) -> list[Encoded]:
    """Each document's ids, its end token too unless it was cut off, and which are learned; see `tailkd.data.chat`."""
    blank = any(d.example is not None for d in documents) and chat.begins_with_blank(tokenizer)
    pieces = [[d.text] if d.example is None else d.example.pieces(begins_with_blank=blank) for d in documents]
    ids, conversation = iter(_ids(tokenizer, [text for one in pieces for text in one])), None
    found, end = [], tokenizer.eos_token_id
    for document, texts in zip(documents, pieces, strict=True):
        if document.example is None:
            found.append(Encoded([*next(ids), *[end] * document.finished]))
        elif texts:
            read, answer = next(ids), [*next(ids), *[end] * document.finished]
            found.append(Encoded([*read, *answer], [0] * len(read) + [1] * len(answer)))
        else:
            conversation = conversation or chat.Chat(tokenizer)
            whole = conversation.encode(document.example.turns)
            found.append(whole if document.finished else whole.without_end(end))
    return found


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


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
