"""What a chat template makes of conversations: what it can render, chats that are rendered already, and where two part.

A base student and an instruct teacher often come with different templates, and data is often rendered before it is
saved. Neither raises an error; both cost points. Left out: rendering itself (the tokenizer's work), trying templates of
others (`trb.safety.templates`), and what is said to people (`trb.training.doubts`).
"""

import reprlib
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from trb.errors import InputError, did_you_mean
from trb.models.tokens import token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Difference", "Messages", "fault_of", "first_difference", "rendered_ids", "rendered_text"]

Messages = Sequence[Mapping[str, Any]]

ROLES = ("system", "user", "assistant", "tool")

_PLACE = "where the question stands"


def fault_of(message: Mapping[str, Any]) -> str | None:
    """Why a message must not be given to a chat template, in words that follow its place; None where it may be.

    Templates raise no error for these: they leave out what they do not know, or write the list as Python shows it.
    """
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        known = f"known roles are {', '.join(ROLES)}{did_you_mean(str(role), ROLES)}"
        return f"has the role {reprlib.repr(role)}; {known}"
    if isinstance(content, list):
        return (
            f"has a list for its content ({reprlib.repr(content)}), which templates of text models write wrongly or "
            "leave out: give one text, such as that of its parts joined"
        )
    if not isinstance(content, str):
        what = "missing (null)" if content is None else f"a {type(content).__name__} ({reprlib.repr(content)})"
        return f"has content of the wrong type: it is {what}, not text"
    return None


def rendered_text(tokenizer: "PreTrainedTokenizerBase", messages: Messages) -> str | None:
    """The text of a conversation that is one chat rendered already, put into a user message by whoever read it.

    It begins with the tokenizer's BOS or with a special token that its template begins turns with; a template without
    such tokens must be there on both sides. None for messages yet to be rendered.

    Raises ValueError for such a text beside other messages, which can neither be rendered nor left alone.
    """
    texts = [message["content"] for message in messages if message["role"] == "user"]
    found = next((text for text in texts if isinstance(text, str) and _is_rendered(tokenizer, text)), None)
    if found is None or len(messages) == 1:
        return found
    raise InputError(
        f"a message begins with {found[:24]!r}: it is a whole chat, rendered already, and other messages (such as a "
        "system prompt) cannot be put beside it. Leave them out, or give the chat as messages with role and content"
    )


def rendered_ids(tokenizer: "PreTrainedTokenizerBase", messages: Messages) -> list[int] | None:
    """The ids of `rendered_text`, as they are, with one BOS at most."""
    text = rendered_text(tokenizer, messages)
    return None if text is None else token_ids(tokenizer, text)


class Difference(NamedTuple):
    """Where two renderings of one conversation part: some characters before it, and what each goes on with."""

    student: str
    teacher: str


def first_difference(
    student: "PreTrainedTokenizerBase",
    teacher: "PreTrainedTokenizerBase",
    conversations: Iterable[Messages],
    *,
    before: int = 12,
    after: int = 36,
    **options: Any,
) -> Difference | None:
    """Where the two templates first part, on the first conversation that they render differently; None where on none.

    `options` are the templates' keyword arguments. A conversation that one of them refuses is passed over, and so is
    every one if a tokenizer has no template.
    """
    if not student.chat_template or not teacher.chat_template or student.chat_template == teacher.chat_template:
        return None
    for messages in conversations:
        texts = _rendered(student, messages, options), _rendered(teacher, messages, options)
        if None in texts or texts[0] == texts[1]:
            continue
        own, other = str(texts[0]), str(texts[1])
        at = next((i for i, pair in enumerate(zip(own, other, strict=False)) if pair[0] != pair[1]), None)
        start = max(0, (min(len(own), len(other)) if at is None else at) - before)
        return Difference(*(text[start : start + before + after] for text in (own, other)))
    return None


def _rendered(tokenizer: "PreTrainedTokenizerBase", messages: Messages, options: Mapping[str, Any]) -> str | None:
    try:
        chat: Any = list(messages)
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **options))
    except Exception:  # templates refuse conversations with whatever jinja raises
        return None


def _is_rendered(tokenizer: "PreTrainedTokenizerBase", text: str) -> bool:
    tokens, sides = _marks(_Template(tokenizer))
    if text.startswith(tokens):
        return True
    before, after = sides
    return bool(before and after) and text.startswith(before) and text.rstrip().endswith(after)


class _Template:
    """A tokenizer as far as its template goes, which may be set anew."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer
        self._key = id(tokenizer), str(tokenizer.chat_template), str(tokenizer.bos_token)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Template) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


@lru_cache(maxsize=16)
def _marks(template: _Template) -> tuple[tuple[str, ...], tuple[str, str]]:
    """Special tokens that a rendered chat may begin with; and what stands before and after a question."""
    tokenizer = template.tokenizer
    text = _rendered(tokenizer, [{"role": "user", "content": _PLACE}], {}) if tokenizer.chat_template else None
    before, found, after = (text or "").partition(_PLACE)
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special and str(token)}
    tokens = {token for token in special if token in before}
    if tokenizer.bos_token:
        tokens.add(str(tokenizer.bos_token))
    return tuple(sorted(tokens)), ((before.strip(), after.strip()) if found else ("", ""))
