"""What ends a run on purpose, and the exit code it ends with."""

from __future__ import annotations

DONE, BUG, REFUSED, PREEMPTED, DIVERGED, OUT_OF_MEMORY, DATA = 0, 1, 2, 75, 76, 77, 78


class Refusal(ValueError):
    """The user's recipe, data or models cannot be used: what came, what was expected, what to do. Exit code 2."""

    exit_code = REFUSED
