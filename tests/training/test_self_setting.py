"""Warm-ups that set themselves: what they hold, when they end, and that nothing of it is lost or differs."""

import contextlib
import copy
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from tiny_runs import Completions, Kill, build, config, logged, losses, weights
from transformers import PhiConfig, PhiForCausalLM

from trb import zoo
from trb.policies import GeometricPolicy, StudentPolicy, TeacherPolicy, TrustRegionPolicy
from trb.sampling import Rollout, RolloutStats
from trb.schedule import Constant, GapBudget, Ramp, Schedule, SequenceBudget
from trb.studies.recipe import make_recipe
from trb.studies.yaml_files import ConfigError
from trb.training.methods import behavior_of, needs_teacher
from trb.training.shares import blended_rows, from_teacher_prefixes, teacher_tokens

SCHEDULES = {
    "sequence": {"budget_schedule": "sequence", "sequence_kl_budget": 0.7},
    "sequence-linear": {"budget_schedule": "sequence-linear", "sequence_kl_budget": 0.7},
    "gap": {"budget_schedule": "gap", "initial_kl_budget": None},
    "gap from a budget": {"budget_schedule": "gap", "initial_kl_budget": 0.3, "behavior_share": 0.5},
    "geometric": {"method": "geometric", "sequence_kl_budget": 0.7},
}
EMBEDDED = {"student": "zoo:student", "teacher": "zoo:teacher", "train_data": "zoo:chains"}


# ---- which schedule it is where none is named ----


@pytest.mark.parametrize(
    ("given", "schedule"),
    [
        ({}, "sequence-linear"),
        ({"sequence_kl_budget": 2.0}, "sequence-linear"),
        ({"initial_kl_budget": 0.02}, "linear"),
        ({"blend_warmup_steps": 25}, "linear"),
        ({"initial_kl_budget": 0.0, "blend_warmup_steps": 0}, "linear"),
        ({"initial_kl_budget": 0.02, "budget_schedule": "gap"}, "gap"),
    ],
    ids=str,
)
def test_the_papers_numbers_ask_for_the_papers_schedule(given: dict[str, Any], schedule: str) -> None:
    """In Python and in recipes, which keep what it was."""
    unset = {"initial_kl_budget": None, "blend_warmup_steps": None}
    assert config(Path("unused"), **unset | given).budget_schedule == schedule
    recipe = make_recipe(EMBEDDED | given)
    assert recipe.resolved()["budget_schedule"] == schedule
    assert recipe.training_config("unused").budget_schedule == schedule
    assert make_recipe(recipe.resolved()).resolved() == recipe.resolved()


def test_a_number_of_another_schedule_is_refused_by_name() -> None:
    given = {"sequence_kl_budget": 2.0, "initial_kl_budget": 0.02}
    with pytest.raises(ConfigError, match=r"sequence_kl_budget would do nothing.*budget_schedule: linear"):
        make_recipe(EMBEDDED | given)


# ---- the budget of a whole completion ----


def held(schedule: Schedule, spend: Any, steps: int) -> list[float]:
    """What is spent step by step by a pair whose completions cost `spend(value, step)`."""
    found = []
    for step in range(steps):
        found.append(spend(schedule.value(step), step))
        schedule.observe(step, {"sequence_kl": found[-1]})
    return found


@pytest.mark.parametrize("length", [20, 400, 7000])
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_the_target_is_met_whatever_the_length(length: int, noise: float) -> None:
    """Half of the tokens leave more to spend than any budget tried, the others at most 0.02 nats; completions grow."""
    generator = torch.Generator().manual_seed(length)

    def spend(budget: float, step: int) -> float:
        tokens = length * (1 + step / 60)
        factor = 1 + noise * (2 * torch.rand((), generator=generator).item() - 1)
        return factor * tokens * (0.5 * budget + 0.5 * min(budget, 0.02))

    schedule = SequenceBudget(1.0, start=1.0 / 8192, highest=1.0)
    spent = held(schedule, spend, 60)
    assert sum(spent) / 60 == pytest.approx(1.0, abs=0.05)
    assert sum(spent[20:]) / 40 == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_a_teacher_weight_meets_the_target_too(noise: float) -> None:
    """Divergence grows like the square of the weight, and more slowly near the teacher."""
    generator = torch.Generator().manual_seed(3)

    def spend(weight: float, step: int) -> float:
        return 8 * weight**2 / (1 + weight) * (1 + noise * (2 * torch.rand((), generator=generator).item() - 1))

    spent = held(SequenceBudget(1.0, 0.05, highest=1.0, power=2), spend, 60)
    assert sum(spent) / 60 == pytest.approx(1.0, abs=0.05)


