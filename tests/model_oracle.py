"""What every sampler and the trainer must reproduce of a model: its own plain forward pass, one row at a time.

`examine` holds one causal-LM type of the library to it and says how it went. The oracle knows nothing of caches,
masks, padding or batches: one row, one whole pass for every token, and the project's uniforms and draw.

Shape suffixes: R rows, L padded length, N completion tokens of all rows, V head rows.
"""

import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from tiny_models import TOLERANCE, VOCABULARY, NotRunnableError, build, is_causal, plain_logits
from torch import Tensor
from transformers import PreTrainedModel

from trb.modeling import OutputHead, UnsupportedModelError, completion_hidden_states
from trb.policies import BehaviorPolicy, StudentPolicy, TrustRegionPolicy
from trb.sampling import Rollout, sample
from trb.sampling.draw import accept_or_replace, inverse_cdf
from trb.sampling.reading import sampling_mode, way_of
from trb.sampling.uniforms import uniforms

__all__ = ["NEW_TOKENS", "OUTCOMES", "PROMPTS", "Case", "Finding", "examine", "find_case", "names_type", "sample_case"]

OUTCOMES = ("exact", "refused", "library", "wrong", "crash")
"""`refused`: by an error of the package that names the type; `library`: transformers itself cannot run it here."""

TRUST_REGION = TrustRegionPolicy(0.3)
NEW_TOKENS = 8
# Longer and shorter than every window of the tiny models; two pairs of rows share their prompt.
PROMPTS = tuple(
    tuple(1 + (place * step) % (VOCABULARY - 1) for place in range(length))
    for length, step in ((1, 5), (3, 7), (9, 11), (14, 5), (3, 7), (14, 5), (9, 2))
)
_MANY = 3  # rows in flight where slots are refilled
_SEEDS = 50
# The solver ends within this much of the budget, relative.
_WEIGHT_TOLERANCE = 2e-3


@dataclass(frozen=True)
class Finding:
    """How one type fared.

    Attributes:
        model_type: its name in the library's mapping.
        kind: the model's class; empty if it could not be built.
        outcome: one of `OUTCOMES`.
        way: how the samplers read it; empty unless exact.
        reason: why it was refused, or what went wrong.
    """

    model_type: str
    kind: str
    outcome: str
    way: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Case:
    """A pair, what ends its rows, and the completions that its plain forward passes say."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    seed: int
    stop_id: int
    completions: list[list[int]]
    teacher_weights: list[list[float]]


def find_case(model_type: str) -> Case:
    """A pair of one type, and the first seed and stop id with which some row stops at once, some later, some never.

    Raises:
        tiny_models.NotRunnableError: the library cannot run such a model.
    """
    student, teacher = build(model_type, seed=1), build(model_type, seed=2)
    for seed in range(_SEEDS):
        rows = [_oracle_row(student, teacher, TRUST_REGION, seed, key) for key in range(len(PROMPTS))]
        for stop_id in range(VOCABULARY):
            ended = [_until(tokens, stop_id) for tokens, _ in rows]
            lengths = {len(tokens) for tokens in ended}
            never = any(stop_id not in tokens for tokens in ended)
            if 1 in lengths and never and any(1 < length < NEW_TOKENS for length in lengths):
                weights = [row[: len(tokens)] for tokens, (_, row) in zip(ended, rows, strict=True)]
                return Case(student, teacher, seed, stop_id, ended, weights)
    raise AssertionError(f"{model_type}: no seed below {_SEEDS} ends rows at once, later and never")


def _until(tokens: list[int], stop_id: int) -> list[int]:
    return tokens[: tokens.index(stop_id) + 1] if stop_id in tokens else tokens


def _oracle_row(
    student: PreTrainedModel, teacher: PreTrainedModel | None, policy: BehaviorPolicy, seed: int, key: int
) -> tuple[list[int], list[float]]:
    """The tokens of one row that nothing stops, and the teacher's weight at each."""
    tokens, weights = list(PROMPTS[key]), []
    for position in range(NEW_TOKENS):
        uniform = uniforms(seed, *(torch.tensor([number]) for number in (key, 0, position)))
        log_student = _law(student, tokens)
        log_teacher = None if teacher is None else _law(teacher, tokens)
        draft = inverse_cdf(log_student.exp(), uniform[:, 0])
        target = policy.target(log_student, log_teacher)
        token, _ = accept_or_replace(target, log_student, draft, uniform[:, 1], uniform[:, 2])
        tokens.append(int(token))
        weights.append(float(target.teacher_weight))
    return tokens[-NEW_TOKENS:], weights


