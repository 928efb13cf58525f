"""The trainer on two processes against our own loop on one: same global batch, same loss, same gradients."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate", reason="transformers.Trainer needs the package accelerate (extra trainer)")

import running
import torch
import trainers

MICRO_BATCHES = (1, 4)
ROWS = {"padded": trainers.padded, "packed": trainers.packed}
CASES = [(divergence, kind, micro) for divergence in trainers.OBJECTIVES for kind in ROWS for micro in MICRO_BATCHES]


def really_sharded() -> None:
    """accelerate shards over GPUs alone, and takes DDP elsewhere without a word: told so, it shards over CPUs."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    start = PartialState.__init__

    def relabelled(self: PartialState, *arguments: Any, **options: Any) -> None:
        start(self, *arguments, **options)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_XPU

    PartialState.__init__ = relabelled


def rank(folder: Path) -> None:
    """Every case, and an evaluation whose rows do not divide among the ranks."""
    sharded: dict[str, Any] = {}
    if folder.name == "fsdp":
        really_sharded()
        config = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "reshard_after_forward": True}
        sharded = {"fsdp": True, "fsdp_config": config}
    found = {}
    for case in CASES:
        divergence, kind, micro_batches = case
        rows, (student, teacher) = ROWS[kind](), trainers.models()
        args = trainers.arguments(folder, rows=4, micro_batches=micro_batches, per_device_eval_batch_size=2, **sharded)
        evaluated = {"eval_dataset": rows[:5]} if case == CASES[0] else {}
        if sharded:
            teacher = sharded_teacher(teacher)
        step = trainers.their_step(student, teacher, rows, args, trainers.OBJECTIVES[divergence], **evaluated)
        trainer = step.pop("trainer")
        if evaluated:
            step["evaluation"] = trainer.evaluate()
            step["wrapped"] = type(trainer.model_wrapped).__name__
            step["trained"] = {name: whole(p).clone() for name, p in trainer.model.named_parameters()}
        found[case] = step
    if trainer.args.process_index == 0:
        torch.save(found, folder / "found.pt")
    torch.distributed.destroy_process_group()


def sharded_teacher(teacher: Any) -> Any:
    """By FSDP2, as its own user would do it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for block in teacher.model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(teacher, mesh=mesh, reshard_after_forward=False)


def whole(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach()


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    folder = tmp_path_factory.mktemp("ranks") / request.param
    folder.mkdir()
    running.run_file(__file__, folder)
    return {"strategy": request.param, **torch.load(folder / "found.pt")}


@pytest.mark.slow
def test_a_step_is_that_of_our_own_loop_on_one_process(found: dict[Any, Any]) -> None:
    for divergence, kind, micro_batches in CASES:
        rows, (student, teacher) = ROWS[kind](), trainers.models()
        ours = trainers.our_step(student, teacher, rows, trainers.OBJECTIVES[divergence])
        trainers.assert_same(found[divergence, kind, micro_batches], ours)


@pytest.mark.slow
def test_an_evaluation_counts_each_row_once(found: dict[Any, Any]) -> None:
    case = found[CASES[0]]
    assert case["wrapped"] == {"ddp": "DistributedDataParallel", "fsdp": "FSDPLlamaForCausalLM"}[found["strategy"]]
    student, teacher = trainers.models()
    student.load_state_dict(case["trained"])
    ours = trainers.our_step(student, teacher, ROWS["padded"]()[:5], trainers.OBJECTIVES[CASES[0][0]])
    for name in ("loss", "clm", "divergence", "tail_mass"):
        assert case["evaluation"][f"eval_{name}"] == pytest.approx(ours[name], rel=1e-5)


if __name__ == "__rank__":
    rank(Path(sys.argv[1]))
