"""F45: 2,000 steps with a save every 5: memory, file handles and threads stay flat."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import running

STEPS, EVERY, SETTLED = 2_000, 20, 500

SAMPLED = """
import json, sys
import psutil
import tailkd
from tailkd.train.loop import Loop

real, process, samples = Loop._one_step, psutil.Process(), []

def step(loop):
    real(loop)
    if loop.cursor.step % int(sys.argv[2]) == 0:
        samples.append((loop.cursor.step, process.memory_info().rss, process.num_fds(), process.num_threads()))

Loop._one_step = step
tailkd.distill(json.loads(sys.argv[1]))
print("SAMPLES", json.dumps(samples))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_thousand_steps(stranger: SimpleNamespace, tmp_path: Path) -> None:
    """After step 500 memory grows by less than 1 % in 1,000 steps; handles and threads by none."""
    tokens = 8 * 24
    recipe = running.small(
        stranger, tmp_path / "run", tokens=STEPS * tokens, save_every_tokens=5 * tokens, micro_batch_size=8
    )
    recipe["evaluate"]["every_tokens"] = 500 * tokens
    command = [sys.executable, "-c", SAMPLED, json.dumps(recipe), str(EVERY)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=850, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("SAMPLES "))
    samples = np.asarray(json.loads(line.removeprefix("SAMPLES ")), dtype=float)
    assert len(samples) == STEPS // EVERY
    step, memory, handles, threads = samples[samples[:, 0] >= SETTLED].T
    growth = 1_000 * np.polyfit(step, memory, 1)[0] / memory.mean()
    assert growth < 0.01, f"{growth:.2%} in 1,000 steps, to {memory[-1]:,.0f} bytes"
    assert np.ptp(threads) == 0, sorted(set(threads))
    # A save that is under way holds a file or two.
    assert handles[-5:].max() <= handles[:5].max() + 2, handles.tolist()
    assert handles.max() <= handles.min() + 4, handles.tolist()
