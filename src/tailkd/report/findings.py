"""What a reader wants to know first, in sentences: which is best, is it real, what did it cost, what was different."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tailkd.report import weights
from tailkd.report.compare import Gap, cost, gaps, mean, ranking, recipe_differences
from tailkd.report.curves import amount as amount_of
from tailkd.report.curves import flops
from tailkd.report.groups import grouped, seed
from tailkd.report.record import Run, Stopped

TITLES = {"kl": "held-out KL(T||S)", "cross_entropy": "held-out cross-entropy"}


@dataclass(frozen=True)
class Finding:
    """A question and its answer."""

    question: str
    answer: str


def findings(runs: Sequence[Run]) -> list[Finding]:
    """The four answers for several methods, or what one reached (its first seed) and cost."""
    stopped = [Finding("Why did it stop?", run.why) for run in runs if isinstance(run, Stopped)]
    if len(grouped(runs)) > 1:
        return [*stopped, _best(runs), _real(runs), _cost(runs), _different(runs)]
    return [*stopped, *map(_reached, runs[:1]), _cost(runs)]


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
    values = [mean(group, measure) for group in ranked]
    answer = (
        f"{ranked[0].label}: {TITLES[measure]} {values[0]:.4f} nats per token, {values[1] - values[0]:.4f} "
        f"({100 * (1 - values[0] / values[1]):.1f} %) below {ranked[1].name}"
    )
    if len(ranked) > 2:
        answer += f" and {100 * (1 - values[0] / values[-1]):.0f} % below {ranked[-1].name}, the last"
    return Finding("Which student is best, and by how much?", answer + ".")


def _real(runs: Sequence[Run]) -> Finding:
    behind = gaps(runs)
    question = "Is the difference real?"
    if any(gap.difference.real is None for gap in behind):
        return Finding(question, "It cannot be said: the runs were not measured on the same held-out rows.")
    ties = [gap for gap in behind if not gap.difference.real]
    closest = min(ties or behind, key=lambda gap: gap.difference.value)
    verdict = (
        f"Not from {', '.join(gap.group.name for gap in ties)}: {_interval(closest)} includes 0, a tie."
        if ties
        else f"Larger than the noise: {_interval(closest)} leaves 0 out."
    )
    others = "" if not ties or len(ties) == len(behind) else " From the others yes."
    return Finding(question, f"{verdict}{others} (95 % each; {_noise(behind)})")


def _interval(gap: Gap) -> str:
    difference = gap.difference
    return f"the distance of {gap.group.name} to the best, {difference.value:.4f} {difference.widest},"


def _noise(behind: Sequence[Gap]) -> str:
    """What the intervals cover."""
    samples = {str(gap.difference.sample.number) for gap in behind if gap.difference.sample}
    seeds = sorted({gap.difference.seeds.number for gap in behind if gap.difference.seeds})
    rows = f"paired over {'/'.join(sorted(samples))} held-out rows" if samples else "over no rows in common"
    if not seeds:
        return f"{rows}, not over seeds, which takes two of both: another seed may change the order."
    return f"{rows}, and over {'/'.join(map(str, seeds))} seeds: both must leave 0 out."


def _cost(runs: Sequence[Run]) -> Finding:
    costs = [cost(run) for run in runs]
    tokens, seconds = sorted({c.tokens for c in costs}), sorted(c.seconds for c in costs)
    amount = f"{tokens[0]:,}" if len(tokens) == 1 else f"{tokens[0]:,} to {tokens[-1]:,}"
    time = _duration(seconds[0])
    time = time if len(costs) == 1 else f"{time} to {_duration(seconds[-1])} each"
    operations = [f for run in runs if (f := flops(run)) is not None]
    if len(operations) == len(runs):
        ends = dict.fromkeys((amount_of("flops", min(operations)), amount_of("flops", max(operations))))
        amount += f" tokens, {' to '.join(ends)} of student and teacher"
    else:
        amount += " tokens"
    rates = sorted(c.tokens_per_second for c in costs)
    rate = f"{rates[0]:,.0f}" if len(rates) == 1 else f"{rates[0]:,.0f} to {rates[-1]:,.0f}"
    environment = runs[0].environment
    where = f"{environment['device']}, {environment['threads']} threads"
    return Finding("What did it cost?", f"{amount}, {time} of training, {rate} tokens per second ({where}).")


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.0f} min" if minutes < 100 else f"{hours:.1f} h"


def _different(runs: Sequence[Run]) -> Finding:
    groups = grouped(runs)
    seeds = {tuple(sorted(seed(run) for run in group.runs)) for group in groups}
    paired = len(seeds) == 1 and len(groups) < len(runs)
    keys = [key for key in recipe_differences(runs) if not (paired and key == "training.seed")]
    question = "What was different between the runs?"
    if not keys:
        return Finding(question, "Nothing: the recipes are the same.")
    if not all(key.startswith("objective.") for key in keys):
        return Finding(question, f"{', '.join(keys)} (table below).")
    same = "data, order, start and schedule are the same" + (" for each seed." if paired else ".")
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
    floored = {run.name: sum(record.get("floored_rows", 0) for record in run.metrics) for run in runs}
    if any(floored.values()):
        counts = ", ".join(f"{name} {count:,}" for name, count in floored.items() if count)
        found.append(f"rows whose mean tail mass was below the floor, which weigh less: {counts}")
    unequal = weights.warning(runs)
    found += [unequal] if unequal else []
    if len({str(run.heldout["student"]["rows"]["tokens"]) for run in runs}) > 1:
        found.append("the runs were measured on different held-out rows: their numbers do not compare")
    return found
