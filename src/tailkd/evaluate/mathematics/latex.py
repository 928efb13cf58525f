"""What an answer is worth: LaTeX or plain formulas read into a small tree, and its value. Nothing is executed."""

from __future__ import annotations

import cmath
import math
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

Tree = Fraction | str | tuple[Any, ...]
"""A number, a symbol's name, or (operation, operand, ...) with operations + * ^ ! abs and those of `FUNCTIONS`."""

FUNCTIONS: dict[str, Callable[[complex], complex]] = {
    "sin": cmath.sin,
    "cos": cmath.cos,
    "tan": cmath.tan,
    "cot": lambda x: 1 / cmath.tan(x),
    "sec": lambda x: 1 / cmath.cos(x),
    "csc": lambda x: 1 / cmath.sin(x),
    "arcsin": cmath.asin,
    "arccos": cmath.acos,
    "arctan": cmath.atan,
    "ln": cmath.log,
    "log": cmath.log10,
    "exp": cmath.exp,
}
CONSTANTS: dict[str, complex] = {"pi": math.pi, "e": math.e, "i": 1j}
_GREEK = "alpha|beta|gamma|delta|epsilon|theta|lambda|mu|nu|rho|sigma|tau|phi|varphi|omega"
_WORDS = "|".join(["sqrt", "pi", "infty", *sorted(FUNCTIONS, key=len, reverse=True)])
_TOKEN = re.compile(rf"\\[a-zA-Z]+|{_WORDS}|\d+(?:\.\d+)?|\.\d+|[a-zA-Z]|[-+*/^_!(){{}}\[\]|]|\s+|(?P<odd>.)")
_TIMES = {"*", "\\cdot", "\\times", "/", "\\div"}
_CLOSES = {"(": ")", "[": "]", "{": "}"}
MAX_NESTING = 60


class Unreadable(ValueError):
    """This text is no formula that `read` knows."""


def read(text: str) -> Tree:
    r"""The formula in `text`: sums, products (implicit too), quotients, powers, roots, factorials, binomials, |x|.

    ``read(r"\frac{x}{2}")`` is ``("*", "x", ("^", Fraction(2), Fraction(-1)))``; ``1\frac{4}{5}`` is 1 + 4/5; a number
    with an index (``52_8``) is a symbol. Raises Unreadable for anything else: words, relations, lists, open brackets.
    """
    reader = _Reader(text)
    tree = reader.sum()
    if reader.next is not None:
        raise Unreadable(text)
    return tree


def number(text: str) -> complex | None:
    """The value of a formula without unknowns, or None: for what cannot be read, and for what is not finite."""
    try:
        value = evaluate(read(text), CONSTANTS)
    except (Unreadable, KeyError, ValueError, OverflowError, ZeroDivisionError):
        return None
    return value if cmath.isfinite(value) else None


def evaluate(tree: Tree, symbols: Mapping[str, complex]) -> complex:
    """The tree's value in double precision. Raises KeyError for a symbol without value, OverflowError and the like."""
    if isinstance(tree, Fraction):
        return complex(tree)
    if isinstance(tree, str):
        return symbols[tree]
    operation, *operands = tree
    values = [evaluate(operand, symbols) for operand in operands]
    if operation == "+":
        return sum(values)
    if operation == "*":
        return math.prod(values)
    if operation == "^":
        return values[0] ** values[1]
    if operation == "!":
        return complex(math.factorial(_small(values[0])))
    if operation == "binom":
        return complex(math.comb(_small(values[0]), _small(values[1])))
    return complex(abs(values[0])) if operation == "abs" else FUNCTIONS[operation](values[0])


def _small(value: complex) -> int:
    if value.imag or value.real != int(value.real) or not 0 <= value.real <= 170:
        raise ValueError(value)
    return int(value.real)


def _inverse(tree: Tree) -> Tree:
    return ("^", tree, Fraction(-1))


