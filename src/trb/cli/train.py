"""`trb train` and `trb compare`: a recipe, options over it, and a directory that is gone on with.

Left out: what a run and a comparison are, and what may go on in a directory (`trb.studies.run`,
`trb.studies.comparison`, `trb.studies.directories`).
"""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trb.cli.display import listening, new_console, print_keys, print_paths, result_table

if TYPE_CHECKING:
    from trb.studies.recipe import Recipe

__all__ = ["add_compare", "add_train", "run_compare", "run_train"]


def add_train(parser: argparse.ArgumentParser) -> None:
    _add_run_arguments(parser)
    parser.add_argument("--help-keys", action="store_true", help="list every key of a recipe, and exit")
    parser.set_defaults(hint="Run the same command again to continue from the last complete checkpoint.")


def add_compare(parser: argparse.ArgumentParser) -> None:
    _add_run_arguments(parser)
    parser.set_defaults(
        hint="Run the same command again: finished methods are kept, and the rest continues from checkpoints."
    )


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="RECIPE", help="the name of one of ours (below), or a YAML file")
    parser.add_argument("--output-dir", "--output_dir", metavar="DIR", help="default: runs/ and the recipe's name")
    parser.add_argument("--overwrite", action="store_true", help="remove the run in the output directory first")
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="continue from a checkpoint of other settings, data or models, with a warning",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress, only the result")


def run_train(arguments: argparse.Namespace, rest: list[str]) -> int:
    if arguments.help_keys:
        print_keys()
        return 0
    from trb.studies.run import train
    from trb.studies.yaml_files import ConfigError

    recipe, directory = _recipe(arguments, rest)
    methods = recipe.run.methods
    if methods:
        name = recipe.training.get("method")
        if name not in methods:
            none = "" if name is None else f", and {name} is none of them"
            raise ConfigError(
                f"{arguments.config} compares {', '.join(methods)}{none}: use `trb compare`, or choose one of them "
                "with --method"
            )
        recipe = recipe.for_method(name)
        directory = directory if arguments.output_dir else directory / name
    with recipe.places.told(), listening(arguments.quiet) as listener:
        results = train(recipe, directory, **_conditions(arguments), listener=listener)
    return _conclude(results, directory)


def run_compare(arguments: argparse.Namespace, rest: list[str]) -> int:
    from trb.studies.comparison import compare
    from trb.studies.yaml_files import ConfigError

    recipe, directory = _recipe(arguments, rest)
    if recipe.run.methods and "method" in recipe.training:
        raise ConfigError("method means nothing to `trb compare`: it runs every entry of methods")
    with recipe.places.told(), listening(arguments.quiet) as listener:
        results = compare(recipe, directory, **_conditions(arguments), listener=listener)
    return _conclude(results, directory)


def _recipe(arguments: argparse.Namespace, rest: list[str]) -> tuple["Recipe", Path]:
    from trb.models.packaged import quiet_libraries
    from trb.studies.keys import parse_overrides
    from trb.studies.recipe import load_recipe
    from trb.studies.shipped import recipe_file
    from trb.studies.yaml_files import ConfigError

    if arguments.config is None:
        raise ConfigError("--config is missing: name a recipe, such as quickstart, or a file")
    quiet_libraries()
    recipe = load_recipe(arguments.config, parse_overrides(rest))
    return recipe, Path(arguments.output_dir or Path("runs") / recipe_file(arguments.config).stem)


def _conditions(arguments: argparse.Namespace) -> dict[str, Any]:
    """What may happen to a run that is in the output directory."""
    return {"overwrite": arguments.overwrite, "accept_changes": arguments.accept_changes}


def _conclude(results: Mapping[str, Any], directory: Path) -> int:
    """The table, the report, and where everything is."""
    if int(os.environ.get("RANK", "0")):
        return 0
    from trb.records import RESULTS
    from trb.report import write_report

    report = write_report(directory)
    new_console().print(result_table(results))
    print_paths(results=directory / RESULTS, report=report)
    return 0
