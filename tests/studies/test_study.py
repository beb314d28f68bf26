"""Studies: what their files may say, which runs they ask for, and that the runs of a seed differ in nothing else."""

import math
from pathlib import Path

import pytest
import yaml

from trb.errors import InputError
from trb.studies.shipped import recipe_names
from trb.studies.study import Study, Unit, load_study
from trb.studies.yaml_files import ConfigError

STUDY = {
    "name": "small",
    "seeds": {"select": [7], "test": 2},
    "configurations": 2,
    "recipe": {"max_steps": 4, "prompts_per_step": 4, "per_device_train_batch_size": 16, "train_limit": 64},
    "settings": {
        "chains": {
            "recipe": {"student": "zoo:student", "teacher": "zoo:teacher", "train_data": "zoo:chains"},
            "dev": {"data": "zoo:chains", "limit": 32, "seed": 1},
            "test": {"data": ["zoo:chains?operands=3", "zoo:chains?operands=5"], "limit": 24, "seed": 2},
        }
    },
    "methods": {"opd": [{}], "trb": {"initial_kl_budget": [0.1, 0.5], "blend_warmup_steps": 3}},
}


def written(tmp_path: Path, **changes: object) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False))
    return path


def test_a_grid_is_the_list_of_its_points(tmp_path):
    methods = {"opd": [{}], "skd": {"skd_teacher_top_k": [1, 3], "skd_teacher_temperature": [0.6, 1.0]}}
    study = load_study(written(tmp_path, methods=methods, configurations=4))
    assert study.methods["skd"] == [
        {"skd_teacher_top_k": k, "skd_teacher_temperature": t} for k in (1, 3) for t in (0.6, 1.0)
    ]


def test_units_of_one_seed_stand_together(tmp_path):
    study = load_study(written(tmp_path, seeds={"select": [7, 8], "test": 2}))
    assert [str(unit) for unit in study.units("select")] == [
        f"chains/select/{run}/seed-{seed}" for seed in (7, 8) for run in ("opd/0", "trb/0", "trb/1")
    ]
    assert study.units("test", {"chains": {"opd": 0, "trb": 1}}) == [
        Unit("chains", "test", method, index, seed) for seed in (0, 1) for method, index in (("opd", 0), ("trb", 1))
    ]


def test_a_part_is_the_study_with_fewer_methods_and_seeds(tmp_path):
    settings = {"chains": {**STUDY["settings"]["chains"], "methods": {"trb": [{}], "veto": [{"veto_strength": 0.3}]}}}
    whole = load_study(written(tmp_path, methods={**STUDY["methods"], "veto": [{}]}, settings=settings))
    part = whole.part(["trb", "opd"], seeds=1)
    fewer = {"chains": {**settings["chains"], "methods": {"trb": [{}]}}}
    assert part == load_study(written(tmp_path, seeds={"select": [7], "test": 1}, settings=fewer))
    assert list(part.methods) == ["opd", "trb"]
    assert part.places is whole.places
    assert whole.part() == whole


def test_a_study_is_repeated_on_fresh_seeds(tmp_path):
    study = load_study(written(tmp_path, seeds={"select": [7], "test": 2}))
    assert study.part(seeds=range(8, 11)).seeds.test == [8, 9, 10]
    with pytest.raises(ValueError, match="seed 7 is used for selection and for the test"):
        study.part(seeds=range(6, 9))
    # What the refusal of more seeds than there are suggests is free, also of seeds that select.
    many = load_study(written(tmp_path, seeds={"select": [12], "test": [3, 5]}))
    with pytest.raises(ValueError, match=r"a range like 13-20 names others"):
        many.part(seeds=3)
    assert many.part(seeds=range(13, 21)).seeds.test == [*range(13, 21)]


@pytest.mark.parametrize(
    ("methods", "seeds", "complaint"),
    [
        (["opd", "tbr"], None, r"small has no method 'tbr'; did you mean 'trb'"),
        (["trb"], None, r"methods lacks opd"),
        (None, 0, r"seeds is 0; small has 2 test seeds"),
        (None, 3, r"seeds is 3; small has 2 test seeds, and a range like 8-15 names others"),
    ],
)
def test_a_part_that_is_none(tmp_path, methods, seeds, complaint):
    with pytest.raises(InputError, match=complaint):
        load_study(written(tmp_path)).part(methods, seeds)


def test_runs_of_one_seed_differ_in_the_method_only(tmp_path):
    study = load_study(written(tmp_path))
    first, second = (
        study.recipe_of(Unit("chains", "test", method, index, 1)).resolved()
        for method, index in (("opd", 0), ("trb", 1))
    )
    differing = {key for key in first.keys() | second.keys() if first.get(key) != second.get(key)}
    assert differing == {"method", "initial_kl_budget", "blend_warmup_steps", "budget_schedule"}
    assert (second["initial_kl_budget"], second["blend_warmup_steps"]) == (0.5, 3)


def test_a_seed_decides_prompts_order_and_noise_but_not_the_problems(tmp_path):
    study = load_study(written(tmp_path))
    first, second = (study.recipe_of(Unit("chains", "test", "opd", 0, seed)).resolved() for seed in (0, 1))
    assert {key for key in first if first[key] != second[key]} == {"seed", "train_seed"}
    assert (first["eval_data"], first["eval_limit"], first["eval_seed"]) == (["zoo:chains"], 32, 1)


