"""F40: checkpoints made to harm: refused, nothing outside the folder is touched, no code runs.

Their manifests are right: a hash is no signature, whoever knows the format can write one.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import saving

SHARD = "shard-00001.safetensors"


class Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def safetensors(header: Any, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(start: int, end: int, shape: list[int] | None = None) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape or [(end - start) // 4], "data_offsets": [start, end]}


def sharded(**offsets: Any) -> dict[str, str]:
    return {"DCP_SHARDING_INFO": json.dumps({name: {"saved_offsets": where} for name, where in offsets.items()})}


SHARDS: dict[str, bytes] = {
    "a header of 2^60 bytes": struct.pack("<Q", 1 << 60) + b"{}",
    "a header longer than the file": struct.pack("<Q", 1 << 20) + b"{}",
    "no header": b"",
    "overlapping offsets": safetensors({"a": tensor(0, 8), "b": tensor(4, 12)}, bytes(12)),
    "offsets beyond the file": safetensors({"a": tensor(0, 1 << 40)}, bytes(8)),
    "offsets backwards": safetensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, bytes(8)),
    "a size that overflows": safetensors({"a": tensor(0, 8, [1 << 62, 1 << 62])}, bytes(8)),
    "an unknown type": safetensors({"a": {"dtype": "OBJECT", "shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "a header that is a list": safetensors([1, 2]),
    "nested without end": struct.pack("<Q", 100_000) + b"[" * 100_000,
    "slices of nothing": safetensors({"__metadata__": {"DCP_SHARDING_INFO": "{}"}, "a": tensor(0, 8)}, bytes(8)),
    "slices that are not JSON": safetensors({"__metadata__": {"DCP_SHARDING_INFO": "("}, "a": tensor(0, 8)}, bytes(8)),
    "a slice before the tensor": safetensors({"__metadata__": sharded(a=[-2]), "a": tensor(0, 8)}, bytes(8)),
    "a slice far behind": safetensors({"__metadata__": sharded(a=[1 << 40]), "a": tensor(0, 8)}, bytes(8)),
    "a slice of other rank": safetensors({"__metadata__": sharded(a=[0, 0]), "a": tensor(0, 8)}, bytes(8)),
}


def put_aside(folder: Path) -> str:
    """The newest is put aside and the one before it taken; what was said."""
    said = saving.assert_goes_on_as_never_stopped(folder, at=1)
    assert len(said) == 1
    assert said[0].endswith("kept as corrupt-step-000000002")
    return said[0]


@pytest.mark.parametrize("content", SHARDS.values(), ids=SHARDS)
def test_shard(tmp_path: Path, content: bytes) -> None:
    folder = saving.saved(tmp_path, steps=2)
    (folder / "step-000000002" / SHARD).write_bytes(content)
    saving.sign(folder / "step-000000002")
    put_aside(folder)


@pytest.mark.parametrize("kind", ["pickle", "zip"])
def test_no_code_runs(tmp_path: Path, kind: str) -> None:
    folder = saving.saved(tmp_path / "checkpoints", steps=2)
    canary = tmp_path / "canary"
    shard = folder / "step-000000002" / SHARD
    pickled = pickle.dumps(Canary(canary))
    if kind == "pickle":
        shard.write_bytes(pickled)
    else:
        with zipfile.ZipFile(shard, "w") as archive:
            archive.writestr("../canary", "")
            archive.writestr("archive/data.pkl", pickled)
    (folder / "step-000000002" / ".metadata").write_bytes(pickled)
    saving.sign(folder / "step-000000002", lambda content: content["files"].pop(".metadata"))
    put_aside(folder)
    (folder / "step-000000001" / ".metadata").write_bytes(pickled)
    assert "no checkpoint that is whole" in saving.refused(folder)
    assert not canary.exists()


@pytest.mark.parametrize(
    "name",
    ["../outside", "/etc/passwd", "..", ".", "a/b", "sub\\..", "", "x" * 300, ".hidden", "manifest.json", "a\0b"],
)
def test_names_in_the_manifest(tmp_path: Path, name: str) -> None:
    folder = saving.saved(tmp_path / "checkpoints", steps=2)
    outside = folder / "outside"
    outside.write_bytes(b"precious")

    def add(content: dict[str, Any]) -> None:
        content["files"][name] = saving.commit.measure(outside)

    saving.sign(folder / "step-000000002", add)
    assert "is not a plain file name" in put_aside(folder)
    assert outside.read_bytes() == b"precious"


CONTENTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no files": lambda content: content.update(files={}),
    "no state": lambda content: content["files"].pop("state.json"),
    "no shard": lambda content: content["files"].pop(SHARD),
}


@pytest.mark.parametrize("change", CONTENTS.values(), ids=CONTENTS)
def test_manifest_that_lists_less(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    folder = saving.saved(tmp_path, steps=2)
    saving.sign(folder / "step-000000002", change)
    put_aside(folder)


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "{", '{"files": 3}', '{"files": {"a": 1}}', "[" * 200_000, "NaN", '{"files": {}}', "\0"]
)
@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_json_of_any_content(tmp_path: Path, name: str, text: str) -> None:
    folder = saving.saved(tmp_path, steps=2)
    (folder / "step-000000002" / name).write_text(text)
    if name == "state.json":
        saving.sign(folder / "step-000000002")
    put_aside(folder)


def test_a_json_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saving.saved(tmp_path, steps=2)
    with (folder / "step-000000002" / "manifest.json").open("wb") as file:
        file.truncate(1 << 40)  # a hole: no byte of it is on the disk
    assert "has more than" in put_aside(folder)


def test_a_part_that_another_shard_claims_too(tmp_path: Path) -> None:
    """Two shards whose slices overlap would leave part of a tensor unread."""
    folder = saving.saved(tmp_path, steps=2)
    newest = folder / "step-000000002"
    for number, start in ((1, 0), (2, 1)):
        header = {"__metadata__": sharded(a=[start]), "a": tensor(0, 8)}
        (newest / f"shard-0000{number}.safetensors").write_bytes(safetensors(header, bytes(8)))
    saving.sign(newest)
    assert "do not make up a tensor" in put_aside(folder)


def test_folders_and_links_inside(tmp_path: Path) -> None:
    folder = saving.saved(tmp_path / "checkpoints", steps=2)
    (folder / "step-000000002" / "more").mkdir()
    assert "'more' is not in manifest.json" in put_aside(folder)
    target = tmp_path / "state.json"
    (folder / "step-000000001" / "state.json").rename(target)
    (folder / "step-000000001" / "state.json").symlink_to(target)
    assert "no checkpoint that is whole" in saving.refused(folder)
    assert target.is_file()


@pytest.mark.parametrize("name", ["manifest.json", "state.json", SHARD])
def test_a_pipe_that_nobody_writes_into(tmp_path: Path, name: str) -> None:
    folder = saving.saved(tmp_path, steps=2)
    (folder / "step-000000002" / name).unlink()
    os.mkfifo(folder / "step-000000002" / name)
    put_aside(folder)


def test_leftovers_that_are_links_lead_nowhere(tmp_path: Path) -> None:
    folder = saving.saved(tmp_path / "checkpoints", steps=2)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "work").touch()
    (folder / ".tmp-step-000000003-abcdef01").symlink_to(tmp_path / "precious")
    (folder / ".tmp-step-000000004-abcdef01").mkdir()
    (folder / ".tmp-step-000000004-abcdef01" / "inside").symlink_to(tmp_path / "precious")
    saving.assert_goes_on_as_never_stopped(folder, at=2)
    assert saving.names(tmp_path / "precious") == ["work"]
    assert ".tmp-step-000000004-abcdef01" not in saving.names(folder)
