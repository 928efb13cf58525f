"""What draws from the tail cost: mean and variance of a cached teacher's loss beside the live one's and the formula's.

`python benchmarks/cache_variance.py DATA [--resamples 10000]`; DATA has `models/stories260k` and `instruct/` (a really
pretrained teacher, 512 ids, reading questions of GSM8K). The student is the teacher with noise on its weights. The loss
is called once for each resample, its gradient is taken with respect to the student's logits. Ends with an error where a
mean is further than 3 standard errors from the exact value, or a variance further than 10 % from the formula's.
Appends rows to benchmarks/results/cache_variance.jsonl.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tailkd.objective import Cached, Head, Objective, distillation_loss, written_down

RESULTS = Path(__file__).parent / "results" / "cache_variance.jsonl"
HELD, DRAWS = 10, 32
MOST = 127  # repeats that the 7 bits beside an id of 17 can count
BYTES = 3 * (HELD + DRAWS) + 4 * HELD + 8  # ids of 24 bits, log-probabilities, tail mass and entropy
OBJECTIVES = {
    "TAD, K = 10, beta 2": Objective(clm_weight=0.0),
    "TAD, K = 5, beta 10": Objective(top_k=5, beta=10.0, clm_weight=0.0),
    "forward KL": Objective(divergence="forward_kl", clm_weight=0.0),
}


def logits_of(data: Path, rows: int, positions: int, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    """Student's and teacher's logits (rows, positions, vocabulary) on real text, float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = data / "models" / "stories260k"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with gzip.open(data / "instruct" / "gsm8k_train.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["question"] for line, _ in zip(lines, range(rows), strict=False)]
    ids = torch.tensor([tokenizer(text).input_ids[:positions] for text in texts])
    with torch.no_grad():
        teacher = model(ids).logits
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter += noise * parameter.std() * torch.randn(parameter.shape, generator=generator)
        return model(ids).logits, teacher


@dataclass(frozen=True, slots=True)
class Formula:
    """What section "A teacher that was written down" of docs/numerics.md says of one batch, summed over positions.

    value, gradient: variance of the loss, mean squared error of its gradient. spread: standard deviation of the squared
    norm of a sum of independent errors, relative to one error's. The same two for as many bytes of ids drawn from the
    whole vocabulary, each draw written out (`plain_*`) or each id once with a count of up to `MOST` (`counted_*`); they
    are given the exact tail masses, which they would have to estimate.
    """

    value: float
    gradient: float
    spread: float
    plain_value: float
    plain_gradient: float
    counted_value: float
    counted_gradient: float


def formula(student: Tensor, teacher: Tensor, objective: Objective) -> Formula:
    p, z = teacher.double().softmax(-1), student.double()
    held = p.topk(HELD).indices
    drawn = p.scatter(-1, held, 0.0)
    alpha = drawn.sum(-1)
    share = drawn / alpha.unsqueeze(-1)
    tail, per_mass = p, torch.ones(len(p), 1, dtype=p.dtype)  # what a nat of the tail counts, over its mass
    if objective.divergence == "tail_aware":
        tail = p.scatter(-1, held[..., : objective.top_k], 0.0)
        per_mass = objective.beta / tail.sum(-1).mean(-1, keepdim=True)
    weight = torch.where(tail > 0, per_mass.unsqueeze(-1), 1.0)
    scale = (per_mass * alpha) ** 2 / DRAWS
    squared = (share**2).sum(-1)
    value = scale * ((share * z**2).sum(-1) - (share * z).sum(-1) ** 2)
    gradient = scale * (1 - squared)
    fourth = scale**2 * (squared - 2 * (share**3).sum(-1) + squared**2)
    plain_value = (p * (weight * z) ** 2).sum(-1) - (p * weight * z).sum(-1) ** 2
    plain_gradient = (weight**2 * p * (1 - p)).sum(-1)
    counted = torch.minimum(draws_for(p, BYTES / 3), MOST / p.amax(-1))
    return Formula(
        value=float(value.sum()),
        gradient=float(gradient.sum()),
        spread=float((2 * fourth.sum()).sqrt() / gradient.sum()),
        plain_value=float(plain_value.sum() / (BYTES / 3)),
        plain_gradient=float(plain_gradient.sum() / (BYTES / 3)),
        counted_value=float((plain_value / counted).sum()),
        counted_gradient=float((plain_gradient / counted).sum()),
    )


def draws_for(p: Tensor, distinct: float) -> Tensor:
    """How many draws from each distribution hold `distinct` different ids on average."""
    low, high = torch.full(p.shape[:-1], distinct).double(), torch.full(p.shape[:-1], 1e6).double()
    for _ in range(60):
        middle = (low * high).sqrt()
        enough = (1 - (1 - p) ** middle.unsqueeze(-1)).sum(-1) >= distinct
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return high


def value_and_gradient(student: Tensor, teacher: Head | Cached, objective: Objective) -> tuple[float, Tensor]:
    logits = student.clone().requires_grad_()
    head = Head(logits, torch.eye(logits.shape[-1], dtype=logits.dtype))
    labels = torch.zeros(logits.shape[:2], dtype=torch.int64)
    loss = distillation_loss(head, teacher, labels, objective=objective).sum
    (gradient,) = torch.autograd.grad(loss, logits)
    return float(loss.detach()), gradient


def measured(student: Tensor, teacher: Tensor, resamples: int, *, is_stratified: bool = False) -> list[dict[str, Any]]:
    """A row per objective: the estimates' means beside the exact values, their variances beside the formula's.

    is_stratified: one draw from each of equal parts of the tail, instead of independent ones.
    """
    generator = torch.Generator().manual_seed(1)
    head = Head(teacher, torch.eye(teacher.shape[-1]))
    exact = {name: value_and_gradient(student, head, objective) for name, objective in OBJECTIVES.items()}
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in OBJECTIVES}
    errors = {name: torch.zeros(student.shape, dtype=torch.float64) for name in OBJECTIVES}
    for _ in range(resamples):
        numbers = torch.rand(*teacher.shape[:2], DRAWS, generator=generator, dtype=torch.float64)
        if is_stratified:
            numbers = (torch.arange(DRAWS) + numbers) / DRAWS
        cached = written_down(teacher, top_k=HELD, uniforms=numbers)
        for name, objective in OBJECTIVES.items():
            value, gradient = value_and_gradient(student, cached, objective)
            off, error = value - exact[name][0], (gradient - exact[name][1]).double()
            sums[name] += torch.tensor([off, off**2, float((error**2).sum())], dtype=torch.float64)
            errors[name] += error
    rows = []
    for name, objective in OBJECTIVES.items():
        expected = formula(student, teacher, objective)
        mean, squared, gradient = (sums[name] / resamples).tolist()
        variance = squared - mean**2
        norm = float((errors[name] ** 2).sum()) / resamples / gradient  # 1 on average where the mean is right
        rows.append(
            {
                "objective": name,
                "resamples": resamples,
                "exact": exact[name][0],
                "mean_off_by_standard_errors": mean / (variance / resamples) ** 0.5,
                "gradient_off_by_standard_errors": (norm - 1) / expected.spread,
                "value_variance": variance,
                "gradient_error": gradient,
                "value_to_formula": variance / expected.value,
                "gradient_to_formula": gradient / expected.gradient,
                "plain_value": expected.plain_value / variance,
                "plain_gradient": expected.plain_gradient / gradient,
                "counted_value": expected.counted_value / variance,
                "counted_gradient": expected.counted_gradient / gradient,
            }
        )
    return rows


