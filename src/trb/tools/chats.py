"""How calls are read out of what a model wrote, and which tokens their answers become.

Both are text from outside. What is no call, by whatever error of a parser, asks for nothing. TRL renders an answer as
it stands, so that `<|im_end|>` in a web page ends the tool's turn; here neither an answer nor the name that was called
becomes a special token: a space goes into whatever spells one, and the tokens that come of it are compared with those
of an answer that spells none, as tokenizers change what they read and templates write beside it.

Left out: running tools (`trb.tools.calls`), and what is drawn after their answers (`trb.tools.turns`).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from trb.errors import InputError
from trb.tools.calls import Answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ToolChat", "check_template", "training_template", "unfailing_reader"]

# Stands in a conversation for a text, or a name, that no other way keeps from becoming special tokens.
_UNREADABLE, _SOME_TOOL = "unreadable", "tool"


def check_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a tokenizer that no tools go with.

    Raises:
        ValueError: its chat template renders no tools, TRL knows no way to read the calls that go with it, or it
            renders a conversation's beginning otherwise once a tool has answered and TRL knows no other for it.
    """
    _with_templates(tokenizer)


def training_template(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """The chat template that TRL's trainer renders with where there are tools; None for the tokenizer's own.

    Raises ValueError as `check_template`.
    """
    return _with_templates(tokenizer)[1]


def _with_templates(tokenizer: "PreTrainedTokenizerBase") -> tuple["PreTrainedTokenizerBase", str | None]:
    """The tokenizer with a response template, and the chat template in place of its own, as TRL's trainer has them."""
    from trl.chat_template_utils import (
        add_response_schema,
        get_training_chat_template,
        is_chat_template_prefix_preserving,
        supports_tool_calling,
    )

    name = tokenizer.name_or_path
    if not supports_tool_calling(tokenizer):
        raise InputError(
            f"tools: the chat template of {name!r} leaves out calls, or what tools answer; choose a model that was "
            "taught to call tools, or another chat template"
        )
    try:
        if tokenizer.response_template is None:
            tokenizer = add_response_schema(copy(tokenizer))
        preserving = is_chat_template_prefix_preserving(tokenizer)
        return tokenizer, None if preserving else get_training_chat_template(tokenizer)
    except ValueError as error:
        why = str(error).partition("\n")[0]
        raise InputError(f"tools: TRL does not know how the chat template of {name!r} calls them ({why})") from error


def unfailing_reader(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    """A copy of a tokenizer out of which TRL reads no calls where reading fails, whatever the error.

    TRL takes a ValueError for text without calls, and ends the run with any other: of JSON that is nested deeper than
    the interpreter's stack, or of a parser that meets what it was not written for.
    """
    parse, reader = tokenizer.parse_response, copy(tokenizer)

    def parsed(*args: Any, **kwargs: Any) -> Any:
        try:
            found = parse(*args, **kwargs)
        except Exception as error:
            raise InputError(f"no call can be read: {type(error).__name__}") from error
        if not isinstance(found, dict):
            raise InputError("no message is read")
        return found

    reader.parse_response = parsed  # type: ignore[method-assign]
    return reader


@dataclass
class ToolChat:
    """A tokenizer as far as tools go.

    Attributes:
        tokenizer: with a chat template that renders tools, and a response template that reads calls.
        template: a chat template in place of the tokenizer's; it must render a conversation's beginning in one way
            whatever follows. None for the tokenizer's.
        tools: the functions, for the types of arguments.
        stop_ids: every id that ends a turn.
        options: keyword arguments of the template.
    """

    tokenizer: "PreTrainedTokenizerBase"
    template: str | None
    tools: Sequence[Callable[..., Any]]
    stop_ids: Sequence[int]
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        tools: Sequence[Callable[..., Any]],
        tokenizer: "PreTrainedTokenizerBase",
        stop_ids: Sequence[int],
        options: Mapping[str, Any],
    ) -> "ToolChat":
        """With the response template and the chat template that TRL's trainer would give the tokenizer.

        Raises:
            ValueError: as `check_template`.
        """
        return cls(*_with_templates(tokenizer), tools, stop_ids, options)

    def calls(self, ids: Sequence[int], prefix: Sequence[int]) -> list[dict[str, Any]]:
        """The calls in a turn, of which `prefix` is all that came before."""
        from trl.chat_template_utils import parse_response

        if not ids:
            return []
        parsed = parse_response(self._reader, list(ids), prefix=list(prefix), tools=list(self.tools))
        return parsed.get("tool_calls") or []

    def after(self, completion: Sequence[int], answers: Sequence[Answer]) -> list[int]:
        """A completion that ended with calls, with their answers and what opens the next turn.

        Its stop token becomes the one that the template ends turns with, if that is a stop token at all: a base
        student stops with another one, which neither model has ever seen inside a conversation.
        """
        safe = [Answer(self.harmless(each.name), self.harmless(each.text)) for each in answers]
        known = [name if name in self._names else _SOME_TOOL for name in (each.name for each in safe)]
        wanted = self._written([Answer(name, _UNREADABLE) for name in known])
        try:
            end, suffix = self._written(safe)
        except Exception:  # a template may look at a name; it writes the other conversation
            end, suffix = wanted
        if self._marks(suffix) != self._marks(wanted[1]):
            end, suffix = wanted
        closed = list(completion)
        if end is not None and closed[-1] in self.stop_ids:
            closed[-1] = end
        return closed + suffix

    def _written(self, answers: Sequence[Answer]) -> tuple[int | None, list[int]]:
        """The stop token that ends a turn with calls, None if the template has none there, and what follows it."""
        dummy = {"type": "function", "function": {"name": answers[0].name, "arguments": {}}}
        asked: list[dict[str, Any]] = [
            {"role": "user", "content": "dummy"},
            {"role": "assistant", "content": "", "tool_calls": [dummy]},
        ]
        messages = [{"role": "tool", "name": each.name, "content": each.text} for each in answers]
        before, whole = self._rendered(asked, False), self._rendered(asked + messages, True)
        ends = [place for place, token in enumerate(before) if token in self.stop_ids]
        if ends:  # templates write more after a turn's end, such as a line's
            before = before[: ends[-1] + 1]
        if whole[: len(before)] != before:
            raise InputError("the chat template renders a conversation otherwise once a tool has answered: change it")
        return before[-1] if ends else None, whole[len(before) :]

    def harmless(self, text: str) -> str:
        """A text that a tokenizer takes, with a space in whatever would become a special token, or one that the
        template writes turns with; its words alone where that does not do."""
        text = text.encode("utf-8", "replace").decode()  # JSON can spell half a pair of surrogates
        broken = self._broken(text)
        if not self._marks(self.tokenizer.encode(broken, add_special_tokens=False)):
            return broken
        # The tokenizer makes the mark itself, out of other characters or by leaving some out.
        return self._broken(re.sub(r"\W+", " ", text, flags=re.ASCII))

    def _broken(self, text: str) -> str:
        while found := next((mark for mark in self._special if mark in text), None):
            first = len(found) - len(found.lstrip())  # a space beside one of its own would leave the mark as it is
            rest = found[first + 1 :]
            text = text.replace(found, found[:first] + (f"{found[first]} {rest}" if rest.strip() else f" {rest}"))
        return text

    def _marks(self, ids: Sequence[int]) -> list[int]:
        """Those of some tokens that no text from outside may become."""
        return [token for token in ids if token in self._special_ids]

    @cached_property
    def _reader(self) -> "PreTrainedTokenizerBase":
        return unfailing_reader(self.tokenizer)

    @cached_property
    def _names(self) -> set[str]:
        return {tool.__name__ for tool in self.tools}

    @cached_property
    def _special_ids(self) -> set[int]:
        added = self.tokenizer.added_tokens_decoder.items()
        kept = {index for index, token in added if token.special or token.content.startswith("<")}
        return kept.union(self.stop_ids) - {self.tokenizer.unk_token_id}  # what a character is that has no token

    @cached_property
    def _special(self) -> tuple[str, ...]:
        added = self.tokenizer.added_tokens_decoder.values()
        marks = {token.content for token in added if token.special or token.content.startswith("<")}
        # Some templates write the marks of a turn as plain text.
        marks.update(re.findall(r"</?\w+>", self.template or str(self.tokenizer.chat_template)))
        return tuple(sorted(mark for mark in marks if mark.strip()))

    def _rendered(self, messages: list[dict[str, Any]], opened: bool) -> list[int]:
        ids: Any = self.tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=opened,
            tokenize=True,
            return_dict=False,
            chat_template=self.template,
            **self.options,
        )
        return list(ids)
