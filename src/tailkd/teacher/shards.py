"""One file of a teacher that is written down: rows, each with its signal at the positions that predict something.

A shard is a safetensors file. `keys` (rows, 16) names its rows by content, `borders` (rows + 1) says where each begins
among the positions, `digests` (rows, 16) is a hash of each row's bytes, looked at whenever the row is read. The other
tensors are those of the payload, a line a position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

KEY = 16  # bytes of a row's name and of its digest
ID_BYTES = 3
PAYLOADS = ("tail", "dense", "hidden")
ROW_BYTES = 2 * KEY + 8  # beside its positions

Entry = dict[str, Tensor]
"""A row's signal, by the names of `Payload.tensors`, (positions, ...)."""


class Damaged(Exception):
    """A shard is not what was written; says which file and what of it."""


@dataclass(frozen=True)
class Payload:
    """What is kept of a teacher at a position.

    kind: tail (its `top_k` likeliest of `usable` ids, the rest's mass and entropy, `tail_samples` ids drawn from the
    rest), dense (all log-probabilities) or hidden (the last hidden state, `width` numbers of `dtype`).
    """

    kind: str
    usable: int
    top_k: int = 10
    tail_samples: int = 32
    width: int = 0
    dtype: torch.dtype = torch.float32

    @property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape at a position and dtype of each tensor."""
        if self.kind == "dense":
            return {"log_probabilities": ((self.usable,), torch.float32)}
        if self.kind == "hidden":
            return {"hidden": ((self.width,), self.dtype)}
        return {
            "head_ids": ((self.kept, ID_BYTES), torch.uint8),
            "head_log_probabilities": ((self.kept,), torch.float32),
            "log_tail_mass": ((), torch.float32),
            "tail_entropy": ((), torch.float32),
            "tail_ids": ((self.tail_samples, ID_BYTES), torch.uint8),
        }

    @property
    def kept(self) -> int:
        """Ids that are kept with their own probability."""
        return min(self.top_k, self.usable)

    @property
    def position_bytes(self) -> int:
        """Bytes on the disk for each position that predicts something."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.tensors.values())


def packed_ids(ids: Tensor) -> Tensor:
    """Ids below 2^24 as three bytes each, the lowest first: (...) -> (..., 3)."""
    return torch.stack([(ids >> shift) & 0xFF for shift in (0, 8, 16)], -1).to(torch.uint8)


def unpacked_ids(packed: Tensor) -> Tensor:
    """``unpacked_ids(packed_ids(ids)) == ids``, int64."""
    low, middle, high = packed.long().unbind(-1)
    return low | middle << 8 | high << 16


def digest_of(key: bytes, entry: Mapping[str, Tensor]) -> bytes:
    """Hash of a row's bytes and of whose they are."""
    digest = xxhash.xxh3_128(key)
    for name in sorted(entry):
        digest.update(entry[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def name_of(keys: Sequence[bytes], made_of: str) -> str:
    """A shard's file name: of its rows, and of the fingerprint of what made them."""
    return f"{xxhash.xxh3_128_hexdigest(made_of.encode() + b''.join(keys))}.safetensors"


def packed(keys: Sequence[bytes], entries: Sequence[Entry]) -> bytes:
    """The bytes of a shard."""
    counts = torch.tensor([0, *(len(next(iter(entry.values()))) for entry in entries)])
    digests = [digest_of(key, entry) for key, entry in zip(keys, entries, strict=True)]
    columns = {name: torch.cat([entry[name] for entry in entries]) for name in entries[0]}
    return save({"keys": _table(keys), "digests": _table(digests), "borders": counts.cumsum(0), **columns})


class Shard:
    """A shard, opened: memory-mapped, its rows read one at a time.

    Raises:
        Damaged: it is not there, cut short, or another file.
    """

    def __init__(self, path: Path, payload: Payload) -> None:
        self.path, self.payload = path, payload
        try:
            self._file: Any = safe_open(path, framework="pt")
            self.keys, digests, borders = (self._file.get_tensor(name) for name in ("keys", "digests", "borders"))
            shapes = {name: self._file.get_slice(name).get_shape() for name in payload.tensors}
        except (OSError, SafetensorError) as error:
            raise Damaged(f"{path} is cut short, damaged or gone ({error})") from error
        self._digests, self.borders = digests.numpy(), borders.tolist()
        positions = self.borders[-1]
        if shapes != {name: [positions, *shape] for name, (shape, _) in payload.tensors.items()}:
            raise Damaged(f"{path} holds {shapes}, which is not what the manifest says it holds")

    def __len__(self) -> int:
        return len(self.keys)

    def row(self, place: int) -> Entry:
        """The signal of one row.

        Raises:
            Damaged: its bytes are not those that were written, or name ids that the vocabulary does not have.
        """
        start, stop = self.borders[place : place + 2]
        entry = {name: self._file.get_slice(name)[start:stop] for name in self.payload.tensors}
        if digest_of(self.keys[place].numpy().tobytes(), entry) != self._digests[place].tobytes():
            raise Damaged(f"{self.path} is damaged: row {place:,} of it is not what was written")
        for name in ("head_ids", "tail_ids"):
            if name in entry:
                entry[name] = unpacked_ids(entry[name])
                if entry[name].numel() and int(entry[name].max()) >= self.payload.usable:
                    raise Damaged(
                        f"{self.path}: row {place:,} of it names id {int(entry[name].max()):,}, and the vocabulary has "
                        f"{self.payload.usable:,}"
                    )
        return entry


def _table(values: Sequence[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(values)), dtype=torch.uint8).view(len(values), KEY)
