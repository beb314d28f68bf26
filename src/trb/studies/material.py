"""What a run is made from: models, tokenizers, prompts and problem sets, as its recipe names them.

What is cheap to find wrong comes first. Left out: how each is read and refused (`trb.models`, `trb.tasks`), and
training.
"""

import gc
import json
import random
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trb.errors import InputError, calls
from trb.models.adapters import check_targets
from trb.models.loading import load_model, load_tokenizer, take_template
from trb.models.modeling import has_adapters
from trb.models.sharing import adapter_directory, is_shared, shared_teacher
from trb.records import CONFIG, MODEL, TRAINER_STATE
from trb.safety.templates import CONVERSATIONS, PLAIN_TEMPLATE
from trb.studies.held_out import set_aside, too_few
from trb.studies.keys import RunConfig
from trb.studies.shared import check_shared, doubts_of_base, trains_own_adapter
from trb.studies.yaml_files import ConfigError
from trb.tasks.evaluation import BENCHMARKS, load_benchmark
from trb.tasks.prompts import OVERLONG, check_lengths, load_prompts, render
from trb.tasks.sources import GENERATORS, open_table
from trb.tools import TOOLS
from trb.tools.chats import check_template, training_template
from trb.training import checkpoints, doubts
from trb.training.config import TRBConfig
from trb.training.privileged import COLUMNS, TeacherPrompts
from trb.training.routes import TEACHER_ID, Routes, by_name, named_in_errors, value_for
from trb.training.sharding import loaded_whole
from trb.training.teachers import shared_vocabulary
from trb.vocab import SharedVocabulary, check_same_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "EVALUATION_NAMES",
    "LORA_NAMES",
    "STUDENT_NAMES",
    "TRAINING_NAMES",
    "Material",
    "RunDirectoryError",
    "as_teacher_reads",
    "chat_doubts",
    "data_doubts",
    "free_memory",
    "is_local",
    "load_material",
    "load_pair",
    "load_student",
    "load_teacher",
    "load_tokenizers",
    "longest_teacher_prompt",
    "lora",
    "model_of_run",
    "problem_sets",
    "prompt_doubts",
    "route_doubts",
    "routes_of",
    "template_options",
    "training_prompts",
    "unrouted",
    "with_template_options",
]

# What a recipe calls the arguments of what it is read for.
_TEMPLATE = {"tokenizer.chat_template": "chat_template", "plain=True": "chat_template: plain"}
_TEMPLATES = {
    doubts.TEACHER_TEMPLATE: "chat_template: teacher",
    doubts.STUDENT_TEMPLATE: "chat_template: student",
}
LORA_NAMES = {"peft_config.target_modules": "lora_target_modules"}
STUDENT_NAMES = {"keep_layers": "student_keep_layers"}
_COLUMNS = ("prompt_column", "answer_column", "privileged_column", "assistant_turns")
TRAINING_NAMES = {
    **_TEMPLATE,
    **{name: f"train_{name}" for name in (*_COLUMNS, "revision", "limit", "seed")},
    OVERLONG: "overlong_prompts: drop",
}
EVALUATION_NAMES = {
    **_TEMPLATE,
    **{name: f"eval_{name}" for name in (*_COLUMNS, "limit", "seed", "max_new_tokens")},
    **{"n": "eval_samples", "temperature": "eval_temperature", "results_path": "output directory", "judge": "teacher"},
}


class RunDirectoryError(InputError):
    """An output directory that cannot be used for this run; the message says why and what to do."""


def lora(run: RunConfig, student: PreTrainedModel) -> Any:
    """The adapter to train on a student, or None. Raises ValueError for modules that the student does not have."""
    if not run.lora_rank:
        return None
    from peft import LoraConfig

    with calls(LORA_NAMES):
        check_targets({"target_modules": run.lora_target_modules}, student)
    return LoraConfig(
        r=run.lora_rank,
        lora_alpha=run.lora_alpha,
        lora_dropout=0.0,
        target_modules=run.lora_target_modules,
        task_type="CAUSAL_LM",
    )


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def load_tokenizers(run: RunConfig) -> tuple[PreTrainedTokenizerBase, Any]:
    """The student's tokenizer, with the recipe's chat template, and the teacher's; of several a mapping of names.

    Raises:
        ValueError: a teacher's is another tokenizer.
        RunDirectoryError: one of them lies in a run or a checkpoint that is damaged (`check_seal`).
    """
    if not run.teachers:
        return _tokenizers_of_pair(run)
    teachers: dict[str | None, PreTrainedTokenizerBase] = {}
    for name, pair in run.pairs().items():
        with named_in_errors(name):
            student, teachers[name] = _tokenizers_of_pair(pair)
    return student, teachers


