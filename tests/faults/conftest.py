from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import running

import tailkd
from tailkd.report.record import Run


@pytest.fixture(scope="session")
def whole(stranger: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that nothing happened to."""
    return tailkd.distill(running.small(stranger, tmp_path_factory.mktemp("whole") / "run"))


@pytest.fixture
def recipe(stranger: SimpleNamespace, tmp_path: Path) -> dict[str, Any]:
    return running.small(stranger, tmp_path / "run")
