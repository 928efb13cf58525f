"""The public names and signatures; a change here is a change for users and belongs in the changelog."""

from __future__ import annotations

import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tailkd

SIGNATURES = {
    "Cached": "(head_ids, head_log_probabilities, log_tail_mass, tail_entropy, tail_ids, vocabulary_size, "
    "temperature=1.0)",
    "Head": "(hidden, weight, bias=None, scale=1.0, softcap=None)",
    "Objective": "(*, divergence='tail_aware', top_k=10, beta=2.0, temperature=1.0, clm_weight=1.0, "
    "divergence_weight=1.0, jsd_beta=0.5, skew=0.1, dkd_alpha=1.0, dkd_beta=8.0, tail_mass_floor=1e-06)",
    "decoupled_kd": "(student_logits, teacher_logits, labels, *, dkd_alpha=1.0, dkd_beta=8.0, mask=None, "
    "temperature=1.0)",
    "distill": "(recipe, *, fresh=False, allow_change=(), **overrides)",
    "distillation_loss": "(student, teacher, labels, *, objective, segments=None, token_weights=None, impl='auto', "
    "layout=None)",
    "forward_kl": "(student_logits, teacher_logits, *, mask=None, temperature=1.0)",
    "full_ece": "(probabilities, labels, *, bins=10)",
    "ghost_token_kl": "(student_logits, teacher_logits, *, top_k=10, mask=None, temperature=1.0)",
    "jensen_shannon": "(student_logits, teacher_logits, *, jsd_beta=0.5, mask=None, temperature=1.0)",
    "relative_change": "(accuracies, baseline_accuracies, *, base=10)",
    "reverse_kl": "(student_logits, teacher_logits, *, mask=None, temperature=1.0)",
    "skew_forward_kl": "(student_logits, teacher_logits, *, skew=0.1, mask=None, temperature=1.0)",
    "skew_reverse_kl": "(student_logits, teacher_logits, *, skew=0.1, mask=None, temperature=1.0)",
    "tail_aware_divergence": "(student_logits, teacher_logits, *, top_k=10, beta=2.0, mask=None, segments=None, "
    "temperature=1.0, tail_mass_floor=1e-06)",
    "total_variation": "(student_logits, teacher_logits, *, mask=None, temperature=1.0)",
}


def test_public_names() -> None:
    assert set(tailkd.__all__) == {"__version__", *SIGNATURES}
    assert set(SIGNATURES) <= set(dir(tailkd))
    with pytest.raises(AttributeError, match="no attribute 'kl'"):
        _ = tailkd.kl  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    signature = inspect.signature(getattr(tailkd, name))
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    found = str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))
    assert found == SIGNATURES[name]
    assert getattr(tailkd, name).__doc__


def test_relative_change() -> None:
    assert tailkd.relative_change([50.0, 40.0], [50.0, 40.0]) == 0
    assert tailkd.relative_change([100.0], [10.0]) == pytest.approx(100)
    assert tailkd.relative_change([2.718281828459045], [1.0], base=2.718281828459045) == pytest.approx(100)
    ours, vanilla = [46.0, 60.0], [40.0, 50.0]
    ten, e = (tailkd.relative_change(ours, vanilla, base=base) for base in (10, 2.718281828459045))
    assert e / ten == pytest.approx(2.302585, rel=1e-6)
    for accuracies, baseline in (([1.0], [1.0, 2.0]), ([], []), ([0.0], [1.0])):
        with pytest.raises(ValueError, match=r"expected|logarithms"):
            tailkd.relative_change(accuracies, baseline)


@given(st.lists(st.tuples(st.floats(0.1, 100), st.floats(0.1, 100)), min_size=1, max_size=9))
def test_relative_change_is_antisymmetric(pairs: list[tuple[float, float]]) -> None:
    a, b = zip(*pairs, strict=True)
    assert tailkd.relative_change(a, b) == pytest.approx(-tailkd.relative_change(b, a), abs=1e-9)
