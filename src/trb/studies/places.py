"""Where the relative paths of a recipe lead: beside its file first, then in the current directory.

Only what a recipe reads is looked for: models, data, templates. What a run writes, and what it goes on from, is
relative to the current directory alone, as are paths that are given as options. Left out: what names without a file
mean, and what is refused (`trb.models.directories`, `trb.tasks.sources`).
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trb.errors import TrbError
from trb.models.directories import BUILT_IN
from trb.models.sharing import ADAPTER, BASE
from trb.studies.shipped import RECIPES
from trb.tasks.evaluation import BENCHMARKS
from trb.tasks.sources import GENERATORS

__all__ = ["Places", "seen_from"]

# The last three are files of TRL and transformers; a mapping in their place is no path.
_PATHS = ("student", "teacher", "train_data", "chat_template", "deepspeed", "fsdp_config", "accelerator_config")

_NAMES = (*BUILT_IN, *BENCHMARKS, BASE)
_TEMPLATES = ("student", "teacher", "plain")  # what chat_template may be beside a path


@dataclass
class Places:
    """Where the paths of one file are looked for, and which of them are in neither place."""

    # Neither is part of what a recipe says: two that are read from different folders may be equal.
    folder: Path = field(default=Path(), compare=False)
    nowhere: set[str] = field(default_factory=set, compare=False)
    # Whether paths are given as where they lie, links followed; problem sets and what is nowhere stay as written.
    in_full: bool = field(default=False, compare=False)
    # Or problem sets too, where their names seed nothing.
    sets_in_full: bool = field(default=False, compare=False)

    @classmethod
    def of(cls, file: Path) -> "Places":
        """Of a file of recipes; the package's own have nothing beside them."""
        return cls() if file.is_relative_to(RECIPES) else cls(file.parent)

    def recipe(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values of a recipe, with the paths of what lies beside it."""
        found = self._problems(values, "eval_data", "eval_samples")
        named = {"chat_template"} if values.get("chat_template") in _TEMPLATES else set()
        if isinstance(teachers := values.get("teachers"), Mapping):
            found["teachers"] = {name: self._place(spec) for name, spec in teachers.items()}
        return found | {key: self._place(values[key]) for key in _PATHS if key in values and key not in named}

    def model(self, spec: str) -> str:
        """A model's spec, as `recipe` gives it."""
        return str(self._place(spec))

    def configuration(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values of a study or of a recipe, whichever they are."""
        return self.study(values) if "settings" in values else self.recipe(values)

    def study(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values of a study: of its recipe, and of the recipe and the problem sets of every setting."""
        found = dict(values)
        if isinstance(recipe := values.get("recipe"), Mapping):
            found["recipe"] = self.recipe(recipe)
        if isinstance(settings := values.get("settings"), Mapping):
            found["settings"] = {name: self._setting(setting) for name, setting in settings.items()}
        return found

    @contextmanager
    def told(self) -> Iterator[None]:
        """Errors that name what is in neither place say where it was looked for."""
        try:
            yield
        except TrbError as error:
            if any(name in str(error) for name in self.nowhere):
                beside = "" if self._here() else f"beside the recipe, in {self.folder.absolute()}, and "
                error.add_note(f"(looked for {beside}in the current directory, {Path.cwd()})")
            raise

    def _setting(self, setting: Any) -> Any:
        if not isinstance(setting, Mapping):
            return setting
        found = dict(setting)
        for part in ("dev", "test"):
            if isinstance(problems := setting.get(part), Mapping):
                found[part] = self._problems(problems, "data", "samples")
        if isinstance(recipe := setting.get("recipe"), Mapping):
            found["recipe"] = self.recipe(recipe)
        return found

    def _problems(self, values: Mapping[str, Any], data: str, samples: str) -> dict[str, Any]:
        """The values with the paths of problem sets, by which the numbers of their samples go."""
        found = dict(values)
        if self.in_full and not self.sets_in_full:  # their names seed what is drawn
            return found
        if isinstance(named := values.get(data), str | list):
            found[data] = self._suite(named) if isinstance(named, str) else [self._suite(name) for name in named]
        if isinstance(counts := values.get(samples), Mapping):
            found[samples] = {self._suite(name): count for name, count in counts.items()}
        return found

    def _suite(self, name: Any) -> Any:
        """An entry of eval_data, which may be benchmark=FILE."""
        benchmark, equals, path = name.partition("=") if isinstance(name, str) else ("", "", "")
        return f"{benchmark}={self._place(path)}" if equals and benchmark in BENCHMARKS else self._place(name)

    def _place(self, value: Any) -> Any:
        """A path beside the recipe where there is one; else the value as it was written."""
        if isinstance(value, str) and value.startswith(ADAPTER):
            return ADAPTER + self._place(value.removeprefix(ADAPTER))
        if not isinstance(value, str) or not value or value in _NAMES or value.startswith(GENERATORS):
            return value
        if self.in_full:
            return self._where(value)
        if os.path.isabs(os.path.expanduser(value)):
            return value
        beside = os.path.join(self.folder, value)
        if not self._here() and os.path.exists(beside):
            return beside
        if not os.path.exists(value):
            self.nowhere.add(value)
        return value

    def _where(self, value: str) -> str:
        place = os.path.join(self.folder, os.path.expanduser(value))
        if value in self.nowhere or not os.path.exists(place):
            self.nowhere.add(value)
            return value
        return os.path.realpath(place)

    def _here(self) -> bool:
        return os.path.samefile(self.folder, os.curdir)


def seen_from(
    folder: Path, there: Mapping[str, Any], here: Mapping[str, Any], *, sets: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two configurations, of recipes or of studies, with their paths in full, so that one file has one name.

    `folder` is where the relative paths of `there` begin. What does not lie there any more is left as it is written, in
    both: it may have been copied here, with the folder of its run. `sets` has the paths of problem sets in full too.
    """
    first = Places(folder, in_full=True, sets_in_full=sets)
    found = first.configuration(there)
    second = Places(nowhere=set(first.nowhere), in_full=True, sets_in_full=sets)
    return found, second.configuration(here)
