"""Deliberate faults, applied one at a time; each must turn the tests red.

Run: python tests/mutants.py (`make mutants`). Prints which test caught which fault; exits 1 if one was not caught.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Mutant(NamedTuple):
    """A fault: in `file`, `before` becomes `after`; `tests` are run first, then everything."""

    name: str
    file: str
    before: str
    after: str
    tests: str


MUTANTS = (
    Mutant(
        "sign of the tail term",
        "objective/divergences.py",
        "split.head_kl + weight * split.tail_kl",
        "split.head_kl - weight * split.tail_kl",
        "tests/objective",
    ),
    Mutant(
        "sign of the tail term, chunked",
        "objective/blocks.py",
        "addcmul_(student, (weights.scale / found.student_total).to(wide))",
        "addcmul_(student, (-weights.scale / found.student_total).to(wide))",
        "tests/objective/test_chunked.py",
    ),
    Mutant(
        "sign of the tail term, fused",
        "objective/kernels.py",
        "on_student * of_student - on_teacher * of_teacher",
        "on_student * of_student + on_teacher * of_teacher",
        "tests/objective/test_kernels.py",
    ),
    Mutant(
        "mean tail mass over all rows, chunked and fused",
        "objective/work.py",
        "objective, log_mean = self.objective, self.log_mean[self.group[start:stop]]",
        "objective, log_mean = self.objective, self.log_mean.exp().mean().log().expand(stop - start)",
        "tests/objective/test_chunked.py",
    ),
    Mutant(
        "teacher and student swapped, chunked",
        "objective/blockwise.py",
        "self._divergence((s, t, buffers[2]),",
        "self._divergence((t, s, buffers[2]),",
        "tests/objective/test_chunked.py",
    ),
    Mutant(
        "teacher and student swapped, fused",
        "objective/fused.py",
        "rows.head_kl(p, q)",
        "rows.head_kl(q, p)",
        "tests/objective/test_kernels.py",
    ),
    Mutant(
        "tail mass as 1 - sum, chunked and fused",
        "objective/rows.py",
        "return Lumped(logits - log_sum_exp, log_sum_exp)",
        "log = logits - log_sum_exp\n        log[:, -1:] = (1 - log[:, :-1].exp().sum(1, keepdim=True)).log()\n"
        "        return Lumped(log, log_sum_exp)",
        "tests/objective/test_chunked.py",
    ),
    Mutant(
        "-inf rows as they are, fused",
        "objective/kernels.py",
        "return tl.where(x > -1e29, z, LOW)",
        "return z",
        "tests/objective/test_kernels.py",
    ),
    Mutant(
        "gradient of a sharded head left unreduced",
        "models/head.py",
        'full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)',
        "full_tensor()",
        "tests/models",
    ),
    Mutant(
        "mask dropped in the mean tail mass",
        "objective/divergences.py",
        "log_tail_mass.detach().masked_fill(~mask, NEGATIVE_INFINITY)",
        "log_tail_mass.detach()",
        "tests/objective",
    ),
    Mutant(
        "labels off by one",
        "data/packing.py",
        "run[:-1], run[1:], segments[:-1]",
        "run[:-1], run[:-1], segments[:-1]",
        "tests/data",
    ),
    Mutant(
        "teacher and student swapped",
        "objective/loss.py",
        "of(student_logits, teacher_logits, labels, objective, segments)",
        "of(teacher_logits, student_logits, labels, objective, segments)",
        "tests/objective",
    ),
    Mutant(
        "weight decay on norms",
        "train/optim.py",
        'if p.dim() < 2], "weight_decay": 0.0}',
        'if p.dim() < 2], "weight_decay": weight_decay}',
        "tests/train",
    ),
    Mutant(
        "tail mass as 1 - sum",
        "objective/divergences.py",
        "log_mass_p = log_sum_exp(log_p.masked_fill(head, NEGATIVE_INFINITY))",
        "log_mass_p = (1 - log_p.exp().masked_fill(~head, 0.0).sum(-1)).log()",
        "tests/objective",
    ),
    Mutant(
        "division per micro-batch",
        "train/step.py",
        "loss.mean(batch.count).backward()",
        "(loss.mean() / (len(batch) / micro_batch_size)).backward()",
        "tests/train",
    ),
    Mutant(
        "evaluation by mean of means",
        "evaluate/heldout.py",
        "measures = _measures(table.sum(0),",
        "measures = _measures((table / table[:, -1:]).mean(0) * table[:, -1].sum(),",
        "tests/evaluate",
    ),
    Mutant(
        "stale tokenizer fingerprint accepted",
        "data/tokens.py",
        '"tokenizer": tokenizer_fingerprint(tokenizer),',
        '"tokenizer": len(tokenizer),',
        "tests/data",
    ),
    Mutant(
        "held-out document in training",
        "data/packing.py",
        "return np.flatnonzero(~held), np.flatnonzero(held)",
        "return np.arange(len(held)), np.flatnonzero(held)",
        "tests/data",
    ),
)


def first_failure(sources: Path, *arguments: str) -> str | None:
    """Name of the first test that fails on these sources."""
    environment = {**os.environ, "PYTHONPATH": str(sources)}
    command = [sys.executable, "-m", "pytest", "-x", "-m", "not slow", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    assert found or done.returncode == 0, done.stdout + done.stderr
    return found.group(1) if found else None


def caught_by(mutant: Mutant) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "src" / "tailkd", Path(folder) / "tailkd")
        path = Path(folder) / "tailkd" / mutant.file
        text = path.read_text("utf-8")
        assert text.count(mutant.before) == 1, (
            f"{mutant.name}: {mutant.file} holds its place {text.count(mutant.before)} times"
        )
        path.write_text(text.replace(mutant.before, mutant.after), "utf-8")
        return first_failure(Path(folder), mutant.tests) or first_failure(Path(folder))


def main() -> int:
    missed = 0
    for mutant in MUTANTS:
        test = caught_by(mutant)
        missed += test is None
        print(f"{mutant.name:<40} {test or 'NOT CAUGHT'}", flush=True)
    print(f"{len(MUTANTS) - missed} of {len(MUTANTS)} faults caught")
    return missed > 0


if __name__ == "__main__":
    sys.exit(main())
