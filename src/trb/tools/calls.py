"""One call of a tool: it may raise, hang, or return a megabyte, and the run goes on.

Each call runs in a thread of its own, which is given up after a time. Python cannot end a thread: one that hangs stays
until its tool returns or the process ends, and with it what it holds. A tool that hangs again and again ends the run.
"""

import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers.utils import logging

from trb.errors import OperationError

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
        if call["type"] != "function":
            name = str(call.get("name", "unknown"))
            return self._failure(name, f"Unsupported tool call type: {call['type']}")
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        if name not in self.tools:
            return self._failure(name, f"Tool {name} not found.")
        tool = self.tools[name]
        found = self._within_time(name, lambda: str(tool(**arguments)))
        if not isinstance(found, _Error):
            return Answer(name, self._cut(name, found))
        logger.warning_once(f"the tool {name:.100} failed (said once for each error): {found:.300}")
        return self._failure(name, found)

    def _failure(self, name: str, text: str) -> Answer:
        return Answer(name, self._cut(name, str({"error": str(text)})), failed=True)

    def _cut(self, name: str, text: str) -> str:
        if len(text) <= self.characters:
            return text
        logger.warning_once(
            f"an answer of the tool {name:.100} has {len(text):,} characters, of which the model reads the first "
            f"{self.characters:,} (tool_max_characters)"
        )
        return text[: self.characters]

    def _within_time(self, name: str, call: Callable[[], str]) -> str:
        """What a call returns, or an `_Error`."""
        box: queue.SimpleQueue[str] = queue.SimpleQueue()

        def work() -> None:
            try:
                box.put(call())
            except BaseException as error:  # SystemExit too: a tool must not end the run
                box.put(_Error(_said(error)))

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


class _Error(str):
    """What went wrong in a call."""


def _said(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return type(error).__name__
