"""The keys of a recipe: their types, their checks, and how the command line writes them.

Keys are the fields of `RunConfig` and of `TRBConfig`. Left out: files and the checks that need more than one key
(`trb.studies.recipe`), and the list of all keys for people (`trb.studies.key_list`).
"""

import dataclasses
import enum
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from trb.errors import did_you_mean, named, nearest, shown
from trb.models.memory import DTYPES
from trb.models.quantization import QUANTIZATIONS
from trb.models.sharing import is_shared
from trb.records import EVALS, EVALUATIONS
from trb.sampling.uniforms import SEED_BOUNDS, SEEDS
from trb.studies.yaml_files import ConfigError, read_value
from trb.tasks.prompts import MATH_SYSTEM_PROMPT
from trb.training.config import TRBConfig
from trb.training.routes import named_in_errors
from trb.vocab import checked_temperature

__all__ = [
    "ASKING_KEYS",
    "REPLACED_KEYS",
    "TOOL_KEYS",
    "RunConfig",
    "checked_value",
    "default_of",
    "is_method_name",
    "parse_overrides",
    "put_override",
    "run_fields",
    "training_fields",
    "type_in_words",
    "valid_keys",
]

# Options of the trainer that mean nothing here, or that another key replaces: silence would be a lie.
REPLACED_KEYS = {
    "output_dir": "pass --output-dir",
    "trust_remote_code": "use student_trust_remote_code and teacher_trust_remote_code",
    "model_init_kwargs": "use student_dtype, student_revision and student_keep_layers",
    "teacher_model_name_or_path": "use teacher",
    "teacher_model_revision": "use teacher_revision",
    "teacher_model_init_kwargs": "use teacher_dtype",
    "eval_strategy": "use eval_every (scores) and held_out_every (loss)",
    "eval_steps": "use eval_every (scores) and held_out_every (loss)",
    "eval_delay": "use eval_every (scores) and held_out_every (loss)",
    "eval_on_start": "leave it out: the student is always evaluated before training",
    "load_best_model_at_end": f"leave it out: choose a checkpoint from {EVALS}",
    "do_train": "leave it out",
    "do_eval": "use eval_data",
    "do_predict": "leave it out",
    "data_seed": "use seed (order of prompts) and train_seed (which prompts)",
    "train_sampling_strategy": "use shuffle_dataset",
    "disable_tqdm": "pass --quiet to the command",
    "hub_token": "keep secrets out of files: set HF_TOKEN, or run `hf auth login`",
    "local_rank": "leave it out: it comes from the launcher",
}

TOOL_KEYS = ("tools", "max_tool_calling_iterations", "tool_timeout", "tool_max_characters")
"""What completions with tools depend on."""

ASKING_KEYS = (
    *("chat_template_kwargs", "system_prompt", *TOOL_KEYS, "eval_temperature", "reward_timeout_s"),
    *("teacher_system_prompt", "teacher_prompt_template"),
)
"""What an evaluation's prompts, draws and grades depend on, beside its models, its data and the longest completion."""

_RESERVED_NAMES = ("student", "teacher", "provenance", EVALUATIONS)

_METHOD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

_FLOAT32 = "float32"

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}


