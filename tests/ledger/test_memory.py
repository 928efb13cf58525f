"""The rehearsal on tensors without values against storages that are counted while a real micro-batch runs."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, tiny
from transformers import AutoModelForCausalLM

from tailkd.data.batches import Batch as Rows
from tailkd.ledger import Batch, Teacher, memory, rehearsal
from tailkd.ledger.memory import disk
from tailkd.ledger.rehearsal import Living, Players, rehearse
from tailkd.models.head import SplitModel
from tailkd.objective import Objective, blockwise
from tailkd.teacher.live import LiveTeacher, LiveTeachers
from tailkd.train.step import accumulate_gradients

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bill.py"
BFLOAT16 = torch.bfloat16
CASES = {
    "plain": Batch(3, 40),
    "accumulating": Batch(2, 40, accumulating=True),
    "checkpointing": Batch(2, 64, checkpointing=True),
    "bfloat16": Batch(2, 40, BFLOAT16, accumulating=True),
    "narrow": Batch(2, 40, usable=4000),
}


def configurations(family: str) -> tuple[Any, Any]:
    large = {"vocab_size": 4096, "hidden_size": 64, "intermediate_size": 160}
    return tiny(family, **large, num_hidden_layers=3), tiny(family, **large, num_hidden_layers=2)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside a block of the loss more lives than the rehearsal knows, a share of its 2 MiB: nothing beside a chunk."""
    for module in (blockwise, rehearsal):
        monkeypatch.setattr(module, "BLOCK_BYTES", 1 << 16)


def lived(student: Any, teachers: list[Any], batch: Batch, *, frozen: bool = False) -> int:
    """The most bytes alive above weights while real micro-batches run."""
    model = AutoModelForCausalLM.from_config(student).train()
    if frozen:
        model.get_input_embeddings().requires_grad_(False)
    if batch.checkpointing:
        model.gradient_checkpointing_enable()
    split = SplitModel(model, usable=batch.usable, compute_dtype=batch.compute)
    models = [AutoModelForCausalLM.from_config(teacher, dtype=batch.compute) for teacher in teachers]
    usable = batch.usable or student.vocab_size
    each = [LiveTeacher(one, usable=usable, compute_dtype=batch.compute) for one in models]
    signal = each[0] if len(each) == 1 else LiveTeachers(each, [1.0] * len(each))
    rows = batch.rows * (2 if batch.accumulating else 1)
    ids = torch.randint(3, 4000, (rows, batch.context))
    valid, borders = torch.arange(ids.numel()), tuple(range(0, ids.numel() + 1, batch.context))
    whole = Rows(ids, ids, torch.zeros_like(ids), valid, borders, borders, ids.numel(), tuple(range(rows)))
    with Living() as living:
        living.ignore(model)
        for one in models:
            living.ignore(one)
        accumulate_gradients(split, signal, whole, objective=Objective(), micro_batch_size=batch.rows)
        return living.peak


@pytest.mark.parametrize(("family", "case"), [*(("Qwen2", case) for case in CASES), ("Gemma2", "plain")])
def test_the_rehearsal_equals_what_lives_in_a_real_micro_batch(family: str, case: str) -> None:
    student, teacher = configurations(family)
    found = rehearse(Players(student, ((teacher, CASES[case].compute),)), CASES[case])
    expected = lived(student, [teacher], CASES[case])
    worst = max(found.teacher_forward, found.forward, found.loss, found.backward)
    assert worst == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("case", ["plain", "bfloat16", "narrow"])
def test_of_two_teachers_too(case: str) -> None:
    student, teacher = configurations("Llama")
    batch, teachers = CASES[case], [teacher, configurations("Qwen2")[1]]
    found = rehearse(Players(student, tuple((one, batch.compute) for one in teachers)), batch)
    worst = max(found.teacher_forward, found.forward, found.loss, found.backward)
    assert worst == pytest.approx(lived(student, teachers, batch), rel=0.02)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"Qwen2", "Gemma2"}))
