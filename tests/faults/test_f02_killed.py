"""F2: SIGKILL at each named point of a save; the next start takes the newest whole checkpoint, without a hand moved."""

from __future__ import annotations

import signal
from pathlib import Path

import builders
import pytest
import saving

from tailkd.train import commit

# One interpreter imports all of torch that is needed, by a save, and forks a process for each point; each process saves
# steps 1 and 2, meets its fault in the save of step 3, and dies of it in the writing thread.
SCRIPT = """
import json, os, sys
from pathlib import Path
import saving

saving.saved(Path(sys.argv[1]) / "imports")
deaths = {}
for point in sys.argv[2:]:
    child = os.fork()
    if child == 0:
        folder = Path(sys.argv[1]) / point.replace(":", "-")
        state = saving.trained(0)
        checkpoints = saving.store(folder)
        for step in range(3):
            saving.update(state, step)
            if step == 2:
                os.environ["TAILKD_FAULT"] = point + "=kill"
            saving.save(checkpoints, state, step + 1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    deaths[point] = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
print(json.dumps(deaths))
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    done = builders.fresh_python(SCRIPT, str(folder), *commit.POINTS)
    assert done.stdout.count(str(int(signal.SIGKILL))) == len(commit.POINTS), done.stdout
    return folder


@pytest.mark.parametrize("point", commit.POINTS)
def test_killed_at(killed: Path, point: str) -> None:
    folder = killed / point.replace(":", "-")
    renamed = point.startswith("rotate") or point == "rename:after"
    left = [name for name in saving.names(folder) if name.startswith(".")]
    assert bool(left) == (point not in ("folder:before", "rename:after", "rotate:before", "rotate:after"))
    assert not saving.assert_goes_on_as_never_stopped(folder, at=3 if renamed else 2)
    assert all(name.startswith("step-") for name in saving.names(folder))
    with saving.store(folder) as checkpoints:
        saving.save(checkpoints, saving.trained(4), 4)
    saving.assert_goes_on_as_never_stopped(folder, at=4)
    assert len(saving.names(folder)) == 2
