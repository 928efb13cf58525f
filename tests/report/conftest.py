from __future__ import annotations

import pytest

from tailkd.report import figures


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without what takes most of their time."""
    monkeypatch.setattr(figures, "_svg", lambda draw: "<svg></svg>")