class _Reader:
    """Recursive descent over the tokens; every method reads what it is named after and stands behind it."""

    def __init__(self, text: str) -> None:
        tokens = [m for m in _TOKEN.finditer(text) if not m[0].isspace()]
        if any(m["odd"] for m in tokens):
            raise Unreadable(text)
        self.text, self.tokens, self.place, self.depth, self.bars = text, [m[0] for m in tokens], 0, 0, 0

    @property
    def next(self) -> str | None:
        return self.tokens[self.place] if self.place < len(self.tokens) else None

    def take(self, expected: str | None = None) -> str:
        token = self.next
        if token is None or expected not in (None, token):
            raise Unreadable(self.text)
        self.place += 1
        return token

    def sum(self) -> Tree:
        terms = [self.signed(self.product)]
        while self.next in ("+", "-"):
            terms.append(self.signed(self.product))
        return terms[0] if len(terms) == 1 else ("+", *terms)

    def signed(self, read: Callable[[], Tree]) -> Tree:
        sign = 1
        while self.next in ("+", "-"):
            sign *= -1 if self.take() == "-" else 1
        tree = read()
        if sign > 0:
            return tree
        return -tree if isinstance(tree, Fraction) else ("*", Fraction(-1), tree)

    def product(self) -> Tree:
        factors = [self.power()]
        while True:
            if self.next in _TIMES:
                divide = self.take() in ("/", "\\div")
                factor = self.signed(self.power)
                factors.append(_inverse(factor) if divide else factor)
            elif self.starts_a_factor():
                factors.append(self.power())
            else:
                return factors[0] if len(factors) == 1 else ("*", *factors)

    def starts_a_factor(self) -> bool:
        token = self.next
        if token == "|":
            return self.bars == 0
        return token is not None and (token[0].isalnum() or token in _CLOSES or token[0] == "\\")

    def power(self) -> Tree:
        base = self.atom()
        if self.next == "!":
            self.take()
            base = ("!", base)
        if self.next != "^":
            return base
        self.take()
        return ("^", base, self.signed(self.argument))

    def argument(self) -> Tree:
        """What follows \\frac, \\sqrt, ^ or _: a group in braces, or a single token, of a number its first digit."""
        token = self.next or ""
        if len(token) > 1 and token.isdigit() and self.tokens[self.place - 1] != "^":
            self.tokens[self.place] = token[1:]
            return Fraction(token[0])
        return self.power() if token.startswith("\\") else self.atom()

    def group(self) -> Tree:
        close = _CLOSES[self.take()]
        bars, self.bars = self.bars, 0
        tree = self.sum()
        self.take(close)
        self.bars = bars
        return tree

    def atom(self) -> Tree:
        self.depth += 1
        if self.depth > MAX_NESTING:
            raise Unreadable(self.text)
        tree = self.group() if self.next in _CLOSES else self.single()
        self.depth -= 1
        return tree

    def single(self) -> Tree:
        token = self.next or ""
        self.take()
        if token == "|":
            self.bars += 1
            tree = self.sum()
            self.bars -= 1
            self.take("|")
            return ("abs", tree)
        if token[0].isdigit() or token[0] == ".":
            return self.numeral(token)
        if len(token) == 1 and token.isalpha():
            return self.indexed(token)
        return self.command(token.removeprefix("\\"))

    def numeral(self, token: str) -> Tree:
        if self.next == "_":
            return self.indexed(token)
        whole = Fraction(token)
        if self.next == "\\frac" and whole.denominator == 1:
            fraction = self.atom()
            over = isinstance(fraction, tuple) and all(isinstance(f, Fraction) for f in (fraction[1], fraction[2][1]))
            return ("+" if over else "*", whole, fraction)
        return whole

    def indexed(self, name: str) -> Tree:
        if self.next != "_":
            return name
        self.take()
        start = self.place
        self.argument()
        return name + "_" + "".join(self.tokens[start : self.place]).strip("{}")

    def command(self, name: str) -> Tree:
        if name == "frac":
            return ("*", self.argument(), _inverse(self.argument()))
        if name == "binom":
            return ("binom", self.argument(), self.argument())
        if name == "sqrt":
            root = self.group() if self.next == "[" else Fraction(2)
            return ("^", self.argument(), _inverse(root))
        if name in FUNCTIONS:
            return self.function(name)
        if name == "pi" or re.fullmatch(_GREEK, name):
            return self.indexed(name)
        raise Unreadable(self.text)

    def function(self, name: str) -> Tree:
        base = exponent = None
        if self.next == "_" and name == "log":
            self.take()
            base = self.argument()
        if self.next == "^":
            self.take()
            exponent = self.signed(self.argument)
        operand = self.group() if self.next in _CLOSES else self.signed(self.operand)
        tree = (name, operand) if base is None else ("*", ("ln", operand), _inverse(("ln", base)))
        return tree if exponent is None else ("^", tree, exponent)

    def operand(self) -> Tree:
        """Of a function without brackets: `2x` in `\\sin 2x`, up to the next function, sign or product sign."""
        factors = [self.power()]
        while self.starts_a_factor() and (self.next or "").removeprefix("\\") not in FUNCTIONS:
            factors.append(self.power())
        return factors[0] if len(factors) == 1 else ("*", *factors)


# ----- the tree on its way to another process


def to_json(tree: Tree) -> Any:
    """Lists, strings and, for numbers, `{"number": "14/3"}`: what `from_json` reads back."""
    if isinstance(tree, Fraction):
        return {"number": str(tree)}
    return tree if isinstance(tree, str) else [tree[0], *map(to_json, tree[1:])]


def from_json(value: Any) -> Tree:
    if isinstance(value, dict):
        return Fraction(value["number"])
    return value if isinstance(value, str) else (value[0], *map(from_json, value[1:]))
