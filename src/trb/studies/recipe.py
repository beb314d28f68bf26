"""Recipes: flat YAML files that say everything about a run, checked before anything is loaded.

A recipe mixes the keys of `RunConfig` (models, data, evaluation) and of `TRBConfig` (method and training; also every
option of TRL and transformers) in one namespace. Checking is strict: unknown keys, wrong types and duplicates are
errors that name the key, the file and the remedy. Values are read as YAML 1.2 has them (`no` is a word, `1e-5` a
number).

Left out on purpose: several files that include each other, and variables. A recipe is read in one place, top to bottom.
"""

import dataclasses
import enum
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from trb.errors import did_you_mean
from trb.models.loading import DTYPES
from trb.records import EVALS, EVALUATIONS
from trb.safety.untrusted import parse_yaml
from trb.tasks.prompts import MATH_SYSTEM_PROMPT
from trb.training.methods import METHODS, every_knob, knobs_of, owners_of, pair_of
from trb.training.trainer import TRBConfig

__all__ = [
    "ConfigError",
    "Recipe",
    "RunConfig",
    "describe_keys",
    "is_method_name",
    "load_recipe",
    "make_recipe",
    "parse_overrides",
    "read_yaml",
    "valid_keys",
]

# Keys are made of a few words; half of one in common is worth a hint.
_nearest = partial(did_you_mean, cutoff=0.5)

# Options of the trainer that mean nothing here, or that another key replaces: silence would be a lie.
_REPLACED = {
    "output_dir": "pass --output-dir",
    "trust_remote_code": "use student_trust_remote_code and teacher_trust_remote_code",
    "model_init_kwargs": "use student_dtype, student_revision and student_keep_layers",
    "teacher_model_name_or_path": "use teacher",
    "teacher_model_revision": "use teacher_revision",
    "teacher_model_init_kwargs": "use teacher_dtype",
    "eval_strategy": "use eval_every (pass@1) and held_out_every (loss)",
    "eval_steps": "use eval_every (pass@1) and held_out_every (loss)",
    "eval_delay": "use eval_every (pass@1) and held_out_every (loss)",
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
# What decides the behavior and the loss of a run.
_PAIR = ("method", "behavior", "loss")
_RESERVED_NAMES = ("student", "teacher", "provenance", EVALUATIONS)
_METHOD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}


def is_method_name(name: Any) -> bool:
    """Whether a method can have that name: it becomes a directory of results."""
    return isinstance(name, str) and bool(_METHOD_NAME.fullmatch(name)) and name not in _RESERVED_NAMES


class ConfigError(ValueError):
    """A recipe or an override that cannot be used; the message names the file, the key and the remedy."""


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class RunConfig:
    """Everything a run needs beside `TRBConfig`: models, data, evaluation. Raises ConfigError for invalid values."""

    student: str = field(
        metadata={"help": "Model to train: zoo:student, smollm2-135m, a directory or a hub id (owner/name)."}
    )
    teacher: str = field(
        metadata={"help": "Model to learn from, with the student's tokenizer; written the same way, or an adapter."}
    )
    train_data: str = field(
        metadata={"help": "Prompts: zoo:chains, reasoning-gym:TASK, a .jsonl or .parquet file, or a hub name."}
    )
    student_revision: str | None = _option(None, "Branch, tag or commit of a student on the hub.")
    teacher_revision: str | None = _option(None, "Branch, tag or commit of a teacher on the hub.")
    student_keep_layers: int | None = _option(
        None, "Prune the student to so many evenly spaced layers before training."
    )
    student_dtype: str = _option("float32", f"The student's weights: {', '.join(DTYPES)}. AdamW wants float32.")
    teacher_dtype: str = _option("float32", f"The teacher's weights: {', '.join(DTYPES)}.")
    student_trust_remote_code: bool = _option(False, "Run Python code that comes with the student.")
    teacher_trust_remote_code: bool = _option(False, "Run Python code that comes with the teacher.")
    chat_template: str | None = _option(
        None, "A Jinja file, or plain (messages joined by blank lines), for models without a chat template."
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
                raise ConfigError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(DTYPES)}")
        for name, smallest in _SMALLEST.items():
            value = getattr(self, name)
            if value is not None and not value >= smallest:
                raise ConfigError(f"{name} is {value}; it must be at least {smallest}")
        for name in ("reward_timeout_s", "eval_temperature", "lora_alpha"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be positive")
        self._check_samples()
        for name in self.methods:
            if not is_method_name(name):
                raise ConfigError(
                    f"methods: {name!r} cannot name a directory of results; use letters, digits, '.', '_' and '-', "
                    f"and none of {', '.join(_RESERVED_NAMES)}"
                )

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
                        f"eval_samples has {name!r}, which is not in eval_data{_nearest(name, self.eval_data)}"
                    )
        for name, n in samples.items():
            if n < 1:
                raise ConfigError(f"eval_samples is {n}{f' for {name!r}' if name else ''}; it must be at least 1")

    def samples_of(self, name: str) -> int:
        """Completions per problem for an entry of `eval_data`."""
        return self.eval_samples[name] if isinstance(self.eval_samples, dict) else self.eval_samples

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


