"""The trainer of other people against our own loop: same global batch, same loss, same gradients."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("accelerate", reason="transformers.Trainer needs the package accelerate (extra trainer)")

import builders
import torch
import transformers
from stepping import VOCABULARY
from torch import Tensor
from trainers import OBJECTIVES, arguments, assert_same, batch_of, models, our_step, packed, padded, their_step

from tailkd.adapters.transformers import DistillationTrainer, shifted_labels
from tailkd.errors import Refusal
from tailkd.objective import Objective

ROWS = {"padded": padded, "packed": packed}
TAD = OBJECTIVES["tail_aware"]


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("divergence", OBJECTIVES)
def test_a_step_is_that_of_our_own_loop(tmp_path: Path, divergence: str, kind: str, micro_batches: int) -> None:
    rows, objective, (student, teacher) = ROWS[kind](), OBJECTIVES[divergence], models()
    ours = our_step(student, teacher, rows, objective)
    args = arguments(tmp_path, rows=len(rows), micro_batches=micro_batches)
    assert_same(their_step(student, teacher, rows, args, objective), ours)


def test_a_step_of_fewer_micro_batches_than_asked_for_is_divided_by_its_own_tokens(tmp_path: Path) -> None:
    rows, (student, teacher) = padded()[:6], models()
    ours = our_step(student, teacher, rows, TAD)
    args = arguments(tmp_path, rows=8, micro_batches=4)
    assert_same(their_step(student, teacher, rows, args, TAD), ours)


def test_no_teacher_is_next_token_prediction_as_the_trainer_knows_it(tmp_path: Path) -> None:
    rows, (student, _) = padded(), models()
    for row in rows:  # an older trainer counts the first label, which nobody predicts
        row["labels"][0] = -100
    args = arguments(tmp_path, rows=8, micro_batches=2)
    theirs = their_step(student, None, rows, args, Objective(divergence="none"))
    plain = transformers.Trainer(models()[0], args, train_dataset=rows)  # type: ignore[arg-type]
    plain.train()
    assert theirs["loss"] == pytest.approx(plain.state.log_history[0]["loss"], rel=1e-5)
    assert theirs["loss"] == pytest.approx(theirs["clm"])


# ----- precision, memory, adapters


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_bfloat16_products_are_those_of_our_own_loop(tmp_path: Path, micro_batches: int) -> None:
    rows, (student, teacher) = padded(), models()
    ours = our_step(student, teacher, rows, TAD, compute_dtype=torch.bfloat16)
    theirs = their_step(
        student, teacher, rows, arguments(tmp_path, rows=8, micro_batches=micro_batches, bf16=True), TAD
    )
    assert theirs["loss"] != pytest.approx(our_step(student, teacher, rows, TAD)["loss"], rel=1e-6)
    assert all(gradient.dtype == torch.float32 for gradient in theirs["gradients"].values())
    # The same products added up in another order, each rounded to 8 bits; float32 is ten times as far off.
    assert_same(theirs, ours, tolerance=1e-2)


def test_activations_made_twice_change_nothing(tmp_path: Path) -> None:
    rows, (student, teacher) = padded(), models()
    ours = our_step(student, teacher, rows, TAD)
    args = arguments(tmp_path, rows=8, micro_batches=2, gradient_checkpointing=True)
    assert_same(their_step(student, teacher, rows, args, TAD), ours)


def with_adapters(student: Any, **settings: Any) -> Any:
    peft = pytest.importorskip("peft", reason="LoRA needs the package peft (extra lora)")
    torch.manual_seed(3)
    values = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(student, peft.LoraConfig(**{**values, **settings}))


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_adapters_of_peft_learn_alone(tmp_path: Path, micro_batches: int) -> None:
    rows, (student, teacher) = padded(), models()
    student = with_adapters(student)
    ours = our_step(student, teacher, rows, TAD)
    theirs = their_step(student, teacher, rows, arguments(tmp_path, rows=8, micro_batches=micro_batches), TAD)
    assert_same(theirs, ours)
    assert all("lora" in name for name in theirs["gradients"])
    theirs["trainer"].save_model()
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_adapters_on_the_vocabulary_matrix_are_refused(tmp_path: Path) -> None:
    student, teacher = models()
    with pytest.raises(Refusal, match="no single linear vocabulary projection"):
        trainer_of(tmp_path, with_adapters(student, target_modules=["q_proj", "lm_head"]), teacher)


def test_prompts_before_the_tokens_are_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="prompt tuning needs the package peft (extra lora)")
    student, teacher = models()
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(Refusal, match=r"learned prompts \(PROMPT_TUNING\) before the tokens"):
        trainer_of(tmp_path, peft.get_peft_model(student, config), teacher)


# ----- rows


def stacked(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def trainer_of(folder: Path, student: Any, teacher: Any, **more: Any) -> DistillationTrainer:
    options = {"args": arguments(folder, rows=8, micro_batches=1), "teacher": teacher, "objective": TAD, **more}
    return DistillationTrainer(student, **options)


def test_padding_is_in_no_loss_left_or_right_or_left_out(tmp_path: Path) -> None:
    rows, (student, teacher) = padded(), models()
    trainer = trainer_of(tmp_path, student, teacher)
    right = trainer.compute_loss(trainer.model, stacked(rows)).detach()
    shifts = [14 - int(row["attention_mask"].sum()) for row in rows]
    left = [{name: value.roll(by) for name, value in row.items()} for row, by in zip(rows, shifts, strict=True)]
    flat = transformers.DataCollatorWithFlattening()(
        [{name: value[: 14 - by].tolist() for name, value in row.items() if name != "attention_mask"}
         for row, by in zip(rows, shifts, strict=True)]
    )  # fmt: skip
    assert set(flat) == {"input_ids", "labels", "position_ids"}
    unlabelled = stacked([{**row, "labels": row["input_ids"]} for row in rows])  # the mask alone tells of padding
    for other in (stacked(left), flat, unlabelled):
        loss = trainer.compute_loss(trainer.model, other).detach()
        assert float(loss) == pytest.approx(float(right), rel=1e-5)
        assert trainer.get_batch_samples(iter([other]), 1, "cpu")[1] == batch_of(rows).count


def test_labels_that_are_shifted_are_taken_as_they_are(tmp_path: Path) -> None:
    student, teacher = models()
    trainer = trainer_of(tmp_path, student, teacher)
    inputs = stacked(packed())
    shifted = {**{name: inputs[name] for name in ("input_ids", "position_ids")}, "shift_labels": shifted_labels(inputs)}
    losses = [float(trainer.compute_loss(trainer.model, each).detach()) for each in (inputs, shifted)]
    assert losses[0] == losses[1]


# ----- what the trainer keeps, logs and measures


def test_the_teacher_is_in_no_file_and_never_trained(tmp_path: Path) -> None:
    rows, (student, teacher) = padded(), models()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    args = arguments(tmp_path, rows=8, micro_batches=1, learning_rate=0.1, save_strategy="steps", save_steps=1)
    trainer = their_step(student, teacher.train(), rows, args, TAD)["trainer"]
    assert not teacher.training
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1")
    assert all(torch.equal(p, q) for p, q in zip(saved.parameters(), trainer.model.parameters(), strict=True))
    assert not torch.equal(next(saved.parameters()), next(models()[0].parameters()))
    assert trainer.state.log_history[0].keys() >= {"clm", "divergence", "head_kl", "tail_kl", "tail_mass"}


def test_an_evaluation_is_the_mean_over_its_tokens(tmp_path: Path) -> None:
    rows, (student, teacher) = padded(), models()
    args = arguments(tmp_path, rows=8, micro_batches=1, per_device_eval_batch_size=3)
    found = trainer_of(tmp_path, student, teacher, args=args, eval_dataset=rows).evaluate()
    ours = our_step(student, teacher, rows, TAD)
    for name in ("loss", "clm", "divergence", "tail_mass"):
        assert found[f"eval_{name}"] == pytest.approx(ours[name], rel=1e-5)


def test_predictions_are_the_students_logits(tmp_path: Path) -> None:
    rows, (student, teacher) = padded(), models()
    trainer = trainer_of(tmp_path, student, teacher, compute_metrics=lambda found: {"rows": len(found.label_ids)})
    output = trainer.predict(rows)  # type: ignore[arg-type]
    inputs = stacked(rows)
    with torch.no_grad():
        expected = student(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    assert torch.allclose(torch.tensor(output.predictions), expected, atol=1e-5)
    assert torch.equal(torch.tensor(output.label_ids), inputs["labels"])
    assert output.metrics["test_rows"] == 8


def test_a_student_that_is_made_for_each_trial(tmp_path: Path) -> None:
    rows, (student, teacher) = padded(), models()
    ours = our_step(student, teacher, rows, TAD)
    args = arguments(tmp_path, rows=8, micro_batches=1)
    assert_same(their_step(None, teacher, rows, args, TAD, model_init=lambda: models()[0]), ours)


def test_rows_beyond_the_tokenizer_are_left_out(tmp_path: Path) -> None:
    rows, (student, _) = padded(), models()
    wide = builders.build_model(VOCABULARY + 8, hidden=48, seed=1, initializer_range=0.2)
    tokenizer = SimpleNamespace(get_vocab=lambda: {f"t{i}": i for i in range(VOCABULARY)})
    ours = our_step(student, wide, rows, TAD)
    for more in ({"usable": VOCABULARY}, {"processing_class": tokenizer}):
        trainer = trainer_of(tmp_path, student, wide, **more)
        loss = trainer.compute_loss(trainer.model, stacked(rows)).detach()
        assert float(loss) == pytest.approx(ours["loss"], rel=1e-5)
