"""One micro-batch of training on tensors without values: which bytes live when.

PyTorch's fake tensors run the student's real forward and backward pass, autocast, checkpointing and tied or frozen
parameters included, and know every tensor's size; this counts the storages that are alive. The loss is stood in for by
a function that takes and keeps what `tailkd.objective.chunked` takes and keeps.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tailkd.ledger.anatomy import blocks
from tailkd.models.head import SplitModel
from tailkd.objective.blockwise import BLOCK_BYTES
from tailkd.objective.chunked import CHUNK_BYTES

UNMASKED = "tailkd_unmasked_sdpa"


@dataclass(frozen=True)
class Batch:
    """A micro-batch and how it is worked on.

    rows, context: its size in tokens. compute: dtype of the products (float32, or bfloat16 under autocast).
    usable: vocabulary rows that both sides share; None for all. device: "cpu" or "cuda", for the loss's chunk budget.
    accumulating: whether gradients of an earlier micro-batch are there already.
    """

    rows: int
    context: int
    compute: torch.dtype = torch.float32
    usable: int | None = None
    device: str = "cpu"
    accumulating: bool = False
    checkpointing: bool = False


@dataclass(frozen=True)
class Peaks:
    """Bytes above weights, optimizer and teachers' weights at the worst of each moment.

    kept: what the student's forward pass leaves for the backward pass. left: what is there after the backward pass.
    objective: what the loss needs at its worst. signal: the teachers' hidden states. teacher_forward, forward, loss,
    backward_upper (all but the first block) and backward_end: all that lives then, gradients of an earlier micro-batch
    and the teachers' hidden states included.
    """

    kept: int
    left: int
    objective: int
    signal: int
    teacher_forward: int
    forward: int
    loss: int
    backward_upper: int
    backward_end: int

    @property
    def backward(self) -> int:
        return max(self.backward_upper, self.backward_end)

    def deeper(self, other: Peaks, steps: int) -> Peaks:
        """The peaks `steps` times as much deeper than `other` as `other` is than these."""
        mine, theirs = astuple(self), astuple(other)
        return Peaks(*(high + steps * (high - low) for low, high in zip(mine, theirs, strict=True)))


class Living(TorchDispatchMode):
    """Counts the bytes of storages that were made inside and are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self._meet(leaf.untyped_storage())
        return found

    def ignore(self, model: nn.Module) -> None:
        """Storages that were there before."""
        for tensor in (*model.parameters(), *model.buffers()):
            self._known.add(tensor.untyped_storage()._cdata)

    def begin(self) -> int:
        """The peak so far, which is then forgotten."""
        found, self.peak = self.peak, self.now
        return found

    def _meet(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._part, key, size)

    def _part(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@dataclass(frozen=True)
class Players:
    """All configurations and what is particular to them; the teachers' with the dtype of their weights."""

    student: Any
    teachers: tuple[tuple[Any, torch.dtype], ...]
    frozen_embeddings: bool = False


def rehearse(players: Players, batch: Batch, *, whole: bool = False) -> Peaks:
    """The peaks of one micro-batch.

    Blocks repeat, and every moment's bytes grow by the same with each: a deep student is rehearsed at two small depths
    and the rest is exact arithmetic, unless `whole` asks for all of it.
    """
    depth, period = players.student.num_hidden_layers, _period(players.student)
    few = max(2, period) + (depth - max(2, period)) % period
    if whole or few + period >= depth:
        return _rehearse(players, batch, depth)
    low, high = (_rehearse(players, batch, n) for n in (few, few + period))
    return low.deeper(high, (depth - few - period) // period)


def _rehearse(players: Players, batch: Batch, depth: int) -> Peaks:
    with FakeTensorMode():
        counted = _Rehearsal(batch)
        teaching: list[_Teaching] = []
        peak = 0
        for config, dtype in players.teachers:
            held = sum(one.hidden.nbytes for one in teaching)
            one, needed = counted.teacher(config, dtype)
            teaching.append(one)
            peak = max(peak, held + needed)
        return counted.student(_cut(players.student, depth), players.frozen_embeddings, teaching, peak)


def _period(config: Any) -> int:
    """After how many blocks their kinds repeat."""
    kinds = list(getattr(config, "layer_types", None) or [])
    return next((n for n in range(1, len(kinds)) if kinds[n:] == kinds[:-n]), 1)


def _cut(config: Any, depth: int) -> Any:
    """The configuration of the first blocks alone; a forward pass without gradient costs no more for more of them."""
    config, whole = copy.deepcopy(config), config.num_hidden_layers
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == whole:
            setattr(config, name, value[:depth])
    config.num_hidden_layers = depth
    return config


@dataclass
class _Teaching:
    hidden: Tensor
    weight: Tensor


class _Rehearsal:
    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.ids = torch.zeros(batch.rows, batch.context, dtype=torch.long)

    def teacher(self, config: Any, dtype: torch.dtype) -> tuple[_Teaching, int]:
        """What its forward pass leaves, and the most that it needs."""
        depth = min(config.num_hidden_layers, 2 * _period(config))
        model = _model(_cut(config, depth), self.batch.context, dtype).eval().requires_grad_(False)
        split = SplitModel(model, usable=self.batch.usable, compute_dtype=self.batch.compute)
        with Living() as living, torch.no_grad():
            living.ignore(model)
            head = split(self.ids)
            return _Teaching(head.hidden, head.weight), living.peak

    def student(self, config: Any, frozen: bool, teaching: list[_Teaching], teacher_peak: int) -> Peaks:
        batch = self.batch
        model = _model(config, batch.context, torch.float32).train()
        if frozen:
            model.get_input_embeddings().requires_grad_(False)
        if batch.checkpointing:
            # older versions of transformers know the old name alone
            (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
        split = SplitModel(model, usable=batch.usable, compute_dtype=batch.compute)
        signal = sum(one.hidden.nbytes for one in teaching)
        earlier = signal if batch.accumulating else 0  # of the micro-batch before, until it is replaced
        upper: list[int] = []
        with Living() as living:
            living.ignore(model)
            if batch.accumulating:
                for parameter in model.parameters():
                    parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
            before = living.now
            living.begin()
            with _watched(split.backbone, lambda: upper.append(living.begin())):
                head = split(self.ids)
            forward, kept = living.peak, living.now - before
            living.begin()
            loss = _StandIn.apply(head.hidden, head.weight, head.bias, (teaching, batch))
            during = living.begin()
            del head
            loss.backward()
            return Peaks(
                kept=kept,
                left=signal + living.now,
                objective=during - before - kept,
                signal=signal,
                teacher_forward=before + earlier + teacher_peak,
                forward=signal + forward,
                loss=signal + during,
                backward_upper=signal + upper[0],
                backward_end=signal + living.peak,
            )


@contextmanager
def _watched(backbone: Any, reached: Callable[[], None]) -> Iterator[None]:
    """Tells when the backward pass has come down to the first block."""

    def watch(module: Any, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: reached())

    handle = blocks(backbone)[0].register_forward_hook(watch)
    try:
        yield
    finally:
        handle.remove()


class _StandIn(torch.autograd.Function):
    """Takes what `_Chunked` takes, in its order; see there."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, rest: tuple[list[_Teaching], Batch]
    ) -> Tensor:
        teaching, batch = rest
        needs = ctx.needs_input_grad
        vocabulary = weight.shape[0]
        with torch.autocast("cpu", enabled=False):
            packed, matrix = hidden.flatten(0, -2).clone(), weight.to(hidden.dtype)
            theirs = [(one.hidden.flatten(0, -2).clone(), one.weight.to(one.hidden.dtype)) for one in teaching]
            d_hidden = torch.empty_like(packed) if needs[0] else None
            d_weight = torch.empty(weight.shape, dtype=torch.float32) if needs[1] else None
            d_bias = torch.zeros(vocabulary, dtype=torch.float32) if bias is not None and needs[2] else None
            scratch = torch.empty(3, block_rows(vocabulary), vocabulary) if batch.device == "cpu" else None
            count = chunk_positions(batch, vocabulary, bytes_per_id(hidden.element_size(), len(teaching)))
            products: list[Tensor] = [torch.empty(count, vocabulary, dtype=hidden.dtype)]
            if len(teaching) == 1:
                products.append(torch.empty(count, vocabulary, dtype=hidden.dtype))
            elif teaching:
                products.append(torch.empty(count, vocabulary))  # what is added up
                _added(count, vocabulary, hidden.dtype)
            if d_weight is not None and hidden.dtype != d_weight.dtype:
                torch.empty(weight.shape, dtype=hidden.dtype)  # products.T @ hidden before it is added
            del products, scratch, theirs, matrix, packed
            spread = None if d_hidden is None else torch.zeros_like(hidden)
        ctx.save_for_backward(spread, d_weight, d_bias)
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias)]
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return (*((None if g is None else (g * incoming[0].to(g.dtype)).to(dtype)) for g, dtype in pairs), None)


def _added(count: int, vocabulary: int, dtype: torch.dtype) -> None:
    """One of several teachers while it is added to the others: its products, and these in float32."""
    products = torch.empty(count, vocabulary, dtype=dtype)
    products.to(torch.float32)


def block_rows(vocabulary: int) -> int:
    """Rows of a block of `Blockwise` on a CPU."""
    return max(1, BLOCK_BYTES // (4 * vocabulary))


def bytes_per_id(itemsize: int, teachers: int) -> int:
    """Of a position's logits in a chunk, both sides together; several teachers are added up in float32."""
    return itemsize * (1 + teachers) if teachers < 2 else itemsize + 3 * 4


def chunk_limit(batch: Batch, vocabulary: int, bytes_per_id: int) -> int:
    """Positions of the loss's chunk budget; `bytes_per_id` is both sides' together."""
    return max(1, CHUNK_BYTES[batch.device] // (bytes_per_id * vocabulary))


def chunk_positions(batch: Batch, vocabulary: int, bytes_per_id: int) -> int:
    """The most positions that a chunk of the loss holds: whole rows where one fits the budget, else a part of one."""
    limit = chunk_limit(batch, vocabulary, bytes_per_id)
    if limit < batch.context:
        return limit
    return min(limit // batch.context, batch.rows) * batch.context


def _model(config: Any, context: int, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config = copy.deepcopy(config)
    config.dtype = dtype
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if model.config._attn_implementation == "sdpa" and not _windowed(config, context):
        # Rows without padding take no mask, but transformers cannot see that of a tensor without values.
        ALL_ATTENTION_FUNCTIONS.register(UNMASKED, sdpa_attention_forward)
        model.config._attn_implementation = UNMASKED
    return model


def _windowed(config: Any, context: int) -> bool:
    window = getattr(config, "sliding_window", None)
    return bool(window) and window < context and getattr(config, "use_sliding_window", True)
