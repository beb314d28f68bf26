"""Pages with parts that a script writes: tables, and places between HTML comments that are filled anew.

A place is `<!-- table: NAME -->`, what was written last, and `<!-- end -->`, each marker on a line of its own.
"""

import re
import textwrap
from collections.abc import Callable, Iterable, Mapping

_PLACE = re.compile(r"<!-- table: (.+?) -->\n(.*?)\n?<!-- end -->", re.S)


def table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [list(headings)]
    lines += [["---"] * len(lines[0]), *(list(row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def filled(page: str, makers: Mapping[str, Callable[[], str]]) -> str:
    """The page with what each maker writes in its place; raises ValueError where places and makers do not match."""
    places = [found[1] for found in _PLACE.finditer(page)]
    if sorted(places) != sorted(makers):
        odd = sorted(set(places) ^ set(makers)) or sorted({name for name in places if places.count(name) > 1})
        raise ValueError(f"every table needs one place, <!-- table: NAME --> to <!-- end -->: {', '.join(odd)}")
    return _PLACE.sub(lambda found: f"<!-- table: {found[1]} -->\n{makers[found[1]]()}\n<!-- end -->", page)


def by_hand(page: str) -> str:
    """What is left of a page without the places that are filled."""
    return _PLACE.sub("", page)


def paragraph(text: str, *, item: bool = False) -> str:
    """Prose in lines as wide as the pages', or an item of a list."""
    return textwrap.fill(
        text,
        width=120,
        initial_indent="- " if item else "",
        subsequent_indent="  " if item else "",
        break_long_words=False,
        break_on_hyphens=False,
    )