@pytest.mark.parametrize("value", [math.inf, -math.inf, 1e-05, "1e5", "no"])
def test_a_written_study_reads_back_the_same(tmp_path, value):
    """Infinite numbers stay what they are, as does text that looks like something else to one version of YAML."""
    own = {"options": {"value": value}}
    study = Study.model_validate({**STUDY, "recipe": {**STUDY["recipe"], "chat_template_kwargs": own}})
    again = tmp_path / "again.yaml"
    again.write_text(study.to_yaml())
    assert load_study(again) == study


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": 3}, "sedes: unknown key"),
        ({"methods": {"trb": [{}]}}, "lacks opd"),
        ({"methods": {"opd": [{}], "trb": [{}, {}, {}]}}, "trb has 3 configurations .* says 2"),
        ({"methods": {"opd": [{}], "mine": [{}]}}, "mine is no method"),
        ({"methods": {"opd": [{}], "trb": {"initial_kl_bugdet": [0.1, 0.2]}}}, "unknown key 'initial_kl_bugdet'"),
        ({"methods": {"opd": [{}], "trb": {"initial_kl_budget": [0.1, -1.0]}}}, "-1"),
        ({"methods": {"opd": [{}], "../trb": [{"method": "trb"}]}}, "pattern"),
        ({"seeds": {"select": [0], "test": 2}}, "seed 0 is used for selection and for the test"),
        ({"seeds": {"select": [7], "test": [1, 1]}}, "test names a seed twice"),
        ({"seeds": {"select": [7], "test": 0}}, "seeds.test"),
        ({"recipe": {**STUDY["recipe"], "seed": 3}}, "recipe sets seed, .*: write it under seeds"),
        (
            {"recipe": {**STUDY["recipe"], "eval_split": "train"}},
            "recipe sets eval_split, .*: write split under dev",
        ),
        ({"methods": {"opd": [{"seed": 77}]}}, "methods: opd sets seed, .*: write it under seeds"),
        ({"methods": {"opd": [{"train_seed": 77}]}}, "methods: opd sets train_seed, .*: write it under seeds"),
        ({"methods": {"opd": [{"eval_limit": 9}]}}, "methods: opd sets eval_limit, .*: write limit under dev"),
        ({"methods": {"opd": {"save_final_model": [False]}}}, "methods: opd sets save_final_model, .*: leave it out"),
        (
            {"methods": {"opd": [{"methods": {"trb": {}}}]}},
            "methods: opd sets methods, .*: write it under methods",
        ),
        (
            {"methods": {"opd": [{}], "trb": [{"student": "zoo:teacher"}]}},
            "methods: trb sets student, which all methods of a setting share: set it in its recipe",
        ),
        *(
            ({"methods": {"opd": [{key: value}]}}, f"methods: opd sets {key}, which all methods of a setting share")
            for key, value in {
                "teacher": "zoo:student",
                "teachers": {"a": "zoo:teacher"},
                "train_data": "zoo:clock",
                "train_limit": 8,
                "overlong_prompts": "drop",
                "eval_temperature": 0.5,
                "shuffle_dataset": False,
                "chat_template_kwargs": {"enable_thinking": True},
                "tools": ["calculator"],
                "max_tool_calling_iterations": 3,
            }.items()
        ),
        (
            {"methods": {"opd": [{}], "trb": {"max_completion_length": [8, 16]}}},
            "chains: methods: trb sets max_completion_length, .* as eval_max_new_tokens",
        ),
        (
            {"settings": {"chains": {**STUDY["settings"]["chains"], "methods": {"trb": [{"eval_seed": 3}]}}}},
            "chains: methods: trb sets eval_seed, .*: write seed under dev and test",
        ),
        ({"select_by": "luck"}, "select_by"),
        (
            {"settings": {"chains": {**STUDY["settings"]["chains"], "test": {"data": []}}}},
            "settings.chains.test.data: .* at least 1",
        ),
    ],
)
def test_what_a_study_cannot_say_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        load_study(written(tmp_path, **changes))


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith("studies/")])
def test_the_studies_of_the_package_say_nothing_in_vain(name):
    assert load_study(name).name


def test_what_a_method_may_have_of_its_own(tmp_path):
    own = {"lora_rank": 2, "prompts_per_step": 8, "eval_every": 2, "temperature": 0.9}
    study = load_study(written(tmp_path, methods={"opd": [own]}))
    recipe = study.recipe_of(Unit("chains", "test", "opd", 0, 0))
    assert (recipe.run.lora_rank, recipe.training["temperature"]) == (2, 0.9)


def test_rollouts_of_a_method_may_be_shorter_where_the_setting_says_what_is_scored(tmp_path):
    recipe = {**STUDY["recipe"], "eval_max_new_tokens": 32}
    study = load_study(written(tmp_path, recipe=recipe, methods={"opd": [{}], "trb": [{"max_completion_length": 8}]}))
    trained = study.recipe_of(Unit("chains", "test", "trb", 0, 0))
    scored = study.scoring_recipe("chains", study.settings["chains"].test)
    assert (trained.training["max_completion_length"], trained.run.eval_max_new_tokens) == (8, 32)
    assert scored.run.eval_max_new_tokens == 32


def test_unequal_families_need_the_study_to_say_so(tmp_path):
    methods = {"opd": [{}], "trb": {"initial_kl_budget": [0.1, 0.2, 0.5]}}
    study = load_study(written(tmp_path, methods=methods, configurations="unequal"))
    assert isinstance(study, Study)
    assert len(study.units("select")) == 4


def test_development_problems_may_come_from_another_split(tmp_path):
    """The remedy that the refusal of shared problems names; the test problems stay those of the test split."""
    chains = STUDY["settings"]["chains"]
    settings = {"chains": {**chains, "dev": {**chains["dev"], "split": "train"}}}
    study = load_study(written(tmp_path, settings=settings))
    own = study.settings["chains"]
    assert study.recipe_of(Unit("chains", "select", "opd", 0, 7)).run.eval_split == "train"
    assert study.scoring_recipe("chains", own.dev).run.eval_split == "train"
    assert study.scoring_recipe("chains", own.test).run.eval_split == "test"
