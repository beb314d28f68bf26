"""`trb.blend.triton` through Triton's interpreter, against the float64 oracle and the bar of `test_blend`.

The kernel is compiled for a GPU as well (which needs none), and compared with the eager solver where there is one.
"""

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import blend as oracle
from reference.distributions import Array, log_normalise
from test_blend import (
    FAMILIES,
    RELATIVE_GAP,
    as_numpy,
    assert_log_probs_follow_the_weight,
    assert_within_promise,
    cast,
)
from torch import Tensor
from triton_interpreter import close_interpreter, compiled, interpreted

from trb import blend, kernels
from trb.blend import triton as blend_triton
from trb.blend.laws import FLAGGED, BlendResult
from trb.blend.triton import SolvedRows

needs_triton = pytest.mark.skipif(blend_triton.triton is None, reason="Triton is not installed")

BUDGETS = (0.0, 5e-4, 1e-3, 5e-3, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0, 50.0, math.inf)
SOLVABLE = ("flat", "ordinary", "sharp", "near_equal_1e-2", "close", "peaked_10", "peaked_30")
SIZES = (2, 17, 128, 5003)
# Reading bfloat16 is one line of the kernel: it is for a size below a block and one above.
CASES = [(family, size, torch.float32) for family in SOLVABLE for size in SIZES]
CASES += [(family, size, torch.bfloat16) for family in ("ordinary", "peaked_10") for size in (17, 5003)]


# --- in the interpreter's process ------------------------------------------------------------


def solve_rows(*arguments: Any, **options: Any) -> tuple[Tensor | None, ...]:
    return tuple(blend_triton.solve_rows(*arguments, **options))


@pytest.fixture(scope="module", autouse=True)
def _close_interpreter() -> Iterator[None]:
    yield
    close_interpreter()


def solve(student: Tensor, teacher: Tensor, budget: Any, **options: Any) -> SolvedRows:
    budget_N = torch.as_tensor(budget, dtype=torch.float64).expand(len(student))
    return SolvedRows(*interpreted(solve_rows, student, teacher, budget_N, **options))


def unflagged(solved: SolvedRows) -> tuple[Array, BlendResult]:
    """Which rows were solved, and those rows."""
    chosen = solved.passes != FLAGGED
    return chosen.numpy(), BlendResult(*(value[chosen] for value in solved if value is not None))


# --- against the oracle ------------------------------------------------------------


@functools.cache
def case(family: str, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Array, SolvedRows]:
    rng = np.random.default_rng([sum(family.encode()), size])
    rows = 5 if size <= 128 else 3
    student, teacher = (cast(x, dtype) for x in FAMILIES[family](rng, rows, size))
    budget = rng.permutation(np.array(BUDGETS))[:rows]
    return student, teacher, budget, solve(student, teacher, budget)


@needs_triton
@pytest.mark.parametrize(("family", "size", "dtype"), CASES, ids=str)
def test_budget_is_kept_and_used(family: str, size: int, dtype: torch.dtype) -> None:
    student, teacher, budget, solved = case(family, size, dtype)
    chosen, result = unflagged(solved)
    assert chosen.all()
    log_s, log_t = log_normalise(as_numpy(student)), log_normalise(as_numpy(teacher))
    assert_within_promise(log_s, log_t, budget, result)
    assert_log_probs_follow_the_weight(log_s, log_t, budget, result)
    assert (result.teacher_weight[torch.tensor(budget == 0)] == 0).all()
    assert (result.kl_student[torch.tensor(budget == 0)] == 0).all()
    assert (result.kl_teacher[torch.tensor(np.isposinf(budget))] == 0).all()


@needs_triton
@pytest.mark.parametrize("family", ["ordinary", "close", "peaked_10"])
def test_teacher_weight_is_the_largest_feasible_one(family: str) -> None:
    student, teacher, budget, solved = case(family, 17, torch.float32)
    exact = oracle.largest_weight(log_normalise(as_numpy(student)), log_normalise(as_numpy(teacher)), budget)
    assert as_numpy(solved.teacher_weight) == pytest.approx(exact, rel=2 * RELATIVE_GAP)


@needs_triton
def test_it_spends_no_more_sweeps_than_the_eager_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "available", lambda: False)
    for family in ("flat", "ordinary", "sharp", "close", "peaked_10"):
        student, teacher, budget, solved = case(family, 128, torch.float32)
        eager = blend.solve(student, teacher, torch.tensor(budget))
        # Rounding can tip a row over the edge of the window. (Rows peaked further bisect, along another path.)
        assert (solved.passes <= eager.passes + 2).all()


# --- flags ------------------------------------------------------------

