"""Which prompts a step has, in which order, and whether they can be trained on.

Seams of TRL:
- `_get_train_sampler` yields each generation batch `gradient_accumulation_steps` times; it is replaced, because each
  prompt has several rollouts and a resumed run must have the order of its epoch;
- `RepeatSampler` is built by `__init__` with one generator, from which each `__iter__` takes a permutation;
- `_tokenize_prompts(prompts)` returns token ids, images and multimodal fields of a batch of prompts;
- `_set_signature_columns_if_needed` says which columns `remove_unused_columns` leaves.

Left out: where prompts come from and how they are rendered (`trb.tasks.prompts`), and what is drawn after them.
"""

import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from functools import partial
from typing import Any, TypeAlias, cast

import torch
from datasets import IterableDataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler
from trl import DistillationTrainer
from trl.trainer.utils import RepeatSampler

from trb.errors import InputError
from trb.models.chats import fault_of, rendered_ids, rendered_text
from trb.models.modeling import position_limit, without_adapters
from trb.models.tokens import check_not_empty, check_room, token_ids
from trb.training import doubts
from trb.training.arguments import named_datasets
from trb.training.config import TRBConfig
from trb.training.privileged import COLUMNS, CONTEXT, WHOLE, TeacherPrompts
from trb.training.ranks import Ranks
from trb.training.routes import Routes
from trb.training.teachers import Teacher

__all__ = ["PromptsInOrder"]

# Prompts handed to the tokenizer at once when they are measured.
_TOKENIZED_AT_ONCE = 1024


