"""What it costs to write a teacher down, once for all runs that read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tailkd.ledger import flops
from tailkd.ledger.anatomy import dissect
from tailkd.teacher.shards import PAYLOADS, ROW_BYTES, Payload


@dataclass(frozen=True)
class Cache:
    """A teacher written down for `tokens` of a corpus.

    payload: which is written. bytes_per_token: of each payload. bytes: of all tokens with the one that is written, with
    the vocabulary matrix where that is hidden. teacher_forward: PFLOP per million tokens of the corpus, paid once.
    """

    payload: str
    bytes_per_token: dict[str, int]
    bytes: int
    teacher_forward: float

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def cache(teachers: Sequence[Any], payload: Payload, *, tokens: int, context: int) -> Cache:
    """The cost of `payload` of some teachers' configurations; hidden is that of the first."""
    first = teachers[0].get_text_config()
    each = {kind: Payload(**{**vars(payload), "kind": kind, "width": first.hidden_size}) for kind in PAYLOADS}
    sizes = {kind: one.position_bytes for kind, one in each.items()}
    matrix = payload.usable * sizes["hidden"] if payload.kind == "hidden" else 0
    rows = -(-tokens // context)
    anatomies = [dissect(config) for config in teachers]
    forward = sum(flops.forward(one, context, flops.executed(one)) for one in anatomies)
    return Cache(payload.kind, sizes, tokens * sizes[payload.kind] + rows * ROW_BYTES + matrix, forward * 1e6 / 1e15)
