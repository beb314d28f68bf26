"""A study: methods x settings x seeds, and the rules by which it is judged, fixed in one YAML before anything runs.

Every method family has the same number of configurations to choose from. They are compared on a development split with
seeds of their own, by the rule the file states; the chosen configuration of each family then trains with the test
seeds, and its models are scored once on the test split. A seed decides which prompts are drawn, their order and all
noise, and every method of a setting shares it: differences are paired.

This module reads and checks such a file and lists its runs. Running them is `trb.studies.sweep`, judging them
`trb.studies.findings`.
"""

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from trb.errors import InputError, did_you_mean
from trb.records import REFERENCE, role_name
from trb.sampling.uniforms import SEED_BOUNDS, SEEDS
from trb.studies.keys import TOOL_KEYS, run_fields
from trb.studies.places import Places
from trb.studies.recipe import Recipe, make_recipe
from trb.studies.shipped import recipe_file
from trb.studies.yaml_files import ConfigError, Dumper, read_yaml
from trb.training.methods import METHODS
from trb.training.resume import plain

__all__ = [
    "AS_WRITTEN",
    "BASELINE",
    "IN_VAIN",
    "ROLES",
    "Phase",
    "ProblemSets",
    "Reference",
    "Setting",
    "Study",
    "Unit",
    "load_study",
]

BASELINE = "opd"  # what every method is compared with
ROLES = ("student", "teacher")
Phase = Literal["select", "test"]
_MOST_SEEDS = 100_000
AS_WRITTEN = {"as": "written"}  # of validation: by whatever version, which may have taken keys in vain
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
# Of the keys of a run that are no option of its training, those that a method may have of its own.
_OF_A_METHOD = {
    *("lora_rank", "lora_alpha", "lora_target_modules", "prompts_per_step"),
    *("held_out_every", "eval_every", "eval_max_rows"),
}
# Options of training that are shared nevertheless: which prompts are seen, and what a model is asked when it is scored.
_SHARED_OPTIONS = {"shuffle_dataset", "chat_template_kwargs", *TOOL_KEYS}


def _configurations(value: Any) -> Any:
    """A grid (key -> list of values) as the list of its points, in the order of nested loops."""
    if not isinstance(value, Mapping):
        return value
    axes = [entry if isinstance(entry, list) else [entry] for entry in value.values()]
    return [dict(zip(value, point, strict=True)) for point in itertools.product(*axes)]


def _refuse(where: str, options: Mapping[str, Any], decided: Mapping[str, str]) -> None:
    for key in options:
        if key in decided:
            raise InputError(f"{where} sets {key}, which the study decides itself: {decided[key]}")


def _those(wanted: Iterable[str], methods: Mapping[str, Any]) -> dict[str, Any]:
    return {name: configurations for name, configurations in methods.items() if name in set(wanted)}


def _seeds(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    return list(range(_few(value)))


def _few(count: int) -> int:
    """A number of seeds, refused where it is a seed by mistake, before a list of so many is made."""
    if count > _MOST_SEEDS:
        raise InputError(f"{count} seeds are more than a study can run; a seed that is meant is a list, [{count}]")
    return count


def _seed(value: int) -> int:
    if value not in SEEDS:
        raise InputError(f"a seed is {value}; it must lie in {SEED_BOUNDS}")
    return value


Seed = Annotated[int, AfterValidator(_seed)]

Configurations = dict[
    Annotated[str, Field(pattern=_NAME)],
    Annotated[list[dict[str, Any]], BeforeValidator(_configurations), Field(min_length=1)],
]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ProblemSets(_Part):
    """Problems to score a model on."""

    data: Annotated[
        list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value), Field(min_length=1)
    ]
    """Specs as in `eval_data`; the score is the unweighted mean of theirs."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Problems of each."""
    samples: int | dict[str, int] = 1
    """Completions per problem: one number, or one per entry of `data`."""
    seed: Seed = 0
    """Which problems, and the noise of sampling; not that of training."""
    split: str = "test"

    def keys(self) -> dict[str, Any]:
        """As the keys of a recipe."""
        return {f"eval_{name}": value for name, value in self}


