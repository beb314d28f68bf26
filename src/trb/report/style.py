"""How methods and numbers look, shared by the page and the figures: names, colours, dashes, markers, formats.

Colours are Okabe and Ito's, darkened on light paper and lightened on dark so that thin lines keep their
contrast; every series also has its own dash and marker, so that no chart depends on colour. The page's
stylesheet repeats the light and dark values as custom properties; a test holds the two together.
"""

from __future__ import annotations

from typing import Literal

Format = Literal["number", "percent", "count"]

LABELS = {
    "trb": "TRB",
    "opd": "OPD",
    "fixed": "Fixed\N{NO-BREAK SPACE}ε",
    "skd": "SKD",
    "temperature": "Temperature",
    "sft": "SFT warm-up",
    "veto": "Veto",
}
COLOURS = ("#0067a5", "#c8500a", "#00805c", "#a34a8b", "#946800", "#3a8fd0", "#7a5c3e", "#5c5a55")
DASHES = ("", "7 3", "2 2.5", "9 3 2 3", "5 2 1.5 2", "12 4", "1.5 4", "6 2 2 2 2 2")
MARKERS = ("circle", "square", "triangle", "diamond", "cross", "plus", "nabla", "bar")


def label(name: str) -> str:
    """The name shown for a method; a directory name that is no known method is shown as it is."""
    return LABELS.get(name, name)


def style_indices(names: list[str]) -> dict[str, int]:
    """An index into COLOURS, DASHES and MARKERS for each name.

    A known method keeps its index in every report, so that reports can be laid side by side; other names take
    the free ones in order, and start over when all are taken.
    """
    fixed = {name: index for index, name in enumerate(LABELS) if name in names}
    free = [index for index in range(len(COLOURS)) if index not in fixed.values()]
    # Never empty: there are fewer labels than styles.
    others = [name for name in names if name not in fixed]
    return fixed | {name: free[rank % len(free)] for rank, name in enumerate(others)}


def show(value: float | None, kind: Format = "number") -> str:
    """`value` as text: four significant digits, a percentage with one decimal, or a whole count."""
    if value is None:
        return "–"
    if kind == "percent":
        return f"{100 * value:.1f}%"
    if kind == "count":
        return f"{value:,.0f}"
    if value != 0 and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{float(f'{value:.4g}'):,.10g}"
