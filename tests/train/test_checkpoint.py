"""Save and resume: bit for bit, only whole ones, only the same recipe."""

from __future__ import annotations

from pathlib import Path

import builders
import pytest
import torch

from tailkd.errors import Refusal
from tailkd.train.checkpoint import Checkpoints, Cursor
from tailkd.train.optim import build_optimizer

IDENTITY = {"objective.top_k": 5, "training.seed": 1}


def trained(steps: int = 3) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = builders.build_model(50, seed=4)
    optimizer = build_optimizer(model, learning_rate=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(steps):
        update(model, optimizer, step)
    return model, optimizer


def update(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.zero_grad()
    model(torch.arange(9).unsqueeze(0) + step).logits.square().mean().backward()
    optimizer.step()


def test_resumed_training_is_bit_equal(tmp_path: Path) -> None:
    model, optimizer = trained()
    checkpoints = Checkpoints(tmp_path, identity=IDENTITY)
    checkpoints.save(model, optimizer, Cursor(3, 70, 1.5, 99))
    expected = torch.rand(4)
    again, second = trained(0)
    assert checkpoints.resume(again, second) == Cursor(3, 70, 1.5, 99)
    assert torch.equal(torch.rand(4), expected)
    for step in (3, 4):
        update(model, optimizer, step)
        update(again, second, step)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_no_checkpoint_is_a_fresh_start(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path, identity={}).resume(*trained(0)) == Cursor()


def test_old_ones_go_and_torn_ones_are_not_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trained()
    checkpoints = Checkpoints(tmp_path, identity=IDENTITY, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(model, optimizer, Cursor(step))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000000002", "step-000000003"]

    def torn(self: Path, target: Path) -> Path:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", torn)
        with pytest.raises(OSError, match="no space left"):
            checkpoints.save(model, optimizer, Cursor(4))
    assert checkpoints.resume(model, optimizer).step == 3


def test_other_formats_and_other_models_are_refused(tmp_path: Path) -> None:
    model, optimizer = trained()
    checkpoints = Checkpoints(tmp_path, identity=IDENTITY)
    checkpoints.save(model, optimizer, Cursor(1))
    wider = builders.build_model(50, layers=3)
    with pytest.raises(Refusal, match=r"the checkpoint's weights are not this student's: .*layers.2"):
        checkpoints.resume(wider, optimizer)
    state = tmp_path / "step-000000001" / "state.json"
    state.write_text(state.read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(Refusal, match=r"has checkpoint format 9; this tailkd reads format 1"):
        checkpoints.resume(model, optimizer)


def test_another_recipe_is_refused_key_by_key(tmp_path: Path) -> None:
    model, optimizer = trained()
    Checkpoints(tmp_path, identity=IDENTITY).save(model, optimizer, Cursor(1))
    with pytest.raises(Refusal, match=r"objective.top_k: was 5, is 6\n"):
        Checkpoints(tmp_path, identity={**IDENTITY, "objective.top_k": 6}).resume(model, optimizer)
