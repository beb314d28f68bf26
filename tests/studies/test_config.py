"""Recipes and overrides: what is read, what is refused, and what the refusal says."""

import dataclasses
import enum
import math
import re
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trb.errors import InputError
from trb.records import AS_BY_DEFAULT
from trb.studies.key_list import FIRST, describe_keys
from trb.studies.keys import (
    REPLACED_KEYS,
    RunConfig,
    default_of,
    parse_overrides,
    run_fields,
    training_fields,
    valid_keys,
)
from trb.studies.recipe import Recipe, load_recipe, make_recipe
from trb.studies.yaml_files import ConfigError
from trb.tasks.prompts import MATH_SYSTEM_PROMPT
from trb.training.config import TRBConfig
from trb.training.methods import CHOICES, pair_of
from trb.training.resume import plain

PAIR = {"student": "zoo:student", "teacher": "zoo:teacher", "train_data": "zoo:chains"}
TEXT = "".join(f"{key}: {value}\n" for key, value in PAIR.items())


def read(tmp_path: Path, text: str = "", *options: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT + text)
    return load_recipe(path, parse_overrides(options))


def refusal(tmp_path: Path, text: str = "", *options: str) -> str:
    with pytest.raises(ConfigError) as error:
        read(tmp_path, text, *options)
    return str(error.value)


# ---- values ----


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("learning_rate: 1e-5", 1e-5),  # text, by the rules of YAML 1.1
        ("learning_rate: 3", 3.0),
        ('learning_rate: "2e-4"', 2e-4),
        ("max_steps: 100", 100),
        ("max_steps: 1_000", 1000),
        ("max_steps: 2.0", 2),
        ("bf16: true", True),
        ("bf16: no", False),
        ("bf16: null", None),
        ("save_strategy: no", "no"),  # false, by the rules of YAML 1.1
        ("run_name: 2026-01-01", "2026-01-01"),  # a date, by the rules of YAML 1.1
        ("run_name: 1:30", "1:30"),  # ninety, by the rules of YAML 1.1
        ("run_name: on", "on"),
        ("rollout_batch_size: null", None),
        ("initial_kl_budget: .inf", math.inf),
        (
            "lr_scheduler_kwargs: {num_cycles: 1, min_lr: 1e-3}\nlr_scheduler_type: cosine_with_min_lr",
            {"num_cycles": 1, "min_lr": 1e-3},
        ),
    ],
)
def test_values_are_read_as_their_key_means(tmp_path: Path, line: str, expected: Any) -> None:
    key = line.partition(":")[0]
    value = read(tmp_path, line).training[key]
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("learning_rate: abc", "learning_rate is 'abc'; expected a number"),
        ("learning_rate: null", "learning_rate is null; expected a number"),
        ("learning_rate: true", "learning_rate is true; expected a number"),
        ("learning_rate: .nan", "learning_rate is not a number (nan)"),
        ("learning_rate: [1]", "learning_rate is [1]; expected a number"),
        ("max_steps: 2.5", "max_steps is 2.5; expected a whole number"),
        ("max_steps: true", "max_steps is true; expected a whole number"),
        ("max_steps: ten", "max_steps is 'ten'; expected a whole number"),
        ("bf16: maybe", "bf16 is 'maybe'; expected true or false or null"),
        ("train_limit: many", "train_limit is 'many'; expected a whole number or null"),
        ("overlong_prompts: skip", "overlong_prompts is 'skip'; expected one of error, drop"),
        ("run_name: 3", "run_name is 3; expected text or null"),
        ("eval_data: 3", "eval_data is 3; expected text or a list, each entry text"),
        ("eval_samples: {a: b}", "expected a whole number or a mapping"),
        ("methods: [opd]", "methods is ['opd']; expected a mapping"),
        ("report_to: 3", "report_to is 3; expected text or a list, each entry text or null"),
    ],
)
def test_wrong_types_are_refused_with_key_value_and_expectation(tmp_path: Path, line: str, complaint: str) -> None:
    message = refusal(tmp_path, line)
    assert complaint in message
    assert "recipe.yaml" in message


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("initial_kl_budget: -1", "initial_kl_budget must be a non-negative number of nats, got -1.0"),
        ("initial_kl_budget: .nan", "initial_kl_budget is not a number (nan)"),
        ("blend_warmup_steps: -3", "-3"),
        ("method: tbr", "method='tbr' is unknown"),
        ("top_p: 0.9", "top_p=0.9 is not supported"),
        ("lr_scheduler_type: constan", "constan"),
        ("max_completion_length: 0", "max_completion_length must be at least 1, got 0"),
        ("student_dtype: bf16", "student_dtype is 'bf16'; choose one of float32, bfloat16"),
        ("lora_rank: -1", "lora_rank is -1; it must be at least 0"),
        ("eval_samples: 0", "eval_samples is 0; it must be at least 1"),
        ("reward_timeout_s: 0", "reward_timeout_s is 0.0; it must be positive"),
        ("train_limit: 0", "train_limit is 0; it must be at least 1"),
        ("eval_temperature: .inf", "eval_temperature must be positive and finite (1e-30 to 1e+30), got inf"),
        ("eval_temperature: 1.0e-40", "eval_temperature must be positive and finite (1e-30 to 1e+30), got 1e-40"),
        ("eval_temperature: 1" + "0" * 400, "eval_temperature is an integer of 1,329 bits; expected a number"),
        ("eval_data: [a]\neval_samples: {b: 2}", "eval_samples has no entry for 'a'"),
        ("eval_data: [a1]\neval_samples: {a1: 1, a2: 2}", "'a2', which is not in eval_data; did you mean 'a1'?"),
        ("eval_data: [a]\neval_samples: {a: 0}", "eval_samples is 0 for 'a'"),
    ],
)
def test_values_that_make_no_sense_are_refused_with_the_file(tmp_path: Path, line: str, complaint: str) -> None:
    message = refusal(tmp_path, line)
    assert complaint in message
    assert "recipe.yaml" in message


