"""How methods and numbers look, shared by the page and the figures: names, colours, dashes, markers, formats.

The first eight colours are Okabe and Ito's, darkened on light paper and lightened on dark so that thin lines keep their
contrast; every series also has its own dash and marker, so that no chart depends on colour. The page's
stylesheet repeats the light and dark values as custom properties; a test holds the two together.
"""

from __future__ import annotations

from typing import Literal

from trb.measures import decimals
from trb.safety.untrusted import printable
from trb.training.methods import METHODS

# "points" are differences of shares, in percentage points, "change" those of other numbers; "p" are p-values, "effect"
# effect sizes.
Format = Literal["number", "percent", "count", "points", "change", "p", "effect"]
MINUS = "\N{MINUS SIGN}"

COLOURS = (
    *("#0067a5", "#c8500a", "#00805c", "#a34a8b", "#946800", "#3a8fd0", "#7a5c3e", "#5c5a55"),
    *("#b01e4b", "#5b4bb3", "#00838f", "#6b7500", "#d0478f", "#2f6b2f", "#8a2be2", "#7d4a00"),
)
DASHES = (
    *("", "7 3", "2 2.5", "9 3 2 3", "5 2 1.5 2", "12 4", "1.5 4", "6 2 2 2 2 2"),
    *("4 2", "12 2 2 2 2 2", "3 4", "8 2 4 2", "14 3 1.5 3", "1.5 2 1.5 5", "10 2 4 2", "16 2"),
)
MARKERS = (
    *("circle", "square", "triangle", "diamond", "cross", "plus", "nabla", "bar"),
    *("right", "left", "hexagon", "dash", "star", "pentagon", "hourglass", "bowtie"),
)


def label(name: str) -> str:
    """The name shown for a method; a directory name that is no known method is shown as it is, on one line."""
    return METHODS[name].label if name in METHODS else visible(name)


def visible(text: str) -> str:
    """Text on one line with "?" for control characters and changes of the writing direction; no-break spaces stay."""
    return "\N{NO-BREAK SPACE}".join(printable(part, lines=False) for part in text.split("\N{NO-BREAK SPACE}"))


def style_indices(names: list[str]) -> dict[str, int]:
    """An index into COLOURS, DASHES and MARKERS for each name.

    A known method keeps its index in every report, so that reports can be laid side by side; other names take
    the free ones in order, and start over when all are taken.
    """
    fixed = {name: index for index, name in enumerate([*METHODS][: len(COLOURS) - 1]) if name in names}
    free = [index for index in range(len(COLOURS)) if index not in fixed.values()]
    # Never empty: one style is nobody's.
    others = [name for name in names if name not in fixed]
    return fixed | {name: free[rank % len(free)] for rank, name in enumerate(others)}


def show(value: float | None, kind: Format = "number") -> str:
    """`value` as text: four significant digits, a percentage or a signed number of points with one decimal, a signed
    change of three digits, a whole count, a p-value, or an effect size with two decimals."""
    if value is None:
        return "–"
    if kind == "percent":
        return f"{decimals(100 * value, 1)}%".replace("-", MINUS)
    if kind == "points":
        return decimals(100 * value, 1, "+").replace("-", MINUS)
    if kind == "change":
        return "0" if value == 0 else f"{'+' if value > 0 else MINUS}{show(float(f'{abs(value):.3g}'))}"
    if kind == "p":
        return "< 0.001" if value < 0.001 else f"{value:.3f}"
    if kind == "effect":
        return decimals(value, 2).replace("-", MINUS)
    if kind == "count":
        return decimals(value, 0)
    if value != 0 and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{float(f'{value:.4g}'):z,.10g}"


def show_range(interval: tuple[float, float] | None, kind: Format = "number") -> str:
    """An interval as text, without signs of percent: "44.1 to 46.9"; empty for None."""
    if interval is None:
        return ""
    return " to ".join(show(end, kind).removesuffix("%") for end in interval)
