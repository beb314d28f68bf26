"""Several methods from one start: each a run in a directory of its own, and a table of what they reached.

A comparison directory holds recipe.yaml, evaluations/ of the student and the teacher, one run directory per method, and
results.json. Methods start from the same weights, see the same prompts in the same order and, because every draw is a
function of (seed, prompt, rollout, position), share their noise: paired comparisons have less variance.

Left out on purpose: several seeds and settings, and tests of differences (`trb.studies.study`, `trb.studies.findings`).
"""

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from trb.records import CHECKSUMS, EVALUATIONS, RECIPE, RESULTS, role_name
from trb.studies import provenance
from trb.studies.claims import left_as_found
from trb.studies.directories import (
    check_claim,
    check_shared_recipe,
    clear_comparison,
    listed_methods,
    named_checkpoint,
    seal_run,
    sole_run,
)
from trb.studies.disks import explained_disk_errors
from trb.studies.listener import Listener
from trb.studies.packages import require_packages
from trb.studies.recipe import Recipe
from trb.studies.run import train_in
from trb.studies.scores import mean_of_suites, scores_before
from trb.studies.yaml_files import ConfigError
from trb.training import checkpoints
from trb.training.config import TRBConfig

__all__ = ["compare"]


def compare(
    recipe: Recipe,
    output_dir: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    accept_changes: bool = False,
    listener: Listener | None = None,
) -> dict[str, Any]:
    """Train every entry of `methods` from the same student; returns what results.json holds.

    The student and the teacher are evaluated once, and each method has a run directory of its name. What is finished
    is not repeated. Arguments and errors are those of `train`; ConfigError also for a recipe without methods or
    evaluation data. `accept_changes` is for single methods and for the length of training: what all methods share
    stays as it is.
    """
    listener, directory = listener or Listener(), Path(output_dir)
    for needed in ("methods", "eval_data"):
        if not getattr(recipe.run, needed):
            raise ConfigError(f"{recipe.source}: {needed} is empty; a comparison needs at least one entry")
    recipes = {name: recipe.for_method(name) for name in recipe.run.methods}
    for variant in recipes.values():  # what each would refuse once its turn has come
        own = variant.training_config(directory)
        require_packages(own, variant.run.teacher_quantization)
        named_checkpoint(own.resume_from_checkpoint)
    args = recipe.training_config(directory)
    with ExitStack() as held:
        held.enter_context(sole_run(directory, first=args.process_index == 0))
        goes_on = not overwrite and check_shared_recipe(directory, recipe)
        # Of a comparison that is to make room, nothing else may be in use either.
        others = set() if goes_on else {name for name in listed_methods(directory) if (directory / name).is_dir()}
        if goes_on:
            for name, variant in recipes.items():
                # Sizes will do here: contents are compared once more before anything is resumed from.
                checkpoint = checkpoints.latest(directory / name, contents=False, warn=None)
                check_claim(directory / name, variant, checkpoint, accept_changes, warn=False)
        for name in dict.fromkeys([*recipes, *others]):  # all of them, before the first one takes its hours
            held.enter_context(sole_run(directory / name, first=args.process_index == 0))
        clear = None if goes_on else partial(clear_comparison, directory, others | set(recipes))
        return _compare_alone(recipe, recipes, args, directory, listener, accept_changes, clear)


def _compare_alone(
    recipe: Recipe,
    recipes: Mapping[str, Recipe],
    args: TRBConfig,
    directory: Path,
    listener: Listener,
    accept_changes: bool,
    clear: Callable[[], None] | None,
) -> dict[str, Any]:
    """The comparison itself, in directories that nobody else writes to."""
    listener.plan({name: max(0, variant.training_config(directory).max_steps) for name, variant in recipes.items()})
    initial: dict[str, list[dict[str, Any]]] = {}
    at_risk = [directory / name for name in (RECIPE, EVALUATIONS, CHECKSUMS)] if args.process_index == 0 else []
    with explained_disk_errors(directory):
        scores = [directory / EVALUATIONS / role_name(role) for role in ("student", "teacher")]
        with left_as_found(at_risk, begun=lambda: all(path.exists() for path in scores)):
            initial |= scores_before(recipe, args, directory, listener, clear=clear)
        results = {"student": mean_of_suites(initial["student"])}
        for name, variant in recipes.items():
            finished = train_in(variant, directory / name, name, initial["student"], False, listener, accept_changes)
            results[name] = finished[name]
            complete = {**results, "teacher": mean_of_suites(initial["teacher"]), "provenance": provenance.describe()}
            if args.process_index == 0:
                RESULTS.write(directory / RESULTS, complete)
        if args.process_index == 0:
            seal_run(directory, args)
    return complete
