"""F14, the store's part: another identity is refused by key; another optimiser key applies as stated and is said."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import saving

from tailkd.errors import Refusal


def test_identity(tmp_path: Path) -> None:
    saving.saved(tmp_path, steps=1)
    now = {"objective.top_k": 6, "data.context": 48}
    with saving.store(tmp_path, identity=now) as checkpoints, pytest.raises(Refusal) as caught:
        checkpoints.resume(*saving.fresh())
    assert str(caught.value).splitlines() == [
        f"{tmp_path / 'step-000000001'} was saved by another recipe:",
        "  objective.top_k: was 5, is 6",
        "  training.seed: was 1, is None",
        "  data.context: was None, is 48",
        "give another `out`, take the old values back, allow a key with --allow-change KEY, or start anew with --fresh",
    ]
    assert saving.resume(tmp_path)[0].step == 1


def test_a_key_that_may_change(tmp_path: Path) -> None:
    saving.saved(tmp_path, steps=1)
    now = {**saving.IDENTITY, "objective.top_k": 6}
    cursor, state, said = saving.resume(tmp_path, identity=now, allow_change={"objective.top_k"})
    assert cursor.step == 1
    assert said == ["changed since step-000000001, applies from now on: objective.top_k: was 5, is 6"]
    with saving.store(tmp_path, identity=now) as checkpoints:
        saving.save(checkpoints, state, 2)
    assert not saving.resume(tmp_path, identity=now)[2]
    assert "objective.top_k: was 6, is 5" in saving.refused(tmp_path)


def test_the_optimizer_does_as_the_recipe_says_now(tmp_path: Path) -> None:
    saving.saved(tmp_path, steps=2)
    said: list[str] = []
    model, optimizer = saving.fresh(seed=99, learning_rate=3e-3)
    now = {**saving.OPTIMISER, "training.learning_rate": 3e-3}
    with saving.store(tmp_path, optimiser=now, say=said.append) as checkpoints:
        checkpoints.resume(model, optimizer)
    assert said == ["changed since step-000000002, applies from now on: training.learning_rate: was 0.01, is 0.003"]
    assert [group["lr"] for group in optimizer.param_groups] == [3e-3, 3e-3]
    assert all(math.isclose(values["step"], 2) for values in optimizer.state.values())
    expected = saving.trained(2)
    for group in expected[1].param_groups:
        group["lr"] = 3e-3
    for state in (expected, (model, optimizer)):
        saving.torch.manual_seed(7)
        saving.update(state, 2)
    saving.assert_same(expected, (model, optimizer))


def test_the_same_values_in_another_type_are_no_change(tmp_path: Path) -> None:
    saving.saved(tmp_path, steps=1)
    assert not saving.resume(tmp_path, optimiser={**saving.OPTIMISER, "training.betas": [0.9, 0.95]})[2]
