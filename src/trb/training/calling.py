"""Tools in training: the turns after the first, and which tokens are the model's own.

Seams of TRL: `_generate` draws first turns and reads the calls in them, which ends the run where its parser fails on
what a model wrote; it is given a tokenizer that reads no calls there. `_tool_call_loop` comes after the first turn,
with those calls, and returns what the loss leaves out; it is replaced, as TRL's tells the next turn nothing of which
row it goes on with. Its order, its texts, and what it does with answers that are too long are kept.

Left out: turns themselves (`trb.tools`), and TRL's own checks of tools and chat templates, which its constructor makes.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor
from trl import DistillationTrainer

from trb.sampling import Rollout
from trb.tools.calls import ToolBox
from trb.tools.chats import ToolChat, unfailing_reader
from trb.tools.turns import LaterTurns, Turns, take_turns
from trb.training.config import TRBConfig
from trb.vocab import SharedVocabulary

__all__ = ["CallingTrainer", "own_tokens"]


def own_tokens(inputs: Mapping[str, Tensor]) -> Tensor:
    """`[B, T]` 1 at the tokens of completions that a model wrote: the answers of tools are none of its own."""
    own_BT = inputs["completion_mask"]
    return own_BT * inputs["tool_mask"] if "tool_mask" in inputs else own_BT


class CallingTrainer(DistillationTrainer):
    """The part of `TRBTrainer` that goes on after calls of tools."""

    args: TRBConfig
    vocabulary: SharedVocabulary
    _rollout: Rollout | None
    _turns: Turns | None = None  # of the step's rollouts, where there are tools
    _later_turns: LaterTurns | None = None
    _tool_box: ToolBox | None = None

    def tool_chat(self) -> ToolChat:
        """How the tokenizer reads calls and writes answers."""
        options = cast(dict, self.chat_template_kwargs)
        return ToolChat(self._tokenizer, self.chat_template, self.tools, self.vocabulary.stop_ids, options)

    def _whole_completions(self, rollout: Rollout) -> list[list[int]]:
        """The completions of a rollout with the answers of tools."""
        return rollout.completions if self._turns is None else self._turns.completions

    def _among_answers(self, row: int, values: Sequence[Any]) -> list[Any]:
        """A number for each of the row's own tokens, with None for those of answers."""
        if self._turns is None or not values:
            return list(values)
        of_own = iter(values)
        return [next(of_own) if ours else None for ours in self._turns.own[row]]

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        if not self.tools:
            return super()._generate(prompts)
        own, self._tokenizer = self._tokenizer, unfailing_reader(self._tokenizer)
        try:
            return super()._generate(prompts)
        finally:
            self._tokenizer = own

    def _tool_call_loop(
        self, prompts: Any, prompt_ids: Any, completion_ids: Any, completions: Any, images: Any, multimodal_fields: Any
    ) -> tuple[Any, ...]:
        assert self._rollout is not None and self._later_turns is not None  # of the first turn
        if self._tool_box is None:
            tools = {tool.__name__: tool for tool in self.tools}
            self._tool_box = ToolBox(tools, self.args.tool_timeout, self.args.tool_max_characters)
        with self.compute_loss_context_manager():
            turns = self._turns = take_turns(
                self._rollout,
                self.tool_chat(),
                self._tool_box,
                self._later_turns,
                most=self.args.max_tool_calling_iterations,
            )
        self._later_turns = None
        return turns.own, completions, turns.completions, turns.calls, turns.failures, [[] for _ in prompt_ids]
