"""What every sampler and the trainer must reproduce of a model: its own plain forward pass, one row at a time.

`examine` holds one causal-LM type of the library to it and says how it went. The oracle knows nothing of caches,
masks, padding or batches: one row, one whole pass for every token, and the project's uniforms and draw.

Shape suffixes: R rows, L padded length, N completion tokens of all rows, V head rows.
"""

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from unittest import mock

import torch
from tiny_models import TOLERANCE, VOCABULARY, NotRunnableError, build, found_way, plain_logits
from torch import Tensor
from transformers import PreTrainedModel

from trb.models import prefixes
from trb.models.modeling import OutputHead, UnsupportedModelError, completion_hidden_states
from trb.policies import BehaviorPolicy, StudentPolicy, TrustRegionPolicy
from trb.sampling import Rollout, sample
from trb.sampling.draw import accept_or_replace, inverse_cdf
from trb.sampling.uniforms import uniforms

__all__ = [
    "NEW_TOKENS",
    "OUTCOMES",
    "PROMPTS",
    "Case",
    "Finding",
    "Row",
    "examine",
    "find_case",
    "names_type",
    "oracle_row",
    "sample_case",
]

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
        reason: why it was refused, what went wrong, or why a way that is exact is not the fastest.
    """

    model_type: str
    kind: str
    outcome: str
    way: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Row:
    """A completion, the teacher's weight in the law of each of its tokens, and the `[T, V]` logits they came from."""

    tokens: list[int]
    weights: list[float]
    student_logits: Tensor
    teacher_logits: Tensor | None

    def until(self, stop_id: int) -> "Row":
        """What is left of a row that `stop_id` ends."""
        end = self.tokens.index(stop_id) + 1 if stop_id in self.tokens else len(self.tokens)
        teacher_logits = None if self.teacher_logits is None else self.teacher_logits[:end]
        return Row(self.tokens[:end], self.weights[:end], self.student_logits[:end], teacher_logits)


