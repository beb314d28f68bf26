"""Are two answers the same? math-verify's comparison, made exact, and the notation that it does not read.

Runs inside the confined worker of `trb.tasks.grading`, which bounds its time and memory: what is compared here may be a
power tower. `plain_verdict` alone is for the caller too: text only, in linear time.
"""

import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache, partial
from itertools import product
from typing import Any
from unicodedata import numeric

from trb.tasks.numerals import (
    Numeral,
    mixed_numbers,
    numeral,
    repeating_decimals,
    rounds_to,
    same_in_bases,
    same_value,
)

__all__ = ["compare_exactly", "math_equal", "plain_verdict", "unwrapped"]

# ---- what needs no algebra ----

_TEXT_COMMAND = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it)|mbox|underline)\s*\{([^{}]*)\}")
_BLANK = re.compile(r"\\[ ,;:!]|[\s~$]+")
_BETWEEN_NUMBERS = re.compile(
    r"(?<=\d)(?:\\[ ,;:!]|[\s~$])+(?=\d)(?!\d{3}(?![\d/]))"
)  # and not between groups of digits
_WORDS = re.compile(r"[A-Za-z]{2}[A-Za-z .'-]*|[A-Ja-j]")  # of a single letter, a choice has no case and a variable has


def unwrapped(text: str) -> str:
    """`text` without the commands that set words upright, bold or underlined."""
    return _TEXT_COMMAND.sub(r"\1", text).strip()


def plain_verdict(gold: str, answer: str) -> bool | None:
    """The verdict on two numbers or on two answers spelt alike; None where mathematics is needed."""
    if _spelling(gold) == _spelling(answer) != "":
        return True
    one = numeral(unwrapped(gold))
    other = numeral(unwrapped(answer)) if one else None
    if one and other:
        return same_value(one, other)
    return same_in_bases(gold, answer)


def _spelling(text: str) -> str:
    text = unwrapped(text).rstrip(".")
    text = text.casefold() if _WORDS.fullmatch(text) else text
    return " ".join(_BLANK.sub("", part) for part in _BETWEEN_NUMBERS.split(text))


@lru_cache(maxsize=4096)  # n samples of one problem repeat the same few answers
def math_equal(gold: str, answer: str) -> bool:
    """Whether two answers are equal in one of the readings of common notation."""
    one, other = _choice(gold), _choice(answer)
    if one[0] and other[0] and not (one[1] and other[1]):
        return one[0] == other[0]
    if one[0] != other[0] and one[1] and other[1]:
        return False  # the same value under another letter contradicts itself
    gold, answer = one[1] or gold, other[1] or answer
    if _units_differ(gold, answer) or _contradicts_itself(answer) or (_denies(answer) and not _denies(gold)):
        return False
    return any(_same(_tidy(one), _tidy(other)) for one, other in product(_counted(gold), _counted(answer)))


def _same(gold: str, answer: str) -> bool:
    verdict = plain_verdict(gold, answer)
    if verdict is not None:
        return verdict
    if _incomparable(gold, answer):
        return False
    gold, answer = _as_point(gold, answer), _as_point(answer, gold)
    return any(_verify(_parse(one), _parse(other)) for one, other in product(_readings(gold), _readings(answer)))


# ---- readings ----

_CHOICE = re.compile(r"(?:\(([A-J])\)|([A-J])(?:[:)]|\.(?=\s)))[:.]?(?:\\ |\s)*(\S.*)", re.DOTALL)
_LETTER = re.compile(r"\(?([A-J])\)?[.:]?|\(([a-j])\)")
_CURRENCY = re.compile(
    r"(?:US|C|A)\\?\$(?=\s*\d)|\\?\$|[€£¥₹₩₽]|\b(?:USD|EUR|GBP|INR|CAD|AUD)\b|\bRs\b\.?|\\(?:euro|pounds)\b"
)
_AMOUNT = r"[-+]?\d[\d,]*(?:\.\d+)?|[-+]?\.\d+"
_SCALE = "dozen|hundred|thousand|million|billion|trillion"
_COUNTED = re.compile(rf"((?:{_AMOUNT}|-?(?:\d+\s+)?\d+/\d+)(?:\s+(?:{_SCALE})(?=\s))?)\s+([A-Za-z]{{3,}})[A-Za-z /]*")
_OPERATIONS = "and mod sin cos tan log exp sqrt choose over times plus minus divided squared cubed factorial"
_COMPARISONS = "percent more less fewer out base"
_MONTHS = "january february march april may june july august september october november december"
_NOT_UNITS = set(f"{_OPERATIONS} {_COMPARISONS} {_MONTHS} {_SCALE.replace('|', ' ')}".split())


