"""torch.compile around the student, the loss outside or inside: numbers stay, and the student is what is compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import builders
import pytest
import torch
from torch import Tensor

from tailkd.models.head import SplitModel
from tailkd.objective import Head, Objective, distillation_loss

VOCABULARY = 97
OBJECTIVE = Objective(top_k=5)

Batch = tuple[Tensor, Tensor, Head]
Loss = Callable[[SplitModel, Batch], Tensor]


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    """Ids, labels and the teacher's head; one shape, and each batch with other valid positions."""
    teacher = SplitModel(builders.build_model(VOCABULARY, hidden=16, seed=2))
    generator = torch.Generator().manual_seed(3)
    found = []
    for share in (0.3, 0.6, 0.9):
        ids = torch.randint(VOCABULARY, (2, 12), generator=generator)
        hidden = torch.rand(ids.shape, generator=generator) < share
        with torch.no_grad():
            found.append((ids, ids.roll(-1, 1).masked_fill(hidden, -100), teacher(ids)))
    return found


def student() -> Any:
    return builders.build_model(VOCABULARY, seed=1).train()


def loss_of(split: SplitModel, batch: Batch) -> Tensor:
    ids, labels, teacher = batch
    return distillation_loss(split(ids), teacher, labels, objective=OBJECTIVE).mean()


def results(split: SplitModel, batches: list[Batch], loss: Loss = loss_of) -> list[dict[str, Tensor]]:
    """For each batch the loss and every gradient."""
    found = []
    for batch in batches:
        split.model.zero_grad()
        value = loss(split, batch)
        value.backward()
        named = {name.removeprefix("_orig_mod."): p for name, p in split.model.named_parameters()}
        found.append({"loss": value.detach(), **{name: p.grad.clone() for name, p in named.items()}})
    return found


def counter(backend: str) -> Any:
    from torch._dynamo.testing import CompileCounterWithBackend

    return CompileCounterWithBackend(backend)


def in_place(model: Any, backend: Any) -> SplitModel:
    model.compile(backend=backend)
    return SplitModel(model)


def in_place_afterwards(model: Any, backend: Any) -> SplitModel:
    split = SplitModel(model)
    model.compile(backend=backend)
    return split


def backbone_in_place(model: Any, backend: Any) -> SplitModel:
    model.model.compile(backend=backend)
    return SplitModel(model)


def wrapped(model: Any, backend: Any) -> SplitModel:
    return SplitModel(torch.compile(model, backend=backend))


def checkpointed(model: Any, backend: Any) -> SplitModel:
    model.gradient_checkpointing_enable()
    return in_place(model, backend)


@pytest.mark.parametrize("how", [in_place, in_place_afterwards, backbone_in_place, wrapped, checkpointed])
def test_a_compiled_student_is_one_graph_with_the_same_gradients(
    how: Callable[[Any, Any], SplitModel], batches: list[Batch]
) -> None:
    graphs = counter("eager" if how is in_place_afterwards else "aot_eager")
    got = results(how(student(), graphs), batches)
    assert graphs.frame_count == 1
    torch.testing.assert_close(got, results(SplitModel(student()), batches), rtol=1e-5, atol=1e-7)


def test_a_compiled_model_proves_its_reading() -> None:
    model = student()
    graphs = counter("eager")
    split = in_place(model, graphs).prove()
    assert graphs.frame_count == 2  # its logits, its hidden states
    assert model.training
    assert torch.equal(split(torch.arange(8)[None]).logits(), student()(torch.arange(8)[None]).logits)


def test_a_loss_inside_the_compiled_function_has_the_same_gradients(batches: list[Batch]) -> None:
    graphs = counter("aot_eager")
    got = results(SplitModel(student()), batches, torch.compile(loss_of, backend=graphs))
    assert graphs.frame_count == 1
    torch.testing.assert_close(got, results(SplitModel(student()), batches), rtol=1e-5, atol=1e-7)


def test_a_call_leaves_the_models_own_forward_even_when_it_fails() -> None:
    model = student()
    split = SplitModel(model)
    split(torch.arange(3)[None])
    with pytest.raises(IndexError):
        split(torch.tensor([[VOCABULARY]]))
    assert "forward" not in vars(model)
    assert model(torch.arange(3)[None]).logits.shape == (1, 3, VOCABULARY)


def test_a_forward_that_another_library_put_on_the_model_comes_back() -> None:
    model = student()
    own = model.forward
    model.forward = lambda *arguments, **options: own(*arguments, **options)  # as accelerate.prepare does
    patched = model.forward
    SplitModel(model).prove()(torch.arange(3)[None])
    assert vars(model)["forward"] is patched
