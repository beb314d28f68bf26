"""Numbers as answers spell them, read exactly: integers, decimals, fractions, scale words and number bases.

Text only, in linear time: what is longer than MAX_CHARS, or has larger exponents, is left to the confined grader, as is
whatever needs algebra.
"""

import re
from fractions import Fraction
from typing import NamedTuple

__all__ = ["Numeral", "mixed_numbers", "numeral", "repeating_decimals", "rounds_to", "same_in_bases", "same_value"]

MAX_CHARS = 200
TRUSTED_PLACES = 6  # a decimal of as many places, and as many digits, also stands for what is rounded or cut to it


class Numeral(NamedTuple):
    """An exact value, and how many decimal places it was written with, zeros at the end left out."""

    value: Fraction
    places: int = 0


# Without the sign. A space, real or of LaTeX, separates groups of three digits as a comma does.
_SPACE = r"(?:\\[,;:! ]|[~\s])"
_GROUPED = rf"\d{{1,3}}(?:(?:,|\{{,\}}|{_SPACE}+)\d{{3}})+"
_DECIMAL = re.compile(rf"({_GROUPED}|\d+)?(?:\.(\d*))?")
_SCIENTIFIC = re.compile(
    r"([\d.]+)(?:[eE]|\s*(?:\\times|\\cdot|\*|×)\s*10\s*(?:\^|\*\*)\s*)(?:\{\s*([-+]?\d{1,3})\s*\}|([-+]?\d{1,3}))"
)
_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{\s*(-?\d+)\s*\}\s*\{\s*(-?\d+)\s*\}|(\d)\s*(\d))|(\d+)\s*/\s*(-?\d+)")
# A whole number and a fraction behind it: one number, and neither a product nor more digits.
_MIXED = re.compile(
    rf"(?<![\w.,^/\\}}])(\d+)(?:{_SPACE}*\\[dtc]?frac\s*(?:\{{\s*(\d+)\s*\}}\s*\{{\s*(\d+)\s*\}}|(\d)\s*(\d))"
    rf"|{_SPACE}+(\d+)\s*/\s*(\d+)(?![\d/]))"
)
_REPEATING = re.compile(
    r"(?<![\d.])(\d*)\.(?:(\d*)\\(?:overline|bar|dot)\s*(?:\{\s*(\d+)\s*\}|(\d))(?!\d*\\dot)"
    r"|(\d*)\\dot\s*\{?(\d)\}?(\d*)\\dot\s*\{?(\d)\}?"
    r"|(\d*?)(\d)\10\10+(?:\\[lc]?dots|\.\.\.|…))"
)
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALED = re.compile(rf"(.+?)(?:\\[ ,]|[\s~])*({'|'.join(_SCALES)}|dozen)s?", re.IGNORECASE)
_COUNTS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
_COUNTS += " seventeen eighteen nineteen twenty"
_TENS = "thirty forty fifty sixty seventy eighty ninety hundred"
_WORDS = {word: count for count, word in enumerate(_COUNTS.split())}
_WORDS |= {word: 10 * ten for ten, word in enumerate(_TENS.split(), 3)}


def numeral(text: str) -> Numeral | None:
    """The number that `text` is, nothing else around it; None for anything but a plain number."""
    text = text.strip()
    if not 0 < len(text) <= MAX_CHARS:
        return None
    if text.lower() in _WORDS:
        return Numeral(Fraction(_WORDS[text.lower()]))
    if scaled := _SCALED.fullmatch(text):
        return _times(numeral(scaled[1]), 12 if scaled[2].lower() == "dozen" else 10 ** _SCALES[scaled[2].lower()])
    sign = -1 if text[0] in "-−" else 1
    return _times(_unsigned(text[1:].lstrip() if text[0] in "-−+" else text), sign)


def _times(number: Numeral | None, factor: int) -> Numeral | None:
    if number is None or abs(factor) == 1:
        return number and Numeral(number.value * factor, number.places)
    return Numeral(number.value * factor)


def _unsigned(text: str) -> Numeral | None:
    if (plain := _DECIMAL.fullmatch(text)) and (plain[1] or plain[2]):
        whole, decimals = re.sub(r"\D", "", plain[1] or ""), (plain[2] or "").rstrip("0")
        return Numeral(Fraction(int(whole + decimals), 10 ** len(decimals)), len(decimals))
    if fraction := _FRACTION.fullmatch(text):
        top, bottom = (int(part) for part in fraction.groups() if part is not None)
        return Numeral(Fraction(top, bottom)) if bottom else None
    if mixed := _MIXED.fullmatch(text):
        value = _mixed(mixed)
        return None if value is None else Numeral(value)
    if scientific := _SCIENTIFIC.fullmatch(text):
        number = _unsigned(scientific[1])
        return number and Numeral(number.value * Fraction(10) ** int(scientific[2] or scientific[3]))
    if repeating := _REPEATING.fullmatch(text):
        return Numeral(_repeated(repeating))
    return None


