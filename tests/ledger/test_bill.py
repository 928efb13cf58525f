"""The whole bill, and the paper's tables."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from families import tiny

from tailkd.errors import Refusal
from tailkd.ledger import Batch, Generation, Hardware, Selection, Student, Teacher, Training, bill, flops, tables
from tailkd.ledger.anatomy import dissect
from tailkd.ledger.flops import EXECUTED, PAPER
from tailkd.ledger.parameters import Parameters

STUDENT, TEACHER = Student(tiny("Qwen2", num_hidden_layers=2)), Teacher(tiny("Llama"))
MACHINE = Hardware(peak=1e12, utilisation=0.5, devices=2, price=3.0)
NANO = 1e-9  # operations per token to PFLOP per million tokens


def test_the_tree_has_the_contracts_keys_and_survives_json() -> None:
    found = bill(STUDENT, TEACHER, Training(tokens=1e6, batch=Batch(2, 24)), MACHINE).as_dict()
    assert json.loads(json.dumps(found)) == found
    assert set(found) == {
        *("parameters", "pflop_per_million_tokens", "executed", "memory_bytes", "disk_bytes", "hours", "money")
    }
    assert set(found["parameters"]) == {"teacher", "student"}
    assert {"total", "embedding", "active", "trainable"} == set(found["parameters"]["student"])
    for convention in ("pflop_per_million_tokens", "executed"):
        stages = found[convention]
        assert {"teacher_forward", "student_step", "total", "selection"} <= set(stages)
        assert stages["total"] == stages["teacher_forward"] + stages["student_step"]
    parts = {"total", "weights", "gradients", "optimizer", "activations", "objective", "teacher"}
    assert parts <= set(found["memory_bytes"])


def test_stages_are_the_closed_forms_in_both_conventions() -> None:
    student = Student(tiny("Qwen2", tie_word_embeddings=True), frozen_embeddings=True)
    batch = Batch(2, 24, checkpointing=True)
    found = bill(student, TEACHER, Training(tokens=1e6, batch=batch), MACHINE)
    ours, theirs = dissect(student.config), dissect(TEACHER.config)
    paper, executed = found.pflop_per_million_tokens, found.executed
    assert paper.student_step == pytest.approx(flops.student_step(ours, 24, PAPER) * NANO)
    assert paper.teacher_forward == pytest.approx(flops.forward(theirs, 24, PAPER) * NANO)
    ran = flops.student_step(ours, 24, EXECUTED, frozen_embeddings=True, checkpointing=True)
    assert executed.student_step == pytest.approx(ran * NANO)


def test_hours_and_money_follow_from_what_runs() -> None:
    found = bill(STUDENT, TEACHER, Training(tokens=5e9, batch=Batch(2, 24), keep_checkpoints=1), MACHINE)
    seconds = found.executed.total / NANO * 5e9 / (1e12 * 0.5 * 2)
    assert found.hours == pytest.approx(seconds / 3600)
    assert found.money == pytest.approx(found.hours * 2 * 3.0)
    assert found.disk_bytes == 2 * 12 * found.student.total + 4 * found.student.total
    free = bill(STUDENT, None, Training(tokens=5e9, batch=Batch(2, 24)), Hardware(1e12, 0.5))
    assert free.money is None
    assert "money" not in free.as_dict()
    assert "teacher" not in free.as_dict()["parameters"]
    assert free.executed.teacher_forward == 0


def test_selection_generation_and_a_cache_are_stages() -> None:
    config = TEACHER.config
    training = Training(
        tokens=1e6,
        batch=Batch(2, 24),
        selection=Selection(config, reference=STUDENT.config, ratio=0.5),
        generation=Generation(config, prompt=4, generated=8),
    )
    found = bill(STUDENT, Teacher(config, signal="hidden"), training, MACHINE)
    scored = flops.forward(dissect(config), 24, EXECUTED) + flops.forward(dissect(STUDENT.config), 24, EXECUTED)
    assert found.executed.selection == pytest.approx(2 * scored * NANO)
    assert found.executed.generation == pytest.approx(flops.generation(dissect(config), 4, 8) * NANO)
    assert found.executed.teacher_forward == pytest.approx(2 * 72 * 32 * NANO)
    assert found.memory.teacher == 0  # cached: no teacher in memory
    assert found.executed.total > found.executed.selection + found.executed.generation


def test_a_row_that_no_chunk_holds_costs_the_teachers_product_again() -> None:
    student, teacher = (tiny(f, vocab_size=1 << 18, hidden_size=4, num_hidden_layers=1) for f in ("Qwen2", "Llama"))
    context = (256 << 20) // (8 << 18) + 1
    found = {
        top_k: bill(Student(student), Teacher(teacher), Training(1.0, Batch(1, context), top_k=top_k), MACHINE)
        for top_k in (True, False)
    }
    more = found[True].executed.teacher_forward - found[False].executed.teacher_forward
    assert more == pytest.approx(2 * 4 * (1 << 18) * NANO)


def test_several_teachers_cost_what_each_costs() -> None:
    """Operations and weights add up; parameters are a list."""
    other = Teacher(tiny("Llama", num_hidden_layers=1))
    training = Training(1.0, Batch(2, 24, torch.bfloat16))
    both, first, second = (bill(STUDENT, given, training, MACHINE) for given in ([TEACHER, other], TEACHER, other))
    for one in (first, second):
        assert isinstance(one.as_dict()["parameters"]["teacher"], dict)
    assert both.as_dict()["parameters"]["teacher"] == [
        one.as_dict()["parameters"]["teacher"] for one in (first, second)
    ]
    forwards = [one.executed.teacher_forward for one in (both, first, second)]
    assert forwards[0] == pytest.approx(forwards[1] + forwards[2])
    assert both.memory.teacher == first.memory.teacher + second.memory.teacher
    assert both.memory.total > max(first.memory.total, second.memory.total)
    twice = bill(STUDENT, [TEACHER, TEACHER], training, MACHINE)
    assert twice.executed.teacher_forward == pytest.approx(2 * first.executed.teacher_forward)


def test_a_teacher_that_training_does_not_ask_takes_memory_alone() -> None:
    """It is loaded for the held-out measures."""
    training = Training(1.0, Batch(2, 24))
    idle, none = (bill(STUDENT, one, training, MACHINE) for one in (replace(TEACHER, signal="none"), None))
    assert idle.executed == none.executed
    assert idle.pflop_per_million_tokens == none.pflop_per_million_tokens
    assert isinstance(idle.teacher, Parameters)
    assert idle.memory.teacher == 4 * idle.teacher.total == idle.memory.total - none.memory.total


def test_impossible_hardware_is_refused() -> None:
    with pytest.raises(Refusal, match="utilisation in"):
        Hardware(1e12, 1.5)


def test_the_papers_figures(capsys: pytest.CaptureFixture[str]) -> None:
    found = tables.costs()
    assert [round(one.distilled, 2) for one in found] == [9.34, 6.39, 12.04, 14.98, 32.35]
    assert all(abs(one.off) <= 0.031 for one in found)
    assert all(abs(one.tail_aware_off or 0.0) <= 0.031 for one in found)
    assert [round(one.matched, 2) for one in found] == [1.53, 2.04, 1.88, 1.76, 2.46]
    printed = [one.pair.mini_plm for one in found]
    with_reference = [one.mini_plm(True) / value - 1 for one, value in zip(found, printed, strict=True)]
    without = [one.mini_plm(False) / value - 1 for one, value in zip(found, printed, strict=True)]
    assert max(map(abs, without[:2])) < 0.02  # Table 3 leaves the reference model out
    assert max(map(abs, with_reference[2:])) < 0.01  # section 3.2.2 has it in
    assert all(one.distilled > 10 for one in found[2:])  # 1e19 FLOP per billion tokens
    tables.main()
    text = capsys.readouterr().out
    assert text.count(" equal") == 9
    assert "DIFFERS" not in text
    assert "Llemma 7B" in text


def test_hours_of_the_appendix() -> None:
    found = tables.supervised()
    assert all(computed == pytest.approx(printed, rel=0.02) for printed, computed in found.values())


def test_bfloat16_teacher_weights_halve() -> None:
    training = Training(1.0, Batch(1, 24))
    wide, narrow = (
        bill(STUDENT, Teacher(TEACHER.config, dtype), training, MACHINE).memory.teacher
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert narrow == wide / 2
