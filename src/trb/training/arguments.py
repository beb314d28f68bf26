"""What a trainer is constructed with: refused here where it would be ignored or fail later, before a model is loaded.

Left out: options that are refused whatever they come with (`trb.training.config`), and what the models and tokenizers
themselves tell (`trb.training.pair`).
"""

import inspect
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias, cast

from datasets import IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from transformers.training_args import ParallelMode
from transformers.utils import get_json_schema
from trl.trainer.utils import get_config_model_id

from trb.errors import InputError, did_you_mean
from trb.models.adapters import check_targets
from trb.models.modeling import check_adapter, has_adapters
from trb.models.sharing import is_shared, shares_weights
from trb.schedule import Constant
from trb.tools import TOOLS
from trb.training.config import TRBConfig, largest_divisor
from trb.training.methods import behavior_of, needs_teacher, pair_of
from trb.training.privileged import COLUMNS, TeacherPrompts
from trb.training.routes import TEACHER_ID, Routes, by_name, named_in_errors

__all__ = [
    "TeacherArgument",
    "check_arguments",
    "chosen_teacher",
    "chosen_tools",
    "complete_config",
    "named_datasets",
    "teacher_prompts",
    "teacher_routes",
]

# Arguments of TRL's constructor that are not TRBTrainer's own.
_PASSED_ON = {"callbacks", "optimizers", "quantization_config", "peft_config", "tools"}
# TRBTrainer's own, and what they are called elsewhere.
_OWN = (
    *("model", "teacher_model", "args", "train_dataset", "eval_dataset", "processing_class"),
    *("teacher_processing_class", "reward_fn"),
)
_REWARDS = "reward_fn takes one function of (completions, rows), whose rewards are logged and never trained on"
_ELSEWHERE = {
    "reward_funcs": _REWARDS,
    "compute_metrics": _REWARDS,
    "tokenizer": "pass it as processing_class",
    "teacher_tokenizer": "pass it as teacher_processing_class",
    "teacher": "pass it as teacher_model",
    "student": "pass it as model",
}
_IMAGES = ("image", "images")
_CONVERSATIONS = ("messages", "conversations")  # columns of whole ones, as others call them


def complete_config(args: Any, model: str | PreTrainedModel) -> TRBConfig:
    """The configuration, or the defaults where it was left out; as in TRL, the directory has the student's name."""
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        return TRBConfig(f"{Path(name or 'student').name}-TRB")
    if not isinstance(args, TRBConfig):
        raise InputError(
            f"args is a {type(args).__name__}: pass a TRBConfig, which has all options of DistillationConfig"
        )
    return args


TeacherArgument: TypeAlias = str | PreTrainedModel | Mapping[str, str | PreTrainedModel]


def chosen_teacher(teacher_model: TeacherArgument | None, args: TRBConfig) -> TeacherArgument:
    """The teacher that was passed, or that the configuration names; or teachers by name."""
    named = args.teacher_model_name_or_path
    if teacher_model is None:
        if named is None:
            raise InputError("teacher_model is missing: pass a path, a hub id or a loaded model")
        return named
    if isinstance(teacher_model, Mapping):
        _check_names(teacher_model, args)
    if isinstance(teacher_model, str | Mapping) and named not in (None, teacher_model):
        raise InputError(
            f"teacher_model={teacher_model!r} and teacher_model_name_or_path={named!r} are two teachers: give one"
        )
    return teacher_model


def _check_names(teachers: Mapping[Any, Any], args: TRBConfig) -> None:
    if not teachers:
        raise InputError("teacher_model is an empty mapping: name at least one teacher")
    for name in teachers:
        if not isinstance(name, str) or not name:
            raise InputError(
                f"teacher_model has a teacher called {name!r}: names are text, as in the column of the data"
            )
    for option in ("teacher_model_revision", "teacher_model_init_kwargs"):
        if getattr(args, option) is not None:
            raise InputError(
                f"{option}={getattr(args, option)!r} is for one teacher, and there are {', '.join(teachers)}: pass "
                "models that are loaded as each is to be"
            )


