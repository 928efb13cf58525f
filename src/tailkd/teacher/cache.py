"""A teacher that is written down: a folder of shards, read by the content of the rows that training shows."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors.torch import load_file, save
from torch import Tensor

from tailkd.data.batches import Batch
from tailkd.data.files import file_hash
from tailkd.errors import DataError, Refusal
from tailkd.objective import Cached, Dense, Head, blocks
from tailkd.teacher.chunks import write_whole
from tailkd.teacher.shards import KEY, Damaged, Entry, Payload, Shard, name_of

FORMAT = 1
MANIFEST, HEAD = "manifest.json", "head.safetensors"
OPEN_SHARDS = 256  # at once; a process may hold about a thousand files
_KEY = np.dtype(f"V{KEY}")


@dataclass(frozen=True)
class Manifest:
    """What a cache was made of, and its files.

    made_of: all that its content depends on but the rows. head: of a hidden payload, scale and softcap of the teacher's
    vocabulary matrix and its file's hash. shards: by file name hash, bytes, rows and positions.
    """

    made_of: dict[str, Any]
    payload: Payload
    head: dict[str, Any] = field(default_factory=dict)
    shards: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        return xxhash.xxh3_128_hexdigest(json.dumps(self.made_of, sort_keys=True).encode())

    def total(self, what: str) -> int:
        """Sum over the shards of their "rows", "positions" or "bytes"."""
        return sum(shard[what] for shard in self.shards.values())

    @staticmethod
    def read(folder: Path) -> Manifest:
        """The manifest in a folder.

        Raises:
            Refusal: there is none, one that cannot be read, or one of another format.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise Refusal(f"{folder} holds no cache of a teacher: `tailkd cache` with cache.path={folder} writes one")
        try:
            values = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise Refusal(
                f"{path} is damaged ({error}); delete it and run `tailkd cache` again: whole shards stay"
            ) from error
        if values["format"] != FORMAT:
            raise Refusal(
                f"{folder} holds a cache of format {values['format']}, this version reads {FORMAT}; write it anew with "
                "`tailkd cache` into another folder"
            )
        payload = values["payload"]
        payload = Payload(**{**payload, "dtype": getattr(torch, payload["dtype"])})
        return Manifest(values["made_of"], payload, values["head"], values["shards"])

    def write(self, folder: Path) -> None:
        payload = {**vars(self.payload), "dtype": str(self.payload.dtype).removeprefix("torch.")}
        values = {"format": FORMAT, "made_of": self.made_of, "payload": payload, "head": self.head}
        content = json.dumps({**values, "shards": dict(sorted(self.shards.items()))}, indent=1)
        write_whole(folder / MANIFEST, [content.encode()], point="manifest")


