"""The state of a model and its optimizer as named tensors, on the disk through torch.distributed.checkpoint.

One process or many, sharded by `fully_shard` or not: each rank writes one safetensors file with its part, and any
number of ranks reads them. This file alone knows torch's engine. It reads and writes tensors, never a pickle.
"""

from __future__ import annotations

import json
import math
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from tailkd.errors import Refusal
from tailkd.train.collective import Collective
from tailkd.train.commit import Damaged, Written, write_file

MOMENTS = "optimizer."
SERIAL = 1 << 15  # torch splits work on more elements than this over threads; the writing thread starts none
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


# ----- names


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, a tied one once; they share memory with the model's own."""
    bare = _bare(model)
    state = bare.state_dict()  # first: it makes fully_shard put its parameters back into shards
    names: dict[int, str] = {}
    for name, tensor in _all_named(bare):
        names.setdefault(id(tensor), name)
    kept = set(names.values())
    found = {_plain(name): tensor.detach() for name, tensor in state.items() if name in kept}
    assert not any(name.startswith(MOMENTS) for name in found)
    return found


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors as ``optimizer.PARAMETER.KEY``; none before its first step.

    Unlike ``get_optimizer_state_dict``, which steps a fresh optimizer to fill it, this changes nothing.
    """
    return {
        f"{MOMENTS}{name}.{key}": value
        for name, parameter in _trained(model, optimizer)
        for key, value in optimizer.state.get(parameter, {}).items()
        if value is not None
    }


def _trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    names = {id(parameter): _plain(name) for name, parameter in _bare(model).named_parameters()}
    return [(names[id(p)], p) for group in optimizer.param_groups for p in group["params"]]


def _bare(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def _all_named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))


def _plain(name: str) -> str:
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


# ----- copies


def owned(tensors: dict[str, Tensor], ranks: Collective) -> dict[str, Tensor]:
    """What this rank saves: its shard of a sharded tensor, and its share, by bytes, of those that all ranks hold."""
    if ranks.world == 1:
        return tensors
    mine, loads = {}, [0] * ranks.world
    for name, tensor in sorted(tensors.items(), key=lambda pair: (-pair[1].nbytes, pair[0])):
        if isinstance(tensor, DTensor):
            mine[name] = tensor
            continue
        rank = loads.index(min(loads))
        loads[rank] += tensor.nbytes
        if rank == ranks.rank:
            mine[name] = tensor
    return mine


class HostCopies:
    """Copies in host memory that is allocated at the first save and used again at the others."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The local values as they are now; valid until the next call."""
        local = {name: _local(tensor.detach()) for name, tensor in tensors.items()}
        self._held = {name: self._place(name, tensor) for name, tensor in local.items()}
        for name, tensor in local.items():
            self._held[name].copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in local.values()):
            torch.cuda.current_stream().synchronize()
        return self._held

    def _place(self, name: str, tensor: Tensor) -> Tensor:
        held = self._held.get(name)
        if held is not None and held.shape == tensor.shape and held.dtype == tensor.dtype:
            return held
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda and tensor.numel() > 0)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def not_finite(copies: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that hold a NaN or an infinity."""
    floating = {name: tensor for name, tensor in copies.items() if tensor.is_floating_point()}
    return sorted(name for name, tensor in floating.items() if not _finite(tensor))


def _finite(tensor: Tensor) -> bool:
    # A NaN or an infinity never leaves a sum; a sum may overflow by itself, so a suspect piece is looked at again.
    pieces = tensor.reshape(-1).split(SERIAL)
    return all(math.isfinite(piece.sum()) or bool(piece.isfinite().all()) for piece in pieces)


# ----- disk


class _FromCopies(DefaultSavePlanner):
    """Plans by the placement of the live tensors, reads the values from the copies."""

    def __init__(self, copies: dict[str, Tensor]) -> None:
        super().__init__()
        self._copies = copies

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._copies[index.fqn]


class _Writer(HuggingFaceStorageWriter):
    """Streams the copies to the disk as they are: torch's own writer makes two more copies in memory first."""

    def __init__(self, folder: Path) -> None:
        super().__init__(path=str(folder), save_distributed=True, enable_consolidation=False)
        self.folder = folder
        self.written: dict[str, Written] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[Any]]:
        items = [(item, planner.resolve_data(item)) for item in plan.items if not _nothing_of_something(item)]
        if items:
            name = f"shard-{plan.storage_data['shard_index']:05d}.safetensors"
            self.written[name] = write_file(self.folder / name, _safetensors(items))
        done: Future[list[Any]] = Future()
        done.set_result([])
        return done


def _nothing_of_something(item: WriteItem) -> bool:
    """Whether this is the empty part of a rank that got nothing of a small tensor."""
    data = item.tensor_data
    assert data is not None
    return math.prod(data.chunk.sizes) == 0 and math.prod(data.size) > 0


