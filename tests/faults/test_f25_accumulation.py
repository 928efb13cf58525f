"""F25: the same eight rows as 1 x 8, 2 x 4, 4 x 2 and 8 x 1 give the same gradients, for every divergence."""

from __future__ import annotations

import pytest
import torch
from stepping import eight_rows, pair

from tailkd.objective import Objective
from tailkd.objective.settings import DIVERGENCES
from tailkd.train.step import accumulate_gradients


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients_are_equal(divergence: str) -> None:
    """Relative to the largest gradient, to 1e-6 in float32."""
    student, teacher = pair(torch.float32)
    batch, objective = eight_rows(), Objective(divergence=divergence)
    found = {}
    for rows in (8, 4, 2, 1):
        student.model.zero_grad()
        accumulate_gradients(student, teacher, batch, objective=objective, micro_batch_size=rows)
        found[rows] = torch.cat([p.grad.flatten() for p in student.model.parameters()])
    assert found[8].abs().max() > 1e-3
    for rows in (4, 2, 1):
        assert (found[rows] - found[8]).abs().max() <= 1e-6 * found[8].abs().max(), rows
