"""Recipes by name: what a name means, what a file is, and what is said where neither is there."""

from pathlib import Path

import pytest

from trb.studies.recipe import load_recipe
from trb.studies.shipped import RECIPES, recipe_file, recipe_names
from trb.studies.study import load_study
from trb.studies.yaml_files import ConfigError


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refusal(spec: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_recipe(spec)
    return str(error.value)


def test_names_are_those_of_the_files_that_come_with_the_package() -> None:
    assert {"quickstart", "smollm2", "baselines/veto", "studies/zoo"} <= set(recipe_names())
    files = {path for path in RECIPES.rglob("*") if path.is_file()}
    assert files == {
        recipe_file(name, launches=launches) for launches in (0, 1) for name in recipe_names(launches=launches)
    }


def test_recipes_and_studies_are_read_by_name() -> None:
    assert load_recipe("baselines/veto").training["method"] == "veto"
    assert load_study("studies/zoo").name == "zoo-study"


def test_a_name_means_the_package_whatever_files_lie_beside() -> None:
    Path("quickstart.yaml").write_text("student: mine\n")
    assert recipe_file("quickstart") == RECIPES / "quickstart.yaml"
    assert recipe_file("quickstart.yaml") == Path("quickstart.yaml")


def test_a_file_that_is_called_like_a_recipe_is_not_guessed() -> None:
    Path("quickstart").write_text("student: mine\n")
    assert "write ./quickstart for the file" in refusal("quickstart")
    assert recipe_file("./quickstart") == Path("quickstart")


def test_files_without_an_ending_are_files() -> None:
    Path("mine").write_text("student: mine\n")
    assert recipe_file("mine") == Path("mine")


def test_an_unknown_name_lists_the_near_one_and_all_of_them() -> None:
    said = refusal("quickstrat")
    assert "did you mean 'quickstart'?" in said
    assert all(name in said for name in recipe_names())
    assert "accelerate" not in said
    assert "quickstrat.yaml" in said


@pytest.mark.parametrize("spec", ["quickstart.yaml", "recipes/quickstart.yaml", "recipes/quickstart"])
def test_a_recipe_that_is_looked_for_as_a_file_is_named(spec: str) -> None:
    assert refusal(spec) == f"there is no file {spec}; the recipe of that name comes with the package: write quickstart"


@pytest.mark.parametrize("spec", ["../quickstart", "./quickstart", "accelerate/ddp", "studies", "Quickstart", ""])
def test_nothing_but_a_name_leads_into_the_package(spec: str) -> None:
    refusal(spec)


def test_settings_of_a_launch_have_names_of_their_own() -> None:
    assert recipe_file("accelerate/fsdp2", launches=True) == RECIPES / "accelerate" / "fsdp2.yaml"
    with pytest.raises(ConfigError, match="did you mean 'accelerate/fsdp2'"):
        recipe_file("accelerate/fsdp", launches=True)