def is_method_name(name: Any) -> bool:
    """Whether a method can have that name: it becomes a directory of results."""
    return isinstance(name, str) and bool(_METHOD_NAME.fullmatch(name)) and name not in _RESERVED_NAMES


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class RunConfig:
    """Everything a run needs beside `TRBConfig`: models, data, evaluation. Raises InputError for invalid values."""

    student: str = field(
        metadata={"help": "Model to train: zoo:student, zoo:told, smollm2-135m, a directory or a hub id (owner/name)."}
    )
    teacher: str = field(
        metadata={
            "help": "Model to learn from, with the student's tokenizer; written the same way, or an adapter. With "
            "lora_rank also base, the student without its adapter, or adapter:DIR, with another: on the same weights. "
            "Or see teachers."
        }
    )
    train_data: str = field(
        metadata={"help": "Prompts: zoo:chains, reasoning-gym:TASK, a .jsonl or .parquet file, or a hub name."}
    )
    teachers: dict[str, str] = field(
        default_factory=dict,
        metadata={
            "help": "In place of teacher, several by name: name -> what teacher may be. Each has the rows of the data "
            "that name it in teacher_column."
        },
    )
    student_revision: str | None = _option(None, "Branch, tag or commit of a student on the hub.")
    teacher_revision: str | None = _option(None, "Branch, tag or commit of a teacher on the hub.")
    student_keep_layers: int | None = _option(
        None, "Prune the student to so many layers before training: 3/5 of them from its front, the rest from its end."
    )
    student_dtype: str = _option(_FLOAT32, f"The student's weights: {', '.join(DTYPES)}. AdamW wants float32.")
    teacher_dtype: str = _option(_FLOAT32, f"The teacher's weights: {', '.join(DTYPES)}.")
    teacher_quantization: str | None = _option(
        None, f"Quantise the teacher's layers while it is loaded: {', '.join(QUANTIZATIONS)}."
    )
    student_trust_remote_code: bool = _option(False, "Run Python code that comes with the student.")
    teacher_trust_remote_code: bool = _option(False, "Run Python code that comes with the teacher.")
    chat_template: str | None = _option(
        None,
        "How both models' prompts are written: student (the default) or teacher, for the template of one of them; a "
        "Jinja file; or plain, messages joined by blank lines, for models without a template.",
    )
    lora_rank: int = _option(0, "Rank of LoRA adapters on the student; 0 trains every weight.")
    lora_alpha: int = _option(32, "LoRA's scale: updates are multiplied by lora_alpha / lora_rank.")
    lora_target_modules: str | list[str] = field(
        default="all-linear", metadata={"help": "Modules that get adapters: all-linear, or names."}
    )

    train_split: str = _option("train", "Split of train_data.")
    train_revision: str | None = _option(None, "Branch, tag or commit of train_data on the hub.")
    train_limit: int | None = _option(None, "Prompts to use: a random subset, or how many a generator makes.")
    train_seed: int = _option(0, "Which prompts: seed of the subset or of the generator.")
    train_prompt_column: str | None = _option(None, "Column of train_data with the prompt, if not guessed right.")
    train_answer_column: str | None = _option(None, "Column of train_data with the answer, if not guessed right.")
    train_privileged_column: str | None = _option(
        None, "Column of train_data that the teacher reads in its prompt; solution or answer of zoo data."
    )
    train_assistant_turns: Literal["all", "last"] | None = _option(
        None,
        "Of conversations, which turns of the assistant are prompts, each after what came before: all, or the last; "
        "null for prompts that may end with the user.",
    )
    system_prompt: str | None = _option(
        None, "System message of prompts; math for the paper's, which benchmarks always get."
    )
    max_prompt_length: int = _option(1024, "Longest training prompt, in tokens, chat template included.")
    overlong_prompts: Literal["error", "drop"] = _option("error", "What to do with longer ones: error or drop.")
    prompts_per_step: int | None = _option(
        None, "Prompts in an optimizer step, over all processes; sets gradient_accumulation_steps."
    )
    held_out_prompts: int = _option(0, "Prompts set aside from train_data, for the loss on the student's own rollouts.")
    held_out_every: int = _option(10, "Optimizer steps between measurements of that loss.")
    reward_timeout_s: float = _option(5.0, "Seconds the grader may spend on one answer (rewards and evaluation).")

    eval_data: str | list[str] = field(
        default_factory=list,
        metadata={"help": "Problem sets: specs as in train_data, benchmarks (gsm8k, math500, ...), or benchmark=FILE."},
    )
    eval_split: str = _option("test", "Split of eval_data; benchmarks know their own.")
    eval_limit: int | None = _option(None, "Problems per set; null for all.")
    eval_prompt_column: str | None = _option(None, "Column of eval_data with the problem, if not guessed right.")
    eval_answer_column: str | None = _option(None, "Column of eval_data with the answer, if not guessed right.")
    eval_privileged_column: str | None = _option(
        None, "The same of eval_data, for the teacher's own score; null where it is to have no help."
    )
    eval_assistant_turns: Literal["all", "last"] | None = _option(None, "The same of eval_data.")
    eval_samples: int | dict[str, int] = field(
        default=1, metadata={"help": "Completions per problem: one number, or one per entry of eval_data."}
    )
    eval_max_new_tokens: int | None = _option(None, "Longest completion in evaluation; null for max_completion_length.")
    eval_temperature: float = _option(1.0, "Sampling temperature in evaluation.")
    eval_every: int = _option(0, "Optimizer steps between evaluations; 0 for before and after training only.")
    eval_seed: int = _option(0, "Seed of generated problems and of sampling in evaluation.")
    eval_max_rows: int | None = _option(None, "Completions in flight in evaluation; null to fit 2 GiB of KV cache.")

    save_final_model: bool = _option(True, "Write the trained model to model/ in the output directory.")
    methods: dict[str, dict[str, Any] | None] = field(
        default_factory=dict,
        metadata={"help": "For trb compare: name -> keys of TRBConfig that differ. `method` is the name unless given."},
    )

    def __post_init__(self) -> None:
        self.eval_data = [self.eval_data] if isinstance(self.eval_data, str) else self.eval_data
        for name in ("student_dtype", "teacher_dtype"):
            if getattr(self, name) not in DTYPES:
                raise ConfigError(f"{named(name)} is {getattr(self, name)!r}; choose one of {', '.join(DTYPES)}")
        if self.teacher_quantization not in (None, *QUANTIZATIONS):
            value, hint = self.teacher_quantization, did_you_mean(str(self.teacher_quantization), QUANTIZATIONS)
            raise ConfigError(f"teacher_quantization is {value!r}; choose one of {', '.join(QUANTIZATIONS)}{hint}")
        for name, smallest in _SMALLEST.items():
            value = getattr(self, name)
            if value is not None and not value >= smallest:
                raise ConfigError(f"{named(name)} is {value}; it must be at least {smallest}")
        for name in ("train_seed", "eval_seed"):
            if getattr(self, name) not in SEEDS:
                raise ConfigError(f"{named(name)} is {getattr(self, name)}; it must lie in {SEED_BOUNDS}")
        for name in ("reward_timeout_s", "lora_alpha"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{named(name)} is {getattr(self, name)}; it must be positive")
        checked_temperature(self.eval_temperature, "eval_temperature")
        if twice := [name for at, name in enumerate(self.eval_data) if name in self.eval_data[:at]]:
            raise ConfigError(f"{named('eval_data')} names {twice[0]} twice; leave one of the two out")
        self._check_teachers()
        self._check_samples()
        for name in self.methods:
            if not is_method_name(name):
                raise ConfigError(
                    f"methods: {name!r} cannot name a directory of results; use letters, digits, '.', '_' and '-', "
                    f"and none of {', '.join(_RESERVED_NAMES)}"
                )

    def pairs(self) -> "dict[str | None, RunConfig]":
        """The same run with each of its teachers alone, by name; None for the name of the only one.

        Raises:
            ValueError: what the only teacher would be refused for, with the name.
        """
        if not self.teachers:
            return {None: self}
        found: dict[str | None, RunConfig] = {}
        for name, spec in self.teachers.items():
            with named_in_errors(name):
                found[name] = dataclasses.replace(self, teacher=spec, teachers={})
        return found

    def _check_teachers(self) -> None:
        if not self.teachers:
            self._check_shared()
            return
        if self.teacher:
            raise ConfigError(
                f"teacher is {self.teacher!r}, and teachers has {', '.join(self.teachers)}: give one of the two"
            )
        for name, spec in self.teachers.items():
            if not name or not spec:
                raise ConfigError(f"teachers has {name!r}: {spec!r}; give each a name and a model")
        if self.teacher_revision is not None:
            raise ConfigError(
                f"teacher_revision is {self.teacher_revision!r}, and there are several teachers: download it with `hf "
                "download` and name the directory"
            )
        if self.chat_template == "teacher":
            raise ConfigError(
                f"chat_template is 'teacher', and there are {', '.join(self.teachers)}: name the file of a template"
            )
        self.pairs()

    def _check_shared(self) -> None:
        """A teacher on the student's weights has nothing of its own to say about them."""
        if not is_shared(self.teacher):
            return
        names = ("teacher_revision", "teacher_trust_remote_code", "teacher_quantization")
        told = {name: getattr(self, name) for name in names}
        if self.teacher_dtype not in (_FLOAT32, self.student_dtype):
            told["teacher_dtype"] = self.teacher_dtype
        for name, value in told.items():
            if value:
                raise ConfigError(
                    f"{name} is {value!r}, and the teacher ({self.teacher}) stands on the student's weights: leave "
                    f"{name} out; what is said of the student holds for both"
                )
        self.teacher_dtype = self.student_dtype

    def _check_samples(self) -> None:
        if not isinstance(self.eval_samples, dict):
            samples: Mapping[str, int] = {"": self.eval_samples}
        else:
            samples = self.eval_samples
            for name in self.eval_data:
                if name not in samples:
                    raise ConfigError(f"eval_samples has no entry for {name!r} of eval_data")
            for name in samples:
                if name not in self.eval_data:
                    raise ConfigError(
                        f"eval_samples has {name!r}, which is not in eval_data{nearest(name, self.eval_data)}"
                    )
        for name, n in samples.items():
            if n < 1:
                where = f" for {name!r}" if name else ""
                raise ConfigError(f"{named('eval_samples')} is {n}{where}; it must be at least 1")

    def samples_of(self, name: str) -> int:
        """Completions per problem for an entry of `eval_data`."""
        return self.eval_samples[name] if isinstance(self.eval_samples, dict) else self.eval_samples

    @property
    def taught_by(self) -> str:
        """The teacher as it is written, or the teachers with their names."""
        return self.teacher or ", ".join(f"{name}: {spec}" for name, spec in self.teachers.items())

    @property
    def system_message(self) -> str | None:
        """The text of `system_prompt`, its short name resolved."""
        return MATH_SYSTEM_PROMPT if self.system_prompt == "math" else self.system_prompt


_SMALLEST = {
    "student_keep_layers": 2,
    "lora_rank": 0,
    "train_limit": 1,
    "max_prompt_length": 1,
    "prompts_per_step": 1,
    "held_out_prompts": 0,
    "held_out_every": 1,
    "eval_limit": 1,
    "eval_max_new_tokens": 1,
    "eval_every": 0,
    "eval_max_rows": 1,
}


class _Text(str):
    """A value as typed on the command line, not yet read as YAML."""


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """`--key value`, `--key=value`, `--flag` and `--no-flag` as overrides for `load_recipe`.

    Dashes and underscores are the same. The values are read where the type of their key is known.

    Raises:
        ConfigError: an argument that is no option, or an option that lacks its value.
    """
    overrides: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--") or argument == "--":
            raise ConfigError(
                f"unexpected argument {argument!r}; options are written --key value, and a list '[a, b]'. Methods are "
                "those of the recipe, with options such as --methods.NAME.KEY value"
            )
        name, equals, value = argument[2:].partition("=")
        key = name.replace("-", "_")
        negated = key.removeprefix("no_")
        if equals:
            overrides[key] = _Text(value)
        elif negated != key and key not in valid_keys():
            overrides[negated] = _flag(negated, False, argument)
        elif rest and not rest[0].startswith("--"):
            overrides[key] = _Text(rest.pop(0))
        else:
            overrides[key] = _flag(key, True, argument)
    return overrides


def _flag(key: str, value: bool, argument: str) -> bool:
    last = key.rpartition(".")[2]
    _require_known(last, f"option {argument}")
    if bool not in _kinds(_hints()[last]):
        raise ConfigError(f"option {argument} needs a value ({_words(_hints()[last])})")
    return value


def put_override(checked: dict[str, Any], key: str, value: Any) -> None:
    """Put one override in place; a dotted key reaches into a mapping such as `methods` or `lr_scheduler_kwargs`."""
    first, *path = key.split(".")
    where = f"option --{key.replace('_', '-')}"
    if not path:
        checked[key] = checked_value(key, value, where)
        return
    _require_known(first, where)
    if dict not in _kinds(_hints()[first]):
        raise ConfigError(f"{where}: {first} is not a mapping, so it has no {path[0]!r}")
    inside = checked[first] = dict(checked.get(first) or {})
    for part in path[:-1]:
        if not isinstance(inside.get(part) or {}, Mapping):
            raise ConfigError(f"{where}: {part} is not a mapping")
        inside[part] = inside = dict(inside.get(part) or {})
    if first == "methods" and len(path) == 2 and path[-1] in _hints():
        inside[path[-1]] = checked_value(path[-1], value, where)
    else:
        inside[path[-1]] = read_value(value) if isinstance(value, _Text) else value


@cache
def valid_keys() -> tuple[str, ...]:
    """Every key a recipe may have, `RunConfig`'s first."""
    return *run_fields(), *(name for name in training_fields() if name not in REPLACED_KEYS)


@cache
def run_fields() -> dict[str, dataclasses.Field]:
    return {item.name: item for item in dataclasses.fields(RunConfig)}


@cache
def training_fields() -> dict[str, dataclasses.Field]:
    return {item.name: item for item in dataclasses.fields(TRBConfig) if item.init}


@cache
def _hints() -> dict[str, Any]:
    return {**typing.get_type_hints(TRBConfig), **typing.get_type_hints(RunConfig)}


@cache
def _adapter(key: str) -> TypeAdapter:
    return TypeAdapter(_hints()[key])


def default_of(item: dataclasses.Field) -> Any:
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


def _require_known(key: Any, where: str) -> None:
    if key in REPLACED_KEYS:
        raise ConfigError(f"{where}: {key} is not a key of recipes: {REPLACED_KEYS[key]}")
    keys = valid_keys()
    if key not in keys:
        raise ConfigError(f"{where}: unknown key {str(key)!r}{nearest(str(key), keys)}")


def checked_value(key: Any, value: Any, where: str) -> Any:
    """`value` as the type that `key` declares. Raises ConfigError."""
    _require_known(key, where)
    if isinstance(value, _Text):
        text = str(value)
        try:
            return _validated(key, read_value(value), where)
        except ConfigError:
            # Text that happens to look like something else to YAML: 123, true, a: b.
            if str in _kinds(_hints()[key]):
                return text
            raise
    return _validated(key, value, where)


def _validated(key: str, value: Any, where: str) -> Any:
    try:
        result = _adapter(key).validate_python(value)
    except ValidationError as error:
        raise _wrong_type(key, value, where) from error
    # Python counts booleans as numbers; a recipe that says true for a number is a mistake.
    if isinstance(value, bool) and not isinstance(result, bool):
        raise _wrong_type(key, value, where)
    if isinstance(result, float) and math.isnan(result):
        raise ConfigError(f"{where}: {key} is not a number (nan); expected {_words(_hints()[key])}")
    return result


def _wrong_type(key: str, value: Any, where: str) -> ConfigError:
    given = "null" if value is None else str(value).lower() if isinstance(value, bool) else shown(value)
    return ConfigError(f"{where}: {key} is {given}; expected {_words(_hints()[key])}")


def _kinds(annotation: Any) -> set[Any]:
    """The alternatives of an annotation, without their parameters: `int | list[str]` is {int, list}."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return {kind for part in typing.get_args(annotation) for kind in _kinds(part)}
    return {typing.get_origin(annotation) or annotation}


def type_in_words(key: str) -> str:
    """What the value of a key must be: "a whole number or null"."""
    return _words(_hints()[key])


def _words(annotation: Any) -> str:
    """An annotation in plain words: `int | None` is "a whole number or null"."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        # null last: it is the rarest thing to write
        return " or ".join(dict.fromkeys(map(_words, sorted(parts, key=lambda part: part is type(None)))))
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin is list:
        return f"a list, each entry {_words(parts[0])}"
    if origin is dict or annotation is dict:
        return "a mapping"
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return f"one of {', '.join(str(member.value) for member in annotation)}"
    return _WORDS.get(annotation, getattr(annotation, "__name__", str(annotation)))
