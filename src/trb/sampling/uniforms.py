"""Counter-based randomness: every uniform a sampler uses is a pure function of where it is used.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), vectorised in torch. A
position of a completion owns three uniforms, addressed by (seed, prompt key, rollout index, position, purpose), so
that a completion does not depend on its batch, on timing, on the number of processes or on a restart.

Shape suffixes: N rows.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "MAX_ROLLOUTS",
    "PURPOSES",
    "SEEDS",
    "SEED_BOUNDS",
    "as_int64",
    "philox4x32",
    "prompt_key",
    "stream_seed",
    "uniforms",
]

# The three uniforms of a position, in the order of the last dimension of `uniforms`.
PURPOSES = ("draft", "accept", "residual")

SEED_BOUNDS = "[0, 2**32)"
SEEDS = range(1 << 32)
"""The seeds that people may choose: what every generator takes, numpy's among them, each giving draws of its own."""

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
# Rollout indices share a counter word with the purpose.
MAX_ROLLOUTS = 1 << 24


def uniforms(seed: int, prompt_keys_N: Tensor, rollout_index_N: Tensor, position_N: Tensor) -> Tensor:
    """`[N, 3]` float64 uniforms in [0, 1), 53 bits each, one for each of `PURPOSES`.

    Args:
        seed: any 64-bit integer; selects the stream.
        prompt_keys_N: int64 (the bits of an unsigned 64-bit key), which prompt.
        rollout_index_N: int64 in [0, 2**24), which rollout of that prompt.
        position_N: int64 in [0, 2**32), which completion token.
    """
    key = (seed & _MASK, (seed >> 32) & _MASK)
    columns = []
    for purpose in range(len(PURPOSES)):
        counter = (
            position_N,
            rollout_index_N | (purpose * MAX_ROLLOUTS),
            prompt_keys_N & _MASK,
            (prompt_keys_N >> 32) & _MASK,
        )
        high, low, _, _ = philox4x32(counter, key)
        columns.append(((high << 21) | (low >> 11)).double() * 2.0**-53)
    return torch.stack(columns, dim=-1)


def philox4x32(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words (as int64 tensors) for a counter of four 32-bit words and a key of two."""
    word_0, word_1, word_2, word_3 = counter
    key_0, key_1 = key
    for _ in range(_ROUNDS):
        high_0, low_0 = _multiply(word_0, _MULTIPLIERS[0])
        high_1, low_1 = _multiply(word_2, _MULTIPLIERS[1])
        word_0, word_1, word_2, word_3 = high_1 ^ word_1 ^ key_0, low_1, high_0 ^ word_3 ^ key_1, low_0
        key_0, key_1 = (key_0 + _WEYL[0]) & _MASK, (key_1 + _WEYL[1]) & _MASK
    return word_0, word_1, word_2, word_3


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    # int64 products wrap modulo 2**64, which keeps every bit of a 32 x 32 bit product.
    product = word * multiplier
    return (product >> 32) & _MASK, product & _MASK


def prompt_key(token_ids: Sequence[int]) -> int:
    """A 64-bit key of a prompt's token ids, the same on every machine and in every process."""
    digest = hashlib.blake2b(digest_size=8, person=b"trb prompt")
    for token_id in token_ids:
        digest.update(int(token_id).to_bytes(4, "little"))
    return int.from_bytes(digest.digest(), "little")


def stream_seed(seed: int, *parts: str | int) -> int:
    """A 64-bit seed of a named stream, such as `stream_seed(seed, "train", step)`."""
    digest = hashlib.blake2b(digest_size=8, person=b"trb stream")
    for part in (int(seed), *parts):
        text = f"{type(part).__name__}:{part}".encode()
        digest.update(len(text).to_bytes(4, "little") + text)
    return int.from_bytes(digest.digest(), "little")


def as_int64(keys: Sequence[int], device: torch.device) -> Tensor:
    """Unsigned 64-bit keys as an int64 tensor with the same bits."""
    return torch.tensor([key - (1 << 64) if key >= 1 << 63 else key for key in keys], device=device)