# ---- keys ----


def test_an_unknown_key_names_the_nearest_one(tmp_path: Path) -> None:
    message = refusal(tmp_path, "learing_rate: 1e-5\n")
    assert "recipe.yaml" in message
    assert "unknown key 'learing_rate'; did you mean 'learning_rate'?" in message
    assert "did you mean 'train_data'?" in refusal(tmp_path, "traindata: x\n")
    assert "unknown key 'zzzzzzzz'" in refusal(tmp_path, "zzzzzzzz: x\n")
    assert "unknown key '1'" in refusal(tmp_path, "1: x\n")


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("output_dir", "--output-dir"),
        ("trust_remote_code", "student_trust_remote_code"),
        ("teacher_model_name_or_path", "use teacher"),
        ("eval_strategy", "eval_every"),
        ("hub_token", "HF_TOKEN"),
        ("disable_tqdm", "--quiet"),
    ],
)
def test_keys_that_would_do_nothing_name_what_does(tmp_path: Path, key: str, remedy: str) -> None:
    message = refusal(tmp_path, f"{key}: x\n")
    assert key in message
    assert remedy in message


@pytest.mark.parametrize("key", list(PAIR))
def test_models_and_prompts_are_required(tmp_path: Path, key: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("".join(f"{name}: {value}\n" for name, value in PAIR.items() if name != key))
    with pytest.raises(ConfigError, match=f"recipe.yaml: {key} is missing"):
        load_recipe(path)


def test_every_key_has_a_help_text_and_a_default() -> None:
    entries = {key: (kind, default, text) for group in describe_keys().values() for key, kind, default, text in group}
    assert entries["student"][1] == "required"
    assert entries["initial_kl_budget"][:2] == ("a number or null", "default null")
    for field in dataclasses.fields(RunConfig):
        assert len(entries[field.name][2]) > 10
    assert all(kind for kind, _, _ in entries.values())
    assert not any("%%" in text for _, _, text in entries.values())


def test_every_key_is_in_one_group_and_the_ten_that_matter_come_first() -> None:
    groups = {title: [key.name for key in keys] for title, keys in describe_keys().items()}
    assert list(groups) == ["The ten that matter first", "Models", "Data", "Method", "Training", "Evaluation"]
    assert sorted(name for names in groups.values() for name in names) == sorted(valid_keys())
    assert groups["The ten that matter first"] == [*FIRST]
    assert len(FIRST) == 10
    for title, name in (
        ("Models", "teacher_dtype"),
        ("Models", "lora_rank"),
        ("Data", "train_limit"),
        ("Data", "max_prompt_length"),
        ("Method", "num_generations"),
        ("Method", "teacher_weight"),
        ("Method", "veto_strength"),
        ("Method", "temperature"),
        ("Training", "prompts_per_step"),
        ("Training", "weight_decay"),
        ("Training", "save_steps"),
        ("Evaluation", "eval_every"),
        ("Evaluation", "held_out_prompts"),
        ("Evaluation", "per_device_eval_batch_size"),
    ):
        assert name in groups[title]


# ---- files ----


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("seed: 1\nseed: 2\n", "line 5: the key 'seed' is given twice"),
        ("methods:\n  trb: {seed: 1, seed: 2}\n", "the key 'seed' is given twice"),
        ("seed: [\n", "line 5"),
        ("seed: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        ("seed: *nothing\n", "undefined alias"),
        ("{}: 1\n", "line"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, complaint: str) -> None:
    message = refusal(tmp_path, text)
    assert complaint in message
    assert "recipe.yaml" in message


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words\n"])
def test_a_recipe_is_a_mapping(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"recipe\.yaml must hold a mapping"):
        load_recipe(tmp_path / "recipe.yaml")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"No such file or directory; did you mean 'quickstart\.yaml'"):
        load_recipe(tmp_path / "quikstart.yaml")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_recipe(tmp_path / "quickstart.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_recipe(tmp_path)


def test_the_resolved_recipe_is_a_recipe_that_says_the_same(tmp_path: Path) -> None:
    recipe = read(
        tmp_path,
        "learning_rate: 3e-4\nsave_strategy: no\nrun_name: '1e5'\nsystem_prompt: 'yes'\ntrain_revision: 2026-01-01\n"
        "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-5}\n"
        "eval_data: zoo:chains\nreport_to: none\n"
        "methods: {opd: , long: {method: trb, initial_kl_budget: .inf}}\n",
    )
    path = tmp_path / "resolved.yaml"
    path.write_text(recipe.to_yaml())
    again = load_recipe(path)
    assert again.resolved() == recipe.resolved()
    assert again.training_config("x").to_dict() == recipe.training_config("x").to_dict()
    assert yaml.safe_load(path.read_text())["save_strategy"] == "no"  # other readers of YAML agree
    chosen, rest = map(yaml.safe_load, path.read_text().split(AS_BY_DEFAULT))
    assert {"student", "train_data", "learning_rate", "methods"} <= chosen.keys()
    defaults = {key: plain(default_of({**run_fields(), **training_fields()}[key])) for key in (*chosen, *rest)}
    assert all(rest[key] == defaults[key] for key in rest) and all(chosen[key] != defaults[key] for key in chosen)
    everything = {key for group in describe_keys().values() for key, *_ in group}
    of_other_methods = {"skd_teacher_top_k", "skd_teacher_temperature", "initial_temperature"}
    of_other_methods |= {"sequence_kl_budget", "teacher_weight", "initial_horizon", "horizon_steps"}
    of_other_methods |= {"initial_prefix_share", "prefix_steps"}
    of_other_methods |= {"temperature_warmup_steps", "sft_warmup_steps", "veto_strength", "veto_steps"}
    of_other_methods |= {"eopd_entropy", "forward_top_k", "tip_share", "iw_gamma"}
    assert set(recipe.resolved()) == everything - of_other_methods - {"teachers"}  # which stand in place of teacher


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (
            "method: opd\ninitial_kl_budget: 0.1",
            r"initial_kl_budget would do nothing.*behavior: fixed_budget.*budget_schedule: linear",
        ),
        ("method: fixed\nblend_warmup_steps: 3", "blend_warmup_steps would do nothing"),
        ("method: veto\nsft_warmup_steps: 3", r"sft_warmup_steps would do nothing.*loss: veto"),
        ("method: trb\nbehavior: student\ninitial_kl_budget: 1", "initial_kl_budget would do nothing"),
        ("budget_schedule: gap\nblend_warmup_steps: 9", r"blend_warmup_steps would do nothing.*budget_schedule: gap"),
        ("budget_schedule: sequence\ninitial_kl_budget: 9", "initial_kl_budget would do nothing"),
        ("method: trb\nveto_strength: 0.1", r"veto_strength would do nothing: it belongs to method: veto; loss: veto"),
        ("methods: {opd: {initial_kl_budget: 1}}", r"methods: opd: initial_kl_budget would do nothing"),
        ("initial_kl_budget: 1\nmethods: {opd: , veto: }", "initial_kl_budget would do nothing"),
        ("method: opd\nbehavior: trusted", r"behavior='trusted' is unknown; choose one of student, trust_region"),
        ("method: opd\nloss: vetos", r"loss='vetos' is unknown; choose one of reverse_kl, veto"),
    ],
)
def test_a_knob_that_the_pair_does_not_read_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        read(tmp_path, text)


