"""An answer without what does not matter: spaces, units, currency, LaTeX dress."""

from __future__ import annotations

import re

_UNITS = re.findall(
    r"\S+",
    """
    mm cm dm m km inch inches in ft foot feet yard yd mile mi light-year
    mg g gm gram kg kilogram ounce oz pound lb lbs ton tonne
    ml l lt liter litre milliliter millilitre gallon gal quart qt pint cup cc
    s sec second min minute h hr hour day week month yr year
    mph kmph kmh kph km/h m/s
    meter metre centimeter centimetre millimeter millimetre kilometer kilometre
    dollar cent penny pennies rupee rs rs. euro usd us
    degree deg radian percent percentage unit people person item
    acre hectare square-unit sq square cubic cu cube each per more less
    apple coin mark toy tile man men woman women soldier monkey way round
    """,
)
UNITS = frozenset(_UNITS) | {unit + "s" for unit in _UNITS}
_ONE_LETTER = {unit for unit in UNITS if len(unit) == 1}
_WRAPPERS = r"\\(?:text|mbox|mathrm|mathbf|textbf|mathit|textit|textrm|operatorname|mathsf|hbox)\s*"
_POWER = r"(?:\s*\^\s*(?:\{\s*\d\s*\}|\d))?"
_TRAILING_TEXT = re.compile(rf"(?<=\S)\s*{_WRAPPERS}\{{[^{{}}]*\}}{_POWER}$")
_TRAILING_WORDS = re.compile(rf"^(.*[\d}})\]!])(\s*)((?:[A-Za-z][A-Za-z./-]*)(?:\s+[A-Za-z][A-Za-z./-]*)*){_POWER}$")

_SIGNS = {
    "−": "-",
    "–": "-",
    "×": r"\times ",
    "·": r"\cdot ",
    "÷": "/",
    "π": r"\pi ",
    "√": r"\sqrt ",
    "∞": r"\infty ",
    "²": "^2",
    "³": "^3",
    "≤": r"\le ",
    "≥": r"\ge ",
    "±": r"\pm ",
    "∪": r"\cup ",
    "°": "",
}
_REWRITES: list[tuple[re.Pattern[str], str]] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"(?<!\\)\\!\s*", ""),
        (r"\b([apAP])\.\s?([mM])\b\.?", r"\1\2"),
        (r"(?<!\\)\\[,;: ]|\\q?quad\b|~", " "),
        (r"\{,\}", ","),
        (r"\\left\b|\\right\b|\\displaystyle\b|\\[bB]ig[lr]?\b", ""),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\begin\{array\}\s*\{[^{}]*\}", r"\\begin{pmatrix}"),
        (r"\\end\{array\}", r"\\end{pmatrix}"),
        (r"[bBvV]matrix", "pmatrix"),
        (r"\\leq\b", r"\\le"),
        (r"\\geq\b", r"\\ge"),
        (r"\\neq\b", r"\\ne"),
        (r"\s*\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree\b|\\circ$", ""),
        (r"\\?[$%]|[€£]", ""),
        (r"\\([{}])", r"\1"),
        (r"\\varnothing\b", r"\\emptyset"),
        (r"\\mathbb\{?R\}?", r"(-\\infty,\\infty)"),
        (r"(?<![\\a-zA-Z])(?:infinity|inf|infty)\b", r"\\infty"),
        (r"\+\s*\\infty", r"\\infty"),
    ]
]
_AND = re.compile(r"\s*,?\s*(?:\\text\{\s*(?:and|or)\s*\}|\b(?:and|or)\b)\s*")
_LEFT_SIDE = re.compile(r"(^|,)\s*[a-zA-Z]\s*(?:=|\\in\b|\\to\b)")
_SPACE = re.compile(r"(\\[a-zA-Z]+)?\s+(?=([a-zA-Z])?)")  # one stays in `\cos x`
_THOUSANDS = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")

_ONES = re.findall(
    r"\w+",
    """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen""",
)
_TENS = re.findall(r"\w+", "twenty thirty forty fifty sixty seventy eighty ninety")
_SMALL = {word: n for n, word in enumerate(_ONES)} | {word: 10 * n for n, word in enumerate(_TENS, 2)}
_LARGE = {"hundred": 100, "thousand": 1_000, "million": 1_000_000, "billion": 1_000_000_000}


def normalised(text: str) -> str:
    r"""The answer in `text` in one spelling; the same again when given that spelling.

    Gone are spaces (but the one in ``\cos x``), LaTeX spaces and sizes, currency and percent signs, degrees, units
    after a number, a ``\text{..}`` at the end, ``x=`` and ``x\in`` before an answer, thousands' commas. "and" becomes a
    comma, number words digits, doubled backslashes single ones. A unit is dropped, not compared.
    """
    text = _single_backslashes(" ".join(str(text).split()))
    for sign, plain in _SIGNS.items():
        text = text.replace(sign, plain)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _without_unit(re.sub(r"(?<!\\)[\s.]+$", "", text).strip())
    text = re.sub(_WRAPPERS + r"\{([^{}]*)\}", r"\1", _AND.sub(",", text)).strip("'\"` ")
    text = _digits(text)
    text = _LEFT_SIDE.sub(r"\1", text)
    text = _SPACE.sub(lambda m: f"{m[1]} " if m[1] and m[2] else m[1] or "", text)
    return text.replace(",", "") if _THOUSANDS.fullmatch(text) else text


def _single_backslashes(text: str) -> str:
    """Minerva's shots write LaTeX with doubled backslashes, and models follow; `\\\\` between matrix rows stays."""
    if re.search(r"(?<!\\)\\\\begin\b", text):
        return text.replace("\\\\", "\\")
    return re.sub(r"(?<!\\)\\\\(?=[a-zA-Z]{2}|[!,;{}$%])", r"\\", text)


def _without_unit(text: str) -> str:
    while (shorter := _TRAILING_TEXT.sub("", text).strip()) not in ("", text):
        text = shorter
    match = _TRAILING_WORDS.match(text)
    if match is None:
        words = text.split()
        unit = len(words) > 1 and _known(words[1:]) and all(w in _SMALL | _LARGE for w in _parts(words[0]))
        return words[0] if unit else text
    value, space, words = match[1], match[2], match[3].split()
    glued = not space and words[0].lower() in _ONE_LETTER
    return value if _known(words) and not glued else text


def _known(words: list[str]) -> bool:
    parts = [part for word in words for part in ([word] if word.lower() in UNITS else word.split("/"))]
    return all(part.lower() in UNITS or part.lower().rstrip(".") in UNITS for part in parts)


def _parts(text: str) -> list[str]:
    return re.split(r"[\s-]+", text.lower().strip())


def _digits(text: str) -> str:
    """An answer that is a number in words, in digits: `twenty-one`, `one hundred and five` (its "and" is a comma)."""
    words = [word for word in re.split(r"[\s,-]+", text.lower().strip()) if word]
    if not words or any(word not in _SMALL and word not in _LARGE for word in words) or words[0] in _LARGE:
        return text
    total = group = 0
    for word in words:
        if word in _SMALL:
            group += _SMALL[word]
        elif word == "hundred":
            group *= 100
        else:
            total, group = total + group * _LARGE[word], 0
    return str(total + group)