def check_arguments(
    args: TRBConfig,
    *,
    model: str | PreTrainedModel,
    teacher_model: TeacherArgument,
    train_dataset: Any,
    eval_dataset: Any,
    processing_class: Any,
    teacher_processing_class: Any,
    reward_fn: Any,
    others: Mapping[str, Any],
) -> None:
    """Refuse what cannot be trained with. `others` are the arguments that TRL's constructor gets as they are.

    Raises:
        ValueError: names the argument and what to pass instead.
    """
    _check_tokenizer("processing_class", processing_class, "")
    if isinstance(teacher_processing_class, Mapping) and not isinstance(teacher_model, Mapping):
        raise InputError("teacher_processing_class is a mapping, and there is one teacher: pass its tokenizer")
    for tokenizer in by_name(teacher_processing_class).values():
        _check_tokenizer("teacher_processing_class", tokenizer, "; pass callbacks by name, callbacks=[...]")
    if reward_fn is not None and not callable(reward_fn):
        raise InputError(
            f"reward_fn is a {type(reward_fn).__name__} and no function; pass optimizers by name, optimizers=(...)"
        )
    if inspect.iscoroutinefunction(reward_fn):
        raise InputError("reward_fn is asynchronous: wrap it in a function that waits for it")
    if "environment_factory" in others:
        raise InputError(
            "TRBTrainer takes no environment_factory, as TRL's DistillationTrainer takes none: pass functions, or the "
            "methods of one environment, as tools"
        )
    if unknown := sorted(others.keys() - _PASSED_ON):
        first = unknown[0]
        hint = f": {_ELSEWHERE[first]}" if first in _ELSEWHERE else did_you_mean(first, {*_OWN, *_PASSED_ON})
        raise InputError(
            f"TRBTrainer takes no argument {first!r}{hint} (by name it passes on {', '.join(sorted(_PASSED_ON))})"
        )
    _check_passed_on(others)
    _check_directory(args)
    datasets = [*named_datasets(train_dataset, eval_dataset)]
    for data, rows in datasets:
        _check_rows(data, rows)
    if chosen_tools(others.get("tools"), args):
        _check_tools(args, train_dataset, eval_dataset)
    if others.get("peft_config") is not None:
        _check_adapter(others["peft_config"], model)
    loading = {"model_init_kwargs": args.model_init_kwargs, "quantization_config": others.get("quantization_config")}
    _check_loading("model", model, loading)
    names = ("teacher_model_init_kwargs", "teacher_model_revision")
    for name, teacher in by_name(teacher_model).items():
        with named_in_errors(name):
            _check_loading("teacher_model", teacher, {name: getattr(args, name) for name in names})
            _check_shared(args, model, teacher, adapters=others.get("peft_config") is not None)
    _check_batch(args)
    if args.fsdp and args.parallel_mode is not ParallelMode.DISTRIBUTED:
        raise InputError(
            f"fsdp={args.fsdp!r} shards a model among the processes of a launch, and this is none: leave it out, or "
            "launch several (docs/distributed.md)"
        )
    for data, rows in datasets:
        _check_columns(data, rows)


def _check_passed_on(others: Mapping[str, Any]) -> None:
    """Refuse what TRL's constructor would add up or take apart, and fail at."""
    callbacks, optimizers = others.get("callbacks"), others.get("optimizers", (None, None))
    if callbacks is not None and not isinstance(callbacks, list):
        one = isinstance(callbacks, TrainerCallback)
        remedy = "pass it in a list, callbacks=[...]" if one else "pass a list of callbacks"
        raise InputError(f"callbacks is a {type(callbacks).__name__}: {remedy}")
    for callback in callbacks or ():
        kind = callback if isinstance(callback, type) else type(callback)
        if not issubclass(kind, TrainerCallback):
            raise InputError(f"callbacks has a {kind.__name__}, which is no TrainerCallback of transformers")
    if not isinstance(optimizers, tuple | list) or len(optimizers) != 2:
        raise InputError(
            f"optimizers is a {type(optimizers).__name__} ({reprlib.repr(optimizers)}): pass an optimizer and its "
            "schedule, optimizers=(optimizer, schedule), with None for a schedule that the options are to make"
        )