# What a study decides itself, and where that is written. In the configuration of a method it never decided anything.
IN_VAIN = {
    **dict.fromkeys(("seed", "train_seed"), "write it under seeds"),
    **{f"eval_{name}": f"write {name} under dev and test of a setting" for name in ProblemSets.model_fields},
    "save_final_model": "leave it out, and pass --keep-models to keep what was tested",
}
_METHODS_OUTSIDE = dict.fromkeys(("method", "methods"), "write it under methods, beside settings")


class Setting(_Part):
    """A student, a teacher and a task."""

    title: str = ""
    description: str = ""
    recipe: dict[str, Any]
    dev: ProblemSets
    test: ProblemSets
    methods: Configurations = Field(default_factory=dict)
    """Configurations of families in this setting, in place of the study's."""


class Seeds(_Part):
    """Which seeds: a list, or how many (from 0)."""

    select: Annotated[list[Seed], BeforeValidator(_seeds), Field(min_length=1)]
    test: Annotated[list[Seed], BeforeValidator(_seeds), Field(min_length=1)]

    @model_validator(mode="after")
    def _disjoint(self) -> "Seeds":
        self.check_fresh(self.test)
        for name in ("select", "test"):
            if len(set(seeds := getattr(self, name))) < len(seeds):
                raise InputError(f"{name} names a seed twice")
        return self

    def check_fresh(self, test: Iterable[int]) -> None:
        """Raises InputError if a test seed also selects."""
        if shared := sorted(set(self.select) & set(test)):
            raise InputError(f"seed {shared[0]} is used for selection and for the test; use different ones")


