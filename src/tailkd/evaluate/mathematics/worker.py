"""The process behind `judge.Judge`: a line of JSON in, a line with true, false or null out. `symbolic` or `verify`."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from tailkd.evaluate.mathematics.latex import Tree, from_json

MEMORY = 4 << 30  # bytes of address space: more is a crash, and the next question gets a new worker
ALONE_SECONDS = 60  # an orphan that hangs ends itself


def main(kind: str) -> None:
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no verdict
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    judge = {"symbolic": symbolic_judge, "verify": verify_judge}[kind]()
    print("ready", file=replies)
    for line in sys.stdin:
        signal.alarm(ALONE_SECONDS)
        try:
            verdict: bool | None = judge(json.loads(line))
        except Exception:
            verdict = None
        signal.alarm(0)
        print(json.dumps(verdict), file=replies)


def symbolic_judge() -> Callable[[dict[str, Any]], bool]:
    import sympy

    constants = {"pi": sympy.pi, "e": sympy.E, "i": sympy.I}
    functions = {"log": lambda x: sympy.log(x, 10), "arcsin": sympy.asin, "arccos": sympy.acos, "arctan": sympy.atan}
    functions |= {"!": sympy.factorial, "binom": sympy.binomial, "abs": sympy.Abs}
    functions |= {"+": sympy.Add, "*": sympy.Mul, "^": sympy.Pow}

    def built(tree: Tree) -> Any:
        if isinstance(tree, Fraction):
            return sympy.Rational(tree.numerator, tree.denominator)
        if isinstance(tree, str):
            return constants.get(tree) or sympy.Symbol(tree)
        name, *operands = tree
        return (functions.get(name) or getattr(sympy, name))(*map(built, operands))

    def judge(question: dict[str, Any]) -> bool:
        answer, gold = built(from_json(question["answer"])), built(from_json(question["gold"]))
        if question["up_to_a_factor"]:
            if answer == 0 or gold == 0:
                return answer == gold
            return not sympy.simplify(answer / gold).free_symbols
        return sympy.simplify(answer - gold) == 0

    return judge


def verify_judge() -> Callable[[dict[str, Any]], bool]:
    import math_verify  # pyright: ignore[reportMissingImports]
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, StringExtractionConfig  # pyright: ignore[reportMissingImports]

    def judge(question: dict[str, Any]) -> bool:
        gold = question["gold"]
        kinds = [LatexExtractionConfig(), ExprExtractionConfig()]
        if gold in tuple("ABCDE"):
            kinds.insert(0, StringExtractionConfig(strings=tuple("ABCDE")))
        else:
            gold = f"${gold}$"
        # Without its own time-outs, which are signals: this process is killed from outside.
        expected = math_verify.parse(gold, kinds, parsing_timeout=0)
        found = math_verify.parse(question["generated"], kinds, parsing_timeout=0)
        return math_verify.verify(expected, found, timeout_seconds=0)

    return judge


if __name__ == "__main__":
    main(sys.argv[1])
