"""F15, the store's part: saved by 2 ranks, loaded by 1, and back; model and moments equal bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import builders
import pytest
import saving
import torch

# Two processes forked from one interpreter, with gloo between them. `wrapped` is one process' model made parallel.
SCRIPT = '''
import json, os, signal, sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
import saving
from tailkd.errors import Diverged
from tailkd.train.checkpoint import Cursor

folder, kind, at, until = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

def wrapped():
    model, optimizer = saving.fresh(seed=4 if at == 0 else 99)
    if kind == "sharded":
        fully_shard(model.layer)
        fully_shard(model)
    else:
        model = DistributedDataParallel(model)
    optimizer = saving.build_optimizer(model, learning_rate=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    return model, optimizer

def full(state):
    found = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in saving.everything(state).items()}
    return {name.removeprefix("module."): t.reshape(-1).tolist() for name, t in found.items()}

def meet(rank, checkpoints, state, trouble):
    """What this rank is told of a save in which one rank alone meets trouble."""
    checkpoints.wait()
    bias = state[0].layer.bias.to_local() if kind == "sharded" else state[0].module.layer.bias
    healthy = bias.detach().clone()
    whose, trouble = trouble.split(" ")
    if rank == int(whose) and trouble == "nan":
        bias.data[0] = float("nan")
    elif rank == int(whose):
        os.environ["TAILKD_FAULT"] = trouble
    try:
        saving.save(checkpoints, state, until + 1)
    except (OSError, Diverged) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        os.environ.pop("TAILKD_FAULT", None)
        bias.data.copy_(healthy)

def main(rank):
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "rendezvous"), 2), rank=rank, world_size=2)
    state, said = wrapped(), []
    with saving.store(folder / "checkpoints", say=said.append) as checkpoints:
        assert checkpoints.resume(*state).step == at
        loaded, drawn = full(state), torch.rand(2).tolist()
        for step in range(at, until):
            saving.update(state, step)
        with torch.no_grad():
            state[0](torch.arange(9))  # an evaluation leaves the root of fully_shard whole
        checkpoints.save(*state, Cursor(until, 70 * until))
        kept = full(state)
        saving.update(state, until)
        met = [meet(rank, checkpoints, state, trouble) for trouble in sys.argv[5:]]
    out = {"loaded": loaded, "kept": kept, "random": drawn, "said": said, "met": met}
    (folder / f"rank-{rank}.json").write_text(json.dumps(out))
    dist.destroy_process_group()

children = []
for rank in range(2):
    children.append(os.fork())
    if children[-1] == 0:
        signal.alarm(120)  # ends this process too, should the other one have left it waiting
        try:
            main(rank)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
'''


def two_ranks(folder: Path, kind: str, at: int, until: int, *troubles: str) -> list[dict]:
    (folder / "rendezvous").unlink(missing_ok=True)
    builders.fresh_python(SCRIPT, str(folder), kind, str(at), str(until), *troubles)
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


def flat(state: saving.State) -> dict[str, list]:
    return {name: tensor.reshape(-1).tolist() for name, tensor in saving.everything(state).items()}


@pytest.mark.parametrize("kind", ["sharded", pytest.param("copied", marks=pytest.mark.slow)])
def test_two_one_two(tmp_path: Path, kind: str) -> None:
    checkpoints = tmp_path / "checkpoints"
    first, second = two_ranks(tmp_path, kind, 0, 2)
    assert first["kept"] == second["kept"]
    newest = checkpoints / "step-000000002"
    shards = [name for name in saving.names(newest) if name.startswith("shard")]
    assert shards == ["shard-00001.safetensors", "shard-00002.safetensors"]
    sizes = [(newest / name).stat().st_size for name in shards]
    assert max(sizes) < 2 * min(sizes)  # each rank writes its share

    cursor, state, said = saving.resume(checkpoints)
    assert cursor.step == 2
    assert flat(state) == first["kept"]
    assert said == ["saved by 2 processes, resumed by 1: random numbers start from a new fixed seed"]
    saving.update(state, 2)
    with saving.store(checkpoints) as one:
        saving.save(one, state, 3)

    first, second = two_ranks(tmp_path, kind, 3, 4)
    assert first["loaded"] == second["loaded"] == flat(state)
    assert first["said"] == ["saved by 1 processes, resumed by 2: random numbers start from a new fixed seed"]
    assert second["said"] == []
    assert first["random"] != second["random"]

    kept = first["kept"]
    again = two_ranks(tmp_path, kind, 4, 5)
    assert [one["loaded"] for one in again] == [kept, kept]
    assert [one["said"] for one in again] == [[], []]
    assert torch.tensor(again[0]["random"]).ne(torch.tensor(again[1]["random"])).all()


def test_trouble_of_one_rank_is_told_to_all(tmp_path: Path) -> None:
    full = "shard:middle=ENOSPC"
    troubles = ("0 folder:before=ENOSPC", f"0 {full}", f"1 {full}", "0 manifest:middle=ENOSPC", "1 nan")
    first, second = two_ranks(tmp_path, "sharded", 0, 2, *troubles)
    assert first["met"] == second["met"]
    for met in first["met"][:-1]:
        assert "step 3 is not saved" in met
        assert "No space left on device; the checkpoints before it stand" in met
    assert first["met"][-1] == "Diverged: step 3 is not saved: layer.bias not finite; the checkpoints before it stand"
    assert saving.names(tmp_path / "checkpoints") == ["step-000000002"]
