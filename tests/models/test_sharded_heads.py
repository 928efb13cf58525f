"""Two processes that share a model by FSDP2 find the gradient that one process finds for the whole batch."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import builders
import pytest
import torch
from torch import Tensor, nn

from tailkd.models.head import SplitModel
from tailkd.objective import Objective, distillation_loss
from tailkd.teacher.live import LiveTeacher

RANKS = 2
VOCABULARY, USABLE = 101, 97  # neither divides among the ranks
OBJECTIVE = Objective(top_k=5)
STUDENTS: dict[str, dict[str, Any]] = {
    "tied": {"tied": True},
    "tied, root freed after forward": {"tied": True, "root": {"reshard_after_forward": True}},
    "untied": {"tied": False},
    "untied, head its own unit": {"tied": False, "head_apart": True},
    "untied with bias, head its own unit": {"tied": False, "head_apart": True, "bias": True},
}
TEACHERS: dict[str, dict[str, Any]] = {
    "root kept": {},
    "root freed after forward": {"reshard_after_forward": True},
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, float]]]:
    """What each rank found: for each case the relative errors of its loss and of every gradient."""
    store = str(tmp_path_factory.mktemp("ranks") / "store")
    code = f"import runpy; runpy.run_path({__file__!r}, run_name='__rank__')"
    paths = json.dumps(sys.path)  # the tests' own helpers too
    code = f"import json, sys; sys.path[:] = json.loads({paths!r}); {code}"
    with ThreadPoolExecutor(RANKS) as pool:
        done = pool.map(lambda rank: builders.fresh_python(code, str(rank), store), range(RANKS))
    return [json.loads(process.stdout.splitlines()[-1]) for process in done]


@pytest.mark.parametrize("case", STUDENTS)
def test_gradients_of_a_sharded_student_are_those_of_one_process(
    ranks: list[dict[str, dict[str, float]]], case: str
) -> None:
    for errors in (rank[case] for rank in ranks):
        assert len(errors) > 10
        assert "model.embed_tokens.weight" in errors
        assert ("lm_head.weight" in errors) == ("untied" in case)
        assert ("lm_head.bias" in errors) == ("bias" in case)
        assert {name: error for name, error in errors.items() if not error < 1e-6} == {}


@pytest.mark.parametrize("case", TEACHERS)
def test_a_sharded_teacher_gives_the_loss_of_a_whole_one(ranks: list[dict[str, dict[str, float]]], case: str) -> None:
    for errors in (rank[f"teacher, {case}"] for rank in ranks):
        assert errors.keys() == {"loss", "parts"}
        assert max(errors.values()) < 1e-6


def student_of(tied: bool, bias: bool) -> Any:
    model = builders.build_model(VOCABULARY, tie_word_embeddings=tied, seed=1)
    for parameter in model.parameters():  # larger weights, so that the divergence matters
        nn.init.normal_(parameter, std=0.3)
    if bias:
        model.lm_head.bias = nn.Parameter(torch.randn(VOCABULARY))
    return model.train()


def teacher_of() -> Any:
    return builders.build_model(VOCABULARY, hidden=16, seed=2)


def shard(model: Any, *, head_apart: bool = False, **root: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    for block in model.model.layers:
        fully_shard(block)
    if head_apart:
        fully_shard(model.lm_head)
    return fully_shard(model, **root)


def whole_batch() -> tuple[Tensor, Tensor]:
    """Four rows with 13, 12, 3 and 1 valid positions: the ranks' halves are far apart."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(USABLE, (4, 14), generator=generator)
    labels = ids.roll(-1, 1)
    for row, valid in enumerate((13, 12, 3, 1)):
        labels[row, valid:] = -100
    return ids, labels


def sum_gradients(split: SplitModel, teacher: LiveTeacher, rows: range, divisor: float) -> None:
    """One micro-batch a row."""
    ids, labels = whole_batch()
    for row in rows:
        place = slice(row, row + 1)
        signal = teacher(SimpleNamespace(input_ids=ids[place], position_ids=None))
        loss = distillation_loss(split(ids[place]), signal, labels[place], objective=OBJECTIVE)
        loss.mean(divisor).backward()


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in found.items()}


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).detach().abs().max() / expected.detach().abs().max())


def student_errors(
    rank: int, *, tied: bool, head_apart: bool = False, bias: bool = False, root: dict[str, Any] | None = None
) -> dict[str, float]:
    teacher = LiveTeacher(teacher_of(), usable=USABLE)
    total = int((whole_batch()[1] != -100).sum())
    alone, shared = student_of(tied, bias), shard(student_of(tied, bias), head_apart=head_apart, **(root or {}))
    sum_gradients(SplitModel(alone, usable=USABLE), teacher, range(4), total)
    sum_gradients(SplitModel(shared, usable=USABLE), teacher, range(2 * rank, 2 * rank + 2), total / RANKS)
    expected, got = gradients(alone), gradients(shared)
    return {name: relative(got[name], expected[name]) for name in expected}


def teacher_errors(rank: int, root: dict[str, Any]) -> dict[str, float]:
    ids, labels = (tensor[2 * rank : 2 * rank + 2] for tensor in whole_batch())
    split = SplitModel(student_of(True, False), usable=USABLE)
    found = []
    for model in (teacher_of(), shard(teacher_of(), **root)):
        teacher = LiveTeacher(model, usable=USABLE)
        signal = [teacher(SimpleNamespace(input_ids=ids, position_ids=None)) for _ in range(2)][-1]
        loss = distillation_loss(split(ids), signal, labels, objective=OBJECTIVE)
        found.append((loss.sum, torch.stack([tally.sum for tally in loss.parts.values()])))
    (loss, parts), (shared_loss, shared_parts) = found
    return {"loss": relative(shared_loss, loss), "parts": relative(shared_parts, parts)}


def work(rank: int, store: str) -> dict[str, dict[str, float]]:
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    found = {case: student_errors(rank, **settings) for case, settings in STUDENTS.items()}
    found |= {f"teacher, {case}": teacher_errors(rank, root) for case, root in TEACHERS.items()}
    dist.destroy_process_group()
    return found


if __name__ == "__rank__":
    print(json.dumps(work(int(sys.argv[1]), sys.argv[2])))
