"""The process that shows one run in one tool: ``python -m tailkd.track.follow SINK FOLDER KEY``.

It reads metrics.jsonl as it grows, from its first record, and hands over what the tool does not have yet. Its standard
input ends when the run does, with the word WHOLE before that if it came to its end; why it gave up is its output.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tailkd.report.record import Run, flattened
from tailkd.secrets import without_secrets
from tailkd.track.sinks import open_sink

WHOLE = b"whole"
LOOK_EVERY = 0.5  # seconds
PATIENCE = 120  # seconds that one call of a tool may take, of one that hangs


def main(name: str, folder: Path, key: str) -> None:
    for asked in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(asked, signal.SIG_IGN)  # the run's own: it ends our input when it has saved
    with _patience():
        sink = open_sink(name, folder, Run(folder).recipe, key)
    records = Records(folder / "metrics.jsonl")
    ended = None
    while ended is None:
        ended = _ended()
        for record in records.new():
            if record["step"] > sink.last:
                with _patience():
                    sink.log(numbers(record), record["step"])
    with _patience():
        sink.finish(whole=ended == WHOLE)


class Records:
    """The records of a metrics.jsonl that grows: ``new()`` gives those that were not there before."""

    def __init__(self, path: Path) -> None:
        self._path, self._read = path, 0

    def new(self) -> Iterator[dict[str, Any]]:
        """Of whole lines; the one that is being written waits."""
        with self._path.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._read += len(line)
                record = json.loads(line)
                if "step" in record:
                    yield record


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """A record's numbers under the names that pages sort by: ``train/loss``, ``heldout/student/kl``."""
    above = "train" if record["kind"] == "step" else f"heldout/{record['role']}"
    flat = flattened({name: value for name, value in record.items() if name != "step"})
    return {
        f"{above}/{name.replace('.', '/')}": value for name, value in flat.items() if isinstance(value, int | float)
    }


def _ended() -> bytes | None:
    """What the run said last, once it has ended; waits a moment otherwise."""
    if not select.select([sys.stdin], [], [], LOOK_EVERY)[0]:
        return None
    return sys.stdin.buffer.read()


@contextmanager
def _patience() -> Iterator[None]:
    """The system ends this process when what it does here takes too long, whatever hangs."""
    signal.alarm(PATIENCE)
    yield
    signal.alarm(0)


def _shown_to_nobody() -> int:
    """What tools print goes nowhere; a descriptor for our own last word."""
    own, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    return own


if __name__ == "__main__":
    last_word = _shown_to_nobody()
    try:
        main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
    except Exception as error:
        said = (str(error).strip().splitlines() or [""])[0]
        os.write(last_word, without_secrets(f"{type(error).__name__}: {said}").encode()[:1000])
        os._exit(1)  # a tool's own threads and farewells are not waited for
    os._exit(0)