INF, LOWEST = math.inf, torch.finfo(torch.float32).min
# One row each: (student, teacher, budget, whether float32 solves it).
ROWS: dict[str, tuple[list[float], list[float], float, bool]] = {
    "plain": ([0.0, 1.0, 2.0], [2.0, 1.0, 0.0], 0.02, True),
    "shared mask": ([0.0, -INF, 2.0], [2.0, -INF, 0.0], 0.02, True),
    "shared mask, no budget": ([0.0, -INF, 2.0], [2.0, -INF, 0.0], 0.0, True),
    "shared mask, infinite budget": ([0.0, -INF, 2.0], [2.0, -INF, 0.0], INF, True),
    "smallest budget": ([0.0, 1.0, 2.0], [2.0, 1.0, 0.0], 5e-4, True),
    "just above the floor": ([0.0, 1.0, 84.0], [2.0, 84.0, 0.0], 0.02, False),  # mean log-ratio -84
    "steep but level": ([0.0, 1.0, 84.0], [2.0, 1.0, 84.0], 0.02, True),
    "budget too small": ([0.0, 1.0, 2.0], [2.0, 1.0, 0.0], 4e-4, False),
    "negative budget": ([0.0, 1.0, 2.0], [2.0, 1.0, 0.0], -0.1, False),
    "no budget at all": ([0.0, 1.0, 2.0], [2.0, 1.0, 0.0], math.nan, False),
    "student masked": ([0.0, -INF, 2.0], [2.0, 1.0, 0.0], 0.02, False),
    "teacher masked": ([0.0, 1.0, 2.0], [2.0, -INF, 0.0], 0.02, False),
    "teacher masked, infinite budget": ([0.0, 1.0, 2.0], [2.0, -INF, 0.0], INF, False),
    "student's choice masked": ([0.0, 1.0, 2.0], [2.0, 1.0, -INF], 0.02, False),
    "mask as the lowest number": ([0.0, LOWEST, 2.0], [2.0, LOWEST, 0.0], 0.02, False),
    "student too far down": ([0.0, 1.0, 90.0], [2.0, 1.0, 0.0], 0.02, False),
    "teacher too far down": ([0.0, 1.0, 2.0], [0.0, 90.0, 0.0], 0.0, False),
    "nothing allowed": ([-INF] * 3, [-INF] * 3, 0.02, False),
    "student NaN": ([0.0, math.nan, 2.0], [2.0, 1.0, 0.0], 0.02, False),
    "teacher NaN": ([0.0, 1.0, 2.0], [2.0, math.nan, 0.0], 0.02, False),
    "plus infinity": ([0.0, INF, 2.0], [2.0, 1.0, 0.0], 0.02, False),
}


@needs_triton
def test_rows_beyond_float32_are_flagged_and_leave_the_others_alone() -> None:
    student, teacher = (torch.tensor([row[side] for row in ROWS.values()]) for side in (0, 1))
    budget = torch.tensor([row[2] for row in ROWS.values()], dtype=torch.float64)
    expected = np.array([row[3] for row in ROWS.values()])
    solved = solve(student, teacher, budget)
    chosen, result = unflagged(solved)
    assert not [name for name, found, wanted in zip(ROWS, chosen, expected, strict=True) if found != wanted]
    log_s, log_t = log_normalise(as_numpy(student)[chosen]), log_normalise(as_numpy(teacher)[chosen])
    assert_within_promise(log_s, log_t, budget.numpy()[chosen], result)
    assert_log_probs_follow_the_weight(log_s, log_t, budget.numpy()[chosen], result)
    for value in solved[:4]:
        assert value is not None
        assert value[~torch.tensor(chosen)].isnan().all()


@needs_triton
@pytest.mark.parametrize("family", ["logits_1e4", "inf_teacher", "inf_both", "lowest_both", "one_hot_teacher"])
def test_rows_it_does_solve_are_right_in_every_family(family: str) -> None:
    student, teacher, budget, solved = case(family, 5, torch.float32)
    chosen, result = unflagged(solved)
    assert not chosen.all()
    log_s, log_t = log_normalise(as_numpy(student)), log_normalise(as_numpy(teacher))
    supports_differ = (np.isfinite(log_s) != np.isfinite(log_t)).any(-1)
    assert not chosen[supports_differ].any()
    if chosen.any():
        assert_within_promise(log_s[chosen], log_t[chosen], budget[chosen], result)


# --- layout, options, errors ------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("block", [16, 64, 512])
def test_the_block_only_changes_rounding(block: int) -> None:
    student, teacher, budget, solved = case("close", 128, torch.float32)
    other = solve(student, teacher, budget, block=block)
    assert as_numpy(other.teacher_weight) == pytest.approx(as_numpy(solved.teacher_weight), rel=1e-4)
    assert torch.allclose(other.log_probs, solved.log_probs, atol=1e-4)


