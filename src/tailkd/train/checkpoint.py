"""Save and resume a run: model, optimizer, cursor and random state, in folders that are whole or not there.

`commit.py` has the folders, `tensors.py` what is in the safetensors files; numbers and names are JSON.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import xxhash
from torch import Tensor, nn

from tailkd.errors import Diverged, Refusal
from tailkd.train import commit, tensors
from tailkd.train.collective import Collective

SPARE = 1.25  # bytes that must be free for a save, per byte that it writes


@dataclass(frozen=True)
class Cursor:
    """Where a run stands: optimizer steps done, valid tokens seen, seconds spent training, bytes of metrics.jsonl.

    skipped: steps whose update was not applied, and how many of them in a row. evaluation_due: whether the held-out
    measures of this step are still to be taken.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    metrics_bytes: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    evaluation_due: bool = False


class _Taken(NamedTuple):
    """A state copied out of the training: live tensors for their placement, copies for their values."""

    cursor: Cursor
    live: dict[str, Tensor]
    copies: dict[str, Tensor]
    random: dict[str, str]
    param_groups: list[dict[str, Any]]


class Checkpoints:
    """The checkpoints of one run in one folder; on many ranks every rank makes one and calls it alike.

    Args:
        folder: made if it is not there.
        identity: what a resumed run must share with the one that saved, by key.
        optimiser: what may change between the two; the new values apply, and each difference is said.
        keep: checkpoints left after a save; at least one.
        allow_change: keys of `identity` that may differ after all.
        say: takes one line for the user.
    """

    def __init__(
        self,
        folder: Path,
        *,
        identity: dict[str, Any],
        optimiser: dict[str, Any] | None = None,
        keep: int = 2,
        allow_change: Set[str] = frozenset(),
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        assert keep >= 1
        self.folder, self.keep, self.allow_change = folder, keep, allow_change
        self.identity, self.optimiser = _as_stored(identity), _as_stored(optimiser or {})
        self._ranks = Collective()
        self._say = say if self._ranks.rank == 0 else lambda line: None
        self._copies = tensors.HostCopies()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[str | None] | None = None
        self._ranks.first(lambda: folder.mkdir(parents=True, exist_ok=True))

    # ----- saving

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, cursor: Cursor) -> None:
        """Copy the state to host memory and return; a thread writes it while training goes on.

        Waits for the save before and raises what `wait` raises; then this state is not saved.
        """
        self.wait()
        live = tensors.owned({**tensors.weights(model), **tensors.moments(model, optimizer)}, self._ranks)
        groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        taken = _Taken(cursor, live, self._copies.take(live), _random_state(), groups)
        self._pending = self._thread.submit(self._write, taken)

    def wait(self) -> None:
        """Return when the last save is whole on the disk.

        Raises:
            Diverged: its weights or moments were not finite; nothing was written.
            OSError: it could not be written (errno ENOSPC, EROFS, ...); the checkpoints before it are untouched.
        """
        pending, self._pending = self._pending, None
        if pending is not None and (line := pending.result()):
            self._say(line)

    def close(self) -> None:
        """Wait, and end the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close: a run that fails still ends its last save, whose own trouble is then only said."""
        try:
            self.close()
        except (OSError, Diverged) as trouble:
            if kind is None:
                raise
            self._say(str(trouble))

    def _write(self, taken: _Taken) -> str | None:
        """The whole of a save, in the thread; a line for the user if something less than the save went wrong."""
        step, ranks = taken.cursor.step, self._ranks
        told = ranks.gather(lambda: (_size(taken.copies), tensors.not_finite(taken.copies)))
        if bad := [name for _, names in told for name in names]:
            raise Diverged(f"step {step} is not saved: {_few(bad)} not finite; the checkpoints before it stand")
        needed = int(SPARE * sum(size for size, _ in told))
        staged = None
        try:
            staged = ranks.first(lambda: commit.stage(self.folder, step, needed))
            written = tensors.write(taken.live, taken.copies, staged, ranks)
            parts = ranks.gather(lambda: (written, taken.random))
            return ranks.first(lambda: self._commit(staged, taken, parts))
        except Exception as error:
            if staged is not None and ranks.rank == 0:
                shutil.rmtree(staged, ignore_errors=True)
            if not isinstance(error, OSError):
                raise
            told_so = f"step {step} is not saved ({needed:,} bytes with spare): {error.strerror or error}"
            raise OSError(error.errno, f"{told_so}; the checkpoints before it stand", str(self.folder)) from error

    def _commit(self, staged: Path, taken: _Taken, parts: list[tuple[dict[str, commit.Written], Any]]) -> str | None:
        """Rank 0, after all have written: from here on the folder is a checkpoint."""
        state = {
            "format": commit.FORMAT,
            "cursor": asdict(taken.cursor),
            "identity": self.identity,
            "optimiser": self.optimiser,
            "param_groups": taken.param_groups,
            "world_size": self._ranks.world,
            "random": [random for _, random in parts],
            "versions": {name: metadata.version(name) for name in ("tailkd", "torch")},
        }
        commit.seal(staged, {name: one for files, _ in parts for name, one in files.items()}, state)
        published = commit.publish(staged, taken.cursor.step)
        try:
            commit.rotate(published, self.keep)
        except OSError as error:
            return f"{published.name} is saved, but an older checkpoint could not be removed: {error}"
        return None

    # ----- resuming

    def resume(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Cursor:
        """Load the newest checkpoint that proves whole into model and optimizer; a fresh cursor where there is none.

        One that fails its check is renamed corrupt-step-N, said, and the one before it is taken. `param_groups` stay
        as the optimizer was built, so that what the recipe says now applies.

        Raises:
            Refusal: none of them is whole; or it belongs to another recipe or student, named key by key.
        """
        found = self._ranks.first(self._newest)
        if found is None:
            return Cursor()
        folder, state = found
        tensors.read(folder, model, optimizer, self._ranks)
        self._restore_random(state["random"])
        return Cursor(**state["cursor"])

    def _newest(self) -> tuple[Path, dict[str, Any]] | None:
        commit.sweep(self.folder)
        for folder in reversed(commit.committed(self.folder)):
            try:
                state = commit.verified(folder)
                tensors.stored(folder)
            except commit.Damaged as damage:
                self._say(f"{folder.name} is damaged ({damage}); kept as {commit.quarantine(folder).name}")
                continue
            self._same_run(state, folder)
            return folder, state
        if bad := commit.quarantined(self.folder):
            raise Refusal(
                f"{self.folder} holds no checkpoint that is whole, only {_few(sorted(path.name for path in bad))}; "
                "bring an undamaged copy back as step-N, or start anew with --fresh"
            )
        return None

    def _same_run(self, state: dict[str, Any], folder: Path) -> None:
        """Refuse another identity; say what changed and is allowed to."""
        changed = _differences(state["identity"], self.identity)
        refused = "".join(f"\n  {line}" for key, line in changed.items() if key not in self.allow_change)
        if refused:
            raise Refusal(
                f"{folder} was saved by another recipe:{refused}\ngive another `out`, take the old values back, "
                "allow a key with --allow-change KEY, or start anew with --fresh"
            )
        for line in (*changed.values(), *_differences(state["optimiser"], self.optimiser).values()):
            self._say(f"changed since {folder.name}, applies from now on: {line}")

    def _restore_random(self, saved: list[dict[str, str]]) -> None:
        """Each rank's own state; for another number of ranks, a seed that is a pure function of what was saved."""
        rank, world = self._ranks.rank, self._ranks.world
        if len(saved) == world:
            torch.set_rng_state(_bytes(saved[rank]["torch"]))
            if torch.cuda.is_available() and "cuda" in saved[rank]:
                torch.cuda.set_rng_state(_bytes(saved[rank]["cuda"]))
            return
        torch.manual_seed(xxhash.xxh3_64_intdigest(f"{rank}/{world} {saved[0]['torch']}".encode()) >> 1)
        self._say(f"saved by {len(saved)} processes, resumed by {world}: random numbers start from a new fixed seed")


def _random_state() -> dict[str, str]:
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return {name: base64.b64encode(value.numpy().tobytes()).decode() for name, value in state.items()}


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _as_stored(values: dict[str, Any]) -> dict[str, Any]:
    """As they will be read back: tuples become lists."""
    return json.loads(json.dumps(values))


def _differences(was: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    keys = [key for key in {**was, **now} if was.get(key) != now.get(key)]
    return {key: f"{key}: was {was.get(key)!r}, is {now.get(key)!r}" for key in keys}


def _size(copies: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in copies.values())


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