@dataclass(frozen=True)
class Recipe:
    """A checked recipe: `run`, the keyword arguments of `TRBConfig` that were given, and where they came from."""

    run: RunConfig
    training: Mapping[str, Any]
    source: str = "recipe"

    def training_config(self, output_dir: str | os.PathLike[str]) -> TRBConfig:
        """The trainer's configuration. Raises ConfigError, naming the source, for values that it refuses."""
        options = dict(self.training)
        try:
            if self.run.prompts_per_step is not None:
                options["gradient_accumulation_steps"] = self._accumulation_steps()
            if self.run.held_out_prompts:
                options |= {"eval_strategy": "steps", "eval_steps": self.run.held_out_every}
            return TRBConfig(output_dir=str(output_dir), disable_tqdm=True, **options)
        except (ValueError, TypeError, NotImplementedError, ImportError) as error:
            raise ConfigError(f"{self.source}: {error}") from error

    def _accumulation_steps(self) -> int:
        if "gradient_accumulation_steps" in self.training:
            raise ConfigError("prompts_per_step sets gradient_accumulation_steps; give one of the two")
        rollouts = (self.run.prompts_per_step or 0) * self._value("num_generations")
        at_once = self._value("per_device_train_batch_size") * int(os.environ.get("WORLD_SIZE", "1"))
        if at_once < 1 or rollouts % at_once:
            raise ConfigError(
                f"prompts_per_step={self.run.prompts_per_step} with num_generations={self._value('num_generations')} "
                f"is {rollouts} completions, which {at_once} at once (per_device_train_batch_size x processes) do "
                "not divide; change per_device_train_batch_size"
            )
        return rollouts // at_once

    def _value(self, name: str) -> Any:
        return self.training.get(name, _default(_training_fields()[name]))

    def pairs(self) -> list[tuple[str, str]]:
        """The behaviors and losses in use: of the run, or of every method of a comparison."""
        variants = [self.for_method(name) for name in self.run.methods] or [self]
        return [pair_of(SimpleNamespace(**{key: each._value(key) for key in _PAIR})) for each in variants]

    def for_method(self, name: str) -> "Recipe":
        """The recipe of one entry of `methods`: the same run, with that entry's overrides."""
        overrides = {"method": name, **(self.run.methods[name] or {})}
        run = dataclasses.replace(self.run, methods={})
        return Recipe(run, {**self.training, **overrides}, f"{self.source}: methods: {name}")

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, defaults included, as plain YAML types: `make_recipe` takes it back.

        Left out are the knobs of behaviors and losses that are not in use.
        """
        run = {key: value for key, value in dataclasses.asdict(self.run).items() if key != "methods" or value}
        unread = every_knob() - knobs_of(self.pairs())
        training = {name: self._value(name) for name in _training_fields() if name not in {*_REPLACED, *unread}}
        if self.run.prompts_per_step is not None:
            del training["gradient_accumulation_steps"]
        return {key: _plain(value) for key, value in {**run, **training}.items()}

    def to_yaml(self) -> str:
        """`resolved()` as the text of a recipe."""
        return yaml.dump(self.resolved(), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def load_recipe(path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read, merge and check a recipe; `overrides` win over the file and may be dotted (`methods.trb.max_steps`).

    Raises:
        ConfigError: the file is missing or is not a YAML mapping, a key is unknown, given twice or of the wrong type,
            or the trainer refuses a value.
    """
    path = Path(path)
    return make_recipe(read_yaml(path), overrides, source=f"{path}, with options" if overrides else str(path))


