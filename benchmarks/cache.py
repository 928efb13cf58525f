"""The teacher written down beside the teacher itself: how fast it is written and read, and what students learn from it.

Run: python benchmarks/cache.py speed [--shape cpu] [--repeats 5]
     python benchmarks/cache.py students --teacher FOLDER --text FILE [--field question] [--divergence forward_kl]

`speed` compares writing with the teacher's bare forward pass, and a step from the cache with a step of cross-entropy
alone, each in turns. `students` trains from the live teacher, from its cache and from a cache of the renormalised top K
alone, with the same seeds, and gives the 95 % interval of the mean difference in held-out KL. Rows go to
benchmarks/results/cache.jsonl.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from scipy import stats
from turns import COMMIT, seconds
from whole_step import Bench

import tailkd
from tailkd import cache, recipe_file
from tailkd.data.batches import Batch, collate
from tailkd.data.packing import Row
from tailkd.objective import Cached, Objective
from tailkd.teacher.cache import Cache, CachedTeacher, Manifest
from tailkd.teacher.cache_writing import Writing, write
from tailkd.teacher.shards import Payload
from tailkd.train.ranks import ALONE
from tailkd.train.step import Step

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cache.jsonl"
BATCHES = 1  # of rows, which are written and then learned from
Figures = dict[str, Any]


def nothing(*_: object) -> None:
    """For `heed` and `say`."""


# ----- speed


class ThoseRows(list[Row]):
    """Rows in memory."""

    @property
    def context(self) -> int:
        return len(self[0].input_ids)


class Speed:
    """A teacher's cache of a few batches, and steps of one student."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        options = argparse.Namespace(
            shape=arguments.shape, rows=None, dtype="float32", compile=False, checkpointing=False
        )
        self.bench, self.folder = Bench(options), folder
        rows, context = self.bench.rows, self.bench.shape.context
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, self.bench.vocabulary, (BATCHES * rows, context + 1), generator=generator).numpy()
        self.rows = ThoseRows(Row(one[:-1], one[1:], 0 * one[1:]) for one in ids)
        self.batches = [collate(self.rows[at : at + rows], range(rows)) for at in range(0, len(self.rows), rows)]
        made_of = {"temperature": 1.0}
        self.manifest = Manifest(made_of, Payload(arguments.payload, self.bench.vocabulary, width=self._width))
        self.write()
        self.steps = {
            "cross-entropy": self._step(None, Objective(divergence="none")),
            "tail_aware from the cache": self._step(CachedTeacher(Cache(folder)), Objective()),
        }

    @property
    def _width(self) -> int:
        return self.bench.configurations[1].hidden_size

    def _step(self, teacher: CachedTeacher | None, objective: Objective) -> Step:
        bench = self.bench
        return Step(bench.student, teacher, objective, bench.optimizer, micro_batch_size=bench.rows, clip_norm=1.0)

    def forward(self) -> None:
        """The model's own forward pass with its logits, and nothing else."""
        with torch.inference_mode():
            for batch in self.batches:
                self.bench.teacher.split.plain(input_ids=batch.input_ids, use_cache=False)

    def write(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        writing = Writing.of(self.folder, self.manifest, self.rows)
        write(writing, lambda: self.bench.teacher, batch_size=self.bench.rows, ranks=ALONE, heed=nothing, say=nothing)

    def read(self, name: str) -> None:
        for batch in self.batches:
            assert self.steps[name](batch).not_finite is None


def speed(arguments: argparse.Namespace) -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        bench = Speed(arguments, Path(folder) / "cache")
        work: dict[str, Callable[[], None]] = {
            "teacher forward": bench.forward,
            "writing": bench.write,
            **{name: lambda name=name: bench.read(name) for name in bench.steps},
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
        for turn in range(arguments.repeats + 1):
            for name, one in work.items():
                took = seconds(one)
                times[name] += [took] if turn else []
    tokens = sum(batch.count for batch in bench.batches)
    found = {"payload": arguments.payload, "tokens": tokens, "bytes a token": bench.manifest.payload.position_bytes}
    for place, clock in enumerate(("by the clock", "of the processor")):  # the latter does not see other jobs
        middle = {name: statistics.median(one[place] for one in each) for name, each in times.items()}
        forward, writing, clm, cached = middle.values()
        found |= {f"{name}, s {clock}": value for name, value in middle.items()}
        found |= {f"speed of writing / of the forward pass, {clock}": forward / writing}
        found |= {f"step from the cache / of cross-entropy, {clock}": cached / clm}
    return found


# ----- students


class TopOnly:
    """What a cache of the top K alone gives: the K ids, renormalised."""

    def __init__(self, teacher: CachedTeacher) -> None:
        self.teacher, self.cache = teacher, teacher.cache

    def __call__(self, batch: Batch) -> Cached:
        found = self.teacher(batch)
        assert isinstance(found, Cached)
        log = found.head_log_probabilities
        return replace(
            found,
            head_log_probabilities=log - log.logsumexp(-1, keepdim=True),
            log_tail_mass=torch.full_like(found.log_tail_mass, -torch.inf),
            tail_entropy=torch.zeros_like(found.tail_entropy),
        )


def student(arguments: argparse.Namespace, folder: Path, seed: int) -> Figures:
    return {
        "teacher": {"model": str(arguments.teacher)},
        "student": {"from_teacher": {"layers": 3, "seed": seed}},
        "data": {
            "train": {"path": str(arguments.text), "text": arguments.field, "tokens": arguments.corpus},
            "context": 128,
            "store": str(folder / "tokens"),
        },
        "objective": {"divergence": arguments.divergence, "clm_weight": arguments.clm_weight},
        "training": {"tokens": arguments.tokens, "batch_size": 8, "learning_rate": 2e-3, "seed": seed},
        "evaluate": {"tokens": None},
        "cache": {"path": str(folder / "cache"), "top_k": 10, "tail_samples": 32},
    }


def students(arguments: argparse.Namespace) -> Figures:
    opened = cache.opened
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cache.write(recipe_file.read(student(arguments, folder, 0)), nothing)
        found: dict[str, list[float]] = {"live": [], "cache": [], "top K alone": []}
        for seed in range(arguments.seeds):
            for kind, kls in found.items():
                recipe = student(arguments, folder, seed) | {
                    "name": f"{kind} {seed}",
                    "out": str(folder / f"{kind}-{seed}"),
                }
                if kind != "live":
                    recipe["teacher"]["cache"] = str(folder / "cache")
                wrapped = (lambda *a: TopOnly(opened(*a))) if kind == "top K alone" else opened  # type: ignore[arg-type]
                with patch.object(cache, "opened", wrapped):
                    kls.append(tailkd.distill(recipe).evaluation["student"]["kl"])
    gap = statistics.mean(found["top K alone"]) - statistics.mean(found["live"])
    low, high = interval([one - other for one, other in zip(found["cache"], found["live"], strict=True)])
    return {
        "held-out KL": found,
        "cache - live, 95 % interval": [low, high],
        "top K alone - live": gap,
        "width of the interval / that gap": (high - low) / abs(gap),
    }


def interval(differences: list[float]) -> tuple[float, float]:
    """Student's t, 95 %."""
    mean, error = statistics.mean(differences), statistics.stdev(differences) / len(differences) ** 0.5
    half = float(stats.t.ppf(0.975, len(differences) - 1)) * error
    return mean - half, mean + half


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    verbs = parser.add_subparsers(dest="what", required=True)
    fast = verbs.add_parser("speed")
    fast.add_argument("--shape", choices=("cpu", "tiny"), default="cpu")
    fast.add_argument("--payload", choices=("tail", "hidden"), default="tail")
    fast.add_argument("--repeats", type=int, default=5)
    learned = verbs.add_parser("students")
    learned.add_argument("--teacher", type=Path, required=True)
    learned.add_argument("--text", type=Path, required=True)
    learned.add_argument("--field", default="text")
    learned.add_argument("--corpus", type=int, default=60_000, help="tokens of the corpus")
    learned.add_argument("--tokens", type=int, default=40_960, help="that each student is trained on")
    learned.add_argument("--divergence", choices=("forward_kl", "tail_aware"), default="forward_kl")
    learned.add_argument("--clm-weight", type=float, default=0.0, help="0: the teacher alone")
    learned.add_argument("--seeds", type=int, default=5)
    for one in (fast, learned):
        one.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(words)
    torch.manual_seed(0)
    found = speed(arguments) if arguments.what == "speed" else students(arguments)
    given = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    given = {
        key: Path(value).name if key in ("teacher", "text") else value for key, value in given.items() if key != "out"
    }
    about = {
        "run": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": subprocess.run(COMMIT, capture_output=True, text=True, cwd=ROOT, check=False).stdout.strip(),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**given, **found, **about}) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
