"""Weights that RWKV would halve in place: kept as they are by whatever reads it, and the law is that of training mode.

The oracle is the model's own pass in training mode, where the library rescales nothing and RWKV has no dropout.
"""

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, RwkvConfig, RwkvForCausalLM

from trb.models.modeling import UnsupportedModelError, check_causal, evaluation_mode
from trb.models.sharing import shared_teacher
from trb.policies import StudentPolicy, TrustRegionPolicy
from trb.sampling import sample

IDS = torch.tensor([[1, 2, 3, 4, 5, 6]])
# Layer 4 of four is divided by 2, and what reaches it too: products with powers of two round nothing.
EVERY, LAYERS = 2, 4


def rwkv(dtype: torch.dtype = torch.float64, layers: int = LAYERS) -> PreTrainedModel:
    sizes = {"hidden_size": 16, "attention_hidden_size": 16, "intermediate_size": 32, "context_length": 64}
    ids = {"bos_token_id": None, "eos_token_id": None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = RwkvConfig(vocab_size=24, num_hidden_layers=layers, rescale_every=EVERY, **sizes, **ids)
        model = RwkvForCausalLM(config).to(dtype)
        for weight in model.parameters():
            if weight.ndim == 2:
                torch.nn.init.normal_(weight, std=0.35)
    return model


def trained_law(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).train()(IDS, use_cache=False).logits


def law(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def test_the_library_still_rescales_in_place() -> None:
    """Where it no longer does, nothing of this is needed."""
    model = rwkv()
    weight = model.rwkv.blocks[2].attention.output.weight.clone()
    law(model.eval())
    assert torch.equal(model.rwkv.blocks[2].attention.output.weight * 2, weight)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_sampling_leaves_every_weight_and_what_is_saved(tmp_path: Path, training: bool) -> None:
    model = rwkv().train(training)
    before, expected = copy.deepcopy(model.state_dict()), trained_law(model)
    sample(model, None, [[1, 2, 3]], StudentPolicy(), max_new_tokens=2, eos_token_id=5)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    model.save_pretrained(tmp_path)
    again = RwkvForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert again.config.rescale_every == EVERY  # whoever loads it in float16 needs it
    torch.testing.assert_close(trained_law(again), expected, rtol=0, atol=1e-12)  # loaded elsewhere in memory


def test_what_was_rescaled_before_is_multiplied_again() -> None:
    model = rwkv()
    before, expected = copy.deepcopy(model.state_dict()), trained_law(model)
    law(model.eval())
    with evaluation_mode(model):
        assert torch.equal(law(model), expected)
    assert torch.equal(law(model), expected)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("read_before", [False, True])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_student_and_teacher_on_the_same_weights_have_the_law_of_each(read_before: bool) -> None:
    """A fresh adapter adds nothing: both have the law of the base."""
    base = rwkv()
    expected = trained_law(base)
    if read_before:
        law(base.eval())
    student = get_peft_model(base, LoraConfig(r=2, target_modules=["key"]))
    teacher = shared_teacher(student)
    rollout = sample(student, teacher, [[1, 2, 3]], TrustRegionPolicy(0.5), max_new_tokens=4, eos_token_id=23)
    assert max(map(max, rollout.stats.kl_teacher)) == 0
    assert torch.equal(law(teacher), expected)
    assert torch.equal(law(student.eval()), expected)
    assert torch.equal(law(student.train()), expected)


def test_in_float16_it_is_refused_where_weights_would_be_divided() -> None:
    with pytest.raises(UnsupportedModelError, match=r"rwkv .* float16 .*rescale_every=2.* bfloat16"):
        check_causal(rwkv(torch.float16))
    student = get_peft_model(rwkv(torch.float16), LoraConfig(r=2, target_modules=["key"]))
    with pytest.raises(UnsupportedModelError, match="float16"):
        shared_teacher(student)
    shallow = rwkv(torch.float16, layers=EVERY)
    with evaluation_mode(shallow):
        assert torch.isfinite(law(shallow)).all()