@pytest.mark.parametrize("option", CHOICES)
def test_a_choice_that_there_is_not_is_refused_alike_wherever_it_is_given(tmp_path: Path, option: str) -> None:
    """Also as an option, where what a file sets for another choice is taken away: no KeyError of a table."""
    expected = f"{option}='trust_regoin' is unknown; choose one of "
    flag = option.replace("_", "-")
    assert expected in refusal(tmp_path, f"{option}: trust_regoin")
    for text in ("", "method: veto\nveto_strength: 0.3\n"):
        assert expected in refusal(tmp_path, text, f"--{flag}", "trust_regoin")
    assert expected in refusal(tmp_path, "methods: {opd: , trb: }", f"--methods.trb.{flag}", "trust_regoin")
    assert "; did you mean 'trust_region'?" in refusal(tmp_path, "", "--behavior", "trust_regoin")


def test_halves_of_methods_combine_and_bring_their_knobs(tmp_path: Path) -> None:
    text = "method: trb\nloss: veto\ninitial_kl_budget: 0.1\nveto_strength: 0.3"
    assert [pair_of(choice) for choice in read(tmp_path, text).choices()] == [("trust_region", "veto")]
    shared = read(tmp_path, "initial_kl_budget: 1\nmethods: {opd: , trb: }")  # read by one of the two
    assert "initial_kl_budget" not in shared.for_method("opd").resolved()
    assert shared.for_method("trb").resolved()["initial_kl_budget"] == 1