def _law(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    return torch.log_softmax(plain_logits(model, tokens)[-1:].double(), dim=-1)


def examine(model_type: str) -> Finding:
    """Sample a pair of the type in every layout, read it as the trainer does, and compare with the oracle.

    Nothing is raised: whatever a type raises is its finding.
    """
    kind = ""
    try:
        case = find_case(model_type)
        kind = type(case.student).__name__
        wrong = _differences(case)
        way = _way(case.student)
    except NotRunnableError as error:
        return Finding(model_type, kind, "library", reason=_first_line(error.__cause__ or error))
    except Exception as error:
        if isinstance(error, UnsupportedModelError) and names_type(str(error), model_type, case.student):
            return Finding(model_type, kind, "refused", reason=_first_line(error))
        place = traceback.extract_tb(error.__traceback__)[-1]
        return Finding(model_type, kind, "crash", reason=f"{_first_line(error)} ({place.name})")
    if wrong:
        return Finding(model_type, kind, "wrong", way, "; ".join(wrong))
    return Finding(model_type, kind, "exact", way)


def names_type(message: str, model_type: str, model: PreTrainedModel) -> bool:
    """Whether an error tells its reader which kind of model it is about."""
    return any(name in message for name in (model_type, model.config.model_type, type(model).__name__))


def _differences(case: Case) -> list[str]:
    """What is not as the oracle says, one line each."""
    found = []
    pure = [
        _until(_oracle_row(case.student, None, StudentPolicy(), case.seed, key)[0], case.stop_id)
        for key in range(len(PROMPTS))
    ]
    for method, block_size, max_rows in (
        ("lockstep", 3, None),
        ("speculative", 3, _MANY),
        ("speculative", 4, None),
        ("lockstep", 3, _MANY),
    ):
        layout = f"{method} block {block_size} rows {max_rows or 'all'}"
        rollout = sample_case(case, TRUST_REGION, method, block_size, max_rows)
        found += _unequal(layout, rollout.completions, case.completions)
        if rollout.completions == case.completions and not _close(rollout, case.teacher_weights):
            found.append(f"{layout}: other teacher weights")
    for method in ("lockstep", "speculative"):
        rollout = sample_case(case, StudentPolicy(), method, 3, _MANY)
        found += _unequal(f"{method} of the student alone", rollout.completions, pure)
    for role, model in (("student", case.student), ("teacher", case.teacher)):
        if not _trained_as_read(model, case.completions):
            found.append(f"training logits of the {role}")
    if not is_causal(case.student, PROMPTS[3]):
        found.append("logits change with later tokens")
    return found


def sample_case(case: Case, policy: BehaviorPolicy, method: str, block_size: int, max_rows: int | None) -> Rollout:
    """Completions of the pair, laid out in one way."""
    return sample(
        case.student,
        case.teacher if policy.needs_teacher else None,
        PROMPTS,
        policy,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=case.stop_id,
        seed=case.seed,
        method=method,
        block_size=block_size,
        max_rows=max_rows,
    )


def _unequal(layout: str, given: list[list[int]], wanted: list[list[int]]) -> list[str]:
    if given == wanted:
        return []
    same = sum(one == other for rows in zip(given, wanted, strict=True) for one, other in zip(*rows, strict=False))
    return [f"{layout}: {same} of {sum(map(len, wanted))} tokens"]


def _close(rollout: Rollout, weights: list[list[float]]) -> bool:
    given, wanted = (torch.tensor([*chain(*rows)]) for rows in (rollout.stats.teacher_weight, weights))
    return bool((given - wanted).abs().max() <= _WEIGHT_TOLERANCE)


def _trained_as_read(model: PreTrainedModel, completions: list[list[int]]) -> bool:
    """Whether the loss's hidden states of a ragged batch give the logits of each row read alone."""
    wide, long = max(map(len, PROMPTS)), max(map(len, completions))
    ids_RL = torch.zeros(len(PROMPTS), wide + long, dtype=torch.long)
    mask_RL, completion_RL = torch.zeros_like(ids_RL), torch.zeros_like(ids_RL)
    wanted = []
    for row, (prompt, completion) in enumerate(zip(PROMPTS, completions, strict=True)):
        real, written = slice(wide - len(prompt), wide + len(completion)), slice(wide, wide + len(completion))
        ids_RL[row, real] = torch.tensor([*prompt, *completion])
        mask_RL[row, real] = 1
        completion_RL[row, written] = 1
        wanted.append(plain_logits(model, [*prompt, *completion])[len(prompt) - 1 : -1])
    with torch.no_grad():
        given_NV = OutputHead.check(model)(completion_hidden_states(model, ids_RL, mask_RL, completion_RL))
    wanted_NV = torch.cat(wanted)
    return bool((given_NV - wanted_NV).abs().max() <= TOLERANCE * wanted_NV.abs().max().clamp_min(1.0))


def _way(model: PreTrainedModel) -> str:
    with sampling_mode(model):
        return way_of(model).name


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
