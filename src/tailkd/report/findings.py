"""What a reader wants to know first, in sentences: which is best, is it real, what did it cost, what was different."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tailkd.report.compare import Gap, cost, gaps, ranking, recipe_differences
from tailkd.report.record import Run, Stopped

TITLES = {"kl": "held-out KL(T||S)", "cross_entropy": "held-out cross-entropy"}


@dataclass(frozen=True)
class Finding:
    """A question and its answer."""

    question: str
    answer: str


def findings(runs: Sequence[Run]) -> list[Finding]:
    """The four answers for several runs, or what one run reached and cost."""
    stopped = [Finding("Why did it stop?", run.why) for run in runs if isinstance(run, Stopped)]
    first = [_reached(runs[0])] if len(runs) == 1 else [_best(runs), _real(runs)]
    return [*stopped, *first, _cost(runs), *([_different(runs)] if len(runs) > 1 else [])]


def _reached(run: Run) -> Finding:
    before, after = run.evaluation["student_before"], run.evaluation["student"]
    teacher = run.evaluation["teacher"]
    answer = f"Held-out cross-entropy {before['cross_entropy']:.3f} before, {after['cross_entropy']:.3f} after"
    if teacher is None:
        return Finding("What did the student reach?", answer + " (nats per token); it had no teacher.")
    closed = _closed(before["cross_entropy"], after["cross_entropy"], teacher["cross_entropy"])
    return Finding(
        "What did the student reach?",
        f"{answer}, teacher {teacher['cross_entropy']:.3f} (nats per token){closed}. KL to the teacher "
        f"{before['kl']:.3f} before, {after['kl']:.3f} after.",
    )


def _closed(before: float, after: float, teacher: float) -> str:
    gap = before - teacher
    return f": {100 * (before - after) / gap:.0f} % of the gap closed" if gap > 0 else ""


def _best(runs: Sequence[Run]) -> Finding:
    measure, ranked = ranking(runs)
    values = [run.evaluation["student"][measure] for run in ranked]
    last = ranked[-1]
    answer = (
        f"{ranked[0].name}: {TITLES[measure]} {values[0]:.4f} nats per token, {values[1] - values[0]:.4f} "
        f"({100 * (1 - values[0] / values[1]):.1f} %) below {ranked[1].name}"
    )
    if len(ranked) > 2:
        answer += f" and {100 * (1 - values[0] / values[-1]):.0f} % below {last.name}, the last"
    return Finding("Which student is best, and by how much?", answer + ".")


def _real(runs: Sequence[Run]) -> Finding:
    behind = gaps(runs)
    question = "Is the difference real?"
    if any(gap.difference is None for gap in behind):
        return Finding(question, "It cannot be said: the runs were not measured on the same held-out rows.")
    ties = [gap.run.name for gap in behind if gap.difference and not gap.difference.real]
    closest = min(behind, key=lambda gap: gap.difference.mean if gap.difference else 0.0)
    rows = closest.difference.rows if closest.difference else 0
    verdict = (
        f"Not from {', '.join(ties)}: {_interval(closest)} includes 0, a tie."
        if ties
        else f"Larger than the noise of the held-out sample: {_interval(closest)} leaves 0 out."
    )
    others = "" if not ties or len(ties) == len(behind) else " From the others yes."
    return Finding(
        question,
        f"{verdict}{others} (95 %, paired over {rows} held-out rows; {_seeds(runs)})",
    )


def _interval(gap: Gap) -> str:
    difference = gap.difference
    assert difference is not None
    numbers = f"{difference.mean:.4f} [{difference.low:.4f}, {difference.high:.4f}]"
    return f"the distance of {gap.run.name} to the best, {numbers},"


def _seeds(runs: Sequence[Run]) -> str:
    seeds = {run.recipe["training"]["seed"] for run in runs}
    if len(seeds) == 1:
        return "one training seed each: another seed may change the order."
    return f"{len(seeds)} training seeds among the runs."


def _cost(runs: Sequence[Run]) -> Finding:
    costs = [cost(run) for run in runs]
    tokens, seconds = sorted({c.tokens for c in costs}), sorted(c.seconds for c in costs)
    amount = f"{tokens[0]:,}" if len(tokens) == 1 else f"{tokens[0]:,} to {tokens[-1]:,}"
    time = _duration(seconds[0])
    time = time if len(costs) == 1 else f"{time} to {_duration(seconds[-1])} each"
    rates = sorted(c.tokens_per_second for c in costs)
    rate = f"{rates[0]:,.0f}" if len(rates) == 1 else f"{rates[0]:,.0f} to {rates[-1]:,.0f}"
    environment = runs[0].environment
    where = f"{environment['device']}, {environment['threads']} threads"
    return Finding("What did it cost?", f"{amount} tokens, {time} of training, {rate} tokens per second ({where}).")


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.0f} min" if minutes < 100 else f"{hours:.1f} h"


def _different(runs: Sequence[Run]) -> Finding:
    keys = list(recipe_differences(runs))
    question = "What was different between the runs?"
    if not keys:
        return Finding(question, "Nothing: the recipes are the same.")
    if not all(key.startswith("objective.") for key in keys):
        return Finding(question, f"{', '.join(keys)} (table below).")
    same = "data, order, start and schedule are the same."
    return Finding(question, f"Only {', '.join(keys)} (table below); {same}")


def warnings(runs: Sequence[Run]) -> list[str]:
    """What a reader should know before believing the numbers."""
    found: list[str] = []
    for run in runs:
        skipped = run.data["skipped"]
        if skipped:
            reasons = ", ".join(f"{count:,} x {reason}" for reason, count in skipped.items())
            message = f"{sum(skipped.values()):,} records of the corpus were skipped ({reasons})"
            found += [message] if message not in found else []
        steps = [record for record in run.metrics if record["kind"] == "step"]
        floored = sum(record.get("floored_rows", 0) for record in steps)
        if floored:
            found.append(f"{run.name}: {floored:,} rows had a mean tail mass below the floor and weigh less")
    if len({str(run.heldout["student"]["rows"]["tokens"]) for run in runs}) > 1:
        found.append("the runs were measured on different held-out rows: their numbers do not compare")
    return found
