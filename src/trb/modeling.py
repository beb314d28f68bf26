"""What the loss needs of a Hugging Face causal LM: its last hidden states and its output head, apart.

Logits of every completion token at once, `[B, T, V]`, are the largest tensor of a distillation step. Keeping the
head as a function of hidden states lets the loss project a chunk of tokens at a time. Architectures that transform
logits after the projection (scaling, soft-capping) do so in their own ways, so `OutputHead.check` compares the head
with the model's own logits once, before training starts.

Shape suffixes: B sequences, R rows of one group, L padded length, T kept positions, N completion tokens, H hidden
size, V head rows.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

__all__ = ["OutputHead", "completion_hidden_states", "hidden_states", "length_groups", "without_adapters"]

# Rows are read in groups of similar length. The number of groups depends on the batch size alone: under sharding every
# rank must run the model equally often.
_LENGTH_GROUPS = 4


def length_groups(rows: int) -> int:
    """Passes in which `completion_hidden_states` reads so many rows."""
    return math.ceil(rows / math.ceil(rows / _LENGTH_GROUPS))


def without_adapters(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model inside a PEFT wrapper (its adapters stay in place), or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator,return-value]


def hidden_states(model: nn.Module, ids_BL: Tensor, mask_BL: Tensor, keep: int) -> Tensor:
    """`[B, keep, H]` hidden states that predict the last `keep` tokens of left-padded sequences.

    Positions are counted from each row's first real token, as the samplers do, so that models with learned
    positions see the same inputs in sampling and in training.
    """
    inner = without_adapters(model)
    position_BL = (mask_BL.cumsum(-1) - 1).clamp_min(0)
    output = inner.base_model(input_ids=ids_BL, attention_mask=mask_BL, position_ids=position_BL, use_cache=False)
    return output.last_hidden_state[:, -keep - 1 : -1]


def completion_hidden_states(model: nn.Module, ids_BL: Tensor, mask_BL: Tensor, completion_BL: Tensor) -> Tensor:
    """`[N, H]` hidden states that predict the N completion tokens, row by row.

    Rows are cut to their real tokens, sorted by length and read in groups, padded on the right: a causal model's real
    tokens never see that padding, so attention needs no mask.

    Args:
        model: a causal LM, or a PEFT wrapper around one.
        ids_BL: token ids; each row's real tokens are contiguous.
        mask_BL: non-zero on real tokens.
        completion_BL: non-zero on completion tokens, each with a real token before it.
    """
    inner = without_adapters(model)
    length_B, start_B = mask_BL.sum(-1), mask_BL.argmax(-1)
    order_B = length_B.argsort()
    longest_B = length_B[order_B].tolist()
    found = []
    for rows in torch.arange(len(longest_B)).chunk(_LENGTH_GROUPS):
        chosen_R, longest = order_B[rows.to(order_B.device)], longest_B[rows[-1]]
        column_L = torch.arange(longest, device=ids_BL.device)
        place_RL = (start_B[chosen_R, None] + column_L).clamp_max(ids_BL.shape[1] - 1)
        ids_RL = ids_BL[chosen_R].gather(-1, place_RL)
        output = inner.base_model(input_ids=ids_RL, attention_mask=torch.ones_like(ids_RL), use_cache=False)
        real_RL = column_L < length_B[chosen_R, None]
        predicts_RL = (completion_BL[chosen_R].gather(-1, place_RL) != 0) & real_RL
        found.append(output.last_hidden_state[:, :-1][predicts_RL[:, 1:]])
    return torch.cat(found)[_row_order(order_B, (completion_BL != 0).sum(-1))]


def _row_order(order_B: Tensor, count_B: Tensor) -> Tensor:
    """Where each row's entries lie in a list that holds the rows in another order, one after the other."""
    sorted_count_B = count_B[order_B]
    first_B = torch.empty_like(count_B)
    first_B[order_B] = sorted_count_B.cumsum(0) - sorted_count_B
    before_B = count_B.cumsum(0) - count_B
    total = int(count_B.sum())
    shift_N = (first_B - before_B).repeat_interleave(count_B, output_size=total)
    return torch.arange(total, device=count_B.device) + shift_N


@dataclass(frozen=True)
class OutputHead:
    """A model's map from hidden states to logits: projection, then scaling, then soft-capping.

    Attributes:
        projection: the output embedding module.
        scale: multiplies the projected logits.
        soft_cap: `c` in `c · tanh(logits / c)`, or None.
    """

    projection: nn.Module
    scale: float = 1.0
    soft_cap: float | None = None

    @classmethod
    def of(cls, model: nn.Module) -> "OutputHead":
        inner = without_adapters(model)
        config = inner.config.get_text_config()
        return cls(
            inner.get_output_embeddings(),
            _logit_scale(config),
            getattr(config, "final_logit_softcapping", None),
        )

    def __call__(self, hidden: Tensor) -> Tensor:
        """`[..., H]` to `[..., V]`."""
        # Past the module's hooks: FSDP2's would take the loss's inner gradients for the model's backward pass, and free
        # weights that the true one still needs.
        logits = self.projection.forward(hidden)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.soft_cap is not None:
            logits = self.soft_cap * torch.tanh(logits / self.soft_cap)
        return logits

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.projection.parameters()

    @classmethod
    def check(cls, model: nn.Module) -> "OutputHead":
        """The head, after comparing it with the model's own logits on a few tokens.

        Raises:
            ValueError: the architecture computes its logits in a way this class does not know.
        """
        head, inner = cls.of(model), without_adapters(model)
        ids_BL = torch.arange(4, device=inner.device)[None] % inner.config.get_text_config().vocab_size
        mask_BL = torch.ones_like(ids_BL)
        was_training = model.training
        model.eval()
        with torch.no_grad():
            own_TV = inner(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False).logits[0, :-1]
            our_TV = head(hidden_states(model, ids_BL, mask_BL, 3))[0]
        model.train(was_training)
        scale = own_TV.abs().max().clamp_min(1.0)
        tolerance = 64 * torch.finfo(own_TV.dtype).eps
        if not (own_TV - our_TV).abs().max() <= tolerance * scale:
            raise ValueError(
                f"{type(inner).__name__} computes its logits in a way trb.modeling.OutputHead does not reproduce "
                f"(largest difference {(own_TV - our_TV).abs().max().item():.3g}); please report the architecture"
            )
        return head


def _logit_scale(config: object) -> float:
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        value = getattr(config, name, None)
        if value is not None:
            return float(value)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling) if getattr(config, "model_type", "") == "hyperclovax" else 1.0 / float(scaling)
