"""The compiled reverse KL against the definition in float64, its gradient against central differences, row by row.

Tolerances: logits up to 40 in float32 are read exactly, their log-ratios carry a rounding of 40 eps each, and the sums
another few eps; a gradient in bfloat16 is rounded once more, to its own eps.
"""

import math
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from reference.distributions import Array, entropy, kl, shared_events
from reference.losses import central_difference
from torch import Tensor, nn

from trb import kernels
from trb.losses import ReverseKL, TokenBatch, Veto, chunked_reverse_kl
from trb.losses.native import available, reverse_kl_chunk
from trb.losses.terms import Chunk
from trb.vocab import SharedVocabulary

needs_library = pytest.mark.skipif(not kernels.available(), reason="no C compiler, or TRB_NATIVE=0")
ROUNDING = 100 * torch.finfo(torch.float32).eps
ROWS = 5


def logits(size: int, dtype: torch.dtype, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    student, noise = scale * torch.randn(2, ROWS, size, generator=generator)
    return student.to(dtype), (0.6 * student + 0.7 * noise).to(dtype)


def as_numpy(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy()


def log_laws(student: Array, teacher: Array, stops: list[int], temperature: float) -> tuple[Array, Array]:
    with np.errstate(divide="ignore"):
        p, q = shared_events(student, teacher, stops, stops, temperature)
        return np.log(p), np.log(q)


def objective(student: Array, teacher: Array, k: int, stops: list[int], temperature: float) -> Any:
    """The loss of a row as a function of the student's logits; the support and its mass stay those of `student`."""
    log_p, log_q = log_laws(student, teacher, stops, temperature)
    ids = np.argsort(-log_p, kind="stable")[: k or len(log_p)]
    mass = np.exp(log_p[ids]).sum()

    def value(moved: Array) -> float:
        log_r = log_laws(moved, teacher, stops, temperature)[0][ids]
        r = np.exp(log_r)
        with np.errstate(invalid="ignore"):
            weighted = np.where(r > 0, r * (log_r - log_q[ids]), 0.0)
        return float((weighted - r + np.exp(log_q[ids])).sum() / mass)

    return value


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("size", "k", "temperature", "stops", "extra_rows"),
    [
        (9, 0, 1.0, [2], 0),
        (9, 1, 1.0, [2], 0),
        (40, 16, 1.0, [2], 3),
        (300, 0, 0.7, [7, 290, 3], 5),
        (300, 16, 0.7, [7, 290, 3], 5),
        (300, 299, 1.3, [7, 290], 0),
        (300, 300, 1.0, [7], 0),
    ],
)
def test_loss_gradient_and_metrics_are_those_of_the_definition(
    size: int, k: int, temperature: float, stops: list[int], extra_rows: int, dtype: torch.dtype
) -> None:
    student, teacher = logits(size + extra_rows, dtype)
    teacher = teacher[:, :size]
    token, weight = torch.tensor([0, stops[0], 3 % size, size - 1, 1]), torch.linspace(0.5, 2.0, ROWS)
    gradient = torch.full_like(student, math.nan)
    options: dict[str, Any] = {"k": k, "temperature": temperature, "size": size, "stop_ids": stops}
    token = SharedVocabulary.of([size], stops).events(token)
    loss, metrics = reverse_kl_chunk(Chunk(student, teacher, token, weight, gradient), **options)
    silent, same = reverse_kl_chunk(Chunk(student, teacher, token, weight), **options)
    assert torch.equal(silent, loss)
    assert all(map(torch.equal, same, metrics))
    assert not gradient[:, size:].any()
    s, t = as_numpy(student[:, :size]), as_numpy(teacher)
    log_p, log_q = log_laws(s, t, stops, temperature)
    expected = [kl(log_p, log_q), entropy(log_p), entropy(log_q)]
    expected += [law[np.arange(ROWS), token.numpy()] for law in (log_p, log_q)]
    masses = np.sort(np.exp(log_p))[:, ::-1][:, : k or size].sum(-1)
    for found, value in zip(metrics, [*expected, masses], strict=True):
        assert as_numpy(found) == pytest.approx(value, rel=ROUNDING, abs=ROUNDING)
    for row in range(ROWS):
        value = objective(s[row], t[row], k, stops, temperature)
        factor = float(weight[row])
        assert float(loss[row]) == pytest.approx(factor * value(s[row]), rel=ROUNDING, abs=ROUNDING)
        numeric = factor * central_difference(value, s[row])
        rounding = torch.finfo(dtype).eps if dtype == torch.bfloat16 else ROUNDING
        assert as_numpy(gradient[row, :size]) == pytest.approx(numeric, rel=rounding, abs=ROUNDING)
        assert np.abs(numeric).max() > 1e-3


@needs_library
def test_models_may_be_in_two_dtypes() -> None:
    (student, _), (_, teacher) = logits(40, torch.float32), logits(40, torch.bfloat16)
    token, options = torch.zeros(ROWS, dtype=torch.long), {"k": 0, "temperature": 1.0, "size": 40, "stop_ids": [2]}
    mixed = reverse_kl_chunk(Chunk(student, teacher, token), **options)[0]
    assert torch.equal(mixed, reverse_kl_chunk(Chunk(student, teacher.float(), token), **options)[0])


@needs_library
def test_of_equal_logits_at_the_edge_the_first_are_taken() -> None:
    """Which they are is the kernel's affair; that there are k of them, and always the same, is not."""
    student = torch.zeros(ROWS, 600)
    student[:, 500] = 1.0
    teacher = logits(600, torch.float32)[1]
    gradient = torch.empty_like(student)
    options: dict[str, Any] = {"k": 4, "temperature": 1.0, "size": 600, "stop_ids": [2]}
    token = torch.zeros(ROWS, dtype=torch.long)
    reverse_kl_chunk(Chunk(student, teacher, token, None, gradient), **options)
    for row in gradient:
        elsewhere = row[10]
        assert (row != elsewhere).nonzero().squeeze(-1).tolist() == [0, 1, 2, 500]


IMPOSSIBLE = {  # what a student and a teacher say of three tokens beside ordinary ones, and whether tensors must do it
    "both forbid one": ((0.0, 1.0, -math.inf), (1.0, 0.0, -math.inf), False),
    "both forbid one, in numbers": ((0.0, 1.0, -3e38), (1.0, 0.0, -3e38), False),
    "the student forbids one": ((0.0, 1.0, -math.inf), (1.0, 0.0, 2.0), False),
    "the teacher forbids one": ((0.0, 1.0, 0.5), (1.0, 0.0, -math.inf), True),
    "the student never draws what the teacher forbids": ((0.0, 1.0, -2000.0), (1.0, 0.0, -math.inf), True),
    "not a number": ((0.0, 1.0, math.nan), (1.0, 0.0, 0.5), True),
    "not a number of the teacher": ((0.0, 1.0, 0.5), (1.0, -math.nan, 0.5), True),
    "infinite": ((0.0, 1.0, math.inf), (1.0, 0.0, 0.5), True),
}


@needs_library
@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("kind", IMPOSSIBLE)
def test_rows_that_need_tensors_are_done_by_them(kind: str, k: int) -> None:
    """Through the public function: losses, metrics and gradients are those of a machine without a compiler."""
    ours, theirs, left = IMPOSSIBLE[kind]
    student, teacher = logits(300, torch.float32)
    student[2, 280:283], teacher[2, 280:283] = torch.tensor(ours), torch.tensor(theirs)
    token = torch.zeros(ROWS, dtype=torch.long)
    alone = reverse_kl_chunk(Chunk(student, teacher, token), k=0, temperature=1.0, size=300, stop_ids=[2])[0]
    assert alone.isnan().tolist() == [row == 2 and left for row in range(ROWS)]

    def found() -> tuple[Tensor, Any, Tensor]:
        leaf = student.clone().requires_grad_()
        loss, metrics = chunked_reverse_kl(
            leaf, teacher, nn.Identity(), nn.Identity(), token, torch.ones(ROWS), k=k, chunk_tokens=2
        )
        return loss.detach(), metrics, torch.autograd.grad(loss, leaf)[0]

    compiled = found()
    with mock.patch.object(kernels, "available", return_value=False):
        eager = found()
    columns = list(zip(vars(compiled[1]).values(), vars(eager[1]).values(), strict=True))
    for one, other in [(compiled[0], eager[0]), (compiled[2], eager[2]), *columns]:
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5, equal_nan=True)