def _tokenizers_of_pair(run: RunConfig) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    check_shared(run)
    shared = is_shared(run.teacher)
    directory = adapter_directory(run.teacher) if shared else None
    for spec in dict.fromkeys((run.student, run.teacher if directory is None else str(directory))):
        check_seal(spec)
    student = load_tokenizer(
        run.student, trust_remote_code=run.student_trust_remote_code, revision=run.student_revision
    )
    role = "student" if shared else "teacher"
    teacher = load_tokenizer(
        getattr(run, role),
        trust_remote_code=getattr(run, f"{role}_trust_remote_code"),
        revision=getattr(run, f"{role}_revision"),
    )
    check_same_tokenizer(student, teacher)
    if run.chat_template == "teacher":
        if not teacher.chat_template:
            raise ConfigError(f"chat_template is 'teacher', and the tokenizer of {run.teacher} has none")
        take_template(student, run.teacher, cast(Any, teacher.chat_template))
    elif run.chat_template not in (None, "student"):
        take_template(student, str(run.chat_template), _template(str(run.chat_template)))
    return student, teacher


def _template(name: str) -> str:
    if name == "plain":
        return PLAIN_TEMPLATE
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(
            f"chat_template is {name!r}, none of student, teacher and plain, and no readable file: {why}"
        ) from error


def model_of_run(spec: str) -> str:
    """The trained model of a run directory; any other spec is itself."""
    model = Path(spec).expanduser() / MODEL
    return spec if not model.is_dir() or (model.parent / "config.json").exists() else str(model)


def check_seal(spec: str) -> None:
    """Compare a run's model, or a checkpoint that is used as a model, with the checksums that the run wrote.

    Raises:
        RunDirectoryError: a file differs.
    """
    path = Path(spec).expanduser()
    # Others may keep a file of this name beside their models.
    if (path.parent / CONFIG).exists():
        wrong = checkpoints.differing(path.parent, of=lambda name: name.startswith(f"{path.name}/"))
    else:
        wrong = {}
    if (path / TRAINER_STATE).exists():
        wrong |= checkpoints.differing(path)
    if wrong:
        raise RunDirectoryError(
            f"{path} is damaged: {'; '.join(wrong.values())}. The command that trained it makes its model again, from "
            "the last whole checkpoint"
        )


def load_student(run: RunConfig, *, for_training: bool = False) -> PreTrainedModel:
    """The student, pruned where the recipe says so. An adapter stays apart from its base, but for training; then too
    where the teacher stands on that base, and it is the adapter that is trained."""
    with calls(STUDENT_NAMES):
        student = load_model(
            run.student,
            dtype=run.student_dtype,
            trust_remote_code=run.student_trust_remote_code,
            revision=run.student_revision,
            keep_layers=run.student_keep_layers,
            merge_adapter=for_training and not any(is_shared(pair.teacher) for pair in run.pairs().values()),
        )
    if for_training and has_adapters(student):
        peft: Any = student
        peft.set_adapter(peft.active_adapter)  # which loading has frozen
    return student


def load_pair(run: RunConfig, *, for_training: bool = False) -> tuple[PreTrainedModel, Any]:
    """The student and the teacher, of several a mapping of names; see `load_student`."""
    student = load_student(run, for_training=for_training)
    if not run.teachers:
        return student, load_teacher(run, student)
    teachers: dict[str | None, PreTrainedModel] = {}
    for name, pair in run.pairs().items():
        with named_in_errors(name):
            teachers[name] = load_teacher(pair, student)
    return student, teachers


def load_teacher(run: RunConfig, student: PreTrainedModel) -> PreTrainedModel:
    """The only teacher; where it stands on the student's weights, on those of a student that is loaded."""
    if is_shared(run.teacher):
        return shared_teacher(student, run.teacher)
    return load_model(
        run.teacher,
        dtype=run.teacher_dtype,
        trust_remote_code=run.teacher_trust_remote_code,
        revision=run.teacher_revision,
        quantization=run.teacher_quantization,
    )


@dataclass
class Material:
    """What a run is made of, checked against each other; of several teachers there are mappings of names."""

    tokenizer: PreTrainedTokenizerBase
    teacher_tokenizer: Any
    prompts: "Dataset"
    held_out: "Dataset | None"
    problems: dict[str, "Dataset"]
    student: PreTrainedModel
    teacher: Any
    vocabulary: SharedVocabulary


