"""The processes of one run: which one is this, and what all of them say."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from tailkd.errors import Refusal
from tailkd.models import precision

T = TypeVar("T")

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # torchrun sets them
# torchrun ends all processes when one dies, so these are for one that hangs.
TIMEOUT = "TAILKD_TIMEOUT"  # environment variable: seconds that a step's exchanges may take
SECONDS = 1800.0  # where it is not set
PATIENCE = timedelta(days=1)  # of `wait`: one process may prepare a corpus or write a large file meanwhile


class Late(RuntimeError):
    """Another process did not come to an exchange in time."""


def timeout() -> timedelta:
    """How long a process waits for the others in a step or a save: TAILKD_TIMEOUT in seconds, else half an hour.

    Raises:
        Refusal: it is not a number of seconds.
    """
    given = os.environ.get(TIMEOUT, str(SECONDS))
    with suppress(ValueError, OverflowError):
        if (found := timedelta(seconds=float(given))) > timedelta(0):
            return found
    raise Refusal(f"{TIMEOUT} is {given!r}; expected seconds, such as 600: how long a process waits for the others")


@contextmanager
def waiting_for(what: str) -> Iterator[None]:
    """Where another process does not come to the exchange in time: an error that says which exchange it was.

    Raises:
        Late: naming this rank, the time and `what`; any other error passes as it is.
    """
    import torch.distributed as dist

    try:
        yield
    except RuntimeError as error:
        late = "timed out" in str(error).lower() and dist.is_available() and dist.is_initialized()
        if not late or isinstance(error, Late):
            raise
        raise Late(
            f"rank {dist.get_rank()} of {dist.get_world_size()} waited {timeout().total_seconds():g} s in vain for "
            f"another process {what}: it hangs, or {TIMEOUT} is too short"
        ) from error


@dataclass(frozen=True)
class Ranks:
    """This process among the `world` processes of a run; `local` numbers those of one machine.

    Methods that exchange something must be called by all ranks, in the same order; alone they exchange nothing.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    _patient: Any = field(default=None, repr=False, compare=False)

    @staticmethod
    def alone() -> Ranks:
        return ALONE

    @staticmethod
    def start() -> Ranks:
        """Join the other processes that torchrun started; alone where it started none.

        Raises:
            Refusal: some of torchrun's variables are missing or no numbers, or there are fewer GPUs than processes.
        """
        found = {name: os.environ[name] for name in VARIABLES if name in os.environ}
        if found.get("WORLD_SIZE", "1") == "1":
            return ALONE
        if len(found) < len(VARIABLES) or not all(value.isdecimal() for value in found.values()):
            raise Refusal(
                f"of torchrun's variables {', '.join(VARIABLES)} came {found}; expected three numbers: start with "
                "`torchrun --nproc-per-node=N -m tailkd ...`, or unset WORLD_SIZE to run one process"
            )
        rank, world, local = (int(found[name]) for name in VARIABLES)
        return Ranks(rank, world, local, _join(rank, world, local))

    @property
    def device(self) -> torch.device:
        found = precision.default_device()
        return found if self.world == 1 or found.type == "cpu" else torch.device(found.type, self.local)

    @property
    def leads(self) -> bool:
        """Is this the one that writes and speaks?"""
        return self.rank == 0

    def largest(self, values: Tensor) -> Tensor:
        """Element by element the largest over ranks. Of numbers: whether NaN wins is up to the backend."""
        return values if self.world == 1 else _reduced(values, "MAX")

    def summed(self, values: Tensor) -> Tensor:
        """Element by element the sum over ranks."""
        return values if self.world == 1 else _reduced(values, "SUM")

    def gathered(self, value: T) -> list[T]:
        """Every rank's value, in rank order: a tensor (it comes on the CPU, of any shape) or plain Python data."""
        own: Any = value.cpu() if isinstance(value, Tensor) else value
        if self.world == 1:
            return [own]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world
        with waiting_for("to hear what it found"):
            dist.all_gather_object(values, own)
        return values

    def agreed(self, number: int) -> int:
        """The largest of a number over ranks, without asking a GPU."""
        return int(self.largest(torch.tensor(number)))

    def wait(self) -> None:
        """Until every rank is here; up to `PATIENCE`."""
        if self.world > 1:
            import torch.distributed as dist

            dist.all_reduce(torch.zeros(1), group=self._patient)

    @contextmanager
    def in_turns(self) -> Iterator[None]:
        """Rank 0 goes through the body first, then one rank of each other machine, then the rest.

        For what is made once and then found on disk, whether machines share the disk or not.
        """
        turn = 0 if self.rank == 0 else 1 if self.local == 0 else 2
        for _ in range(turn):
            self.wait()
        try:
            yield
        finally:  # also after an error, which the others will meet for themselves
            for _ in range(2 - turn):
                self.wait()

    def finish(self) -> None:
        """Leave the other processes."""
        if self.world > 1:
            import torch.distributed as dist

            if dist.is_initialized():
                dist.destroy_process_group()


ALONE = Ranks()


def _join(rank: int, world: int, local: int) -> Any:
    """Make the process group of the run; the group in which ranks wait for each other is another one."""
    import torch.distributed as dist

    backend = "gloo"
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise Refusal(
                f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}; start torchrun "
                f"with --nproc-per-node={torch.cuda.device_count()} or less"
            )
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, rank=rank, world_size=world, timeout=timeout())
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def _reduced(values: Tensor, operation: str) -> Tensor:
    import torch.distributed as dist

    result = values.detach().clone()
    with waiting_for("to add up what all of them have" if operation == "SUM" else "to agree whether to go on"):
        dist.all_reduce(result, op=getattr(dist.ReduceOp, operation))
    return result
