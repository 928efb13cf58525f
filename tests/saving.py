"""What the tests of checkpoints save: a tiny model with a tied matrix, trained by a pure function of the step."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tailkd.errors import Refusal
from tailkd.train import commit
from tailkd.train.checkpoint import Checkpoints, Cursor
from tailkd.train.optim import build_optimizer

IDENTITY = {"objective.top_k": 5, "training.seed": 1}
OPTIMISER = {"training.learning_rate": 1e-2, "training.betas": (0.9, 0.95)}

State = tuple[nn.Module, torch.optim.Optimizer]


class Tiny(nn.Module):
    """Embedding, one layer with dropout, a head tied to the embedding; a buffer that counts calls."""

    calls: Tensor

    def __init__(self, width: int = 6, vocabulary: int = 11) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layer = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        self.calls += 1
        return self.head(self.norm(self.dropout(self.layer(self.embedding(ids)))))


def fresh(*, seed: int = 4, learning_rate: float = 1e-2, **sizes: int) -> State:
    torch.manual_seed(seed)
    model = Tiny(**sizes)
    return model, build_optimizer(model, learning_rate=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)


def update(state: State, step: int) -> None:
    """The update from `step` to the next."""
    model, optimizer = state
    optimizer.zero_grad()
    model(torch.arange(9) + step % 2).square().mean().backward()
    optimizer.step()


def trained(steps: int, **how: Any) -> State:
    state = fresh(**how)
    for step in range(steps):
        update(state, step)
    return state


def store(folder: Path, **more: Any) -> Checkpoints:
    return Checkpoints(folder, **{"identity": IDENTITY, "optimiser": OPTIMISER, **more})


def save(checkpoints: Checkpoints, state: State, step: int) -> None:
    """Save and wait until it is on the disk."""
    checkpoints.save(*state, Cursor(step, 70 * step, 1.5, 99))
    checkpoints.wait()


def saved(folder: Path, *, steps: int = 3, keep: int = 2) -> Path:
    """Train for some steps with a save after each; the folder."""
    state = fresh()
    with store(folder, keep=keep) as checkpoints:
        for step in range(steps):
            update(state, step)
            save(checkpoints, state, step + 1)
    return folder


def resume(folder: Path, **more: Any) -> tuple[Cursor, State, list[str]]:
    """Cursor, state and what was said, of a new process that finds this folder."""
    said: list[str] = []
    state = fresh(seed=99)
    with store(folder, say=said.append, **more) as checkpoints:
        return checkpoints.resume(*state), state, said


def assert_goes_on_as_never_stopped(folder: Path, at: int, until: int = 6) -> list[str]:
    """The newest good checkpoint is that of step `at`, and training from it ends in the very bits of a whole run."""
    cursor, state, said = resume(folder)
    assert cursor.step == at
    for step in range(at, until):
        update(state, step)
    assert_same(state, trained(until))
    return said


def everything(state: State) -> dict[str, Tensor]:
    """Every tensor of a state by name, dropout's random state too."""
    model, optimizer = state
    found = {**dict(model.named_parameters()), **{k: v for k, v in model.named_buffers() if not k.endswith("scratch")}}
    for number, values in optimizer.state_dict()["state"].items():
        found |= {f"{number}.{key}": value for key, value in values.items()}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def assert_same(one: State, other: State) -> None:
    left, right = everything(one), everything(other)
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def copy_of(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target, symlinks=True))


def refused(folder: Path) -> str:
    """The message of the refusal that this folder meets."""
    try:
        resume(folder)
    except Refusal as refusal:
        return str(refusal)
    raise AssertionError("was not refused")


def sign(folder: Path, change: Callable[[dict[str, Any]], None] = lambda content: None) -> None:
    """Write the manifest anew for what lies in the folder, as somebody who knows the format could."""
    files = {p.name: commit.measure(p) for p in folder.iterdir() if p.name != commit.MANIFEST}
    content: dict[str, Any] = {"format": commit.FORMAT, "files": files}
    change(content)
    (folder / commit.MANIFEST).write_bytes(commit._manifest(content["format"], content["files"]))


def edit_state(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / commit.STATE
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    sign(folder)
