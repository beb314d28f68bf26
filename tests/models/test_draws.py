"""What training mode draws, of every type and of adapters: off while a step is computed, and there again after."""

import copy
import random
from typing import Any

import numpy
import pytest
import tiny_models
import torch
from huggingface_hub.errors import StrictDataclassError
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, get_peft_model
from test_models import QUICK
from tiny_models import MODEL_TYPES, TOLERANCE, VOCABULARY, NotRunnableError, build, plain_logits, tiny_config
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from trb.models.draws import check_draws_off, draws, draws_off
from trb.models.modeling import UnsupportedModelError

ROW = [1 + 5 * place % (VOCABULARY - 1) for place in range(20)]
SHARE = 0.5
# Types that have no number for any, or read none.
SILENT = ("ernie4_5", "ernie4_5_moe", "falcon_mamba", "lfm2", "lfm2_moe", "mamba", "mamba2", "rwkv", "xlstm")
# Trains on rows of one length alone; refused for other reasons.
FIXED_LENGTH = ("reformer",)
# One of every way of drawing: dropout as a function, from the configuration at every pass, and jitter, also in PhiMoE.
DRAWING = ("phimoe", "dbrx", "seed_oss", "gpt_bigcode", "xlm", "bart", "biogpt")
OPTIONS = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
ADAPTERS: dict[str, PeftConfig] = {
    "lora": LoraConfig(r=2, lora_dropout=SHARE, **OPTIONS),
    "loha of modules": LoHaConfig(r=2, module_dropout=SHARE, **OPTIONS),
    "loha of ranks": LoHaConfig(r=2, rank_dropout=SHARE, **OPTIONS),
    "lokr of ranks": LoKrConfig(r=2, rank_dropout=SHARE, **OPTIONS),
}


def with_dropout(model_type: str, monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    """The tiny model of a type, whose configuration drops half of everything that it has a number for."""
    config = tiny_config(model_type)
    set_everywhere(config)
    monkeypatch.setattr(tiny_models, "tiny_config", lambda _: config)
    return build(model_type)


def set_everywhere(config: PretrainedConfig) -> None:
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            set_everywhere(value)
        elif ("drop" in name or "jitter" in name) and not isinstance(value, bool):
            vars(config)[name] = SHARE


def gap(one_TV: Tensor, other_TV: Tensor) -> float:
    return float((one_TV - other_TV).abs().max() / other_TV.abs().max().clamp_min(1.0))


def numbers(model: nn.Module) -> dict[tuple[str, str], Any]:
    """What all modules keep as plain numbers, or as mappings of them."""
    return {
        (part, name): copy.copy(value)
        for part, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, int | float) or name in ("module_dropout", "rank_dropout")
    }


@pytest.mark.parametrize(
    "model_type",
    [
        *(name for name in dict.fromkeys((*QUICK, *DRAWING)) if name in MODEL_TYPES),
        *(pytest.param(name, marks=pytest.mark.models) for name in MODEL_TYPES if name not in (*QUICK, *DRAWING)),
    ],
)
@pytest.mark.filterwarnings("ignore:::transformers")
def test_every_type_trains_the_law_that_is_sampled(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if model_type in FIXED_LENGTH:
        pytest.skip("its training mode takes rows of one length")
    try:
        model = with_dropout(model_type, monkeypatch)
    except (NotRunnableError, StrictDataclassError) as error:
        pytest.skip(f"no such model can be built: {error}")
    sampled_TV = plain_logits(model, ROW)
    torch.manual_seed(0)
    model.train()
    assert (gap(plain_logits(model, ROW), sampled_TV) > TOLERANCE) == (model_type not in SILENT)
    model.eval()
    before, options = numbers(model), model.config.to_dict()
    with draws_off(model):
        model.train()
        trained_TV = plain_logits(model, ROW)
    model.eval()
    assert gap(trained_TV, sampled_TV) <= TOLERANCE
    assert (numbers(model), model.config.to_dict()) == (before, options)
    check_draws_off(model)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.filterwarnings("ignore:::peft")
def test_adapters_train_the_law_that_is_sampled(adapter: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(build("llama").float(), copy.deepcopy(ADAPTERS[adapter])).eval()
        for weight in model.parameters():
            if weight.requires_grad:  # the adapter's, which would start as nothing
                nn.init.normal_(weight, std=0.3)
    sampled_TV, before = plain_logits(model, ROW), numbers(model)
    assert draws(model)
    torch.manual_seed(1)
    model.train()
    assert gap(plain_logits(model, ROW), sampled_TV) > 1e-3
    with draws_off(model):
        assert not draws(model)
        for _ in range(3):
            assert gap(plain_logits(model, ROW), sampled_TV) <= TOLERANCE
    model.eval()
    assert numbers(model) == before


def gradient(model: PreTrainedModel) -> Tensor:
    weight = model.get_input_embeddings().weight
    model.requires_grad_(True).zero_grad()
    model(input_ids=torch.tensor([ROW]), use_cache=False).logits.log_softmax(-1)[0, :, 3].sum().backward()
    assert weight.grad is not None
    return weight.grad.clone()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("model_type", ["phimoe", "opt"])
@pytest.mark.filterwarnings("ignore:::transformers")
def test_gradients_are_those_of_the_law_that_is_sampled(
    model_type: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the backward pass computes layers again; PhiMoE in training mode would draw its experts."""
    model = with_dropout(model_type, monkeypatch)
    expected = gradient(model)
    if checkpointing:
        # transformers 5.24 renamed it.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    with draws_off(model):
        model.train()
        found = gradient(model)
    assert float((found - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())


def test_a_step_walks_over_the_modules_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, walks = build("llama"), list[nn.Module]()
    walk = nn.Module.modules
    monkeypatch.setattr(nn.Module, "modules", lambda self: (walks.append(self), walk(self))[1])
    with draws_off(model):
        pass
    assert walks == [model]


class Hidden(nn.Module):
    """Draws by a number that nobody can find."""

    def forward(self, states: Tensor) -> Tensor:
        if self.training:
            random.random()
            numpy.random.random()
        return nn.functional.dropout(states, 0.3, self.training)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_still_draws_is_refused_and_no_random_state_moves(dtype: torch.dtype) -> None:
    model = build("llama").to(dtype)
    model.base_model.layers[0].mlp = nn.Sequential(model.base_model.layers[0].mlp, Hidden())
    states = random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist()
    with pytest.raises(UnsupportedModelError, match=r"llama .*training mode .*disable_dropout=False"):
        check_draws_off(model)
    assert (random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist()) == states
    assert not model.training
