"""What docs/theory.md says, on laws and completions that can be enumerated."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from reference import blend

from trb.policies import GeometricPolicy, Target
from trb.schedule import SequenceBudget

VOCABULARY, LENGTH = 3, 4


# ---- given prefixes ----


def along_the_path(student: np.ndarray, teacher: np.ndarray, weight: float) -> Target:
    return GeometricPolicy(weight).target(*(torch.tensor(np.log(law)) for law in (student, teacher)))


def test_the_divergence_from_the_student_rises_as_the_variance_says() -> None:
    """J' = β Var_β[log πT - log πS], from differences of J."""
    step = 1e-4
    for seed in range(5):
        student, teacher = np.random.default_rng(seed).dirichlet([1.0] * 6, size=2)
        ratio = np.log(teacher / student)
        for weight in (0.05, 0.3, 0.6, 0.95):
            higher, lower = (along_the_path(student[None], teacher[None], weight + by) for by in (step, -step))
            slope = (higher.kl_student - lower.kl_student).item() / (2 * step)
            mu = student ** (1 - weight) * teacher**weight
            mu /= mu.sum()
            variance = mu @ (ratio - mu @ ratio) ** 2
            # The differences are off by J''' step^2 / 6, and J''' is of the order of the ratio to the fourth.
            assert slope == pytest.approx(weight * variance, abs=step**2 * np.abs(ratio).max() ** 4)
            assert slope > 0


def costs_on_a_grid(student: np.ndarray, teacher: np.ndarray, parts: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """KL to the student and to the teacher of every law of three tokens in steps of 1 / `parts`."""
    counts = [(i, j, parts - i - j) for i in range(parts + 1) for j in range(parts + 1 - i)]
    laws = np.array(counts) / parts
    surprise = np.where(laws > 0, laws * np.log(np.where(laws > 0, laws, 1.0)), 0.0).sum(-1)
    return surprise - laws @ np.log(student), surprise - laws @ np.log(teacher)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 4.0)], ids=str)
@pytest.mark.parametrize("teacher_weight", [0.2, 0.5, 0.8])
def test_no_laws_at_two_prefixes_beat_one_weight_for_both(weights: tuple[float, float], teacher_weight: float) -> None:
    """Of all pairs of laws on a grid, those of the geometric path and others, within the same budget for the sum."""
    for seed in range(3):
        student, teacher = np.random.default_rng(seed).dirichlet([1.5] * 3, size=(2, 2))
        ours = along_the_path(student, teacher, teacher_weight)
        assert ours.kl_teacher is not None
        spent, left = (float(np.dot(weights, kls.numpy())) for kls in (ours.kl_student, ours.kl_teacher))
        (first, first_left), (second, second_left) = map(costs_on_a_grid, student, teacher)
        order = np.argsort(second)
        nearest = np.minimum.accumulate(second_left[order])  # to the teacher, of the laws that cost at most as much
        affordable = np.searchsorted(second[order], (spent - weights[0] * first) / weights[1], side="right") - 1
        found = weights[0] * first_left + weights[1] * nearest[affordable]
        best = found[affordable >= 0].min()
        assert best >= left - 1e-12
        # The grid has a law within a step of ours that costs no more; a step changes KL by about the log-ratio.
        assert best <= left + sum(weights) * np.abs(np.log(teacher / student)).max() / 200


def spent_within(budget: float, student: np.ndarray, teacher: np.ndarray) -> float:
    """Σ KL(μ || student) over prefixes, each with that budget, its weight found by bisection."""
    logs = np.log(student), np.log(teacher)
    return float(blend.path_cost(*logs, blend.largest_weight(*logs, budget)).sum())