@needs_library
def test_rows_do_not_depend_on_threads_neighbours_or_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, 23, 9_001, generator=generator)
    token, options = torch.arange(23), {"k": 16, "temperature": 1.0, "size": 9_001, "stop_ids": [2, 4]}

    def found(rows: slice, wide: bool = False) -> Tensor:
        given = [x[rows] for x in (student, teacher)]
        if wide:
            given = [torch.cat([x, x], dim=1)[:, :9_001] for x in given]
        gradient = torch.empty(2 * len(given[0]), 9_050)[::2, 7:9_008]
        loss, metrics = reverse_kl_chunk(Chunk(*given, token[rows], None, gradient), **options)
        return torch.cat([torch.stack([loss, *metrics], dim=1), gradient], dim=1)

    alone = torch.cat([found(slice(row, row + 1)) for row in range(23)])
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(found(slice(None)), alone)
        assert torch.equal(found(slice(None), wide=True), alone)


@needs_library
def test_what_the_kernel_leaves_out() -> None:
    x = torch.zeros(2, 3000)
    assert available(x, x.bfloat16(), 16, 3000, 2)
    assert available(x, x, 3000, 3000, 2)
    for student, k, stop_ids in ((x.double(), 16, 2), (x.half(), 16, 2), (x, 1025, 2), (x, 16, 65)):
        assert not available(student, x, k, 3000, stop_ids)
    assert not available(x.to("meta"), x.to("meta"), 16, 3000, 2)


