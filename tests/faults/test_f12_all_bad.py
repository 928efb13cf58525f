"""F12: no checkpoint is whole: refused (exit code 2), again at the next start, and never a start from step 0."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import saving

from tailkd.errors import REFUSED, Refusal


def test_all_bad(tmp_path: Path) -> None:
    folder = saving.saved(tmp_path / "checkpoints", steps=2)
    for step in (1, 2):
        (folder / f"step-00000000{step}" / "state.json").write_text("{}")
    message = (
        r".*checkpoints holds no checkpoint that is whole, only corrupt-step-000000001, corrupt-step-000000002; "
        "bring an undamaged copy back as step-N, or start anew with --fresh"
    )
    for _ in range(2):
        assert re.fullmatch(message, saving.refused(folder))
    assert Refusal.exit_code == REFUSED == 2
    assert saving.names(folder) == ["corrupt-step-000000001", "corrupt-step-000000002"]
    shutil.rmtree(folder)  # what --fresh does
    assert saving.resume(folder)[0].step == 0