def _mixed(match: re.Match[str]) -> Fraction | None:
    """None without a value, and where what stands before / is the end of a whole number in groups (10 500/3)."""
    whole, top, bottom = (int(part) for part in match.groups() if part is not None)
    if not bottom or (match[6] and len(match[6]) == 3 and top >= bottom):
        return None
    return whole + Fraction(top, bottom)


def mixed_numbers(text: str) -> str:
    """`text` with every mixed number (`1 1/2`, `1\\frac{1}{2}`) as one fraction."""

    def fraction(match: re.Match[str]) -> str:
        value = _mixed(match)
        return match[0] if value is None else f"\\frac{{{value.numerator}}}{{{value.denominator}}}"

    return _MIXED.sub(fraction, text) if len(text) <= MAX_CHARS else text


def _repeated(match: re.Match[str]) -> Fraction:
    whole, before, block, digit, *rest = match.groups()
    if block or digit:
        start, period = before, block or digit
    elif rest[1]:  # dots on the first and the last digit of the block
        start, period = rest[0], rest[1] + rest[2] + rest[3]
    else:
        start, period = rest[4], rest[5]
    head, nines = int(whole + start or "0"), 10 ** len(period) - 1
    return (head + Fraction(int(period), nines)) / 10 ** len(start)


def repeating_decimals(text: str) -> str:
    """`text` with every repeating decimal (`0.1\\overline{6}`, `0.\\dot{3}`, `0.333...`) as a fraction."""

    def fraction(match: re.Match[str]) -> str:
        value = _repeated(match)
        return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"

    return _REPEATING.sub(fraction, text) if len(text) <= MAX_CHARS else text


def same_value(one: Numeral, other: Numeral) -> bool:
    """Whether two numbers are equal, exactly but for a long decimal and the value that it is rounded or cut from."""
    return one.value == other.value or rounds_to(one.value, other) or rounds_to(other.value, one)


def rounds_to(value: Fraction, decimal: Numeral) -> bool:
    """Whether `decimal` has TRUSTED_PLACES or more, and is `value` rounded to its places or cut there."""
    digits = abs(decimal.value) * 10**decimal.places
    if decimal.places < TRUSTED_PLACES or digits < 10 ** (TRUSTED_PLACES - 1) or value * decimal.value <= 0:
        return False
    shown = abs(value) * 10**decimal.places
    return digits in (int(shown), int(shown + Fraction(1, 2)))


# ---- number bases ----

_BASE_WORDS = {"two": 2, "three": 3, "eight": 8, "ten": 10, "twelve": 12, "sixteen": 16}
_BASED = re.compile(
    r"\(?([0-9][0-9A-Za-z]*)\)?\s*(?:_\s*\{?\s*(?:base\s*)?|,?\s*(?:in\s+)?base[-\s]*)(\d{1,2}|[a-z]{3,7})\s*\}?", re.I
)
_TEXT = re.compile(r"\\(?:text|math)[a-z]*\s*\{([^{}]*)\}|\\[ ,;:!]|~")


def same_in_bases(gold: str, answer: str) -> bool | None:
    """Whether two integers are equal of which at least one names its base (`12_3`); None where none does.

    An answer may leave the base of the reference out, and then has to have its digits; a reference without one is
    decimal.
    """
    one, other = _based(gold), _based(answer)
    if one is None and other is None:
        return None
    if one and other:
        return int(*one) == int(*other)
    based, plain = (one or other), re.sub(r"[\s,{}]|\\[,;:! ]", "", _without_text(answer if one else gold))
    assert based is not None
    if not re.fullmatch(rf"\w{{1,{MAX_CHARS}}}", plain):
        return None
    if based[1] == 10:
        return plain.isdecimal() and int(plain) == int(*based)
    return one is not None and plain.casefold().lstrip("0") == based[0].casefold().lstrip("0")


def _without_text(text: str) -> str:
    text = _TEXT.sub(lambda found: found[1] or " ", text).strip()
    return re.sub(r"(?<=\d)\s+(?=\d)", "", text)


def _based(text: str) -> tuple[str, int] | None:
    """Digits and base of an integer that names its base, if it is one in that base."""
    if len(text) > MAX_CHARS or not (match := _BASED.fullmatch(_without_text(text))):
        return None
    digits, name = match.groups()
    base = int(name) if name.isdecimal() else _BASE_WORDS.get(name.lower(), 0)
    if not 2 <= base <= 36:
        return None
    try:
        int(digits, base)
    except ValueError:
        return None
    return digits, base