class Study(_Part):
    """Everything a study is, as its file has it."""

    name: Annotated[str, Field(pattern=_NAME)]
    description: str = ""
    seeds: Seeds
    select_by: Literal["final", "area"] = "final"
    """Mean over the selection seeds of the development score after the last step, or of the area under its curve."""
    target: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Steps to target: to this share of plain distillation's mean final development score; of a reverse KL, to what
    plain distillation's is this share of."""
    level: Annotated[float, Field(gt=0, lt=1)] = 0.95
    resamples: Annotated[int, Field(ge=100)] = 10_000
    configurations: Annotated[int, Field(ge=1)] | Literal["unequal"]
    """How many configurations each family has; a family with nothing to choose has one. "unequal" gives up the rule, to
    repeat grids that others chose."""
    threads: Annotated[int, Field(ge=1)] = 1
    """Threads of one run: part of the study, as sums round differently with another number."""
    recipe: dict[str, Any] = Field(default_factory=dict)
    settings: Annotated[dict[Annotated[str, Field(pattern=_NAME)], Setting], Field(min_length=1)]
    methods: Configurations
    _places: Places = PrivateAttr(default_factory=Places)

    @property
    def places(self) -> Places:
        """Where the paths in its file were looked for."""
        return self._places

    @model_validator(mode="after")
    def _fair(self, info: ValidationInfo) -> "Study":
        if BASELINE not in self.methods:
            raise InputError(f"methods lacks {BASELINE}, which every method is compared with")
        for where, setting in self.settings.items():
            if unknown := setting.methods.keys() - self.methods.keys():
                raise InputError(
                    f"{where}: methods has {sorted(unknown)[0]}, which the study's own methods lack; name it there too"
                )
        every = [self.methods, *(setting.methods for setting in self.settings.values())]
        for name, configurations in (entry for methods in every for entry in methods.items()):
            if name not in METHODS and any("method" not in entry for entry in configurations):
                raise InputError(f"{name} is no method; give its configurations a method: {', '.join(METHODS)}")
            if self.configurations != "unequal" and len(configurations) not in (1, self.configurations):
                raise InputError(
                    f"{name} has {len(configurations)} configurations and `configurations` says {self.configurations}: "
                    "every family gets the same number (or one, with nothing to choose)"
                )
        if info.context != AS_WRITTEN:
            self._check_keys()
        return self

    def _check_keys(self) -> None:
        """Raises InputError for keys that would decide nothing, or by which methods would differ in more than how they
        train."""
        parts: list[tuple[str, Study | Setting]] = [("", self)]
        for where, part in parts + [(f"{name}: ", setting) for name, setting in self.settings.items()]:
            _refuse(f"{where}recipe", part.recipe, IN_VAIN | _METHODS_OUTSIDE)
            for name, options in ((name, each) for name, several in part.methods.items() for each in several):
                _refuse(f"{where}methods: {name}", options, IN_VAIN | {"methods": _METHODS_OUTSIDE["methods"]})
                for key in options:
                    if key in (run_fields().keys() - _OF_A_METHOD) | _SHARED_OPTIONS:
                        raise InputError(
                            f"{where}methods: {name} sets {key}, which all methods of a setting share: set it in its "
                            "recipe"
                        )

    def part(self, methods: Iterable[str] | None = None, seeds: int | range | None = None) -> "Study":
        """Some of its methods (in its own order) and test seeds; what is left out may join later.

        `seeds` is how many of its own, from the first, or a range of any: a finished study is repeated on fresh ones.

        Raises ValueError for a method that it lacks, for more seeds than it has, for one that selects, and where `opd`
        is left out.
        """
        wanted = list(self.methods if methods is None else methods)
        for name in wanted:
            if name not in self.methods:
                raise InputError(f"{self.name} has no method {name!r}{did_you_mean(name, self.methods)}")
        if BASELINE not in wanted:
            raise InputError(f"methods lacks {BASELINE}, which every method is compared with")
        own = self.seeds.test
        if isinstance(seeds, int) and not 1 <= seeds <= len(own):
            free = max(*own, *self.seeds.select) + 1
            raise InputError(
                f"seeds is {seeds}; {self.name} has {len(own)} test seeds, and a range like {free}-{free + 7} names "
                "others"
            )
        if isinstance(seeds, range):
            _few(len(seeds))
            if seeds[-1] not in SEEDS:
                raise InputError(f"seeds ends with {seeds[-1]}; a seed must lie in {SEED_BOUNDS}")
        test = list(seeds) if isinstance(seeds, range) else own[:seeds]
        self.seeds.check_fresh(test)
        return self.model_copy(
            update={
                "methods": _those(wanted, self.methods),
                "seeds": self.seeds.model_copy(update={"test": test}),
                "settings": {
                    name: setting.model_copy(update={"methods": _those(wanted, setting.methods)})
                    for name, setting in self.settings.items()
                },
            }
        )

    # ---- its runs ----

    def choices(self, setting: str) -> Mapping[str, list[dict[str, Any]]]:
        """The configurations of every family in a setting, in the order of the study's methods."""
        return {name: self.settings[setting].methods.get(name, every) for name, every in self.methods.items()}

    def selects(self, setting: str) -> bool:
        """Whether a setting has anything to choose; where it has, families without a choice are scored beside it."""
        return any(len(configurations) > 1 for configurations in self.choices(setting).values())

    def units(self, phase: Phase, chosen: Mapping[str, Mapping[str, int]] | None = None) -> list["Unit"]:
        """The runs of a phase; those of one seed stand together, so that an unfinished study is paired all the same.

        `chosen` maps setting -> method -> index of the chosen configuration, and is needed for the test phase; a method
        that it lacks has one configuration.
        """
        units = []
        for seed, setting, method in itertools.product(getattr(self.seeds, phase), self.settings, self.methods):
            if phase == "test":
                indices: Iterable[int] = [(chosen or {})[setting].get(method, 0)]
            else:
                indices = range(len(self.choices(setting)[method])) if self.selects(setting) else ()
            for index in indices:
                units.append(Unit(setting, phase, method, index, seed))
        return units

    def recipe_of(self, unit: "Unit") -> Recipe:
        """The training run of a unit: scored on the development split while it trains. Raises ConfigError."""
        return make_recipe(
            {
                "method": unit.method,
                **self._shared(unit.setting),
                **self.choices(unit.setting)[unit.method][unit.configuration],
                "seed": unit.seed,
                "train_seed": unit.seed,
                **self.settings[unit.setting].dev.keys(),
                "save_final_model": unit.phase == "test",
            },
            source=f"{self.name}: {unit}",
        )

    def scoring_recipe(self, setting: str, problems: ProblemSets) -> Recipe:
        """How models of a setting are scored on `problems`. Raises ConfigError."""
        return make_recipe({**self._shared(setting), **problems.keys()}, source=f"{self.name}: {setting}")

    def _shared(self, setting: str) -> dict[str, Any]:
        return {**self.recipe, **self.settings[setting].recipe}

    def check(self) -> None:
        """Build every recipe once, so that a mistake in the last method is found before the first run.

        Raises ConfigError.
        """
        for name in self.settings:
            for method, configurations in self.choices(name).items():
                for index, options in enumerate(configurations):
                    recipe = self.recipe_of(Unit(name, "select", method, index, self.seeds.select[0]))
                    if "max_completion_length" in options and not recipe.run.eval_max_new_tokens:
                        raise ConfigError(
                            f"{name}: methods: {method} sets max_completion_length, and completions are scored at that "
                            "of the setting; say in its recipe at which, as eval_max_new_tokens"
                        )
        for name, setting in self.settings.items():
            for problems in (setting.dev, setting.test):
                self.scoring_recipe(name, problems)

    def to_yaml(self) -> str:
        """The study with its defaults filled in, as `load_study` reads it."""
        return yaml.dump(plain(self.model_dump()), Dumper=Dumper, sort_keys=False, allow_unicode=True)


