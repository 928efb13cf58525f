"""Eight multiple-choice sets, asked and scored by lm-eval's own task definitions; items of the hub or of local files.

docs/evaluation.md has the table. lm-eval (extra `eval`) is imported by `harness` alone, when something is measured.
"""

from __future__ import annotations

from tailkd.evaluate.commonsense.files import Local, find
from tailkd.evaluate.commonsense.measuring import can_measure, measured
from tailkd.evaluate.commonsense.tasks import TASKS, Task

__all__ = ["Local", "TASKS", "Task", "can_measure", "find", "measured"]
