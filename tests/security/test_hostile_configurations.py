"""Recipes and studies made to run code, to fill the memory, or to reach somebody else's directories."""

import json
from pathlib import Path

from hostile_helpers import ALIASES, RECIPE, each, refused

from trb.studies.directories import clear_comparison, listed_methods
from trb.studies.recipe import load_recipe, make_recipe
from trb.studies.study import load_study

YAML = {
    "aliases": ALIASES,
    "aliases of a known key": ALIASES.replace("i: &i", "lora_target_modules: &i"),
    "itself": "student: &a [*a]\n",
    "nesting": "student: " + "[" * 5_000 + "\n",
    "object": "student: !!python/object/apply:os.system ['true']\n",
    "name": "student: !!python/name:os.system\n",
    "digits": "seed: " + "9" * 5_000 + "\n",
    "wrong tag": "seed: !!bool maybe\n",
    "empty tag": "seed: !!int ''\n",
    "date": "seed: !!timestamp never\n",
    "key of keys": "? [a, b]\n: 1\n",
    "control": "student: \x07\n",
}


@each("text", **YAML)
def test_a_recipe(folder: Path, text: str) -> None:
    path = folder / "recipe.yaml"
    path.write_text(text)
    refused(lambda: load_recipe(path))


@each("text", **YAML)
def test_a_study(folder: Path, text: str) -> None:
    path = folder / "study.yaml"
    path.write_text("settings: {}\n" + text)
    refused(lambda: load_study(path))


def test_a_comparison_whose_methods_are_elsewhere(folder: Path) -> None:
    victim, runs = folder / "victim", folder / "runs"
    (victim / "model").mkdir(parents=True)
    (victim / "config.yaml").write_text("mine")
    runs.mkdir()
    (runs / "recipe.yaml").write_text(json.dumps({"methods": {"../victim": {}, str(victim): {}, "..": {}, "": {}}}))
    recipe = make_recipe({**RECIPE, "eval_data": "zoo:chains", "methods": {"opd": {}}})
    clear_comparison(runs, {*recipe.run.methods, *listed_methods(runs)})  # what --overwrite does
    assert (victim / "config.yaml").exists()
    assert (victim / "model").exists()
