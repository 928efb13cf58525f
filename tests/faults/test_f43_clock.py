"""F43, the store's part: order and rotation go by the step, whatever the clock and the dates of files say."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import saving


def test_a_clock_that_goes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = saving.trained(0)
    with saving.store(tmp_path) as checkpoints:
        for step in range(4):
            monkeypatch.setattr(time, "time", lambda day=step: 1e9 - 86_400 * day)
            saving.update(state, step)
            saving.save(checkpoints, state, step + 1)
            for path in (*tmp_path.rglob("*"), tmp_path):
                os.utime(path, (1e9, 1e9 - 86_400 * step * (1 + (path.parent != tmp_path))))
    os.utime(tmp_path / "step-000000003", (2e9, 2e9))
    assert saving.names(tmp_path) == ["step-000000003", "step-000000004"]
    saving.assert_goes_on_as_never_stopped(tmp_path, at=4)


def test_a_step_of_more_digits_is_the_newer_one(tmp_path: Path) -> None:
    state = saving.trained(1)
    with saving.store(tmp_path) as checkpoints:
        for step in (999_999_998, 999_999_999, 1_000_000_000):
            saving.save(checkpoints, state, step)
    assert saving.names(tmp_path) == ["step-1000000000", "step-999999999"]
    assert saving.resume(tmp_path)[0].step == 1_000_000_000