def _choice(text: str) -> tuple[str, str]:
    """Letter and text of an answer to a multiple-choice question, "" for what it has not."""
    text = unwrapped(text)
    if letter := _LETTER.fullmatch(text):
        return (letter[1] or letter[2]).upper(), ""
    choice = _CHOICE.fullmatch(text)
    return (choice[1] or choice[2], choice[3]) if choice else ("", "")


_DENIAL = re.compile(r"\\text[a-z]*\s*\{[^{}]*\b(?:not|wrong|incorrect|false)\b[^{}]*\}")


def _denies(text: str) -> bool:
    """Whether words beside mathematics take it back, which math-verify reads as a unit: `8\\text{ is wrong}`."""
    return _DENIAL.search(text) is not None and re.search(r"\d", text) is not None


def _contradicts_itself(text: str) -> bool:
    """Whether two different whole numbers are said to be equal; of `7=8` math-verify reads the end alone."""
    numbers = [number.value for part in text.split("=") if (number := numeral(part))]
    return len({value for value in numbers if value.denominator == 1}) > 1


def _counted(text: str) -> Iterator[str]:
    yield text
    amount = _CURRENCY.sub(" ", unwrapped(text)).strip()
    if (counted := _COUNTED.fullmatch(amount)) and counted[2].lower() not in _NOT_UNITS:
        yield counted[1]
    elif amount != text and numeral(amount):
        yield amount


# Units that are told from each other; all others count as left out. By their names, what they are.
_UNITS = {
    name: unit
    for unit, names in {
        "mm": "mm millimeter millimetre",
        "cm": "cm centimeter centimetre",
        "m": "m meter metre",
        "km": "km kilometer kilometre",
        "in": "inch inches",
        "ft": "ft foot feet",
        "yd": "yd yard",
        "mi": "mi mile",
        "g": "g gram",
        "kg": "kg kilogram",
        "s": "s sec second",
        "min": "min minute",
        "h": "h hr hour",
        "d": "day",
        "week": "week",
        "month": "month",
        "year": "yr year",
        "dollar": "dollar usd",
        "cent": "cent",
        "l": "l liter litre",
        "ml": "ml milliliter millilitre",
        "euro": "euro eur",
        "pound": "pound gbp",
        "yen": "yen jpy",
        "rupee": "rupee inr",
    }.items()
    for name in names.split()
}
_WITH_UNIT = re.compile(r"[^A-Za-z]*(?:\\[a-z]*frac[^A-Za-z]*)?\s*([A-Za-z]+)\.?(?:\s*\^\s*\{?\d\}?)?")


# Signs and codes of currencies, beside an amount; other dollars than those of the US count as left out.
_CURRENCIES = {
    "dollar": re.compile(r"(?<![CA])\\\$|\A[^$]*(?<![CA\\])\$\s*[\d.][^$]*\Z|\bUSD\b"),  # of $5$ they are none
    "euro": re.compile(r"€|\\euro\b|\bEUR\b"),
    "pound": re.compile(r"£|\\pounds\b|\bGBP\b"),
    "yen": re.compile(r"¥|\bJPY\b"),
    "rupee": re.compile(r"₹|\bINR\b|\bRs\b"),
}


def _units_differ(gold: str, answer: str) -> bool:
    units = [_unit(gold), _unit(answer)]
    return None not in units and units[0] != units[1]


def _unit(text: str) -> str | None:
    for currency, written in _CURRENCIES.items():
        if written.search(text):
            return currency
    found = _WITH_UNIT.fullmatch(_BLANK.sub(" ", _TEXT_COMMAND.sub(r" \1", text)).strip())
    name = found[1].lower() if found else ""
    # A bare letter behind a number is a variable, unless it is set as text.
    if len(name) == 1 and "\\" not in text:
        return None
    return _UNITS.get(name) or _UNITS.get(name.removesuffix("s"))


_BRACES = re.compile(r"\\\{[^:|<>=(\[]*\\\}")  # a list of numbers: no condition, no points
_BRACKETS = re.compile(r"[(\[].*[)\]]", re.DOTALL)
_TERM = re.compile(r"[^A-Za-z\\]*\d([A-Za-z])")
_NUMBERS = re.compile(r"[-+]?\d[\d.]*(?:(?:\\[ ,;:!]|[\s~])+\d[\d.]*)+")


_DATE = re.compile(r"\d{4}-(?:0\d|1[0-2])-[0-3]\d")