@needs_triton
def test_any_row_stride_and_mixed_dtypes() -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(3, 50, generator=generator)
    student, teacher = wide[:, 3:40], torch.randn(37, 3, generator=generator).bfloat16().T
    assert student.stride() != teacher.stride()
    strided = solve(student, teacher, 0.05)
    packed = solve(student.contiguous(), teacher.float().contiguous(), 0.05)
    for one, other in zip(strided, packed, strict=True):
        assert torch.equal(one, other)
    broadcast = solve(student, teacher[:1].expand(3, -1), 0.05)
    assert torch.equal(broadcast.teacher_weight[0], strided.teacher_weight[0])


@needs_triton
def test_float16_is_read_too() -> None:
    student, teacher = torch.randn(2, 2, 33, generator=torch.Generator().manual_seed(1)).half()
    solved = solve(student, teacher, 0.05)
    exact = blend.solve(student.double(), teacher.double(), 0.05)
    assert as_numpy(solved.teacher_weight) == pytest.approx(as_numpy(exact.teacher_weight), rel=2 * RELATIVE_GAP)


@needs_triton
def test_log_probs_are_optional() -> None:
    student, teacher, budget, solved = case("ordinary", 17, torch.float32)
    scalars = solve(student, teacher, budget, with_log_probs=False)
    assert scalars.log_probs is None
    assert torch.equal(scalars.passes, solved.passes - 1)
    for name in ("teacher_weight", "kl_student", "kl_teacher"):
        assert torch.equal(getattr(scalars, name), getattr(solved, name))


@needs_triton
def test_one_token_and_no_rows() -> None:
    solved = solve(torch.tensor([[3.0]]), torch.tensor([[-7.0]]), 0.02)
    assert solved.teacher_weight == 1
    assert solved.log_probs is not None
    assert solved.log_probs == 0
    assert solve(torch.zeros(0, 5), torch.zeros(0, 5), 0.02).passes.shape == (0,)


@needs_triton
@pytest.mark.parametrize(
    ("student", "teacher", "budget", "complaint"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2), r"\(2, 4\)"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(1), r"\(1,\)"),
        (torch.zeros(3), torch.zeros(3), torch.zeros(3), r"\(3,\)"),
        (torch.zeros(2, 0), torch.zeros(2, 0), torch.zeros(2), "V > 0"),
        (torch.zeros(2, 3), torch.zeros(2, 3).double(), torch.zeros(2), "float64"),
    ],
)
def test_arguments_are_checked(student: Tensor, teacher: Tensor, budget: Tensor, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        blend_triton.solve_rows(student, teacher, budget)


def test_a_cpu_tensor_is_left_to_the_eager_solver() -> None:
    assert not blend_triton.available(torch.zeros(1, 2))


# --- real code (that both kernels are done without Triton: test_losses_triton) ------------------------------------


@needs_triton
def test_the_kernel_compiles_for_a_gpu(tmp_path: Path) -> None:
    """The interpreter accepts programs that the compiler refuses; compiling for another machine finds those."""
    types = {"student": "*bf16", "teacher": "*bf16", "log_probs": "*fp32", "passes": "*i64"}
    types |= dict.fromkeys(("budgets", "teacher_weight", "kl_student", "kl_teacher"), "*fp64")
    constants = {"WRITE": True, "BLOCK": 4096, **blend_triton._CONSTANTS}
    asm = compiled(blend_triton._solve_kernel, types, constants, tmp_path)
    assert len(asm["cubin"]) > 1000
    # A constant compared with a float64 number must not have passed through float32, which lifts 5e-4 above itself.
    assert "5.000000e-04 : f64" in asm["ttir"], asm["ttir"]


@pytest.mark.gpu
@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("noise", [0.3, 1.0, 3.0])
def test_agrees_with_the_eager_solver_on_a_gpu(noise: float) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    student = 3 * torch.randn(24, 151_936, device="cuda", generator=generator)
    teacher = (student + noise * torch.randn(student.shape, device="cuda", generator=generator)).bfloat16()
    student = student.bfloat16()
    budget = torch.tensor(BUDGETS, dtype=torch.float64, device="cuda").repeat(2)
    assert blend_triton.available(student)
    solved = blend_triton.solve_rows(student, teacher, budget)
    assert (solved.passes != FLAGGED).all()
    exact = blend.solve(student.double(), teacher.double(), budget)
    assert torch.allclose(solved.teacher_weight, exact.teacher_weight, rtol=2 * RELATIVE_GAP, atol=0)
    log_s, log_t = (log_normalise(as_numpy(x.cpu())) for x in (student, teacher))
    result = BlendResult(*(value.cpu() for value in solved if value is not None))
    assert_within_promise(log_s, log_t, budget.cpu().numpy(), result)
    assert_log_probs_follow_the_weight(log_s, log_t, budget.cpu().numpy(), result)