# ---- the command line ----


@pytest.mark.parametrize(
    ("options", "key", "expected"),
    [
        (["--learning_rate", "1e-3"], "learning_rate", 1e-3),
        (["--learning-rate=1e-3"], "learning_rate", 1e-3),
        (["--max-steps", "-1"], "max_steps", -1),
        (["--bf16"], "bf16", True),
        (["--bf16", "--seed", "3"], "bf16", True),
        (["--no-bf16"], "bf16", False),
        (["--no_gradient_checkpointing"], "gradient_checkpointing", False),
        (["--bf16", "false"], "bf16", False),
        (["--bf16=none"], "bf16", None),
        (["--run-name", "123"], "run_name", "123"),
        (["--run-name", "a: b"], "run_name", "a: b"),
        (["--run-name=a=b"], "run_name", "a=b"),
        (["--run-name", "true"], "run_name", "true"),
        (["--save-strategy", "no"], "save_strategy", "no"),
        (["--lr-scheduler-kwargs", "{min_lr: 1e-3}"], "lr_scheduler_kwargs", {"min_lr": 1e-3}),
        (["--lr-scheduler-kwargs.num_cycles", "2"], "lr_scheduler_kwargs", {"num_cycles": 2, "min_lr": 1}),
        (["--seed", "1", "--seed", "2"], "seed", 2),
    ],
)
def test_options_override_the_file(tmp_path: Path, options: list[str], key: str, expected: Any) -> None:
    text = "learning_rate: 5\nbf16: false\nlr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1}\n"
    recipe = read(tmp_path, text, *options)
    assert recipe.training[key] == expected
    assert type(recipe.training[key]) is type(expected)


