"""Relative change against the paper's Tables 1 and 4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tailkd

PUBLISHED: dict[str, Any] = json.loads((Path(__file__).parents[1] / "golden" / "relative_change.json").read_text())


def test_the_papers_tables_are_reproduced_but_for_four_rows() -> None:
    rows, wrong = PUBLISHED["rows"], set()
    assert len(rows) == 18 + 27
    for name, row in rows.items():
        baseline = rows[f"{name.rpartition(', ')[0]}, Vanilla KD"]["accuracies"]
        assert len(row["accuracies"]) == len(baseline) == len(PUBLISHED["tasks"])
        found = tailkd.relative_change(row["accuracies"], baseline)
        if row["printed"] is None:
            assert found == 0
        elif abs(found - row["printed"]) > 0.1 or name in PUBLISHED["wrong"]:
            wrong.add(name)
            assert found == pytest.approx(PUBLISHED["wrong"][name], abs=0.006)
    assert wrong == set(PUBLISHED["wrong"])
