"""The matrices and the attention of a dense decoder, read off its model on the meta device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from tailkd.errors import Refusal
from tailkd.ledger.parameters import on_meta


@dataclass(frozen=True)
class Anatomy:
    """What the closed forms of `flops` need.

    blocks: entries of all matrices of the blocks. last: of those, the entries of each block's last one, where nothing
    but a sum follows, so that no gradient needs its result.
    vocabulary, width: of the head's matrix. tied: whether it is the input embedding's.
    heads: query heads times their dimension. windows: per block with attention, how far it looks back; None for all.
    softcapped: whether attention logits are capped, which fused attention of PyTorch cannot do.
    """

    blocks: int
    last: int
    vocabulary: int
    width: int
    tied: bool
    heads: int
    windows: tuple[int | None, ...]
    softcapped: bool

    @property
    def head(self) -> int:
        return self.vocabulary * self.width


def dissect(config: Any) -> Anatomy:
    """The anatomy of a transformers configuration.

    Raises:
        Refusal: matrices that are no linear layer (experts), or attention that is neither full nor sliding.
    """
    model = on_meta(config)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    rows = {block: list(_matrices(block)) for block in blocks(model)}
    found = sum(map(sum, rows.values()))
    whole = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    rest = whole - sum({id(m.weight): m.weight.numel() for m in _tables(model, head)}.values()) - found
    if rest:
        raise Refusal(
            f"model type {config.model_type!r}: {rest:,} matrix entries are outside the linear layers of its blocks "
            "(experts, say), and the ledger's closed forms know dense decoders only; take a dense model"
        )
    return Anatomy(
        blocks=found,
        last=sum(row[-1] for block, row in rows.items() if not hasattr(block, "post_feedforward_layernorm")),
        vocabulary=head.weight.shape[0],
        width=head.weight.shape[1],
        tied=head.weight is embedding.weight,
        heads=config.num_attention_heads * head_dim(config),
        windows=tuple(_windows(config)),
        softcapped=bool(getattr(config, "attn_logit_softcapping", None)),
    )


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def blocks(model: Any) -> list[nn.Module]:
    """The decoder's blocks, in order: its longest list of modules."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return list(max(lists, key=len)) if lists else []


def _tables(model: Any, head: Any) -> Iterator[Any]:
    yield head
    yield from (m for m in model.modules() if isinstance(m, nn.Embedding))


def _matrices(block: nn.Module) -> Iterator[int]:
    """Entries of a block's matrices in the order of their registration; the last ends the block."""
    for module in block.modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            yield module.weight.numel()  # pyright: ignore[reportCallIssue]


def _windows(config: Any) -> Iterator[int | None]:
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    default = "sliding_attention" if window else "full_attention"
    for kind in getattr(config, "layer_types", None) or [default] * config.num_hidden_layers:
        if kind not in ("full_attention", "sliding_attention"):
            raise Refusal(
                f"model type {config.model_type!r} has {kind!r} layers, and the ledger's closed forms know full and "
                "sliding attention only; take such a model"
            )
        yield window if kind == "sliding_attention" else None
