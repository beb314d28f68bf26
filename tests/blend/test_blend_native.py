"""`trb.blend.native` against the float64 oracle and the bar of `test_blend`.

Every row that is not flagged keeps its budget and uses it; a row is flagged when, and only when, it needs float64.
"""

import math
import multiprocessing
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import blend as oracle
from reference.distributions import Array, kl, log_normalise
from test_blend import FAMILIES, LOWEST, as_numpy, assert_log_probs_follow_the_weight, assert_within_promise, cast
from torch import Tensor

from trb import kernels
from trb.blend import eager
from trb.blend import triton as blend_triton
from trb.blend.laws import FLAGGED, BlendResult
from trb.blend.native import NativeResult, solve_rows

needs_library = pytest.mark.skipif(not kernels.available(), reason="no C compiler, or TRB_NATIVE=0")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


BUDGETS = (0.0, 1e-5, 1e-4, 5e-4, 1e-3, 5e-3, 0.02, 0.05, 0.5, 5.0, 50.0, math.inf)
SIZES = (2, 3, 5, 17, 128, 1000, 5003)
LARGEST_RATIO = 60.0


def zipfian(rng: np.random.Generator, n: int, v: int) -> tuple[Array, Array]:
    """Like language models: a power law over tokens, a few favourites, a teacher that agrees roughly."""
    student = -rng.uniform(0.8, 2.0, size=(n, 1)) * np.log(np.arange(1, v + 1)) + 1.5 * rng.normal(size=(n, v))
    student = rng.permuted(student, axis=1)
    student[np.arange(n), rng.integers(v, size=n)] += rng.uniform(0, 12, size=n)
    teacher = student * rng.uniform(0.9, 1.3, size=(n, 1))
    return student, teacher + rng.uniform(0.3, 2.0, size=(n, 1)) * rng.normal(size=(n, v))


def masked_alike(rng: np.random.Generator, n: int, v: int) -> tuple[Array, Array]:
    """The same tokens impossible for both, as in a padded head."""
    student, teacher = 2.0 * rng.normal(size=(2, n, v))
    banned = rng.random((n, v)) < 0.3
    banned[np.arange(n), rng.integers(v, size=n)] = False
    student[banned], teacher[banned] = -np.inf, LOWEST
    return student, teacher


ALL_FAMILIES = {**FAMILIES, "zipfian": zipfian, "masked_alike": masked_alike}


