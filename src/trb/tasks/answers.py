"""Answers as models write them: boxes, announcements, references, and what a generated task remembers of its question.

Text only, in linear time. Left out: whether an answer is right (`trb.tasks.grading`).
"""

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = [
    "Box",
    "Row",
    "after_thinking",
    "announced_answer",
    "boxed_answers",
    "decode_metadata",
    "encode_metadata",
    "final_boxes",
    "last_boxed",
    "reference_answer",
]

Row = dict[str, Any]


def encode_metadata(value: Mapping[str, Any]) -> str:
    """`value` as JSON that keeps tuples: some tasks compare grids made of them, and lists differ."""
    return json.dumps(_tag_tuples(value))


def decode_metadata(text: str) -> dict[str, Any]:
    """The inverse of `encode_metadata`."""
    return json.loads(text, object_hook=_untag_tuple)


def _untag_tuple(item: Row) -> Any:
    return tuple(item["tuple"]) if item.keys() == {"tuple"} else item


def _tag_tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _tag_tuples(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return {"tuple": [_tag_tuples(item) for item in value]}
    return [_tag_tuples(item) for item in value] if isinstance(value, list) else value


class Box(NamedTuple):
    """One \\boxed{...} of a text: its content, and where the whole command starts and ends."""

    content: str
    start: int
    end: int


# A box without braces holds what TeX would box, and the rest of a number: \boxed 72, \boxed\frac{1}{2}, \boxed C.
_COMMAND = r"\\(?!boxed|fbox)[a-zA-Z]+(?:\s*\{[^{}]*\}){0,2}"
_BARE = rf"(?P<bare>[-+]?(?:\d+(?:,\d{{3}})*(?:\.\d+)?(?:/\d+)?|{_COMMAND}|[a-zA-Z](?![a-zA-Z])))"
_BOX_TOKEN = re.compile(rf"\\(?:boxed|fbox)(?:\s*\{{|(?![a-zA-Z])\s*{_BARE}|(?P<cut>\s*\Z))|\\[\\{{}}]|[{{}}]")


def boxed_answers(text: str) -> list[Box]:
    """Every closed \\boxed{...} (or \\fbox{...}, or \\boxed 7) of `text`, in order, in time linear in its length.

    A box that never closes (a completion cut short) is no answer. A box inside another is part of the outer
    one; a box that holds nothing but another box is that box.
    """
    return _read_boxes(text)[0]


def final_boxes(text: str) -> list[Box] | None:
    """`boxed_answers(text)`; None where the text ends inside a box that begins after all of them: it was cut short."""
    boxes, opened = _read_boxes(text)
    return None if opened >= 0 and all(box.start < opened for box in boxes[-1:]) else boxes


def _read_boxes(text: str) -> tuple[list[Box], int]:
    """The closed boxes, and where the last one begins that never closes, or -1."""
    spans: list[tuple[int, int, int, int]] = []  # start of: command, content; end of: content, command
    opened: list[tuple[int, int] | None] = []  # start of command and content; None for a brace that is no box
    cut = -1
    for token in _BOX_TOKEN.finditer(text):
        found = token.group()
        if found == "{":
            opened.append(None)
        elif found == "}":
            box = opened.pop() if opened else None
            if box is not None:
                spans.append(_close(text, spans, *box, token.start(), token.end()))
        elif token["bare"]:
            spans.append((token.start(), token.start("bare"), token.end(), token.end()))
        elif token["cut"] is not None:
            cut = token.start()
        elif len(found) > 2:
            opened.append((token.start(), token.end()))
    cut = max(cut, *(box[0] for box in opened if box), -1)
    return [Box(text[content:close].strip(), start, end) for start, content, close, end in spans], cut


def _close(
    text: str, spans: list[tuple[int, int, int, int]], start: int, content: int, close: int, end: int
) -> tuple[int, int, int, int]:
    """The span of the box whose brace closes at `close`, after taking the boxes inside it off `spans`."""
    inside = []
    while spans and spans[-1][0] > start:
        inside.append(spans.pop())
    if len(inside) == 1:
        inner_start, inner_content, inner_close, inner_end = inside[0]
        if not text[content:inner_start].strip() and not text[inner_end:close].strip():
            content, close = inner_content, inner_close
    return start, content, close, end


def last_boxed(text: str) -> str | None:
    """The content of the last closed \\boxed{} of `text`, or None."""
    boxes = boxed_answers(text)
    return boxes[-1].content if boxes else None


# ---- what decides where a completion has no box ----

_THOUGHT = re.compile(r"</(?:think|thinking|thought|reasoning)>", re.IGNORECASE)


def after_thinking(completion: str) -> str:
    """What follows the last closing tag of a thought; all of it where there is no tag, or nothing after it."""
    end = 0
    for tag in _THOUGHT.finditer(completion):
        end = tag.end()
    return completion[end:] if completion[end:].strip() else completion


ANNOUNCED_CHARS = 2_000  # of the end of a completion, where announcements are looked for
ANNOUNCEMENTS = 10  # the last ones, of which the first from the end that says something counts
CLAUSE_CHARS = 500
_MARKS = r"(?:\*\*|__)"
# GSM8K's own mark; before anything else than a number or a command of LaTeX, it may be the heading of a section.
_FORMULA = r"[ \t]*[-+$€£¥₹\\(\[{*]{0,4}(?:\d|(?<=\\)[a-z{])"
_ANNOUNCEMENT = re.compile(
    r"\b(?:answers?|correct\s+(?:option|choice))\b"
    rf"(?:[^.\n:=!?]{{0,60}}?(?:\b(?:is|are|equals)\b|[:=])(?:{_MARKS}(?=\s))?:?|\s*{_MARKS}?[ \t]*\n)"
    rf"|^[ \t]*####(?={_FORMULA})",
    re.IGNORECASE | re.MULTILINE,
)
_FILLERS = re.compile(
    r"(?:\s|>|(?:indeed|therefore|thus|then|hence|simply|just|exactly|clearly|probably|approximately|about|equal\s+to"
    r"|option|choice|letter|(?:the\s+)?(?:ordered\s+)?(?:point|pair|set|interval|number|value|vector)(?=\s+[^a-z\s]))\b"
    r"|```[a-z]*\n)*",
    re.IGNORECASE,
)
_EMPHASIS = re.compile(r"(?:\A|(?<=\s)(?=\*\*|__))(\*\*|__|\*|`)(?=\S)(.+?)\1", re.DOTALL)
_MATH = re.compile(
    r"\\\((.+?)\\\)|\\\[(.+?)\\\]|\$\$(.+?)\$\$|\$(?!\d)((?:\\\$|[^$\n])+)(?<!\\)\$"
    r"|\$(\d(?:[^$\n]*[^$\n\s\\])?)\$(?!\d)",  # of "$72, as she earns $8" nothing is mathematics
    re.DOTALL,
)
_NO_ANSWER = re.compile(
    r"(?:not|correct|incorrect|wrong|right|an?|in|as|shown|given|above|below|this|that|what|which|unknown|unclear)\b"
)
_CLAUSE_END = re.compile(
    r"[.!?](?=\s|\Z)|[\n;]|,\s+(?!and\b|or\b)(?=[a-z]{2,})|,?\s+(?:and|but)\s+not\b|\s\((?=[a-z]{2,})"
    r"|,?\s(?:because|since|which|when|where|rather|instead|not|for|so|if|as)\b"
)
_SUBJECT = re.compile(r"(?:the|an?|its|his|her|their|our)\s[^\d$\\\n]{0,80}?\b(?:is|are|equals)\s+", re.IGNORECASE)
_JOINED = re.compile(r"\s*(?:,|and|or|,\s*and|,\s*or)\s*")


def announced_answer(completion: str) -> str | None:
    """What the last announcement at the end of `completion` says: "the answer is ...", "**Answer:** ...", "#### 12"."""
    tail = completion[-ANNOUNCED_CHARS:]
    for mark in [*_ANNOUNCEMENT.finditer(tail)][: -1 - ANNOUNCEMENTS : -1]:
        start = _FILLERS.match(tail, mark.end())
        assert start is not None
        subject = _SUBJECT.match(tail, start.end())  # "Answer: the number of ways is 72."
        begin = subject.end() if subject else start.end()
        if not _NO_ANSWER.match(tail, begin) and (answer := _clause(tail[begin : begin + CLAUSE_CHARS])):
            return answer
    return None


def _clause(text: str) -> str:
    """The answer that `text` begins with: emphasized, mathematics, or words up to where their clause ends."""
    if emphasized := _in_clause(_EMPHASIS, text):
        text = emphasized[2].strip()
    if mathematics := _in_clause(_MATH, text):
        return _formulas(text, mathematics)
    end = _CLAUSE_END.search(text)
    return (text[: end.start()] if end else text).strip(" \t\n*_`:,")


def _in_clause(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    """The first match, which may stand after words ("the set $\\{1, 2\\}$"), not after a number or the clause's end."""
    found, end = pattern.search(text), _CLAUSE_END.search(text)
    if not found or (end and end.start() < found.start()) or re.search(r"\d", text[: found.start()]):
        return None
    return found


def _formulas(text: str, first: re.Match[str]) -> str:
    """The contents of formulas that only commas and conjunctions part, as one list."""
    found: re.Match[str] | None = first
    contents = []
    while found:
        contents.append(next(content for content in found.groups() if content is not None).strip())
        joint = _JOINED.match(text, found.end())
        found = _MATH.match(text, joint.end()) if joint else None
    return ", ".join(contents)


# ---- what a worked solution comes to ----

_BEGINS_AS_FORMULA = re.compile(_FORMULA, re.IGNORECASE)  # as an announcement in a completion


def reference_answer(text: str) -> str:
    """The final answer of a solution: what it ends with behind '####' (GSM8K), its last \\boxed{}, what it announces.

    Text that has none of them is an answer itself.
    """
    _, mark, behind = text.rpartition("####")
    # With more than a line below it, it is the heading of a section.
    marked = behind.strip() if mark and "\n" not in behind.strip() else ""
    if _BEGINS_AS_FORMULA.match(marked):
        boxed = last_boxed(marked)
        return marked if boxed is None else boxed
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    if marked:
        return announced_answer(marked) or marked
    # A line that announces something may be meant as it stands; of a whole solution that can hardly be.
    return ("\n" in text.strip() and announced_answer(text)) or text.strip()
