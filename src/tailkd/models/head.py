"""A causal language model as hidden states and a vocabulary matrix; its logits are never made for a whole batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tailkd.errors import Refusal
from tailkd.models import precision
from tailkd.objective.head import Head

# The names under which families publish what they do to their logits after the product.
FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
DIVISORS = ("logits_scaling",)
SOFTCAPS = ("final_logit_softcapping",)
PROJECTIONS = "hidden_projections"  # learned maps to the teacher's width: trained with the student, not saved with it
PROBE = 8  # tokens of the forward pass that proves the reading


class SplitModel:
    """``split(input_ids).logits()`` equals ``model(input_ids).logits[..., :usable]``; a call makes no logits.

    Products run in `compute_dtype` over the model's own parameters, and hidden states come out in it. Deliberately no
    nn.Module: a teacher inside must stay outside every module tree. The model may be compiled, sharded by FSDP2
    (`fully_shard` of the blocks and then of the model) or wrapped for DDP, before this is made or after
    (``split.model = DistributedDataParallel(split.model)``), or carry adapters of PEFT; `plain` is the model without
    wrappers. What else the model's forward pass takes, such as `attention_mask`, goes to it by name.

    `position_ids` (batch, sequence) that start anew within a row are several documents in it: transformers makes masks
    of them that keep attention inside each; `prove_documents` looks whether a model heeds them.
    """

    def __init__(self, model: Any, *, usable: int | None = None, compute_dtype: torch.dtype = torch.float32) -> None:
        self.model: Any = model
        self.compute_dtype = compute_dtype
        self.backbone, self.projection = _parts(self.plain)
        self.scale, self.softcap = _scale(self.plain.config), _first(self.plain.config, SOFTCAPS)
        self.usable = self.projection.weight.shape[0] if usable is None else usable

    def __call__(self, input_ids: Tensor, position_ids: Tensor | None = None, **context: Any) -> Head:
        return self._head(self._hidden_states(input_ids, position_ids, **context))

    def with_states(
        self, input_ids: Tensor, states: Sequence[int], position_ids: Tensor | None = None
    ) -> tuple[Head, tuple[Tensor, ...]]:
        """The head, and hidden states (batch, sequence, width) from within, of one forward pass.

        Equals ``hidden_states[i] for i in states`` of ``model(input_ids, output_hidden_states=True)``: 0 what goes into
        the first block, i what comes out of block number i, and the last, also -1, what comes out of the final norm:
        the head's own. They are part of the student's graph, and come in the precision of its residual stream.

        Raises:
            Refusal: a state that the model does not have.
        """
        blocks = self.plain.config.num_hidden_layers
        outside = [state for state in states if not -blocks - 1 <= state <= blocks]
        if outside:
            raise Refusal(
                f"{_family(self.plain)} has no hidden state {outside[0]}; expected 0 (embeddings) to {blocks} (after "
                "the final norm), or -1 for the last"
            )
        places = [state % (blocks + 1) for state in states]
        inner = sorted({place for place in places if place != blocks})
        if not inner:
            head = self(input_ids, position_ids)
            return head, (head.hidden,) * len(places)
        last, *found = self._hidden_states(input_ids, position_ids, output_hidden_states=inner)
        head = self._head(last)
        known = dict(zip(inner, found, strict=True)) | {blocks: head.hidden}
        return head, tuple(known[place] for place in places)

    def _head(self, hidden: Tensor) -> Head:
        if self.compute_dtype != torch.float32:  # norms widen their output; the head's product stays in compute_dtype
            hidden = hidden.to(self.compute_dtype)
        weight, bias = whole(self.projection.weight), whole(getattr(self.projection, "bias", None))
        return Head(hidden, weight, bias, self.scale, self.softcap).narrow(self.usable)

    def _hidden_states(self, input_ids: Tensor, position_ids: Tensor | None = None, **options: Any) -> Any:
        """The last hidden state; where `output_hidden_states` are asked for, a tuple of it and them."""
        inputs = {"input_ids": input_ids, "use_cache": False, **options}
        if position_ids is not None:
            inputs["position_ids"] = position_ids
        with precision.compute(self.compute_dtype, self.device):
            if torch.compiler.is_compiling():  # the caller compiles this: Dynamo cannot trace an exchange of forward
                return self._backbone_forward(**inputs)
            with _forward_replaced(self.plain, self._backbone_forward):
                return self.model(**inputs)

    def _backbone_forward(self, **inputs: Any) -> Any:
        # A wrapper of PEFT names all that a causal model takes, labels too, as None.
        inputs = {name: value for name, value in inputs.items() if value is not None}
        outputs = self.backbone(**inputs)
        if "output_hidden_states" not in inputs:
            return outputs.last_hidden_state
        return (outputs.last_hidden_state, *(outputs.hidden_states[place] for place in inputs["output_hidden_states"]))

    @property
    def plain(self) -> Any:
        """The model itself, for its names, its files and its generation: no wrapper of torch.compile or DDP."""
        return unwrapped(self.model)

    @property
    def device(self) -> torch.device:
        return self.projection.weight.device

    @torch.no_grad()
    def prove(self) -> SplitModel:
        """Compare with the model's own logits on a few tokens; refuse the family where they differ."""
        ids = torch.arange(PROBE, device=self.device).unsqueeze(0) % self.usable
        was_training = self.model.training
        self.model.eval()
        with precision.compute(self.compute_dtype, self.device):
            expected = self.model(input_ids=ids, use_cache=False).logits[..., : self.usable].float()
        got = self(ids).logits().float()
        self.model.train(was_training)
        self.settle()
        if not torch.allclose(got, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()) + 1e-6):
            raise Refusal(
                f"{_family(self.plain)}: hidden states times vocabulary matrix do not give the model's own logits "
                f"(largest difference {float((got - expected).abs().max()):.3g}); this family treats its logits in a "
                "way that tailkd does not know, so it cannot be a teacher or student"
            )
        return self

    @torch.no_grad()
    def prove_documents(self) -> SplitModel:
        """Refuse a model that looks from one document into the one before it in the same row."""
        half = torch.arange(PROBE, device=self.device) % self.usable
        ids = torch.stack([torch.cat([half, half]), torch.cat([half.flip(0), half])])
        position_ids = torch.arange(PROBE, device=self.device).repeat(2).expand(2, -1)
        was_training = self.model.training
        self.model.eval()
        one, other = self(ids, position_ids).hidden[:, PROBE:].float()
        self.model.train(was_training)
        self.settle()
        if not torch.allclose(one, other, rtol=0, atol=1e-5 * float(one.abs().max())):
            raise Refusal(
                f"{_family(self.plain)}: with attention {self.plain.config._attn_implementation!r} a token sees the "
                "document before its own in the same row; take data.packing: rows, or another attention for it"
            )
        return self

    def settle(self) -> None:
        """After calls without gradient: what FSDP2 keeps gathered is shards again, as optimizer and checkpoint know it.

        Until then ``plain.parameters()`` are copies that nobody trains.
        """
        for module in self.plain.modules():
            if hasattr(module, "reshard"):
                module.reshard()


