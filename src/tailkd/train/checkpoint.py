"""Atomic save and resume of model, optimizer, cursor and random state; tensors in safetensors, the rest in JSON."""

from __future__ import annotations

import json
import shutil
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tailkd.errors import Refusal

FORMAT = 1


@dataclass(frozen=True)
class Cursor:
    """Where a run stands: optimizer steps done, valid tokens seen, seconds spent training, bytes of metrics.jsonl."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    metrics_bytes: int = 0


class Checkpoints:
    """The checkpoints of one run; `identity` is what a resumed run must share with the one that saved."""

    def __init__(self, folder: Path, *, identity: dict[str, Any], keep: int = 2) -> None:
        self.folder, self.identity, self.keep = folder, identity, keep

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, cursor: Cursor) -> None:
        """Written aside, then renamed: a folder named step-N is always whole."""
        target = self.folder / f"step-{cursor.step:09d}"
        temporary = self.folder / f".{target.name}-{uuid.uuid4().hex[:8]}"
        temporary.mkdir(parents=True)
        state = optimizer.state_dict()
        moments = {f"{i}.{name}": v for i, values in state["state"].items() for name, v in values.items()}
        save_file(_own(model), temporary / "model.safetensors")
        save_file(moments, temporary / "optimizer.safetensors")
        save_file({"torch": torch.get_rng_state()}, temporary / "random.safetensors")
        content = {
            "format": FORMAT,
            "cursor": asdict(cursor),
            "identity": self.identity,
            "param_groups": state["param_groups"],
        }
        (temporary / "state.json").write_text(json.dumps(content, indent=1))
        if target.exists():
            shutil.rmtree(target)
        temporary.replace(target)
        for old in self._all()[: -self.keep]:
            shutil.rmtree(old)

    def resume(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Cursor:
        """Load the newest checkpoint into model and optimizer; a fresh cursor where there is none.

        Raises:
            Refusal: the checkpoint belongs to another recipe, named key by key.
        """
        found = self._all()
        if not found:
            return Cursor()
        content = json.loads((found[-1] / "state.json").read_text())
        self._refuse_other(content, found[-1])
        _load_own(model, load_file(found[-1] / "model.safetensors"))
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in load_file(found[-1] / "optimizer.safetensors").items():
            index, name = key.split(".", 1)
            moments.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({"state": moments, "param_groups": content["param_groups"]})
        torch.set_rng_state(load_file(found[-1] / "random.safetensors")["torch"])
        return Cursor(**content["cursor"])

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))

    def _refuse_other(self, content: dict[str, Any], folder: Path) -> None:
        if content["format"] != FORMAT:
            raise Refusal(f"{folder} has checkpoint format {content['format']}; this tailkd reads format {FORMAT}")
        now = json.loads(json.dumps(self.identity))
        changed = [k for k in now if content["identity"].get(k) != now[k]]
        if changed:
            lines = "".join(f"\n  {k}: was {content['identity'].get(k)!r}, is {now[k]!r}" for k in changed)
            raise Refusal(
                f"{folder} was saved by another recipe:{lines}\ngive another `out`, take the old values back, "
                "or start anew with --fresh"
            )


def _own(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers once each, however many names a tied one has."""
    return {name: t.detach().contiguous() for name, t in (*model.named_parameters(), *model.named_buffers())}


def _load_own(model: nn.Module, saved: dict[str, Tensor]) -> None:
    own = dict((*model.named_parameters(), *model.named_buffers()))
    if own.keys() != saved.keys():
        raise Refusal(f"the checkpoint's weights are not this student's: {sorted(own.keys() ^ saved.keys())[:5]}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])