def test_a_target_that_cannot_be_spent_leaves_no_debt() -> None:
    """The pair has half a nat between its models; then their gap opens, and one step costs ten, which is made good."""
    schedule = SequenceBudget(1.0, 0.01, highest=1.0)
    held(schedule, lambda budget, step: 0.5 * min(1.0, budget / 0.1), 50)
    assert schedule.value(0) == 1.0
    spent = held(schedule, lambda budget, step: 10 * budget, 20)
    assert max(spent[2:]) < 2.0
    assert sum(spent) / 20 == pytest.approx(1.0, rel=0.2)


def test_a_step_without_blended_rollouts_teaches_nothing() -> None:
    schedule = SequenceBudget(1.0, 0.01, highest=1.0)
    schedule.observe(0, {"reverse_kl": 1.0})
    assert schedule.value(1) == 0.01


@pytest.mark.parametrize("target", [1.0, 4.0])
@pytest.mark.parametrize("steps", [40, 400])
def test_what_is_spent_falls_along_the_line(target: float, steps: int) -> None:
    """Of a pair with 4 nats to spend at first and 1 at last, less than a target of 4 leaves at first."""

    def most(step: int) -> float:
        return 4.0 - 3.0 * step / steps

    schedule = SequenceBudget(target, start=target / 64, highest=target, left=Ramp(1.0, 0.0, steps))
    spent = held(schedule, lambda value, step: most(step) * (1 - math.exp(-30 * value)), steps + 5)
    assert spent[steps:] == [0.0] * 5 and schedule.last() == 0.0
    for window in range(steps // 4, steps, steps // 8):
        seen = range(window, min(window + steps // 8, steps))
        wanted = sum(min(most(step), target * (1 - step / steps)) for step in seen)
        assert sum(spent[step] for step in seen) == pytest.approx(wanted, abs=0.06 * target * len(seen))


class Pair(NamedTuple):
    """Of each token how far the teacher is away, nats: few are far, as in a language model."""

    gaps: list[float]

    @staticmethod
    def of(total: float, tokens: int, shape: float = 0.3) -> "Pair":
        drawn = np.random.default_rng(0).gamma(shape, size=tokens)
        return Pair((drawn * total / drawn.sum()).tolist())

    def spent(self, budget: float) -> float:
        """Of a token its budget, or all that there is."""
        return sum(min(budget, gap) for gap in self.gaps)


@pytest.mark.parametrize(("steps", "lag"), [(10, 1.9), (30, 1.7), (200, 1.1)])
@pytest.mark.parametrize("shape", [0.3, 0.05, 0.01])
@pytest.mark.parametrize(("total", "tokens"), [(3, 25), (8, 25), (14, 50), (30, 50), (100, 400), (12, 7000)])
def test_a_line_is_kept_on_the_whole_and_passed_at_its_end(
    total: float, tokens: int, shape: float, steps: int, lag: float
) -> None:
    """16 nats of a completion at first: most pairs have less between them, and come under the line on its way down."""
    schedule, pair = SequenceBudget(16.0, 16 / tokens, 16.0, left=Ramp(1.0, 0.0, steps)), Pair.of(total, tokens, shape)
    spent = held(schedule, lambda budget, step: pair.spent(budget), steps)
    line = [min(total, 16 * (1 - step / steps)) for step in range(steps)]
    assert sum(spent[steps // 2 :]) < lag * sum(line[steps // 2 :])
    assert 0.85 < sum(spent) / sum(line) < 1.25


@pytest.mark.parametrize("shape", [0.3, 0.05, 0.01])
@pytest.mark.parametrize("total", [1.1, 1.2, 1.35, 2.0])
@pytest.mark.parametrize("tokens", [20, 400, 7000])
def test_a_target_just_below_all_there_is_is_met(tokens: int, total: float, shape: float) -> None:
    """Few tokens hold nearly all of it, so that a budget far above the mean gap binds at those still."""
    schedule, pair = SequenceBudget(1.0, 1 / tokens, highest=1.0), Pair.of(total, tokens, shape)
    spent = held(schedule, lambda budget, step: pair.spent(budget), 50)
    assert sum(spent) / 50 == pytest.approx(1.0, abs=0.05)


def test_a_training_made_longer_goes_on_with_the_longer_line() -> None:
    steps = 10
    schedule = SequenceBudget(16.0, 0.2, 16.0, left=Ramp(1.0, 0.0, None, lambda: steps))
    spent = []
    for step in range(22):
        if step == 12:
            assert schedule.value(step) == 0.0
            steps = 20
        spent.append(40 * schedule.value(step))
        schedule.observe(step, {"sequence_kl": spent[step]})
    assert sum(spent[12:20]) == pytest.approx(sum(16 * (1 - step / 20) for step in range(12, 20)), rel=0.25)
    assert spent[10:12] == spent[20:] == [0.0, 0.0]


def test_a_training_whose_length_is_not_known_yet_begins_with_all_of_it(tmp_path: Path) -> None:
    """What checks and plans are made from; once the length is known, the first step is the same."""
    args = config(tmp_path, budget_schedule="sequence-linear", sequence_kl_budget=3.0, max_completion_length=60)
    unknown, known = behavior_of(args), behavior_of(args, lambda: 50)
    assert unknown.at(0) == known.at(0) == TrustRegionPolicy(3.0 / 60)
    assert known.at(9).kl_budget > 0 and known.at(10) == TrustRegionPolicy(0.0)
    short = behavior_of(args, lambda: 1)
    assert short.at(0).kl_budget > 0 and short.at(1) == TrustRegionPolicy(0.0)
    assert unknown.schedule.last() == known.schedule.last() == 0.0
    assert unknown.schedule.follows_length and not behavior_of(config(tmp_path)).schedule.follows_length


@pytest.mark.parametrize("target", [0.0, -1.0, math.inf, math.nan])
def test_a_target_that_is_none_is_named(target: float) -> None:
    with pytest.raises(ValueError, match=f"sequence_kl_budget must be positive and finite, in nats, got {target}"):
        SequenceBudget(target, 0.1, 1.0)


# ---- the budget that follows the gap ----


def test_the_budget_falls_with_the_gap_and_ends_for_good() -> None:
    schedule = GapBudget(Constant(0.5))
    gaps = [4.0, 2.0, 8.0, *[0.0] * 30]
    values = []
    for step, gap in enumerate(gaps):
        values.append(schedule.value(step))
        schedule.observe(step, {"reverse_kl": gap})
    assert values[:3] == [0.5, 0.5, pytest.approx(0.5 * 0.9)]
    assert values[3] == pytest.approx(0.5 * min(1, 0.8 * 0.9 + 0.2 * 2))
    first_end = values.index(0.0)
    assert values[first_end - 1] >= 0.5 * 0.03 > 0.8 * values[first_end - 1]
    assert not any(values[first_end:])
    schedule.observe(99, {"reverse_kl": 100.0})
    assert schedule.value(100) == 0.0 == schedule.last()


def test_the_warm_up_ends_when_blended_rollouts_are_no_better() -> None:
    def ended_at(better: float, reward: float | None = None) -> int | None:
        generator = torch.Generator().manual_seed(0)
        schedule = GapBudget(Constant(0.5))
        for step in range(60):
            noise = torch.randn((), generator=generator).item()
            seen = {"teacher_log_prob_blended": -1.0 + better + 0.1 * noise, "teacher_log_prob_student": -1.0}
            rewards = {} if reward is None else {"reward_blended": 0.5 + reward, "reward_student": 0.5}
            schedule.observe(step, {"reverse_kl": 1.0, **seen, **rewards})
            if not schedule.value(step + 1):
                return step
        return None

    assert ended_at(1.0) is None
    assert ended_at(0.0) in range(9, 20)
    assert ended_at(-1.0) == 9
    assert ended_at(-1.0, reward=0.2) is None
    assert ended_at(-1.0, reward=0.0) == 9


def test_a_base_that_remembers_is_told_what_would_have_been_spent() -> None:
    schedule = GapBudget(SequenceBudget(1.0, 0.01, highest=10.0))
    spent = []
    for step in range(30):
        spent.append(20 * schedule.value(step))
        schedule.observe(step, {"sequence_kl": spent[-1], "reverse_kl": 1.0 if step < 15 else 0.5})
    assert spent[14] == pytest.approx(1.0, rel=0.05)
    assert spent[-1] == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("kind", ["sequence", "sequence-linear", "gap", "gap from a budget", "geometric"])
def test_a_memory_survives_its_checkpoint_to_the_bit(tmp_path: Path, kind: str) -> None:
    seen = [
        {"sequence_kl": 0.3 + 0.1 * step, "reverse_kl": 1 / (1 + step), "reward_blended": 0.7, "reward_student": 0.1}
        for step in range(12)
    ]
    straight, first, again = (behavior_of(config(tmp_path, **SCHEDULES[kind]), lambda: 20).schedule for _ in range(3))
    for step, numbers in enumerate(seen):
        straight.observe(step, numbers)
        (first if step < 5 else again).observe(step, numbers)
        if step == 4:
            again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert again.value(12) == straight.value(12)
    assert again.state_dict() == straight.state_dict()


# ---- shares ----


@pytest.mark.parametrize("share", [0.0, 0.3, 0.75, 1.0])
@pytest.mark.parametrize("generations", [1, 4, 5])
def test_a_share_of_each_prompts_rollouts_is_blended(share: float, generations: int) -> None:
    keys = [key for key in range(4000) for _ in range(generations)]
    index = [*range(generations)] * 4000
    rows = blended_rows(share, generations=generations, keys=keys, rollout_index=index, seed=3)
    counts = torch.tensor(rows).view(4000, generations).sum(1).double()
    assert counts.min() >= math.floor(share * generations)
    assert counts.max() <= math.ceil(share * generations)
    # A prompt's count is the share by chance: five standard errors of a coin.
    assert counts.mean().item() == pytest.approx(share * generations, abs=5 * 0.5 / math.sqrt(4000) + 1e-12)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = blended_rows(
        *(share,),
        generations=generations,
        keys=[keys[i] for i in order],
        rollout_index=[index[i] for i in order],
        seed=3,
    )
    assert shuffled == [rows[i] for i in order]


def test_rollouts_of_a_step_are_of_both_kinds_and_told_apart(tmp_path: Path) -> None:
    trainer = build(tmp_path, budget_schedule="gap", initial_kl_budget=0.5, max_steps=1, recorded_rollouts=8)
    trainer.train()
    (row,) = (row for row in trainer.state.log_history if "loss" in row)
    assert row["trb/share"] == 0.75
    assert row["trb/kl_budget"] == 0.5
    rollouts = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert [rollout["blended"] for rollout in rollouts] == [True, True, True, False] * 2
    student = [rollout for rollout in rollouts if not rollout["blended"]]
    blended = [rollout for rollout in rollouts if rollout["blended"]]
    assert all(weight == 0 for rollout in student for weight in rollout["teacher_weight"])
    assert all(max(rollout["teacher_weight"]) > 0 for rollout in blended)
    spent = [sum(rollout["kl_student"]) for rollout in blended]
    assert row["trb/sequence_kl"] == pytest.approx(sum(spent) / len(spent), rel=1e-5)
    for kind, some in (("blended", blended), ("student", student)):
        mean = sum(sum(r["teacher_log_prob"]) for r in some) / sum(len(r["tokens"]) for r in some)
        assert row[f"trb/teacher_log_prob_{kind}"] == pytest.approx(mean, rel=1e-4)


def test_the_students_rows_are_those_of_plain_distillation(tmp_path: Path) -> None:
    both = build(tmp_path / "gap", budget_schedule="gap", initial_kl_budget=0.5, max_steps=1, recorded_rollouts=8)
    plain = build(tmp_path / "opd", method="opd", max_steps=1, recorded_rollouts=8)
    found = []
    for trainer, name in ((both, "gap"), (plain, "opd")):
        trainer.train()
        lines = (tmp_path / name / "rollouts.jsonl").read_text().splitlines()
        found.append([json.loads(line)["completion"] for line in lines])
    assert found[0][3::4] == found[1][3::4]
    assert found[0] != found[1]


def test_an_annealed_share_ends_with_the_student(tmp_path: Path) -> None:
    behavior = behavior_of(config(tmp_path, method="share", initial_kl_budget=0.3, blend_warmup_steps=4))
    assert [behavior.share.value(step) for step in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert behavior.at(3) == TrustRegionPolicy(0.3)
    assert behavior.at(4) == TrustRegionPolicy(0.0)


def test_what_a_user_sets_is_what_is_built(tmp_path: Path) -> None:
    assert behavior_of(config(tmp_path, method="geometric", teacher_weight=0.3)).at(7) == GeometricPolicy(0.3)
    assert behavior_of(config(tmp_path, initial_kl_budget=None)).at(0) == TrustRegionPolicy(0.01)
    sequence = behavior_of(config(tmp_path, budget_schedule="sequence", max_completion_length=50))
    assert sequence.at(0) == TrustRegionPolicy(1 / 50)
    assert sequence.share.value(0) == 1.0
    falling = behavior_of(config(tmp_path, budget_schedule="sequence-linear", max_completion_length=50))
    assert falling.at(0) == TrustRegionPolicy(16 / 50)
    assert behavior_of(config(tmp_path, budget_schedule="gap")).share.value(0) == 0.75
    assert behavior_of(config(tmp_path, method="opd")).at(0) == StudentPolicy()
    with pytest.raises(ValueError, match=r"behavior_share must be in \[0, 1\], got 1.5"):
        config(tmp_path, behavior_share=1.5)
    with pytest.raises(ValueError, match=r"teacher_weight must be in \[0, 1\], got -0.1"):
        config(tmp_path, method="geometric", teacher_weight=-0.1)


# ---- short horizons ----


def test_completions_are_cut_at_a_length_that_grows(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"initial_horizon": 3, "horizon_steps": 2, "max_steps": 3, "max_completion_length": 24}
    trainer, plain = build(tmp_path, method="horizon", **settings), build(tmp_path, method="opd")
    completions, whole = Completions(), Completions()
    completions.watch(trainer)
    whole.watch(plain)
    trainer.train()
    plain.train()
    for step, horizon in enumerate((3, 13, 24)):
        assert max(map(len, completions.per_step[step])) <= horizon
    assert completions.per_step[0] == [ids[:3] for ids in whole.per_step[0]]
    trainer.model.eval()
    assert trainer._horizon(0) == 24


# ---- teacher prefixes ----


def test_a_run_from_teacher_prefixes_ends_with_the_student(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"initial_prefix_share": 0.5, "prefix_steps": 2, "max_steps": 3}
    trainer = build(tmp_path, method="prefix", **settings)
    trainer.train()
    found = logged(trainer, "teacher_weight")
    assert found[:2] == [pytest.approx(0.5, abs=0.1), pytest.approx(0.25, abs=0.1)]
    assert found[2] == 0
    behavior = behavior_of(config(tmp_path, method="prefix", **settings))
    assert [needs_teacher(behavior, step) for step in range(4)] == [True, True, False, False]


def test_rows_that_are_all_the_teachers_leave_no_mean_of_the_others() -> None:
    """Of a short completion, rounding up keeps all: its distance to the teacher is 0, that of the rest is not known."""

    def draw(prompts: Any, policy: Any, *, begun: Any = None, **_: Any) -> Rollout:
        lengths = [1, 4] if begun is None else [3] * len(prompts)
        weight = float(isinstance(policy, TeacherPolicy))
        numbers = [[weight] * length for length in lengths]
        known = [[0.0] * length if weight else [] for length in lengths]
        completions = [[5] * length for length in lengths]
        stats = RolloutStats(*copy.deepcopy([numbers, numbers]), known, copy.deepcopy(numbers))
        return Rollout(list(prompts), completions, [True] * len(lengths), stats)

    rollout = from_teacher_prefixes(draw, [[1], [2]], 0.5, keys=[3, 4], rollout_index=[0, 0], seed=5)
    assert [*map(len, rollout.completions)] == [1, 5]
    assert rollout.stats.kl_teacher == [[], []]
    assert teacher_tokens(rollout) == [1, 2]


# ---- whole runs ----


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path, kind: str) -> None:
    settings: dict[str, Any] = {
        **{"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "blend_warmup_steps": 4},
        **{"initial_kl_budget": None, "per_device_train_batch_size": 4, "max_completion_length": 8},
        **SCHEDULES[kind],
    }
    if kind == "sequence-linear":  # over after a fifth of the training, which the kill must be amid
        settings["max_steps"] = 16
    straight = build(tmp_path / "straight", **settings)
    straight.train()
    killed = build(tmp_path / "killed", callbacks=[Kill(3)], **settings)
    with contextlib.suppress(KeyboardInterrupt):
        killed.train()
    resumed = build(tmp_path / "killed", **settings)
    resumed.train(resume_from_checkpoint=True)
    rows = [[row for row in each.state.log_history if "loss" in row] for each in (resumed, straight)]
    assert rows[1][2]["trb/kl_budget" if kind != "geometric" else "trb/teacher_weight"] > 0  # blended after the kill
    for name in ("trb/kl_budget", "trb/share", "trb/gap", "trb/sequence_kl"):
        assert [row.get(name) for row in rows[0]] == [row.get(name) for row in rows[1]]
    assert resumed.behavior.schedule.state_dict() == straight.behavior.schedule.state_dict()
    assert losses(resumed) == losses(straight)
    both = zip(weights(straight).values(), weights(resumed).values(), strict=True)
    assert all(torch.equal(one, other) for one, other in both)


@pytest.mark.slow
@pytest.mark.parametrize("behavior", [{"budget_schedule": "sequence"}, {"method": "geometric"}], ids=str)
def test_a_run_meets_its_target(tmp_path: Path, behavior: dict[str, Any]) -> None:
    """The embedded pair as it is, hardly trained: about 25 tokens a completion, of at most 64."""
    settings: dict[str, Any] = {"initial_kl_budget": None, "max_steps": 16, "per_device_train_batch_size": 8}
    settings |= {"learning_rate": 1e-7, "max_completion_length": 64, "recorded_rollouts": 0}
    trainer = build(tmp_path, **settings, **behavior)
    trainer.train()
    spent = logged(trainer, "sequence_kl")
    assert sum(spent) / len(spent) == pytest.approx(1.0, abs=0.05)


def never_stopping(seed: int, stops: list[int]) -> PhiForCausalLM:
    """A random model of 64 tokens, a family whose head has a bias: that of stop tokens is far below all others."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = PhiForCausalLM(PhiConfig(vocab_size=64, max_position_embeddings=512, eos_token_id=stops[0], **sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.15)
        model.lm_head.bias[stops] = -60.0
    return model


@pytest.mark.slow
@pytest.mark.parametrize("length", [20, 400])
def test_the_same_target_is_met_on_short_and_long_completions(tmp_path: Path, length: int) -> None:
    """Completions of exactly that many tokens; the divergence of whole ones is far above the target in both."""
    stops = [zoo.load(role)[1].eos_token_id for role in ("student", "teacher")]
    student, teacher = never_stopping(1, stops), never_stopping(2, stops)
    settings: dict[str, Any] = {"initial_kl_budget": None, "max_steps": 12, "per_device_train_batch_size": 4}
    settings |= {"learning_rate": 1e-7, "max_completion_length": length, "recorded_rollouts": 0}
    trainer = build(tmp_path, student=student, teacher=teacher, **settings, budget_schedule="sequence")
    trainer.train()
    assert logged(trainer, "completion_length") == [length] * 12
    spent = logged(trainer, "sequence_kl")
    assert sum(spent) / len(spent) == pytest.approx(1.0, abs=0.05)
