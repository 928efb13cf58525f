"""F10: one random bit flipped in a file, manifest included, 200 times: 200 are seen."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import saving

from tailkd.train import commit

FLIPS = 200


def test_every_flip_is_seen(tmp_path: Path) -> None:
    folder = saving.saved(tmp_path, steps=1) / "step-000000001"
    files = sorted(folder.iterdir())
    draw = random.Random(10)
    seen = 0
    for number in range(FLIPS):
        path = files[number % len(files)]
        content = bytearray(path.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        whole = path.read_bytes()
        path.write_bytes(content)
        try:
            commit.verified(folder)
        except commit.Damaged:
            seen += 1
        path.write_bytes(whole)
    assert seen == FLIPS
    assert commit.verified(folder)["cursor"]["step"] == 1


@pytest.mark.parametrize("name", ["manifest.json", "shard-00001.safetensors", "state.json"])
def test_the_run_goes_on_from_the_one_before(tmp_path: Path, name: str) -> None:
    folder = saving.saved(tmp_path, steps=2)
    path = folder / "step-000000002" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    said = saving.assert_goes_on_as_never_stopped(folder, at=1)
    assert "is damaged" in said[0]


def test_every_bit_of_a_manifest(tmp_path: Path) -> None:
    """Spaces and hash digits too."""
    folder = saving.saved(tmp_path, steps=1) / "step-000000001"
    path = folder / "manifest.json"
    whole = path.read_bytes()
    for position in range(len(whole)):
        content = bytearray(whole)
        content[position] ^= 1 << position % 8
        path.write_bytes(content)
        with pytest.raises(commit.Damaged):
            commit.verified(folder)
