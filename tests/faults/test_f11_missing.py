"""F11: files deleted or added, links, foreign folders: put aside or ignored, and never a fresh optimizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import saving

from tailkd.train.checkpoint import Cursor


@pytest.mark.parametrize("name", ["manifest.json", "shard-00001.safetensors", "state.json"])
def test_a_file_is_missing(tmp_path: Path, name: str) -> None:
    folder = saving.saved(tmp_path, steps=2)
    (folder / "step-000000002" / name).unlink()
    said = saving.assert_goes_on_as_never_stopped(folder, at=1)
    assert len(said) == 1
    assert name in said[0]
    assert saving.names(folder) == ["corrupt-step-000000002", "step-000000001"]


def test_a_file_too_many(tmp_path: Path) -> None:
    folder = saving.saved(tmp_path, steps=2)
    (folder / "step-000000002" / "shard-00002.safetensors").write_bytes(b"")
    assert saving.assert_goes_on_as_never_stopped(folder, at=1) == [
        "step-000000002 is damaged ('shard-00002.safetensors' is not in manifest.json); kept as corrupt-step-000000002"
    ]


def test_an_empty_folder(tmp_path: Path) -> None:
    folder = saving.saved(tmp_path, steps=2)
    (folder / "step-000000003").mkdir()
    said = saving.assert_goes_on_as_never_stopped(folder, at=2)
    assert said[0].startswith("step-000000003 is damaged")


def test_the_state_of_another_step(tmp_path: Path) -> None:
    folder = saving.saved(tmp_path, steps=2)
    saving.copy_of(folder / "step-000000001", folder / "step-000000007")
    assert saving.assert_goes_on_as_never_stopped(folder, at=2) == [
        "step-000000007 is damaged (state.json is that of step 1); kept as corrupt-step-000000007"
    ]


def test_a_file_is_a_link(tmp_path: Path) -> None:
    folder = saving.saved(tmp_path / "checkpoints", steps=2)
    shard = folder / "step-000000002" / "shard-00001.safetensors"
    shard.rename(tmp_path / "shard")
    shard.symlink_to(tmp_path / "shard")
    said = saving.assert_goes_on_as_never_stopped(folder, at=1)
    assert "shard-00001.safetensors is not a plain file" in said[0]
    assert (tmp_path / "shard").is_file()


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    folder = saving.saved(tmp_path / "checkpoints", steps=2)
    saving.copy_of(folder / "step-000000001", tmp_path / "linked")
    foreign = ["step-999", "step-000000009", "step-latest", "notes", "step-000000008"]
    (folder / "step-999").mkdir()
    (folder / "step-999" / "precious").touch()
    (folder / "step-latest").symlink_to(folder / "step-000000001")
    (folder / "step-000000009").symlink_to(tmp_path / "linked")
    (folder / "step-000000008").touch()
    (folder / "notes").mkdir()
    assert not saving.assert_goes_on_as_never_stopped(folder, at=2)
    with saving.store(folder) as checkpoints:
        saving.save(checkpoints, saving.trained(3), 3)
        saving.save(checkpoints, saving.trained(4), 4)
    assert saving.names(folder) == sorted([*foreign, "step-000000003", "step-000000004"])
    assert (folder / "step-999" / "precious").exists()
    assert len(saving.names(tmp_path / "linked")) == 3


@pytest.mark.parametrize("kind", ["file", "link", "link to nothing"])
def test_something_foreign_where_a_checkpoint_will_be(tmp_path: Path, kind: str) -> None:
    folder = saving.saved(tmp_path / "checkpoints", steps=2)
    place = folder / "step-000000003"
    if kind == "file":
        place.write_text("mine")
    else:
        place.symlink_to(folder / "step-000000001" if kind == "link" else tmp_path / "nowhere")
    with saving.store(folder, keep=3) as checkpoints:
        saving.save(checkpoints, saving.trained(3), 3)
    assert not place.is_symlink()
    assert "corrupt-step-000000003" in saving.names(folder)
    shutil.rmtree(folder / "step-000000002")
    saving.assert_goes_on_as_never_stopped(folder, at=3)


def test_the_folder_itself_may_be_a_link_or_a_copy(tmp_path: Path) -> None:
    """To a larger disk, say."""
    saving.saved(tmp_path / "disk", steps=2)
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    saving.assert_goes_on_as_never_stopped(tmp_path / "link", at=2)
    saving.assert_goes_on_as_never_stopped(saving.copy_of(tmp_path / "disk", tmp_path / "copy"), at=2)


def test_a_second_damage_of_the_same_step(tmp_path: Path) -> None:
    folder = saving.saved(tmp_path, steps=2)
    for _ in range(2):
        (folder / "step-000000002" / "state.json").unlink()
        assert saving.resume(folder)[0] == Cursor(1, 70, 1.5, 99)
        with saving.store(folder) as checkpoints:
            saving.save(checkpoints, saving.trained(2), 2)
    assert saving.names(folder)[:2] == ["corrupt-step-000000002", "corrupt-step-000000002.2"]


def test_moments_are_never_made_up(tmp_path: Path) -> None:
    """A checkpoint says itself which tensors it holds: a shard signed anew without a moment is another state."""
    folder = saving.saved(tmp_path, steps=1) / "step-000000001"
    content = json.loads((folder / "manifest.json").read_text())
    assert set(content["files"]) == {"shard-00001.safetensors", "state.json"}
    del content["files"]["shard-00001.safetensors"]
    (folder / "manifest.json").write_text(json.dumps(content, indent=1))
    assert "no checkpoint that is whole" in saving.refused(tmp_path)
