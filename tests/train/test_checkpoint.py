"""Save and resume: bit for bit, in the background, only whole ones, only the same recipe."""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import builders
import pytest
import saving
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from tailkd import fault
from tailkd.errors import DIVERGED, Diverged, Refusal
from tailkd.train import commit, tensors
from tailkd.train.checkpoint import Cursor


def test_resumed_training_is_bit_equal(tmp_path: Path) -> None:
    state = saving.trained(3)
    with saving.store(tmp_path) as checkpoints:
        saving.save(checkpoints, state, 3)
    expected = torch.rand(4)
    cursor, again, said = saving.resume(tmp_path)
    assert (cursor, said) == (Cursor(3, 210, 1.5, 99), [])
    assert torch.equal(torch.rand(4), expected)
    saving.assert_same(state, again)
    saving.assert_goes_on_as_never_stopped(tmp_path, at=3)


def test_a_language_model_goes_on_bit_equal(tmp_path: Path) -> None:
    def step(state: saving.State, number: int) -> None:
        state[1].zero_grad()
        state[0](torch.arange(9).unsqueeze(0) + number).logits.square().mean().backward()
        state[1].step()

    def built() -> saving.State:
        model = builders.build_model(50, seed=4)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    state, again = built(), built()
    for number in range(3):
        step(state, number)
    with saving.store(tmp_path) as checkpoints:
        saving.save(checkpoints, state, 3)
        step(again, 7)
        checkpoints.resume(*again)
    for number in (3, 4):
        step(state, number)
        step(again, number)
    saving.assert_same(state, again)


def test_no_checkpoint_is_a_fresh_start(tmp_path: Path) -> None:
    assert saving.resume(tmp_path / "new")[0] == Cursor()


def test_a_save_before_the_first_update_changes_nothing(tmp_path: Path) -> None:
    """torch's own get_state_dict steps a fresh optimizer: its count would start at 1."""
    state = saving.fresh()
    with saving.store(tmp_path) as checkpoints:
        saving.save(checkpoints, state, 0)
    assert not state[1].state_dict()["state"]
    saving.assert_goes_on_as_never_stopped(tmp_path, at=0)


def test_other_optimizers_and_unused_and_frozen_parameters(tmp_path: Path) -> None:
    def built() -> saving.State:
        torch.manual_seed(0)
        model = nn.ModuleDict({"used": nn.Linear(3, 3), "unused": nn.Linear(2, 2), "frozen": nn.Linear(2, 2)})
        model["frozen"].requires_grad_(False)
        return model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)

    state = built()
    state[0]["used"](torch.ones(3)).sum().backward()  # type: ignore[index]
    state[1].step()
    again = built()
    with saving.store(tmp_path) as checkpoints:
        saving.save(checkpoints, state, 1)
        checkpoints.resume(*again)
    saving.assert_same(state, again)


def test_what_lies_in_a_checkpoint(tmp_path: Path) -> None:
    """Safetensors, JSON and nothing else; a tied matrix once; readable without this tool."""
    folder = saving.saved(tmp_path, steps=1) / "step-000000001"
    assert saving.names(folder) == ["manifest.json", "shard-00001.safetensors", "state.json"]
    found = load_file(folder / "shard-00001.safetensors")
    model, optimizer = saving.trained(1)
    weights = {name: tensor for name, tensor in found.items() if not name.startswith("optimizer.")}
    assert sorted(weights) == sorted({*dict(model.named_parameters()), "calls"})
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in weights.items())
    moments = len(optimizer.state_dict()["state"]) * 3
    assert len(found) - len(weights) == moments
    with safe_open(folder / "shard-00001.safetensors", framework="pt") as file:
        offsets = json.loads(file.metadata()["DCP_SHARDING_INFO"])
    assert offsets["embedding.weight"] == {"saved_offsets": [0, 0]}
    state = json.loads((folder / "state.json").read_text())
    assert state["param_groups"][0]["weight_decay"] == 0.1
    assert (state["world_size"], state["versions"]["torch"]) == (1, torch.__version__)


