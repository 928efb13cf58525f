"""Named points where a test may break the process; without TAILKD_FAULT in the environment they do nothing."""

from __future__ import annotations

import errno
import os
import signal
from collections import Counter

_passed: Counter[str] = Counter()


def at(point: str) -> None:
    """Fail here if TAILKD_FAULT says so.

    ``TAILKD_FAULT="rename:before=kill"`` sends SIGKILL to this process, ``...=ENOSPC`` raises that OSError, and
    ``"rename:before@3=kill"`` lets the point pass twice.
    """
    wanted = os.environ.get("TAILKD_FAULT")
    if not wanted:
        return
    where, _, what = wanted.partition("=")
    name, _, nth = where.partition("@")
    if name != point:
        return
    _passed[point] += 1
    if _passed[point] < int(nth or 1):
        return
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise OSError(getattr(errno, what), os.strerror(getattr(errno, what)))
