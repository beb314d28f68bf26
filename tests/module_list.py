"""The list of modules in docs/architecture.md, from the first lines of their docstrings: `make docs-modules`."""

import ast
import textwrap
from collections.abc import Iterator
from pathlib import Path

from test_layers import LAYERS, PACKAGE

PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"
BEGIN, END = "<!-- modules: written by make docs-modules -->\n", "<!-- end of modules -->"
COLUMN, WIDTH = 22, 120


def first_line(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def entries(path: Path, depth: int = 0) -> Iterator[tuple[str, str]]:
    """(indented name, first line) of a module, or of a package and everything in it."""
    if path.is_file():
        yield "  " * depth + path.name, first_line(path)
        return
    yield "  " * depth + f"{path.name}/", first_line(path / "__init__.py")
    for inner in sorted(path.iterdir()):
        if (inner.suffix == ".py" and inner.name != "__init__.py") or (inner / "__init__.py").is_file():
            yield from entries(inner, depth + 1)


def module_list() -> str:
    rows = [("src/trb/", first_line(PACKAGE / "__init__.py"))]
    for room in (*LAYERS, "__main__"):
        path = PACKAGE / room
        rows.extend(entries(path if path.is_dir() else path.with_suffix(".py"), depth=1))
    wrapper = textwrap.TextWrapper(WIDTH, subsequent_indent=" " * (COLUMN + 1), break_on_hyphens=False)
    lines = [wrapper.fill(f"{name:{COLUMN}} {text}".replace("`", "")) for name, text in rows]
    return "\n".join(["```", *lines, "```", ""])


def with_list(page: str) -> str:
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + module_list() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(with_list(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
