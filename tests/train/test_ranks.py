"""Two processes train, measure and save what one process does. They are started once for all tests here."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import builders
import numpy as np
import pytest
import running
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tailkd.data.batches import Batch, Batches, collate, evaluation_batches
from tailkd.data.packing import IGNORED, Row
from tailkd.errors import Refusal
from tailkd.evaluate.heldout import HeldOut, evaluate
from tailkd.models.head import SplitModel
from tailkd.objective import Head, Objective, Tally, distillation_loss
from tailkd.objective.layout import with_sequences
from tailkd.objective.tally import add
from tailkd.teacher.live import LiveTeacher
from tailkd.train import parallel
from tailkd.train.optim import build_optimizer
from tailkd.train.ranks import ALONE, VARIABLES, Ranks
from tailkd.train.step import Step

RANKS, STEPS, BATCH, MICRO = 2, 3, 8, 2
VOCABULARY, USABLE, CONTEXT = 101, 97, 14  # vocabularies that do not divide among the ranks
OBJECTIVE = Objective(top_k=5)
CLIP = 0.5
VALID = (13, 12, 0, 1, 14, 0, 3, 0, 9, 2, 14, 0)  # positions with a label in each row
EXACT = {
    f"{strategy}, {head}, {embeddings}": SimpleNamespace(
        strategy=strategy, tied=head == "tied", frozen=embeddings == "frozen", dtype="float32"
    )
    for strategy in ("fsdp", "ddp")
    for head in ("tied", "untied")
    for embeddings in ("trained", "frozen")
}
BFLOAT16 = {
    f"{strategy}, bfloat16": SimpleNamespace(strategy=strategy, tied=tied, frozen=False, dtype="bfloat16")
    for strategy, tied in (("fsdp", True), ("ddp", False))
}
CASES = {**EXACT, **BFLOAT16}


# ----- the run, the same function on one process and on two


class FixedRows(list[Row]):
    context = CONTEXT


def rows() -> FixedRows:
    generator = np.random.default_rng(3)
    found = FixedRows()
    for valid in VALID:
        ids = generator.integers(USABLE, size=CONTEXT + 1)
        labels = np.where(np.arange(CONTEXT) < valid, ids[1:], IGNORED)
        found.append(Row(ids[:-1], labels, np.zeros(CONTEXT, dtype=np.int64)))
    return found


def global_batches() -> Batches:
    return Batches(rows(), batch_size=BATCH, seed=1)  # type: ignore[arg-type]


def heldout_batches() -> Iterator[Batch]:
    """Three batches, so that the second rank has none in the last round."""
    return evaluation_batches(rows(), tokens=None, batch_size=5)  # type: ignore[arg-type]


def student_of(case: SimpleNamespace, *, seed: int = 1) -> Any:
    model = builders.build_model(VOCABULARY, tie_word_embeddings=case.tied, seed=seed)
    for parameter in model.parameters():  # larger matrices, so that some probabilities are large and calibration too
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.3)
    model.get_input_embeddings().weight.requires_grad_(not case.frozen)
    return model


def models_of(case: SimpleNamespace, ranks: Ranks) -> tuple[SplitModel, LiveTeacher]:
    """The student shared out after its head was proved; a teacher of its own, sharded beside an FSDP2 student."""
    dtype = getattr(torch, case.dtype)
    student = SplitModel(student_of(case), usable=USABLE, compute_dtype=dtype).prove()
    student.model = parallel.shard(student.model, ranks, case.strategy)
    teacher = builders.build_model(VOCABULARY, hidden=16, seed=2)
    teacher = parallel.place_teacher(teacher, ranks, sharded=case.strategy == "fsdp")
    return student, LiveTeacher(teacher, usable=USABLE, compute_dtype=dtype)


def accumulate(student: SplitModel, teacher: LiveTeacher, batch: Batch, ranks: Ranks) -> dict[str, Tally]:
    """This rank's part of the gradient of the batch's mean loss, in micro-batches."""
    parts: dict[str, Tally] = {}
    micros = list(batch.part(ranks.rank, ranks.world).micro_batches(MICRO))
    for number, micro in enumerate(micros):
        with parallel.without_sync(student, last=number == len(micros) - 1):
            layout = with_sequences(micro.valid, micro.row_borders, CONTEXT, None)
            signal = teacher(micro)
            head = student(micro.input_ids)
            loss = distillation_loss(head, signal, micro.labels, objective=OBJECTIVE, layout=layout)
            loss.mean(batch.count / ranks.world).backward()
        parts = add(parts, loss.parts)
    return parts


def train(student: SplitModel, teacher: LiveTeacher, ranks: Ranks) -> dict[str, Any]:
    optimizer = build_optimizer(student.plain, learning_rate=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    found: dict[str, Any] = {"losses": [], "norms": [], "samples": []}
    for step in range(STEPS):
        batch = global_batches()[step]
        student.model.train()
        optimizer.zero_grad(set_to_none=True)
        parts = accumulate(student, teacher, batch, ranks)
        found["norms"].append(float(parallel.clip_gradients(student.model, CLIP)))
        optimizer.step()
        sums = ranks.summed(torch.stack([tally.sum for tally in parts.values()]))
        weights = ranks.summed(torch.tensor([float(tally.weight) for tally in parts.values()]))
        assert weights[0] == batch.count
        found["losses"].append(dict(zip(parts, (sums / batch.count).tolist(), strict=True)))
        samples = ranks.gathered(batch.part(ranks.rank, ranks.world).samples)
        found["samples"].append([sample for share in samples for sample in share])
    return found


def run(case: SimpleNamespace, ranks: Ranks) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Measured before, trained, measured after; and the weights (rank 0)."""
    student, teacher = models_of(case, ranks)
    before = measure(student, teacher, ranks)
    found = train(student, teacher, ranks)
    found["heldout"] = [before, measure(student, teacher, ranks)]
    found["teacher"] = measure(teacher.split, teacher, ranks)
    found["written"] = student.plain.generate(
        torch.arange(4)[None], max_new_tokens=6, do_sample=False, pad_token_id=0
    ).tolist()
    student.settle()
    return found, parallel.full_state(student.model, ranks)


