"""Readers that feed rows to one model token by token through the library's own cache, or through none at all.

Three ways, each slower and surer than the one before: `PaddedReader` pads prompts on the left to one batch;
`GroupedReader` reads rows of equal length together, so that nothing is padded, and gives up no row before its group has
ended; `WholeReader` keeps no cache and reads every row from its start at every token. `trb.sampling.reading` finds the
first that agrees with the model's own plain passes. None of them shares anything with the slots of `cache`, the fourth.

Left out: taking tokens back, and rows that join later.

Shape suffixes: R rows in flight, P padded prompt length, V head rows.
"""

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from trb.models.passes import accepts, cache_name, whole_pass

__all__ = ["GroupedReader", "PaddedReader", "Reader", "WholeReader"]

# What models without keys and values call the state that they return and take back.
_STATES = ("cache_params", "state")


class Reader(Protocol):
    """Feeds tokens to one model and returns its logits at the newest position of each row.

    Attributes:
        model: the causal LM.
        calls: forward passes so far.
    """

    model: PreTrainedModel

    @property
    def calls(self) -> int: ...

    def read_prompts(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read whole prompts; `[R, V]` logits of the next token."""

    def read_tokens(self, token_R: Tensor) -> Tensor:
        """Read one more token per row; `[R, V]` logits of the next one."""

    def keep(self, rows: Tensor) -> None:
        """Drop every row but `rows` (indices, ascending)."""


class PaddedReader:
    """One batch, padded on the left; rows leave it where the cache can let them go, and are read in vain where not.

    Args:
        model: a causal LM without wrappers.
        end: only rows read in vain come to this position; the model is not told of it.
    """

    def __init__(self, model: PreTrainedModel, end: int | None = None) -> None:
        self.model = model
        self.calls = 0
        self._end = end
        self._state_name = cache_name(model) or next((name for name in _STATES if accepts(model, name)), None)
        self._options = {name: value for name, value in _OPTIONS.items() if accepts(model, name)}
        self._takes_positions = accepts(model, "position_ids")
        self._takes_mask = accepts(model, "attention_mask")
        self._state: Any = None
        self._mask_RP: Tensor | None = None
        self._position_R = torch.empty(0, dtype=torch.long)
        self._kept_R: Tensor | None = None

    def read_prompts(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        longest, device = max(map(len, prompts)), self.model.device
        missing_R = torch.tensor([longest - len(prompt) for prompt in prompts])
        ids_RP = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        mask_RP = (torch.arange(longest) >= missing_R[:, None]).long()
        position_RP = (mask_RP.cumsum(-1) - 1).clamp_min(0).to(device)
        self._position_R = position_RP[:, -1] + 1
        # Without padding no mask is passed: attention kernels are faster without one.
        self._mask_RP = None if bool(mask_RP.all()) else mask_RP.to(device)
        return self._forward(ids_RP.to(device), position_RP)

    def read_tokens(self, token_R: Tensor) -> Tensor:
        if self._kept_R is not None:  # rows that are gone for the caller are fed anything
            token_R = torch.zeros_like(self._position_R).index_copy(0, self._kept_R, token_R)
        position_R1 = self._position_R[:, None]
        self._position_R = self._position_R + 1
        if self._mask_RP is not None:
            self._mask_RP = torch.cat([self._mask_RP, self._mask_RP.new_ones(len(token_R), 1)], dim=1)
        logits_RV = self._forward(token_R[:, None], position_R1)
        return logits_RV if self._kept_R is None else logits_RV[self._kept_R]

    def keep(self, rows: Tensor) -> None:
        if not self._select(rows):
            self._kept_R = rows if self._kept_R is None else self._kept_R[rows]
            return
        self._position_R = self._position_R[rows]
        if self._mask_RP is not None:
            self._mask_RP = self._mask_RP[rows]

    def _select(self, rows: Tensor) -> bool:
        """Let the cache keep only these rows; False, with nothing changed, where it cannot."""
        if self._kept_R is not None or not isinstance(self._state, Cache):
            return False
        if all(hasattr(layer, "batch_select_indices") for layer in self._state.layers):
            self._state.batch_select_indices(rows)
        else:  # layers with a recurrent state can be put in another order, which may be a shorter one
            self._state.reorder_cache(cast(torch.LongTensor, rows))
        return True

    def _forward(self, ids: Tensor, position_ids: Tensor) -> Tensor:
        inputs: dict[str, Any] = {"input_ids": ids, **self._options}
        if self._state_name is not None:
            inputs[self._state_name] = self._state
        if self._mask_RP is not None and self._takes_mask:
            inputs["attention_mask"] = self._mask_RP
        if self._takes_positions:
            inputs["position_ids"] = position_ids if self._end is None else position_ids.clamp_max(self._end - 1)
        output = self.model(**inputs)
        if self._state_name is not None:
            self._state = getattr(output, self._state_name)
        self.calls += 1
        return output.logits[:, -1]


_OPTIONS: dict[str, Any] = {"use_cache": True, "logits_to_keep": 1, "output_router_logits": False}


class GroupedReader:
    """Rows whose prompts are equally long form a batch without padding; a batch is left when its last row is."""

    def __init__(self, model: PreTrainedModel, end: int | None = None) -> None:
        self.model = model
        self._end = end
        self._ended = 0
        self._groups: list[tuple[_FixedReader, Tensor]] = []

    @property
    def calls(self) -> int:
        return self._ended + sum(reader.calls for reader, _ in self._groups)

    def read_prompts(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        lengths = torch.tensor(list(map(len, prompts)))
        self._groups = [
            (_FixedReader(self.model, self._end), (lengths == length).nonzero().squeeze(-1).to(self.model.device))
            for length in lengths.unique().tolist()
        ]
        found = [reader.read_prompts([prompts[row] for row in rows.tolist()]) for reader, rows in self._groups]
        return self._in_order(found)

    def read_tokens(self, token_R: Tensor) -> Tensor:
        return self._in_order([reader.read_tokens(token_R[rows]) for reader, rows in self._groups])

    def keep(self, rows: Tensor) -> None:
        staying = []
        for reader, own in self._groups:
            there = torch.isin(own, rows)
            if not bool(there.any()):
                self._ended += reader.calls
                continue
            reader.keep(there.nonzero().squeeze(-1))
            staying.append((reader, torch.searchsorted(rows, own[there])))
        self._groups = staying

    def _in_order(self, found: list[Tensor]) -> Tensor:
        return torch.cat(found)[torch.cat([rows for _, rows in self._groups]).argsort()]


class _FixedReader(PaddedReader):
    """A batch that no row leaves: some states can be neither selected from nor put in another order."""

    def _select(self, rows: Tensor) -> bool:
        return False


class WholeReader:
    """No cache: rows of equal length are read together, from their first token, at every token."""

    def __init__(self, model: PreTrainedModel, end: int | None = None) -> None:
        self.model = model
        self.calls = 0
        self._rows: list[list[int]] = []

    def read_prompts(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        self._rows = [list(prompt) for prompt in prompts]
        return self._read()

    def read_tokens(self, token_R: Tensor) -> Tensor:
        for row, token in zip(self._rows, token_R.tolist(), strict=True):
            row.append(token)
        return self._read()

    def keep(self, rows: Tensor) -> None:
        self._rows = [self._rows[row] for row in rows.tolist()]

    def _read(self) -> Tensor:
        lengths = torch.tensor(list(map(len, self._rows)))
        found, order = [], []
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero().squeeze(-1)
            found.append(whole_pass(self.model, [self._rows[row] for row in rows.tolist()])[:, -1])
            order.append(rows)
            self.calls += 1
        return torch.cat(found)[torch.cat(order).argsort().to(self.model.device)]
