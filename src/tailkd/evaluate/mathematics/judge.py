"""Verdicts that may hang, crash or eat memory, asked of processes that are killed when they do."""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import queue
import selectors
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

from tailkd.evaluate.mathematics.latex import Tree, to_json

SYMPY_SECONDS = 3.0
VERIFY_SECONDS = 10.0
START_SECONDS = 120.0  # until the libraries are imported, on a busy machine
WORKERS = 2


class Judge:
    """One worker process, started at the first question and again after each that it did not survive."""

    def __init__(self, command: Sequence[str], seconds: float) -> None:
        self.command, self.seconds = list(command), seconds
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, question: dict[str, Any]) -> bool | None:
        """The worker's verdict; None where it had none, died, or took longer than `seconds`."""
        for attempt in (1, 2):
            process = self.process or self._started()
            try:
                assert process.stdin is not None
                process.stdin.write((json.dumps(question) + "\n").encode())
                process.stdin.flush()
                break
            except OSError:  # it died while nobody asked
                self.close()
                if attempt == 2:
                    return None
        answer = self._line(self.seconds)
        if answer is None:
            self.close()
            return None
        return json.loads(answer)

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def _started(self) -> subprocess.Popen[bytes]:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            self.command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=environment, start_new_session=True
        )
        if self._line(START_SECONDS) is None:
            self.close()
            raise RuntimeError(f"the judge {' '.join(self.command)} did not start within {START_SECONDS:.0f} s")
        return self.process

    def _line(self, seconds: float) -> bytes | None:
        """The next line of the worker: it writes one line for each question, at once."""
        assert self.process is not None
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                return None
        return self.process.stdout.readline() or None


class Judges:
    """Several judges of one kind, for threads to share."""

    def __init__(self, command: Sequence[str], seconds: float, count: int = WORKERS) -> None:
        self.all = [Judge(command, seconds) for _ in range(count)]
        self.free: queue.LifoQueue[Judge] = queue.LifoQueue()
        for judge in self.all:
            self.free.put(judge)
        atexit.register(self.close)

    def ask(self, question: dict[str, Any]) -> bool | None:
        judge = self.free.get()
        try:
            return judge.ask(question)
        finally:
            self.free.put(judge)

    def ask_all(self, questions: Iterable[dict[str, Any]]) -> list[bool | None]:
        """Verdicts in the order of the questions, as many at a time as there are judges."""
        with ThreadPoolExecutor(len(self.all)) as threads:
            return list(threads.map(self.ask, questions))

    def close(self) -> None:
        for judge in self.all:
            judge.close()


def symbolic(answer: Tree, gold: Tree, *, up_to_a_factor: bool = False) -> bool | None:
    """Does sympy find the difference of two formulas to be 0 (or their quotient to be a number)? None after 3 s."""
    if answer == gold:
        return True
    trees = {"answer": to_json(answer), "gold": to_json(gold)}
    return _judges("symbolic", SYMPY_SECONDS).ask({**trees, "up_to_a_factor": up_to_a_factor})


def can_verify() -> bool:
    """Is math-verify installed (extra `eval`)?"""
    return importlib.util.find_spec("math_verify") is not None


def verified(generated: str, gold: str) -> bool | None:
    """math-verify's verdict on a generated text; None where it hung or crashed. Needs the extra `eval`."""
    return all_verified([(generated, gold)])[0]


def all_verified(pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
    """`verified` of each pair of (generated text, gold answer), several at a time."""
    judges = _judges("verify", VERIFY_SECONDS)
    return judges.ask_all({"generated": generated, "gold": gold} for generated, gold in pairs)


_creation = threading.Lock()


def _judges(kind: str, seconds: float) -> Judges:
    with _creation:
        return _made(kind, seconds)


@cache
def _made(kind: str, seconds: float) -> Judges:
    return Judges([sys.executable, "-P", "-m", "tailkd.evaluate.mathematics.worker", kind], seconds)