def make_recipe(
    values: Mapping[str, Any], overrides: Mapping[str, Any] | None = None, *, source: str = "recipe"
) -> Recipe:
    """A recipe from a mapping, checked as `load_recipe` does."""
    checked = {key: _checked(key, value, source) for key, value in values.items()}
    for key, value in (overrides or {}).items():
        _override(checked, key, value)
    run_keys = _run_fields()
    missing = [key for key, item in run_keys.items() if _default(item) is dataclasses.MISSING and key not in checked]
    if missing:
        raise ConfigError(f"{source}: {missing[0]} is missing ({run_keys[missing[0]].metadata['help']})")
    methods = checked.get("methods", {})
    for name, entry in methods.items():
        methods[name] = _method_entry(name, entry, source)
        for key in set(overrides or {}) & set(methods[name]) - {"method"}:
            raise ConfigError(
                f"option --{key.replace('_', '-')} would do nothing: the recipe sets {key} for {name} itself; "
                f"pass --methods.{name}.{key} instead"
            )
    try:
        run = RunConfig(**{key: value for key, value in checked.items() if key in run_keys})
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    recipe = Recipe(run, {key: value for key, value in checked.items() if key not in run_keys}, source)
    for variant in [recipe, *(recipe.for_method(name) for name in run.methods)]:
        variant.training_config("unused")
    _check_knobs(recipe.training, recipe.pairs(), source)
    for name, entry in run.methods.items():
        variant = recipe.for_method(name)
        _check_knobs(entry or {}, variant.pairs(), variant.source)
    return recipe


def _check_knobs(given: Iterable[str], pairs: Sequence[tuple[str, str]], source: str) -> None:
    """Refuse knobs that no behavior or loss in use reads."""
    for key in given:
        if key in every_knob() - knobs_of(pairs):
            used = " and ".join(dict.fromkeys(f"behavior: {behavior}, loss: {loss}" for behavior, loss in pairs))
            raise ConfigError(
                f"{source}: {key} would do nothing: it belongs to {'; '.join(owners_of(key))}, and this is {used}; "
                "leave it out, or choose another method, behavior or loss"
            )


def _method_entry(name: str, entry: Mapping[str, Any] | None, source: str) -> dict[str, Any]:
    where = f"{source}: methods: {name}"
    for key in entry or {}:
        if key in _run_fields():
            raise ConfigError(f"{where}: {key} is shared by all methods, which start alike; set it outside methods")
    checked = {key: _checked(key, value, where) for key, value in (entry or {}).items()}
    if name not in METHODS and "method" not in checked:
        raise ConfigError(
            f"{where}: say which method it is, method: one of {', '.join(METHODS)}{_nearest(str(name), METHODS)}"
        )
    return checked


# ---- the command line ----


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
            raise ConfigError(f"unexpected argument {argument!r}; options are written --key value")
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


def _override(checked: dict[str, Any], key: str, value: Any) -> None:
    """Put one override in place; a dotted key reaches into a mapping such as `methods` or `lr_scheduler_kwargs`."""
    first, *path = key.split(".")
    where = f"option --{key.replace('_', '-')}"
    if not path:
        checked[key] = _checked(key, value, where)
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
        inside[path[-1]] = _checked(path[-1], value, where)
    else:
        inside[path[-1]] = _read_text(value) if isinstance(value, _Text) else value


# ---- keys and types ----