def _check_adapter(adapter: Any, model: str | PreTrainedModel) -> None:
    """Refuse what PEFT makes no adapter of that is trained as it says; of a model by name once that is loaded."""
    if not hasattr(adapter, "peft_type"):
        raise InputError(f"peft_config is a {type(adapter).__name__}: pass a configuration of PEFT's, as LoraConfig is")
    check_adapter(adapter)
    if not isinstance(model, str):
        check_targets(vars(adapter), model)


def _check_directory(args: TRBConfig) -> None:
    """Refuse an output directory that cannot be made, as a file is in its place or above it."""
    directory = Path(str(args.output_dir))
    for path in (directory, *directory.parents):
        if path.exists() and not path.is_dir():
            raise InputError(f"output_dir is {str(directory)!r}, and {path} is a file: name another directory")


def chosen_tools(tools: Any, args: TRBConfig) -> list[Callable[..., Any]] | None:
    """The functions that were passed, or those that the configuration names.

    Raises:
        ValueError: both, or something else than functions that can be described to a model, each by a name of its own.
    """
    if tools is None:
        return None if args.tools is None else [TOOLS[name] for name in args.tools]
    if args.tools:
        raise InputError(f"tools are passed, and the configuration has tools={args.tools!r}: give one of the two")
    if not isinstance(tools, list):
        raise InputError(f"tools is a {type(tools).__name__}: pass a list of functions")
    for tool in tools:
        if not callable(tool) or not hasattr(tool, "__name__"):
            raise InputError(f"tools has {tool!r:.100}, which is no function with a name")
        if inspect.iscoroutinefunction(tool):
            raise InputError(f"the tool {tool.__name__} is asynchronous: wrap it in a function that waits for it")
        try:
            get_json_schema(tool)
        except Exception as error:
            why = str(error).partition("\n")[0]
            raise InputError(
                f"the tool {tool.__name__} cannot be described to a model ({why}): it needs annotated arguments and a "
                "Google-style docstring"
            ) from error
    names = [tool.__name__ for tool in tools]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"two tools are called {twice[0]}: a model calls them by their names")
    return tools


def _check_tools(args: TRBConfig, train_dataset: Any, eval_dataset: Any) -> None:
    """Refuse what makes no sense of completions with tools."""
    if args.use_vllm:
        raise InputError(
            "tools: vLLM draws whole completions here, and none that goes on after a tool's answer; set use_vllm=False"
        )
    behavior = behavior_of(args)
    if behavior.prefix != Constant(0.0):
        raise InputError(
            f"tools: behavior {pair_of(args)[0]} goes on from a share of a whole completion of the teacher's, whose "
            "calls nobody answers; choose another behavior"
        )
    for name, rows in named_datasets(train_dataset, eval_dataset):
        if not isinstance(rows, IterableDataset) and len(rows) and isinstance(dict(rows[0]).get("prompt"), str):
            raise InputError(
                f"{name} has text for prompts, and tools need messages, whose chat template says what tools there are"
            )


def teacher_prompts(args: TRBConfig, train_dataset: Any, eval_dataset: Any) -> TeacherPrompts | None:
    """How the teacher's own prompts are made, where it has any.

    Raises:
        ValueError: some datasets have them and others none, or vLLM is to blend, whose models read one prompt.
    """
    known = [(name, found) for name, rows in named_datasets(train_dataset, eval_dataset) if (found := _columns(rows))]
    first, there = known[0] if known else ("", [])
    made = TeacherPrompts.of(there, args, first)
    for name, columns in known[1:]:
        for column in COLUMNS:
            if (column in columns) != (column in there):
                having, lacking = (name, first) if column in columns else (first, name)
                raise InputError(
                    f"{having} has a column {column!r} and {lacking} has none: the teacher would be two different "
                    "ones; add it there, or remove it here"
                )
    if made is not None:
        _check_not_in_vllm(args, "the teacher has prompts of its own, and vLLM blends two models that read one prompt")
    return made


