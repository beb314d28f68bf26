"""The counter-based generator: known answers, uniformity, independence, and that every address is its own.

Statistical checks use fixed seeds, so they pass or fail for good. Had the seeds been drawn at random, a
correct generator would fail this file with probability below 1e-3 (72 checks at `LEVEL`).
"""

from itertools import combinations

import numpy as np
import pytest
import torch
from reference.philox import philox4x32 as reference_philox
from scipy.stats import chi2, kstest
from torch import Tensor

from trb.sampling import prompt_key, stream_seed
from trb.sampling.uniforms import PURPOSES, philox4x32, uniforms

LEVEL = 1e-5
N = 20_000
ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def draw(seed: int = 1, key: int | Tensor = 17, rollout: int | Tensor = 3, position: int | Tensor = 5) -> np.ndarray:
    """Uniforms of N rows that differ in whatever is given as a tensor."""
    columns = torch.broadcast_tensors(*(torch.as_tensor(x) for x in (key, rollout, position)))
    return uniforms(seed, *(column.reshape(-1).contiguous() for column in columns)).numpy()


AXES = {
    "position": lambda: draw(position=torch.arange(N)),
    "rollout": lambda: draw(rollout=torch.arange(N)),
    "key": lambda: draw(key=torch.arange(N)),
    "hashed key": lambda: draw(key=torch.tensor([prompt_key([i]) >> 1 for i in range(N)])),
    "seed": lambda: np.concatenate([draw(seed=seed, position=torch.arange(50)) for seed in range(N // 50)]),
}


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers_of_random123(counter: tuple, key: tuple[int, int], expected: tuple) -> None:
    words = philox4x32(tuple(torch.tensor(counter)[:, None]), key)
    assert tuple(int(word) for word in words) == expected


def test_vectorised_philox_is_the_scalar_one() -> None:
    rng = np.random.default_rng(0)
    counters = rng.integers(2**32, size=(300, 4))
    for key in ((0, 0), (ONES, 1), (0x12345678, 0x9ABCDEF0)):
        words = philox4x32(tuple(torch.tensor(counters).unbind(-1)), key)
        expected = [reference_philox((a, b, c, d), key) for a, b, c, d in counters.tolist()]
        assert torch.stack(words, -1).tolist() == [list(row) for row in expected]


def test_shape_range_and_resolution() -> None:
    u = uniforms(7, torch.arange(N), torch.zeros(N, dtype=torch.int64), torch.zeros(N, dtype=torch.int64))
    assert u.shape == (N, len(PURPOSES)) == (N, 3)
    assert u.dtype == torch.float64
    assert ((u >= 0) & (u < 1)).all()
    scaled = u.numpy() * 2.0**53
    assert (scaled == np.floor(scaled)).all()
    # The lowest bits are alive: a generator of 32-bit numbers would fail.
    assert np.mean(scaled.astype(np.int64) & 1) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("purpose", range(3))
@pytest.mark.parametrize("axis", AXES)
def test_uniform_along_every_axis(axis: str, purpose: int) -> None:
    assert kstest(AXES[axis]()[:, purpose], "uniform").pvalue > LEVEL


def grid_p_value(x: np.ndarray, y: np.ndarray, cells: int = 16) -> float:
    """Chi-square test that (x, y) is uniform on the unit square."""
    counts, _, _ = np.histogram2d(x, y, bins=cells, range=[[0, 1], [0, 1]])
    expected = len(x) / cells**2
    return float(chi2.sf(((counts - expected) ** 2 / expected).sum(), cells**2 - 1))


@pytest.mark.parametrize("axis", AXES)
def test_neighbours_and_purposes_are_independent(axis: str) -> None:
    u = AXES[axis]()
    for purpose in range(3):
        assert grid_p_value(u[:-1:2, purpose], u[1::2, purpose]) > LEVEL
    for first, second in combinations(range(3), 2):
        assert grid_p_value(u[:, first], u[:, second]) > LEVEL


def test_neighbouring_streams_are_independent() -> None:
    positions = torch.arange(N)
    base = draw(position=positions)
    others = [draw(position=positions, **other) for other in ({"seed": 2}, {"key": 18}, {"rollout": 4})]
    for other in others:
        for first in range(3):
            for second in range(3):
                assert grid_p_value(base[:, first], other[:, second]) > LEVEL


def test_these_checks_can_fail() -> None:
    u = AXES["position"]()[:, 0]
    assert kstest(u**1.1, "uniform").pvalue < LEVEL
    assert grid_p_value(u[:-1:2], u[1::2] * 0.9 + u[:-1:2] * 0.1) < LEVEL


def test_every_address_has_its_own_number() -> None:
    """Over (seed, key, rollout, position, purpose), at the edges of their ranges too."""
    keys = torch.tensor([0, 1, 2**32 - 1, 2**32, 2**63 - 1, -1, -(2**63)])
    rollouts = torch.tensor([0, 1, 2, 2**24 - 1])
    positions = torch.tensor([0, 1, 2, 2**24, 2**32 - 1])
    grid = torch.cartesian_prod(keys, rollouts, positions)
    values = [uniforms(s, *grid.unbind(-1)) for s in (0, 1, 2**32, 2**63, 2**64 - 1)]
    everything = torch.stack(values).reshape(-1)
    assert len(everything.unique()) == everything.numel()


def test_a_row_depends_on_its_address_only() -> None:
    generator = torch.Generator().manual_seed(0)
    address = [torch.randint(2**20, (50,), generator=generator) for _ in range(3)]
    together = uniforms(9, *address)
    order = torch.randperm(50, generator=generator)
    assert torch.equal(uniforms(9, *(x[order] for x in address)), together[order])
    assert torch.equal(uniforms(9, *(x[13:14] for x in address)), together[13:14])
    assert torch.equal(uniforms(9, *address), together)
    torch.manual_seed(0)
    assert torch.equal(uniforms(9, *address), together)


def test_every_input_bit_reaches_half_of_the_output_bits() -> None:
    base = (draw() * 2.0**53).astype(np.int64)
    for name, bits in (("key", 63), ("rollout", 24), ("position", 32), ("seed", 64)):
        start = {"key": 17, "rollout": 3, "position": 5, "seed": 1}[name]
        flipped = [(draw(**{name: start ^ (1 << bit)}) * 2.0**53).astype(np.int64) for bit in range(bits)]
        share = np.mean([[int(x).bit_count() / 53 for x in (row ^ base).ravel()] for row in flipped])
        # The standard error is at most 0.5 / sqrt(24 * 3 * 53) = 0.008.
        assert share == pytest.approx(0.5, abs=0.04), name


def test_numbers_are_stable_across_versions_and_machines() -> None:
    """Pinned: a change here changes every rollout ever recorded."""
    pinned = [0.39901507336300535, 0.2696121122704186, 0.9188935686913956]
    assert draw(seed=42, key=7, rollout=1, position=2)[0].tolist() == pinned
    assert prompt_key([1, 2, 3]) == 6074453017669099543
    assert stream_seed(42, "train", 3) == 3679886016933632883


def test_prompt_keys() -> None:
    prompts = [[], [0], [0, 0], [1], [256], [1, 2], [2, 1], [1, 2, 3], [151_935]]
    keys = [prompt_key(prompt) for prompt in prompts]
    assert len(set(keys)) == len(prompts)
    assert all(0 <= key < 2**64 for key in keys)
    assert prompt_key((1, 2)) == prompt_key([1, 2])
    assert len({prompt_key([i, j]) for i in range(100) for j in range(100)}) == 10_000


def test_stream_seeds() -> None:
    names: list[tuple[str | int, ...]] = [
        (),
        ("train",),
        ("eval",),
        ("train", 1),
        ("train", 11),
        ("train", 1, 1),
    ]
    names += [("train1",), (1,), ("1",), ("", "train"), ("train", "")]
    seeds = [stream_seed(seed, *name) for seed in (0, 1, 2**64 - 1) for name in names]
    assert len(set(seeds)) == 3 * len(names)
    assert all(0 <= seed < 2**64 for seed in seeds)
