"""The paper's costs beside ours: ``python -m tailkd.ledger.tables``.

Parameters of Table 8's models, PFLOP of Table 3 and section 3.2.2, token multipliers of compute-matched CLM, and the
hours of appendix B.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tailkd.ledger import flops
from tailkd.ledger.anatomy import dissect
from tailkd.ledger.bill import PETA_PER_MILLION
from tailkd.ledger.flops import PAPER
from tailkd.ledger.parameters import count
from tailkd.ledger.published import PAIRS, TOTALS, Pair, config

CONTEXT = 2048
H100 = 989e12  # FLOP/s, dense bfloat16


@dataclass(frozen=True)
class Costs:
    """PFLOP per million tokens of a pair: teacher's and reference's forward pass, the student's step."""

    pair: Pair
    teacher: float
    student: float
    reference: float

    @property
    def distilled(self) -> float:
        return self.teacher + self.student

    @property
    def off(self) -> float:
        return self.distilled / self.pair.vanilla - 1

    @property
    def tail_aware_off(self) -> float | None:
        return None if self.pair.tail_aware is None else self.distilled / self.pair.tail_aware - 1

    def mini_plm(self, reference: bool) -> float:
        """The student's step and scoring of twice its tokens, with or without the reference model's scores."""
        return self.student + flops.selection(self.teacher, self.reference if reference else 0.0, 0.5)

    @property
    def matched(self) -> float:
        """Tokens that CLM alone may see for the operations of one distilled token, section 3.2.2's CLM (Mat.)."""
        return self.distilled / self.student


def costs() -> list[Costs]:
    """The five pairs, at 2,048 tokens of context, in the paper's convention."""
    found = []
    for pair in PAIRS:
        teacher, student, reference = (dissect(config(n)) for n in (pair.teacher, pair.student, pair.reference))
        values = (
            flops.forward(teacher, CONTEXT, PAPER),
            flops.student_step(student, CONTEXT, PAPER),
            flops.forward(reference, CONTEXT, PAPER),
        )
        found.append(Costs(pair, *(value * PETA_PER_MILLION for value in values)))
    return found


def supervised() -> dict[str, tuple[float, float]]:
    """Appendix B.1: GPU hours as printed, and as its own statements give them."""
    return {
        "ours, TinyLlama": (130, 130),
        "ours, Llama-2 (2 x 420)": (840, 2 * 420),
        "Rho-1 1B: 32 GPUs x 10 h": (320, 32 * 10),
        "Llemma 7B: 32 GPUs x 18 h, 15B -> 200B tokens": (7680, 32 * 18 * 200 / 15),
        "ratio TinyLlama": (2.5, 320 / 130),
        "ratio Llama-2": (9, 7680 / 840),
    }


def utilisation(teacher: str, student: str, tokens: float, gpu_hours: float) -> float:
    """The share of H100s' peak that so many hours mean for distilling so many tokens."""
    each = flops.forward(dissect(config(teacher)), CONTEXT, PAPER)
    each += flops.student_step(dissect(config(student)), CONTEXT, PAPER)
    return each * tokens / (gpu_hours * 3600 * H100)


def lines() -> Iterator[str]:
    """The tables, line by line."""
    yield "Parameters in millions (total, input embedding, without it), beside the reference total"
    for name, expected in TOTALS.items():
        found = count(config(name))
        mark = "equal" if round(found.total / 1e6, 3) == expected else "DIFFERS"
        yield (
            f"  {name:<13} {found.total / 1e6:9.3f} {found.embedding / 1e6:8.1f} {found.active / 1e6:8.1f}   "
            f"{expected:9.3f} {mark}"
        )
    yield ""
    yield f"PFLOP per million tokens, context {CONTEXT:,}, the paper's figure in brackets"
    yield "  student        teacher  student  KD = TAD                 MiniPLM        with reference   CLM tokens"
    found = costs()
    for one in found:
        aware = f" TAD [{one.pair.tail_aware}] {one.tail_aware_off:+.1%}" if one.tail_aware_off is not None else ""
        yield (
            f"  {one.pair.student:<13} {one.teacher:8.2f} {one.student:8.2f} {one.distilled:6.2f} "
            f"[{one.pair.vanilla:4}] {one.off:+.1%}   {one.mini_plm(False):6.2f} {one.mini_plm(True):6.2f} "
            f"[{one.pair.mini_plm:4}] {one.mini_plm(False) / one.pair.mini_plm - 1:+.1%} "
            f"{one.mini_plm(True) / one.pair.mini_plm - 1:+.1%}   x {one.matched:.2f}{aware}"
        )
    yield ""
    least = min(one.distilled for one in found if one.teacher > 5)
    yield f"FLOP per billion tokens, teachers of 2.8B and more: {least * 1e18:.1e} or more (the paper: above 1e19)"
    yield ""
    yield "Appendix B.1, GPU hours and ratios: printed, computed"
    for name, (printed, computed) in supervised().items():
        yield f"  {name:<46} {printed:8,g} {computed:10,.2f}"
    hours = (("Phi-3-mini", "TinyLlama-1.1B", 130), ("Phi-3-medium", "Llama-2-7B", 840))
    for teacher, student, spent in hours:
        share = utilisation(teacher, student, 2.5e9, spent)
        yield f"  {teacher} -> {student}: 2.5B tokens in {spent} H100 hours is {share:.1%} of the peak"


def main() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    for line in lines():
        print(line)


if __name__ == "__main__":
    main()
