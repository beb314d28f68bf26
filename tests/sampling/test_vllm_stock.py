"""What benchmarks/vllm_stock.py counts and mends; that needs no vLLM."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from vllm_stock import decisions, expanded

STOP = 0
UNDECIDED = -1


@pytest.mark.parametrize(
    ("drafts", "tokens", "kept"),
    [
        ([5, 6, 7], [5, 6, 7, 8], [1, 1, 1]),  # and a token that had no draft
        ([5, 6, 7], [5, 9, UNDECIDED, UNDECIDED], [1, 0]),
        ([5, 6, 7], [9, UNDECIDED, UNDECIDED, UNDECIDED], [0]),
        ([5, STOP, 7], [5, STOP, 7, 8], [1, 1]),
        ([5, 6, 7], [5, STOP, UNDECIDED, UNDECIDED], [1, 0]),
        ([], [5, UNDECIDED, UNDECIDED, UNDECIDED], []),
    ],
)
def test_decisions_end_with_a_replaced_draft_or_a_stop_token(
    drafts: list[int], tokens: list[int], kept: list[float]
) -> None:
    assert decisions(drafts, tokens, STOP) == kept


def test_a_row_s_number_is_repeated_for_each_of_its_tokens() -> None:
    ends = torch.tensor([2, 2, 5, 6], dtype=torch.int32)
    temperatures = expanded(torch.tensor([0.5, 3.0, 0.0, 2.0]), ends, 6, replace_from=0, replace_to=1)
    assert temperatures.dtype == torch.float32
    assert temperatures.tolist() == [0.5, 0.5, 1.0, 1.0, 1.0, 2.0]
    assert expanded(torch.tensor([4, 9, 7, 0]), ends, 6).tolist() == [4, 4, 7, 7, 7, 0]