def unwrapped(model: Any) -> Any:
    """The model inside the wrappers of torch.compile, DistributedDataParallel and PEFT; any other is itself."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            model = _inside_adapters(model)
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def _inside_adapters(model: Any) -> Any:
    """A model whose layers carry adapters; prompts in front of the tokens would be hidden states of no token."""
    if model.active_peft_config.is_prompt_learning:
        raise Refusal(
            f"{type(model).__name__} puts learned prompts ({model.active_peft_config.peft_type.value}) before the "
            "tokens; expected adapters inside the layers, such as LoRA"
        )
    return model.get_base_model()


def whole(parameter: Any) -> Any:
    """A parameter of the head for use outside its module: a sharded one is gathered, any other is itself."""
    if not hasattr(parameter, "full_tensor"):
        return parameter
    if not parameter.requires_grad:
        return parameter.full_tensor()
    from torch.distributed.tensor import Partial

    # FSDP2 averages gradients over ranks in its hooks, which see nothing of this one; left alone it would be taken for
    # the same on every rank, and each shard would learn from one rank's tokens.
    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)


@contextmanager
def _forward_replaced(model: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """The model called, and not its backbone: FSDP2 gathers and reduces in the hooks of the root, compile() acts there.

    For a call only: generation, copies and `prove` see the model's own forward.
    """
    before = vars(model).get("forward")
    model.forward = forward
    try:
        yield
    finally:
        if before is None:
            del model.forward
        else:
            model.forward = before


def _parts(model: Any) -> tuple[nn.Module, Any]:
    """The network below the vocabulary projection, and the projection."""
    projection = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    backbone = getattr(model, getattr(model, "base_model_prefix", "") or "", None)
    if getattr(model.config, "is_encoder_decoder", False):
        raise Refusal(f"{_family(model)}: an encoder-decoder; expected a causal language model")
    if backbone is None or backbone is model or not isinstance(projection, nn.Linear):
        found = type(projection).__name__ if projection is not None else "none"
        raise Refusal(
            f"{_family(model)}: no single linear vocabulary projection on top of a backbone was found (projection: "
            f"{found}); this family cannot be a teacher or student"
        )
    return backbone, projection


def _scale(config: Any) -> float:
    factor, divisor = _first(config, FACTORS), _first(config, DIVISORS)
    return (1.0 if factor is None else factor) / (1.0 if divisor is None else divisor)


def _first(config: Any, names: tuple[str, ...]) -> float | None:
    values = (getattr(config, name, None) for name in names)
    return next((float(v) for v in values if v is not None), None)


def _family(model: Any) -> str:
    return f"{type(model).__name__} (model type {model.config.model_type!r})"
