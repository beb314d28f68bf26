"""Turn after turn: a model writes, its calls are answered, and it goes on, until it asks for nothing.

A row's turns are one completion, as in TRL: the positions of its tokens go on over the tools' answers. The uniforms of
a token belong to its position (`trb.sampling.uniforms`), so that no turn repeats another's, and a row has the same
tokens whatever its batch, the number of processes, or a restart, as long as its tools answer alike. Both models read
the answers; each reads its own prompt before them.

Left out: what a call does (`trb.tools.calls`), and tokens of answers (`trb.tools.chats`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trb.policies import BehaviorPolicy
from trb.sampling import NonFiniteLogitsError, Rollout, sample
from trb.tools.calls import ToolBox
from trb.tools.chats import ToolChat

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["LaterTurns", "ToolSampler", "Turns", "take_turns"]

_ROW_OPTIONS = ("prompts", "policy", "prompt_keys", "rollout_index", "teacher_prompts")


@dataclass
class Turns:
    """Whole completions, the answers of tools among them.

    Attributes:
        completions: token ids per row.
        own: 1 where a token is the model's own, 0 where it is of an answer, per row.
        calls: calls of tools, of all rows.
        failures: those that were answered by an error.
    """

    completions: list[list[int]]
    own: list[list[int]]
    calls: int = 0
    failures: int = 0


@dataclass(frozen=True)
class LaterTurns:
    """Draws what follows after the first turn of some rows, as the first turn was drawn.

    Attributes:
        draw: `trb.sampling.sample` with the models and its options.
        columns: arguments of it with an entry for each row; None for one that is left out.
        longest: of a whole completion.
    """

    draw: Callable[..., Rollout]
    columns: dict[str, Any]
    longest: int

    def __call__(self, rows: Sequence[int], begun: list[list[int]]) -> Rollout:
        chosen = {
            name: None if values is None else [values[row] for row in rows] for name, values in self.columns.items()
        }
        try:
            return self.draw(begun=begun, **chosen)
        except NonFiniteLogitsError as error:
            raise NonFiniteLogitsError(error.model, rows[error.row], error.position) from error


def take_turns(
    rollout: Rollout,
    chat: ToolChat,
    box: ToolBox,
    later: LaterTurns,
    *,
    most: int | None = None,
) -> Turns:
    """Go on from the first turns of some rows until none asks for a tool; `rollout` gets the model's own tokens.

    Args:
        rollout: first turns; it is continued.
        chat: reads calls and writes answers.
        box: answers calls.
        later: draws what follows; an answer that makes a completion longer than its `longest` is left out, and the row
            ends.
        most: rounds of calls; None for as many as there are.
    """
    turns = Turns([list(ids) for ids in rollout.completions], [[1] * len(ids) for ids in rollout.completions])
    newest = {row: (ids, rollout.prompts[row]) for row, ids in enumerate(rollout.completions)}
    rounds = 0
    while newest and (most is None or rounds < most):
        begun = _answered(turns, newest, rollout.stopped, chat, box, later.longest)
        rows = [row for row, ids in begun.items() if len(ids) < later.longest]
        part = later(rows, [begun[row] for row in rows]) if rows else Rollout()
        for row in begun.keys() - set(rows):
            rollout.stopped[row] = False  # the answer leaves no room for more
        rollout.continue_rows(rows, part)
        drawn = dict(zip(rows, part.completions, strict=True))
        for row, ids in begun.items():
            new, answer = drawn.get(row, []), len(ids) - len(turns.completions[row])
            turns.completions[row] = ids + new
            turns.own[row] += [0] * answer + [1] * len(new)
        newest = {row: (new, rollout.prompts[row] + begun[row]) for row, new in drawn.items()}
        rounds += 1
    return turns


def _answered(
    turns: Turns,
    newest: dict[int, tuple[list[int], list[int]]],
    stopped: list[bool],
    chat: ToolChat,
    box: ToolBox,
    longest: int,
) -> dict[int, list[int]]:
    """The completions of the rows that have asked, with the answers; those that get too long have not `stopped`."""
    found = {}
    for row, (ids, prefix) in newest.items():
        # Half a call that was cut asks for nothing: there is no room for an answer either.
        calls = chat.calls(ids, prefix) if stopped[row] else []
        if not calls:
            continue
        answers = [box.answer(call) for call in calls]
        turns.calls += len(answers)
        turns.failures += sum(answer.failed for answer in answers)
        whole = chat.after(turns.completions[row], answers)
        if len(whole) <= longest:
            found[row] = whole
        else:
            stopped[row] = False  # cut: there is no room for the answer
    return found


@dataclass
class ToolSampler:
    """`trb.sampling.sample` with as many turns as the model takes; the completions are its own tokens of all turns.

    Attributes:
        chat, box: as of `take_turns`.
        most: rounds of calls; None for as many as there are.
    """

    chat: ToolChat
    box: ToolBox
    most: int | None = None
    draw: Callable[..., Rollout] = field(default=sample, repr=False)

    @property
    def settings(self) -> dict[str, Any]:
        """What completions depend on beside the models, as JSON types."""
        return {"tools": list(self.box.tools), "tool_characters": self.box.characters, "tool_rounds": self.most}

    def __call__(
        self,
        student: "PreTrainedModel",
        teacher: "PreTrainedModel | None",
        prompts: Sequence[Sequence[int]],
        policy: "BehaviorPolicy | Sequence[BehaviorPolicy]",
        *,
        max_new_tokens: int,
        **options: Any,
    ) -> Rollout:
        rows = {name: options.pop(name, None) for name in _ROW_OPTIONS[2:]}
        policies = list(policy) if isinstance(policy, Sequence) else [policy] * len(prompts)
        columns = {"prompts": list(prompts), "policy": policies, **rows}
        columns["prompt_keys"] = list(range(len(prompts))) if rows["prompt_keys"] is None else rows["prompt_keys"]

        def draw(**row_options: Any) -> Rollout:
            return self.draw(student, teacher, max_new_tokens=max_new_tokens, **options, **row_options)

        rollout = draw(**columns)
        take_turns(rollout, self.chat, self.box, LaterTurns(draw, columns, max_new_tokens), most=self.most)
        return rollout
