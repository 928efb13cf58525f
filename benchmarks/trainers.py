"""The rivals of step.py: trainers of other projects, as whole steps over the same models and the same batch."""

from __future__ import annotations

import copy
import tempfile
import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

from tailkd.data.batches import Batch

PLAIN, GKD = "Trainer, eager KL", "TRL GKD"
ENDLESS = 1_000_000  # steps; it is ended from outside
Rows = list[dict[str, Tensor]]


class Over(Exception):
    """Ends a trainer."""


class StepByStep(TrainerCallback):
    """A trainer in a thread of its own that takes a step whenever it is asked to.

    The time of a step is that from the trainer's own `on_step_begin` to its `on_step_end`: forward and backward, clip,
    update, but neither its loader nor its log.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.may_go, self.has_gone = threading.Semaphore(0), threading.Semaphore(0)
        self.error: BaseException | None = None
        self.over = False
        self.trainer = trainer
        trainer.add_callback(self)
        self.thread = threading.Thread(target=self._train, daemon=True)
        self.thread.start()

    def _train(self) -> None:
        try:
            self.trainer.train()
        except Over:
            return
        except BaseException as error:
            self.error = error
        self.has_gone.release()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.may_go.acquire()
        if self.over:
            raise Over

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.has_gone.release()

    def step(self) -> None:
        self.may_go.release()
        self.has_gone.acquire()
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        self.over = True
        self.may_go.release()
        self.thread.join()


class EagerKL(Trainer):
    """What a reader of a tutorial writes: cross-entropy plus KL(teacher || student), both from dense logits."""

    def __init__(self, teacher: nn.Module, **options: Any) -> None:
        super().__init__(**options)
        self.teacher = teacher

    def compute_loss(self, model: nn.Module, inputs: Any, *_: Any, **__: Any) -> Tensor:
        with torch.no_grad():
            theirs = self.teacher(input_ids=inputs["input_ids"], use_cache=False).logits.float().log_softmax(-1)
        ours = model(input_ids=inputs["input_ids"], use_cache=False).logits.float().log_softmax(-1)
        pair = ours.flatten(0, 1), theirs.flatten(0, 1)
        clm = F.nll_loss(pair[0], inputs["labels"].flatten())
        return clm + F.kl_div(*pair, log_target=True, reduction="batchmean")


def options_of(rows: int, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments that make every trainer do what our step does, in the same precision."""
    return {
        "output_dir": tempfile.gettempdir(),
        "per_device_train_batch_size": rows,
        "max_steps": ENDLESS,
        "learning_rate": 1e-5,
        "adam_beta2": 0.95,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "constant",
        "bf16": dtype == torch.bfloat16,
        "use_cpu": not torch.cuda.is_available(),
        "activation_checkpointing": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
    }


def stacked(rows: Rows) -> dict[str, Tensor]:
    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}


def plain(student: nn.Module, teacher: nn.Module, batch: Batch, dtype: torch.dtype) -> tuple[Trainer, Rows]:
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in zip(batch.input_ids, batch.labels, strict=True)]
    arguments = TrainingArguments(**options_of(len(batch), dtype))
    return EagerKL(teacher, model=student, args=arguments, train_dataset=rows, data_collator=stacked), rows


def gkd(student: nn.Module, teacher: nn.Module, batch: Batch, dtype: torch.dtype) -> tuple[Trainer, Rows]:
    """Off-policy at beta 0, which is KL(teacher || student) without cross-entropy; its rows hold one token more."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    whole = torch.cat([batch.input_ids, batch.labels[:, -1:]], 1)
    rows = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} for ids in whole]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"</s>": 0})), eos_token="</s>")
    tokenizer.pad_token = "</s>"
    arguments = GKDConfig(
        **options_of(len(batch), dtype), lmbda=0.0, beta=0.0, temperature=1.0, max_length=whole.shape[1]
    )
    trainer = GKDTrainer(
        model=student,
        teacher_model=copy.deepcopy(teacher),  # it wraps its forward
        args=arguments,
        train_dataset=Dataset.from_list([{name: value.tolist() for name, value in row.items()} for row in rows]),
        data_collator=stacked,
        processing_class=tokenizer,
    )
    return trainer, rows


RIVALS = {PLAIN: plain, GKD: gkd}