def _safetensors(items: list[tuple[WriteItem, Any]]) -> Iterator[Any]:
    """The bytes of a safetensors file that says of each tensor which slice it is, in pieces."""
    items = sorted(items, key=lambda pair: (-pair[1].itemsize, pair[0].index.fqn))  # wide types first keep all aligned
    header: dict[str, Any] = {}
    offsets: dict[str, Any] = {}
    end = 0
    for item, tensor in items:
        start, end = end, end + tensor.nbytes
        name = item.index.fqn
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        assert item.tensor_data is not None
        offsets[name] = {"saved_offsets": list(item.tensor_data.chunk.offsets)}
    sharding = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
    text = json.dumps({"__metadata__": sharding, **header}).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for _, tensor in items:
        yield tensor.reshape(-1).view(torch.uint8).numpy()


def write(tensors: dict[str, Tensor], copies: dict[str, Tensor], folder: Path, ranks: Collective) -> dict[str, Written]:
    """Write the copies of this rank's tensors; the files of this rank. Called by all ranks together."""
    writer = _Writer(folder)
    with _engine():
        save(
            tensors,
            storage_writer=writer,
            planner=_FromCopies(copies),
            process_group=ranks.group,
            no_dist=ranks.group is None,
        )
    return writer.written


def stored(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Name, size and type of each tensor in a folder of safetensors files.

    Raises:
        Damaged: a header lies, or the parts of a tensor do not cover it once.
    """
    try:
        found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
        for name, tensor in found.items():
            assert isinstance(tensor, TensorStorageMetadata)
            if not _covered(tensor):
                raise Damaged(f"the parts of {name} do not make up a tensor of {list(tensor.size)}")
    except Exception as error:  # whatever a header of any content makes a parser raise
        raise error if isinstance(error, Damaged) else Damaged(f"{type(error).__name__}: {error}") from error
    return found  # type: ignore[return-value]


def _covered(tensor: TensorStorageMetadata) -> bool:
    """Whether the parts are slices along the first dimension, without gap or overlap."""
    end = 0
    for part in sorted(tensor.chunks, key=lambda part: (*part.offsets, *part.sizes)):
        if len(part.offsets) != len(tensor.size):
            return False
        if not tensor.size:
            return len(tensor.chunks) == 1
        if part.offsets[0] != end or any(part.offsets[1:]) or part.sizes[1:] != tensor.size[1:]:
            return False
        end += part.sizes[0]
    return end == tensor.size[0]


def read(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Collective) -> None:
    """Load weights and moments in place; param_groups stay as the optimizer was built. Called by all ranks together.

    Raises:
        Refusal: the weights are not this model's; nothing was changed.
    """
    found = stored(folder)
    own = weights(model)
    saved = {name: one for name, one in found.items() if not name.startswith(MOMENTS)}
    other = sorted(own.keys() ^ saved.keys()) or sorted(
        name for name, one in own.items() if (one.size(), one.dtype) != (saved[name].size, saved[name].properties.dtype)
    )
    room = _room(found, dict(_trained(model, optimizer)))
    other = other or sorted(found.keys() - own.keys() - room.keys())
    if other:
        raise Refusal(
            f"the checkpoint's weights are not this student's: {', '.join(other[:5])} differ in name, size or type; "
            "take the old student and precision back, or start anew with --fresh"
        )
    with _engine():
        load(
            {**own, **room},
            storage_reader=HuggingFaceStorageReader(str(folder)),
            process_group=ranks.group,
            no_dist=ranks.group is None,
        )
    packed = optimizer.state_dict()
    numbers = {name: number for number, (name, _) in enumerate(_trained(model, optimizer))}
    packed["state"] = {}
    for name, value in room.items():
        parameter, _, key = name.removeprefix(MOMENTS).rpartition(".")
        packed["state"].setdefault(numbers[parameter], {})[key] = value
    optimizer.load_state_dict(packed)


def _room(found: dict[str, TensorStorageMetadata], trained: dict[str, Tensor]) -> dict[str, Tensor]:
    """Empty tensors for the saved moments: placed as their parameter where they have its size."""
    room: dict[str, Tensor] = {}
    for name, one in found.items():
        parameter = trained.get(name.removeprefix(MOMENTS).rpartition(".")[0])
        if not name.startswith(MOMENTS) or parameter is None:
            continue
        like = one.size == parameter.size()
        dtype = one.properties.dtype
        room[name] = torch.empty_like(parameter, dtype=dtype) if like else torch.empty(one.size, dtype=dtype)
    return room


@contextmanager
def _engine() -> Iterator[None]:
    """Torch's engine without its remark on single processes; its errors as they were raised, not wrapped."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
    try:
        yield
    except CheckpointException as wrapped:
        raise next(iter(wrapped.failures.values()))[0] from None
