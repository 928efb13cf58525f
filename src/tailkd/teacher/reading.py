"""How a model reads training rows: losses of their tokens, or of the same text in tokens of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tailkd.data.batches import Batch, collate
from tailkd.data.packing import IGNORED, Row
from tailkd.models.head import SplitModel
from tailkd.objective import Dense, Head
from tailkd.objective.chunked import cross_entropies
from tailkd.objective.layout import with_sequences
from tailkd.teacher.score import PER_ROW, Read

Signal = Callable[[Batch], Head | Dense]
BROKEN = "\ufffd"
LONGEST = 4  # bytes of a character, so at most so many tokens of which a border has cut it


def each_token(signal: Signal, device: torch.device) -> Read:
    """Losses (rows, context), 0 where there is nothing to predict."""

    def read(rows: Sequence[Row]) -> np.ndarray:
        return _losses(signal, collate(rows, range(len(rows))).to(device))

    return read


def by_token(signal: Signal, device: torch.device) -> Read:
    """Sums over the predicted tokens, end tokens among them, and how many there are."""
    losses = each_token(signal, device)

    def read(rows: Sequence[Row]) -> np.ndarray:
        return _table(losses(rows), np.stack([row.labels != IGNORED for row in rows]))

    return read


def by_byte(signal: Signal, device: torch.device, tokenizer: Any) -> Read:
    """Sums over the predicted tokens that are text (no end tokens), and the UTF-8 bytes of that text."""
    losses = each_token(signal, device)

    def read(rows: Sequence[Row]) -> np.ndarray:
        texts = [text_of(row, tokenizer) for row in rows]
        return _table(losses(rows), np.stack([text.counted for text in texts]), [text.bytes for text in texts])

    return read


def by_byte_of_another(model: SplitModel, theirs: Any, tokenizer: Any) -> Read:
    """The same for a model with a tokenizer of its own, which reads the rows' text.

    It reads its begin token (without one, its end token), the documents' text, its end token after each document that
    ends in the row. A row with more tokens than the model has positions is cut into windows of one size.
    """
    config = model.plain.config.get_text_config()
    begin, end = marks(theirs, config)
    assert begin is not None
    limit = getattr(config, "max_position_embeddings", None) or 1 << 30

    def read(rows: Sequence[Row]) -> np.ndarray:
        found = np.zeros(len(rows), dtype=PER_ROW)
        texts = [text_of(row, tokenizer) for row in rows]
        found["weight"] = [text.bytes for text in texts]
        ids = [_encoded(text, theirs, end) for text in texts]
        windows = [np.array_split(one, -(-len(one) // limit)) if len(one) else [] for one in ids]
        owners = [number for number, own in enumerate(windows) for _ in own]
        if owners:
            batch = _windows([window for own in windows for window in own], begin)
            losses = _losses(lambda b: model(b.input_ids), batch.to(model.device))
            np.add.at(found["nll"], owners, losses.sum(1, dtype=np.float64))
        return found

    return read


# ----- text


@dataclass(frozen=True)
class Text:
    """The text that a row predicts: of each document its share, and whether the document ends there.

    counted: (context,), the positions that predict it.
    """

    pieces: list[tuple[str, bool]]
    counted: np.ndarray

    @property
    def bytes(self) -> int:
        return sum(len(text.encode("utf-8", "surrogatepass")) for text, _ in self.pieces)


def text_of(row: Row, tokenizer: Any) -> Text:
    """Without characters that the row's borders cut, and without end tokens."""
    end = tokenizer.eos_token_id
    counted = (row.labels != IGNORED) & (row.labels != end)
    pieces: list[tuple[str, bool]] = []
    valid = np.flatnonzero(row.labels != IGNORED)
    ends = valid[row.labels[valid] == end]
    borders = [-1, *ends, int(valid[-1]) + 1 if len(valid) else 0]
    for before, after in pairwise(borders):
        ended = after in ends
        places = np.arange(before + 1, after)
        places = places[row.labels[places] != IGNORED]
        kept = _unbroken(row.labels[places], tokenizer, left=before < 0, right=not ended)
        counted[np.setdiff1d(places, places[kept])] = False
        text = _decoded(row.labels[places[kept]], tokenizer)
        if text or ended:
            pieces.append((text, ended))
    return Text(pieces, counted)


def _unbroken(ids: np.ndarray, tokenizer: Any, *, left: bool, right: bool) -> slice:
    """The tokens without those of a character whose other part lies outside; looked for where a border may cut."""
    start, stop = 0, len(ids)
    cuts = range(min(LONGEST, len(ids) + 1))
    if left:
        start = next((cut for cut in cuts if not _decoded(ids[cut:], tokenizer).startswith(BROKEN)), 0)
    if right:
        ends = (len(ids) - cut for cut in cuts if len(ids) - cut >= start)
        stop = next((at for at in ends if not _decoded(ids[start:at], tokenizer).endswith(BROKEN)), stop)
    return slice(start, stop)


def _decoded(ids: np.ndarray, tokenizer: Any) -> str:
    return tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def marks(tokenizer: Any, config: Any) -> tuple[int | None, int | None]:
    """The token that begins what a model reads, and the one that ends a document; None for none.

    Of the tokenizer, or where it names none (Galactica's does not) of the configuration.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    end = eos if eos is not None else getattr(config, "eos_token_id", None)
    found = (bos, eos, getattr(config, "bos_token_id", None), end)
    return next((one for one in found if one is not None), None), end


def _encoded(text: Text, tokenizer: Any, end: int | None) -> np.ndarray:
    """Ids of the pieces; end tokens as their negative, less one: they are read, and not counted."""
    if not text.pieces:
        return np.zeros(0, dtype=np.int64)
    found: list[int] = []
    encoded = tokenizer([piece for piece, _ in text.pieces], add_special_tokens=False, verbose=False)["input_ids"]
    for ids, (_, ended) in zip(encoded, text.pieces, strict=True):
        found += ids
        if ended and end is not None:
            found.append(-1 - end)
    return np.asarray(found, dtype=np.int64)


def _windows(windows: list[np.ndarray], begin: int) -> Batch:
    """Each window after a begin token, as rows of one width."""
    width = max(len(window) for window in windows)
    rows = []
    for window in windows:
        input_ids = np.full(width, begin, dtype=np.int64)
        labels = np.full(width, IGNORED, dtype=np.int64)
        plain = np.where(window < 0, -1 - window, window)
        input_ids[: len(window)] = [begin, *plain[:-1]]
        labels[: len(window)] = np.where(window < 0, IGNORED, window)
        rows.append(Row(input_ids, labels, np.zeros(width, dtype=np.int64)))
    return collate(rows, range(len(rows)))


# ----- losses


@torch.no_grad()
def _losses(signal: Signal, batch: Batch) -> np.ndarray:
    layout = with_sequences(batch.valid, batch.row_borders, batch.labels.shape[1], None)
    found = cross_entropies(signal(batch), batch.labels, layout)
    spread: Tensor = torch.zeros(batch.labels.numel(), dtype=found.dtype, device=found.device)
    spread[batch.valid.to(found.device)] = found
    return spread.view(batch.labels.shape).cpu().numpy()


def _table(losses: np.ndarray, counted: np.ndarray, weights: Sequence[int] | None = None) -> np.ndarray:
    found = np.zeros(len(losses), dtype=PER_ROW)
    found["nll"] = np.where(counted, losses, 0).sum(1, dtype=np.float64)
    found["weight"] = counted.sum(1) if weights is None else weights
    return found
