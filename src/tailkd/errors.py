"""What ends a run on purpose, and the exit code it ends with."""

from __future__ import annotations

from tailkd.secrets import without_secrets

DONE, BUG, REFUSED, PREEMPTED, DIVERGED, OUT_OF_MEMORY, DATA = 0, 1, 2, 75, 76, 77, 78


class Refusal(ValueError):
    """The user's recipe, data or models cannot be used: what came, what was expected, what to do. Exit code 2."""

    exit_code = REFUSED

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))


class Stop(RuntimeError):
    """A run ends before its end, and says with its exit code what a supervisor should do."""

    exit_code = BUG

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))


class Preempted(Stop):
    """A signal or a time limit: the state is saved, the same command goes on. Exit code 75."""

    exit_code = PREEMPTED


class Diverged(Stop):
    """Training has left the finite numbers: what, where, and what still stands. Exit code 76."""

    exit_code = DIVERGED


class OutOfMemory(Stop):
    """A step does not fit into memory. Exit code 77."""

    exit_code = OUT_OF_MEMORY


class DataError(Stop):
    """Data or disk fail while training. Exit code 78."""

    exit_code = DATA
