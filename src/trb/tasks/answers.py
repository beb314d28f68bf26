"""Answers as models write them: boxes, references, and what a generated task must remember of its question.

Text only, in linear time. Left out: whether an answer is right (`trb.tasks.grading`).
"""

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["Box", "Row", "boxed_answers", "decode_metadata", "encode_metadata", "last_boxed", "reference_answer"]

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


_BOX_TOKEN = re.compile(r"\\(?:boxed|fbox)\s*\{|\\[\\{}]|[{}]")


def boxed_answers(text: str) -> list[Box]:
    """Every closed \\boxed{...} (or \\fbox{...}) of `text`, in order, in time linear in its length.

    A box that never closes (a completion cut short) is no answer. A box inside another is part of the outer
    one; a box that holds nothing but another box is that box.
    """
    spans: list[tuple[int, int, int, int]] = []  # start of: command, content; end of: content, command
    opened: list[tuple[int, int] | None] = []  # start of command and content; None for a brace that is no box
    for token in _BOX_TOKEN.finditer(text):
        found = token.group()
        if found == "{":
            opened.append(None)
        elif found == "}":
            box = opened.pop() if opened else None
            if box is not None:
                spans.append(_close(text, spans, *box, token))
        elif len(found) > 2:
            opened.append((token.start(), token.end()))
    return [Box(text[content:close].strip(), start, end) for start, content, close, end in spans]


def _close(
    text: str, spans: list[tuple[int, int, int, int]], start: int, content: int, brace: re.Match[str]
) -> tuple[int, int, int, int]:
    """The span of the box that ends at `brace`, after taking the boxes inside it off `spans`."""
    close, inside = brace.start(), []
    while spans and spans[-1][0] > start:
        inside.append(spans.pop())
    if len(inside) == 1:
        inner_start, inner_content, inner_close, inner_end = inside[0]
        if not text[content:inner_start].strip() and not text[inner_end:close].strip():
            content, close = inner_content, inner_close
    return start, content, close, brace.end()


def last_boxed(text: str) -> str | None:
    """The content of the last closed \\boxed{} of `text`, or None."""
    boxes = boxed_answers(text)
    return boxes[-1].content if boxes else None


def reference_answer(text: str) -> str:
    """The final answer of a solution: what follows '####' (GSM8K), else its last \\boxed{}, else all."""
    if "####" in text:
        return text.rsplit("####", 1)[1].strip().replace(",", "")
    boxed = last_boxed(text)
    return text.strip() if boxed is None else boxed