def test_every_family_is_rehearsed(family: str) -> None:
    student, teacher = configurations(family)
    found = rehearse(Players(student, ((teacher, torch.float32),), frozen_embeddings=True), CASES["plain"])
    expected = lived(student, [teacher], CASES["plain"], frozen=True)
    assert max(found.forward, found.loss, found.backward) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("family", "case"), [("Llama", "bfloat16"), ("Llama", "checkpointing"), ("Gemma2", "plain")])
def test_a_few_blocks_tell_of_many(family: str, case: str) -> None:
    student = tiny(family, num_hidden_layers=6)
    players = Players(student, ((student, CASES[case].compute),))
    few, all_of_it = rehearse(players, CASES[case]), rehearse(players, CASES[case], whole=True)
    assert replace(few, backward_upper=0) == replace(all_of_it, backward_upper=0)
    assert few.backward == all_of_it.backward


def test_parts_and_moments() -> None:
    student, teacher = configurations("Llama")
    bill = memory(student, [Teacher(teacher, BFLOAT16)], Batch(2, 40), frozen_embeddings=True)
    model, other = (AutoModelForCausalLM.from_config(c) for c in (student, teacher))
    total = sum(p.numel() for p in model.parameters())
    trained = total - model.get_input_embeddings().weight.numel()
    assert (bill.weights, bill.gradients, bill.optimizer) == (4 * total, 4 * trained, 8 * trained)
    assert bill.teacher == 2 * sum(p.numel() for p in other.parameters()) + 2 * 2 * 40 * 64
    assert bill.total == max(bill.moments.values())
    assert bill.total <= bill.weights + bill.gradients + bill.optimizer + bill.teacher + bill.activations + (
        bill.objective + 8 * 4096 * 64  # the update's temporaries, or the gradient that the loss hands over
    )
    checkpointed = memory(student, [Teacher(teacher, BFLOAT16)], Batch(2, 40, checkpointing=True))
    assert checkpointed.activations < bill.activations / 4
    assert bill.as_dict()["objective"] == bill.objective


def test_the_update_of_large_weights_can_be_the_worst_moment() -> None:
    student = tiny("Llama", hidden_size=512, intermediate_size=2048)
    bill = memory(student, [], Batch(1, 8, device="cuda"))
    assert bill.teacher == 0
    assert bill.moments["update"] == bill.total
    small = memory(student, [], Batch(1, 8, device="cuda"), moment_bytes=2)
    assert bill.optimizer == 4 * small.optimizer


def test_disk_holds_one_checkpoint_more_than_is_kept() -> None:
    plain = {"keep_checkpoints": 2, "corpus_tokens": 1000}
    assert disk(10, 10, **plain, vocabulary=65536) == 3 * 120 + 40 + 2000
    assert disk(10, 6, **plain, vocabulary=65537) == 3 * 88 + 40 + 4000


@pytest.mark.slow
def test_six_shapes_are_predicted_within_a_quarter(tmp_path: Path) -> None:
    out = tmp_path / "bill.jsonl"
    done = subprocess.run([sys.executable, str(SCRIPT), "--out", str(out)], capture_output=True, text=True, check=False)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(rows) == 6
    assert all(abs(row["off"]) < 0.25 for row in rows)


def test_the_benchmark_writes_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("bill_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bill_benchmark", benchmark)  # its dataclasses ask for their module
    spec.loader.exec_module(benchmark)
    small = benchmark.Shape("Llama", benchmark.sizes(64, 16, 32, 1, 2, 2), None, 1, 8)
    monkeypatch.setitem(benchmark.SHAPES, "objective", small)
    monkeypatch.setattr(benchmark, "in_process", lambda name: {"measured_bytes": 1 << 30, "step_s": 0.5})
    assert benchmark.main(["--only", "objective", "--out", str(tmp_path / "rows.jsonl")]) == 1  # so far off
    row = json.loads((tmp_path / "rows.jsonl").read_text())
    assert row["what"] == "objective"
    assert row["off"] < -0.9
    assert row["predicted_bytes"] == max(row["moments"].values())