def test_options_reach_methods(tmp_path: Path) -> None:
    text = "methods:\n  trb: {initial_kl_budget: 1}\n"
    recipe = read(tmp_path, text, "--methods.trb.initial-kl-budget", "2e-1", "--methods.opd.seed", "3")
    assert recipe.run.methods == {"trb": {"initial_kl_budget": 0.2}, "opd": {"seed": 3}}
    assert recipe.for_method("trb").training["initial_kl_budget"] == 0.2


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--learing-rate", "1"], "option --learing-rate: unknown key 'learing_rate'; did you mean 'learning_rate'?"),
        (["--max-steps", "2.5"], "option --max-steps: max_steps is 2.5; expected a whole number"),
        (["--max-steps"], "option --max-steps needs a value (a whole number)"),
        (["--max-steps", "--bf16"], "option --max-steps needs a value"),
        (["--no-max-steps"], "option --no-max-steps needs a value"),
        (["--no-bfloat"], "unknown key 'bfloat'"),
        (["stray"], "unexpected argument 'stray'"),
        (["--seed", "1", "stray"], "unexpected argument 'stray'"),
        (["--initial-kl-budget", "nan"], "initial_kl_budget is not a number (nan)"),
        (["--initial-kl-budget=-0.5"], "got -0.5"),
        (["--seed.x", "1"], "seed is not a mapping"),
        (["--methods.trb.initial_kl_budge", "1"], "unknown key 'initial_kl_budge'; did you mean 'initial_kl_budget'?"),
        (["--methods.foo.seed", "1"], "methods: foo: say which method it is"),
        (["--methods.trb.seed", "x"], "seed is 'x'; expected a whole number"),
        (["--initial-kl-budget", "3"], "would do nothing: the recipe sets initial_kl_budget for trb itself"),
    ],
)
def test_options_are_checked_like_the_file(tmp_path: Path, options: list[str], complaint: str) -> None:
    text = "methods:\n  trb: {initial_kl_budget: 1}\n" if "do nothing" in complaint else ""
    assert complaint in refusal(tmp_path, text, *options)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    key=st.sampled_from(["learning_rate", "max_steps", "bf16", "eval_data", "eval_samples", "methods", "run_name"]),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
        max_leaves=4,
    ),
)
def test_any_value_is_taken_or_refused_and_nothing_else(key: str, value: Any) -> None:
    try:
        recipe = make_recipe({**PAIR, key: value})
    except ConfigError as error:
        assert str(error).startswith("recipe: ")
    else:
        assert key in recipe.resolved() or key == "methods"


# ---- methods and batches ----


def test_a_method_inherits_the_recipe_and_is_its_name() -> None:
    recipe = make_recipe(
        {**PAIR, "seed": 7, "blend_warmup_steps": 3, "methods": {"opd": None, "wide": {"method": "trb", "seed": 8}}}
    )
    opd, wide = recipe.for_method("opd"), recipe.for_method("wide")
    assert (opd.training["method"], opd.training["seed"]) == ("opd", 7)
    assert (wide.training["method"], wide.training["seed"]) == ("trb", 8)
    assert opd.training["blend_warmup_steps"] == 3
    assert opd.run.methods == {}
    assert recipe.training["seed"] == 7


