"""What `trb init` chooses: lengths, batch, budget and precision of a first recipe, from the pair and the data.

Every value comes with the reason that stands beside it in the file. Prompts are measured with the student's tokenizer,
lengths are held to the positions of both models, and the batch is the largest that the doctor's estimate lets into the
memory that is free here. Left out: writing the file (`trb.cli.init`), and finding out what is best.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

from trb.tasks.sources import GENERATORS, REASONING_GYM, ZOO

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from trb.studies.keys import RunConfig

__all__ = ["Line", "draft"]

STEPS = 100
ROLLOUTS = 4  # of each prompt; the paper's
COLUMNS = ("train_prompt_column", "train_answer_column")
READ = 2000  # prompts whose lengths are measured, of a source that has more
LONGEST_COMPLETION = 512
LORA_RANK = 16
SMALL = 50e6  # parameters of a student, from which memory is saved


class Line(NamedTuple):
    """A key of the recipe, its value, and why."""

    key: str
    value: Any
    why: str = ""


@dataclass(frozen=True)
class _Pair:
    """The models, without their weights."""

    student: "PreTrainedModel"
    teacher: "PreTrainedModel"

    @property
    def positions(self) -> int | None:
        """How many both models have; None if neither has a limit."""
        from trb.models.modeling import position_limit

        return min(filter(None, map(position_limit, (self.student, self.teacher))), default=None)

    @property
    def student_size(self) -> int:
        return self.student.num_parameters()


def draft(run: "RunConfig") -> list[list[Line]]:
    """The lines of a recipe, in paragraphs, for a pair, data, their columns and maybe a rank of adapters.

    Raises what loading the tokenizers, the prompts and the models raises.
    """
    from trb.cli.outline import outlined_pair
    from trb.studies.material import load_tokenizers

    if not load_tokenizers(run)[0].chat_template:
        run.chat_template = "plain"
    tokenizer, _ = load_tokenizers(run)
    pair = _Pair(*outlined_pair(run))
    data, rows = run.train_data, _rows(run)
    models = [
        Line("student", run.student, f"{_in_millions(pair.student_size)} parameters"),
        Line("teacher", run.teacher, f"{_in_millions(pair.teacher.num_parameters())} parameters"),
        *_precision(),
    ]
    if run.chat_template:
        models.append(Line("chat_template", run.chat_template, "the student's tokenizer has none"))
    if run.lora_rank:
        models.append(Line("lora_rank", run.lora_rank, "adapters on the student, in place of all its weights"))
    paragraphs = [models, _data(run, rows, tokenizer, pair), *_training(rows, pair), _evaluation(data, rows)]
    return _fitted(paragraphs, pair)


def _rows(run: "RunConfig") -> "Dataset":
    """The prompts, as many as are read here."""
    from trb.errors import calls
    from trb.studies.material import TRAINING_NAMES
    from trb.tasks.prompts import load_prompts

    with calls(TRAINING_NAMES):
        return load_prompts(
            run.train_data,
            limit=None if run.train_data.startswith(GENERATORS) else READ,
            prompt_column=run.train_prompt_column,
            answer_column=run.train_answer_column,
            # To be measured; the recipe has no such key.
            privileged_column="solution" if run.train_data.startswith(ZOO) else None,
        )


def _in_millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count < 1e9 else f"{count / 1e9:.1f} B"


def _precision() -> list[Line]:
    import torch

    if not (torch.cuda.is_available() and torch.cuda.is_bf16_supported()):
        return []
    return [
        Line("student_dtype", "float32", "master weights; bf16 below computes in half precision"),
        Line("teacher_dtype", "bfloat16", "frozen"),
        Line("bf16", True, "half precision, without its narrow range"),
    ]


# ---- lengths ----


def _data(run: "RunConfig", rows: "Dataset", tokenizer: "PreTrainedTokenizerBase", pair: _Pair) -> list[Line]:
    """The prompts and how long they and their completions may be, within the positions of both models."""
    from trb.tasks.prompts import render

    data = run.train_data
    lengths = [len(ids) for ids in render(tokenizer, rows)]
    wanted, why = _completion_length(data, rows, tokenizer)
    positions = pair.positions or math.inf
    prompt = int(min(_rounded_up(max(lengths)), positions // 2))
    completion = int(min(wanted, positions - prompt))
    if completion < wanted:
        why = f"what {positions} positions leave"
    every = len(rows) < READ
    lines = [Line("train_data", data, f"{len(rows):,} prompts" if every else f"{READ:,} prompts or more")]
    lines += [Line(key, name) for key in COLUMNS if (name := getattr(run, key))]
    if not every:
        lines.append(Line("train_limit", STEPS * _prompts_per_step(rows), f"what {STEPS} steps use"))
    seen = "them" if every else f"{READ:,} of them"
    lines.append(Line("max_prompt_length", prompt, f"the longest of {seen} has {max(lengths)} tokens"))
    # Some tasks of reasoning-gym make other prompts in the next process.
    if not every or max(lengths) > prompt or data.startswith(REASONING_GYM):
        lines.append(Line("overlong_prompts", "drop", "leave longer ones out"))
    return [*lines, Line("max_completion_length", completion, why)]


def _completion_length(data: str, rows: "Dataset", tokenizer: "PreTrainedTokenizerBase") -> tuple[int, str]:
    """How many tokens a completion may have, and why: known where rows have solutions, a guess elsewhere."""
    from trb.models.tokens import token_ids
    from trb.training.privileged import CONTEXT

    if not data.startswith(ZOO):
        return LONGEST_COMPLETION, "raise it if few completions stop by themselves (stop % in the results)"
    longest = max(len(token_ids(tokenizer, solution)) for solution in rows[CONTEXT])
    return _rounded_up(longest * 3 // 2), f"the longest worked solution has {longest} tokens"


def _rounded_up(tokens: int) -> int:
    return -(-tokens // 16) * 16


# ---- method and training ----


def _training(rows: "Dataset", pair: _Pair) -> Iterator[list[Line]]:
    prompts, size = _prompts_per_step(rows), pair.student_size
    yield [
        Line("method", "trb", "opd: plain on-policy distillation; trb train --help-keys has the others"),
        Line("budget_schedule", "sequence-linear", "sets itself; linear: initial_kl_budget, blend_warmup_steps"),
    ]
    checkpointing = "less memory, more time" if size >= SMALL else "nothing to save at this size"
    passes = f"{STEPS * prompts / len(rows):.1f} passes over the prompts" if len(rows) < READ else ""
    yield [
        Line("max_steps", STEPS, passes or "the paper: 400"),
        Line("prompts_per_step", prompts, f"with {ROLLOUTS} rollouts each"),
        Line("num_generations", ROLLOUTS),
        Line("per_device_train_batch_size", None),  # known with everything else
        _learning_rate(size),
        Line("gradient_checkpointing", size >= SMALL, checkpointing),
        Line("logging_steps", 1),
        Line("save_steps", STEPS // 4, "an interrupted run goes on from here"),
        Line("save_total_limit", 1),
    ]


def _learning_rate(size: int) -> Line:
    from trb.training.doubts import safe_rate

    rate = safe_rate(size)
    return Line(
        "learning_rate", rate, "the paper's" if rate == 1e-5 else "a small model learns faster than the paper's 1e-5"
    )


def _prompts_per_step(rows: "Dataset") -> int:
    """A power of two, which batches of 1, 2, 4 ... rollouts divide."""
    return 2 ** int(math.log2(min(16, len(rows))))


def _fitted(paragraphs: list[list[Line]], pair: _Pair) -> list[list[Line]]:
    """The paragraphs with the largest batch that fits; with adapters where no batch does."""
    from trb.studies.recipe import make_recipe
    from trb.studies.shared import trains_own_adapter
    from trb.training.doubts import safe_rate

    values = {line.key: line.value for paragraph in paragraphs for line in paragraph}
    own = trains_own_adapter(make_recipe({**values, "per_device_train_batch_size": 1}).run)
    adapters, batch, why = _batch(values, pair, own)
    found = {"per_device_train_batch_size": Line("per_device_train_batch_size", batch, why)}
    if adapters:
        rate = safe_rate(pair.student_size, adapters=True)
        found["learning_rate"] = Line("learning_rate", rate, "adapters learn at a higher rate than the paper's 1e-5")
        if "lora_rank" not in values and not own:
            why = "training every weight does not fit into the memory here"
            paragraphs[0].append(Line("lora_rank", LORA_RANK, why))
    return [[found.get(line.key, line) for line in paragraph] for paragraph in paragraphs]


def _batch(values: dict[str, Any], pair: _Pair, own: bool) -> tuple[bool, int, str]:
    """(adapters, rollouts at once, why): the first of the candidates that the doctor's estimate lets in; `own` where
    the student is an adapter that is trained as it is, and takes no other."""
    from trb.cli.doctor import Launch, device_bytes, fits, largest_phase
    from trb.studies.material import longest_teacher_prompt
    from trb.studies.recipe import make_recipe

    rollouts = values["prompts_per_step"] * values["num_generations"]
    batches = [2**power for power in range(int(math.log2(rollouts)), -1, -1)]
    first = make_recipe({**values, "per_device_train_batch_size": batches[0]})
    taught = longest_teacher_prompt(first.run, first.training_config("unused"))  # the data are read once for all
    both: dict[str | None, Any] = {None: (pair.student, pair.teacher)}
    asked = values.get("lora_rank", 0)
    for rank in (asked,) if asked or own else (0, LORA_RANK):
        for batch in batches:
            recipe = make_recipe({**values, "per_device_train_batch_size": batch, "lora_rank": rank})
            args = recipe.training_config("unused")
            available = device_bytes(args.device.type)
            try:
                _, parts = largest_phase(recipe.run, args, Launch(), both, available, taught)
            except ValueError:  # models whose layers cannot be told apart
                return own or asked > 0, min(8, rollouts), "a guess: memory cannot be estimated for this model"
            needed = sum(parts.values())
            if fits(needed, available):
                room = f"about {needed / 1e9:.1f} GB of the {available / 1e9:.1f} GB that are free here"
                return own or rank > 0, batch, f"rollouts at once: {room}"
    return True, 1, "too much even so for the memory that is free here: see trb doctor"


# ---- evaluation ----


def _evaluation(data: str, rows: "Dataset") -> list[Line]:
    """Scores where there are other problems of the kind; else the loss on prompts that are set aside."""
    if data.startswith(GENERATORS):
        return [
            Line("eval_data", data, "its test split: other problems"),
            Line("eval_limit", 256),
            Line("eval_every", STEPS // 4),
        ]
    # A prompt is set aside with all its copies, of which there may be many.
    copies = sorted(Counter(json.dumps(prompt) for prompt in rows["prompt"]).values(), reverse=True)
    spare = len(rows) - _prompts_per_step(rows)
    aside = min(32, spare // 4, len(copies) // 4, sum(taken <= spare for taken in accumulate(copies)))
    if aside < 1:
        return []
    return [
        Line("held_out_prompts", aside, "for the loss on prompts that are never trained on; scores need eval_data"),
        Line("held_out_every", STEPS // 4),
    ]