def measure(student: SplitModel, teacher: LiveTeacher, ranks: Ranks) -> dict[str, Any]:
    found: HeldOut = evaluate(student, teacher, heldout_batches(), top_k=5, ranks=ranks)
    return {"measures": found.measures, "rows": found.rows, "reliability": found.reliability}


# ----- what each rank does


def work(folder: Path) -> dict[str, Any]:
    ranks = Ranks.start()
    found: dict[str, Any] = {"ranks": [ranks.rank, ranks.world, str(ranks.device), ranks.leads]}
    found["exchanges"] = exchanges(ranks)
    found["turns"] = turns(ranks, folder)
    for name, case in CASES.items():
        found[name], state = run(case, ranks)
        assert bool(state) == ranks.leads
        if ranks.leads:
            save_file(state, folder / f"{name}.safetensors")
    found["units"] = units(ranks)
    found["stopped"] = stopped(ranks)
    found["skipped"] = skipped(ranks)
    found["refused"] = refused(ranks)
    found["waiting"] = [waiting(ranks, strategy) for strategy in ("fsdp", "ddp")]
    for head in ("tied", "untied"):
        save_student(EXACT[f"fsdp, {head}, trained"], ranks, folder / head)
    ranks.finish()
    return found


def exchanges(ranks: Ranks) -> dict[str, Any]:
    values = torch.tensor([1.0 + ranks.rank, -5.0 * ranks.rank], dtype=torch.float64)
    found = {
        "largest": ranks.largest(values).tolist(),
        "summed": ranks.summed(values).tolist(),
        "tensors": [value.tolist() for value in ranks.gathered(torch.arange(1 + ranks.rank))],
        "objects": ranks.gathered({"rank": ranks.rank}),
    }
    assert values.tolist() == [1.0 + ranks.rank, -5.0 * ranks.rank]  # what was given is left as it was
    return found


def turns(ranks: Ranks, folder: Path) -> bool:
    """Does the second rank find what the first one made in its turn?"""
    with ranks.in_turns():
        there = (folder / "made").exists()
        (folder / "made").touch()
    return there