def teacher_routes(
    args: TRBConfig, teacher_model: TeacherArgument, train_dataset: Any, eval_dataset: Any
) -> Routes | None:
    """Whose each row is, where there are teachers by name.

    Raises:
        ValueError: a row without a teacher, with the row's number; or an option that one teacher, or several, ignore.
    """
    if args.teacher_offload:
        _check_not_in_vllm(args, "teacher_offload=True, and an engine that blends keeps its teacher on the accelerator")
    if not isinstance(teacher_model, Mapping):
        if args.teacher_column is not None:
            raise InputError(
                f"teacher_column={args.teacher_column!r} chooses between teachers, and there is one: leave it out, or "
                "pass teacher_model a mapping of names"
            )
        return None
    routes = Routes(args.teacher_column or TEACHER_ID, tuple(teacher_model))
    if args.teacher_sharded:
        raise InputError(
            "teacher_sharded=True has all processes read one teacher at a time, and with several each has rows of its "
            "own: set teacher_offload, which keeps all but one in main memory"
        )
    _check_not_in_vllm(args, "there are several teachers, and vLLM blends with one")
    for name, rows in named_datasets(train_dataset, eval_dataset):
        if not isinstance(rows, IterableDataset):
            routes.check(rows, name)
    return routes


def _check_not_in_vllm(args: TRBConfig, why: str) -> None:
    """Refuse rollouts that would be blended by an engine."""
    if args.blends_in_vllm and needs_teacher(behavior_of(args), 0):
        raise InputError(
            f"{why}: set vllm_blended=False, which blends in this process and leaves plain rollouts to vLLM"
        )


def named_datasets(train_dataset: Any, eval_dataset: Any) -> Iterator[tuple[str, Any]]:
    """Each set of prompts that was given, with what to call it."""
    several = eval_dataset if isinstance(eval_dataset, dict) else None
    named = {"train_dataset": train_dataset, **({"eval_dataset": eval_dataset} if several is None else {})}
    named |= {f"eval_dataset[{key!r}]": rows for key, rows in (several or {}).items()}
    yield from ((name, rows) for name, rows in named.items() if rows is not None)


def _check_tokenizer(name: str, value: Any, hint: str) -> None:
    if isinstance(value, ProcessorMixin):
        raise InputError(
            f"{name} is a {type(value).__name__}, and TRBTrainer reads text alone: pass its tokenizer, as "
            f"{name}=processor.tokenizer"
        )
    if value is not None and not isinstance(value, PreTrainedTokenizerBase):
        raise InputError(f"{name} is a {type(value).__name__} and no tokenizer{hint}")


def _check_loading(role: str, model: str | PreTrainedModel, options: Mapping[str, Any]) -> None:
    """Refuse options of a model that is to be loaded, where one is given that is."""
    for name, value in options.items():
        if value is not None and (not isinstance(model, str) or is_shared(model)):
            raise InputError(
                f"{name}={value!r} does nothing for a {role} that is loaded already: load it so, or pass its path or "
                "hub id"
            )


def _check_shared(
    args: TRBConfig, model: str | PreTrainedModel, teacher: str | PreTrainedModel, *, adapters: bool
) -> None:
    """Refuse a teacher on the student's weights where the student has no adapter, or is given to vLLM."""
    both_loaded = not isinstance(model, str) and not isinstance(teacher, str)
    if not is_shared(teacher) and not (both_loaded and shares_weights(cast(Any, teacher), cast(Any, model))):
        return
    if not adapters and (isinstance(model, str) or not has_adapters(model)):
        raise InputError(
            "the teacher stands on the student's weights, and training would move all of them: train an adapter "
            "(lora_rank in recipes, peft_config in Python), or give the teacher weights of its own"
        )
    if args.use_vllm:
        raise InputError(
            "the teacher stands on the student's weights, and with use_vllm=True the adapter is added to these and "
            "taken off again at every step, which rounds them: set use_vllm=False, or give the teacher weights of its "
            "own"
        )


def _check_batch(args: TRBConfig) -> None:
    batch, each = args.completions_per_step, args.num_generations
    if batch % each:
        raise InputError(
            f"the batch of one optimizer step is {batch} completions (per_device_train_batch_size x processes x "
            f"gradient_accumulation_steps), which num_generations={each} does not divide; set num_generations to "
            f"{largest_divisor(batch, each)}, or make the batch a multiple of {each}"
        )