@pytest.mark.parametrize(
    ("methods", "complaint"),
    [
        ({"student": {"method": "opd"}}, "cannot name a directory"),
        ({"a/b": {"method": "opd"}}, "cannot name a directory"),
        ({"..": {"method": "opd"}}, "cannot name a directory"),
        ({"obd": {}}, "say which method it is.*did you mean 'opd'"),
        ({"opd": {"student": "x"}}, "student is shared by all methods"),
        ({"trb": {"initial_kl_budget": -1}}, "methods: trb: initial_kl_budget must be"),
        ({"trb": {"initial_kl_budget": "x"}}, "methods: trb: initial_kl_budget is 'x'"),
    ],
)
def test_methods_are_checked(methods: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        make_recipe({**PAIR, "methods": methods})


def test_prompts_per_step_keeps_the_batch_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {**PAIR, "prompts_per_step": 16, "num_generations": 4, "per_device_train_batch_size": 8}
    assert make_recipe(values).training_config("x").gradient_accumulation_steps == 8
    assert "gradient_accumulation_steps" not in make_recipe(values).resolved()
    with pytest.raises(ConfigError, match="give one of the two"):
        make_recipe({**values, "gradient_accumulation_steps": 8})
    for rows, fits in ((24, 16), (128, 64), (3, 2)):
        message = (
            f"64 completions, which {rows} at once .* set per_device_train_batch_size to {fits}, or another divisor"
        )
        with pytest.raises(ConfigError, match=message):
            make_recipe({**values, "per_device_train_batch_size": rows})
        assert make_recipe({**values, "per_device_train_batch_size": fits}).accumulation_steps() == 64 // fits
    recipe = make_recipe(values)
    small = make_recipe({**values, "prompts_per_step": 3, "per_device_train_batch_size": 2})
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert recipe.accumulation_steps() == 2
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(ConfigError, match=r"make prompts_per_step a multiple of 3$"):
        recipe.accumulation_steps()
    assert small.accumulation_steps() == 1


def test_short_names() -> None:
    assert make_recipe({**PAIR, "system_prompt": "math"}).run.system_message == MATH_SYSTEM_PROMPT
    assert make_recipe({**PAIR, "system_prompt": "Be brief."}).run.system_message == "Be brief."
    assert make_recipe({**PAIR, "eval_data": "a"}).run.eval_data == ["a"]
    run = make_recipe({**PAIR, "eval_data": ["a", "b"], "eval_samples": {"a": 2, "b": 3}}).run
    assert [run.samples_of(name) for name in run.eval_data] == [2, 3]


# ---- words and mappings of TRL and transformers ----


def kinds_of(name: str) -> list[Any]:
    hint = typing.get_type_hints(TRBConfig)[name]
    return [typing.get_origin(kind) or kind for kind in typing.get_args(hint) or (hint,)]


OPTIONS = [option.name for option in dataclasses.fields(TRBConfig)]
ENUMS = {name: kind for name in OPTIONS for kind in kinds_of(name) if isinstance(kind, enum.EnumType)}
MAPPINGS = [name for name in OPTIONS if {dict, str} <= set(kinds_of(name)) and name != "deepspeed"]


def test_the_options_of_words_and_mappings_are_found() -> None:
    assert {"optim", "lr_scheduler_type", "save_strategy", "eval_strategy", "hub_strategy"} <= ENUMS.keys()
    assert {"fsdp_config", "lr_scheduler_kwargs", "accelerator_config", "chat_template_kwargs"} <= set(MAPPINGS)


@pytest.mark.parametrize("name", [*ENUMS, "log_level", "ddp_backend"])
def test_a_word_that_an_option_does_not_have_is_refused_by_its_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"{name}='nothng'.* one of "):
        TRBConfig(str(tmp_path), **{name: "nothng"})
    for word in list(ENUMS.get(name, ()))[:1]:
        near = f"{word.value}x"
        with pytest.raises(InputError, match=f"{name}='{near}'.*did you mean '{word.value}'"):
            TRBConfig(str(tmp_path), **{name: near})
    if name not in REPLACED_KEYS:
        said = refusal(tmp_path, "", f"--{name.replace('_', '-')}", "nothng")
        assert name in said and "'nothng'" in said


@pytest.mark.parametrize("text", ["{bad", "[1]", "3", "none of these", '{"a": 1'])
@pytest.mark.parametrize("name", MAPPINGS)
def test_text_that_is_no_mapping_is_refused_by_its_options_name(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"{name} is {text!r}, which is no JSON object")):
        TRBConfig(str(tmp_path), **{name: text})
    if name not in REPLACED_KEYS:
        said = refusal(tmp_path, "", f"--{name.replace('_', '-')}", text)
        assert (f"{name} is " in said and "JSON object" in said) or "expected a mapping" in said


def test_words_and_mappings_that_there_are_pass(tmp_path: Path) -> None:
    for name, kind in ENUMS.items():
        for word in list(kind)[:1] if name not in ("eval_strategy", "optim") else ():
            TRBConfig(str(tmp_path), **{name: word.value})
            TRBConfig(str(tmp_path), **{name: word})
    (tmp_path / "some.json").write_text("{}")
    TRBConfig(str(tmp_path), accelerator_config=str(tmp_path / "some.json"))
    (tmp_path / "some.json").write_text("[")
    with pytest.raises(InputError, match=r"accelerator_config is '.*some.json', .* nor a file that holds one \("):
        TRBConfig(str(tmp_path), accelerator_config=str(tmp_path / "some.json"))
    TRBConfig(str(tmp_path), lr_scheduler_kwargs='{"num_cycles": 2}', lr_scheduler_type="cosine")
