"""`trb probe`: what blending does to the prefixes of a pair, before any training or of a trained student.

Left out: what is measured and how (`trb.studies.probe`), and charts (`trb.report`).
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from trb.cli.display import listening, print_lines, print_paths
from trb.errors import calls, did_you_mean

if TYPE_CHECKING:
    from trb.studies.recipe import Recipe

__all__ = ["OPTIONS", "add_probe", "run_probe"]

# What the arguments of `trb.studies.probe` are called here, where messages name them.
_SAME = ("problems", "samples", "excerpts", "alternatives", "kl_budget", "max_new_tokens", "max_rows", "seed")
OPTIONS = {name: f"--{name.replace('_', '-')}" for name in _SAME} | {"teacher_top_k": "--skd-top-k"}


def add_probe(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", required=True, metavar="RECIPE", help="a recipe with eval_data, or a study (with --setting)")
    add("--setting", metavar="NAME", help="the setting of a study, probed on its development problems")
    add("--output-dir", metavar="DIR", help="default: runs/probe- and the name of the file or setting")
    add("--model", metavar="SPEC", help="another student than the recipe's: a run directory, or a model")
    add("--problems", type=int, default=128, metavar="N", help="problems of each set (default: 128)")
    add("--samples", type=int, default=4, metavar="N", help="rollouts per problem and policy (default: 4)")
    add("--budgets", type=float, nargs="*", metavar="E", help="KL budgets per token, inf for the teacher itself")
    add("--truncations", type=int, nargs="*", metavar="T", help="prefix lengths that are continued, in tokens")
    add(
        "--kl-budget",
        type=float,
        metavar="E",
        help="budget of the prefixes that are continued (default: the recipe's first, or trb's where it has none)",
    )
    add("--skd-top-k", type=int, nargs="*", metavar="K", help="teacher's top-k of SKD, to count replaced tokens")
    add("--excerpts", type=int, default=4, metavar="N", help="problems shown token by token (default: 4)")
    add("--alternatives", type=int, default=3, metavar="N", help="likeliest tokens shown with each (default: 3)")
    add("--no-advice", dest="advice", action="store_false", help="no advice, which takes gradients of the student")
    add("--max-new-tokens", type=int, metavar="N", help="longest completion (default: the recipe's)")
    add("--max-rows", type=int, metavar="N", help="completions in flight at once")
    add("--seed", type=int, help="of the draws (default: the recipe's)")
    add("--overwrite", action="store_true", help="remove the probe in the output directory first")
    add("--quiet", action="store_true", help="no progress, only the result")
    parser.set_defaults(hint="Run the same command again: finished parts are kept.")


def run_probe(arguments: argparse.Namespace, rest: list[str]) -> int:
    from trb.models.packaged import quiet_libraries
    from trb.records import PROBE
    from trb.report import write_report
    from trb.studies.probe import probe
    from trb.studies.shipped import recipe_file

    quiet_libraries()
    recipe = _probed_recipe(arguments)
    directory = Path(arguments.output_dir or f"runs/probe-{arguments.setting or recipe_file(arguments.config).stem}")
    names = ("problems", "samples", "excerpts", "alternatives", "advice", "overwrite", "model")
    options = {name: getattr(arguments, name) for name in names}
    for name in ("budgets", "truncations", "kl_budget", "skd_top_k", "max_new_tokens", "max_rows", "seed"):
        if (value := getattr(arguments, name)) is not None:  # else the probe's own default
            options[name] = value
    with recipe.places.told(), calls(OPTIONS), listening(arguments.quiet) as listener:
        found = probe(recipe, directory, **options, listener=listener)
    if found.get("advice"):
        print_lines(found["advice"]["sentences"])
    print_paths(results=directory / PROBE, report=write_report(directory))
    return 0


def _probed_recipe(arguments: argparse.Namespace) -> "Recipe":
    """The recipe named, or the first trb configuration of a study's setting."""
    from trb.studies.recipe import load_recipe
    from trb.studies.shipped import recipe_file
    from trb.studies.study import Unit, load_study
    from trb.studies.yaml_files import ConfigError, read_yaml

    path = arguments.config
    if "settings" not in read_yaml(recipe_file(path)):
        if arguments.setting:
            raise ConfigError(f"--setting means nothing for {path}, which is a recipe and no study; leave it out")
        return load_recipe(path)
    study = load_study(path)
    if arguments.setting not in study.settings:
        asked = arguments.setting
        wrong = "" if asked is None else f", and has no setting {asked!r}{did_you_mean(asked, study.settings)}"
        raise ConfigError(
            f"{path} is a study{wrong}: choose one of its settings with --setting, {', '.join(study.settings)}"
        )
    method = "trb" if "trb" in study.methods else next(iter(study.methods))
    recipe = study.recipe_of(Unit(arguments.setting, "select", method, 0, study.seeds.select[0]))
    return replace(recipe, places=study.places)
