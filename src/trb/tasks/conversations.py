"""Conversations: messages in either common spelling, and the assistant's turns in them that are to be distilled.

On policy, a turn is distilled by writing it anew: its prompt is the conversation up to it, with the assistant's turns
as the data have them. What the data say there is kept as a reference, for people to read; nothing is trained on it.

Left out: which column holds them (`trb.tasks.prompts`), and templates (`trb.models.chats`).
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

from trb.errors import InputError, did_you_mean, named
from trb.models.chats import fault_of
from trb.tasks.sources import kind

__all__ = [
    "Message",
    "Turn",
    "check_choice",
    "conversation_of",
    "read_messages",
    "turns_of",
    "with_system",
]

Message = dict[str, str]

ASSISTANT_TURNS = ("all", "last")

_OTHER_NAMES = {"human": "user", "gpt": "assistant"}  # of roles, with from/value


class Turn(NamedTuple):
    """A turn of the assistant: the messages before it, what the data say there, and which of the conversation it is."""

    prompt: list[Message]
    reference: str
    conversation: str
    """The same for all turns of a conversation, and for another copy of it."""
    number: int
    """From 1."""
    is_last: bool

    def described(self, metadata: str, place: str) -> str:
        """A row's metadata with what is known of the turn."""
        try:
            known = json.loads(metadata)
        except ValueError:
            known = None
        if not isinstance(known, dict):
            raise InputError(f"column 'metadata' of {place} must be a JSON object as text, to say which turn a row is")
        turn = {"conversation": self.conversation, "turn": self.number, "reference": self.reference}
        return json.dumps({**known, **turn})


def conversation_of(row: Mapping[str, Any]) -> str:
    """The conversation whose turn a row is; empty for one by itself."""
    try:
        metadata = json.loads(row.get("metadata") or "{}")
    except ValueError:
        return ""
    return str(metadata.get("conversation") or "") if isinstance(metadata, dict) else ""


def check_choice(which: str | None) -> None:
    """Raises ValueError for what is no choice of turns."""
    if which is not None and which not in ASSISTANT_TURNS:
        hint = did_you_mean(str(which), ASSISTANT_TURNS)
        raise InputError(f"{named('assistant_turns')} is {which!r}; choose one of {', '.join(ASSISTANT_TURNS)}{hint}")


def turns_of(value: Any, which: str, place: str) -> list[Turn]:
    """The turns of a whole conversation that `which` means, in order; a greeting before the user speaks is none.

    Raises ValueError for one that does not end with the assistant, has a second system message, or one without content.
    """
    if not isinstance(value, list):
        raise InputError(f"{place} is {kind(value)}; with {named('assistant_turns')} every row is a list of messages")
    messages = _all_messages(value, place)
    _check_whole(messages, place)
    digest = hashlib.sha256(json.dumps([[one["role"], one["content"]] for one in messages]).encode()).hexdigest()
    first = next(index for index, message in enumerate(messages) if message["role"] == "user")
    places = [index for index, one in enumerate(messages) if one["role"] == "assistant" and index > first]
    turns = [
        Turn(messages[:index], messages[index]["content"], digest[:16], number, index == places[-1])
        for number, index in enumerate(places, start=1)
    ]
    return turns if which == "all" else turns[-1:]


def _check_whole(messages: list[Message], place: str) -> None:
    roles = [message["role"] for message in messages]
    for number, message in enumerate(messages, start=1):
        if not message["content"].strip():
            raise InputError(f"message {number} in {place} is empty")
        if number > 1 and message["role"] == "system":
            what = "a second system message" if "system" in roles[: number - 1] else "a system message"
            raise InputError(f"message {number} in {place} is {what}; there can be one, at the start")
        if roles[number - 2 : number] == ["assistant", "assistant"]:
            raise InputError(f"message {number} in {place} is a second one of the assistant in a row; join them")
    if "assistant" not in roles:
        raise InputError(
            f"{place} has no turn of the assistant; leave out {named('assistant_turns')} for prompts alone"
        )
    if roles[-1] != "assistant":
        last = f"{place} ends with a turn of the {roles[-1]}"
        raise InputError(f"{last}; with {named('assistant_turns')} it must end with one of the assistant's")
    if "user" not in roles:
        raise InputError(f"{place} has no user message to answer")


def read_messages(value: Any, place: str) -> tuple[list[Message], str | None]:
    """The prompt as messages, and the assistant's reply that followed it in the source, if any."""
    if isinstance(value, str):
        if not value.strip():
            raise InputError(f"{place} is empty")
        return [{"role": "user", "content": value}], None
    if not isinstance(value, list):
        raise InputError(f"{place} is {kind(value)}; a prompt is text or a list of messages")
    messages = _all_messages(value, place)
    reply = messages.pop()["content"] if messages and messages[-1]["role"] == "assistant" else None
    if not any(message["role"] == "user" for message in messages):
        raise InputError(f"{place} has no user message to answer")
    return messages, reply


def with_system(messages: list[Message], system_prompt: str) -> list[Message]:
    rest = [message for message in messages if message["role"] != "system"]
    return [{"role": "system", "content": system_prompt}, *rest]


def _all_messages(value: list[Any], place: str) -> list[Message]:
    return [_message(item, f"message {number} in {place}") for number, item in enumerate(value, start=1)]


def _message(item: Any, place: str) -> Message:
    """One message, in either common spelling: role/content or from/value."""
    if not isinstance(item, dict):
        raise InputError(f"{place} is {kind(item)}; it must be an object with 'role' and 'content'")
    keys = ("role", "content") if "role" in item else ("from", "value")
    role, content = (item.get(key) for key in keys)
    message = {"role": _OTHER_NAMES.get(role, role) if isinstance(role, str) else role, "content": content}
    if (fault := fault_of(message)) is not None:
        raise InputError(f"{place} {fault}")
    for key in ("tool_calls", "function_call"):
        if item.get(key):
            raise InputError(
                f"{place} has {key}, which are not read from data: write the call into its content as the chat "
                "template does, or leave conversations with calls out"
            )
    return cast(Message, message)