class Cache:
    """A cache, opened: which rows it has, and what it holds of each.

    Raises:
        Refusal: there is none, or a file that its manifest names is not the one that was written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest = folder, Manifest.read(folder)
        self.payload = self.manifest.payload
        self._names = sorted(self.manifest.shards)
        self._opened = lru_cache(maxsize=OPEN_SHARDS)(lambda name: Shard(folder / name, self.payload))
        keys, owners, places = [np.zeros(0, _KEY)], [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
        for number, name in enumerate(self._names):
            found = self._looked_at(name)
            keys.append(found)
            owners.append(np.full(len(found), number, np.int32))
            places.append(np.arange(len(found), dtype=np.int32))
        together = np.concatenate(keys)
        order = np.argsort(together, kind="stable")
        self._keys = together[order]
        self._owners, self._places = np.concatenate(owners)[order], np.concatenate(places)[order]

    def _looked_at(self, name: str) -> np.ndarray:
        """The keys of a shard that is as long as it was, and holds the rows that it is named by."""
        path, told = self.folder / name, self.manifest.shards[name]
        try:
            if path.is_file() and path.stat().st_size != told["bytes"]:
                raise Damaged(f"{path} has {path.stat().st_size:,} bytes and not {told['bytes']:,}")
            keys = np.ascontiguousarray(self._opened(name).keys.numpy()).view(_KEY).ravel()
            if name_of([key.tobytes() for key in keys], self.manifest.fingerprint) != name:
                raise Damaged(f"{path} does not hold the rows that its name says")
        except Damaged as damaged:
            raise Refusal(f"{damaged}; {_mended(path)}") from damaged
        return keys

    def missing(self, keys: Sequence[bytes]) -> list[int]:
        """Which of these rows it does not have, as indices."""
        wanted = np.frombuffer(b"".join(keys), _KEY)
        places = np.searchsorted(self._keys, wanted)
        inside = places < len(self._keys)
        there = np.zeros(len(wanted), dtype=bool)
        there[inside] = self._keys[places[inside]] == wanted[inside]
        return np.flatnonzero(~there).tolist()

    def row(self, key: bytes) -> Entry:
        """What it holds of a row.

        Raises:
            DataError: it does not have it, or the file is damaged.
        """
        if self.missing([key]):
            raise DataError(f"{self.folder} has no row {key.hex()}; {_MISSING}")
        place = int(np.searchsorted(self._keys, np.frombuffer(key, _KEY))[0])
        name = self._names[self._owners[place]]
        try:
            return self._opened(name).row(int(self._places[place]))
        except Damaged as damaged:
            raise DataError(f"{damaged}; {_mended(self.folder / name)}") from damaged

    def head(self) -> tuple[Tensor, Tensor | None]:
        """The vocabulary matrix of a hidden payload, and its bias."""
        path = self.folder / HEAD
        if not path.is_file() or file_hash(path) != self.manifest.head["xxh3_128"]:
            raise Refusal(f"{path} is damaged or gone; {_mended(path)}")
        tensors = load_file(path)
        return tensors["weight"], tensors.get("bias")

    def verify(self, heed: Callable[[], None] = lambda: None) -> None:
        """Read everything and compare it with its checksums.

        Raises:
            Refusal: naming the first file that differs, and the row of it.
        """
        for name in self._names:
            heed()
            path, shard = self.folder / name, self._opened(name)
            try:
                for place in range(len(shard)):
                    shard.row(place)
                if file_hash(path) != self.manifest.shards[name]["xxh3_128"]:
                    raise Damaged(f"{path} is damaged")
            except Damaged as damaged:
                raise Refusal(f"{damaged}; {_mended(path)}") from damaged
        if self.manifest.head:
            self.head()


_MISSING = "`tailkd cache` with this recipe adds what is missing"


def _mended(path: Path) -> str:
    return f"delete that file ({path.name}) and run `tailkd cache` again, which writes it anew"


def head_bytes(weight: Tensor, bias: Tensor | None) -> bytes:
    """The file of a vocabulary matrix."""
    tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


class CachedTeacher:
    """A callable that turns a batch into what a cache holds of its rows: in the place of a live teacher.

    Gives `Cached` of a tail payload, the live teacher's own distribution of the others: a `Head` over its hidden states
    (with folded ids a `Dense`), or over its log-probabilities, with the identity as the vocabulary matrix. Positions
    without a label hold zeros.
    """

    def __init__(self, cache: Cache, *, fold: Mapping[int, int] | None = None) -> None:
        self.cache, self.fold = cache, dict(fold or {})
        self._matrix: tuple[Tensor, Tensor | None] | None = None

    def __call__(self, batch: Batch) -> Cached | Head | Dense:
        payload, made_of = self.cache.payload, self.cache.manifest.made_of
        found = self._columns(batch)
        if payload.kind == "tail":
            return Cached(**found, vocabulary_size=payload.usable, temperature=made_of["temperature"])
        (hidden,) = found.values()
        weight, bias = self._vocabulary_matrix(hidden.device)
        if payload.kind == "dense":
            return Head(hidden, weight)
        about = self.cache.manifest.head
        head = Head(hidden, weight, bias, about["scale"], about["softcap"])
        return Dense((head,), usable=payload.usable, fold=self.fold) if self.fold else head

    def with_states(self, batch: Batch, states: Sequence[int]) -> tuple[Cached | Head | Dense, tuple[Tensor, ...]]:
        """The signal and the last hidden state, the one that a hidden payload has, as often as it is asked for."""
        assert set(states) == {-1}
        signal = self(batch)
        assert isinstance(signal, Head | Dense)
        return signal, (signal.hidden,) * len(states)

    def _columns(self, batch: Batch) -> dict[str, Tensor]:
        """Each tensor of the payload, (batch, sequence, ...), on the batch's device."""
        device, shape = batch.input_ids.device, batch.input_ids.shape
        rows = [self.cache.row(key) for key in batch.keys]
        valid = batch.valid.to(device, non_blocking=True)
        found = {}
        for name in rows[0]:
            packed = torch.cat([row[name] for row in rows])
            assert len(packed) == len(batch.valid)
            if device.type == "cuda":
                packed = packed.pin_memory()
            packed = packed.to(device, non_blocking=True)
            if len(packed) < shape.numel():
                filled = packed.new_zeros(shape.numel(), *packed.shape[1:])
                packed = filled.index_copy_(0, valid, packed)
            found[name] = packed.view(*shape, *packed.shape[1:])
        return found

    def _vocabulary_matrix(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        if self._matrix is None:
            weight, bias = (
                (torch.eye(self.cache.payload.usable), None)
                if self.cache.payload.kind == "dense"
                else self.cache.head()
            )
            self._matrix = weight.to(device), None if bias is None else bias.to(device)
        return self._matrix


def log_probabilities(logits: Tensor) -> Tensor:
    """As a dense payload keeps them: float32, finite, so that 0 times one of them is 0."""
    return logits.float().log_softmax(-1).clamp_(min=blocks.LOW)
