"""One model reading a batch of rows, with its KV cache.

Works with any Hugging Face causal LM that takes `past_key_values`: only the public forward is used. Rows of
different lengths are padded on the left once, at the prompt; positions are passed explicitly, so padding changes
neither rotary nor learned positions.

Shape suffixes: R rows in flight, P padded prompt length, V head rows.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

__all__ = ["CachedReader"]


class CachedReader:
    """Feeds tokens to one model and returns its logits at the newest position of each row."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.calls = 0
        self._parameters = inspect.signature(model.forward).parameters
        self._cache: Any = None
        self._mask_RP: Tensor | None = None
        self._position_R = torch.empty(0, dtype=torch.long)

    def read_prompts(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read whole prompts; `[R, V]` logits of the first completion token."""
        longest, device = max(map(len, prompts)), self.model.device
        ids_RP = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask_RP = torch.zeros(len(prompts), longest, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids_RP[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask_RP[row, longest - len(prompt) :] = 1
        position_RP = (mask_RP.cumsum(-1) - 1).clamp_min(0).to(device)
        self._position_R = position_RP[:, -1] + 1
        # Without padding no mask is passed: attention kernels are faster without one.
        self._mask_RP = None if bool(mask_RP.all()) else mask_RP.to(device)
        return self._forward(ids_RP.to(device), position_RP)

    def read_tokens(self, token_R: Tensor) -> Tensor:
        """Read one more token per row; `[R, V]` logits of the next one."""
        position_R1 = self._position_R[:, None]
        self._position_R = self._position_R + 1
        if self._mask_RP is not None:
            self._mask_RP = torch.cat([self._mask_RP, self._mask_RP.new_ones(len(token_R), 1)], dim=1)
        return self._forward(token_R[:, None], position_R1)

    def keep(self, rows: Tensor) -> None:
        """Drop every row but `rows` (indices, ascending)."""
        self._cache.batch_select_indices(rows)
        self._position_R = self._position_R[rows]
        if self._mask_RP is not None:
            self._mask_RP = self._mask_RP[rows]

    def _forward(self, ids: Tensor, position_ids: Tensor) -> Tensor:
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": True, "past_key_values": self._cache}
        if self._mask_RP is not None:
            inputs["attention_mask"] = self._mask_RP
        if "position_ids" in self._parameters:
            inputs["position_ids"] = position_ids
        if "logits_to_keep" in self._parameters:
            inputs["logits_to_keep"] = 1
        output = self.model(**inputs)
        self._cache = output.past_key_values
        self.calls += 1
        return output.logits[:, -1]
