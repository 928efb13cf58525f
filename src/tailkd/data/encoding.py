"""Documents -> token ids, which of them are learned, and the arrays that a store is made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np

from tailkd.data import chat
from tailkd.data.chat import Encoded
from tailkd.data.corpus import Document
from tailkd.data.overlap import Overlap
from tailkd.data.writing import Block, Encode, Unusable
from tailkd.errors import Refusal


def encode(tokenizer: Any, documents: Sequence[Document]) -> list[Encoded]:
    """Each document's ids, its end token too unless it was cut off, and which are learned; see `tailkd.data.chat`."""
    blank = any(d.example is not None for d in documents) and chat.begins_with_blank(tokenizer)
    pieces = [[d.text] if d.example is None else d.example.pieces(begins_with_blank=blank) for d in documents]
    ids, conversation = iter(ids_of(tokenizer, [text for one in pieces for text in one])), None
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


def ids_of(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """``tokenizer(texts, add_special_tokens=False)["input_ids"]``, a fifth faster with a fast tokenizer.

    Its backend is asked without the offsets, masks and words that would be thrown away; a class that encodes in a way
    of its own is asked itself.
    """
    from transformers import PreTrainedTokenizerFast

    if not texts:
        return []
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or getattr(type(tokenizer), "_encode_plus", None) is not PreTrainedTokenizerFast._encode_plus:
        return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    tokenizer([""], add_special_tokens=False)  # sets the backend's truncation, padding and special tokens
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def dtype_of(usable: int) -> np.dtype:
    """What a store keeps ids below `usable` in."""
    return np.dtype(np.uint16 if usable <= 1 << 16 else np.uint32)


def worker(tokenizer: Any, usable: int, overlap: Overlap | None) -> Encode:
    """Documents -> arrays, in any process."""

    def work(read: list[Document]) -> Block:
        pairs = list(zip(read, encode(tokenizer, read), strict=True))
        unusable = [Unusable(n, d.id, *e.unusable) for n, (d, e) in enumerate(pairs) if e.unusable is not None]
        documents, found = [d for d, e in pairs if e.unusable is None], [e for _, e in pairs if e.unusable is None]
        ids = _joined(one.ids for one in found)
        lengths = np.asarray([len(one.ids) for one in found], dtype=np.int64)
        _refuse_unusable(ids, lengths, usable, documents, tokenizer)
        per_token = {"tokens": ids.astype(dtype_of(usable))}
        if any(one.loss is not None for one in found):
            per_token["loss"] = _joined(one.loss or () for one in found).astype(np.uint8)
        per_document: dict[str, np.ndarray] = {"hashes": np.asarray([d.hash for d in documents], dtype=np.uint64)}
        if overlap is not None:
            per_document["overlap"] = np.asarray([overlap.found(d.text) for d in documents], dtype=np.uint8)
        return Block(lengths, _totals(documents, found), per_token, per_document, len(read), tuple(unusable))

    return work


def _totals(documents: Sequence[Document], found: Sequence[Encoded]) -> dict[str, np.ndarray]:
    """What is summed up: UTF-8 bytes, learned tokens, and documents that were cut off."""
    numbers = {
        "bytes": [len(document.text.encode()) for document in documents],
        "learned": [len(one.ids) if one.loss is None else sum(one.loss) for one in found],
        "unfinished": [not document.finished for document in documents],
    }
    return {name: np.asarray(each, dtype=np.int64) for name, each in numbers.items()}


def _joined(parts: Iterable[Sequence[int]]) -> np.ndarray:
    return np.fromiter(chain.from_iterable(parts), dtype=np.int64)


def _refuse_unusable(
    ids: np.ndarray, lengths: np.ndarray, usable: int, documents: list[Document], tokenizer: Any
) -> None:
    outside = np.flatnonzero(ids >= usable)
    if len(outside):
        first = int(ids[outside[0]])
        document = documents[int(np.searchsorted(np.cumsum(lengths), outside[0], side="right"))]
        raise Refusal(
            f"{document.id}: token {tokenizer.convert_ids_to_tokens(first)!r} (id {first}) lies outside the {usable:,} "
            "ids that teacher and student share; take a tokenizer without it or remove it from the text"
        )