def _incomparable(gold: str, answer: str) -> bool:
    """What math-verify would call equal: a finite set and an interval or a point, 3t and 3s, 2 3 and 5, a date and the
    difference that it looks like."""
    if _DATE.fullmatch(gold) or _DATE.fullmatch(answer):
        return True
    if _NUMBERS.fullmatch(gold) or _NUMBERS.fullmatch(answer):  # side by side, which it adds up
        return True
    if term := _TERM.fullmatch(gold):  # it takes a letter behind a number for a unit
        other = _TERM.fullmatch(answer)
        return other[1] != term[1] if other else not re.search("[A-Za-z]", answer)
    shapes = (gold, answer) if _BRACES.fullmatch(gold) else (answer, gold)
    return bool(_BRACES.fullmatch(shapes[0]) and _BRACKETS.fullmatch(shapes[1]))


# ---- notation ----

_VULGAR = {
    character: "\\frac{{{}}}{{{}}}".format(*Fraction(numeric(character)).limit_denominator(10).as_integer_ratio())
    for character in "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
}
_SYMBOLS = str.maketrans(_VULGAR | {"−": "-", "°": "^\\circ", "²": "^2", "³": "^3", "∞": "\\infty"})
_FUNCTIONS = r"arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|ln|log|exp|pi|(?:min|max|gcd|lcm|sec|csc)(?=\s*\()"
_REWRITES = [
    (re.compile(r"\A\*\*(.*)\*\*\Z", re.DOTALL), r"\1"),  # Markdown bold
    (re.compile(r"\A(?:=|\\approx\b|:)\s*"), ""),
    (re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])"), ""),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"√\s*(\d+|[a-zA-Z]|\([^()]*\))"), r"\\sqrt{\1}"),
    (re.compile(r"\^?\\degrees?\b"), r"^\\circ"),
    (re.compile(r"\\varnothing\b|\A\\\{\s*\\\}\Z"), r"\\emptyset"),
    (re.compile(r"\\underline\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\A\\text\s*\{([^{}]*\d[^{}]*)\}\Z"), r"\1"),
    (re.compile(r"\\langle(?![a-zA-Z])"), "("),
    (re.compile(r"\\rangle(?![a-zA-Z])"), ")"),
    (re.compile(r"\A\\\{\s*(\([^()\[\]{}]*\))\s*\\\}\Z"), r"\1"),  # the set of one point
    (re.compile(r"\A\\\{\s*[a-z]\s*(?:\\in\s*\\mathbb\{?R\}?\s*)?(?::|\||\\mid)(.*)\\\}\Z"), r"\1"),
    (re.compile(rf"(?<![\\a-zA-Z])({_FUNCTIONS})(?![a-zA-Z])"), r"\\\1"),  # pi/2, exp(16)
    (re.compile(r"(\\(?:sin|cos|tan|cot))\s*[({]?\s*(\d+)\s*\^\s*\{?\s*\\circ\s*\}?[)}]?"), r"\1(\\frac{\2\\pi}{180})"),
    (re.compile(r"(?<![\\a-zA-Z])(?:oo|infinity)(?![a-zA-Z])"), r"\\infty"),
    (re.compile(r"(?<=\d)(?:\{,\}|(?:\\[,;:! ]|[~\s])+)(?=\d{3}(?:\D|\Z))"), ""),  # 1{,}000, 1\,000 and 1 000
    (re.compile(r"(?:\\\\|[.,;\s])+\Z"), ""),
]


@lru_cache(maxsize=1024)
def _tidy(text: str) -> str:
    """`text` in the notation math-verify reads: general rewrites, none that looks at the other answer."""
    text = _CURRENCY.sub("", text).strip().strip("$").translate(_SYMBOLS).strip()
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    if text.count("\\pm") == 1 and "\\mp" not in text and not text.startswith(("(", "[", "\\{")):
        text = ", ".join(text.replace("\\pm", sign) for sign in "+-")  # also inside of a fraction
    text = _braced(_braced(repeating_decimals(mixed_numbers(text)), "sqrt(", r"\sqrt{"), "^(", "^{")
    words = unwrapped(text)
    number = numeral(words) if re.search("[A-Za-z]", words) and "\\" not in words else None
    return str(number.value) if number else _upwards(text)  # "5 million", "three", "1e3"


_GREATER = re.compile(r"\s*(>=|>|≥|\\g(?:eq?(?:slant)?|t)(?![a-zA-Z]))\s*")