def units(ranks: Ranks) -> list[str]:
    """Which modules are an FSDP2 unit; and evaluation leaves every parameter a shard."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    student, teacher = models_of(EXACT["fsdp, untied, trained"], ranks)
    measure(student, teacher, ranks)
    assert all(isinstance(p, DTensor) for p in student.plain.parameters())
    assert all(p.dtype == torch.float32 for p in student.plain.parameters())
    return [name for name, module in student.plain.named_modules() if isinstance(module, FSDPModule)]


def stopped(ranks: Ranks) -> list[Any]:
    """The second rank wants to stop before its second batch; all stop there, and the student trains on."""
    student, teacher = models_of(EXACT["fsdp, tied, trained"], ranks)
    student.model.train()
    calls = 0

    def heed() -> None:
        nonlocal calls
        calls += 1
        if ranks.largest(torch.tensor([float(ranks.rank == 1 and calls == 2)])) > 0:
            raise InterruptedError

    try:
        evaluate(student, teacher, heldout_batches(), top_k=5, ranks=ranks, heed=heed)
    except InterruptedError:
        return [calls, student.model.training]
    return ["went on"]


def waiting(ranks: Ranks, strategy: str) -> bool:
    """Do gradients stay on their rank until the last micro-batch?"""
    student, teacher = models_of(EXACT[f"{strategy}, tied, trained"], ranks)
    student.settle()  # also before anything was gathered
    batch = global_batches()[0].part(ranks.rank, ranks.world)
    with parallel.without_sync(student, last=False):
        distillation_loss(student(batch.input_ids), teacher(batch), batch.labels, objective=OBJECTIVE).sum.backward()
    grads = [p.grad for p in student.plain.parameters()]
    if strategy == "fsdp":
        return all(grad is None for grad in grads)
    first, second = ranks.gathered(torch.cat([grad.flatten() for grad in grads if grad is not None]))
    return not torch.allclose(first, second)


def skipped(ranks: Ranks) -> list[Any]:
    """The second rank's teacher alone is not finite, where nothing is learned: the losses do not show it."""
    student, teacher = models_of(EXACT["ddp, tied, trained"], ranks)

    def damaged(batch: Batch) -> Head:
        head = teacher(batch)
        assert isinstance(head, Head)
        unlearned = (batch.labels == IGNORED).unsqueeze(-1) & (ranks.rank == 1)
        return replace(head, hidden=head.hidden.masked_fill(unlearned, float("nan")))

    optimizer = build_optimizer(student.plain, learning_rate=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    before = [p.detach().clone() for p in student.plain.parameters()]
    step = Step(student, damaged, OBJECTIVE, optimizer, micro_batch_size=MICRO, clip_norm=CLIP, ranks=ranks)
    result = step(global_batches()[0])
    same = all(torch.equal(a, b) for a, b in zip(before, student.plain.parameters(), strict=True))
    return [result.not_finite, same]


def refused(ranks: Ranks) -> str:
    try:
        parallel.shard(student_of(EXACT["ddp, tied, trained"], seed=1 + ranks.rank), ranks, "ddp")
    except Refusal as refusal:
        return str(refusal)
    return "nothing"


def save_student(case: SimpleNamespace, ranks: Ranks, folder: Path) -> None:
    student, teacher = models_of(case, ranks)
    measure(student, teacher, ranks)
    state = parallel.full_state(student.model, ranks)
    if ranks.leads:
        student.plain.save_pretrained(folder, state_dict=state)
    ranks.wait()


# ----- the tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes, started as torchrun starts them, left what they found."""
    folder = tmp_path_factory.mktemp("ranks")
    running.run_file(__file__, folder, ranks=RANKS)
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(RANKS)]