class PromptsInOrder(DistillationTrainer):
    """The part of `TRBTrainer` that repeats, orders and checks prompts."""

    args: TRBConfig
    model: Any
    teachers: list[Teacher]
    _routes: Routes | None
    _ranks: Ranks
    _teacher_prompts_of: TeacherPrompts | None = None
    _teacher_prompts: list[list[int]] | None = None  # of the rows that are being drawn, where the teacher has its own
    doubts_said: bool = False  # set by whoever has said before what `trb.training.doubts` would
    _prompts_checked: bool = False
    _epoch: int = 0  # as transformers counts them: also after one that a callback has cut short

    def _get_train_sampler(self, dataset: Any = None) -> Sampler:
        return _EpochSampler(
            epoch=lambda: self._epoch,
            data_source=cast(Sized, self.train_dataset if dataset is None else dataset),
            mini_repeat_count=self.args.num_generations,
            batch_size=self.args.completions_per_step // self.args.num_generations,
            repeat_count=self.args.gradient_accumulation_steps,
            shuffle=bool(self.shuffle_dataset),
            seed=self.args.seed,
        )

    def check_prompts(self) -> None:
        """Refuse prompts that would end the run later: fewer than one step needs, too long for a model, of no
        token, or no prompts.

        `train` begins with it. Prompts for training and evaluation are tokenised as they will be sampled from, once.
        What can hardly be meant is warned about (`trb.training.doubts`).

        Raises:
            ValueError: names the dataset and the numbers, or the row.
        """
        if self._prompts_checked:
            return
        if self.train_dataset is None:
            raise InputError('train_dataset is missing: pass prompts to train on, a dataset with a column "prompt"')
        args, rows = self.args, len(cast(Sized, self.train_dataset))
        needed = args.completions_per_step // args.num_generations
        if rows < needed:
            raise InputError(
                f"train_dataset has {rows} prompts, fewer than the {needed} of one optimizer step: "
                f"per_device_train_batch_size={args.per_device_train_batch_size} x {self.accelerator.num_processes} "
                f"processes x gradient_accumulation_steps={args.gradient_accumulation_steps} completions, "
                f"num_generations={args.num_generations} of each prompt. Add prompts, or lower one of the first two"
            )
        for name, dataset in named_datasets(self.train_dataset, self.eval_dataset):
            if not isinstance(dataset, IterableDataset):
                self._ranks.from_first(partial(self._check_rows, name, dataset))
        if not self.doubts_said:
            self._ranks.from_first(lambda: doubts.warn(self._doubts(rows)))
        self._prompts_checked = True

    def _doubts(self, rows: int) -> Iterator[doubts.Doubt]:
        args = self.args
        yield from doubts.of_settings(args, doubts.steps_of(args, rows))
        yield from doubts.of_unread(args)
        same = None if self._teacher_prompts_of is None else False  # one model after two prompts is two laws
        for teacher in self.teachers:
            bare = without_adapters(self.accelerator.unwrap_model(teacher.model))
            yield from doubts.of_pair(without_adapters(self.model), bare, same=same, name=teacher.name)
        if self._routes is not None:
            used = self._routes.check(self.train_dataset, "train_dataset")
            yield from doubts.of_unused(self._routes.unused(used), "train_dataset")
        yield from self._chat_doubts()
        if self.optimizer is None:  # one that was passed has a rate of its own
            yield from doubts.of_rate(args, without_adapters(self.model), adapters=doubts.trains_adapters(self.model))

    def _chat_doubts(self) -> Iterator[doubts.Doubt]:
        rows = cast(Any, self.train_dataset)  # by number, which all map-style data knows
        some = [rows[row]["prompt"] for row in range(min(3, len(rows)))]
        some = [prompt for prompt in some if not isinstance(prompt, str)]
        options = cast(dict, self.chat_template_kwargs)
        for teacher in self.teachers:
            if teacher.tokenizer is not None:
                yield from doubts.of_chats(self._tokenizer, teacher.tokenizer, some, options)

    def _check_rows(self, name: str, dataset: Any) -> None:
        limits = _positions("student", self.model)
        if self.use_vllm:
            limits["vLLM (vllm_max_model_length)"] = self.args.vllm_max_model_length
        unknown = None if self.doubts_said or name != "train_dataset" else doubts.unknown_id(self._tokenizer)
        rows = [dataset[row] for row in range(len(dataset))]
        prompts = [row["prompt"] for row in rows]
        _check_kinds(name, prompts)
        if not self.doubts_said and name == "train_dataset" and not isinstance(prompts[0], str):
            doubts.warn(doubts.of_rendered(prompts, self._tokenizer))
        taught = self._teachers_limits(rows, name)
        read: list[_Bound] = [(limits | its, mine) for its, mine in taught]
        if self._teacher_prompts_of is not None:
            if self._teacher_prompts_of.column == CONTEXT:
                self._check_filled(name, prompts)
            own = self._teacher_prompts_of.of_rows(rows, name)
            _check_kinds(f"the teacher's prompt of {name}", own, like=prompts[:1])
            self._check_lengths(f"the teacher's prompt of {name}", own, taught, None)
            read = [(limits, [True] * len(rows))]
        strange = self._check_lengths(name, prompts, read, unknown)
        doubts.warn(doubts.of_unknown(strange, len(prompts), self._tokenizer))

    def _teachers_limits(self, rows: Sequence[Mapping[str, Any]], name: str) -> "list[_Bound]":
        """What each teacher can read, and which rows are its."""
        whose = [0] * len(rows) if self._routes is None else self._routes.of_rows(rows, name)
        found = []
        for number, teacher in enumerate(self.teachers):
            role = "teacher" if teacher.name is None else f"teacher {teacher.name!r}"
            limits = _positions(role, self.accelerator.unwrap_model(teacher.model))
            found.append((limits, [place == number for place in whose]))
        return found

    def _check_filled(self, name: str, prompts: Sequence[Any]) -> None:
        """Refuse chats that are text already where something is to be put into them for the teacher."""
        for row, chat in enumerate(prompts):
            if not isinstance(chat, str) and rendered_text(self._tokenizer, chat) is not None:
                raise InputError(
                    f"{name}[{row}] was rendered already, so that no {CONTEXT} can be put into it: give messages, or "
                    f"all that the teacher reads in a column {WHOLE}"
                )

    def _check_lengths(
        self, name: str, prompts: list[Any], bounds: "Sequence[_Bound]", unknown: int | None
    ) -> list[int]:
        """Refuse prompts of no token, and those that leave no room; which of them have the unknown id."""
        chunks = (prompts[start : start + _TOKENIZED_AT_ONCE] for start in range(0, len(prompts), _TOKENIZED_AT_ONCE))
        found = [(len(ids), unknown in ids) for chunk in chunks for ids in self._tokenize_prompts(chunk)[0]]
        check_not_empty([length for length, _ in found], lambda row: f"{name}[{row}]")
        for limits, bound in bounds:
            lengths = [length if theirs else 0 for (length, _), theirs in zip(found, bound, strict=True)]
            check_room(lengths, name, int(self.max_completion_length or 0), limits, knob="max_completion_length")
        return [row for row, (_, is_strange) in enumerate(found) if is_strange]

    def _read_by_teacher(self, rows: Sequence[Mapping[str, Any]]) -> list[list[int]] | None:
        """Token ids of the teacher's own prompts of some rows; None where it reads the student's."""
        if self._teacher_prompts_of is None or not rows:
            return None
        return self._tokenize_prompts(self._teacher_prompts_of.of_rows(rows, "the batch"))[0]

    def _padded_teacher_prompts(self) -> dict[str, Tensor]:
        """The teacher's own prompts as the parent has the student's, for it to shuffle and split with them."""
        if self._teacher_prompts is None:
            return {}
        rows, device = [torch.tensor(ids) for ids in self._teacher_prompts], self.accelerator.device
        ids_BP = pad_sequence(rows, batch_first=True, padding_value=self._tokenizer.pad_token_id, padding_side="left")
        mask_BP = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
        return {"teacher_prompt_ids": ids_BP.to(device), "teacher_prompt_mask": mask_BP.to(device)}

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = cast(list[str], self._signature_columns)
        routes = [] if self._routes is None else [self._routes.column]
        self._signature_columns: Any = list(dict.fromkeys([*columns, *COLUMNS, *routes]))

    def _tokenize_prompts(self, prompts: list) -> tuple[list[list[int]], Any, dict[str, Any]]:
        if isinstance(prompts[0], str):
            return [token_ids(self._tokenizer, text) for text in prompts], None, {}
        known = [rendered_ids(self._tokenizer, prompt) for prompt in prompts]
        rest = [prompt for prompt, ids in zip(prompts, known, strict=True) if ids is None]
        if not rest:
            return cast(list[list[int]], known), None, {}
        found, images, fields = super()._tokenize_prompts(rest)
        others = iter(found)
        return [next(others) if ids is None else ids for ids in known], images, fields


