"""What the teacher reads in place of the student's prompt: a column of the data, and a system message.

Three ways, of which the last goes with each of the others: a column `teacher_prompt` with the whole prompt; a column
`privileged_context` (TRL's name in its self-distillation trainers) with what only the teacher may know, put into the
student's prompt by `teacher_prompt_template`; and `teacher_system_prompt`, a system message before the teacher's.

Left out: token ids (`trb.training.prompts`), and what both models make of them.
"""

import re
import reprlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from trb.errors import InputError

__all__ = ["COLUMNS", "CONTEXT", "PLACES", "WHOLE", "TeacherPrompts"]

WHOLE, CONTEXT = COLUMNS = ("teacher_prompt", "privileged_context")
PLACES = ("{prompt}", "{privileged_context}")


@dataclass(frozen=True)
class TeacherPrompts:
    """How the teacher's prompt is made of a row.

    Attributes:
        column: which of `COLUMNS` it is made from; None for the student's prompt.
        template: of a text that holds prompt and context.
        system: a system message that replaces the prompt's own; None for none.
    """

    column: str | None
    template: str
    system: str | None

    @classmethod
    def of(cls, columns: Collection[str], args: Any, name: str = "the data") -> "TeacherPrompts | None":
        """For rows with some columns, by a `TRBConfig`; None where the teacher reads what the student reads.

        Raises:
            ValueError: both columns are there; `name` says of what.
        """
        found = [column for column in COLUMNS if column in columns]
        if len(found) > 1:
            raise InputError(f"{name} has the columns {WHOLE} and {CONTEXT}, two prompts for the teacher: remove one")
        if not found and args.teacher_system_prompt is None:
            return None
        return cls(found[0] if found else None, args.teacher_prompt_template, args.teacher_system_prompt)

    def of_rows(self, rows: Iterable[Mapping[str, Any]], name: str) -> list[Any]:
        """The prompts of some rows, each text or messages.

        Raises:
            ValueError: names the row, from 0: it has nothing in the column, or text where messages are needed.
        """
        found = []
        for number, row in enumerate(rows):
            try:
                found.append(self(row))
            except InputError as error:
                raise InputError(f"{name}[{number}] has {error}") from error
        return found

    def __call__(self, row: Mapping[str, Any]) -> Any:
        """The prompt of a row, text or messages. Errors go on from "this row has"."""
        prompt = row["prompt"]
        if self.column is not None and not row.get(self.column):
            raise InputError(f"no {self.column}: every row needs one, or none")
        if self.column == WHOLE:
            prompt = row[WHOLE]
        elif self.column == CONTEXT:
            prompt = self._with_context(prompt, row[CONTEXT])
        if self.system is None:
            return prompt
        if not isinstance(prompt, list):
            raise InputError("text for a prompt, and teacher_system_prompt needs messages: make it messages")
        rest = [part for part in prompt if not (isinstance(part, Mapping) and part.get("role") == "system")]
        return [{"role": "system", "content": self.system}, *rest]

    def _with_context(self, prompt: Any, context: Any) -> Any:
        if not isinstance(context, str):
            raise InputError(f"{reprlib.repr(context)} for a {CONTEXT}; make it text")
        if isinstance(prompt, str):
            return self._filled(prompt, context)
        *before, last = prompt
        if last["role"] != "user" or not isinstance(last["content"], str):
            raise InputError(f"a last message that is no text of the user's, into which {CONTEXT} could be put")
        return [*before, {**last, "content": self._filled(last["content"], context)}]

    def _filled(self, prompt: str, context: str) -> str:
        # In one pass: neither text is a template, whatever braces it holds.
        values = dict(zip(PLACES, (prompt, context), strict=True))
        return re.sub("|".join(map(re.escape, PLACES)), lambda place: values[place[0]], self.template)
