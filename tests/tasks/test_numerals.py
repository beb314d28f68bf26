"""Plain numbers against exact arithmetic, spelt in every way that is read."""

import random
from fractions import Fraction

import pytest

from trb.tasks.equality import math_equal, plain_verdict
from trb.tasks.numerals import mixed_numbers, numeral, repeating_decimals, same_in_bases, same_value

DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def in_base(value: int, base: int) -> str:
    digits = ""
    while value:
        value, digit = divmod(value, base)
        digits = DIGITS[digit] + digits
    return digits or "0"


def test_random_numbers_in_every_spelling() -> None:
    rng = random.Random(3)
    for _ in range(500):
        whole, places, sign = rng.randrange(10 ** rng.randint(1, 40)), rng.randint(0, 30), rng.choice(["", "-", "−"])
        value = Fraction(whole, 10**places) * (1 if sign == "" else -1)
        digits = str(whole).rjust(places + 1, "0")
        decimal = f"{digits[: len(digits) - places]}.{digits[len(digits) - places :]}"
        bottom = rng.randint(1, 10**6)
        spellings = {
            decimal: value,
            f"{whole}e-{places}": value,
            f"{whole} \\times 10^{{-{places}}}": value,
            f"{whole:,}": value * 10**places,
            f"{whole:,}".replace(",", "{,}"): value * 10**places,
            f"\\frac{{{whole}}}{{{bottom}}}": value * 10**places / bottom,
            f"{whole}/{bottom}": value * 10**places / bottom,
            f"{whole} million": value * 10 ** (places + 6),
        }
        for text, expected in spellings.items():
            found = numeral(sign + text)
            assert found is not None and found.value == expected, sign + text


@pytest.mark.parametrize(
    "text", ["", "x", "1,00", "1,2,3", "1/0", "1..2", "1e", "--1", "1 2", "1" * 201, "1e9999", "."]
)
def test_what_is_no_plain_number(text: str) -> None:
    assert numeral(text) is None


def test_random_mixed_numbers() -> None:
    rng = random.Random(6)
    for _ in range(300):
        whole, bottom, sign = rng.randrange(1000), rng.randint(2, 99), rng.choice(["", "-", "−"])
        top, space = rng.randint(1, bottom - 1), rng.choice([" ", "~", "\\,", "\\ "])
        value = (whole + Fraction(top, bottom)) * (1 if sign == "" else -1)
        tex = [f"{whole}{rng.choice(['', space])}\\{kind}frac{{{top}}}{{{bottom}}}" for kind in ("", "d", "t")]
        for text in (f"{whole}{space}{top}/{bottom}", *tex):
            found = numeral(sign + text)
            assert found is not None and found.value == value, sign + text
            assert mixed_numbers(f"x={text}") == f"x=\\frac{{{abs(value).numerator}}}{{{value.denominator}}}"
            assert plain_verdict(f"{value.numerator}/{value.denominator}", sign + text)
            assert plain_verdict(f"{whole}{top}/{bottom}", text) is (
                Fraction(int(f"{whole}{top}"), bottom) == abs(value)
            )


@pytest.mark.parametrize(
    ("gold", "answer", "verdict"),
    [
        ("1.5", "1 1/2", True),
        ("11/2", "1 1/2", False),
        ("-2.75", "-2 3/4", True),
        ("1.5", "1 \\dfrac12", True),
        ("2.5", "1 3/2", True),
        ("3500", "10 500/3", True),  # a whole number in groups: nothing that is mixed has so large a numerator
        ("1.5", "1 1/2 cups", True),
        ("x = 1.5", "1\\frac{1}{2}", True),
        ("(1.5, 3)", "(1 1/2, 3)", True),
        ("1.5\\pi", "1\\frac{1}{2}\\pi", True),
        ("\\frac{2x}{3}", "2\\frac{x}{3}", True),
        ("2^1\\frac{1}{2}", "1", True),
        ("0", "0 0/2", True),
        ("12", "1 2", False),
        ("3", "1 2", False),
        ("1 2", "3", False),
        ("235", "2 3 5", False),
        ("2 3 5", "2\\ 3 5", True),
        ("1000", "1 000", True),
        ("12 PM", "12PM", True),
    ],
)
def test_numbers_side_by_side_are_neither_more_digits_nor_a_sum(gold: str, answer: str, verdict: bool) -> None:
    assert math_equal(gold, answer) is verdict


def test_random_repeating_decimals() -> None:
    rng = random.Random(4)
    for _ in range(300):
        whole, start = rng.randrange(100), "".join(rng.choices("0123456789", k=rng.randrange(4)))
        block = "".join(rng.choices("0123456789", k=rng.randint(1, 6)))
        value = whole + Fraction(int(start or "0"), 10 ** len(start))
        value += Fraction(int(block), (10 ** len(block) - 1) * 10 ** len(start))
        text = f"{whole}.{start}\\overline{{{block}}}"
        found = numeral(text)
        assert found is not None and found.value == value, text
        assert repeating_decimals(f"{text}x") == f"\\frac{{{value.numerator}}}{{{value.denominator}}}x"


def test_random_integers_in_two_bases() -> None:
    rng = random.Random(5)
    for _ in range(500):
        value, one, other = rng.randrange(10**9), rng.randint(2, 36), rng.randint(2, 36)
        error = rng.choice([0, 0, 1, -1, one])
        texts = f"{in_base(value, one)}_{{{one}}}", f"{in_base(max(value + error, 0), other)}_{{{other}}}"
        # Letters alone are variables with an index.
        if all(text[0].isdigit() for text in texts):
            assert same_in_bases(*texts) == (value == max(value + error, 0)), texts


def test_a_long_decimal_stands_for_what_it_is_rounded_or_cut_from() -> None:
    rng = random.Random(6)
    for _ in range(300):
        value, places = Fraction(rng.randint(10**4, 10**7), rng.choice([3, 7, 11, 13])), rng.randint(4, 12)
        if (value * 10**places).denominator == 1:
            continue
        cut = int(value * 10**places)
        for shown in (cut - 1, cut, cut + 1, cut + 2):
            text = f"{str(shown)[:-places]}.{str(shown)[-places:]}"
            decimal, exact = numeral(text), numeral(f"{value.numerator}/{value.denominator}")
            assert decimal is not None and exact is not None
            if decimal.places < places:  # zeros at the end
                continue
            rounded = cut + (value * 10**places - cut >= Fraction(1, 2))
            assert same_value(exact, decimal) == (places >= 6 and shown in (cut, rounded)), (text, value)


@pytest.mark.parametrize(
    ("gold", "answer", "verdict"),
    [
        ("-2 < x < 3", "3 > x > -2", True),
        ("3>x>-2", "-2 < x < 3", True),
        ("-2 \\le x < 3", "3 > x \\ge -2", True),
        ("-2 \\le x < 3", "3 \\geq x > -2", False),
        ("-2 < x < 3", "3 > x > -1", False),
        ("(-2, 3)", "3 > x > -2", True),
        ("x > 2", "2 < x", True),
    ],
)
def test_a_chain_of_inequalities_may_be_written_from_either_end(gold: str, answer: str, verdict: bool) -> None:
    assert math_equal(gold, answer) is verdict
