"""One call of a tool: it may raise, hang, or return a megabyte, and the run goes on.

Each call runs in a thread of its own, which is given up after a time. Python cannot end a thread: one that hangs stays
until its tool returns or the process ends, and with it what it holds. A tool that hangs again and again ends the run.

What a tool says may quote the model, and a name that no tool has is the model's: neither is logged.
"""

import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers.utils import logging

from trb.errors import OperationError
from trb.safety.untrusted import printable

__all__ = ["Answer", "ToolBox", "ToolHangsError"]

logger = logging.get_logger(__name__)

MOST_HANGING = 16


class ToolHangsError(OperationError):
    """Too many calls of tools have not returned."""


@dataclass(frozen=True)
class Answer:
    """What a tool answered: its name as the model wrote it, a text, and whether the call failed."""

    name: str
    text: str
    failed: bool = False


@dataclass
class ToolBox:
    """Tools by name, and the limits of one call.

    Attributes:
        tools: functions by the name that a model calls.
        seconds: after which a call is given up.
        characters: of an answer that are kept.
        hanging: the threads of calls that were given up, as long as they run.
    """

    tools: Mapping[str, Callable[..., Any]]
    seconds: float
    characters: int
    hanging: list[threading.Thread] = field(default_factory=list, repr=False)

    def answer(self, call: Mapping[str, Any]) -> Answer:
        """Run one call as `trl.chat_template_utils.parse_response` has read it; errors become answers, as in TRL.

        Raises:
            ToolHangsError: `MOST_HANGING` calls have not returned.
        """
        kind, function = call.get("type"), call.get("function")
        if kind != "function" or not isinstance(function, Mapping) or not {"name", "arguments"} <= function.keys():
            said = "Unsupported tool call" if kind == "function" else f"Unsupported tool call type: {kind}"
            return self._failure(str(call.get("name", "unknown")), said)
        name, arguments = str(function["name"]), function["arguments"]
        if name not in self.tools:
            return self._failure(name, f"Tool {name} not found.")
        tool = self.tools[name]
        found = self._within_time(name, lambda: str(tool(**arguments)))
        if not isinstance(found, _Error):
            return Answer(name, self._cut(name, found))
        if found.kind is not None:
            logger.warning_once(
                f"the tool {name:.100} failed with {found.kind:.100} (said once for each kind of error); what the "
                "model reads says why"
            )
        return self._failure(name, found.text)

    def _failure(self, name: str, text: str) -> Answer:
        return Answer(name, self._cut(name, str({"error": text})), failed=True)

    def _cut(self, name: str, text: str) -> str:
        if len(text) > self.characters and name in self.tools:
            logger.warning_once(
                f"answers of the tool {name:.100} are longer than the {self.characters:,} characters that the model "
                "reads of one (tool_max_characters; said once)"
            )
        return text[: self.characters]

    def _within_time(self, name: str, call: Callable[[], str]) -> "str | _Error":
        """What a call returns, or what went wrong."""
        box: queue.SimpleQueue[str | _Error] = queue.SimpleQueue()

        def work() -> None:
            try:
                box.put(call())
            except BaseException as error:  # SystemExit too: a tool must not end the run
                box.put(_Error(_said(error), printable(type(error).__name__, lines=False)))

        thread = threading.Thread(target=work, name=f"tool {name:.100}", daemon=True)
        thread.start()
        try:
            return box.get(timeout=self.seconds)
        except queue.Empty:
            self._give_up(name, thread)
            return _Error(f"no answer within {self.seconds:g} seconds")

    def _give_up(self, name: str, thread: threading.Thread) -> None:
        self.hanging = [each for each in (*self.hanging, thread) if each.is_alive()]
        logger.warning(
            f"the tool {name:.100} has not answered within {self.seconds:g} seconds (tool_timeout); its thread stays"
        )
        if len(self.hanging) >= MOST_HANGING:
            raise ToolHangsError(
                f"{len(self.hanging)} calls of tools hang, the last one of {name:.100}, and Python cannot end them: "
                "give the tool a time limit of its own, or raise tool_timeout"
            )


@dataclass(frozen=True)
class _Error:
    """What went wrong in a call, in words, and the kind of error; None where it is in the log already."""

    text: str
    kind: str | None = None


def _said(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return type(error).__name__