def wrong(row: dict[str, Any]) -> list[str]:
    """What a row of independent draws does not hold."""
    means = [name for name in row if name.endswith("standard_errors") and abs(row[name]) > 3]
    return means + [name for name in row if name.endswith("to_formula") and abs(row[name] - 1) > 0.1]


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("--resamples", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--positions", type=int, default=16)
    parser.add_argument("--stratified", action="store_true", help="one draw from each of equal parts of the tail")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSONL file that rows are appended to")
    arguments = parser.parse_args(words)
    torch.set_num_threads(1)
    student, teacher = logits_of(arguments.data, arguments.rows, arguments.positions)
    p = teacher.double().softmax(-1)
    tail_mass = 1 - float(p.topk(HELD).values.sum(-1).mean())
    many = torch.minimum(draws_for(p, BYTES / 3), MOST / p.amax(-1))
    print(
        f"{arguments.rows} x {arguments.positions} positions, {teacher.shape[-1]} ids, mean tail mass {tail_mass:.3f}"
    )
    print(f"{BYTES} bytes a position: {BYTES / 3:.0f} draws from everything, or {float(many.median()):.0f} with counts")
    rows = measured(student, teacher, arguments.resamples, is_stratified=arguments.stratified)
    about = {"stratified": arguments.stratified, "tail_mass": tail_mass, "torch": torch.__version__}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a", encoding="utf-8") as file:
        for row in rows:
            shown = {n: float(f"{v:.4g}") if isinstance(v, float) else v for n, v in {**row, **about}.items()}
            file.write(json.dumps(shown) + "\n")
            print(json.dumps(shown, indent=1))
    failed = {row["objective"]: wrong(row) for row in rows if wrong(row) and not arguments.stratified}
    if failed:
        sys.exit(f"not as the formulas say: {failed}")


if __name__ == "__main__":
    main()