def _upwards(text: str) -> str:
    """`3 > x > -2` as `-2 < x < 3`: chains are compared side by side, in the order in which they are written."""
    parts = _GREATER.split(text)
    if len(parts) != 5 or re.search(r"<|≤|\\l(?:e|t)", text):
        return text
    upper, first, middle, second, lower = parts
    less, least = ("<" if sign in (">", "\\gt") else "\\le " for sign in (first, second))
    return f"{lower} {least} {middle} {less} {upper}"


def _braced(text: str, call: str, opening: str) -> str:
    """`text` with the parentheses behind every `call`, plain notation, as the braces that LaTeX has there."""
    start = text.find(call)
    while start >= 0:
        begin = end = start + len(call)
        depth = 1
        while end < len(text) and depth:
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        if depth:
            break
        before = text[:start].removesuffix("\\")
        text = f"{before}{opening}{text[begin : end - 1]}}}{text[end:]}"
        start = text.find(call, start)
    return text


_VECTOR = re.compile(r"\\begin\{[pb]?matrix\}([^&]*)\\end\{[pb]?matrix\}", re.DOTALL)


def _as_point(text: str, other: str) -> str:
    """A column vector as a point, where the other answer is one."""
    vector = _VECTOR.fullmatch(text) if other.startswith("(") else None
    return "(" + vector[1].replace("\\\\", ",") + ")" if vector else text


# What may hold a list, and a number in groups of three digits.
_LIST_OR_GROUPS = re.compile(
    r"(?P<opens>[(\[]|\\\{|\\begin(?![a-zA-Z]))|(?P<closes>[)\]]|\\\}|\\end(?![a-zA-Z]))"
    r"|(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)"
)


def _readings(text: str) -> list[str]:
    """`text`, and its readings with groups of digits as one number, and as code writes the natural logarithm."""
    readings = dict.fromkeys([text, _without_separators(text)])
    return [*readings, *(other.replace("\\log(", "\\ln(") for other in readings if "\\log(" in other)]


def _without_separators(text: str) -> str:
    """`text` with `1,000` as 1000, but for points, sets and arguments, where a comma stands between two numbers."""
    depth = 0

    def joined(match: re.Match[str]) -> str:
        nonlocal depth
        depth += (match["opens"] is not None) - (match["closes"] is not None)
        return match[0] if depth or match["closes"] else match[0].replace(",", "")

    return _LIST_OR_GROUPS.sub(joined, text)


# ---- mathematics ----


_PERCENT = re.compile(r"(.*(?:/|frac).*?)\s*\\?%", re.DOTALL)  # of a fraction: decimals math-verify reads itself


@lru_cache(maxsize=1024)
def _parse(text: str) -> list[Any]:
    """What math-verify makes of `text`: an expression, where it can, and the text as it was normalized."""
    from math_verify import LatexExtractionConfig, parse

    if (percent := _PERCENT.fullmatch(text)) and (number := numeral(percent[1])):
        return [_hundredths(number.value), text]
    # The limit on time is the caller's, so math-verify's own, which are signals, stay off.
    boxed = [LatexExtractionConfig(try_extract_without_anchor=False)]
    found = parse(f"\\boxed{{{text}}}", extraction_config=boxed, parsing_timeout=None)
    return [_imaginary(value) for value in found]


def _hundredths(value: Fraction) -> Any:
    """So many percent, in math-verify's own form: one that it can read back, and count as 10% counts as 10."""
    from sympy import Mul, Rational, UnevaluatedExpr

    return Mul(Rational(value), UnevaluatedExpr(Rational(1, 100)), evaluate=False)


def _imaginary(value: Any) -> Any:
    """`value` with i as the imaginary unit: math-verify's parser leaves it a symbol, real or not by its neighbours."""
    from sympy import I, Symbol

    symbols = getattr(value, "free_symbols", ())
    if not any(symbol.name == "i" for symbol in symbols):
        return value
    return value.xreplace({symbol: I if symbol.name == "i" else Symbol(symbol.name, real=True) for symbol in symbols})


def _verify(gold: list[Any], answer: list[Any]) -> bool:
    from math_verify import verify

    return verify(gold, answer, allow_set_relation_comp=True, timeout_seconds=None)


def compare_exactly() -> None:
    """Replace, from now on, how math-verify compares numbers, to 15 digits at most, and that x and X are one symbol."""
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig
    from math_verify import grader, parser

    parser.latex2sympy = partial(parser.latex2sympy, conversion_config=ConversionConfig(lowercase_symbols=False))
    approximate = grader.sympy_symbolic_eq

    def symbolic_eq(one: Any, other: Any) -> bool:
        verdict = _attempt(_same_expression, one, other)
        return approximate(*map(_rational, (one, other))) if verdict is None else verdict

    grader.sympy_numeric_eq = lambda one, other, *_: bool(_attempt(_numeric_eq, one, other))
    grader.sympy_symbolic_eq = symbolic_eq


