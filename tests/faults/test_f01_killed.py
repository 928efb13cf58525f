"""F1: SIGKILL at random moments, the same command until it is done: equal to the last bit to a run left alone.

One process imports everything and forks a child for each attempt, so that what is killed is training and not imports.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import running

from tailkd.report.record import Run

ATTEMPTS = """
import json, os, random, signal, sys, time
import torch
torch.set_num_threads(1)
import running, tailkd
from tailkd import demo

def child(recipe):
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        tailkd.distill(recipe)
        code = 0
    finally:
        os._exit(code)

recipe, kills, seed = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
choose, killed, longest = random.Random(seed), 0, 0.0
while killed < kills:
    pid = child(recipe)
    time.sleep(choose.uniform(0.05, 1.6) if longest == 0.0 else choose.uniform(0.05, 0.9 * longest))
    done, status = os.waitpid(pid, os.WNOHANG)
    if not done:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        killed += 1
        continue
    assert status == 0, status
    break
while os.waitpid(child(recipe), 0)[1] != 0:
    pass
print(killed)
"""


def kill_until_done(recipe: dict[str, object], kills: int, seed: int) -> int:
    """How many attempts were killed before the run was done."""
    code = f"import sys; sys.path.insert(0, {str(Path(running.__file__).parent)!r})\n{ATTEMPTS}"
    command = [sys.executable, "-c", code, json.dumps(recipe), str(kills), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout.splitlines()[-1])


def test_three_kills(stranger: SimpleNamespace, tmp_path: Path, whole: Run) -> None:
    recipe = running.small(stranger, tmp_path / "run")
    assert kill_until_done(recipe, 3, seed=1) > 0
    running.assert_same(Run(tmp_path / "run"), whole)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_fifty_kills(stranger: SimpleNamespace, tmp_path: Path, whole: Run) -> None:
    killed, number = 0, 0
    while killed < 50:
        number += 1
        recipe = running.small(stranger, tmp_path / f"run{number}")
        killed += kill_until_done(recipe, 12, seed=number)
        running.assert_same(Run(tmp_path / f"run{number}"), whole)
