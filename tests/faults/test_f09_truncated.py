"""F9: each file of the newest checkpoint cut; it is put aside, said, and the one before it is taken."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import saving

FILES = ("manifest.json", "shard-00001.safetensors", "state.json")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saving.saved(tmp_path_factory.mktemp("whole"), steps=2)


@pytest.mark.parametrize("left", ["none", "half", "all but one"])
@pytest.mark.parametrize("name", FILES)
def test_cut(whole: Path, tmp_path: Path, name: str, left: str) -> None:
    folder = saving.copy_of(whole, tmp_path / "checkpoints")
    path = folder / "step-000000002" / name
    content = path.read_bytes()
    path.write_bytes(content[: {"none": 0, "half": len(content) // 2, "all but one": len(content) - 1}[left]])
    said = saving.assert_goes_on_as_never_stopped(folder, at=1)
    assert len(said) == 1
    assert re.fullmatch(r"step-000000002 is damaged \(.+\); kept as corrupt-step-000000002", said[0])
    assert saving.names(folder) == ["corrupt-step-000000002", "step-000000001"]
    assert not saving.assert_goes_on_as_never_stopped(folder, at=1)  # the next start has nothing more to say


def test_a_longer_file(whole: Path, tmp_path: Path) -> None:
    folder = saving.copy_of(whole, tmp_path / "checkpoints")
    with (folder / "step-000000002" / "shard-00001.safetensors").open("ab") as file:
        file.write(b"\0")
    assert "bytes, expected" in saving.assert_goes_on_as_never_stopped(folder, at=1)[0]