@dataclass(frozen=True)
class Unit:
    """One training run of a study."""

    setting: str
    phase: Phase
    method: str
    configuration: int
    seed: int

    @property
    def path(self) -> Path:
        """Its run directory, inside the study's."""
        chosen = [] if self.phase == "test" else [str(self.configuration)]
        return Path(self.setting, self.phase, self.method, *chosen, f"seed-{self.seed}")

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class Reference:
    """The scores of a model of a setting that no run trains: the untrained student, or the teacher."""

    setting: str
    role: str

    @property
    def path(self) -> Path:
        """Its file, inside the study's directory."""
        return Path(self.setting, REFERENCE, role_name(self.role))

    def __str__(self) -> str:
        return str(self.path.with_suffix(""))


def load_study(path: str | os.PathLike[str], *, places: Places | None = None) -> Study:
    """Read and check a study, a file or one of the package's by its name (`trb.studies.shipped`).

    `places` says where its paths are looked for (default: beside the file, then in the current directory).

    Raises:
        ConfigError: the file is missing, is no YAML mapping, or says something a study cannot; the message names the
            key and the remedy.
    """
    file = recipe_file(path)
    places = places or Places.of(file)
    values = read_yaml(file)
    if "student" in values and "settings" not in values:
        command = "compare" if "methods" in values else "train"
        raise ConfigError(f"{path} is a recipe, and no study: run it with `trb {command} --config {path}`")
    try:
        study = Study.model_validate(places.study(values))
    except ValidationError as error:
        raise ConfigError(f"{path}: {'; '.join(_complaints(error))}") from error
    study._places = places
    study.check()
    return study


def _complaints(error: ValidationError) -> Iterator[str]:
    for item in error.errors()[:5]:
        where = ".".join(map(str, item["loc"]))
        text = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            text = "unknown key"
        yield f"{where}: {text}" if where else text