@needs_library
def test_the_losses_that_are_a_reverse_kl_use_it_and_no_others() -> None:
    student, teacher = logits(40, torch.float32)
    heads = nn.Identity(), nn.Identity()
    batch = TokenBatch(student, teacher, *heads, torch.zeros(ROWS, dtype=torch.long))
    with mock.patch("trb.losses.native.reverse_kl_chunk", side_effect=AssertionError("used")):
        for loss in (ReverseKL(16), ReverseKL(0), Veto(16, 0.0)):
            with pytest.raises(AssertionError, match="used"):
                loss(batch)
        Veto(16, 0.5)(batch)


@needs_library
@pytest.mark.parametrize(
    "change",
    [
        {"size": 41},
        {"size": 0},
        {"stop_ids": [40]},
        {"stop_ids": [-1]},
        {"weight": torch.ones(ROWS - 1)},
        {"gradient": torch.zeros(ROWS, 39)},
        {"gradient": torch.zeros(ROWS, 40, dtype=torch.bfloat16)},
        {"gradient": torch.zeros(40, ROWS).T},
    ],
    ids=str,
)
def test_nothing_outside_the_tensors_is_read_or_written(change: dict[str, Any]) -> None:
    student, teacher = logits(40, torch.float32)
    tensors = Chunk(student, teacher, torch.zeros(ROWS, dtype=torch.long))._asdict()
    options: dict[str, Any] = {"k": 0, "temperature": 1.0, "size": 40, "stop_ids": [2]}
    for key, value in change.items():
        (tensors if key in tensors else options)[key] = value
    with pytest.raises(ValueError, match=r"40|39|4\]"):
        reverse_kl_chunk(Chunk(**tensors), **options)


def of_a_machine_without_a_compiler(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    with mock.patch.object(kernels, "available", return_value=False):
        return by_chunks(*arguments, **options)


def by_chunks(head: nn.Module, teacher: Tensor, size: int, k: int, **more: Any) -> tuple[Tensor, Tensor]:
    """Loss, and its gradient by hidden states, which are the rows of the student's logits before `head`."""
    leaf = logits(size, torch.float32)[0].requires_grad_()
    token, mask = torch.zeros(ROWS, dtype=torch.long), torch.ones(ROWS)
    loss, _ = chunked_reverse_kl(leaf, teacher, head, nn.Identity(), token, mask, k=k, **more)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


class _ByColumns(nn.Module):
    """A head whose logits lie column by column, as those of `(W @ h.T).T` do."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.T.contiguous().T


@needs_library
@pytest.mark.parametrize("k", [0, 4])
def test_logits_may_lie_column_by_column(k: int) -> None:
    teacher = logits(40, torch.float32)[1]
    for found, expected in zip(
        by_chunks(_ByColumns(), teacher, 40, k),
        of_a_machine_without_a_compiler(nn.Identity(), teacher, 40, k),
        strict=True,
    ):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)


@needs_library
def test_heads_that_do_not_fit_are_the_error_that_they_are_without_it() -> None:
    teacher = logits(40, torch.float32)[1]
    for given, more in (
        (teacher[:, :30], {}),
        (teacher, {"vocabulary": SharedVocabulary(40, 1, (-41,))}),
    ):
        errors = []
        for reads in (by_chunks, of_a_machine_without_a_compiler):
            with pytest.raises((RuntimeError, IndexError)) as caught:
                reads(nn.Identity(), given, 40, 0, **more)
            errors.append(type(caught.value))
        assert errors[0] is errors[1]


class _Doubled(ReverseKL):
    def terms(self, rows: Any) -> tuple[Tensor, Tensor, Tensor]:
        loss, gradient, mass = super().terms(rows)
        return 2 * loss, 2 * gradient, mass


@needs_library
def test_a_loss_derived_from_it_keeps_its_own_terms() -> None:
    student, teacher = logits(40, torch.float32)
    batch = TokenBatch(student, teacher, nn.Identity(), nn.Identity(), torch.zeros(ROWS, dtype=torch.long))
    assert float(_Doubled(16)(batch)[0]) == pytest.approx(2 * float(ReverseKL(16)(batch)[0]), rel=1e-5)