def valid_keys() -> list[str]:
    """Every key a recipe may have, `RunConfig`'s first."""
    return [*_run_fields(), *(name for name in _training_fields() if name not in _REPLACED)]


def describe_keys() -> dict[str, list[tuple[str, str, str, str]]]:
    """Every key as (name, type in words, default, help), by group: ours first, then TRL's and transformers'."""
    own = {name for name in TRBConfig.__annotations__ if name in _training_fields()}
    groups: dict[str, list[tuple[str, str, str, str]]] = {
        "Models, data and evaluation": [],
        "Method and loss": [],
        "Training (TRL and transformers)": [],
    }
    first, second, third = groups.values()
    for key in valid_keys():
        item = _run_fields().get(key) or _training_fields()[key]
        default = _default(item)
        shown = "required" if default is dataclasses.MISSING else f"default {_shown(default)}"
        text = " ".join(str(item.metadata.get("help", "")).split())
        entry = (key, _words(_hints()[key]), shown, text)
        (first if key in _run_fields() else second if key in own else third).append(entry)
    return groups


def _shown(value: Any) -> str:
    value = _plain(value)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value) or "empty"


@cache
def _run_fields() -> dict[str, dataclasses.Field]:
    return {item.name: item for item in dataclasses.fields(RunConfig)}


@cache
def _training_fields() -> dict[str, dataclasses.Field]:
    return {item.name: item for item in dataclasses.fields(TRBConfig) if item.init}


@cache
def _hints() -> dict[str, Any]:
    return {**typing.get_type_hints(TRBConfig), **typing.get_type_hints(RunConfig)}


@cache
def _adapter(key: str) -> TypeAdapter:
    return TypeAdapter(_hints()[key])


def _default(item: dataclasses.Field) -> Any:
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


def _require_known(key: Any, where: str) -> None:
    if key in _REPLACED:
        raise ConfigError(f"{where}: {key} is not a key of recipes: {_REPLACED[key]}")
    keys = valid_keys()
    if key not in keys:
        raise ConfigError(f"{where}: unknown key {str(key)!r}{_nearest(str(key), keys)}")


def _checked(key: Any, value: Any, where: str) -> Any:
    """`value` as the type that `key` declares. Raises ConfigError."""
    _require_known(key, where)
    if isinstance(value, _Text):
        text = str(value)
        try:
            return _validated(key, _read_text(value), where)
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
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return ConfigError(f"{where}: {key} is {shown:.200}; expected {_words(_hints()[key])}")


def _kinds(annotation: Any) -> set[Any]:
    """The alternatives of an annotation, without their parameters: `int | list[str]` is {int, list}."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return {kind for part in typing.get_args(annotation) for kind in _kinds(part)}
    return {typing.get_origin(annotation) or annotation}


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


def _plain(value: Any) -> Any:
    """A value as YAML types."""
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


# ---- YAML ----


class _Loader(yaml.SafeLoader):
    """Safe YAML with two repairs: duplicate keys are errors, and plain scalars are read by YAML 1.2's rules."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (PyYAML declares it as an attribute of instances)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []  # a key of YAML may be unhashable
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.append(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Safe YAML that quotes what either version's rules would not read back as text."""


# By YAML 1.1, PyYAML's own, `no` is false, `1e-5` is text, `1:30` is ninety and 2026-01-01 is a date.
_DIGITS = r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
_FLOAT = rf"{_DIGITS}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping as recipes have it: safe, by YAML 1.2's rules, no key twice. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        near = _nearest(path.name, os.listdir(path.parent)) if path.parent.is_dir() and not path.exists() else ""
        raise ConfigError(f"cannot read the recipe {path}: {error.strerror}{near}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}") from error
    try:
        values = parse_yaml(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping, key: value, one to a line")
    return values


def _read_text(text: str) -> Any:
    """A value of the command line as YAML; what is not YAML is itself."""
    if text.lower() in ("none", "null"):
        return None
    try:
        return parse_yaml(str(text), _Loader)
    except (yaml.YAMLError, ValueError):
        return str(text)