def logits(family: str, rows: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng([sum(family.encode()), size])
    student, teacher = ALL_FAMILIES[family](rng, rows, size)
    return cast(student, dtype), cast(teacher, dtype)


def mixed_budgets(rows: int) -> Tensor:
    return torch.tensor(BUDGETS, dtype=torch.float64).repeat(rows // len(BUDGETS) + 1)[:rows]


@cache
def solved(family: str, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, NativeResult]:
    rows = 40 if size < 40_000 else 10
    student, teacher = logits(family, rows, size, dtype)
    budget = mixed_budgets(rows)
    return student, teacher, budget, solve_rows(student, teacher, budget, write=True)


def as_blend(result: NativeResult, chosen: Tensor) -> BlendResult:
    assert result.log_probs is not None
    return BlendResult(
        result.log_probs[chosen],
        result.teacher_weight[chosen],
        result.kl_student[chosen],
        result.kl_teacher[chosen],
        result.passes[chosen],
    )


def must_be_flagged(student: Tensor, teacher: Tensor, budget: Tensor) -> tuple[Array, Array]:
    """(rows that must be flagged, rows too close to the limit to say), from the definitions in float64."""
    s, t, ε = as_numpy(student), as_numpy(teacher), as_numpy(budget)
    unreadable = np.isnan(s).any(-1) | np.isnan(t).any(-1) | (s.max(-1) == np.inf) | (t.max(-1) == np.inf)
    absent_s, absent_t = s <= -1e30, t <= -1e30
    differ = (absent_s != absent_t).any(-1)
    empty = absent_s.all(-1) | absent_t.all(-1)
    with np.errstate(invalid="ignore", over="ignore"):
        log_s, log_t = (log_normalise(np.where(off, -np.inf, x)) for x, off in ((s, absent_s), (t, absent_t)))
        ratio = np.where(absent_s | absent_t, 0.0, log_t - log_s)
        largest = (ratio - (np.exp(log_s) * ratio).sum(-1, keepdims=True)).max(-1)
    bad_budget = ~(ε >= 0) | ((ε > 0) & (ε < 1e-5))
    with np.errstate(invalid="ignore"):
        close = ~(unreadable | differ | empty) & (np.abs(largest - LARGEST_RATIO) < 0.01)
        return unreadable | differ | empty | bad_budget | ~(largest <= LARGEST_RATIO), close


def assert_sound(student: Tensor, teacher: Tensor, budget: Tensor, result: NativeResult) -> int:
    """Every promise of a solved row; returns how many rows were solved."""
    chosen = result.passes != FLAGGED
    if not chosen.any():
        return 0
    s, t, ε = as_numpy(student[chosen]), as_numpy(teacher[chosen]), as_numpy(budget[chosen])
    s, t = (np.where(x <= -1e30, -np.inf, x) for x in (s, t))
    log_s, log_t = log_normalise(s), log_normalise(t)
    blend = as_blend(result, chosen)
    assert_within_promise(log_s, log_t, ε, blend)
    assert_log_probs_follow_the_weight(log_s, log_t, ε, blend)

    weight = as_numpy(blend.teacher_weight)
    path = oracle.law_of(log_s, log_t, weight, ε)
    for name, other in (("kl_student", log_s), ("kl_teacher", log_t)):
        exact, reported = kl(path, other), as_numpy(getattr(blend, name))
        assert reported == pytest.approx(exact, rel=1e-4, abs=1e-6), name
    with np.errstate(invalid="ignore"):
        blended = np.where(np.isinf(s), -np.inf, (1 - weight[:, None]) * s + weight[:, None] * t)
    top = blended.max(-1)
    exact_norm = top + np.log(np.exp(blended - top[:, None]).sum(-1))
    assert as_numpy(result.log_norm[chosen]) == pytest.approx(exact_norm, rel=0, abs=1e-5)
    # Stricter than the promise: the margin, not luck, keeps the budget.
    interior = (weight > 0) & (weight < 1)
    spent = oracle.path_cost(log_s, log_t, weight)[interior]
    assert (spent <= ε[interior] + 1e-7).all()
    return int(chosen.sum())


@needs_library
@DTYPES
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_budget_is_kept_and_used(family: str, dtype: torch.dtype) -> None:
    for size in SIZES:
        assert_sound(*solved(family, size, dtype))


@needs_library
@DTYPES
@pytest.mark.parametrize("family", ["ordinary", "spread", "close", "masked_alike", "zipfian"])
def test_large_vocabulary(family: str, dtype: torch.dtype) -> None:
    assert assert_sound(*solved(family, 49_152, dtype)) == 10


@needs_library
@DTYPES
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_rows_are_flagged_exactly_when_they_need_float64(family: str, dtype: torch.dtype) -> None:
    for size in SIZES:
        student, teacher, budget, result = solved(family, size, dtype)
        expected, close = must_be_flagged(student, teacher, budget)
        flagged = (result.passes == FLAGGED).numpy()
        assert (flagged == expected)[~close].all(), (size, np.flatnonzero(flagged != expected))
        for values in (result.log_probs, result.teacher_weight, result.log_norm, result.kl_student, result.kl_teacher):
            assert values is not None
            assert values[flagged].isnan().all()


@needs_library
def test_enough_rows_are_solved() -> None:
    cases = [solved(name, size, torch.float32)[-1] for name in ALL_FAMILIES for size in SIZES]
    passes = torch.cat([result.passes for result in cases])
    weight = torch.cat([result.teacher_weight for result in cases])
    assert (passes != FLAGGED).sum() > 3_000
    assert ((weight > 0) & (weight < 1)).sum() > 1_000


@needs_library
@DTYPES
@pytest.mark.parametrize(
    ("student", "teacher", "budget", "flagged"),
    [
        ((0.0, 1.0, -math.inf), (1.0, 0.0, -math.inf), 0.01, False),
        ((0.0, 1.0, -2e30), (1.0, 0.0, -math.inf), 0.01, False),
        ((0.0, 1.0, -math.inf), (1.0, 0.0, 2.0), 0.01, True),
        ((0.0, 1.0, -2.0), (1.0, 0.0, -math.inf), 0.01, True),
        ((0.0, 1.0, -3e38), (1.0, 0.0, -2.0), 0.01, True),
        ((0.0, 1.0, -2.0), (1.0, 0.0, -3e38), 0.01, True),
        ((0.0, 1.0, math.nan), (1.0, 0.0, 0.0), 0.01, True),
        ((0.0, 1.0, 0.0), (1.0, 0.0, -math.nan), 0.01, True),
        ((0.0, 1.0, math.inf), (1.0, 0.0, 0.0), 0.01, True),
        ((-math.inf,) * 3, (-math.inf,) * 3, 0.01, True),
        ((0.0, 1.0, -1e25), (1.0, 0.0, -1e25), 0.01, False),
        ((0.0, 1.0, -2.0), (1.0, 0.0, -1e25), 0.01, True),
        ((0.0, 1.0, -80.0), (1.0, 0.0, -30.0), 0.01, False),
        ((0.0, 1.0, -80.0), (1.0, 0.0, -15.0), 0.01, True),
        ((0.0, 1.0, -80.0), (1.0, 0.0, -15.0), 0.0, True),
        ((0.0, 1.0, -300.0), (1.0, 0.0, -290.0), 0.01, False),
        ((0.0, 1.0, 0.5), (1.0, 0.0, 0.5), 9e-6, True),
        ((0.0, 1.0, 0.5), (1.0, 0.0, 0.5), 1e-5, False),
        ((0.0, 1.0, 0.5), (1.0, 0.0, 0.5), 0.0, False),
        ((0.0, 1.0, 0.5), (1.0, 0.0, 0.5), math.inf, False),
        ((0.0, 1.0, 0.5), (1.0, 0.0, 0.5), -0.1, True),
        ((0.0, 1.0, 0.5), (1.0, 0.0, 0.5), math.nan, True),
    ],
)
def test_what_is_flagged(
    student: tuple[float, ...], teacher: tuple[float, ...], budget: float, flagged: bool, dtype: torch.dtype
) -> None:
    # Far into a row of 300 as well as alone, so that the vectorised body and the loop's tail both meet it.
    for position in (0, 40, 290):
        s, t = torch.zeros(2, 1, 300).to(dtype).fill_(-5.0)
        s[0, position : position + 3], t[0, position : position + 3] = torch.tensor([student, teacher]).to(dtype)
        everywhere = math.isinf(student[0])
        ε = torch.tensor([budget], dtype=torch.float64)
        for pair in ((s[:, position : position + 3], t[:, position : position + 3]), (s, t)):
            if everywhere and pair[0] is s:
                continue
            result = solve_rows(*pair, ε, write=True)
            assert (int(result.passes) == FLAGGED) == flagged
            assert_sound(*pair, ε, result)


@needs_library
@DTYPES
def test_the_ends_of_the_path(dtype: torch.dtype) -> None:
    student, teacher = logits("spread", 12, 300, dtype)
    exact_s, exact_t = (log_normalise(as_numpy(x)) for x in (student, teacher))
    distance = kl(exact_t, exact_s)
    for budget, weight, log_law in (
        (torch.zeros(12), 0.0, exact_s),
        (torch.full((12,), math.inf), 1.0, exact_t),
        (torch.tensor(distance * (1 + 3e-5)), 1.0, exact_t),
        (torch.tensor(distance * 1.01), 1.0, exact_t),
    ):
        result = solve_rows(student, teacher, budget, write=True)
        assert result.log_probs is not None
        assert (result.teacher_weight == weight).all()
        assert as_numpy(result.log_probs) == pytest.approx(log_law, abs=3e-6)
        assert (result.kl_student if weight == 0 else result.kl_teacher).eq(0).all()
    assert (solve_rows(student, teacher, torch.tensor(distance * 0.999), write=False).teacher_weight < 1).all()


@needs_library
@pytest.mark.parametrize("family", ["ordinary", "spread", "close", "peaked_10", "zipfian"])
def test_number_of_passes(family: str) -> None:
    passes, interior = [], []
    for size in (128, 1000, 5003, 49_152):
        *_, result = solved(family, size, torch.float32)
        weight = result.teacher_weight
        passes.append(result.passes)
        interior.append(result.passes[(weight > 0) & (weight < 1)])
    assert torch.cat(passes).median() <= 5
    assert torch.cat(interior).median() <= 5
    assert torch.cat(interior).min() == 4
    assert torch.cat(passes).max() <= 14


@needs_library
def test_passes_count_the_sweeps() -> None:
    student, teacher = logits("ordinary", 3, 500, torch.float32)
    for budget, least in ((0.0, 1), (math.inf, 1), (0.02, 3)):
        ε = torch.full((3,), budget)
        silent, written = solve_rows(student, teacher, ε, write=False), solve_rows(student, teacher, ε, write=True)
        assert silent.log_probs is None
        assert torch.equal(silent.passes + 1, written.passes)
        assert (silent.passes >= least).all()
        for name in ("teacher_weight", "log_norm", "kl_student", "kl_teacher"):
            assert torch.equal(getattr(silent, name), getattr(written, name))


@needs_library
@DTYPES
def test_rows_do_not_depend_on_threads_neighbours_or_strides(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = logits("spread", 23, 9_001, dtype)
    budget = mixed_budgets(23)
    alone = [solve_rows(student[i : i + 1], teacher[i : i + 1], budget[i : i + 1], write=True) for i in range(23)]
    wide = torch.full((46, 9_040), math.nan, dtype=dtype)
    wide[::2, 7:9_008] = student
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        together = solve_rows(student, teacher, budget, write=True)
        strided = solve_rows(wide[::2, 7:9_008], teacher.T.contiguous().T, budget, write=True)
        for name in NativeResult._fields:
            expected = torch.cat([getattr(result, name) for result in alone])
            assert torch.equal(getattr(together, name), expected), name
            assert torch.equal(getattr(strided, name), expected), name
    repeated = solve_rows(student[:1].expand(3, -1), teacher[:1].expand(3, -1), budget[:1].expand(3), write=True)
    assert torch.equal(repeated.teacher_weight, alone[0].teacher_weight.expand(3))


@needs_library
def test_other_dtypes_are_read_as_float32() -> None:
    student, teacher = logits("spread", 4, 50, torch.bfloat16)
    budget = torch.full((4,), 0.02)
    expected = solve_rows(student.float(), teacher.float(), budget, write=True)
    for pair in ((student.double(), teacher.double()), (student, teacher.float()), (student.half(), teacher)):
        result = solve_rows(*pair, budget, write=True)
        assert torch.equal(result.teacher_weight, expected.teacher_weight)
    for dtype in (torch.float16, torch.float64):
        masked_s, masked_t = student.to(dtype), teacher.to(dtype)
        masked_s[:, 3] = torch.finfo(dtype).min
        assert (solve_rows(masked_s, masked_t, budget, write=False).passes == FLAGGED).all()
        masked_t[:, 3] = torch.finfo(dtype).min
        both = solve_rows(masked_s, masked_t, budget, write=True)
        assert both.log_probs is not None
        assert (both.passes != FLAGGED).all()
        assert both.log_probs[:, 3].isneginf().all()


@needs_library
def test_no_rows_and_inputs_left_alone() -> None:
    empty = solve_rows(torch.zeros(0, 5), torch.zeros(0, 5), torch.zeros(0), write=True)
    assert empty.log_probs is not None
    assert empty.log_probs.shape == (0, 5)
    assert (solve_rows(torch.zeros(2, 0), torch.zeros(2, 0), torch.zeros(2), write=True).passes == FLAGGED).all()
    one = solve_rows(torch.zeros(2, 1), torch.ones(2, 1), torch.tensor([0.0, 0.1]), write=True)
    assert one.log_probs is not None
    assert one.log_probs.tolist() == [[0.0], [0.0]]
    student, teacher = logits("inf_both", 3, 70, torch.float32)
    before = student.clone(), teacher.clone()
    solve_rows(student.requires_grad_(), teacher, torch.full((3,), 0.05), write=True)
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


@needs_library
@pytest.mark.parametrize(
    ("shape_s", "shape_t", "shape_b"), [((2, 3), (2, 4), (2,)), ((2, 3), (2, 3), (3,)), ((3,), (3,), (1,))]
)
def test_shapes_that_differ_are_refused(
    shape_s: tuple[int, ...], shape_t: tuple[int, ...], shape_b: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="expected"):
        solve_rows(torch.zeros(shape_s), torch.zeros(shape_t), torch.zeros(shape_b), write=False)


@needs_library
def test_other_devices_are_refused() -> None:
    row = torch.zeros(1, 3, device="meta")
    with pytest.raises(ValueError, match="meta"):
        solve_rows(row, row, torch.zeros(1), write=False)


@needs_library
def test_denormal_products_stay_with_the_solver() -> None:
    """Whatever mode the library computes in, the caller's arithmetic keeps its denormals."""
    student = torch.linspace(-90.0, 0.0, 3000)[None]
    solve_rows(student, student + 0.3 * torch.sin(torch.arange(3000.0)), torch.tensor([0.01]), write=True)
    assert (torch.full((64,), 1e-38) * 0.1 > 0).all()


def _child(queue: "multiprocessing.queues.Queue[list[float]]", student: Tensor, teacher: Tensor) -> None:
    torch.get_num_threads = lambda: 2
    queue.put(solve_rows(student, teacher, torch.full((len(student),), 0.02), write=True).teacher_weight.tolist())


@needs_library
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_threads_are_made_again_after_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = logits("ordinary", 16, 20_000, torch.float32)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    expected = solve_rows(student, teacher, torch.full((16,), 0.02), write=True).teacher_weight.tolist()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_child, args=(queue, student, teacher))
    child.start()
    child.join(20)
    assert child.exitcode == 0
    assert queue.get() == expected


def test_the_kernel_holds_the_constants_of_the_other_solvers() -> None:
    source = (Path(kernels.__file__).parent / "blend.c").read_text()
    assert f"FLAGGED = {FLAGGED} }}" in source
    for name, value in (("WINDOW", eager.WINDOW), ("MARGIN", blend_triton._MARGIN)):
        assert list(map(float, re.findall(rf"static const double {name} = (.*);", source))) == [value], name
