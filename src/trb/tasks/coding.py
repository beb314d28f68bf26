"""Problems whose answer is a program: their rows, and where the program stands in a completion.

Two kinds of rows are known by their columns: those of MBPP (`test_list`, one assertion each) and those of HumanEval
(`test`, which defines `check(candidate)`, and `entry_point`). Both become rows whose `verifier` is "python" and whose
`metadata` says what is run: `tests`, and `setup` before them; `prefix`, the code that a completion goes on from;
`entry_points`, the names of the program's functions, or `reference`, a solution that defines them.

Text only: nothing here is compiled or run (`trb.tasks.programs`).
"""

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from trb.errors import InputError
from trb.safety.untrusted import parse_json
from trb.tasks.answers import Row, after_thinking
from trb.tasks.sources import kind

__all__ = ["PYTHON", "has_tests", "program_job", "program_row", "program_texts", "test_columns"]

PYTHON = "python"

MAX_PROGRAM_CHARS = 100_000

_MBPP = ("test_list", "test_setup_code", "test_imports", "code")
_HUMAN_EVAL = ("test", "entry_point", "canonical_solution")

_FENCE = re.compile(r"^([ \t]*)(```+|~~~+)(.*)$", re.MULTILINE)
# Where a model that only goes on writing has left the function: the stops of HumanEval's own protocol.
_BEYOND = re.compile(r"\n(?=class\b|def\b|#|if\b|print\b)")


# ---- rows ----


def test_columns(found: Collection[str]) -> tuple[str, ...]:
    """The columns with the tests of a source, and what belongs to them; empty where it has no tests."""
    kinds = [
        wanted for wanted, needed in ((_MBPP, 1), (_HUMAN_EVAL, 2)) if all(name in found for name in wanted[:needed])
    ]
    return tuple(name for wanted in kinds for name in wanted if name in found)


def has_tests(raw: Row) -> bool:
    """Whether a row of a source with tests has some itself; half of HumanEval's pair is enough to be refused."""
    return raw.get("test_list") is not None or bool(raw.get("test") or raw.get("entry_point"))


def program_row(prompt: list[dict[str, str]], raw: Row, place: str) -> Row:
    """A row with tests as a row of ours. Raises ValueError naming the place of what is missing or no text."""
    text = prompt[-1]["content"]
    if raw.get("test_list") is not None:
        tests = _texts(raw, "test_list", place)
        imports = _texts(raw, "test_imports", place) if raw.get("test_imports") else []
        setup, reference = _text(raw, "test_setup_code", place), _text(raw, "code", place)
        # As in the paper that published them: the tests say what the function is called.
        prompt = [
            *prompt[:-1],
            {**prompt[-1], "content": "\n".join([text, "Your code should pass these tests:", *tests])},
        ]
        scoring = {"setup": "\n".join([*imports, setup]), "tests": tests, "reference": reference}
    else:
        entry, reference = _text(raw, "entry_point", place), _text(raw, "canonical_solution", place)
        if not entry.isidentifier():
            raise InputError(f"column 'entry_point' of {place} is {entry!r:.40}; it must name the function to call")
        if not _text(raw, "test", place):
            raise InputError(f"column 'test' of {place} is {kind(raw.get('test'))}; it must define check(candidate)")
        tests = [f"{_text(raw, 'test', place)}\n\ncheck({entry})\n"]
        scoring = {"prefix": text, "tests": tests, "entry_points": [entry]}
    return {"prompt": prompt, "answer": reference, "verifier": PYTHON, "metadata": json.dumps(scoring)}


def _texts(raw: Row, column: str, place: str) -> list[str]:
    value = raw.get(column)
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise InputError(f"column {column!r} of {place} is {kind(value)}; it must be a list of texts, one at least")
    return value


def _text(raw: Row, column: str, place: str) -> str:
    value = raw.get(column)
    if value is not None and not isinstance(value, str):
        raise InputError(f"column {column!r} of {place} is {kind(value)}; it must be text")
    return value or ""


# ---- completions ----


def program_job(completion: str, row: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `trb.tasks.programs` runs for a completion; None where that holds no finished program.

    `tests` is empty for a row without tests. Raises ValueError for unusable metadata.
    """
    scoring = _scoring(row)
    texts = program_texts(after_thinking(completion), scoring["prefix"])
    return None if scoring["tests"] and not texts else {"readings": texts, **scoring}


def program_texts(text: str, prefix: str = "") -> list[str]:
    """How a completion can be read as a program, the likeliest reading first; empty for one that is cut off.

    That is the last fenced block, else all of it, after `prefix`. Of a text without a block that goes on after a
    prefix, a second reading stops where it begins something new.
    """
    if len(text) > MAX_PROGRAM_CHARS:
        return []
    block, unfinished = _last_block(text)
    if unfinished:
        return []
    if block is not None:
        return [f"{prefix}\n{block}" if prefix else block]
    return [prefix + text, prefix + _BEYOND.split(text, maxsplit=1)[0]] if prefix else [text]


def _last_block(text: str) -> tuple[str | None, bool]:
    """What stands in the last fenced block, and whether a fence is still open at the end."""
    opening: re.Match[str] | None = None
    block = None
    for fence in _FENCE.finditer(text):
        if opening is None:
            opening = fence
        elif fence[2].startswith(opening[2]) and not fence[3].strip():
            block, opening = _outdented(text[opening.end() + 1 : fence.start()], len(opening[1])), None
    return block, opening is not None


def _outdented(block: str, width: int) -> str:
    """A block without the indentation of its opening fence, as far as each line has it: one under an item of a list.

    What lines are indented by beyond the fence is the program's: the body of a function that a prompt has begun.
    """
    return re.sub(rf"^[ \t]{{1,{width}}}", "", block, flags=re.MULTILINE) if width else block


_DEFAULTS: dict[str, Any] = {"prefix": "", "setup": "", "tests": [], "entry_points": [], "reference": ""}


def _scoring(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row says of its tests, whole and of the right types."""
    try:
        said = parse_json(row.get("metadata") or "{}")
        if not isinstance(said, dict) or said.keys() - _DEFAULTS.keys():
            raise InputError(f"it must be an object with {', '.join(_DEFAULTS)}")
        # A table has null for what only other rows say.
        scoring = {**_DEFAULTS, **{key: value for key, value in said.items() if value is not None}}
        for key, default in _DEFAULTS.items():
            parts = scoring[key] if isinstance(default, list) else [scoring[key]]
            if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
                raise InputError(f"{key} is {kind(scoring[key])}")
    except ValueError as error:
        raise InputError(f"a row of {PYTHON!r} has unusable metadata: {error}") from error
    return scoring
