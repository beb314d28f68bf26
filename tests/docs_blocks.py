"""The code of the documents: every block of every page and notebook, and whether it is to be run."""

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))

# In the line before a block that a CPU without the hub cannot run; it says what the block needs.
MARK = r"<!-- not run here: needs [^\n]+ -->\n"
BLOCK = re.compile(rf"^(?P<mark>{MARK})?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    line: int
    runs: bool  # not marked


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of a page, in its order; of a notebook its cells, which `make docs` runs."""
    if page.suffix == ".ipynb":
        for number, cell in enumerate(json.loads(page.read_text(encoding="utf-8"))["cells"], 1):
            text = "".join(cell["source"])
            if cell["cell_type"] == "code":
                shell = text.startswith("%%bash\n")
                yield Block("bash" if shell else "python", text.removeprefix("%%bash\n"), number, runs=True)
        return
    content = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(content):
        line = content.count("\n", 0, found.start("text"))
        yield Block(found["language"], found["text"], line, runs=found["mark"] is None)


def commands(shell: str) -> Iterator[list[str]]:
    """The words of each command, without comments and settings of variables."""
    for line in shell.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words.pop(0)
        command: list[str] = []
        for word in [*words, "&&"]:
            if word != "&&":
                command.append(word)
            elif command:
                yield command
                command = []