def test_no_pickle_is_written_or_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    def never(*arguments: Any, **more: Any) -> Any:
        raise AssertionError("pickle was called")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, never)
    monkeypatch.setattr(torch, "save", never)
    monkeypatch.setattr(torch, "load", never)
    saving.saved(tmp_path, steps=2)
    assert saving.resume(tmp_path)[0].step == 2


# ----- the background


def test_training_goes_on_while_the_state_of_the_save_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """save() returns before anything is on the disk, and what is written is the state as it was then."""
    go_on = threading.Event()
    plain = tensors.write

    def held(*arguments: Any) -> Any:
        assert go_on.wait(60)
        return plain(*arguments)

    monkeypatch.setattr(tensors, "write", held)
    state = saving.trained(3)
    with saving.store(tmp_path) as checkpoints:
        checkpoints.save(*state, Cursor(3))
        torch.rand(1)
        saving.update(state, 3)
        assert not [name for name in saving.names(tmp_path) if name.startswith("step")]
        go_on.set()
    saving.assert_goes_on_as_never_stopped(tmp_path, at=3)


def test_the_next_save_waits_for_the_last_and_uses_its_memory(tmp_path: Path) -> None:
    state = saving.trained(1)
    with saving.store(tmp_path) as checkpoints:
        places = []
        for step in (1, 2, 3):
            checkpoints.save(*state, Cursor(step))
            places.append({name: copy.data_ptr() for name, copy in checkpoints._copies._held.items()})
        assert places[0] == places[1] == places[2]
    assert saving.names(tmp_path) == ["step-000000002", "step-000000003"]


@pytest.fixture
def _no_log() -> Iterator[None]:
    """The engine logs each tensor at DEBUG, and pytest keeps it all."""
    logging.disable(logging.DEBUG)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.slow
@pytest.mark.usefixtures("_no_log")
def test_200_saves_leave_handles_threads_and_memory_flat(tmp_path: Path) -> None:
    def now() -> tuple[int, int, int]:
        gc.collect()
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count(), resident

    state = saving.trained(1)
    with saving.store(tmp_path) as checkpoints:
        for step in range(20):
            saving.save(checkpoints, state, step)
        handles, threads, resident = now()
        for step in range(20, 220):
            saving.save(checkpoints, state, step)
        handles_after, threads_after, resident_after = now()
    assert (handles_after, threads_after) == (handles, threads)
    assert resident_after - resident < 4 << 20
    assert saving.names(tmp_path) == ["step-000000218", "step-000000219"]


def test_what_the_thread_met_is_raised_by_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = saving.trained(1)
    with saving.store(tmp_path) as checkpoints:
        monkeypatch.setenv("TAILKD_FAULT", "shard:middle=EIO")
        checkpoints.save(*state, Cursor(1))
        with pytest.raises(OSError, match=r"step 1 is not saved.*Input/output error; the checkpoints before it stand"):
            checkpoints.save(*state, Cursor(2))
        monkeypatch.delenv("TAILKD_FAULT")
        saving.save(checkpoints, state, 2)
    assert saving.names(tmp_path) == ["step-000000002"]


