"""What the trainer refuses and how it reads a batch: these tests need no accelerate and no peft."""

from __future__ import annotations

from types import SimpleNamespace

import builders
import pytest
import torch

from tailkd.adapters import transformers as adapter
from tailkd.errors import Refusal
from tailkd.models.head import SplitModel
from tailkd.objective import Objective

POSITIONS = torch.tensor([[0, 1, 2, 0, 1]])


def trainer(
    precision: str = "no", *, loss: object = None, deepspeed: bool = False, ranks_of_a_model: int = 1, **given: object
) -> SimpleNamespace:
    args = {"label_smoothing_factor": 0.0, "parallelism_config": None, "n_gpu": 1, **given}
    accelerator = SimpleNamespace(mixed_precision=precision)
    return SimpleNamespace(
        args=SimpleNamespace(**args),
        model=SimpleNamespace(tp_size=ranks_of_a_model),
        accelerator=accelerator,
        compute_loss_func=loss,
        is_deepspeed_enabled=deepspeed,
    )


@pytest.mark.parametrize(
    ("found", "name"),
    [
        (trainer("fp16"), "fp16 or fp8"),
        (trainer(deepspeed=True), "deepspeed"),
        (trainer(loss=print), "compute_loss_func"),
        (trainer(label_smoothing_factor=0.1), "label_smoothing_factor"),
        (trainer(parallelism_config=object()), "parallelism_config"),
        (trainer(ranks_of_a_model=2), "tensor parallelism"),
        (trainer(n_gpu=2), "DataParallel"),
    ],
)
def test_what_would_be_another_loss_is_refused(found: SimpleNamespace, name: str) -> None:
    with pytest.raises(Refusal, match=rf"cannot keep its loss under .*{name}"):
        adapter._refuse_another_loss(found)  # type: ignore[arg-type]
    for allowed in ("no", "bf16"):
        adapter._refuse_another_loss(trainer(allowed))  # type: ignore[arg-type]


def test_a_teacher_that_is_missing_is_refused() -> None:
    device = torch.device("cpu")
    with pytest.raises(Refusal, match="divergence 'tail_aware' needs a teacher"):
        adapter._teacher_for(Objective(), None, device)
    assert adapter._teacher_for(Objective(divergence="none"), None, device) is None


def test_vocabularies_of_other_sizes_are_refused() -> None:
    student, teacher = builders.build_model(61), builders.build_model(64)
    with pytest.raises(Refusal, match="the student has 61 vocabulary rows, the teacher 64"):
        adapter._usable(student, teacher, None)
    assert adapter._usable(student, None, None) == 61


def test_a_batch_without_labels_is_refused() -> None:
    with pytest.raises(Refusal, match="a batch has input_ids, and no labels"):
        adapter.shifted_labels({"input_ids": POSITIONS})


def test_padding_predicts_nothing_and_is_not_predicted() -> None:
    labels = torch.tensor([[5, 6, 7, 0, 0], [0, 0, 5, 6, 7]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])
    expected = [[6, 7, -100, -100, -100], [-100, -100, 6, 7, -100]]
    assert adapter.shifted_labels({"labels": labels, "attention_mask": mask}).tolist() == expected
    assert adapter.shifted_labels({"labels": labels}).tolist() == [[6, 7, 0, 0, -100], [0, 5, 6, 7, -100]]
    assert adapter.shifted_labels({"shift_labels": labels}) is labels


def test_documents_that_would_see_each_other_are_refused() -> None:
    with pytest.raises(Refusal, match="leave attention_mask out"):
        adapter.documents({"position_ids": POSITIONS, "attention_mask": torch.ones_like(POSITIONS)})
    assert adapter.documents({"position_ids": POSITIONS}).tolist() == [[1, 1, 1, 2, 2]]  # type: ignore[union-attr]
    left = {"position_ids": torch.tensor([[0, 0, 0, 1, 2]]), "attention_mask": torch.tensor([[0, 0, 1, 1, 1]])}
    assert adapter.documents(left) is not None


class NamesAll(torch.nn.Module):
    """Names all that a causal model takes, as a wrapper of PEFT does, and has adapters in the layers."""

    def __init__(self, base: torch.nn.Module) -> None:
        super().__init__()
        self.base = base
        self.active_peft_config = SimpleNamespace(is_prompt_learning=False)
        self.peft_config = {"default": self.active_peft_config}

    def get_base_model(self) -> torch.nn.Module:
        return self.base

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **more: object) -> object:
        return self.base(input_ids=input_ids, labels=labels, **more)


def test_a_wrapper_around_the_layers_is_called_and_its_model_read() -> None:
    model = builders.build_model(61)
    split = SplitModel(NamesAll(model))
    seen: list[dict[str, object]] = []
    model.model.register_forward_pre_hook(lambda _, inputs, named: seen.append(named), with_kwargs=True)
    assert split.plain is model
    assert torch.equal(split(POSITIONS).logits(), model(input_ids=POSITIONS).logits)
    assert set(seen[0]) == {"input_ids", "use_cache"}


def test_prompts_before_the_tokens_are_refused() -> None:
    config = SimpleNamespace(is_prompt_learning=True, peft_type=SimpleNamespace(value="PREFIX_TUNING"))
    wrapper = SimpleNamespace(peft_config={}, active_peft_config=config, get_base_model=lambda: None)
    with pytest.raises(Refusal, match=r"learned prompts .PREFIX_TUNING. before the tokens"):
        SplitModel(wrapper)
