"""`transformers.Trainer` with a teacher: its loops, launchers, callbacks and files, and the loss of tailkd."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer

from tailkd.errors import Refusal
from tailkd.models.head import SplitModel, unwrapped
from tailkd.models.vocabulary import tokenizer_usable_ids
from tailkd.objective import Head, Loss, Objective, Tally, distillation_loss
from tailkd.objective.tally import add

IGNORED = -100
LABELS = ("labels", "shift_labels")
NOT_LOGGED = ("loss", "floored_rows")  # the first is the trainer's own, the second counts rows


class DistillationTrainer(Trainer):
    """``Trainer(...)`` whose loss is that of `distillation_loss`, over the valid tokens of the global batch.

    A step's gradient, in any number of micro-batches and on any number of ranks, of rows padded or packed, is that of::

        student, teacher = SplitModel(model, usable=usable), SplitModel(teacher, usable=usable)
        distillation_loss(student(input_ids, position_ids), teacher(input_ids, position_ids), shifted_labels(batch),
                          objective=objective, segments=documents(batch)).mean().backward()

    and no logits of a whole batch are made, of neither model. The training log gains the means of the loss's parts
    (`clm`, `divergence`, `head_kl`, `tail_kl`, `tail_mass`; nats per token), and so does an evaluation, whose
    `eval_loss` is the mean over its tokens, each row counted once.

    Args:
        teacher: a causal language model of the same vocabulary; None where the divergence is "none". It is frozen, put
            on the trainer's device unless it is spread or sharded, and is in no checkpoint.
        objective: what is minimised.
        usable: ids 0 to usable - 1 are one token in both models; rows beyond are padding and are left out. By default
            the ids of `processing_class`, without one all rows, which must then be as many in both.
        everything else: as `transformers.Trainer` takes it. A subclass of this and another trainer, such as TRL's
            ``class Distilling(DistillationTrainer, SFTTrainer)``, takes that one's arguments.

    Raises:
        Refusal: models that cannot be read as hidden states and one vocabulary matrix, vocabularies of other sizes, and
            arguments under which the loss would be another: label smoothing, `compute_loss_func`, fp16, DeepSpeed,
            `torch.nn.DataParallel`, parallelism within a model.

    Source: "Don't Ignore the Tail", Eq. 4.
    """

    # Losses come divided by the tokens of all micro-batches (transformers >= 5.19 asks here, before it asked below).
    loss_is_scaled_for_ga = True

    def __init__(
        self, *arguments: Any, teacher: Any | None, objective: Objective, usable: int | None = None, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        _refuse_another_loss(self)
        self.model_accepts_loss_kwargs = True
        self.objective = objective
        self.compute_dtype = torch.bfloat16 if self.accelerator.mixed_precision == "bf16" else torch.float32
        teacher = _teacher_for(objective, teacher, self.args.device)
        self.usable = _usable(self.model, teacher, self.processing_class) if usable is None else usable
        self._student = self._split(self.model)
        self._teacher = None if teacher is None else self._split(teacher)
        self._trained: dict[str, Tally] = {}
        self._evaluated: dict[str, Tally] = {}
        # Older trainers (5.3) have accelerate divide gradients, not losses, by the number of micro-batches once more.
        self.accelerator.gradient_accumulation_steps = 1
        # The head's product is taken outside the model's forward pass, where DDP would hold its matrix for unused.
        self.args.ddp_find_unused_parameters = False
        if self.accelerator.ddp_handler is not None:
            self.accelerator.ddp_handler.find_unused_parameters = False

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], int]:
        """The micro-batches of a step, and how many valid tokens there are in them, on all ranks together."""
        # The trainer's own count knows nothing of masks, nor, in older ones (5.3), that labels are shifted.
        samples = list(islice(epoch_iterator, num_batches))
        count = torch.zeros((), dtype=torch.int64, device=device)
        for inputs in samples:
            count += (shifted_labels(inputs) != IGNORED).sum().to(device)
        return samples, int(self._over_ranks(count) if self.args.average_tokens_across_devices else count)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """What `inputs` add to the mean loss over `num_items_in_batch` valid tokens; None: over their own."""
        loss, head = self._loss(model, inputs, shifted_labels(inputs))
        if model.training:
            self._trained = add(self._trained, loss.parts)
        # Gradients are averaged over ranks afterwards.
        mean = loss.mean(None if num_items_in_batch is None else float(num_items_in_batch) / self._ranks)
        return (mean, {"logits": head.logits()}) if return_outputs else mean

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Loss, logits (batch, sequence, usable) and labels; logits only where they are asked for."""
        inputs = self._prepare_inputs(inputs)
        labels = shifted_labels(inputs)
        with torch.no_grad():
            loss, head = self._loss(model, inputs, self._without_repeated(labels))
            logits = None if prediction_loss_only else head.logits().float()
        self._student.settle()
        self._evaluated = add(self._evaluated, loss.parts)
        return loss.mean(), logits, None if prediction_loss_only else inputs.get("labels", labels)

    def evaluation_loop(self, *arguments: Any, metric_key_prefix: str = "eval", **options: Any) -> Any:
        """The trainer's, with the means over tokens in the place of its mean of the batches' means."""
        self._evaluated = {}
        output = super().evaluation_loop(*arguments, metric_key_prefix=metric_key_prefix, **options)
        means = self._means(self._evaluated)
        return output._replace(metrics={**(output.metrics or {}), **_prefixed(means, metric_key_prefix)})

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """The trainer's; a training loss takes with it the means of its parts since the last one."""
        if "loss" in logs and self._trained:
            parts = {name: value for name, value in self._means(self._trained).items() if name not in NOT_LOGGED}
            logs, self._trained = {**logs, **parts}, {}
        super().log(logs, *arguments, **options)

    @property
    def _ranks(self) -> int:
        """How many ranks a global batch is spread over; 1 where each was told to divide by its own tokens."""
        return self.args.world_size if self.args.average_tokens_across_devices else 1

    def _split(self, model: Any) -> SplitModel:
        split = SplitModel(model, usable=self.usable, compute_dtype=self.compute_dtype)
        # Under FSDP ranks may still hold empty weights, that are sent to them when training begins.
        return split if self.is_fsdp_enabled else split.prove()

    def _loss(self, model: nn.Module, inputs: Mapping[str, Any], labels: Tensor) -> tuple[Loss, Head]:
        if unwrapped(model) is not self._student.plain:  # `model_init` makes a model for each trial
            self._student = self._split(model)
        self._student.model = model
        context = {name: value for name, value in inputs.items() if name not in (*LABELS, "num_items_in_batch")}
        signal = None
        if self._teacher is not None:
            with torch.no_grad():
                signal = self._teacher(**context)
        head = self._student(**context)
        segments = documents(inputs)
        return distillation_loss(head, signal, labels, objective=self.objective, segments=segments), head

    def _without_repeated(self, labels: Tensor) -> Tensor:
        """Ranks get equally many rows: what the last batch of an evaluation repeats for that is not counted again."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return labels
        rows = torch.arange(len(labels), device=labels.device) + self.args.process_index * len(labels)
        return labels.masked_fill((rows >= state.remainder).unsqueeze(-1), IGNORED)

    def _over_ranks(self, tensor: Tensor) -> Tensor:
        summed: Any = self.accelerator.reduce(tensor) if self.args.world_size > 1 else tensor
        return summed

    def _means(self, parts: dict[str, Tally]) -> dict[str, float]:
        """Means per token over all ranks, each of which must ask for them."""
        if not parts:
            return {}
        sums = torch.stack([torch.stack([t.sum.double(), t.sum.new_tensor(t.weight).double()]) for t in parts.values()])
        total = self._over_ranks(sums)
        return {name: Tally(total[i, 0], float(total[i, 1])).mean() for i, name in enumerate(parts)}


def shifted_labels(inputs: Mapping[str, Any]) -> Tensor:
    """(batch, sequence): the id that each position predicts; -100 where there is none.

    Equals ``labels[:, 1:]`` and a column of -100, or `shift_labels` where the batch has them; positions of padding, by
    a 2-d `attention_mask`, predict nothing and are not predicted.
    """
    if not any(name in inputs for name in LABELS):
        raise Refusal(
            f"a batch has {', '.join(inputs)}, and no labels; expected labels (batch, sequence) with -100 where there "
            "is nothing to learn: DataCollatorForLanguageModeling(tokenizer, mlm=False) makes them of the ids"
        )
    mask = inputs.get("attention_mask")
    padding = None if mask is None or mask.dim() != 2 else mask == 0
    labels = inputs.get("shift_labels")
    if labels is None:
        labels = F.pad(_without(inputs["labels"], padding)[:, 1:], (0, 1), value=IGNORED)
    return _without(labels, padding)


def _without(labels: Tensor, left_out: Tensor | None) -> Tensor:
    return labels if left_out is None else labels.masked_fill(left_out, IGNORED)


def documents(inputs: Mapping[str, Any]) -> Tensor | None:
    """(batch, sequence): a number for each document of a row, by position ids that start anew; None without them."""
    positions = inputs.get("position_ids")
    if positions is None:
        return None
    mask = inputs.get("attention_mask")
    if mask is not None and mask.dim() == 2 and bool(((positions[:, 1:] == 0) & (mask[:, :-1] != 0)).any()):
        raise Refusal(
            "a batch has position_ids that start anew within a row, and an attention_mask: transformers then lets a "
            "document see the one before it; leave attention_mask out, as DataCollatorWithFlattening does"
        )
    return (positions == 0).cumsum(-1)


def _prefixed(means: dict[str, float], prefix: str) -> dict[str, float]:
    return {f"{prefix}_{name}": value for name, value in means.items() if name != "floored_rows"}


def _refuse_another_loss(trainer: Trainer) -> None:
    args = trainer.args
    unfit = {
        "label_smoothing_factor": args.label_smoothing_factor != 0,
        "compute_loss_func": trainer.compute_loss_func is not None,
        "fp16 or fp8": trainer.accelerator.mixed_precision not in ("no", "bf16"),
        "deepspeed": trainer.is_deepspeed_enabled,
        "parallelism_config": args.parallelism_config is not None,
        "tensor parallelism": (getattr(trainer.model, "tp_size", None) or 1) > 1,
        "torch.nn.DataParallel (several GPUs in one process)": args.n_gpu > 1,
    }
    found = [name for name, given in unfit.items() if given]
    if found:
        raise Refusal(
            f"DistillationTrainer cannot keep its loss under {', '.join(found)}; expected none of them: take bf16, "
            "FSDP for deepspeed, and torchrun for several GPUs"
        )


def _usable(student: Any, teacher: Any | None, tokenizer: Any | None) -> int:
    """How many ids there are, by the tokenizer or by the models."""
    rows = [SplitModel(model).usable for model in (student, teacher) if model is not None]
    if hasattr(tokenizer, "get_vocab"):
        return tokenizer_usable_ids(tokenizer, min(rows))
    if len(set(rows)) > 1:
        raise Refusal(
            f"the student has {rows[0]:,} vocabulary rows, the teacher {rows[1]:,}, and no tokenizer tells which of "
            "them are ids; give processing_class, or usable: the number of ids that mean one token in both"
        )
    return rows[0]


def _teacher_for(objective: Objective, teacher: Any | None, device: torch.device) -> Any | None:
    """The teacher frozen and on the device, unless others have spread it; None where none is needed."""
    if not objective.needs_teacher:
        return None
    if teacher is None:
        raise Refusal(f"divergence {objective.divergence!r} needs a teacher, and teacher is None; give a model")
    frozen = teacher.eval().requires_grad_(False)
    is_spread = hasattr(frozen, "hf_device_map") or any(hasattr(p, "full_tensor") for p in frozen.parameters())
    return frozen if is_spread else frozen.to(device)
