"""What the loss needs of a Hugging Face causal LM: its last hidden states and its output head, apart.

Logits of every completion token at once, `[B, T, V]`, are the largest tensor of a distillation step. Keeping the
head as a function of hidden states lets the loss project a chunk of tokens at a time. Architectures that transform
logits after the projection (scaling, soft-capping) do so in their own ways, so `OutputHead.check` compares the head
with the model's own logits once, before training starts.

Shape suffixes: B sequences, L padded length, T kept positions, H hidden size, V head rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

__all__ = ["OutputHead", "hidden_states", "without_adapters"]


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
        logits = self.projection(hidden)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.soft_cap is not None:
            logits = self.soft_cap * torch.tanh(logits / self.soft_cap)
        return logits

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