def load_material(run: RunConfig, args: TRBConfig, *, doubtful: bool = True) -> Material:
    """Load everything, what is cheap to find wrong first; `doubtful` warns of what is probably not meant."""
    tokenizer, teacher_tokenizer = load_tokenizers(run)
    prompts, held_out = training_prompts(run, args, tokenizer)
    problems = problem_sets(run, args)
    with loaded_whole(args):
        student, teacher = load_pair(run, for_training=True)
    vocabulary = shared_vocabulary(student, tokenizer, by_name(teacher), by_name(teacher_tokenizer))
    if args.process_index == 0 and doubtful:
        same = None if TeacherPrompts.of(prompts.column_names, args) is None else False
        for name, pair in run.pairs().items():
            its = value_for(name, teacher)
            doubts.warn(doubts.of_pair(student, its, same=same, name=name))
            doubts.warn(doubts_of_base(pair))
            doubts.warn(doubts.of_lengths(args, student, its, run.max_prompt_length, run.eval_max_new_tokens))
            doubts.warn(chat_doubts(run, args, tokenizer, value_for(name, teacher_tokenizer), prompts))
        doubts.warn(doubts.of_rate(args, student, adapters=bool(run.lora_rank) or trains_own_adapter(run)))
        doubts.warn(data_doubts(run))
        doubts.warn(prompt_doubts(prompts, tokenizer, args))
        doubts.warn(route_doubts(run, args, prompts, problems))
    return Material(tokenizer, teacher_tokenizer, prompts, held_out, problems, student, teacher, vocabulary)


def chat_doubts(
    run: RunConfig,
    args: TRBConfig,
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    prompts: "Dataset | None",
) -> Iterator[doubts.Doubt]:
    """What is to be said of two chat templates, none of which was chosen; on some of the prompts, if they are known."""
    if run.chat_template is None:
        some = (
            CONVERSATIONS if prompts is None else [row["prompt"] for row in prompts.select(range(min(3, len(prompts))))]
        )
        with calls(_TEMPLATES):
            yield from doubts.of_chats(tokenizer, teacher_tokenizer, some, template_options(args))


def data_doubts(run: RunConfig) -> Iterator[doubts.Doubt]:
    """What is to be said of a file that is trained on and scored on; generated tasks draw from splits of their own."""
    trained = Path(run.train_data).expanduser()
    for name in run.eval_data:
        scored = Path(name).expanduser()
        if trained.is_file() and scored.is_file() and trained.samefile(scored):
            yield doubts.Doubt(
                "eval_data",
                f"{name} is also what is trained on (train_data): its scores say nothing of problems that are new",
                "Set some of its rows aside, in a file of their own",
            )


def prompt_doubts(prompts: "Dataset", tokenizer: PreTrainedTokenizerBase, args: TRBConfig) -> Iterator[doubts.Doubt]:
    """What is to be said of prompts: characters that the tokenizer does not know, chats that are rendered already."""
    yield from doubts.of_rendered([row["prompt"] for row in prompts], tokenizer)
    unknown = doubts.unknown_id(tokenizer)
    if unknown is not None:
        read = render(tokenizer, prompts, **template_options(args, tokenizer))
        rows = [row for row, ids in enumerate(read) if unknown in ids]
        yield from doubts.of_unknown(rows, len(prompts), tokenizer)


def routes_of(run: RunConfig, args: Any) -> Routes | None:
    """Whose each row is, by the options of a `TRBConfig`; None where there is one teacher."""
    return Routes(args.teacher_column or TEACHER_ID, tuple(run.teachers)) if run.teachers else None


def route_doubts(
    run: RunConfig, args: TRBConfig, prompts: "Dataset", problems: Mapping[str, "Dataset"]
) -> Iterator[doubts.Doubt]:
    """What is to be said of several teachers: those without a row, and problem sets that name none."""
    routes = routes_of(run, args)
    if routes is None:
        return
    yield from doubts.of_unused(routes.unused(routes.check(prompts, run.train_data)), run.train_data)
    yield from unrouted(routes, problems)


def unrouted(routes: Routes, problems: Mapping[str, "Dataset"]) -> Iterator[doubts.Doubt]:
    """Problem sets that do not say whose their rows are."""
    for name, rows in problems.items():
        if routes.column not in rows.column_names:
            text = f"{name} has no column {routes.column!r}, so that no teacher is scored on it or has it in its mean"
            yield doubts.Doubt("teachers", text, "Add the column to have them scored; the student is, as it stands")


def is_local(spec: str) -> bool:
    """Whether data can be read without asking the hub: generated, a file or a folder."""
    return spec.startswith(GENERATORS) or Path(spec).expanduser().exists()