def _attempt(compare: Callable[[Any, Any], bool | None], one: Any, other: Any) -> bool | None:
    try:
        return compare(one, other)
    except Exception:  # what a model wrote can raise anything at all inside sympy
        return None


def _numeric_eq(one: Any, other: Any) -> bool:
    """math-verify's `sympy_numeric_eq`, exactly: of matrices by their entries, with percents as what they may mean."""
    from math_verify.grader import get_pct_val, safe_sympy_doit
    from sympy import MatrixBase, MatrixExpr

    if isinstance(one, MatrixBase | MatrixExpr) and isinstance(other, MatrixBase | MatrixExpr):
        one, other = safe_sympy_doit(one), safe_sympy_doit(other)
        if not (isinstance(one, MatrixBase) and isinstance(other, MatrixBase) and one.shape == other.shape):
            return False
        return all(_numeric_eq(*pair) for pair in zip(one.flat(), other.flat(), strict=True))
    counts = [get_pct_val(one), get_pct_val(other)]
    if None not in counts:
        return _numeric_eq(*counts)
    readings = [[one], [other]]
    for values, count in zip(readings, counts, strict=True):
        values += [] if count is None else [count]  # 10% is 0.1 and 10
    return any(_same_expression(*pair) for pair in product(*readings))


def _same_expression(one: Any, other: Any) -> bool | None:
    """Whether two expressions are equal; None where only simplification could tell."""
    from math_verify.grader import safe_sympy_doit
    from sympy import Expr, Float, Integral, Limit, Product, Sum, nan, oo, zoo

    if not (isinstance(one, Expr) and isinstance(other, Expr)):
        return None
    one, other = safe_sympy_doit(one), safe_sympy_doit(other)
    if one.has(oo, -oo, zoo, nan) or other.has(oo, -oo, zoo, nan):
        return bool(one == other and not one.has(zoo, nan))
    for decimal, value in ((one, other), (other, one)):
        if isinstance(decimal, Float) and _shown_as(value, Decimal(str(decimal))):
            return True
    difference = _rational(one) - _rational(other)
    if difference == 0:
        return True
    if difference.has(Integral, Limit, Product, Sum):  # whose digits are approximate
        return True if difference.evalf(PRECISION, chop=True) == 0 else None
    if difference.free_symbols and _is_zero(_at_some_point(difference)) is not False:
        return True if difference.expand() == 0 else None
    return False if difference.free_symbols else _is_zero(difference)


def _at_some_point(expression: Any) -> Any:
    """An expression with positive rationals for its symbols, by which it is seen not to vanish at once."""
    from sympy import Rational

    symbols = sorted(expression.free_symbols, key=str)
    return expression.subs({symbol: Rational(19 + 8 * index, 7) for index, symbol in enumerate(symbols)})


def _rational(value: Any) -> Any:
    """`value` with its decimals as the fractions that they were written as."""
    from sympy import Float, Rational

    decimals = value.atoms(Float) if hasattr(value, "atoms") else ()
    return value.xreplace({decimal: Rational(str(decimal)) for decimal in decimals}) if decimals else value


PRECISION = 15  # significant digits that a difference from zero must have
WORKING_PRECISION = 300  # digits within which two values that need evaluation are told apart


def _is_zero(number: Any) -> bool | None:
    """Whether an expression without symbols is zero: for rationals exactly, else to WORKING_PRECISION digits."""
    if number.is_Rational:
        return bool(number == 0)
    parts = number.evalf(PRECISION, maxn=WORKING_PRECISION).as_real_imag()
    if not all(part.is_Number for part in parts):
        return None
    # A part that sympy could not tell from zero comes without a significant digit.
    return all(part == 0 or part._prec <= 1 for part in parts)


def _shown_as(value: Any, decimal: Decimal) -> bool:
    """Whether a long `decimal` is `value` rounded or cut to its places."""
    decimal = decimal.normalize()
    places = -int(decimal.as_tuple().exponent)
    if places < 1 or value.free_symbols:
        return False
    digits = value.evalf(len(decimal.as_tuple().digits) + 10)
    if not (digits.is_Float or digits.is_Rational):
        return False
    return rounds_to(Fraction(str(digits)), Numeral(Fraction(decimal), places))
