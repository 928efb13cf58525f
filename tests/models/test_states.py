"""Hidden states from within a model, beside its head: those that transformers gives, of one forward pass."""

from __future__ import annotations

from typing import Any

import builders
import pytest
import torch
from teachers import FAMILIES, build_teacher
from torch import Tensor

from tailkd.errors import Refusal
from tailkd.models.head import SplitModel
from tailkd.objective.hidden import cosine

STATES = (2, -1, 0, 6, 1)


@pytest.mark.parametrize("family", [*FAMILIES, "builders"])
def test_states_are_those_of_transformers(family: str) -> None:
    model = builders.build_model(61, layers=6) if family == "builders" else build_teacher(family)
    ids = torch.randint(61, (2, 9))
    split = SplitModel(model)
    head, found = split.with_states(ids, STATES)
    expected = model(ids, output_hidden_states=True, use_cache=False)
    assert len(found) == len(STATES)
    for place, state in zip(STATES, found, strict=True):
        assert torch.equal(state, expected.hidden_states[place])
    assert torch.equal(head.logits(), expected.logits)
    assert found[1] is found[3] is head.hidden
    assert torch.equal(head.hidden, split(ids).hidden)
    assert "forward" not in vars(model)


def test_the_last_state_alone_needs_nothing_more() -> None:
    model = builders.build_model(61)
    head, (last,) = SplitModel(model).with_states(torch.arange(5)[None], (-1,))
    assert last is head.hidden
    assert not any(layer._forward_hooks for layer in model.model.layers)


def test_states_in_bfloat16_products_and_of_a_teacher_without_gradient() -> None:
    split = SplitModel(builders.build_model(61), compute_dtype=torch.bfloat16)
    with torch.no_grad():
        head, (inner, last) = split.with_states(torch.arange(5)[None], (1, 2))
    assert head.hidden.dtype == last.dtype == torch.bfloat16
    assert inner.shape == last.shape == (1, 5, 32)
    assert not inner.requires_grad


@pytest.mark.parametrize("state", [3, -4])
def test_a_state_that_is_not_there_is_refused(state: int) -> None:
    split = SplitModel(builders.build_model(61))
    with pytest.raises(Refusal, match=rf"LlamaForCausalLM .* no hidden state {state}; expected 0 .* to 2 .*, or -1"):
        split.with_states(torch.arange(5)[None], (1, state))


# ----- gradients through compile and checkpointing


def loss_of(split: SplitModel, ids: Tensor, target: Tensor) -> Tensor:
    head, (inner, last) = split.with_states(ids, (1, -1))
    valid = torch.ones(ids.shape, dtype=torch.bool)
    return cosine(inner, target, valid) + cosine(last, target, valid) + head.logits().square().mean()


def gradients(how: str) -> tuple[dict[str, Tensor], int]:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    model = builders.build_model(61, seed=1).train()
    graphs = CompileCounterWithBackend("eager")
    ids, target = torch.arange(2 * 9).view(2, 9), torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(2))
    loss: Any = loss_of
    if how == "checkpointed":
        model.gradient_checkpointing_enable()
    if how == "in place":
        model.compile(backend=graphs)
    split = SplitModel(torch.compile(model, backend=graphs) if how == "wrapped" else model)
    if how == "proved before":
        model.compile(backend=graphs)
        split.prove()
    if how == "loss inside":
        loss = torch.compile(loss_of, backend=graphs)
    for _ in range(2):
        model.zero_grad()
        loss(split, ids, target).backward()
    torch.compiler.reset()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, graphs.frame_count


SLOW = [pytest.param(how, marks=pytest.mark.slow) for how in ("in place", "wrapped", "proved before", "loss inside")]


@pytest.mark.parametrize("how", ["checkpointed", *SLOW])
def test_gradients_are_those_of_the_plain_model(how: str) -> None:
    expected, _ = gradients("plain")
    found, graphs = gradients(how)
    assert len(expected) == 20
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    # Proved before: logits, hidden states, those with states. Loss inside: transformers hooks the blocks in between.
    assert graphs == {"checkpointed": 0, "proved before": 3, "loss inside": 2}.get(how, 1)