def training_prompts(
    run: RunConfig, args: TRBConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple["Dataset", "Dataset | None"]:
    """The prompts to train on, and those held out to measure the loss on."""
    if args.tools:
        check_template(tokenizer)
    with calls(TRAINING_NAMES):
        prompts = load_prompts(
            run.train_data,
            split=run.train_split,
            limit=run.train_limit,
            seed=run.train_seed,
            system_prompt=run.system_message,
            prompt_column=run.train_prompt_column,
            answer_column=run.train_answer_column,
            privileged_column=run.train_privileged_column,
            assistant_turns=run.train_assistant_turns,
            routes=routes_of(run, args),
            revision=run.train_revision,
        )
        longest, options, read = run.max_prompt_length, template_options(args, tokenizer), len(prompts)
        prompts = check_lengths(prompts, tokenizer, longest, run.overlong_prompts, **options)
    needed = args.completions_per_step // args.num_generations
    more = "raise train_limit" if read == run.train_limit else "add prompts"
    if len(prompts) - run.held_out_prompts < needed:
        raise ConfigError(too_few(run, read, len(prompts), needed, more))
    if not run.held_out_prompts:
        return prompts, None
    kept, held_out = set_aside(prompts, run, more)
    if len(kept) < needed:
        raise ConfigError(
            f"{run.held_out_prompts} prompts are held out of {run.train_data}, with their copies and with all turns of "
            f"their conversations: {len(kept)} prompts are left for the {needed} of one optimizer step; {more}, or "
            "lower held_out_prompts"
        )
    return prompts.select(kept), prompts.select(held_out)


def problem_sets(run: RunConfig, args: Any = None) -> dict[str, "Dataset"]:
    """The problems of every entry of `eval_data`, by its name.

    With the options of a `TRBConfig` those of several teachers keep the column that says whose each is, where the data
    has it.
    """
    routes = None if args is None else routes_of(run, args)
    with calls(EVALUATION_NAMES):
        return {name: _problems(name, run, routes) for name in run.eval_data}


def _problems(name: str, run: RunConfig, routes: Routes | None) -> "Dataset":
    benchmark, _, path = name.partition("=")
    if benchmark not in BENCHMARKS:
        return load_prompts(
            name,
            split=run.eval_split,
            limit=run.eval_limit,
            seed=run.eval_seed,
            system_prompt=run.system_message,
            prompt_column=run.eval_prompt_column,
            answer_column=run.eval_answer_column,
            privileged_column=run.eval_privileged_column,
            assistant_turns=run.eval_assistant_turns,
            routes=None if routes is None else replace(routes, required=False),
        )
    problems = load_benchmark(benchmark, path or None)
    if run.eval_limit is None or run.eval_limit >= len(problems):
        return problems
    return problems.select(sorted(random.Random(run.eval_seed).sample(range(len(problems)), run.eval_limit)))


def as_teacher_reads(problems: Mapping[str, "Dataset"], args: Any) -> dict[str, Any]:
    """Problem sets with the teacher's own prompts, where they have any, by the options of a `TRBConfig`."""
    found: dict[str, Any] = {}
    for name, rows in problems.items():
        made = TeacherPrompts.of(rows.column_names, args, name)
        prompts = None if made is None else made.of_rows(rows, name)
        found[name] = rows if prompts is None else _with_prompts(rows, prompts)
    return found


def _with_prompts(rows: "Dataset", prompts: list[Any]) -> list[dict[str, Any]]:
    return [{**row, "prompt": prompt} for row, prompt in zip(rows, prompts, strict=True)]


def longest_teacher_prompt(run: RunConfig, args: TRBConfig) -> int | None:
    """Tokens of the longest prompt that the teacher reads for itself; None where it reads the student's, and of data
    that cannot be read here, or not before they are downloaded."""
    asked = run.train_privileged_column or args.teacher_system_prompt
    if not is_local(run.train_data) or (run.train_data.startswith(GENERATORS) and not asked):
        return None
    try:
        if not asked and not {*COLUMNS} & {*open_table(run.train_data, run.train_split, None).columns}:
            return None
        tokenizer, _ = load_tokenizers(run)
        prompts, _ = training_prompts(run, args, tokenizer)
        (rows,) = as_teacher_reads({run.train_data: prompts}, args).values()
        return None if rows is prompts else max(map(len, render(tokenizer, rows, **template_options(args, tokenizer))))
    except (ValueError, OSError, ImportError):
        return None  # whoever begins a run says why


def template_options(args: TRBConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> dict[str, Any]:
    """Keyword arguments of the chat template, the tools that it describes among them; of a tokenizer, also the template
    that prompts are rendered with in training, where tools make that another one."""
    given = args.chat_template_kwargs or {}
    options = dict(given) if isinstance(given, dict) else json.loads(given)
    if not args.tools:
        return options
    template = None if tokenizer is None else training_template(tokenizer)
    if template is not None:
        options["chat_template"] = template
    return {**options, "tools": [TOOLS[name] for name in args.tools]}


def with_template_options(tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    """A tokenizer whose chat template gets `options`, as the trainer's does."""
    if not options:
        return tokenizer
    tokenizer = copy(tokenizer)
    tokenizer.apply_chat_template = partial(tokenizer.apply_chat_template, **options)  # type: ignore[method-assign]
    return tokenizer