@dataclass(frozen=True)
class Case:
    """A pair, what ends its rows, and the rows that its plain forward passes give."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    seed: int
    stop_id: int
    rows: list[Row]

    @property
    def completions(self) -> list[list[int]]:
        return [row.tokens for row in self.rows]


@lru_cache(maxsize=1)
def find_case(model_type: str) -> Case:
    """A pair of one type, and the first seed and stop id with which some row stops at once, some later, some never.

    Raises:
        tiny_models.NotRunnableError: the library cannot run such a model.
    """
    student, teacher = build(model_type, seed=1), build(model_type, seed=2)
    for seed in range(_SEEDS):
        rows = [oracle_row(student, teacher, TRUST_REGION, seed, key) for key in range(len(PROMPTS))]
        for stop_id in range(VOCABULARY):
            ended = [row.until(stop_id) for row in rows]
            lengths = {len(row.tokens) for row in ended}
            never = any(stop_id not in row.tokens for row in ended)
            if 1 in lengths and never and any(1 < length < NEW_TOKENS for length in lengths):
                return Case(student, teacher, seed, stop_id, ended)
    raise AssertionError(f"{model_type}: no seed below {_SEEDS} ends rows at once, later and never")


@lru_cache(maxsize=1 << 12)
def _next_logits(model: PreTrainedModel, tokens: tuple[int, ...]) -> Tensor:
    return plain_logits(model, tokens)[-1]


def oracle_row(
    student: PreTrainedModel, teacher: PreTrainedModel | None, policy: BehaviorPolicy, seed: int, key: int
) -> Row:
    """A row that nothing stops: for each token one whole pass over all before it."""
    tokens, weights = list(PROMPTS[key]), []
    logits: dict[PreTrainedModel, list[Tensor]] = {model: [] for model in (student, teacher) if model is not None}
    for uniform in uniforms(seed, torch.tensor([key]), torch.tensor([0]), torch.arange(NEW_TOKENS)).split(1):
        for model, found in logits.items():
            found.append(_next_logits(model, tuple(tokens)))
        log_student, *log_teacher = (torch.log_softmax(found[-1][None].double(), -1) for found in logits.values())
        draft = inverse_cdf(log_student.exp(), uniform[:, 0])
        target = policy.target(log_student, log_teacher[0] if log_teacher else None)
        token, _ = accept_or_replace(target, log_student, draft, uniform[:, 1], uniform[:, 2])
        tokens.append(int(token))
        weights.append(float(target.teacher_weight))
    student_logits, *teacher_logits = map(torch.stack, logits.values())
    return Row(tokens[-NEW_TOKENS:], weights, student_logits, teacher_logits[0] if teacher_logits else None)


def examine(model_type: str) -> Finding:
    """Sample a pair of the type in every layout, read it as the trainer does, and compare with the oracle.

    Nothing is raised: whatever a type raises is its finding.
    """
    kind = ""
    try:
        case = find_case(model_type)
        kind = type(case.student).__name__
        wrong = _differences(case)
        way = found_way(case.student)
    except NotRunnableError as error:
        return Finding(model_type, kind, "library", reason=_first_line(error.__cause__ or error))
    except Exception as error:
        if isinstance(error, UnsupportedModelError) and names_type(str(error), model_type, case.student):
            return Finding(model_type, kind, "refused", reason=str(error).partition(" is not supported: ")[2])
        place = traceback.extract_tb(error.__traceback__)[-1]
        return Finding(model_type, kind, "crash", reason=f"{_first_line(error)} ({place.name})")
    if wrong:
        return Finding(model_type, kind, "wrong", way.name, "; ".join(wrong))
    return Finding(model_type, kind, "exact", way.name, way.because)


def names_type(message: str, model_type: str, model: PreTrainedModel) -> bool:
    """Whether an error tells its reader which kind of model it is about."""
    return any(name in message for name in (model_type, model.config.model_type, type(model).__name__))


def _differences(case: Case) -> list[str]:
    """What is not as the oracle says, one line each."""
    found = []
    pure = [
        oracle_row(case.student, None, StudentPolicy(), case.seed, key).until(case.stop_id).tokens
        for key in range(len(PROMPTS))
    ]
    for method, block_size, max_rows in (
        ("lockstep", 3, _MANY),
        ("speculative", 3, _MANY),
        ("speculative", 4, None),
    ):
        layout = f"{method} block {block_size} rows {max_rows or 'all'}"
        rollout = sample_case(case, TRUST_REGION, method, block_size, max_rows)
        found += _unequal(layout, rollout.completions, case.completions)
        if rollout.completions == case.completions and not _close(rollout, [row.weights for row in case.rows]):
            found.append(f"{layout}: other teacher weights")
    for method, max_rows in (("lockstep", None), ("speculative", _MANY)):
        rollout = sample_case(case, StudentPolicy(), method, 3, max_rows)
        found += _unequal(f"{method} of the student alone", rollout.completions, pure)
    for role, model in (("student", case.student), ("teacher", case.teacher)):
        own_NV = torch.cat([getattr(row, f"{role}_logits") for row in case.rows])
        for reads, how in ((completion_hidden_states, ""), (_prompts_once, ", prompts read once")):
            if not _trained_as_sampled(model, case.completions, own_NV, reads):
                found.append(f"training logits of the {role}{how}")
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


def _prompts_once(model: PreTrainedModel, *batch: Tensor) -> Tensor:
    """`shared_hidden_states` wherever it can, worth it or not."""
    with mock.patch.object(prefixes, "_pays", lambda *_: True):
        return prefixes.shared_hidden_states(model, *batch)


def _trained_as_sampled(
    model: PreTrainedModel, completions: list[list[int]], own_NV: Tensor, reads: Callable[..., Tensor]
) -> bool:
    """Whether the loss's hidden states of a ragged batch give the logits that every token was sampled from.

    Each prompt has two rows: its completion, and behind them all once more, backwards, for company.
    """
    rows = [*zip(PROMPTS, completions, strict=True)]
    rows += [(prompt, completion[::-1]) for prompt, completion in rows]
    wide, long = max(map(len, PROMPTS)), max(map(len, completions))
    ids_RL = torch.zeros(len(rows), wide + long, dtype=torch.long)
    mask_RL, completion_RL = torch.zeros_like(ids_RL), torch.zeros_like(ids_RL)
    for row, (prompt, completion) in enumerate(rows):
        real, written = slice(wide - len(prompt), wide + len(completion)), slice(wide, wide + len(completion))
        ids_RL[row, real] = torch.tensor([*prompt, *completion])
        mask_RL[row, real] = 1
        completion_RL[row, written] = 1
    with torch.no_grad():
        given_NV = OutputHead.check(model)(reads(model, ids_RL, mask_RL, completion_RL))[: len(own_NV)]
    return bool((given_NV - own_NV).abs().max() <= TOLERANCE * own_NV.abs().max().clamp_min(1.0))


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
