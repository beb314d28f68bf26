"""`trb doctor --plan` counts the steps in which the teacher samples, and says what bounds their cost."""

import json
import math
from typing import Any

import pytest

from trb.cli import main
from trb.planning.inputs import continuation_rate
from trb.studies.recipe import load_recipe
from trb.training.methods import METHODS, behavior_of, needs_teacher

STEPS, LONGEST = 40, 48
BOUNDED = {"trb", "fixed", "share", "geometric"}


def planned(capsys: pytest.CaptureFixture[str], method: str, *options: Any) -> str:
    command = ["doctor", "--plan", "--config", "quickstart", "--methods", "{}", "--method", method, "--gpus", "1"]
    assert main([*command, "--max-steps", str(STEPS), *map(str, options)]) == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("method", METHODS)
def test_steps_with_the_teacher_are_those_of_the_trainer(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    args = load_recipe("quickstart", {"methods": {}, "method": method}).training_config("unused")
    behavior = behavior_of(args, lambda: STEPS)
    taught = sum(needs_teacher(behavior, step) for step in range(STEPS))
    report = json.loads(planned(capsys, method, "--json"), parse_constant=pytest.fail)
    assert report["run"]["blended_steps"] == taught
    assert (report["work"]["kl_budget"] == 0) == (taught == 0)
    assert (report["work"]["kl_budget"] is None) == (taught > 0 and method not in BOUNDED)


@pytest.mark.parametrize(
    ("method", "steps"), [("opd", 0), ("temperature", 0), ("trb", 8), ("skd", 40), ("geometric", 40), ("sft", 25)]
)
def test_steps_with_the_teacher_by_hand(method: str, steps: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{STEPS} steps, {steps} of them blended" in planned(capsys, method)


@pytest.mark.parametrize("method", ["skd", "sft", "prefix"])
def test_where_nothing_bounds_the_cost_the_worst_is_assumed_and_said(
    method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = planned(capsys, method)
    assert "blended, no bound is known: blocks of 1, drafts kept at 0.000 (the worst; see --acceptance), 1.00" in text
    measured = planned(capsys, method, "--acceptance", 0.9)
    assert "blended: blocks of" in measured and "drafts kept at 0.900, " in measured and "worst" not in measured


@pytest.mark.parametrize("options", [(), ("--budget-schedule", "sequence"), ("--budget-schedule", "gap")])
def test_a_budget_of_completions_bounds_the_average_over_their_tokens(
    options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Not the first ε, from which it goes up to eight times as high a step later."""
    nats, mean = (1.0 if options else 16.0), 24
    rate = continuation_rate(nats / mean)
    text = planned(capsys, "trb", *options, "--mean-completion", mean)
    assert f"blended at {nats:g} nats a completion, on the average ε = {nats / mean:.3g}: blocks of" in text
    assert f"drafts kept at {rate:.3f} (the bound)" in text
    assert rate < continuation_rate(nats / LONGEST)
    longest = json.loads(planned(capsys, "trb", *options, "--json"))
    assert longest["work"]["kl_budget"] == pytest.approx(nats / LONGEST)


def test_a_fall_of_completions_budget_makes_later_steps_cheaper(capsys: pytest.CaptureFixture[str]) -> None:
    hours = {
        schedule: json.loads(planned(capsys, "trb", "--json", *options, "--sequence-kl-budget", 8))["run"]["hours"]
        for schedule, options in {
            "held": ("--budget-schedule", "sequence"),
            "falls": ("--budget-schedule", "sequence-linear"),
        }.items()
    }
    assert 0 < hours["falls"] < hours["held"]


def test_a_budget_of_every_token_is_the_bound_itself(capsys: pytest.CaptureFixture[str]) -> None:
    text = planned(capsys, "trb", "--initial-kl-budget", 0.02, "--blend-warmup-steps", 10)
    assert "blended at ε = 0.02: blocks of" in text and "drafts kept at 0.900 (the bound)" in text
    assert f"{STEPS} steps, 10 of them blended" in text
    whole = planned(capsys, "trb", "--initial-kl-budget", math.inf, "--blend-warmup-steps", 10)
    assert "blended, no bound is known" in whole
