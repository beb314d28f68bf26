"""`trb.losses.triton` through Triton's interpreter, against the float64 oracle and its finite differences.

The kernel is compiled for a GPU as well (which needs none), and compared with the eager loss where there is one.

Shape suffixes: C tokens of one chunk, V rows of a head.
"""

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from reference.distributions import Array, entropy, kl, shared_events
from reference.losses import central_difference, support, token_objective
from torch import Tensor
from triton_interpreter import close_interpreter, compiled, interpreted

from trb.losses import ReverseKL, TokenBatch
from trb.losses import triton as losses_triton
from trb.losses.terms import Chunk

pytestmark = pytest.mark.skipif(losses_triton.triton is None, reason="Triton is not installed")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STOPS = (3, 7, 20)
INF = math.inf


class Found(NamedTuple):
    """What the kernel says of C rows; the gradient is NaN where it was not written."""

    loss: Tensor
    metrics: Tensor
    gradient: Tensor


class Case(NamedTuple):
    """Logits of both heads and how their loss is computed."""

    student: Tensor
    teacher: Tensor
    token: Tensor
    k: int
    temperature: float = 1.0
    size: int = 0
    stops: tuple[int, ...] = ()

    @property
    def shared(self) -> int:
        return self.size or self.student.shape[1]


def chunk(case: tuple[Any, ...], in_place: bool, weight: Tensor | None, **options: Any) -> tuple[Tensor, ...]:
    """Runs in the other process."""
    student, teacher, token, k, temperature, size, stops = case
    gradient = student if in_place else torch.full_like(student, math.nan)
    loss, metrics = losses_triton.reverse_kl_chunk(
        Chunk(student, teacher, token, weight, gradient),
        k=k,
        temperature=temperature,
        size=size,
        stop_ids=stops,
        **options,
    )
    return loss, torch.stack(metrics), gradient


def run(case: Case, in_place: bool = False, weight: Tensor | None = None, **options: Any) -> Found:
    return Found(*interpreted(chunk, tuple(case._replace(size=case.shared)), in_place, weight, **options))


@pytest.fixture(scope="module", autouse=True)
def _close_interpreter() -> Iterator[None]:
    yield
    close_interpreter()


