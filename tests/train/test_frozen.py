"""Students with frozen embeddings, on one process and on two that are started once for all tests here."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import running
import torch
import transformers
from safetensors.torch import load_file
from teachers import build_teacher
from torch import Tensor

from tailkd.data.batches import Batches
from tailkd.data.packing import IGNORED, Row
from tailkd.models.head import SplitModel
from tailkd.models.shrink import Cut, cut_student, freeze_embeddings
from tailkd.objective import Objective
from tailkd.objective.hidden import hidden_loss
from tailkd.teacher.live import LiveTeacher
from tailkd.train import parallel, tensors
from tailkd.train.checkpoint import Checkpoints, Cursor
from tailkd.train.optim import build_optimizer
from tailkd.train.ranks import ALONE, Ranks
from tailkd.train.step import Step

RANKS, STEPS, SAVED, BATCH, CONTEXT, VOCABULARY = 2, 50, 47, 4, 12, 61
FAMILIES = ("Gemma2", "Phi")  # tied; untied, with a bias
STRATEGIES = ("fsdp", "ddp")
SHARED_OUT = (("Gemma2", "fsdp"), ("Gemma2", "ddp"), ("Phi", "fsdp"))
CASES = (*((family, "one") for family in FAMILIES), *SHARED_OUT)
EMBEDDINGS = "model.embed_tokens.weight"


# ----- the run, the same function on one process and on two


class FixedRows(list[Row]):
    context = CONTEXT


def batches() -> Batches:
    """Batch n + 10 is not batch n: rows are drawn anew in each round."""
    generator = np.random.default_rng(3)
    rows = FixedRows()
    for valid in (12, 3, 7, 12, 1, 9, 0, 12) * 5:
        ids = generator.integers(VOCABULARY, size=CONTEXT + 1)
        labels = np.where(np.arange(CONTEXT) < valid, ids[1:], IGNORED)
        rows.append(Row(ids[:-1], labels, np.zeros(CONTEXT, dtype=np.int64)))
    return Batches(rows, batch_size=BATCH, seed=1)  # type: ignore[arg-type]


def teacher_of(family: str) -> Any:
    return build_teacher(family, num_hidden_layers=2)


def student_of(family: str, *, frozen: bool = True) -> Any:
    student = cut_student(teacher_of(family), Cut(layers=1, intermediate_size=16))
    if frozen:
        freeze_embeddings(student)
    return student


def step_of(family: str, strategy: str, ranks: Ranks, *, frozen: bool = True) -> Step:
    student = SplitModel(student_of(family, frozen=frozen)).prove()
    student.model = parallel.shard(student.model, ranks, strategy).train()
    return Step(
        student=student,
        teacher=LiveTeacher(teacher_of(family), usable=VOCABULARY),
        objective=Objective(top_k=5),
        optimizer=build_optimizer(student.model, learning_rate=3e-3, betas=(0.9, 0.95), weight_decay=0.1),
        micro_batch_size=2,
        clip_norm=0.5,
        ranks=ranks,
    )


def trained(family: str, strategy: str, ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Train for `STEPS` steps with a checkpoint near the end, once more from that one, and save the student."""
    found: dict[str, Any] = {}
    found["start"], state = go(step_of(family, strategy, ranks), folder, save=True)
    found["resumed"], again = go(step_of(family, strategy, ranks), folder, save=False)
    found["same"] = state.keys() == again.keys() and all(torch.equal(state[name], again[name]) for name in state)
    if ranks.leads:
        student_of(family).save_pretrained(folder / "saved", state_dict=state)
    return found


def go(step: Step, folder: Path, *, save: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    ranks, model = step.ranks, step.student.model
    norms, losses = [], []
    with Checkpoints(folder / "checkpoints", identity={"test": "frozen"}) as checkpoints:
        cursor = Cursor() if save else checkpoints.resume(model, step.optimizer)
        for number in range(cursor.step, STEPS):
            result = step(batches()[number])
            norms.append(result.gradient_norm)
            losses.append(result.parts["loss"].mean())
            if save and number + 1 == SAVED:
                checkpoints.save(model, step.optimizer, Cursor(SAVED))
    moments = tensors.moments(model, step.optimizer)
    found = {"step": cursor.step, "norms": norms, "losses": losses, "moments": sorted(moments)}
    found["held"] = sum(len(group["params"]) for group in step.optimizer.param_groups)
    return found, parallel.full_state(model, ranks)


# ----- hidden states from within


def states_gradients(strategy: str, ranks: Ranks) -> dict[str, Tensor]:
    """Of the cosine loss of a state from within and the last one, over rows that the ranks share."""
    model = cut_student(teacher_of("Gemma2"), Cut(layers=2)).train()
    student = SplitModel(model)
    student.model = parallel.shard(model, ranks, strategy)
    teacher = LiveTeacher(teacher_of("Gemma2"), usable=VOCABULARY)
    batch = batches()[0]
    own = batch.part(ranks.rank, ranks.world)
    for number, micro in enumerate(own.micro_batches(1), 1):
        with torch.no_grad():
            _, wanted = teacher.split.with_states(micro.input_ids, (2, -1))
        with parallel.without_sync(student, last=number == len(own)):
            head, states = student.with_states(micro.input_ids, (1, -1))
            loss = hidden_loss(states, wanted, micro.labels != IGNORED) + 1e-3 * head.logits().square().sum()
            (loss / (batch.count / ranks.world)).backward()
    found = {name: p.grad for name, p in student.plain.named_parameters()}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in found.items()}


