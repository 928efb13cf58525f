"""Peak memory as the ledger predicts it beside what training takes: six shapes on a CPU, each in a fresh process.

Measured is the growth of resident memory over the import baseline, models and optimizer included, over three steps of
`tailkd.train.step.Step`. Run: python benchmarks/bill.py [--only NAME] [--out FILE]. Appends rows to
benchmarks/results/bill.jsonl; ends with 1 where a prediction is off by more than 25 %.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tailkd.ledger import Batch, Memory, Teacher, memory

RESULTS = Path(__file__).parent / "results" / "bill.jsonl"
ALLOWED = 0.25
MB = 1e6

Row = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """A student and its teacher by family and sizes, and how they are trained; what is largest gives it its name."""

    family: str
    student: dict[str, Any]
    teacher: dict[str, Any] | None
    micro_batch_size: int
    context: int
    micro_batches: int = 1
    compute: torch.dtype = torch.float32
    frozen: bool = False
    checkpointing: bool = False
    shared: dict[str, Any] = field(default_factory=dict)


def sizes(vocabulary: int, width: int, inner: int, layers: int, heads: int, kv: int, **other: Any) -> dict[str, Any]:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    found = dict(zip(names, (vocabulary, width, inner, layers, heads), strict=True))
    return {**found, "num_key_value_heads": kv, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **other}


SHAPES = {
    "objective": Shape(
        "Llama",
        sizes(49152, 256, 704, 4, 4, 4, tie_word_embeddings=True),
        sizes(49152, 384, 1024, 4, 6, 6, tie_word_embeddings=True),
        *(2, 256),
    ),
    "activations": Shape("Qwen2", sizes(4096, 256, 1408, 6, 8, 2), sizes(4096, 384, 1024, 4, 6, 2), *(8, 256)),
    "checkpointing": Shape(
        "Qwen3",
        sizes(8192, 384, 1536, 8, 8, 4, head_dim=64),
        sizes(8192, 384, 1024, 4, 6, 2, head_dim=64),
        *(8, 256),
        checkpointing=True,
    ),
    "weights": Shape(
        "Mistral", sizes(16384, 640, 2048, 10, 10, 5), sizes(16384, 768, 2560, 10, 12, 4), *(1, 128), micro_batches=2
    ),
    "scores": Shape(
        "Gemma2",
        sizes(32768, 192, 512, 4, 6, 3, head_dim=40),
        sizes(32768, 192, 768, 6, 6, 3, head_dim=64),
        *(2, 512),
        frozen=True,
    ),
    "bfloat16": Shape(
        "Phi",
        sizes(16384, 320, 1280, 4, 5, 5),
        sizes(16384, 320, 1280, 4, 5, 5),
        *(2, 128),
        micro_batches=2,
        compute=torch.bfloat16,
    ),
}


def configurations(shape: Shape) -> tuple[Any, Any | None]:
    import transformers

    family = getattr(transformers, f"{shape.family}Config")
    return family(**shape.student), None if shape.teacher is None else family(**shape.teacher)


def predicted(shape: Shape) -> Memory:
    batch = Batch(
        rows=shape.micro_batch_size,
        context=shape.context,
        compute=shape.compute,
        accumulating=shape.micro_batches > 1,
        checkpointing=shape.checkpointing,
    )
    student, teacher = configurations(shape)
    teachers = [] if teacher is None else [Teacher(teacher)]
    return memory(student, teachers, batch, frozen_embeddings=shape.frozen)


# ----- the measured side, in its own process


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def batch_of(shape: Shape) -> Any:
    from tailkd.data.batches import Batch as Rows

    rows, context = shape.micro_batch_size * shape.micro_batches, shape.context
    ids = torch.randint(3, shape.student["vocab_size"], (rows, context + 1))
    valid = torch.arange(rows * context)
    borders = tuple(range(0, rows * context + 1, context))
    segments = torch.zeros(rows, context, dtype=torch.int32)
    return Rows(ids[:, :-1], ids[:, 1:], segments, valid, borders, borders, len(valid), tuple(range(rows)))


def built(shape: Shape) -> Any:
    from transformers import AutoModelForCausalLM

    from tailkd.models.head import SplitModel
    from tailkd.objective import Objective
    from tailkd.teacher.live import LiveTeacher
    from tailkd.train.optim import build_optimizer
    from tailkd.train.step import Step

    student, teacher = configurations(shape)
    model = AutoModelForCausalLM.from_config(student).train()
    if shape.frozen:
        model.get_input_embeddings().requires_grad_(False)
    if shape.checkpointing:
        model.gradient_checkpointing_enable()
    signal = None
    if teacher is not None:
        whole = AutoModelForCausalLM.from_config(teacher, dtype=shape.compute)
        signal = LiveTeacher(whole, usable=teacher.vocab_size, compute_dtype=shape.compute)
    optimizer = build_optimizer(model, learning_rate=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    objective = Objective() if signal else Objective(divergence="none")
    split = SplitModel(model, compute_dtype=shape.compute)
    return Step(split, signal, objective, optimizer, micro_batch_size=shape.micro_batch_size, clip_norm=1.0)


def measure(shape: Shape) -> Row:
    """Bytes above the baseline at the peak, and seconds of the last step."""
    tiny = Shape(shape.family, *(sizes(64, 16, 32, 1, 2, 2),) * 2, 1, 8, compute=shape.compute)
    built(tiny)(batch_of(tiny))  # libraries load and set up what they keep
    before = resident("VmRSS")
    step, batch = built(shape), batch_of(shape)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of building
    for _ in range(3):
        started = time.perf_counter()
        assert step(batch).not_finite is None
    return {"measured_bytes": resident("VmHWM") - before, "step_s": time.perf_counter() - started}


def in_process(name: str) -> Row:
    # A fixed threshold: glibc otherwise learns to keep large freed blocks, and peaks would depend on chance.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--measure", name]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{name}: {done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def compared(name: str) -> Row:
    shape = SHAPES[name]
    bill = predicted(shape)
    found = in_process(name)
    worst = max(bill.moments, key=lambda moment: bill.moments[moment])
    row = {"what": name, "family": shape.family, "predicted_bytes": bill.total, **found}
    row |= {"off": bill.total / found["measured_bytes"] - 1, "worst_moment": worst, **bill.as_dict()}
    del row["total"]
    return row


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", choices=SHAPES)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--measure", choices=SHAPES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    if options.measure:
        print(json.dumps(measure(SHAPES[options.measure])))
        return 0
    about = {"run": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "torch": torch.__version__}
    about |= {"python": platform.python_version(), "machine": platform.machine()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    worst = 0.0
    for name in options.only or SHAPES:
        row = compared(name)
        worst = max(worst, abs(row["off"]))
        with options.out.open("a", encoding="utf-8") as file:
            file.write(
                json.dumps({**row, "off": round(row["off"], 4), "step_s": round(row["step_s"], 2), **about}) + "\n"
            )
        mb = {key: row[key] / MB for key in ("predicted_bytes", "measured_bytes")}
        print(
            f"{name:<14} {row['family']:<8} predicted {mb['predicted_bytes']:8,.0f} MB  measured "
            f"{mb['measured_bytes']:8,.0f} MB  off {row['off']:+7.1%}  worst moment: {row['worst_moment']}",
            flush=True,
        )
    return int(worst > ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