def some_prefixes(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Laws of both models at thirty prefixes, from hardly apart to far."""
    generator = np.random.default_rng(seed)
    student, other = generator.dirichlet([1.0] * 5, size=(2, 30))
    apart = generator.uniform(0, 1, (30, 1)) ** 2
    return student, (1 - apart) * student + apart * other


def test_a_budget_that_an_old_cost_raises_cannot_overspend() -> None:
    """With c a mean of nats spent / ε over old ε, B / c spends at most B if above all of them, at least B if below."""
    student, teacher = some_prefixes(0)
    gaps = (teacher * np.log(teacher / student)).sum(-1)
    generator, lowered_by = np.random.default_rng(1), []
    for _ in range(12):
        old = generator.uniform(0.01, 0.99, 3) * gaps.max()
        spent = [spent_within(budget, student, teacher) for budget in old]
        assert spent == pytest.approx([np.minimum(budget, gaps).sum() for budget in old], rel=1e-9)
        cost = generator.dirichlet([1.0] * 3) @ (spent / old)
        raised, lowered = cost * old.max() * generator.uniform(1, 5), cost * old.min() * generator.uniform(0.1, 1)
        assert spent_within(raised / cost, student, teacher) <= raised * (1 + 1e-9)
        assert spent_within(lowered / cost, student, teacher) >= lowered * (1 - 1e-9)
        lowered_by.append(spent_within(lowered / cost, student, teacher) / lowered)
    assert max(lowered_by) > 1.3


@pytest.mark.parametrize("target", [0.3, 1.0, 3.0])
def test_a_schedule_that_raises_its_budget_spends_what_is_left_and_no_more(target: float) -> None:
    """At the same prefixes in every step: beyond the target it spends at most what earlier steps did not."""
    student, teacher = some_prefixes(2)
    schedule, left, highest, raised = SequenceBudget(target, start=target / 3000, highest=target), 0.0, 0.0, 0
    for step in range(40):
        value = schedule.value(step)
        spent = spent_within(value, student, teacher)
        if value > highest:
            assert spent <= (target + max(left, 0.0)) * (1 + 1e-9)
            highest, raised = value, raised + 1
        left += target - spent
        schedule.observe(step, {"sequence_kl": spent})
    assert raised > 4 and abs(left) < 0.1 * target


# ---- whole completions ----


def tables(seed: int) -> tuple[dict, dict]:
    """Two models: a law over the next token for every prefix."""
    generator = np.random.default_rng(seed)
    prefixes = [p for n in range(LENGTH) for p in itertools.product(range(VOCABULARY), repeat=n)]
    student, teacher = ({p: generator.dirichlet([0.5] * VOCABULARY) for p in prefixes} for _ in range(2))
    return student, teacher


def completions(model: dict) -> np.ndarray:
    """The probability of every completion."""
    every = itertools.product(range(VOCABULARY), repeat=LENGTH)
    return np.array([np.prod([model[y[:t]][y[t]] for t in range(LENGTH)]) for y in every])


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float(np.sum(p * np.log(p / q)))


def token_by_token(student: dict, teacher: dict, weight: float) -> np.ndarray:
    products = {p: student[p] ** (1 - weight) * teacher[p] ** weight for p in student}
    return completions({p: product / product.sum() for p, product in products.items()})


def of_completions(student: dict, teacher: dict, weight: float) -> np.ndarray:
    product = completions(student) ** (1 - weight) * completions(teacher) ** weight
    return product / product.sum()


def weight_that_spends(budget: float, law, student: dict, teacher: dict) -> float:
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        spent = kl(law(student, teacher, middle), completions(student))
        low, high = (middle, high) if spent < budget else (low, middle)
    return low


def test_the_future_tilts_the_best_law_of_completions() -> None:
    """At the same divergence from the student, the path of completions is nearer to the teacher than that of tokens."""
    for seed in range(5):
        student, teacher = tables(seed)
        budget = 0.3 * kl(token_by_token(student, teacher, 1.0), completions(student))
        left = []
        for law in (token_by_token, of_completions):
            mu = law(student, teacher, weight_that_spends(budget, law, student, teacher))
            assert abs(kl(mu, completions(student)) - budget) < 1e-9
            left.append(kl(mu, completions(teacher)))
        assert left[1] < left[0] - 1e-3


def test_the_conditional_law_is_tilted_by_the_futures_normaliser() -> None:
    student, teacher = tables(7)
    weight = 0.4
    products = {p: student[p] ** (1 - weight) * teacher[p] ** weight for p in student}

    def normaliser(prefix: tuple[int, ...]) -> float:
        if len(prefix) == LENGTH:
            return 1.0
        return sum(products[prefix][a] * normaliser((*prefix, a)) for a in range(VOCABULARY))

    tilted = {p: np.array([products[p][a] * normaliser((*p, a)) for a in range(VOCABULARY)]) for p in products}
    law = completions({p: values / values.sum() for p, values in tilted.items()})
    assert np.allclose(law, of_completions(student, teacher, weight), rtol=1e-12)
    assert not np.allclose(law, token_by_token(student, teacher, weight), rtol=1e-2)


def test_divergences_of_completions_are_sums_over_prefixes_that_are_met() -> None:
    student, teacher = tables(8)
    products = {p: student[p] ** 0.6 * teacher[p] ** 0.4 for p in student}
    model = {p: product / product.sum() for p, product in products.items()}
    summed = sum(np.prod([model[p[:t]][p[t]] for t in range(len(p))]) * kl(model[p], student[p]) for p in model)
    assert abs(summed - kl(completions(model), completions(student))) < 1e-12


# ---- a student of tables: what its steps go down ----


def law_at(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum()


def slopes(function: Callable[[np.ndarray], float | np.ndarray], at: np.ndarray, step: float = 1e-4) -> np.ndarray:
    """Central differences by each parameter, the last axis of what is returned; off by about `step` squared."""
    steps = step * np.eye(at.size).reshape(at.size, *at.shape)
    return np.stack([(function(at + each) - function(at - each)) / (2 * step) for each in steps], -1)


def probabilities(model: dict) -> dict:
    """How likely each prefix is to be met."""
    return {p: float(np.prod([model[p[:t]][p[t]] for t in range(len(p))])) for p in model}


def loss_on(met: dict, parameters: np.ndarray, skill: dict, teacher: dict) -> float:
    """Reverse KL at prefixes met as given, of a student that reads row `skill[p]` of its parameters at p."""
    return sum(met[p] * kl(law_at(parameters[row]), teacher[p]) for p, row in skill.items())


def transfer(parameters: np.ndarray, skill: dict, teacher: dict) -> float:
    """<g_S, g_T> / <g_T, g_T> for rollouts of the student and of the teacher."""
    student = {p: law_at(parameters[row]) for p, row in skill.items()}

    def gradient(met: dict) -> np.ndarray:
        return slopes(lambda x: loss_on(met, x, skill, teacher), parameters)

    own, good = gradient(probabilities(student)), gradient(probabilities(teacher))
    return float(own @ good / (good @ good))


def test_one_skill_for_all_prefixes_transfers_whole_however_poor_the_rollouts_are() -> None:
    prefixes = [p for n in range(LENGTH) for p in itertools.product(range(VOCABULARY), repeat=n)]
    teacher = dict.fromkeys(prefixes, np.array([0.98, 0.01, 0.01]))
    poor = np.array([[-3.0, 1.0, 2.0]])
    assert law_at(poor[0])[0] < 0.01
    assert transfer(poor, dict.fromkeys(prefixes, 0), teacher) == pytest.approx(1.0, rel=1e-9)


def test_a_skill_for_every_stage_transfers_the_share_of_the_stages_that_are_reached() -> None:
    """Token 0 is right, at each stage by other parameters; after a mistake all prefixes share one more row of them."""
    prefixes = [p for n in range(LENGTH) for p in itertools.product(range(VOCABULARY), repeat=n)]
    skill = {p: LENGTH if any(p) else len(p) for p in prefixes}
    wrong = 1e-9  # the teacher's mistakes, all but none
    right, lost = np.array([1 - 2 * wrong, wrong, wrong]), np.array([0.1, 0.2, 0.7])
    teacher = {p: lost if any(p) else right for p in prefixes}
    parameters = np.random.default_rng(4).normal(size=(LENGTH + 1, VOCABULARY))
    reached, squares = [], []
    for stage in range(LENGTH):
        reached.append(math.prod(law_at(parameters[t])[0] for t in range(stage)))
        p = law_at(parameters[stage])
        h = p * (np.log(p / right) - kl(p, right))  # the gradient of KL(p || right) by the logits of p
        squares.append(h @ h)
    share = np.dot(reached, squares) / np.sum(squares)
    assert 0.1 < share < 0.9
    # Differences of step 1e-4 are off by about 1e-8 of themselves, and the teacher's mistakes by 1e-8.
    assert transfer(parameters, skill, teacher) == pytest.approx(share, rel=1e-6)


@pytest.mark.parametrize(("weight", "is_one"), [(0.0, False), (0.5, False), (1.0, True)])
def test_with_prefixes_held_fixed_only_the_teachers_have_a_loss_of_which_it_is_the_gradient(
    weight: float, is_one: bool
) -> None:
    """What is the gradient of anything has symmetric derivatives; at two tokens, with parameters for each prefix."""
    skill = {p: row for row, p in enumerate([(), *((a,) for a in range(VOCABULARY))])}
    teacher = {p: law for p, law in tables(9)[1].items() if p in skill}
    parameters = np.random.default_rng(5).normal(size=(len(skill), VOCABULARY))

    def gradient(x: np.ndarray) -> np.ndarray:
        products = {p: law_at(x[row]) ** (1 - weight) * teacher[p] ** weight for p, row in skill.items()}
        met = probabilities({p: product / product.sum() for p, product in products.items()})
        return slopes(lambda y: loss_on(met, y, skill, teacher), x)

    derivatives = slopes(gradient, parameters, step=1e-3)
    asymmetry = np.abs(derivatives - derivatives.T).max()
    # Rounding: 1e-16 over both steps is 1e-9, of which differences of losses have a few.
    assert asymmetry < 1e-7 if is_one else asymmetry > 0.01


def test_a_supervised_steps_gradient_is_that_of_the_forward_divergence_of_completions() -> None:
    student, teacher = tables(10)
    rows = {p: row for row, p in enumerate(student)}
    met = probabilities(teacher)

    def supervised(x: np.ndarray) -> float:
        return -sum(met[p] * teacher[p] @ np.log(law_at(x[row])) for p, row in rows.items())

    def forward(x: np.ndarray) -> float:
        return kl(completions(teacher), completions({p: law_at(x[row]) for p, row in rows.items()}))

    parameters = np.log(np.array(list(student.values())))
    assert slopes(supervised, parameters) == pytest.approx(slopes(forward, parameters), abs=1e-9)