_Bound: TypeAlias = tuple[dict[str, int | None], list[bool]]
"""Tokens that a sequence may have at most, by what limits it, and which rows it limits."""


def _positions(role: str, model: Any) -> dict[str, int | None]:
    return {f"the {role} ({type(without_adapters(model)).__name__})": position_limit(model)}


def _check_kinds(name: str, prompts: Sequence[Any], like: Sequence[Any] = ()) -> None:
    """Refuse rows that are neither text nor messages, messages that a template would write wrongly, and rows of both
    kinds, which are tokenised together; and of another kind than those that they go with."""
    for row, prompt in enumerate(prompts):
        if _kind(prompt) is None:
            raise InputError(
                f"{name}[{row}] has {reprlib.repr(prompt)} for a prompt; make it text, or a list of messages with role "
                "and content"
            )
        if _kind(prompt) != _kind(prompts[0]):
            raise InputError(
                f"{name}[{row}] is {_kind(prompt)}, and the rows before it are {_kind(prompts[0])}; make all alike"
            )
        for number, message in enumerate(() if isinstance(prompt, str) else prompt, start=1):
            if (fault := fault_of(message)) is not None:
                raise InputError(f"message {number} of {name}[{row}] {fault}")
    if [*map(_kind, like)] != [*map(_kind, prompts[: len(like)])]:
        raise InputError(f"{name}[0] is {_kind(prompts[0])}, and the student's is {_kind(like[0])}; make both alike")


def _kind(prompt: Any) -> str | None:
    if isinstance(prompt, str):
        return "text" if prompt else None
    if not isinstance(prompt, list) or not prompt:
        return None
    for part in prompt:
        if not isinstance(part, Mapping) or part.get("role") is None or part.get("content") is None:
            return None
    return "a list of messages"


class _EpochSampler(RepeatSampler):
    """TRL's order of prompts, as a function of seed and epoch: a run that starts in its third epoch has the third's."""

    def __init__(self, *, epoch: Callable[[], int], **options: Any) -> None:
        super().__init__(**options)
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed(cast(int, self.seed))
            for _ in range(self._epoch()):  # the permutations of the epochs before
                torch.randperm(self.num_samples, generator=self.generator)
        return super().__iter__()
