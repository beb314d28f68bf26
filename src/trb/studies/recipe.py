"""Recipes: flat YAML files that say everything about a run, checked before anything is loaded.

A recipe mixes the keys of `RunConfig` (models, data, evaluation) and of `TRBConfig` (method and training; also every
option of TRL and transformers) in one namespace. Checking is strict: unknown keys, wrong types and duplicates are
errors that name the key, the file and the remedy. Values are read as YAML 1.2 has them (`no` is a word, `1e-5` a
number; `trb.studies.yaml_files`).

Left out on purpose: several files that include each other, and variables. A recipe is read in one place, top to bottom.
"""

import dataclasses
import math
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import yaml

from trb.errors import InputError, nearest
from trb.records import AS_BY_DEFAULT
from trb.studies.keys import (
    REPLACED_KEYS,
    RunConfig,
    checked_value,
    default_of,
    put_override,
    run_fields,
    training_fields,
)
from trb.studies.places import Places
from trb.studies.shipped import recipe_file
from trb.studies.yaml_files import ConfigError, Dumper, read_yaml
from trb.training.behaviors import budget_schedule_of
from trb.training.config import TRBConfig, largest_divisor
from trb.training.methods import CHOICES, METHODS, check_choices, every_knob, knobs_of, owners_of, pair_of
from trb.training.resume import plain

__all__ = ["Recipe", "load_recipe", "make_recipe"]


# Keys that say something by being there.
_ALTERNATIVES = ("methods", "teacher", "teachers")


@dataclass(frozen=True)
class Recipe:
    """A checked recipe: `run`, the keyword arguments of `TRBConfig` that were given, and where they came from.

    Inside `places.told()` an error says where a file was looked for.
    """

    run: RunConfig
    training: Mapping[str, Any]
    source: str = "recipe"
    places: Places = field(default_factory=Places)

    def training_config(self, output_dir: str | os.PathLike[str]) -> TRBConfig:
        """The trainer's configuration. Raises ConfigError, naming the source, for values that it refuses."""
        # Said, since it is what `resolved` records: the trainer's default fits the batch.
        options = {"num_generations": int(self._value("num_generations")), **self.training}
        try:
            if self.run.prompts_per_step is not None:
                options["gradient_accumulation_steps"] = self.accumulation_steps()
            if self.run.held_out_prompts:
                options |= {"eval_strategy": "steps", "eval_steps": self.run.held_out_every}
            return TRBConfig(output_dir=str(output_dir), disable_tqdm=True, **options)
        except (ValueError, TypeError, NotImplementedError, ImportError) as error:
            raise ConfigError(f"{self.source}: {error}") from error

    def accumulation_steps(self) -> int:
        """What makes `prompts_per_step` of the batches and processes there are. Raises ConfigError if nothing does."""
        if "gradient_accumulation_steps" in self.training:
            raise ConfigError("prompts_per_step sets gradient_accumulation_steps; give one of the two")
        each, rows = self._value("num_generations"), self._value("per_device_train_batch_size")
        rollouts, processes = (self.run.prompts_per_step or 0) * each, int(os.environ.get("WORLD_SIZE", "1"))
        at_once = rows * processes
        if at_once < 1 or rollouts % at_once:
            if rollouts % processes:
                remedy = f"make prompts_per_step a multiple of {processes // math.gcd(processes, each)}"
            else:
                own = rollouts // processes
                fitting = largest_divisor(own, min(rows, own))
                remedy = f"set per_device_train_batch_size to {fitting}, or another divisor of {own}"
            raise ConfigError(
                f"prompts_per_step={self.run.prompts_per_step} with num_generations={each} is {rollouts} completions, "
                f"which {at_once} at once (per_device_train_batch_size x processes) do not divide; {remedy}"
            )
        return rollouts // at_once

    def _value(self, name: str) -> Any:
        # Of several methods each has its own.
        if name == "budget_schedule" and not self.run.methods:
            keys = (name, "initial_kl_budget", "blend_warmup_steps")
            return budget_schedule_of(SimpleNamespace(**{key: self.training.get(key) for key in keys}))
        return self.training.get(name, default_of(training_fields()[name]))

    def choices(self) -> list[SimpleNamespace]:
        """What decides which knobs are read: of the run, or of every method of a comparison.

        Raises ConfigError for a choice that there is not.
        """
        variants = [self.for_method(name) for name in self.run.methods] or [self]
        found = []
        for variant in variants:
            choice = SimpleNamespace(**{key: variant._value(key) for key in CHOICES})
            try:
                check_choices(choice)
            except InputError as error:
                raise ConfigError(f"{variant.source}: {error}") from error
            found.append(choice)
        return found

    def for_method(self, name: str) -> "Recipe":
        """The recipe of one entry of `methods`: the same run, with that entry's overrides."""
        overrides = {"method": name, **(self.run.methods[name] or {})}
        run = dataclasses.replace(self.run, methods={})
        return Recipe(run, {**self.training, **overrides}, f"{self.source}: methods: {name}", self.places)

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, defaults included, as plain YAML types: `make_recipe` takes it back.

        Left out are the knobs of behaviors and losses that are not in use.
        """
        run = {key: value for key, value in dataclasses.asdict(self.run).items() if key not in _ALTERNATIVES or value}
        left_out = {*REPLACED_KEYS, *_unread(self.choices())}
        training = {name: self._value(name) for name in training_fields() if name not in left_out}
        if self.run.prompts_per_step is not None:
            del training["gradient_accumulation_steps"]
        return {key: plain(value) for key, value in {**run, **training}.items()}

    def to_yaml(self) -> str:
        """`resolved()` as the text of a recipe: first what differs from the defaults, then the rest."""
        values, fields = self.resolved(), {**training_fields(), **run_fields()}
        chosen = {key: value for key, value in values.items() if value != plain(default_of(fields[key]))}
        rest = {key: value for key, value in values.items() if key not in chosen}
        parts = (yaml.dump(p, Dumper=Dumper, sort_keys=False, allow_unicode=True) for p in (chosen, rest))
        return AS_BY_DEFAULT.join(parts)


def load_recipe(path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read, merge and check a recipe, a file or one of the package's by its name (`trb.studies.shipped`).

    `overrides` win over the file and may be dotted (`methods.trb.max_steps`); another method, behavior, loss or
    schedule also takes away what the file sets for its own alone. Paths in the file are relative to it, or to the
    current directory where nothing of that name lies beside it (`trb.studies.places`).

    Raises:
        ConfigError: the file is missing or is not a YAML mapping, a key is unknown, given twice or of the wrong type,
            or the trainer refuses a value.
    """
    file = recipe_file(path)
    places = Places.of(file)
    source = f"{path}, with options" if overrides else str(path)
    values = read_yaml(file)
    if "settings" in values and "student" not in values:
        raise ConfigError(
            f"{path} is a study, and no recipe: run it with `trb sweep --config {shlex.quote(str(path))}`"
        )
    return dataclasses.replace(make_recipe(places.recipe(values), overrides, source=source), places=places)