def test_a_run_that_fails_still_ends_its_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own error is what is raised; that of the save is said."""
    said: list[str] = []

    def run(step: int) -> None:
        with saving.store(tmp_path, say=said.append) as checkpoints:
            checkpoints.save(*saving.trained(1), Cursor(step))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(1)
    monkeypatch.setenv("TAILKD_FAULT", "shard:middle=EIO")
    with pytest.raises(KeyboardInterrupt):
        run(2)
    assert saving.names(tmp_path) == ["step-000000001"]
    assert len(said) == 1
    assert "step 2 is not saved" in said[0]


def test_one_that_cannot_be_removed_does_not_spoil_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    with saving.store(tmp_path, keep=1, say=said.append) as checkpoints:
        state = saving.trained(1)
        saving.save(checkpoints, state, 1)
        monkeypatch.setenv("TAILKD_FAULT", "rotate:middle=EACCES")
        saving.save(checkpoints, state, 2)
    assert len(said) == 1
    assert said[0].startswith("step-000000002 is saved, but an older checkpoint could not be removed")
    monkeypatch.delenv("TAILKD_FAULT")
    assert saving.resume(tmp_path)[0].step == 2
    assert saving.names(tmp_path) == ["step-000000002"]


# ----- what is never saved


@pytest.mark.parametrize("where", ["weight", "moment"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_saved(tmp_path: Path, where: str, value: float) -> None:
    folder = saving.saved(tmp_path, steps=2, keep=1)
    state = saving.trained(3)
    weight = state[0].embedding.weight  # type: ignore[union-attr]
    with torch.no_grad():
        (weight if where == "weight" else state[1].state[weight]["exp_avg"])[2, 1] = value
    named = "embedding.weight" if where == "weight" else "optimizer.embedding.weight.exp_avg"
    with saving.store(folder, keep=1) as checkpoints:
        checkpoints.save(*state, Cursor(3))
        with pytest.raises(Diverged, match=rf"step 3 is not saved: {named} not finite") as caught:
            checkpoints.wait()
    assert caught.value.exit_code == DIVERGED
    assert saving.names(folder) == ["step-000000002"]


def test_large_finite_values_are_saved(tmp_path: Path) -> None:
    """Their sum overflows; they do not."""
    large = {"x": torch.full((100,), 3e38), "h": torch.full((9,), 60_000.0, dtype=torch.float16)}
    assert tensors.not_finite(large) == []
    assert tensors.not_finite({**large, "y": torch.full((100_000,), float("-inf"))}) == ["y"]


# ----- rotation


def test_old_ones_go_after_the_new_one_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saving.saved(tmp_path, steps=3)
    assert saving.names(tmp_path) == ["step-000000002", "step-000000003"]
    with saving.store(tmp_path) as checkpoints, monkeypatch.context() as patch:
        patch.setenv("TAILKD_FAULT", "rename:before=ENOSPC")
        checkpoints.save(*saving.trained(4), Cursor(4))
        with pytest.raises(OSError, match="No space left"):
            checkpoints.wait()
    assert saving.names(tmp_path) == ["step-000000002", "step-000000003"]


def test_what_is_synced_before_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files and their names reach the disk before the rename, the new name before anything old goes.

    A SIGKILL does not show this and a power cut does; here the order of the calls is what is tested.
    """
    events: list[str] = []
    plain_sync, plain_rename = os.fsync, Path.rename

    def sync(descriptor: int) -> None:
        events.append("sync " + re.sub(r"-[0-9a-f]{8}\b", "", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
        plain_sync(descriptor)

    def rename(self: Path, target: Path) -> Path:
        events.append(f"rename to {re.sub('-[0-9a-f]{8}$', '', target.name)}")
        return plain_rename(self, target)

    with saving.store(tmp_path, keep=1) as checkpoints:
        saving.save(checkpoints, saving.trained(1), 1)
        monkeypatch.setattr(os, "fsync", sync)
        monkeypatch.setattr(Path, "rename", rename)
        saving.save(checkpoints, saving.trained(2), 2)
    staged = f"{tmp_path}/.tmp-step-000000002"
    assert events == [
        f"sync {staged}/shard-00001.safetensors",
        f"sync {staged}/state.json",
        f"sync {staged}/manifest.json",
        f"sync {staged}",
        "rename to step-000000002",
        f"sync {tmp_path}",
        "rename to .tmp-drop-step-000000001",
    ]


def test_what_reads_back_otherwise_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saving.saved(tmp_path, steps=1, keep=1)
    plain = commit.write_file

    def flipped(path: Path, pieces: Any) -> commit.Written:
        written = plain(path, pieces)
        if path.suffix == ".safetensors":
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)
        return written

    monkeypatch.setattr(tensors, "write_file", flipped)
    with saving.store(tmp_path, keep=1) as checkpoints:
        checkpoints.save(*saving.trained(2), Cursor(2))
        with pytest.raises(OSError, match=r"shard-00001.safetensors reads back as"):
            checkpoints.wait()
    assert saving.names(tmp_path) == ["step-000000001"]


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    saving.saved(tmp_path, steps=2)
    with saving.store(tmp_path) as checkpoints:
        checkpoints.save(*saving.trained(2), Cursor(2, metrics_bytes=500))
        checkpoints.wait()
    assert saving.names(tmp_path) == ["step-000000001", "step-000000002"]
    assert saving.resume(tmp_path)[0].metrics_bytes == 500


def test_a_replacement_that_fails_leaves_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saving.saved(tmp_path, steps=1)
    with saving.store(tmp_path) as checkpoints:
        monkeypatch.setenv("TAILKD_FAULT", "rename:before=EIO")
        checkpoints.save(*saving.trained(1), Cursor(1, metrics_bytes=500))
        with pytest.raises(OSError, match="Input/output error"):
            checkpoints.wait()
    assert saving.names(tmp_path) == ["step-000000001"]
    assert saving.resume(tmp_path)[0].metrics_bytes == 99


def test_rotation_spares_the_one_just_saved(tmp_path: Path) -> None:
    """Even where folders of later steps lie about that nobody has checked."""
    saving.saved(tmp_path, steps=3, keep=3)
    with saving.store(tmp_path, keep=1) as checkpoints:
        saving.save(checkpoints, saving.trained(2), 2)
    assert saving.names(tmp_path) == ["step-000000002", "step-000000003"]


def test_every_named_point_is_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of faults F2 kills at is the list of the points in the sources."""
    passed: list[str] = []
    with saving.store(tmp_path, keep=1) as checkpoints:
        saving.save(checkpoints, saving.trained(1), 1)
        monkeypatch.setattr(commit, "at", passed.append)
        saving.save(checkpoints, saving.trained(2), 2)
    assert tuple(passed) == commit.POINTS
    fault.at("shard:middle")  # nothing in the environment: nothing happens


def test_a_fault_may_let_its_point_pass_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAILKD_FAULT", "somewhere@3=EROFS")
    fault.at("elsewhere")
    fault.at("somewhere")
    fault.at("somewhere")
    with pytest.raises(OSError, match="Read-only file system"):
        fault.at("somewhere")


# ----- the same run


def test_another_model_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    saving.saved(tmp_path, steps=1)
    for other in (saving.fresh(width=7), (nn.Linear(3, 3), torch.optim.AdamW([nn.Parameter(torch.ones(1))]))):
        with saving.store(tmp_path) as checkpoints:
            before = {name: tensor.clone() for name, tensor in other[0].state_dict().items()}
            parameters = list(other[0].parameters())
            with pytest.raises(Refusal, match=r"the checkpoint's weights are not this student's: .*embedding.weight"):
                checkpoints.resume(other[0], torch.optim.AdamW(parameters))
            assert all(torch.equal(before[name], tensor) for name, tensor in other[0].state_dict().items())
    half = saving.fresh()[0].to(torch.bfloat16)
    with saving.store(tmp_path) as checkpoints, pytest.raises(Refusal, match="differ in name, size or type"):
        checkpoints.resume(half, torch.optim.AdamW(half.parameters()))
    assert saving.names(tmp_path) == ["step-000000001"]


def test_another_format_is_refused(tmp_path: Path) -> None:
    folder = saving.saved(tmp_path, steps=1) / "step-000000001"
    saving.sign(folder, lambda content: content.update(format=9))
    assert re.search(r"has checkpoint format 9; this tailkd reads format 2", saving.refused(tmp_path))
    assert saving.names(tmp_path) == ["step-000000001"]


def test_a_leftover_of_an_interrupted_replacement_comes_back(tmp_path: Path) -> None:
    saving.saved(tmp_path, steps=2)
    (tmp_path / "step-000000002").rename(tmp_path / ".old-step-000000002")
    assert saving.resume(tmp_path)[0].step == 2
    saving.copy_of(tmp_path / "step-000000002", tmp_path / ".old-step-000000002")
    assert saving.resume(tmp_path)[0].step == 2
    assert saving.names(tmp_path) == ["step-000000001", "step-000000002"]


def test_another_number_of_processes_gets_a_fixed_seed(tmp_path: Path) -> None:
    folder = saving.saved(tmp_path, steps=1) / "step-000000001"
    saving.edit_state(folder, lambda state: state.update(random=state["random"] * 2, world_size=2))
    drawn = []
    for _ in range(2):
        said = saving.resume(tmp_path)[2]
        drawn.append(torch.rand(3))
    assert said == ["saved by 2 processes, resumed by 1: random numbers start from a new fixed seed"]
    assert torch.equal(*drawn)