@functools.cache
def alone(tied: bool, frozen: bool, dtype: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return run(SimpleNamespace(strategy="auto", tied=tied, frozen=frozen, dtype=dtype), ALONE)


def one_process(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    case = CASES[name]
    return alone(case.tied, case.frozen, case.dtype)


def test_the_case_is_a_hard_one() -> None:
    parts = [global_batches()[step].part(rank, RANKS) for step in range(STEPS) for rank in range(RANKS)]
    counts = [part.count for part in parts]
    assert all(abs(a - b) > 5 for a, b in zip(counts[::2], counts[1::2], strict=True))
    assert any(micro.count == 0 for part in parts for micro in part.micro_batches(MICRO))
    expected = one_process("fsdp, tied, trained")[0]
    assert min(expected["norms"]) > CLIP
    assert expected["losses"][0]["loss"] > expected["losses"][0]["clm"] > 0


@pytest.mark.parametrize("name", EXACT)
def test_losses_and_norms_are_those_of_one_process(ranks: list[dict[str, Any]], name: str) -> None:
    expected = one_process(name)[0]
    for found in (rank[name] for rank in ranks):
        for ours, theirs in zip(found["losses"], expected["losses"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)
        # A wrong divisor shows here alone: clipping and AdamW take a common factor of the gradients out of the weights.
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-5)
        assert found["samples"] == expected["samples"]


def test_an_update_is_skipped_by_all_or_none(ranks: list[dict[str, Any]]) -> None:
    assert [rank["skipped"] for rank in ranks] == [["teacher's hidden states", True]] * RANKS


@pytest.mark.parametrize("name", EXACT)
def test_weights_are_those_of_one_process(ranks: list[dict[str, Any]], folder: Path, name: str) -> None:
    expected, found = one_process(name)[1], load_file(folder / f"{name}.safetensors")
    assert found.keys() == expected.keys()
    assert ("lm_head.weight" in found) == ("untied" in name)
    worst = {key: float((found[key] - expected[key]).abs().max()) for key in expected}
    assert max(worst.values()) < 1e-5, worst
    before = student_of(CASES[name]).get_input_embeddings().weight
    assert torch.equal(found["model.embed_tokens.weight"], before) == CASES[name].frozen


@pytest.mark.parametrize("name", BFLOAT16)
def test_bfloat16_products_stay_in_their_band(ranks: list[dict[str, Any]], folder: Path, name: str) -> None:
    expected, weights = one_process(name)
    for found in (rank[name] for rank in ranks):
        ours, theirs = ([step["loss"] for step in side["losses"]] for side in (found, expected))
        assert ours == pytest.approx(theirs, rel=1e-4)
    saved = load_file(folder / f"{name}.safetensors")
    assert all(saved[key].dtype == torch.float32 for key in weights)
    start = student_of(CASES[name]).state_dict()
    moved = {key: (saved[key] - start[key], weights[key] - start[key]) for key in weights}
    ours, theirs = (torch.cat([pair[side].flatten() for pair in moved.values()]) for side in (0, 1))
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.9999


@pytest.mark.parametrize("name", EXACT)
def test_evaluation_is_that_of_one_process(ranks: list[dict[str, Any]], name: str) -> None:
    assert ranks[0][name] == ranks[1][name]
    expected = json.loads(json.dumps(one_process(name)[0]))
    assert_same(ranks[0][name]["heldout"][0], expected["heldout"][0], 1e-9)  # the same weights
    assert_same(ranks[0][name]["teacher"], expected["teacher"], 1e-9)
    assert_same(ranks[0][name]["heldout"][1], expected["heldout"][1], 1e-5)  # weights equal within 1e-5
    assert min(measured["measures"][error] for measured in expected["heldout"] for error in ("ece", "full_ece")) > 0.01
    assert ranks[0][name]["written"] == expected["written"]


def assert_same(found: dict[str, Any], expected: dict[str, Any], rel: float) -> None:
    tail_mass = expected["measures"]["tail_mass"]
    assert found["measures"]["tail_mass"] == pytest.approx(tail_mass, rel=rel)
    for name in expected["measures"].keys() - {"tail_mass"}:
        crossing = name == "log_ece" and rel > 1e-6  # a nearly equal probability may lie beyond the border of its bin
        slack = 1e-3 if crossing else 1e-15
        assert found["measures"][name] == pytest.approx(expected["measures"][name], rel=rel, abs=slack), name
    assert found["rows"].keys() == expected["rows"].keys()
    for name, values in expected["rows"].items():
        assert found["rows"][name] == pytest.approx(values, rel=rel, abs=1e-12), name
    assert len(found["reliability"]) == len(expected["reliability"])
    for ours, theirs in zip(found["reliability"], expected["reliability"], strict=True):
        assert ours == pytest.approx(theirs, rel=rel)


def test_the_saved_student_is_that_of_one_process(ranks: list[dict[str, Any]], folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    for head in ("tied", "untied"):
        expected = student_of(EXACT[f"fsdp, {head}, trained"])
        again = AutoModelForCausalLM.from_pretrained(folder / head)
        assert json.loads((folder / head / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
        assert ("lm_head.weight" in load_file(folder / head / "model.safetensors")) == (head == "untied")
        for name, value in expected.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name


def test_ranks_speak_to_each_other(ranks: list[dict[str, Any]]) -> None:
    assert [rank["ranks"] for rank in ranks] == [[0, 2, "cpu", True], [1, 2, "cpu", False]]
    for rank in ranks:
        assert rank["exchanges"] == {
            "largest": [2.0, 0.0],
            "summed": [3.0, -5.0],
            "tensors": [[0], [0, 1]],
            "objects": [{"rank": 0}, {"rank": 1}],
        }
    assert [rank["turns"] for rank in ranks] == [False, True]


def test_blocks_and_the_rest_are_units_and_the_vocabulary_is_none(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["units"] == ["", "model.layers.0", "model.layers.1"]


def test_all_ranks_stop_an_evaluation_at_the_same_batch(ranks: list[dict[str, Any]]) -> None:
    assert [rank["stopped"] for rank in ranks] == [[2, True]] * RANKS


def test_gradients_stay_on_their_rank_until_the_last_micro_batch(ranks: list[dict[str, Any]]) -> None:
    assert [rank["waiting"] for rank in ranks] == [[True, True]] * RANKS


def test_ranks_that_hold_different_weights_are_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "rank 1 holds another student than rank 0: 15 of 20 weights differ" in rank["refused"]


def test_one_process_exchanges_nothing() -> None:
    values = torch.arange(3)
    assert ALONE.largest(values) is values
    assert ALONE.summed(values) is values
    assert ALONE.gathered("x") == ["x"]
    assert ALONE.leads
    with ALONE.in_turns():
        ALONE.wait()
    ALONE.finish()
    model = nn.Linear(2, 2)
    assert parallel.shard(model, ALONE, "fsdp") is model
    assert parallel.place_teacher(model, ALONE, sharded=True) is model


def test_start_reads_torchruns_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert Ranks.start() is Ranks.alone() is ALONE
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(Refusal, match=r"came \{'WORLD_SIZE': '4'\}; expected three numbers: start with `torchrun"):
        Ranks.start()
    for name in VARIABLES:
        monkeypatch.setenv(name, "x")
    with pytest.raises(Refusal, match="expected three numbers"):
        Ranks.start()


def test_the_strategy_follows_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(10, 10)
    assert [parallel.chosen(model, name) for name in ("auto", "fsdp", "ddp")] == ["ddp", "fsdp", "ddp"]
    monkeypatch.setattr(parallel, "DDP_PARAMETERS", 110)
    assert parallel.chosen(model, "auto") == "fsdp"
    with pytest.raises(ValueError, match="strategy is 'zero'; expected one of auto, ddp, fsdp"):
        parallel.chosen(model, "zero")


def test_blocks_are_what_the_model_declares_or_its_longest_list() -> None:
    model = builders.build_model(VOCABULARY, layers=3)
    layers = list(model.model.layers)
    assert parallel.blocks(model) == layers[::-1]
    model._no_split_modules = None
    assert parallel.blocks(model) == layers[::-1]
    model._no_split_modules = {"LlamaModel"}  # holds the embeddings, which belong to the root
    assert parallel.blocks(model) == layers[::-1]


def test_parts_are_the_rows_of_the_batch_in_order() -> None:
    whole = global_batches()[0]
    for world in (1, 2, 4, 8):
        parts = [whole.part(rank, world) for rank in range(world)]
        assert tuple(sample for part in parts for sample in part.samples) == whole.samples
        for name in ("input_ids", "labels", "segments"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
        assert sum(part.count for part in parts) == whole.count
        for part in parts:
            again = collate(
                [
                    Row(*(tensor[i].numpy() for tensor in (part.input_ids, part.labels, part.segments)))
                    for i in range(len(part))
                ],
                part.samples,
            )
            assert torch.equal(part.valid, again.valid)
            assert (part.row_borders, part.segment_borders) == (again.row_borders, again.segment_borders)


def test_a_batch_that_does_not_divide_is_refused() -> None:
    batch = global_batches()[0]
    with pytest.raises(Refusal, match="batch_size is 8, which does not divide by 3 processes; take 6 or 9, or another"):
        batch.part(0, 3)
    with pytest.raises(Refusal, match="does not divide by 16 processes; take 16, or another"):
        batch.part(0, 16)


if __name__ == "__rank__":
    result = work(Path(sys.argv[1]))
    (Path(sys.argv[1]) / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(result))


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "6"), ("LOCAL_RANK", "5")):
        monkeypatch.setenv(name, value)
    with pytest.raises(Refusal, match=r"process 5 of this machine has no GPU: there are 4; start torchrun with"):
        Ranks.start()


def test_other_weights_on_another_rank_are_refused() -> None:
    class Two(Ranks):
        def gathered(self, value: Any) -> list[Any]:
            return [value, {**value, "lm_head.weight": 1}]

    model = builders.build_model(50, tie_word_embeddings=False)
    with pytest.raises(Refusal, match=r"rank 1 holds another student than rank 0: 1 of .* weights differ"):
        parallel.refuse_different("student", model, Two(0, 2))