def make_recipe(
    values: Mapping[str, Any], overrides: Mapping[str, Any] | None = None, *, source: str = "recipe"
) -> Recipe:
    """A recipe from a mapping, checked as `load_recipe` does."""
    checked = {key: checked_value(key, value, source) for key, value in values.items()}
    for key, value in (overrides or {}).items():
        put_override(checked, key, value)
    run_keys = run_fields()
    if checked.get("teachers"):
        checked.setdefault("teacher", "")
    missing = [key for key, item in run_keys.items() if default_of(item) is dataclasses.MISSING and key not in checked]
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
    except InputError as error:
        raise ConfigError(f"{source}: {error}") from error
    recipe = Recipe(run, {key: value for key, value in checked.items() if key not in run_keys}, source)
    if any(key in CHOICES for key in overrides or {}):
        # The file set these for the choice that an option has replaced.
        leftover = _unread(recipe.choices()) - set(overrides or {})
        training = {key: value for key, value in recipe.training.items() if key not in leftover}
        recipe = dataclasses.replace(recipe, training=training)
    for variant in [recipe, *(recipe.for_method(name) for name in run.methods)]:
        _check_teachers(run, variant.training_config("unused"), source)
    _check_knobs(recipe.training, recipe.choices(), source)
    for name, entry in run.methods.items():
        variant = recipe.for_method(name)
        _check_knobs(entry or {}, variant.choices(), variant.source)
    return recipe


def _check_teachers(run: RunConfig, args: TRBConfig, source: str) -> None:
    """Options of the trainer's that do not go with the teachers there are."""
    if args.teacher_column is not None and not run.teachers:
        raise ConfigError(
            f"{source}: teacher_column is {args.teacher_column!r}, and there is one teacher: leave it out, or name "
            "several in teachers"
        )
    if args.teacher_offload and run.teacher_quantization:
        raise ConfigError(
            f"{source}: teacher_quantization is {run.teacher_quantization!r}, and such weights do not go from device "
            "to device: leave out that or teacher_offload"
        )


def _check_knobs(given: Iterable[str], choices: Sequence[SimpleNamespace], source: str) -> None:
    """Refuse knobs that no behavior or loss in use reads."""
    unread = _unread(choices)
    for key in given:
        if key in unread:
            used = " and ".join(dict.fromkeys(map(_in_words, choices)))
            raise ConfigError(
                f"{source}: {key} would do nothing: it belongs to {'; '.join(owners_of(key))}, and this is {used}; "
                "leave it out, or choose another method, behavior or loss"
            )


def _unread(choices: Sequence[SimpleNamespace]) -> set[str]:
    """The knobs of behaviors and losses that are not in use."""
    return every_knob() - knobs_of(choices)


def _in_words(choice: SimpleNamespace) -> str:
    behavior, loss = pair_of(choice)
    schedule = f", budget_schedule: {choice.budget_schedule}" if "budget_schedule" in knobs_of([choice]) else ""
    return f"behavior: {behavior}{schedule}, loss: {loss}"


def _method_entry(name: str, entry: Mapping[str, Any] | None, source: str) -> dict[str, Any]:
    where = f"{source}: methods: {name}"
    for key in entry or {}:
        if key in run_fields():
            raise ConfigError(f"{where}: {key} is shared by all methods, which start alike; set it outside methods")
    checked = {key: checked_value(key, value, where) for key, value in (entry or {}).items()}
    if name not in METHODS and "method" not in checked:
        raise ConfigError(
            f"{where}: say which method it is, method: one of {', '.join(METHODS)}{nearest(str(name), METHODS)}"
        )
    return checked