def _check_rows(name: str, rows: Any) -> None:
    """Refuse data that cannot be read row by row; of data for training, each row also by its number."""
    if isinstance(rows, str | Path):
        load = f"trb.tasks.prompts.load_prompts({str(rows)!r})"
        raise InputError(f"{name} is the text {str(rows)!r}, and no data: load it, as with {load}")
    if isinstance(rows, dict):
        if rows and not any(isinstance(value, list) for value in rows.values()):
            raise InputError(f"{name} has the splits {', '.join(map(str, rows))}: pass one of them")
        raise InputError(f"{name} is a dict of columns: pass rows, as with datasets.Dataset.from_dict({name})")
    by_number = hasattr(rows, "__getitem__") and hasattr(rows, "__len__")
    if name == "train_dataset" and not by_number:
        raise InputError("TRBTrainer repeats each prompt num_generations times and needs a map-style dataset")
    if not by_number or isinstance(rows, IterableDataset) or hasattr(rows, "column_names") or not len(rows):
        return
    try:
        first = rows[0]
    except LookupError as error:
        raise InputError(
            f"{name} is a {type(rows).__name__} whose rows cannot be had by their numbers ({error!r}): pass a "
            "datasets.Dataset (a table of pandas becomes one by Dataset.from_pandas), or a list of rows"
        ) from error
    if not isinstance(first, Mapping):
        raise InputError(
            f'{name}[0] is {reprlib.repr(first)}: make each row a mapping, as with [{{"prompt": text}} for text in '
            f"{name}]"
        )


def _check_columns(name: str, rows: Any) -> None:
    """Refuse prompts that are not where they are looked for, and images, which nothing here reads."""
    columns = _columns(rows)
    if columns is None:
        return
    if "prompt" not in columns:
        there = ", ".join(map(str, columns)) or "none"
        raise InputError(f'{name} has no column "prompt" (it has {there}): {_prompts_from(name, rows, columns)}')
    found = [f"column {column!r}" for column in _IMAGES if column in columns]
    if not found and _shows_an_image(rows):
        found = ["in the messages of its first row"]
    if found:
        raise InputError(
            f"{name} has images ({found[0]}), and TRBTrainer reads text alone: remove them to train on the text"
        )


def _prompts_from(name: str, rows: Any, columns: Sequence[str]) -> str:
    """What makes prompts of rows that have none: of conversations, as the first one ends."""
    column = next((known for known in _CONVERSATIONS if known in columns), None)
    is_dataset = hasattr(rows, "rename_column")
    if column is None:
        return f"rename one with {name}.rename_column" if is_dataset else "give one of them that name in every row"
    load = "load the data with trb.tasks.prompts.load_prompts"
    first = None if isinstance(rows, IterableDataset) or not len(rows) else rows[0][column]
    last = first[-1] if isinstance(first, list) and first else None
    if not isinstance(last, Mapping):
        return f"make it of {column}, without the answer where there is one, or {load}"
    if "role" not in last:
        return (
            f"its {column} have {' and '.join(map(str, last))} in place of role and content: {load}, which reads both"
        )
    if last["role"] == "assistant":
        without = f'{{"prompt": row["{column}"][:-1]}}'
        how = f"{name}.map(lambda row: {without})" if is_dataset else f"[row | {without} for row in {name}]"
        return f"leave the last answer out, as with {how}, or {load}"
    how = f'{name}.rename_column("{column}", "prompt")'
    how = how if is_dataset else f'[row | {{"prompt": row["{column}"]}} for row in {name}]'
    return f"its {column} end with the {last['role']}, as prompts do: rename them, as with {how}"


def _shows_an_image(rows: Any) -> bool:
    """Whether the first prompt does; of rows that only stream, nothing is known before they are read."""
    if isinstance(rows, IterableDataset) or not len(rows):
        return False
    prompt = rows[0]["prompt"]
    messages = prompt if isinstance(prompt, list) else ()
    parts = (message.get("content") for message in messages if isinstance(message, Mapping))
    several = chain.from_iterable(content for content in parts if isinstance(content, list))
    return any(isinstance(part, Mapping) and part.get("type") == "image" for part in several)


def _columns(rows: Any) -> list[str] | None:
    """The names of the columns; None where that cannot be known before the rows are read."""
    columns = getattr(rows, "column_names", None)
    if columns is None and hasattr(rows, "__getitem__") and hasattr(rows, "__len__") and len(rows):
        first = rows[0]
        columns = list(first) if isinstance(first, Mapping) else None
    return columns
