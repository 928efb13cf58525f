"""One model on many processes: split among them by FSDP2, or a whole copy in each under DDP."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from tailkd.errors import Refusal
from tailkd.models.head import PROJECTIONS, SplitModel, unwrapped
from tailkd.train.ranks import Ranks

STRATEGIES = ("auto", "ddp", "fsdp")
# Weights, gradients and two moments in float32 are 16 bytes a parameter: 16 GB on every GPU under DDP.
DDP_PARAMETERS = 1_000_000_000
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def chosen(model: nn.Module, strategy: str) -> str:
    """ "ddp" or "fsdp"; "auto" is DDP for models of fewer than `DDP_PARAMETERS` parameters."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy is {strategy!r}; expected one of {', '.join(STRATEGIES)}")
    if strategy != "auto":
        return strategy
    return "ddp" if sum(p.numel() for p in model.parameters()) < DDP_PARAMETERS else "fsdp"


def shard(model: Any, ranks: Ranks, strategy: str = "auto") -> Any:
    """The student for many processes; itself where there is one. To be called before the optimizer is made.

    ``split.model = shard(split.model, ranks)``: FSDP2 changes the model in place, DDP wraps it (`split.plain` is the
    model inside). Both average gradients over ranks, so every rank divides its sums by ``count / world``, `count` being
    the valid tokens of the global batch.

    Raises:
        Refusal: the ranks hold different weights.
    """
    if ranks.world == 1:
        return model
    refuse_different("student", model, ranks)
    if chosen(model, strategy) == "fsdp":
        return _fully_sharded(model, ranks)
    return _replicated(model, ranks)


def place_teacher(model: Any, ranks: Ranks, *, sharded: bool = False) -> Any:
    """The teacher for many processes: a whole copy in each, or `sharded` by FSDP2, apart from the student.

    A sharded one may come on the CPU; each rank's share moves to its device. Then ``LiveTeacher(model, ...)``.
    """
    if ranks.world == 1:
        return model
    model = model.eval().requires_grad_(False)
    refuse_different("teacher", model, ranks)
    return _fully_sharded(model, ranks) if sharded else model


def _replicated(model: Any, ranks: Ranks) -> Any:
    wrapper = nn.parallel.DistributedDataParallel
    devices = None if ranks.device.type == "cpu" else [ranks.device]
    # Buffers are constants (rotary tables): no exchange in each forward pass. Its name changed with torch 2.13.
    names = ("forward_sync_buffers", "broadcast_buffers")
    no_buffers: dict[str, Any] = {next(name for name in names if name in signature(wrapper).parameters): False}
    return wrapper(model, device_ids=devices, gradient_as_bucket_view=True, **no_buffers)


def _fully_sharded(model: Any, ranks: Ranks) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    for block in blocks(model):
        fully_shard(block, mesh=mesh)
    # The rest, vocabulary matrix included, is the root's: gathered by the model's forward pass and kept to the end of
    # its backward pass, so that the loss finds a plain matrix and its gradient is reduced with the others.
    return fully_shard(model, mesh=mesh, reshard_after_forward=False)


def blocks(model: Any) -> list[nn.Module]:
    """The transformer blocks, inner ones first: modules that the model declares inseparable, else its longest list."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    head = model.get_output_embeddings()
    ends = {id(p) for end in (head, model.get_input_embeddings()) for p in end.parameters()}

    def inside(module: nn.Module) -> bool:
        return module is not model and not any(id(p) in ends for p in module.parameters())

    found = [m for m in model.modules() if type(m).__name__ in names and inside(m)]
    if not found:
        lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList)]
        found = [m for m in max(lists, key=len, default=[]) if inside(m)]
    return found[::-1]


def refuse_different(role: str, model: nn.Module, ranks: Ranks) -> None:
    """All ranks must hold the same weights: sums over their bits are compared."""
    names = [name for name, _ in model.named_parameters()]
    sums = [p.detach().view(_BITS[p.element_size()]).sum(dtype=torch.int64) for p in model.parameters()]
    found = ranks.gathered(dict(zip(names, torch.stack(sums).tolist(), strict=True)))
    for rank, other in enumerate(found):
        differing = sorted(name for name in found[0].keys() | other.keys() if found[0].get(name) != other.get(name))
        if differing:
            raise Refusal(
                f"rank {rank} holds another {role} than rank 0: {len(differing):,} of {len(found[0]):,} weights "
                f"differ, such as {differing[0]!r}; give every machine the same folder, or pin {role}.revision"
            )


@contextmanager
def without_sync(model: Any, *, last: bool) -> Iterator[None]:
    """Forward and backward passes inside leave gradients on their rank, except the step's `last`: it averages them.

    Takes a `SplitModel` or its model, on one process or many; one micro-batch an entry. Under FSDP2 the gradients that
    wait are whole ones: 4 bytes for each parameter of the model.
    """
    model = model.model if isinstance(model, SplitModel) else model
    inner = unwrapped(model)
    if hasattr(inner, "set_requires_gradient_sync"):
        inner.set_requires_gradient_sync(last)
        inner.set_is_last_backward(last)
        yield
    elif isinstance(model, nn.parallel.DistributedDataParallel) and not last:
        with model.no_sync():
            yield
    else:
        yield


def clip_gradients(model: nn.Module, clip_norm: float) -> Tensor:
    """Scale the gradients down to a common norm of `clip_norm` at most; their norm over all ranks before that."""
    trained = [p for p in model.parameters() if p.grad is not None]
    norm: Any = nn.utils.clip_grad_norm_(trained, clip_norm)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def full_state(model: Any, ranks: Ranks) -> dict[str, Tensor]:
    """The whole model's weights on the CPU of rank 0, a tied one once; empty on the others. All ranks must call it.

    ``split.plain.save_pretrained(folder, state_dict=full_state(split.model, ranks))`` on rank 0 writes the folder that
    one process would.
    """
    model = unwrapped(model)
    if hasattr(model, "set_requires_gradient_sync"):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        state: dict[str, Any] = get_model_state_dict(
            model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
    else:
        state = model.state_dict() if ranks.leads else {}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied = parameters - {name for name, _ in model.named_parameters()}
    left_out = (PROJECTIONS + ".",)
    return {name: t.detach().cpu() for name, t in state.items() if name not in tied and not name.startswith(left_out)}