# ----- what each rank does


def work(folder: Path) -> dict[str, Any]:
    ranks = Ranks.start()
    found: dict[str, Any] = {}
    for family, strategy in SHARED_OUT:
        found[f"{family}, {strategy}"] = trained(family, strategy, ranks, folder / f"{family}-{strategy}")
    for strategy in STRATEGIES:
        found[f"states, {strategy}"] = errors(states_gradients(strategy, ranks))
    ranks.finish()
    return found


def errors(found: dict[str, Tensor]) -> dict[str, float]:
    expected = states_gradients("auto", ALONE)
    assert found.keys() == expected.keys()
    return {name: float((found[name] - value).abs().max() / value.abs().max()) for name, value in expected.items()}


# ----- the tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes, started as torchrun starts them, left what they found."""
    folder = tmp_path_factory.mktemp("frozen")
    running.run_file(__file__, folder, ranks=RANKS)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What one process found, and what each of two did, by case."""
    ranks = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(RANKS)]
    cases = {name: [rank[name] for rank in ranks] for name in ranks[0]}
    for family in FAMILIES:
        cases[f"{family}, one"] = [trained(family, "auto", ALONE, folder / f"{family}-one")]
    return cases


@pytest.mark.parametrize(("family", "how"), CASES)
def test_embeddings_are_bit_equal_after_fifty_steps(found: dict[str, Any], folder: Path, family: str, how: str) -> None:
    saved = load_file(folder / f"{family}-{how}" / "saved" / "model.safetensors")
    before = student_of(family).state_dict()
    assert len(found[f"{family}, {how}"][0]["start"]["losses"]) == STEPS
    same = {name for name, value in saved.items() if torch.equal(value, before[name])}
    assert same == {EMBEDDINGS}
    assert torch.equal(saved[EMBEDDINGS], teacher_of(family).get_input_embeddings().weight)


@pytest.mark.parametrize(("family", "how"), CASES)
def test_a_saved_student_is_tied_as_it_was(found: dict[str, Any], folder: Path, family: str, how: str) -> None:
    assert found
    saved = folder / f"{family}-{how}" / "saved"
    tied = family == "Gemma2"
    assert ("lm_head.weight" in load_file(saved / "model.safetensors")) != tied
    again: Any = transformers.AutoModelForCausalLM.from_pretrained(saved)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert torch.equal(again.model.embed_tokens.weight, teacher_of(family).get_input_embeddings().weight)


@pytest.mark.parametrize(("family", "how"), CASES)
def test_the_optimizer_holds_nothing_for_them(found: dict[str, Any], family: str, how: str) -> None:
    trainable = {name for name, p in student_of(family).named_parameters() if p.requires_grad}
    assert ("lm_head.weight" in trainable) == (family == "Phi")
    expected = {f"optimizer.{name}.{key}" for name in trainable for key in ("exp_avg", "exp_avg_sq", "step")}
    for rank in found[f"{family}, {how}"]:
        assert set(rank["start"]["moments"]) == set(rank["resumed"]["moments"]) == expected
        assert rank["start"]["held"] == len(trainable)


@pytest.mark.parametrize(("family", "how"), CASES)
def test_a_resumed_run_ends_in_the_same_bits(found: dict[str, Any], family: str, how: str) -> None:
    for rank in found[f"{family}, {how}"]:
        assert rank["resumed"]["step"] == SAVED
        assert rank["resumed"]["losses"] == rank["start"]["losses"][SAVED:]
        assert rank["same"]


@pytest.mark.parametrize(("family", "strategy"), SHARED_OUT)
def test_two_processes_train_as_one(found: dict[str, Any], family: str, strategy: str) -> None:
    (alone,) = found[f"{family}, one"]
    assert alone["start"]["losses"][-1] < alone["start"]["losses"][0]
    for rank in found[f"{family}, {strategy}"]:
        assert rank["start"]["losses"][:5] == pytest.approx(alone["start"]["losses"][:5], rel=1e-5)
        assert rank["start"]["norms"][:5] == pytest.approx(alone["start"]["norms"][:5], rel=1e-4)


@pytest.mark.parametrize(("family", "how"), CASES)
def test_the_norm_that_is_clipped_is_that_of_the_trained(found: dict[str, Any], family: str, how: str) -> None:
    free = step_of(family, "auto", ALONE, frozen=False)
    free._accumulate(batches()[0])
    squares = {name: float(p.grad.square().sum()) for name, p in free.student.plain.named_parameters()}
    assert squares.pop(EMBEDDINGS) > 1e-3 * sum(squares.values())
    expected = sum(squares.values()) ** 0.5
    assert found[f"{family}, {how}"][0]["start"]["norms"][0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_of_inner_states_are_those_of_one_process(found: dict[str, Any], strategy: str) -> None:
    for rank in found[f"states, {strategy}"]:
        assert len(rank) > 20
        assert max(rank.values()) < 1e-5


if __name__ == "__rank__":
    result = work(Path(sys.argv[1]))
    (Path(sys.argv[1]) / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(result))