def related(rows: int, students: int, teachers: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits of heads of two sizes, about a nat apart."""
    generator = torch.Generator().manual_seed(seed)
    student = 3 * torch.randn(rows, students, generator=generator)
    teacher = torch.randn(rows, teachers, generator=generator)
    shared = min(students, teachers)
    teacher[:, :shared] += student[:, :shared]
    return student, teacher


# --- against the oracle ------------------------------------------------------------


def oracle(case: Case, row: int) -> tuple[float, Array, Array]:
    """Loss, metrics and gradient by the student's logits of a row, in float64; the gradient by finite differences."""
    size, stops = case.shared, case.stops or (0,)
    student, teacher = (x[row].double().numpy() for x in (case.student, case.teacher))

    def laws(logits: Array) -> tuple[Array, Array]:
        pair = shared_events(logits[:size], teacher[:size], list(stops), list(stops), case.temperature)
        with np.errstate(divide="ignore"):
            log_p, log_q = np.log(pair)
        return log_p, log_q

    log_p, log_q = laws(student)
    ids = support(log_p, case.k)
    mass = float(np.exp(log_p[ids]).sum())

    def objective(logits: Array) -> float:
        return token_objective(*laws(logits), ids, mass)

    token = int(case.token[row])
    metrics = np.array([kl(log_p, log_q), entropy(log_p), entropy(log_q), log_p[token], log_q[token], mass])
    return objective(student), metrics, central_difference(objective, student)


def assert_right(case: Case, found: Found) -> None:
    # Logits, their exponents and log-normalisers are rounded to float32 a few times each, and so are the sums.
    possible = [x[x.abs() < 1e30].abs().max().item() / case.temperature for x in (case.student, case.teacher)]
    slack = 16 * torch.finfo(torch.float32).eps * (1 + max(possible))
    rounding, smallest = (getattr(torch.finfo(case.student.dtype), name) for name in ("eps", "smallest_normal"))
    for row in range(len(case.student)):
        loss, metrics, gradient = oracle(case, row)
        assert found.loss[row].item() == pytest.approx(loss, abs=slack)
        assert found.metrics[:, row].numpy() == pytest.approx(metrics, abs=slack)
        written = found.gradient[row].double().numpy()
        # Finite differences of step 1e-5 are off by about 1e-10; the gradient is rounded to its dtype.
        assert written == pytest.approx(gradient, rel=rounding, abs=slack + smallest)


@pytest.mark.parametrize(
    ("k", "dtype", "temperature"),
    [
        *((k, torch.float32, 1.0) for k in (1, 16, 64, 71, 0)),
        *((k, dtype, 0.7) for k in (16, 0) for dtype in DTYPES[1:]),
    ],
)
def test_value_metrics_and_gradient(k: int, dtype: torch.dtype, temperature: float) -> None:
    """Folded stop ids, heads padded to different sizes, a temperature; 71 is no multiple of the block."""
    student, teacher = related(2, 80, 75)
    case = Case(student.to(dtype), teacher.to(dtype), torch.tensor([3, 70]), k, temperature, size=71, stops=STOPS)
    found = run(case, block=64)
    assert_right(case, found)
    assert (found.gradient[:, case.shared :] == 0).all()


@pytest.mark.parametrize("k", [0, 5])
def test_one_row_of_one_block_without_stop_ids(k: int) -> None:
    student, teacher = related(1, 37, 37, seed=1)
    case = Case(student, teacher.bfloat16(), torch.tensor([36]), k, stops=(4,))
    assert_right(case, run(case))


@pytest.mark.parametrize("k", [0, 1, 8])
def test_tokens_that_a_model_cannot_draw(k: int) -> None:
    """Both cannot; the student cannot; the student draws stop ids only; no stop id at all; masks of finite size."""
    student, teacher = related(5, 40, 40, seed=2)
    both, alone = slice(30, 36), slice(10, 15)
    student[0, both], teacher[0, both] = -INF, -INF
    student[1, alone] = -INF
    only = torch.ones(40, dtype=torch.bool)
    only[list(STOPS)] = False
    student[2, only] = -INF
    student[3, list(STOPS)] = -INF
    lowest = torch.finfo(torch.float32).min
    student[4, both], teacher[4, both] = lowest, lowest
    case = Case(student, teacher, torch.tensor([30, 10, 3, 3, 0]), k, 0.7, stops=STOPS)
    found = run(case, block=16)
    assert_right(case, found)
    assert found.metrics[3, 0] == found.metrics[4, 0] == -INF


@pytest.mark.parametrize(("k", "block"), [(1, 16), (5, 16), (16, 32)])
def test_of_equal_logits_the_first_are_the_support(k: int, block: int) -> None:
    """In few steps of bf16, ties at the boundary are the rule; the last row has nothing but ties."""
    student, teacher = related(4, 50, 50, seed=3)
    student = student.round().bfloat16()
    student[3] = 1.0
    case = Case(student, teacher, torch.zeros(4, dtype=torch.long), k, stops=(3, 7))
    assert_right(case, run(case, block=block))


@pytest.mark.parametrize("k", [3, 10])
def test_a_support_in_one_lane_is_found_too(k: int) -> None:
    """Ten likely tokens, sixteen apart, meet in one lane of a block of sixteen."""
    student, teacher = related(1, 160, 160, seed=4)
    student[:, 5::16] += 30.0
    case = Case(student, teacher, torch.tensor([5]), k)
    assert_right(case, run(case, block=16))


def test_the_block_only_changes_rounding() -> None:
    student, teacher = related(2, 300, 300, seed=5)
    case = Case(student, teacher, torch.tensor([0, 1]), 16)
    for one, other in zip(run(case, block=64), run(case), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=16 * 2**-23 * 20)


def test_a_close_pair_keeps_its_divergence() -> None:
    """A difference of normalisers near 20 would leave nothing of 1e-6."""
    student, _ = related(3, 500, 500, seed=6)
    teacher = student + 1e-3 * torch.randn(student.shape, generator=torch.Generator().manual_seed(7))
    case = Case(student + 20, teacher + 20, torch.zeros(3, dtype=torch.long), 0)
    found = run(case)
    for row in range(3):
        loss, _, _ = oracle(case, row)
        assert found.loss[row].item() == pytest.approx(loss, abs=4 * torch.finfo(torch.float32).eps)


# --- rows that are left to tensors ------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 2])
def test_rows_beyond_it_are_flagged_and_left_alone(k: int) -> None:
    student, teacher = related(9, 30, 30, seed=8)
    best = student.argmax(-1)
    teacher[1, best[1]] = -INF
    student[2, 4] = math.nan
    teacher[3, 4] = math.nan
    student[4, 4] = INF
    teacher[5, 4] = INF
    student[6] = -INF
    teacher[7] = -INF
    case = Case(student, teacher, torch.zeros(9, dtype=torch.long), k)
    found = run(case, block=16)
    flagged = torch.tensor([False, *[True] * 7, False])
    assert torch.equal(found.loss.isnan(), flagged)
    assert found.gradient[flagged].isnan().all()
    alone = Case(student[~flagged], teacher[~flagged], torch.zeros(2, dtype=torch.long), k)
    assert_right(alone, Found(found.loss[~flagged], found.metrics[:, ~flagged], found.gradient[~flagged]))
    in_place = run(case, in_place=True, block=16)
    assert torch.equal(in_place.gradient[flagged].nan_to_num(0.5), student[flagged].nan_to_num(0.5))


def test_what_only_the_teacher_rules_out_matters_inside_the_support_alone() -> None:
    student, teacher = related(1, 30, 30, seed=9)
    teacher[0, student[0].argsort()[-5]] = -INF
    cases = {k: Case(student, teacher, torch.tensor([0]), k) for k in (4, 5, 0)}
    assert [run(case).loss.isnan().item() for case in cases.values()] == [False, True, True]
    found = run(cases[4])
    loss, _, gradient = oracle(cases[4], 0)
    assert found.loss.item() == pytest.approx(loss, abs=1e-4)
    assert found.gradient[0].numpy() == pytest.approx(gradient, abs=1e-4)
    assert found.metrics[0, 0] > 1e20  # as `trb.losses.terms.token_metrics`: huge, not infinite


# --- layout, options, availability ------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 4])
def test_in_place_strided_and_weighted(k: int) -> None:
    wide = related(3, 60, 64, seed=10)
    student, teacher = wide[0][:, 5:50].bfloat16(), wide[1].T.contiguous().T[:, :45]
    case = Case(student, teacher, torch.tensor([3, 0, 44]), k, 0.7, stops=STOPS)
    packed = case._replace(student=student.contiguous(), teacher=teacher.contiguous())
    plain = run(packed)
    for other in (run(case), run(packed, in_place=True)):
        for one, found in zip(plain, other, strict=True):
            assert torch.equal(one, found)
    weight = torch.tensor([0.0, 2.0, -0.5])
    weighted = run(packed, weight=weight)
    torch.testing.assert_close(weighted.loss, plain.loss * weight, rtol=2**-22, atol=0)
    expected = plain.gradient.float() * weight[:, None]
    torch.testing.assert_close(weighted.gradient.float(), expected, rtol=2**-7, atol=1e-30)
    assert torch.equal(weighted.metrics, plain.metrics)


def without_gradient(case: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Runs in the other process."""
    student, teacher, token, k, temperature, size, stops = case
    options = {"k": k, "temperature": temperature, "size": size, "stop_ids": stops}
    loss, metrics = losses_triton.reverse_kl_chunk(Chunk(student, teacher, token), **options)
    return loss, torch.stack(metrics)


def test_the_gradient_is_optional_and_a_chunk_may_be_empty() -> None:
    student, teacher = related(2, 30, 30, seed=11)
    case = Case(student, teacher, torch.tensor([0, 1]), 4)
    loss, metrics = interpreted(without_gradient, tuple(case._replace(size=30)))
    found = run(case)
    assert torch.equal(loss, found.loss)
    assert torch.equal(metrics, found.metrics)
    empty = run(Case(student[:0], teacher[:0], case.token[:0], 4))
    assert [x.shape for x in empty] == [(0,), (6, 0), (0, 30)]


def what_is_available() -> list[bool]:
    """Runs in the other process."""
    logits, double = torch.zeros(1, 100), torch.zeros(1, 100).double()
    cases = [(logits, 16, 1), (logits, 64, 64), (logits, 65, 1), (logits, 100, 1), (logits, 0, 65), (double, 0, 1)]
    return [losses_triton.available(taught, logits, k, 100, stops) for taught, k, stops in cases]


def test_what_it_can_do() -> None:
    assert interpreted(what_is_available) == [True, True, False, True, False, False]


def test_a_cpu_tensor_is_left_to_tensors() -> None:
    zeros = torch.zeros(1, 2)
    assert not losses_triton.available(zeros, zeros, 0, 2, 1)


WITHOUT_TRITON = """
import sys, torch
sys.modules["triton"] = None
from trb.blend import triton as blend_triton
from trb.losses import triton as losses_triton
zeros = torch.zeros(1, 2)
assert not blend_triton.available(zeros) and not losses_triton.available(zeros, zeros, 0, 2, 1)
chunk = zeros, zeros, zeros[:, 0].long()
for call in (
    lambda: blend_triton.solve_rows(zeros, zeros, torch.zeros(1)),
    lambda: losses_triton.reverse_kl_chunk(chunk, k=0, temperature=1.0, size=2, stop_ids=[0]),
):
    try:
        call()
    except RuntimeError as error:
        assert "Triton" in str(error)
    else:
        raise AssertionError
"""


def test_both_kernels_are_done_without_where_there_is_no_triton() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


# --- real code ------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 16])
def test_the_kernel_compiles_for_a_gpu(k: int, tmp_path: Path) -> None:
    """The interpreter accepts programs that the compiler refuses; compiling for another machine finds those."""
    types = {"student": "*bf16", "teacher": "*bf16", "gradient": "*bf16", "tokens": "*i64", "numbers": "*fp32"}
    constants = {"STOPS": (3, 7), "K": k, "PADDED_K": max(2, k), "BLOCK": 4096, "weights": None}
    asm = compiled(losses_triton.reverse_kl_kernel, types | {"coldness": "fp32"}, constants, tmp_path)
    assert len(asm["cubin"]) > 1000
    # What is written over the support must wait for what is written everywhere.
    assert ("bar.sync" in asm["ptx"]) or not k


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("k", [16, 64, 0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_the_eager_loss_on_a_gpu(k: int, dtype: torch.dtype) -> None:
    """Heads that are identities, so that logits are what the eager loss is given."""
    student, teacher = (x.to("cuda", dtype) for x in related(24, 5000, 5000, seed=12))
    token = torch.arange(24, device="cuda")
    assert losses_triton.available(student, teacher, k, 5000, 1)
    gradient = torch.full_like(student, math.nan)
    loss, metrics = losses_triton.reverse_kl_chunk(
        Chunk(student, teacher, token, None, gradient), k=k, temperature=1.0, size=5000, stop_ids=[0]
    )
    hidden = student.double().requires_grad_()
    batch = TokenBatch(hidden, teacher.double(), torch.nn.Identity(), torch.nn.Identity(), token, normaliser=1.0)
    total, expected = ReverseKL(k)(batch)
    total.backward()
    assert hidden.grad is not None
    torch.testing.assert_close(loss.sum().double(), total.detach(), rtol=1e-4, atol=1e-4)
    for metric, value in zip(metrics, vars(expected).values(), strict=True):
        torch.testing.assert_close(metric.double(), value, rtol=1e-4, atol=1e-4)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(gradient.double(), hidden.grad, rtol=eps, atol=1e-5)


def works(dtype: torch.dtype, k: int, folded: bool, factor: float) -> tuple[bool, list[str]]:
    """Runs in the other process: the trial of the kernel, whose losses come out `factor` times as large."""
    lines: list[str] = []
    plain = losses_triton.reverse_kl_chunk

    def other(*arguments: Any, **options: Any) -> Any:
        if not factor:
            raise RuntimeError("PassManager::run failed")
        loss, metrics = plain(*arguments, **options)
        return factor * loss, metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses_triton, "reverse_kl_chunk", other)
        patch.setattr(losses_triton.logger, "warning", lambda text, *values: lines.append(text % values))
        losses_triton._works.cache_clear()
        return losses_triton._works(torch.device("cpu"), dtype, torch.float32, k, 512, folded=folded), lines


@pytest.mark.parametrize(("dtype", "k"), [(torch.float32, 0), (torch.bfloat16, 16), (torch.float16, 0)])
def test_the_trial_passes_a_kernel_that_works(dtype: torch.dtype, k: int) -> None:
    assert interpreted(works, dtype, k, dtype == torch.bfloat16, 1.0) == (True, [])


@pytest.mark.parametrize(("factor", "reason"), [(1.01, "its losses are others"), (0.0, "PassManager::run failed")])
def test_a_kernel_that_does_not_work_is_not_used_and_said_once(factor: float, reason: str) -> None:
    found, lines = interpreted(works, torch.float32, 16, False, factor)
    assert not found
    (line,) = lines
    assert reason in line
