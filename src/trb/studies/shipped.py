"""Recipes by name: those that come with the package, and what tells a name from a file.

A name is that of a file under `trb/recipes` without its ending: quickstart, baselines/veto, studies/zoo. It never means
a file of the current directory, which is written with its ending (mine.yaml) or as a path (./mine): a command does the
same wherever it is given. Left out: reading them (`trb.studies.recipe`, `trb.studies.study`).
"""

import os
from pathlib import Path

import trb
from trb.errors import did_you_mean

__all__ = ["RECIPES", "recipe_file", "recipe_names"]

RECIPES = Path(trb.__file__).parent / "recipes"
LAUNCHES = "accelerate"  # what `accelerate launch` reads: no recipes, though they lie beside them

_ENDINGS = (".yaml", ".yml")


def recipe_names(*, launches: bool = False) -> list[str]:
    """The names of what the package has: recipes and studies, or settings of `accelerate launch`."""
    files = sorted(RECIPES.rglob("*.yaml"), key=lambda path: (len(path.parts), path))
    names = [path.relative_to(RECIPES).with_suffix("").as_posix() for path in files]
    return [name for name in names if name.startswith(f"{LAUNCHES}/") == launches]


def recipe_file(spec: str | os.PathLike[str], *, launches: bool = False) -> Path:
    """The file that a name or a path stands for.

    Raises:
        ConfigError: the name is unknown, or is also that of a file here. What a path leads to is not looked at.
    """
    from trb.studies.yaml_files import ConfigError

    text, path, names = os.fspath(spec), Path(spec), recipe_names(launches=launches)
    if text in names:
        if path.is_file():
            raise ConfigError(f"{text!r} is a recipe of the package, and a file here: write ./{text} for the file")
        return RECIPES / f"{text}.yaml"
    if path.exists():
        return path
    name = text.removeprefix("recipes/").removesuffix(path.suffix if path.suffix in _ENDINGS else "")
    if name in names:
        raise ConfigError(f"there is no file {text}; the recipe of that name comes with the package: write {name}")
    own = next((file for ending in _ENDINGS if (file := Path(f"{text}{ending}")).is_file()), None)
    if own is not None:
        raise ConfigError(f"there is no recipe {text!r}, and a file {own}: write its ending, {own}")
    if path.suffix in _ENDINGS or path.is_absolute() or text.startswith((".", "~")):
        return path
    near = did_you_mean(text, names)
    raise ConfigError(
        f"there is no recipe {text!r}{near}; the package has {', '.join(names)}, and a file of your own is named with "
        f"its ending, as in {text}.yaml"
    )
