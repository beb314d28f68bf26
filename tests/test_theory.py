"""What docs/theory.md says beyond single prefixes, on completions that can be enumerated."""

import itertools

import numpy as np

VOCABULARY, LENGTH = 3, 4


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
